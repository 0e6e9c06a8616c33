"""RPC frames, and what each side knows of its calls. No I/O, no clocks: :mod:`aiordma.rpc` brings those.

Each message of the connection is one frame. Layout, network byte order, 8 bytes and what follows::

    0      kind       u8    1 call, 2 reply, 3 error, 4 cancel
    1      flags      u8    0; a receiver refuses what it does not know
    2      word len   u16   bytes of the word; 0 for reply and cancel
    4      call id    u32   chosen by the caller
    8      word             UTF-8: the method of a call (1 to 255 bytes), the status of an error
    ...    rest             call, reply: the payload; error: details for people, UTF-8; cancel: nothing

The server answers every call with exactly one reply or error, cancelled calls included; so the caller knows
when the last trace of a call is gone, and which answers it no longer waits for. A status is a word of 1 to 32
characters ``[a-z0-9-]`` that starts with a letter; :class:`Status` has those the library uses.
"""

from __future__ import annotations

import enum
import re
import struct
from dataclasses import dataclass

from ..errors import MisuseError, ProtocolError

HEADER = struct.Struct("!BBHI")
HEADER_SIZE = HEADER.size
MAX_METHOD = 255
_STATUS = re.compile(r"[a-z][a-z0-9-]{0,31}")
_IDS = 1 << 32


class FrameKind(enum.IntEnum):
    """What a frame is."""

    CALL = 1
    REPLY = 2
    ERROR = 3
    CANCEL = 4


class Status(enum.StrEnum):
    """The statuses the library uses. Applications may use words of their own beside them."""

    INTERNAL = "internal"  # the method raised something it should not have
    NOT_FOUND = "not-found"  # no such method (or, from a method, no such thing)
    INVALID = "invalid"  # the method cannot make sense of the payload
    CANCELLED = "cancelled"  # the caller cancelled, or either side closed
    TOO_LARGE = "too-large"  # the reply does not fit a message of the connection
    BUSY = "busy"  # too many calls at a time


@dataclass(frozen=True, slots=True)
class CallFrame:
    """Client to server: please run ``method``."""

    call_id: int
    method: str
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class ReplyFrame:
    """Server to client: the result."""

    call_id: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class ErrorFrame:
    """Server to client: there is no result, and why."""

    call_id: int
    status: str
    details: str = ""


@dataclass(frozen=True, slots=True)
class CancelFrame:
    """Client to server: nobody waits for the result any more."""

    call_id: int


Frame = CallFrame | ReplyFrame | ErrorFrame | CancelFrame


# --- bytes --------------------------------------------------------------------------------------------


def check_method(method: str) -> bytes:
    """The name of a method as it travels. Raises :class:`MisuseError`: 1 to 255 bytes of UTF-8."""
    try:
        name = method.encode()
    except (AttributeError, UnicodeEncodeError):
        raise MisuseError(f"the name of a method is text, not {method!r}") from None
    if not 1 <= len(name) <= MAX_METHOD:
        raise MisuseError(f"the name of a method has 1 to {MAX_METHOD} bytes in UTF-8, not {len(name)}")
    return name


def check_status(status: str) -> str:
    """``status``, if it can be one. Raises :class:`MisuseError`."""
    if not isinstance(status, str) or not _STATUS.fullmatch(status):
        raise MisuseError(f"status {status!r}: 1 to 32 of a-z, 0-9 and '-', a letter first")
    return status


def call_overhead(method: str) -> int:
    """Bytes of a call besides its payload. Raises :class:`MisuseError` for a bad name."""
    return HEADER_SIZE + len(check_method(method))


def encode(frame: Frame) -> bytes:
    """The frame as the bytes of one message. Raises :class:`MisuseError` for a bad method or status."""
    match frame:
        case CallFrame():
            return _pack(FrameKind.CALL, frame.call_id, check_method(frame.method), frame.payload)
        case ReplyFrame():
            return _pack(FrameKind.REPLY, frame.call_id, b"", frame.payload)
        case ErrorFrame():
            word = check_status(frame.status).encode()
            return _pack(FrameKind.ERROR, frame.call_id, word, frame.details.encode(errors="replace"))
        case CancelFrame():
            return _pack(FrameKind.CANCEL, frame.call_id, b"", b"")


def encode_error(call_id: int, status: str, details: str, limit: int) -> bytes:
    """An error frame of at most ``limit`` bytes (64 or more): details that do not fit are cut off."""
    room = max(limit - HEADER_SIZE - len(status), 0)
    cut = details.encode(errors="replace")[:room].decode(errors="ignore")
    return encode(ErrorFrame(call_id, status, cut))


def _pack(kind: FrameKind, call_id: int, word: bytes, rest: bytes) -> bytes:
    return b"".join((HEADER.pack(kind, 0, len(word), call_id), word, rest))


