"""An RPC client: many calls at a time, one that fails, one that takes too long. See examples/rpc_server.py.

python examples/rpc_client.py --port PORT
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib

import aiordma
from aiordma.rpc import RpcClient, RpcError


async def many(client: RpcClient, count: int) -> None:
    """Calls at the same time; each gets its own reply, whatever the order."""
    payloads = [b"payload %d" % i for i in range(count)]
    digests = await asyncio.gather(*(client.call("sha256", payload) for payload in payloads))
    if digests != [hashlib.sha256(payload).digest() for payload in payloads]:
        raise SystemExit("a hash is wrong")
    print(f"{count} calls at the same time, all hashes right")


async def failing(client: RpcClient) -> None:
    """An error ends its own call only."""
    for payload in (b"84 2", b"84 0"):
        try:
            print(f"divide {payload!r} = {(await client.call('divide', payload)).decode()}")
        except RpcError as error:
            print(f"divide {payload!r} failed with status {error.status}: {error.details}")


async def impatient(client: RpcClient) -> None:
    """After the timeout the server is told to stop."""
    try:
        await client.call("sleep", b"60", timeout=0.2)
    except TimeoutError as error:
        print(error)


async def run(args: argparse.Namespace) -> None:
    """One connection for all of it."""
    config = aiordma.Config(mode=args.mode)
    async with (
        aiordma.connect(args.host, args.port, config=config, token=args.token) as connection,
        RpcClient(connection) as client,
    ):
        await many(client, args.count)
        await failing(client)
        await impatient(client)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1", help="address of the server")
    parser.add_argument("--port", type=int, required=True, help="the port that the server printed")
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--token", help="a secret both sides know")
    parser.add_argument("--count", type=int, default=100, help="calls at the same time (100 at most)")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
