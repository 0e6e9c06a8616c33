"""An RPC server: a key-value store with typed methods of all kinds. Try it with examples/rpc_client.py, or

python examples/rpc_server.py --port 7471
python -m aiordma call 127.0.0.1:7471 --list
python -m aiordma call 127.0.0.1:7471 kv/get --json '{"key": "a"}'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import signal
from collections.abc import AsyncIterator

from pydantic import BaseModel, Field

import aiordma
from aiordma.rpc import RpcServer, ServerContext, Service, StatusCode

kv = Service("kv")
store: dict[str, str] = {}


class Key(BaseModel):
    """Which entry."""

    key: str = Field(min_length=1, max_length=100)


class Entry(Key):
    """A key and its value."""

    value: str


class Stored(BaseModel):
    """How many entries were stored."""

    count: int


@kv.unary
async def get(request: Key, context: ServerContext) -> Entry:
    """The value of a key."""
    if request.key not in store:
        context.abort(StatusCode.NOT_FOUND, f"there is no key {request.key!r}")
    return Entry(key=request.key, value=store[request.key])


@kv.client_stream
async def put(entries: AsyncIterator[Entry]) -> Stored:
    """Stores entries as they come."""
    count = 0
    async for entry in entries:
        store[entry.key] = entry.value
        count += 1
    return Stored(count=count)


@kv.server_stream
async def scan(prefix: str) -> AsyncIterator[Entry]:
    """All entries whose keys begin with the prefix."""
    for key in sorted(store):
        if key.startswith(prefix):
            yield Entry(key=key, value=store[key])


@kv.bidi
async def hashes(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The SHA-256 of each piece of data; bytes both ways, of any size."""
    async for piece in pieces:
        yield hashlib.sha256(piece).digest()


@kv.unary
async def sleep(seconds: float, context: ServerContext) -> str:
    """Takes its time; it is cancelled when nobody waits any more."""
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        print(f"a sleep was cancelled, {context.time_remaining()} s before its deadline", flush=True)
        raise
    return "slept"


async def serve(args: argparse.Namespace) -> None:
    """Serves until interrupted; calls in flight may then end within a second."""
    rpc = RpcServer(kv, max_concurrent=100)
    config = aiordma.Config(mode=args.mode)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with aiordma.serve(rpc, args.host, args.port, config=config, token=args.token) as server:
        print(server.port, flush=True)
        await stop.wait()
        await rpc.drain(grace=1.0)


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