def decode(data: bytes) -> Frame:
    """The frame in a message. Raises :class:`ProtocolError` for anything that is none."""
    if len(data) < HEADER_SIZE:
        raise ProtocolError(f"RPC frame of {len(data)} bytes, shorter than its header")
    kind, flags, length, call_id = HEADER.unpack_from(data)
    if flags:
        raise ProtocolError(f"RPC frame with unknown flags {flags:#x}")
    start = HEADER_SIZE + length
    if start > len(data):
        raise ProtocolError(f"RPC frame says its word has {length} bytes, {len(data) - HEADER_SIZE} follow")
    return _decode(kind, call_id, data[HEADER_SIZE:start], data[start:])


def _decode(kind: int, call_id: int, word: bytes, rest: bytes) -> Frame:
    if kind == FrameKind.CALL:
        if not 1 <= len(word) <= MAX_METHOD:
            raise ProtocolError(f"RPC call of a method whose name has {len(word)} bytes")
        return CallFrame(call_id, _text(word, "method"), rest)
    if kind == FrameKind.ERROR:
        status = _text(word, "status")
        if not _STATUS.fullmatch(status):
            raise ProtocolError(f"RPC error with a malformed status {status[:64]!r}")
        return ErrorFrame(call_id, status, _text(rest, "details"))
    if word:
        raise ProtocolError(f"RPC frame of kind {kind} with a word, which it must not have")
    if kind == FrameKind.REPLY:
        return ReplyFrame(call_id, rest)
    if kind == FrameKind.CANCEL:
        if rest:
            raise ProtocolError(f"RPC cancel with {len(rest)} bytes of payload")
        return CancelFrame(call_id)
    raise ProtocolError(f"unknown RPC frame kind {kind}")


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"RPC {what} is not UTF-8") from None


# --- the caller's side --------------------------------------------------------------------------------


class CallerState(enum.Enum):
    """A call whose answer has not come yet."""

    WAITING = "waiting"
    ABANDONED = "abandoned"  # cancelled or timed out: its answer will be dropped


class CallerLedger:
    """Which call ids of a client are in use. An id is free again only when the call's answer has come."""

    def __init__(self, first_id: int = 1) -> None:
        self._next = first_id % _IDS
        self._calls: dict[int, CallerState] = {}

    def __len__(self) -> int:
        """Calls without an answer, abandoned ones included."""
        return len(self._calls)

    def begin(self) -> int:
        """A fresh id for a call that is about to be sent."""
        while self._next in self._calls:
            self._next = (self._next + 1) % _IDS
        call_id, self._next = self._next, (self._next + 1) % _IDS
        self._calls[call_id] = CallerState.WAITING
        return call_id

    def forget(self, call_id: int) -> None:
        """The call was never sent: no answer will come."""
        self._calls.pop(call_id, None)

    def abandon(self, call_id: int) -> bool:
        """Nobody waits any more. True when the server should be told; False when the answer was there."""
        if self._calls.get(call_id) is not CallerState.WAITING:
            return False
        self._calls[call_id] = CallerState.ABANDONED
        return True

    def answered(self, frame: Frame) -> ReplyFrame | ErrorFrame | None:
        """Takes a frame of the server: the answer of a call that waits, or None if nobody does any more.

        Raises :class:`ProtocolError` for a frame that is no answer, and for an answer nobody asked for.
        """
        if not isinstance(frame, ReplyFrame | ErrorFrame):
            raise ProtocolError(f"RPC server sent a {type(frame).__name__}, which only clients send")
        state = self._calls.pop(frame.call_id, None)
        if state is None:
            raise ProtocolError(f"RPC answer to call {frame.call_id}, which was not asked or was answered")
        return frame if state is CallerState.WAITING else None


# --- the side that is called --------------------------------------------------------------------------


class CalleeLedger:
    """The calls a server runs for one connection, and how many it may.

    A call counts until its answer has left, so that a client that does not read cannot pile up answers; its
    id is free as soon as the answer is on its way, for the client may use it again when it has the answer.
    """

    def __init__(self, max_concurrent: int) -> None:
        self._limit = max_concurrent
        self._running: set[int] = set()
        self._answering = 0

    def __len__(self) -> int:
        """Calls that run or whose answer is on its way."""
        return len(self._running) + self._answering

    def received(self, frame: Frame) -> None:
        """Checks a frame of the client. Raises :class:`ProtocolError` for one that only servers send, and for
        a call with the id of one that runs."""
        if not isinstance(frame, CallFrame | CancelFrame):
            raise ProtocolError(f"RPC client sent a {type(frame).__name__}, which only servers send")
        if isinstance(frame, CallFrame) and frame.call_id in self._running:
            raise ProtocolError(f"RPC call with id {frame.call_id}, which is in use")

    def begin(self, call_id: int) -> bool:
        """True when the call may run; False when there are too many."""
        if len(self) >= self._limit:
            return False
        self._running.add(call_id)
        return True

    def is_running(self, call_id: int) -> bool:
        """False for an id that is not known: the cancel of a call and its answer may cross."""
        return call_id in self._running

    def answering(self, call_id: int) -> None:
        """The call has ended, and its answer goes out."""
        self._running.remove(call_id)
        self._answering += 1

    def answered(self) -> None:
        """An answer has left."""
        self._answering -= 1
