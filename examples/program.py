"""The command line that several examples have in common: a server, a client, or both in one go."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import aiordma

#: Given the arguments and the settings: serves for a block, and gives the port.
Serving = Callable[[argparse.Namespace, aiordma.Config], AbstractAsyncContextManager[int]]
Client = Callable[[argparse.Namespace, aiordma.Config], Awaitable[None]]


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options of every example; ``doc`` is the docstring of the program."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("role", nargs="?", default="both", choices=["server", "client", "both"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or to connect to")
    parser.add_argument(
        "--port", type=int, default=0, help="TCP port; server: 0 is a free one, and is printed"
    )
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    return parser


def run(args: argparse.Namespace, serving: Serving, client: Client) -> None:
    """Runs a server until it is interrupted, a client to its end, or a client beside a server."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(args, serving, client))


async def _run(args: argparse.Namespace, serving: Serving, client: Client) -> None:
    config = aiordma.Config(mode=args.mode)
    if args.role == "client":
        await client(args, config)
        return
    async with serving(args, config) as args.port:
        if args.role == "both":
            await client(args, config)
        else:
            print(args.port, flush=True)
            await asyncio.Event().wait()
