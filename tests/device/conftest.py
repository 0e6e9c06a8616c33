"""Fixtures of the device suite: connected pairs in one event loop, and peers in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

import aiordma
from aiordma import Config, Connection, Lease, RemoteRegion, Server


@dataclass
class Pair:
    """Both ends of a connection, and the listener it was made by."""

    client: Connection
    server: Connection
    listener: Server

    async def region(self, nbytes: int, access: str = "read|write|atomic") -> tuple[Lease, RemoteRegion]:
        """Memory of the server, shared with the client under a name of its own."""
        lease = await self.server.allocate(nbytes)
        name = f"region {lease.address:#x}"
        await self.server.share(name, lease, access)
        return lease, await self.client.remote(name)


class MakePair(Protocol):
    def __call__(
        self, config: Config | None = None, server_config: Config | None = None, **kwargs: Any
    ) -> Awaitable[Pair]: ...


class Acceptor:
    """A handler that hands its connections to the test and keeps them until they close.

    With ``hold``, until the test is over: a handler that ends drops what was not received.
    """

    def __init__(self, hold: bool) -> None:
        self.accepted: asyncio.Queue[Connection] = asyncio.Queue()
        self.over = asyncio.Event()
        self.hold = hold

    async def __call__(self, connection: Connection) -> None:
        self.accepted.put_nowait(connection)
        await connection.wait_closed()
        if self.hold:
            await self.over.wait()


@pytest.fixture
async def listen(no_leaked_tasks: None) -> AsyncIterator[Callable[..., Awaitable[tuple[Server, Acceptor]]]]:
    """Starts servers that are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            config: Config | None = None, *, hold: bool = False, **kwargs: Any
        ) -> tuple[Server, Acceptor]:
            acceptor = Acceptor(hold)
            server = aiordma.serve(acceptor, "127.0.0.1", 0, config=config, **kwargs)
            await stack.enter_async_context(server)
            stack.callback(acceptor.over.set)
            return server, acceptor

        yield start


@pytest.fixture
async def pair(listen: Callable[..., Awaitable[tuple[Server, Acceptor]]]) -> AsyncIterator[MakePair]:
    """Makes connected pairs; both ends are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            config: Config | None = None, server_config: Config | None = None, **kwargs: Any
        ) -> Pair:
            server, acceptor = await listen(server_config or config, hold=True, **kwargs)
            client = await aiordma.connect("127.0.0.1", server.port, config=config, **kwargs)
            await stack.enter_async_context(client)
            accepted = await acceptor.accepted.get()
            await stack.enter_async_context(accepted)
            return Pair(client, accepted, server)

        yield make


def rnr_counters() -> dict[str, int]:
    """Receiver-not-ready NAKs the kernel's rxe devices have seen; they must never move."""
    found = {}
    for path in Path("/sys/class/infiniband").glob("*/ports/*/hw_counters/*rnr*"):
        found[str(path)] = int(path.read_text())
    return found


@pytest.fixture(autouse=True)
def receivers_always_ready() -> Any:
    """No test of ours may make a receiver-not-ready NAK happen."""
    before = rnr_counters()
    yield
    assert rnr_counters() == before
