"""RPC frames: what they are, and their bytes. No I/O, no clocks: :mod:`aiordma.rpc` brings those.

Each message of the connection is one frame. Every frame begins with 8 bytes in network byte order; what follows
depends on its kind::

    0   kind       u8
    1   variant    u8    call: the kind of call; status: the code; else 0
    2   length     u16   call: bytes of the method's name; status: bytes of the details; else 0
    4   call id    u32   chosen by the caller

    call      timeout u64 (microseconds, 0: none), metadata length u32, method, metadata, payload
    status    metadata length u32, details, metadata, payload
    message   payload
    window    messages u32, bytes u64
    end, cancel   nothing

A call has one request or a stream of them, and one reply or a stream of them (:class:`CallKind`). One request
travels in the call frame, one reply in the status frame; the messages of streams have frames of their own. The
status ends a call: it is the last frame of it in that direction, and every call has exactly one. What may come
when is in :mod:`aiordma.protocol.rpc_calls`.

Metadata is a list of keys and values: key length u8, value length u16, key, value. A key is 1 to 255 of
``a-z0-9_.-``; the value is UTF-8 text, or bytes if the key ends in ``-bin``. No key occurs twice.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

# The frames of most calls, each put together or taken apart in one step.
from .._native._frames import plain_call as plain_call
from .._native._frames import plain_call_frame as plain_call_frame
from .._native._frames import plain_reply as plain_reply
from .._native._frames import plain_reply_frame as plain_reply_frame
from ..errors import MisuseError, ProtocolError

HEADER = struct.Struct("!BBHI")
CALL_HEADER = struct.Struct("!BBHIQI")
STATUS_HEADER = struct.Struct("!BBHII")
WINDOW_FRAME = struct.Struct("!BBHIIQ")
_ENTRY = struct.Struct("!BH")
MAX_METHOD = 255
#: Bytes of encoded metadata in one direction of one call.
MAX_METADATA = 8192
#: Bytes of details; longer ones are cut.
MAX_DETAILS = 1024
#: Microseconds, some thirty years: what a clock of doubles still resolves.
MAX_TIMEOUT = 10**15
_KEY = re.compile(r"[a-z0-9_.-]{1,255}")

Metadata = Mapping[str, str | bytes]
Payload = bytes | bytearray | memoryview


class StatusCode(enum.IntEnum):
    """How a call ended. Names and values are those of gRPC."""

    OK = 0
    CANCELLED = 1  # by the caller
    UNKNOWN = 2  # the handler raised something it should not have
    INVALID_ARGUMENT = 3  # the request is not valid, whatever the state of the server
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5  # such as a key that is not there
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8  # too many calls, or a message that is too large
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12  # no such method, or not of that kind
    INTERNAL = 13  # an invariant does not hold: an invalid reply
    UNAVAILABLE = 14  # the connection is gone, or the server is shutting down
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class CallKind(enum.IntEnum):
    """How many requests and replies a call has. Bit 0: a stream of requests; bit 1: a stream of replies."""

    UNARY = 0
    CLIENT_STREAM = 1
    SERVER_STREAM = 2
    BIDI = 3

    @property
    def streams_requests(self) -> bool:
        """Whether requests come as messages, until end."""
        return bool(self & 1)

    @property
    def streams_replies(self) -> bool:
        """Whether replies come as messages, until the status."""
        return bool(self & 2)


class FrameKind(enum.IntEnum):
    """What a frame is."""

    CALL = 1
    MESSAGE = 2
    END = 3
    CANCEL = 4
    WINDOW = 5
    STATUS = 6


@dataclass(slots=True)
class CallFrame:
    """Client to server: please run ``method``. ``timeout`` in microseconds, 0 for none."""

    call_id: int
    method: str
    kind: CallKind = CallKind.UNARY
    payload: Payload = b""
    timeout: int = 0
    metadata: Metadata = field(default_factory=dict)


@dataclass(slots=True)
class MessageFrame:
    """One message of a stream, in either direction."""

    call_id: int
    payload: Payload = b""


@dataclass(slots=True)
class EndFrame:
    """Client to server: no more requests."""

    call_id: int


@dataclass(slots=True)
class CancelFrame:
    """Client to server: nobody waits for the result any more."""

    call_id: int


@dataclass(slots=True)
class WindowFrame:
    """The receiver of a stream allows so many more messages and bytes."""

    call_id: int
    messages: int
    nbytes: int


@dataclass(slots=True)
class StatusFrame:
    """Server to client: the call has ended, how, and with which reply."""

    call_id: int
    code: int = StatusCode.OK
    details: str = ""
    payload: Payload = b""
    metadata: Metadata = field(default_factory=dict)


Frame = CallFrame | MessageFrame | EndFrame | CancelFrame | WindowFrame | StatusFrame


# --- to bytes -----------------------------------------------------------------------------------------


def check_method(method: str) -> bytes:
    """The name of a method as it travels. Raises :class:`MisuseError`: 1 to 255 bytes of UTF-8."""
    try:
        name = method.encode()
    except (AttributeError, UnicodeEncodeError):
        raise MisuseError(f"the name of a method is text, not {method!r}") from None
    if not 1 <= len(name) <= MAX_METHOD:
        raise MisuseError(f"the name of a method has 1 to {MAX_METHOD} bytes in UTF-8, not {len(name)}")
    return name


def check_timeout(seconds: float | None) -> int:
    """A timeout as it travels: whole microseconds, rounded up to 1 at least; 0 stands for None.

    Raises :class:`MisuseError` for what is no number of seconds; times that are too long are none.
    """
    if seconds is None:
        return 0
    try:
        microseconds = max(seconds * 1e6, 1.0)
        return 0 if microseconds > MAX_TIMEOUT else int(microseconds)
    except (TypeError, ValueError):
        raise MisuseError(f"timeout={seconds!r}: seconds, or None") from None


def encode_metadata(metadata: Metadata | None) -> bytes:
    """The bytes of metadata. Raises :class:`MisuseError` for bad keys and values, and for more than
    :data:`MAX_METADATA` bytes."""
    if not metadata:
        return b""
    parts: list[bytes] = []
    for key, value in metadata.items():
        data = _metadata_value(key, value)
        parts += (_ENTRY.pack(len(key), len(data)), key.encode(), data)
    encoded = b"".join(parts)
    if len(encoded) > MAX_METADATA:
        raise MisuseError(f"metadata of {len(encoded)} bytes; {MAX_METADATA} are allowed")
    return encoded


def _metadata_value(key: str, value: str | bytes) -> bytes:
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise MisuseError(f"metadata key {key!r}: 1 to 255 of a-z, 0-9, '_', '.' and '-'")
    if key.endswith("-bin") != isinstance(value, bytes) or not isinstance(value, str | bytes):
        raise MisuseError(f"metadata {key!r}: text, or bytes where the key ends in '-bin'")
    try:
        data = value if isinstance(value, bytes) else value.encode()
    except UnicodeEncodeError:
        raise MisuseError(f"metadata {key!r} is not text that UTF-8 can carry") from None
    if len(data) > MAX_METADATA:
        raise MisuseError(f"metadata {key!r} has {len(data)} bytes; {MAX_METADATA} are allowed for all")
    return data


def call_head(call_id: int, kind: int, method: bytes, timeout: int, metadata: bytes) -> bytes:
    """A call frame up to its payload."""
    head = CALL_HEADER.pack(_CALL, kind, len(method), call_id, timeout, len(metadata))
    return b"".join((head, method, metadata)) if metadata else head + method


def status_head(call_id: int, code: int, details: str = "", metadata: bytes = b"") -> bytes:
    """A status frame up to its payload. Details beyond :data:`MAX_DETAILS` bytes are cut off."""
    if not details and not metadata:
        return STATUS_HEADER.pack(_STATUS, code, 0, call_id, 0)
    text = details.encode(errors="replace")
    if len(text) > MAX_DETAILS:
        text = text[:MAX_DETAILS].decode(errors="ignore").encode()
    head = STATUS_HEADER.pack(FrameKind.STATUS, code, len(text), call_id, len(metadata))
    return b"".join((head, text, metadata))


def message_head(call_id: int) -> bytes:
    """A message frame up to its payload."""
    return HEADER.pack(FrameKind.MESSAGE, 0, 0, call_id)


def end_frame(call_id: int) -> bytes:
    """An end frame."""
    return HEADER.pack(FrameKind.END, 0, 0, call_id)


def cancel_frame(call_id: int) -> bytes:
    """A cancel frame."""
    return HEADER.pack(FrameKind.CANCEL, 0, 0, call_id)


def window_frame(call_id: int, messages: int, nbytes: int) -> bytes:
    """A window frame."""
    return WINDOW_FRAME.pack(FrameKind.WINDOW, 0, 0, call_id, messages, nbytes)


def encode(frame: Frame) -> bytes:
    """The whole frame as the bytes of one message. Raises :class:`MisuseError` for what cannot travel."""
    match frame:
        case CallFrame():
            name, metadata = check_method(frame.method), encode_metadata(frame.metadata)
            return call_head(frame.call_id, frame.kind, name, frame.timeout, metadata) + bytes(frame.payload)
        case StatusFrame():
            metadata = encode_metadata(frame.metadata)
            return status_head(frame.call_id, frame.code, frame.details, metadata) + bytes(frame.payload)
        case MessageFrame():
            return message_head(frame.call_id) + bytes(frame.payload)
        case WindowFrame():
            return window_frame(frame.call_id, frame.messages, frame.nbytes)
        case EndFrame():
            return end_frame(frame.call_id)
        case CancelFrame():
            return cancel_frame(frame.call_id)


# --- from bytes ---------------------------------------------------------------------------------------


# As plain numbers and a table: enumerations cost as much as the rest of a frame.
_CALL, _STATUS = int(FrameKind.CALL), int(FrameKind.STATUS)
_CALL_KINDS = tuple(CallKind)


def decode(data: Payload) -> Frame:
    """The frame in a message; its payload is a slice of ``data``, and so of its type. Raises
    :class:`ProtocolError` for anything that is no frame."""
    size = len(data)
    if size < HEADER.size:
        raise ProtocolError(f"RPC frame of {size} bytes, shorter than its header")
    kind, variant, length, call_id = HEADER.unpack_from(data)
    if kind == _CALL:
        return _decode_call(data, variant, length, call_id)
    if kind == _STATUS:
        return _decode_status(data, variant, length, call_id)
    if variant or length:
        raise ProtocolError(f"RPC frame of kind {kind} with variant {variant} and length {length}, not 0")
    if kind == FrameKind.MESSAGE:
        return MessageFrame(call_id, data[HEADER.size :])
    if kind == FrameKind.WINDOW:
        if size != WINDOW_FRAME.size:
            raise ProtocolError(f"RPC window frame of {size} bytes, not {WINDOW_FRAME.size}")
        *_, messages, nbytes = WINDOW_FRAME.unpack(data)
        return WindowFrame(call_id, messages, nbytes)
    if kind not in (FrameKind.END, FrameKind.CANCEL):
        raise ProtocolError(f"unknown RPC frame kind {kind}")
    if size != HEADER.size:
        raise ProtocolError(f"RPC frame of kind {kind} with {size - HEADER.size} bytes of payload")
    return EndFrame(call_id) if kind == FrameKind.END else CancelFrame(call_id)


def _decode_call(data: Payload, variant: int, length: int, call_id: int) -> CallFrame:
    if variant >= len(_CALL_KINDS):
        raise ProtocolError(f"RPC call of unknown kind {variant}")
    if not 1 <= length <= MAX_METHOD:
        raise ProtocolError(f"RPC call of a method whose name has {length} bytes")
    timeout, metadata_length = _unpack(CALL_HEADER, data)[4:]
    if timeout > MAX_TIMEOUT:
        raise ProtocolError(f"RPC call with a timeout of {timeout} microseconds")
    word, metadata, payload = _split(data, CALL_HEADER.size, length, metadata_length)
    kind = _CALL_KINDS[variant]
    if variant & 1 and len(payload):
        raise ProtocolError(f"RPC call with a stream of requests, and {len(payload)} bytes of payload")
    return CallFrame(call_id, _text(word, "method"), kind, payload, timeout, metadata)


def _decode_status(data: Payload, variant: int, length: int, call_id: int) -> StatusFrame:
    if length > MAX_DETAILS:
        raise ProtocolError(f"RPC status with {length} bytes of details; {MAX_DETAILS} are allowed")
    (metadata_length,) = _unpack(STATUS_HEADER, data)[4:]
    word, metadata, payload = _split(data, STATUS_HEADER.size, length, metadata_length)
    if variant and len(payload):
        raise ProtocolError(f"RPC status {variant} with {len(payload)} bytes of payload")
    return StatusFrame(call_id, variant, _text(word, "details") if length else "", payload, metadata)


def _unpack(header: struct.Struct, data: Payload) -> tuple[int, ...]:
    if len(data) < header.size:
        raise ProtocolError(f"RPC frame of {len(data)} bytes, shorter than its header of {header.size}")
    return header.unpack_from(data)


def _split(
    data: Payload, start: int, length: int, metadata_length: int
) -> tuple[Payload, dict[str, str | bytes], Payload]:
    """Word, metadata and payload of a frame."""
    middle = start + length
    end = middle + metadata_length
    if end > len(data) or metadata_length > MAX_METADATA:
        raise ProtocolError(
            f"RPC frame of {len(data)} bytes says it has {length} of word and {metadata_length} of metadata"
        )
    metadata = decode_metadata(bytes(data[middle:end])) if metadata_length else {}
    return data[start:middle], metadata, data[end:]


def decode_metadata(data: bytes) -> dict[str, str | bytes]:
    """The opposite of :func:`encode_metadata`. Raises :class:`ProtocolError`."""
    found: dict[str, str | bytes] = {}
    at = 0
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise ProtocolError("RPC metadata ends within an entry")
        key_length, value_length = _ENTRY.unpack_from(data, at)
        middle = at + _ENTRY.size + key_length
        end = middle + value_length
        if end > len(data):
            raise ProtocolError("RPC metadata ends within an entry")
        key = _text(data[at + _ENTRY.size : middle], "metadata key")
        if not _KEY.fullmatch(key) or key in found:
            raise ProtocolError(f"RPC metadata with a bad or repeated key {key[:64]!r}")
        value = data[middle:end]
        found[key] = value if key.endswith("-bin") else _text(value, "metadata")
        at = end
    return found


def _text(data: Payload, what: str) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(f"RPC {what} is not UTF-8") from None
