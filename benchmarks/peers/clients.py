"""The client of every contestant whose connection keeps the order of messages: it has but to send and to receive.

One request at a time: the task that asks receives the answer itself. Many: each waits for a future, and a task
receives the answers and hands them out in the order of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .interface import Bytes, Client


@dataclass(frozen=True)
class Channel:
    """Messages in order, both ways. ``send`` returns when the next one may be sent, by the transport's own limit
    of what is under way; ``receive`` is for one task at a time."""

    send: Callable[[Bytes], Awaitable[Any]]
    receive: Callable[[], Awaitable[Bytes]]


class _Alone(Client):
    """One request at a time."""

    def __init__(self, channel: Channel) -> None:
        self._send, self._receive = channel.send, channel.receive

    async def request(self, data: bytes) -> Bytes:
        await self._send(data)
        return await self._receive()

    async def push(self, block: bytes) -> None:
        await self._send(block)


class _Shared(_Alone):
    """Many requests at a time."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[Bytes]] = deque()

    async def request(self, data: bytes) -> Bytes:
        answer: asyncio.Future[Bytes] = self._loop.create_future()
        self._waiting.append(answer)
        await self._send(data)
        return await answer

    async def read(self) -> None:
        """Until it is cancelled. A connection that ends fails whoever waits."""
        try:
            while True:
                answer = await self._receive()
                self._waiting.popleft().set_result(answer)
        except Exception as error:
            for waiting in self._waiting:
                waiting.set_exception(ConnectionResetError(str(error)))


@contextlib.asynccontextmanager
async def client_of(channel: Channel, outstanding: int) -> AsyncIterator[Client]:
    """A client for at most so many requests at a time."""
    if outstanding == 1:
        yield _Alone(channel)
        return
    client = _Shared(channel)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        reading.cancel()
        await asyncio.wait([reading])
