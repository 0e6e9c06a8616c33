"""Streams: a length, then the message. asyncio's over TCP (uvloop's too, by the event loop), and aiordma's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from .clients import Channel, client_of
from .interface import HOST, SMALL, Bytes, Client, Desk, Peer, Unavailable

if TYPE_CHECKING:
    import aiordma


class _Stream:
    """Messages on a pair of streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, message: Bytes) -> None:
        """A large message is not copied to have its length in front."""
        writer = self._writer
        header = len(message).to_bytes(4, "little")
        if len(message) <= SMALL:
            writer.write(header + message)
        else:
            writer.write(header)
            writer.write(message)
        await writer.drain()

    async def receive(self) -> bytes:
        """Raises IncompleteReadError at the end of the stream."""
        reader = self._reader
        size = int.from_bytes(await reader.readexactly(4), "little")
        return await reader.readexactly(size)


class Streams(Peer):
    """``package`` has open_connection() and start_server(): asyncio or aiordma."""

    def __init__(self, package: str = "asyncio", **aiordma_options: Any) -> None:
        self._options: dict[str, Any] = {}
        self._package: Any = asyncio
        if package == "aiordma":
            self._use_aiordma(**aiordma_options)

    def _use_aiordma(self, mode: aiordma.config.Mode, device: str) -> None:
        import aiordma

        if not (hasattr(aiordma, "open_connection") and hasattr(aiordma, "start_server")):
            raise Unavailable(f"aiordma {aiordma.__version__} has no open_connection() and start_server()")
        self._package = aiordma
        self._options |= {"device": device, "config": aiordma.Config(mode=mode)}

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = _Stream(reader, writer)
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    answer = desk.answer(await stream.receive())
                    if answer is not None:
                        await stream.send(answer)
            writer.close()

        server = await self._package.start_server(on_client, HOST, 0, **self._options)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await server.wait_closed()

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        reader, writer = await self._package.open_connection(HOST, port, **self._options)
        try:
            stream = _Stream(reader, writer)
            async with client_of(Channel(stream.send, stream.receive), outstanding) as client:
                yield client
        finally:
            writer.close()
            await writer.wait_closed()
