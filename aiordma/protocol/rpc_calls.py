"""What each side of an RPC connection knows of its calls: which ids are in use, which frames may come, and
how much of a stream may be on its way. No I/O, no clocks.

A call has two directions. Requests are open until the end frame (or from the start not at all, where the
request came with the call); replies are open until the status. The status frees the id at both sides: the server
sends nothing of the call behind it, and frames of the client that cross it on the way are dropped by the server.
A call that the client has abandoned keeps its id, and what still comes of it is dropped, until its status.

Streams are paced by a window for each call and direction, of messages and of bytes. A sender may send while
both are above zero; the last message may overdraw the bytes, so a message of any size can pass. The receiver
opens the window again by what its user has taken. All windows begin as :data:`INITIAL_MESSAGES` and
:data:`INITIAL_BYTES`. So a call whose user is slow holds at most a window and one message, and slows down nobody
but its own sender.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from ..errors import ProtocolError
from .rpc import (
    CallFrame,
    CallKind,
    CancelFrame,
    EndFrame,
    Frame,
    MessageFrame,
    StatusFrame,
    WindowFrame,
)

INITIAL_MESSAGES = 32
INITIAL_BYTES = 1024 * 1024
#: A window never exceeds these, so that a peer cannot make numbers grow without end.
MAX_MESSAGES = (1 << 31) - 1
MAX_BYTES = (1 << 62) - 1
_IDS = 1 << 32

T = TypeVar("T")


# --- windows ------------------------------------------------------------------------------------------


class SendWindow:
    """What the sender of a stream may still send."""

    __slots__ = ("messages", "nbytes")

    def __init__(self) -> None:
        self.messages = INITIAL_MESSAGES
        self.nbytes = INITIAL_BYTES  # below zero after a message that was larger than the rest

    @property
    def open(self) -> bool:
        """Whether one more message, of any size, may be sent."""
        return self.messages > 0 and self.nbytes > 0

    def sent(self, nbytes: int) -> None:
        """A message was sent; the window was open."""
        self.messages -= 1
        self.nbytes -= nbytes

    def granted(self, messages: int, nbytes: int) -> None:
        """The receiver opens the window. Raises :class:`ProtocolError` when it grows beyond all measure."""
        self.messages += messages
        self.nbytes += nbytes
        if self.messages > MAX_MESSAGES or self.nbytes > MAX_BYTES:
            raise ProtocolError(f"RPC window of {self.messages} messages and {self.nbytes} bytes")


class ReceiveWindow:
    """What the receiver of a stream has allowed, and what it owes the sender."""

    __slots__ = ("_allowed_bytes", "_allowed_messages", "_owed_bytes", "_owed_messages")

    def __init__(self) -> None:
        self._allowed_messages = INITIAL_MESSAGES
        self._allowed_bytes = INITIAL_BYTES
        self._owed_messages = 0
        self._owed_bytes = 0

    def received(self, nbytes: int) -> None:
        """A message has arrived. Raises :class:`ProtocolError` when the window was not open."""
        if self._allowed_messages <= 0 or self._allowed_bytes <= 0:
            raise ProtocolError("RPC message beyond the window of its stream")
        self._allowed_messages -= 1
        self._allowed_bytes -= nbytes

    def taken(self, nbytes: int) -> tuple[int, int] | None:
        """The user has taken a message. Returns what to grant now: messages and bytes, or None to wait.

        A grant is due when half a window is owed. When all that was sent has been taken, at least that is owed
        wherever the sender's window is not open: so no stream stands still.
        """
        self._owed_messages += 1
        self._owed_bytes += nbytes
        if 2 * self._owed_messages < INITIAL_MESSAGES and 2 * self._owed_bytes < INITIAL_BYTES:
            return None
        grant = self._owed_messages, self._owed_bytes
        self._allowed_messages += self._owed_messages
        self._allowed_bytes += self._owed_bytes
        self._owed_messages = self._owed_bytes = 0
        return grant


# --- the caller's side --------------------------------------------------------------------------------


class CallerCall(Protocol):
    """A call as its client knows it: whatever waits for it has these. ``kind`` is there from the beginning; the
    rest is for :class:`CallerCalls`. One that is ``abandoned`` was cancelled or timed out, and has no status yet:
    what still comes is dropped."""

    kind: CallKind
    call_id: int
    abandoned: bool
    # Of calls that have streams; of the others these are True, None and None.
    requests_ended: bool
    send_window: SendWindow | None
    receive_window: ReceiveWindow | None


C = TypeVar("C", bound=CallerCall)


class CallerCalls(Generic[C]):
    """The calls of a client. An id is free again only when the call's status has come. ``pending`` are those
    without one, abandoned ones included."""

    def __init__(self, first_id: int = 1) -> None:
        self._next = first_id % _IDS
        self.pending: dict[int, C] = {}
        self.abandoned = 0

    def begin(self, call: C) -> int:
        """A fresh id for a call that is about to be sent."""
        while self._next in self.pending:
            self._next = (self._next + 1) % _IDS
        call_id, self._next = self._next, (self._next + 1) % _IDS
        call.call_id = call_id
        call.abandoned = False
        if kind := call.kind:
            call.requests_ended = not kind & 1
            call.send_window = SendWindow() if kind & 1 else None
            call.receive_window = ReceiveWindow() if kind & 2 else None
        self.pending[call_id] = call
        return call_id

    def open_calls(self) -> list[C]:
        """Those that somebody waits for, in the order they began."""
        return [call for call in self.pending.values() if not call.abandoned]

    def forget(self, call: C) -> None:
        """The call was never sent: no status will come."""
        if self.pending.get(call.call_id) is call:
            del self.pending[call.call_id]

    def abandon(self, call: C) -> bool:
        """Nobody waits any more. True when the server should be told; False when it had ended already."""
        if self.pending.get(call.call_id) is not call or call.abandoned:
            return False
        call.abandoned = True
        self.abandoned += 1
        return True

    def replied(self, call_id: int) -> C | None:
        """A :func:`~aiordma.protocol.rpc.plain_reply` has come: its call, ended by it. None when that is not a
        unary call that somebody waits for: then :meth:`received` is to judge."""
        call = self.pending.get(call_id)
        if call is None or call.kind or call.abandoned:
            return None
        del self.pending[call_id]
        return call

    def received(self, frame: Frame) -> C | None:
        """Takes a frame of the server: returns its call, or None when it is to be dropped.

        Raises :class:`ProtocolError` for a frame that only clients send, of a call that was not made or has
        ended, that does not fit the kind of call, or beyond the window.
        """
        if not isinstance(frame, StatusFrame | MessageFrame | WindowFrame):
            raise ProtocolError(f"RPC server sent a {type(frame).__name__}, which only clients send")
        call = self.pending.get(frame.call_id)
        if call is None:
            raise ProtocolError(f"RPC frame of call {frame.call_id}, which was not made or has ended")
        if isinstance(frame, StatusFrame):
            del self.pending[frame.call_id]
            if call.kind & 2 and len(frame.payload):
                raise ProtocolError("RPC status with a payload, of a call with a stream of replies")
        elif isinstance(frame, MessageFrame):
            if call.receive_window is None:
                raise ProtocolError(f"RPC message for call {frame.call_id}, which has one reply")
            call.receive_window.received(len(frame.payload))
        else:
            _grant(call.send_window, frame)
        if not call.abandoned:
            return call
        if isinstance(frame, StatusFrame):
            self.abandoned -= 1
        elif isinstance(frame, MessageFrame):
            assert call.receive_window is not None
            call.receive_window.taken(len(frame.payload))
        return None


# --- the side that is called --------------------------------------------------------------------------


class CalleeCall(Generic[T]):
    """A call as the server knows it; ``owner`` is whatever runs it. ``deadline`` is a time of the caller of
    :meth:`CalleeCalls.received`, or None."""

    __slots__ = ("call_id", "deadline", "kind", "owner", "requests_ended")
    receive_window: ReceiveWindow | None = None
    send_window: SendWindow | None = None

    def __init__(self, call_id: int, kind: CallKind, deadline: float | None) -> None:
        self.call_id = call_id
        self.kind = kind
        self.deadline = deadline
        self.owner: T | None = None
        self.requests_ended = not kind & 1

    def limit(self, deadline: float) -> None:
        """The server's own deadline, where it is earlier."""
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)


