"""The usual asyncio design over verbs, to compare with: add_reader on the channel, one future an operation.

No windows, no pending table, no memory management, no polling: arm, post, sleep in the loop, read the event,
poll, resolve. It runs on any binding that gives the few calls of Binding: aiordma.verbs and pyverbs do. Two
variants: the reader stays registered, or each operation adds and removes it (two epoll_ctl an operation).
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

RECV_ID = 0
RECEIVES = 16


class Binding(Protocol):
    """One connected queue pair of some binding of verbs. Work requests are of one fixed size."""

    fd: int
    local: dict[str, Any]

    def connect(self, remote: dict[str, Any]) -> None:
        """To RTS, receives posted."""

    def post_write(self, wr_id: int) -> None:
        """A signaled RDMA WRITE."""

    def post_read(self, wr_id: int) -> None:
        """A signaled RDMA READ."""

    def post_send(self, wr_id: int) -> None:
        """A signaled SEND."""

    def post_recv(self) -> None:
        """A receive with work-request id RECV_ID."""

    def arm(self) -> None:
        """ibv_req_notify_cq."""

    def get_events(self) -> None:
        """Reads the channel, which is readable, and acknowledges."""

    def poll(self) -> list[tuple[int, int]]:
        """Work-request id and status of what has completed."""

    def close(self) -> None:
        """Gives everything back."""


class NaiveQueue:
    """Futures by work-request id."""

    def __init__(self, binding: Binding, *, keep_reader: bool) -> None:
        self._binding = binding
        self._keep = keep_reader
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._arrived = 0
        self._receiver: asyncio.Future[None] | None = None
        self._next_id = RECV_ID
        if keep_reader:
            binding.arm()
            self._loop.add_reader(binding.fd, self._on_readable)

    async def write(self) -> None:
        await self._operation(self._binding.post_write)

    async def read(self) -> None:
        await self._operation(self._binding.post_read)

    async def send(self) -> None:
        await self._operation(self._binding.post_send)

    async def recv(self) -> None:
        """One message; one task at a time. Only with a reader that stays."""
        if not self._arrived:
            self._receiver = self._loop.create_future()
            await self._receiver
        self._arrived -= 1

    async def _operation(self, post: Any) -> None:
        self._next_id += 1
        future = self._waiting[self._next_id] = self._loop.create_future()
        if self._keep:
            post(self._next_id)
            await future
            return
        self._binding.arm()
        post(self._next_id)
        self._loop.add_reader(self._binding.fd, self._on_readable)
        try:
            await future
        finally:
            self._loop.remove_reader(self._binding.fd)

    def _on_readable(self) -> None:
        self._binding.get_events()
        self._binding.arm()
        for wr_id, status in self._binding.poll():
            if status:
                raise RuntimeError(f"completion with status {status}")
            if wr_id == RECV_ID:
                self._message()
            else:
                self._waiting.pop(wr_id).set_result(None)

    def _message(self) -> None:
        self._binding.post_recv()
        self._arrived += 1
        if self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    def close(self) -> None:
        """Takes the reader out."""
        self._loop.remove_reader(self._binding.fd)


def busy_write(binding: Binding) -> None:
    """Post and poll in a Python loop, without asyncio."""
    binding.post_write(1)
    while not binding.poll():
        pass
