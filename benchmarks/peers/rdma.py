"""aiordma: messages, and unary RPC over them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiordma

from .clients import Channel, client_of
from .interface import HOST, OUTSTANDING, Bytes, Client, Desk, Peer, Unavailable

if TYPE_CHECKING:
    from aiordma.config import Mode

METHOD = "benchmark/call"


async def answer_messages(connection: aiordma.Connection, desk: Desk) -> None:
    """Answers are not awaited one by one: that would be a round trip each before the next message is looked at."""
    sending = deque[asyncio.Future[None]]()
    try:
        async for message in connection:
            answer = desk.answer(message)
            if answer is not None:
                sending.append(connection.send(answer))
            if len(sending) == OUTSTANDING:
                await sending.popleft()
    finally:  # a connection that was lost has failed them all
        await asyncio.gather(*sending, return_exceptions=True)


class Messages(Peer):
    """send() and recv() in one of the modes."""

    def __init__(self, mode: Mode, device: str) -> None:
        self._device, self._config = device, aiordma.Config(mode=mode)

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def handler(connection: aiordma.Connection) -> None:
            await answer_messages(connection, desk)

        async with aiordma.serve(handler, HOST, 0, device=self._device, config=self._config) as server:
            yield server.port

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        async with (
            aiordma.connect(HOST, port, device=self._device, config=self._config) as connection,
            client_of(Channel(connection.send, connection.recv), outstanding) as client,
        ):
            yield client

    def versions(self) -> dict[str, str]:
        return {"aiordma": aiordma.__version__}


class _Caller(Client):
    """A block is a call with an empty reply."""

    def __init__(self, unary: Callable[[str, bytes], Awaitable[Bytes]]) -> None:
        self._unary = unary

    async def request(self, data: bytes) -> Bytes:
        return await self._unary(METHOD, data)

    async def push(self, block: bytes) -> None:
        await self._unary(METHOD, block)


class Rpc(Messages):
    """Unary calls whose request and reply are bytes."""

    def __init__(self, mode: Mode, device: str) -> None:
        super().__init__(mode, device)
        self._rpc: Any = importlib.import_module("aiordma.rpc")
        if not hasattr(self._rpc, "Service"):
            raise Unavailable(f"aiordma {aiordma.__version__} has no RPC with services and unary calls")

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def call(request: bytes, context: Any) -> bytes:
            answer = desk.answer(request)
            return b"" if answer is None else bytes(answer)

        service = self._rpc.Service("benchmark")
        service.unary(call)
        handler = self._rpc.RpcServer(service)
        async with aiordma.serve(handler, HOST, 0, device=self._device, config=self._config) as server:
            yield server.port

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        async with (
            aiordma.connect(HOST, port, device=self._device, config=self._config) as connection,
            self._rpc.RpcClient(connection) as client,
        ):
            yield _Caller(client.unary)
