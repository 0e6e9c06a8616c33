"""The two ends of a stream of messages within a call: what goes out waits for the window, what comes in waits
for its reader. Both sides of a call use both; the arithmetic is in protocol/rpc_calls.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ..large_messages import LargeSend
from ..protocol.rpc import Payload, message_head, window_frame
from ..protocol.rpc_calls import ReceiveWindow, SendWindow
from ..send_queue import Operation
from ..transport import Connection
from .codec import COPY_LIMIT

#: A frame on its way. A large one can fail by itself, for want of memory that the device may read; a small one
#: fails only together with its connection.
Sent = asyncio.Future[Any]
#: Payloads up to this size are joined with their head: cheaper than two parts, and sent as eager messages anyway.
JOIN_LIMIT = 2048


def send_frame(connection: Connection, head: bytes, payload: Payload = b"") -> Sent:
    """Sends one frame; nobody needs to await it. The payload must not change before that is done.

    Raises :class:`~aiordma.errors.ConnectionLostError` when the connection has ended, and for large payloads
    :class:`~aiordma.errors.MessageTooLargeError` (the peer takes no such messages) and
    :class:`~aiordma.errors.MemoryLimitError`.
    """
    if not payload:
        return send_whole(connection, head)
    return send_whole(
        connection, b"".join((head, payload)) if len(payload) <= JOIN_LIMIT else (head, payload)
    )


def send_whole(connection: Connection, frame: bytes | tuple[bytes, Payload]) -> Sent:
    """As :func:`send_frame`, of a frame that is put together."""
    sent = connection.send(frame)
    if not sent.done():
        sent.add_done_callback(retrieve)
    elif sent.__class__ is Operation:
        retrieve(sent)
    return sent


def slices(message: bytes) -> Payload:
    """A received message, so that taking it apart copies no large payload."""
    return message if len(message) <= COPY_LIMIT else memoryview(message)


def retrieve(future: asyncio.Future[Any]) -> None:
    """Marks a future's exception as seen."""
    if not future.cancelled():
        future.exception()


class _Waiters:
    """Tasks that wait for a change, and look again after each."""

    __slots__ = ("_futures", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._futures: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        future = self._loop.create_future()
        self._futures.append(future)
        await future

    def wake(self) -> None:
        while self._futures:
            future = self._futures.popleft()
            if not future.done():
                future.set_result(None)


class Outgoing:
    """The sending end. Messages of several tasks go out in the order in which they find the window open."""

    __slots__ = ("_call_id", "_connection", "_error", "_waiters", "_window")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, window: SendWindow, call_id: int
    ) -> None:
        self._connection = connection
        self._window = window
        self._call_id = call_id
        self._waiters = _Waiters(loop)
        self._error: Callable[[], Exception] | None = None

    async def send(self, payload: Payload) -> None:
        """Returns when the message is on its way; if it is a large one, or a buffer of the user's own, when the
        peer has it. Waits while the window is closed. Raises what :meth:`end` was given, and as
        :func:`send_frame`.

        Cancelled: the message has been sent, or will not be.
        """
        window = self._window
        while self._error is None and not window.open:
            await self._waiters.wait()
        if self._error is not None:
            raise self._error()
        sent = send_frame(self._connection, message_head(self._call_id), payload)
        window.sent(len(payload))
        if isinstance(sent, LargeSend) or not isinstance(payload, bytes):
            # Cancelled with its sender, it would leave a hole in the account of the window.
            await asyncio.shield(sent)

    def opened(self) -> None:
        """The window has grown."""
        self._waiters.wake()

    def end(self, error: Callable[[], Exception]) -> None:
        """Nothing more can be sent: each sender gets an error of its own."""
        if self._error is None:
            self._error = error
            self._waiters.wake()


class Incoming:
    """The receiving end: messages that have come, in order, until the end or an error."""

    __slots__ = ("_call_id", "_connection", "_ended", "_error", "_messages", "_waiters", "_window")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, window: ReceiveWindow, call_id: int
    ) -> None:
        self._connection = connection
        self._window = window
        self._call_id = call_id
        self._messages: deque[Payload] = deque()
        self._waiters = _Waiters(loop)
        self._ended = False
        self._error: Callable[[], Exception] | None = None

    async def take(self) -> Payload | None:
        """The next message, or None at the end. Raises what :meth:`end` was given. Cancelled: nothing is lost."""
        while not self._messages:
            if self._ended:
                if self._error is not None:
                    raise self._error()
                return None
            await self._waiters.wait()
        payload = self._messages.popleft()
        grant = self._window.taken(len(payload))
        if grant is not None and not self._ended and not self._connection.is_closing():
            send_frame(self._connection, window_frame(self._call_id, *grant))
        return payload

    def put(self, payload: Payload) -> None:
        """A message has come."""
        if not self._ended:
            self._messages.append(payload)
            self._waiters.wake()

    def end(self, error: Callable[[], Exception] | None = None, *, drop: bool = False) -> None:
        """No more will come. With an error, readers get it after the last message; with ``drop``, at once."""
        if drop:
            self._messages.clear()
        if not self._ended or (drop and error is not None):
            self._ended = True
            self._error = error
            self._waiters.wake()
