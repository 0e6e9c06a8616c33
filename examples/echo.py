"""Messages: a server that sends back what it gets, and a client that measures round trips.

    python examples/echo.py server
    python examples/echo.py client --port PORT

The server prints its port, so that it can take a free one (--port 0, the default).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time

import aiordma


async def echo(connection: aiordma.Connection) -> None:
    """The server's side of one connection; when this returns, the connection closes."""
    print(f"{connection.peer} connected", flush=True)
    async for message in connection:
        await connection.send(message)


async def server(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Serves until interrupted."""
    async with aiordma.serve(echo, args.host, args.port, config=config, token=args.token) as listening:
        print(listening.port, flush=True)
        await asyncio.Event().wait()


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Sends messages one by one, and prints how long the answers took."""
    async with aiordma.connect(args.host, args.port, config=config, token=args.token) as connection:
        print(f"connected: {connection.route.adapter.name}, {connection.route.choice.explain()}")
        message = b"x" * args.size
        times = []
        for _ in range(args.count):
            started = time.perf_counter()
            await connection.send(message)
            if await connection.recv() != message:
                raise SystemExit("the echo is not what was sent")
            times.append(time.perf_counter() - started)
        times.sort()
        median = times[len(times) // 2]
        print(f"{args.count} echoes of {args.size} bytes, median round trip {median * 1e6:.1f} us")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or to connect to")
    parser.add_argument("--port", type=int, default=0, help="TCP port; server: 0 is a free one")
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--token", help="a secret both sides know")
    parser.add_argument("--count", type=int, default=1000, help="client: number of messages")
    parser.add_argument("--size", type=int, default=64, help="client: bytes of a message")
    return parser.parse_args()


def main() -> None:
    """Runs one side."""
    args = arguments()
    role = server if args.role == "server" else client
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(role(args, aiordma.Config(mode=args.mode)))


if __name__ == "__main__":
    main()
