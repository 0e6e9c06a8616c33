"""asyncio's transports and protocols over TCP, as one writes them for speed: no streams, one future a request.

A message is its length and its bytes. Small ones are cut from a buffer that is read into; a block is read into
memory of its own, without a copy. Answers to what arrived together are written together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

from .interface import HOST, SMALL, Bytes, Client, Desk, Peer

_CHUNK = 1 << 18
_HEADER = 4


def framed(message: Bytes) -> bytes:
    """With its length in front."""
    return len(message).to_bytes(_HEADER, "little") + message


class _Frames(asyncio.BufferedProtocol):
    """Cuts what arrives into messages."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._chunk = bytearray(_CHUNK)
        self._view = memoryview(self._chunk)
        self._end = 0  # of what is in the chunk
        self._block: memoryview | None = None
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._end :] if self._block is None else self._block[-self._missing :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._block is None:
            self._end += nbytes
            self.received(self._cut())
            return
        self._missing -= nbytes
        if not self._missing:
            block, self._block = self._block, None
            self.received([block])

    def received(self, messages: list[Bytes]) -> None:
        """One or several that arrived together."""
        raise NotImplementedError

    def _cut(self) -> list[Bytes]:
        """The whole messages in the chunk; what is left of it goes to its start, or begins a block."""
        found: list[Bytes] = []
        view, start, end = self._view, 0, self._end
        while end - start >= _HEADER:
            size = int.from_bytes(view[start : start + _HEADER], "little")
            body = start + _HEADER
            if size > SMALL and body + size > end:
                self._begin_block(size, body)
                return found
            if body + size > end:
                break
            found.append(bytes(view[body : body + size]))
            start = body + size
        self._end = end - start
        view[: self._end] = bytes(view[start:end])
        return found

    def _begin_block(self, size: int, body: int) -> None:
        there = self._end - body
        self._block = memoryview(bytearray(size))
        self._block[:there] = self._view[body : self._end]
        self._missing = size - there
        self._end = 0


class _Server(_Frames):
    """Answers; reads no more while the peer does not take the answers."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._answer = desk.answer

    def received(self, messages: list[Bytes]) -> None:
        answers = [framed(answer) for answer in map(self._answer, messages) if answer is not None]
        if answers:
            self.transport.write(b"".join(answers))

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class _Client(_Frames, Client):
    """Answers come in the order of the requests."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[Bytes]] = deque()
        self._writable = asyncio.Event()
        self._writable.set()

    async def request(self, data: bytes) -> Bytes:
        answer: asyncio.Future[Bytes] = self._loop.create_future()
        self._waiting.append(answer)
        self.transport.write(framed(data))
        return await answer

    async def push(self, block: bytes) -> None:
        self.transport.write(len(block).to_bytes(_HEADER, "little"))
        self.transport.write(block)
        await self._writable.wait()

    def received(self, messages: list[Bytes]) -> None:
        for message in messages:
            self._waiting.popleft().set_result(message)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        for answer in self._waiting:
            answer.set_exception(exc or ConnectionResetError("the server closed the connection"))


class Protocol(Peer):
    """The loop decides whose transport it is."""

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        server = await asyncio.get_running_loop().create_server(lambda: _Server(desk), HOST, 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        _, client = await asyncio.get_running_loop().create_connection(_Client, HOST, port)
        try:
            yield client
        finally:
            client.transport.close()
