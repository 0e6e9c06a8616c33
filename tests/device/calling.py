"""What the RPC tests share: a server and a client of it, handlers that wait, and what the loop is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiordma
from aiordma import Config, Connection
from aiordma.rpc import RpcClient, RpcServer, ServerContext, Service

CONFIG = Config(mode="event", receive_credits=16, send_depth=16)


@asynccontextmanager
async def connected(server: RpcServer, config: Config = CONFIG) -> AsyncIterator[Connection]:
    """A connection to ``server``, run here."""
    async with (
        aiordma.serve(server, "127.0.0.1", 0, config=config) as listening,
        aiordma.connect("127.0.0.1", listening.port, config=config) as connection,
    ):
        yield connection


@asynccontextmanager
async def calling(services: Service | RpcServer, **options: Any) -> AsyncIterator[RpcClient]:
    """A client of services. ``options`` are the client's where the server is given, else the server's."""
    server = services if isinstance(services, RpcServer) else RpcServer(services, **options)
    async with connected(server) as connection:
        async with RpcClient(connection, **(options if server is services else {})) as client:
            yield client


@contextmanager
def reports() -> Iterator[list[dict[str, Any]]]:
    """What goes to the loop's exception handler meanwhile."""
    loop, seen = asyncio.get_running_loop(), list[dict[str, Any]]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: seen.append(context))
    yield seen
    loop.set_exception_handler(before)


class Gate:
    """A handler that waits until it may go on, and tells what happened to it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.cancelled = asyncio.Semaphore(0)
        self.contexts: list[ServerContext] = []

    async def __call__(self, payload: bytes, context: ServerContext) -> bytes:
        self.contexts.append(context)
        self.entered.release()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return payload


class Stubborn(Gate):
    """One that goes on after its cancellation, until it may end."""

    async def __call__(self, payload: bytes, context: ServerContext) -> bytes:
        while True:
            try:
                return await super().__call__(payload, context)
            except asyncio.CancelledError:
                if self.open.is_set():
                    raise


async def echo(payload: bytes) -> bytes:
    """What it is sent."""
    return payload


def service(**handlers: Any) -> Service:
    """Unary methods without a service name."""
    made = Service("")
    for name, handler in handlers.items():
        made.add(handler, name=name)
    return made


async def eventually(condition: Any) -> None:
    """Goes on with the loop until a state without an event is there; the test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0)