class _CalleeStream(CalleeCall[T]):
    """One with streams."""

    __slots__ = ("receive_window", "send_window")

    def __init__(self, call_id: int, kind: CallKind, deadline: float | None) -> None:
        super().__init__(call_id, kind, deadline)
        self.receive_window = ReceiveWindow() if kind & 1 else None
        self.send_window = SendWindow() if kind & 2 else None


class CalleeCalls(Generic[T]):
    """The calls of one client that have no status yet."""

    def __init__(self) -> None:
        self._calls: dict[int, CalleeCall[T]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def open_calls(self) -> list[CalleeCall[T]]:
        """Those without a status, in the order they came."""
        return list(self._calls.values())

    def received(self, frame: Frame, now: float) -> CalleeCall[T] | None:
        """Takes a frame of the client, at the time ``now`` in seconds: returns its call, a new one for a call
        frame, or None when it is to be dropped: it has crossed the status.

        Raises :class:`ProtocolError` for a frame that only servers send, a call with an id in use, a frame that
        does not fit the kind of call, comes after the end, or beyond the window.
        """
        if isinstance(frame, CallFrame):
            return self.begin(frame.call_id, frame.kind, now + frame.timeout / 1e6 if frame.timeout else None)
        if isinstance(frame, StatusFrame):
            raise ProtocolError("RPC client sent a StatusFrame, which only servers send")
        call = self._calls.get(frame.call_id)
        if call is None or isinstance(frame, CancelFrame):
            return call
        if isinstance(frame, WindowFrame):
            _grant(call.send_window, frame)
            return call
        if call.requests_ended or call.receive_window is None:
            raise ProtocolError(
                f"RPC {type(frame).__name__} for call {frame.call_id}, whose requests have ended"
            )
        if isinstance(frame, EndFrame):
            call.requests_ended = True
        else:
            call.receive_window.received(len(frame.payload))
        return call

    def begin(self, call_id: int, kind: CallKind, deadline: float | None) -> CalleeCall[T]:
        """A call has come. Raises :class:`ProtocolError` for an id in use."""
        if call_id in self._calls:
            raise ProtocolError(f"RPC call with id {call_id}, which is in use")
        call: CalleeCall[T] = (_CalleeStream if kind else CalleeCall)(call_id, kind, deadline)
        self._calls[call_id] = call
        return call

    def answer(self, call: CalleeCall[T]) -> bool:
        """The status is about to be sent. False when it was sent before, and must not be again."""
        if self._calls.get(call.call_id) is not call:
            return False
        del self._calls[call.call_id]
        return True


def _grant(window: SendWindow | None, frame: WindowFrame) -> None:
    if window is None:
        raise ProtocolError(f"RPC window for call {frame.call_id}, which has no stream in that direction")
    window.granted(frame.messages, frame.nbytes)
