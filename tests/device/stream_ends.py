"""The two ways to carry a stream, with the same functions, and protocols that record what is called.

``Network`` is asyncio's TCP ("tcp") or aiordma's streams ("rdma"): the tests of the streams run on both, so that
what a protocol sees is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

import aiordma

HOST = "127.0.0.1"
#: What TCP's kernel or an RDMA peer may say when the other side is gone.
RESET = (ConnectionResetError, BrokenPipeError)

P = TypeVar("P", bound="Recorder")


class Watcher:
    """Lets a test wait for a state: whoever changes something calls :meth:`changed`."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []
        self.calls: list[Any] = []

    @property
    def is_lost(self) -> bool:
        return bool(self.calls) and isinstance(self.calls[-1], tuple)

    def changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            assert not self.is_lost, f"lost before it was so: {self.calls}"
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter


class Recorder(Watcher, asyncio.Protocol):
    """Records every callback but the data's, which is joined in ``data``."""

    def __init__(self, *, keep_open: bool = False) -> None:
        super().__init__()
        self.keep_open = keep_open
        self.data = bytearray()
        self.writable = True
        self.sizes_when_paused: list[int] = []
        self.sizes_when_resumed: list[int] = []
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.calls.append("made")
        self.changed()

    def data_received(self, data: bytes) -> None:
        if self.calls[-1] != "data":
            self.calls.append("data")
        self.data += data
        self.changed()

    def eof_received(self) -> bool | None:
        self.calls.append("eof")
        self.changed()
        return self.keep_open

    def pause_writing(self) -> None:
        self.writable = False
        self.sizes_when_paused.append(self.transport.get_write_buffer_size())
        self.calls.append("pause")
        self.changed()

    def resume_writing(self) -> None:
        self.writable = True
        self.sizes_when_resumed.append(self.transport.get_write_buffer_size())
        self.calls.append("resume")
        self.changed()

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", exc))
        self.changed()

    # --- what tests ask -------------------------------------------------------------------------------

    async def lost(self) -> Exception | None:
        """Waits for the end; what connection_lost() was given. It is the last callback, and there is only one."""
        await self.until(lambda: self.is_lost)
        assert sum(isinstance(call, tuple) for call in self.calls) == 1
        error: Exception | None = self.calls[-1][1]
        return error

    async def received(self, nbytes: int) -> bytes:
        """Waits until so much has come, in all."""
        await self.until(lambda: len(self.data) >= nbytes)
        return bytes(self.data)

    @property
    def stops(self) -> list[str]:
        """The calls of pause_writing() and resume_writing()."""
        return [call for call in self.calls if call in ("pause", "resume")]


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same with a buffer of its own, smaller than what comes."""

    def __init__(self, size: int = 1000) -> None:
        super().__init__()
        self.buffer = bytearray(size)
        self.hints: set[int] = set()

    def get_buffer(self, sizehint: int) -> bytearray:
        self.hints.add(sizehint)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


class Network:
    """Streams of one kind; all that was made is closed by :meth:`finish`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ends: list[Recorder] = []
        self._servers: list[Any] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._connections: list[aiordma.Connection] = []

    @property
    def _source(self) -> Any:
        return aiordma if self.name == "rdma" else asyncio.get_running_loop()

    @property
    def rdma(self) -> bool:
        return self.name == "rdma"

    @property
    def module(self) -> Any:
        """What has start_server and open_connection."""
        return aiordma if self.rdma else asyncio

    def keep(self, end: P) -> P:
        """The end is aborted after the test, should it be open."""
        self._ends.append(end)
        return end

    async def create_server(self, factory: Callable[[], Any], **options: Any) -> tuple[Any, int]:
        """A server and its port."""
        server = await self._source.create_server(factory, HOST, 0, **options)
        self._servers.append(server)
        return server, server.sockets[0].getsockname()[1]

    async def create_connection(
        self, factory: Callable[[], Any], port: int, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        transport, protocol = await self._source.create_connection(factory, HOST, port, **options)
        self._watch(transport)
        return transport, protocol

    async def tls_connection(
        self, factory: Callable[[], Any], port: int, **options: Any
    ) -> asyncio.Transport:
        """TLS in the stream: the transport of the protocol."""
        transport, _ = await self._source.create_connection(factory, HOST, port, **options)
        self._watch(transport)
        return transport  # type: ignore[no-any-return]

    def _watch(self, transport: asyncio.BaseTransport) -> None:
        connection = transport.get_extra_info("rdma_connection")
        assert (connection is not None) == self.rdma
        if connection is not None:
            self._connections.append(connection)

    async def pair(
        self, client: Recorder | None = None, server: Recorder | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Two connected ends."""
        client, server = self.keep(client or Recorder()), self.keep(server or Recorder())
        listening, port = await self.create_server(lambda: server, **options)
        await self.create_connection(lambda: client, port, **options)
        await server.until(lambda: server.calls)
        self._watch(server.transport)
        listening.close()
        return client, server

    async def streams(
        self, limit: int = 64 << 10
    ) -> tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], ...]:
        """Reader and writer of the client, and of the server."""
        module = self.module
        accepted: asyncio.Queue[Any] = asyncio.Queue()
        server = await module.start_server(lambda *ends: accepted.put_nowait(ends), HOST, 0, limit=limit)
        self._servers.append(server)
        port = server.sockets[0].getsockname()[1]
        ours = await module.open_connection(HOST, port, limit=limit)
        theirs = await accepted.get()
        for _, writer in (ours, theirs):
            self._writers.append(writer)
            self._watch(writer.transport)
        server.close()
        return ours, theirs

    async def quiet(self) -> None:
        """What was under way before has arrived by now: a conversation of other ends takes its time."""
        client, server = await self.pair()
        for n in range(1, 20):
            client.transport.write(b"ping")
            await server.received(4 * n)
            server.transport.write(b"pong")
            await client.received(4 * n)
        client.transport.close()
        await client.lost()
        await server.lost()

    async def fill(self, end: Recorder) -> int:
        """Writes until the transport says stop and nothing moves any more; returns the bytes."""
        chunk = bytes(64 << 10)
        written = 0
        while True:
            while end.writable:
                end.transport.write(chunk)
                written += len(chunk)
                await asyncio.sleep(0)
            await self.quiet()
            if not end.writable:
                return written

    async def finish(self) -> None:
        for end in self._ends:
            if hasattr(end, "transport"):
                if not end.is_lost:  # asyncio's of Python 3.13.0 cannot abort one that is gone
                    end.transport.abort()
                await end.lost()
        for writer in self._writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        for server in self._servers:
            server.close()
            await server.wait_closed()
        for connection in self._connections:
            await connection.wait_closed()


@contextlib.asynccontextmanager
async def network(name: str) -> AsyncIterator[Network]:
    net = Network(name)
    try:
        yield net
    finally:
        await net.finish()


@contextmanager
def reports() -> Iterator[list[dict[str, Any]]]:
    """What goes to the loop's exception handler meanwhile."""
    loop, seen = asyncio.get_running_loop(), list[dict[str, Any]]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: seen.append(context))
    yield seen
    loop.set_exception_handler(before)


def on_uvloop() -> bool:
    return type(asyncio.get_running_loop()).__module__.startswith("uvloop")


both = pytest.mark.parametrize("kind", ["tcp", "rdma"])
