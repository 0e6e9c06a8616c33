"""An RPC server: functions that clients call. Try it with examples/rpc_client.py.

python examples/rpc_server.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib

import aiordma
from aiordma.rpc import RpcError, RpcServer

rpc = RpcServer(max_concurrent=100)


@rpc.method
async def sha256(payload: bytes) -> bytes:
    """The payload's hash."""
    return hashlib.sha256(payload).digest()


@rpc.method
async def divide(payload: bytes) -> bytes:
    """``b"84 2"`` is ``b"42"``. What is raised as RpcError, the caller gets to read."""
    try:
        dividend, divisor = (int(word) for word in payload.split())
    except ValueError:
        raise RpcError("invalid", "two whole numbers, please") from None
    if divisor == 0:
        raise RpcError("invalid", "division by zero")
    return b"%d" % (dividend // divisor)


@rpc.method("sleep")
async def sleep_seconds(payload: bytes) -> bytes:
    """Takes its time; other calls go on meanwhile, and it is cancelled when nobody waits any more."""
    try:
        await asyncio.sleep(float(payload))
    except asyncio.CancelledError:
        print("a sleep was cancelled", flush=True)
        raise
    return b"slept"


async def serve(args: argparse.Namespace) -> None:
    """Serves until interrupted."""
    config = aiordma.Config(mode=args.mode)
    async with aiordma.serve(rpc, args.host, args.port, config=config, token=args.token) as server:
        print(server.port, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="TCP port; 0 is a free one")
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--token", help="a secret both sides know")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
