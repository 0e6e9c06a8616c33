"""An RPC client: calls of all kinds, some that fail, one that takes too long. See examples/rpc_server.py.

python examples/rpc_client.py --port PORT
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib

import aiordma
from aiordma.rpc import RpcClient, RpcError, RpcTimeoutError

Entry = dict[str, str]


async def fill_and_read(client: RpcClient, count: int) -> None:
    """A stream there, many calls at the same time, and a stream back."""
    entries = [{"key": f"key {i:04}", "value": f"value {i}"} for i in range(count)]
    stored = await client.client_stream("kv/put", entries, reply_type=dict[str, int])
    print(f"stored {stored['count']} entries")
    calls = (client.unary("kv/get", {"key": entry["key"]}, reply_type=Entry) for entry in entries)
    if await asyncio.gather(*calls) != entries:
        raise SystemExit("a reply is wrong")
    print(f"{count} calls at the same time, all replies right")
    found = [entry["value"] async for entry in client.server_stream("kv/scan", "key 000", reply_type=Entry)]
    print(f"scan found {', '.join(found[:3])}, ...")


async def hash_pieces(client: RpcClient) -> None:
    """Both directions at once: each hash is there before the next piece is sent."""
    async with client.bidi("kv/hashes", timeout=60) as call:
        for size in (10, 1_000_000):
            piece = bytes(size)
            await call.write(piece)
            if await call.read() != hashlib.sha256(piece).digest():
                raise SystemExit("a hash is wrong")
        await call.done_writing()
    print("all hashes right")


async def failing(client: RpcClient) -> None:
    """An error ends its own call only, and says why."""
    for request in ({"key": "nowhere"}, {"key": ""}):
        try:
            await client.unary("kv/get", request)
        except RpcError as error:
            print(f"get {request} failed with {error.code.name}: {error.details}")


async def impatient(client: RpcClient) -> None:
    """The deadline goes with the call: the server stops, too."""
    try:
        await client.unary("kv/sleep", 60, timeout=0.2)
    except RpcTimeoutError as error:
        print(error)


async def run(args: argparse.Namespace) -> None:
    """One connection for all of it."""
    config = aiordma.Config(mode=args.mode)
    async with (
        aiordma.connect(args.host, args.port, config=config, token=args.token) as connection,
        RpcClient(connection) as client,
    ):
        print(f"the server is {await client.health()}")
        await fill_and_read(client, args.count)
        await hash_pieces(client)
        await failing(client)
        await impatient(client)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1", help="address of the server")
    parser.add_argument("--port", type=int, required=True, help="the port that the server printed")
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--token", help="a secret both sides know")
    parser.add_argument("--count", type=int, default=100, help="calls at the same time")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
