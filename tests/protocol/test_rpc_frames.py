"""RPC frames: what goes in comes out, nonsense is a ProtocolError. No device, no loop."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.rpc import (
    MAX_DETAILS,
    MAX_METADATA,
    MAX_TIMEOUT,
    CallFrame,
    CallKind,
    CancelFrame,
    EndFrame,
    Frame,
    MessageFrame,
    StatusCode,
    StatusFrame,
    WindowFrame,
    check_timeout,
    decode,
    decode_metadata,
    encode,
    encode_metadata,
    plain_call,
    plain_call_frame,
    plain_reply,
    plain_reply_frame,
    status_head,
)

IDS = st.integers(0, 2**32 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
METHODS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=63)
KEYS = st.from_regex(r"\A[a-z0-9_.-]{1,20}\Z").filter(lambda key: not key.endswith("-bin"))
METADATA = st.dictionaries(KEYS, TEXT, max_size=3).flatmap(
    lambda text: st.dictionaries(KEYS.map(lambda key: key + "-bin"), st.binary(), max_size=3).map(
        lambda binary: {**text, **binary}
    )
)
PLAIN_KINDS = st.sampled_from([CallKind.UNARY, CallKind.SERVER_STREAM])
STREAM_KINDS = st.sampled_from([CallKind.CLIENT_STREAM, CallKind.BIDI])
TIMEOUTS = st.integers(0, MAX_TIMEOUT)
FRAMES = (
    st.builds(CallFrame, IDS, METHODS, PLAIN_KINDS, st.binary(), TIMEOUTS, METADATA)
    | st.builds(CallFrame, IDS, METHODS, STREAM_KINDS, st.just(b""), TIMEOUTS, METADATA)
    | st.builds(StatusFrame, IDS, st.just(0), TEXT, st.binary(), METADATA)
    | st.builds(StatusFrame, IDS, st.integers(1, 255), TEXT, st.just(b""), METADATA)
    | st.builds(MessageFrame, IDS, st.binary())
    | st.builds(WindowFrame, IDS, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
    | st.builds(EndFrame, IDS)
    | st.builds(CancelFrame, IDS)
)


def damage(data: bytes, head: int, draw: st.DataObject) -> bytes:
    """A frame with another byte somewhere in its head, and perhaps without its end."""
    damaged = bytearray(data)
    damaged[draw.draw(st.integers(0, min(len(data), head) - 1))] = draw.draw(st.integers(0, 255))
    return bytes(damaged[: draw.draw(st.integers(0, len(damaged)))])


@given(FRAMES)
def test_roundtrip(frame: Frame) -> None:
    data = encode(frame)
    assert decode(data) == frame
    assert decode(memoryview(data)) == frame


@given(FRAMES)
def test_a_plain_reply_is_a_status_with_nothing_else(frame: Frame) -> None:
    reply = plain_reply(encode(frame))
    if isinstance(frame, StatusFrame) and not (frame.code or frame.details or frame.metadata):
        assert reply == (frame.call_id, frame.payload)
    else:
        assert reply is None


@given(FRAMES)
def test_a_plain_call_is_a_unary_call_without_metadata(frame: Frame) -> None:
    call = plain_call(encode(frame))
    if isinstance(frame, CallFrame) and not (frame.kind or frame.metadata):
        assert call == (frame.call_id, frame.method, frame.timeout, frame.payload)
    else:
        assert call is None


@given(FRAMES.map(encode), st.data())
def test_what_looks_like_a_plain_call_is_one(data: bytes, draw: st.DataObject) -> None:
    damaged = damage(data, 24, draw)
    call = plain_call(damaged)
    if call is not None:
        call_id, method, timeout, payload = call
        assert decode(damaged) == CallFrame(call_id, method, timeout=timeout, payload=payload)


@given(FRAMES.map(encode), st.data())
def test_what_looks_like_a_plain_reply_is_one(data: bytes, draw: st.DataObject) -> None:
    damaged = damage(data, 12, draw)
    reply = plain_reply(damaged)
    if reply is not None:
        assert decode(damaged) == StatusFrame(reply[0], payload=reply[1])


@given(IDS, METHODS, TIMEOUTS, st.binary())
def test_plain_frames_are_as_any_other(call_id: int, method: str, timeout: int, payload: bytes) -> None:
    call = CallFrame(call_id, method, timeout=timeout, payload=payload)
    assert plain_call_frame(call_id, method.encode(), timeout, payload) == encode(call)
    assert plain_reply_frame(call_id, payload) == encode(StatusFrame(call_id, payload=payload))


def test_plain_frames_of_what_is_none() -> None:
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        plain_call_frame(1, b"m" * 256, 0, b"")
    for message in ("text", memoryview(b"view"), None):
        with pytest.raises(TypeError):
            plain_call(message)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            plain_reply(message)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            plain_reply_frame(1, message)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            plain_call_frame(1, b"m", 0, message)  # type: ignore[arg-type]
    assert plain_call(encode(CallFrame(1, "m"))[:-1] + b"\xff") is None  # no UTF-8: decode() says so


@given(st.binary(max_size=64))
def test_random_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    try:
        frame = decode(data)
    except ProtocolError:
        return
    assert encode(frame) == data  # one frame, one encoding


@given(FRAMES, st.data())
def test_a_damaged_frame_is_a_frame_or_a_protocol_error(frame: Frame, data: st.DataObject) -> None:
    damaged = bytearray(encode(frame))
    damaged[data.draw(st.integers(0, min(len(damaged), 48) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert encode(decode(bytes(damaged))) == damaged
    except ProtocolError:
        pass


@given(FRAMES, st.data())
def test_a_shortened_frame_is_a_frame_or_a_protocol_error(frame: Frame, data: st.DataObject) -> None:
    whole = encode(frame)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    try:
        assert encode(decode(cut)) == cut
    except ProtocolError:
        pass


def test_layout() -> None:
    """The bytes that docs/protocol.md shows."""
    call = CallFrame(7, "kv/get", CallKind.UNARY, b"hi", 1_500_000, {"user": "me", "key-bin": b"\x01"})
    assert encode(call) == bytes.fromhex(
        "01 00 0006 00000007 000000000016e360 00000014 6b762f676574"
        "04 0002 75736572 6d65 07 0001 6b65792d62696e 01 6869"
    )
    assert encode(MessageFrame(7, b"hi")) == bytes.fromhex("02 00 0000 00000007 6869")
    assert encode(EndFrame(7)) == bytes.fromhex("03 00 0000 00000007")
    assert encode(CancelFrame(7)) == bytes.fromhex("04 00 0000 00000007")
    assert encode(WindowFrame(7, 16, 4096)) == bytes.fromhex("05 00 0000 00000007 00000010 0000000000001000")
    assert encode(StatusFrame(7, 0, "", b"hi")) == bytes.fromhex("06 00 0000 00000007 00000000 6869")
    assert encode(StatusFrame(7, 5, "no")) == bytes.fromhex("06 05 0002 00000007 00000000 6e6f")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("!BBH", 2, 0, 0),
        struct.pack("!BBHI", 0, 0, 0, 1),  # kind
        struct.pack("!BBHI", 7, 0, 0, 1),
        struct.pack("!BBHI", 2, 1, 0, 1),  # a variant where there is none
        struct.pack("!BBHI", 3, 0, 1, 1),  # a length where there is none
        struct.pack("!BBHI", 3, 0, 0, 1) + b"x",  # an end with a payload
        struct.pack("!BBHI", 4, 0, 0, 1) + b"x",
        struct.pack("!BBHI", 5, 0, 0, 1),  # half a window
        struct.pack("!BBHIIQ", 5, 0, 0, 1, 1, 1) + b"x",
        struct.pack("!BBHI", 1, 0, 1, 1) + b"m",  # a call without the rest of its header
        struct.pack("!BBHIQI", 1, 4, 1, 1, 0, 0) + b"m",  # an unknown kind of call
        struct.pack("!BBHIQI", 1, 0, 0, 1, 0, 0),  # a call of nothing
        struct.pack("!BBHIQI", 1, 0, 9, 1, 0, 0) + b"short",
        struct.pack("!BBHIQI", 1, 0, 256, 1, 0, 0) + b"m" * 256,
        struct.pack("!BBHIQI", 1, 0, 1, 1, 0, 0) + b"\xff",
        struct.pack("!BBHIQI", 1, 0, 1, 1, MAX_TIMEOUT + 1, 0) + b"m",
        struct.pack("!BBHIQI", 1, 0, 1, 1, 0, 9) + b"m",  # metadata that is not there
        struct.pack("!BBHIQI", 1, 0, 1, 1, 0, MAX_METADATA + 1) + b"m" + bytes(MAX_METADATA + 1),
        struct.pack("!BBHIQI", 1, 1, 1, 1, 0, 0) + b"mx",  # a stream of requests, and a payload
        struct.pack("!BBHI", 6, 0, 0, 1),  # a status without the rest of its header
        struct.pack("!BBHII", 6, 5, 0, 1, 0) + b"x",  # an error with a reply
        struct.pack("!BBHII", 6, 5, 1, 1, 0) + b"\xff",
        struct.pack("!BBHII", 6, 5, MAX_DETAILS + 1, 1, 0) + b"x" * (MAX_DETAILS + 1),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x01\x00\x02a1",  # less than it says
        b"\x00\x00\x01x",  # no key
        b"\x01\x00\x00A",  # a bad key
        b"\x01\x00\x00a" * 2,  # twice
        b"\x01\x00\x01a\xff",  # text that is none
        b"\x01\x00\x00\xff",
    ],
)
def test_malformed_metadata(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_metadata(data)


@pytest.mark.parametrize(
    "metadata",
    [
        {"Key": "x"},
        {"": "x"},
        {"k" * 256: "x"},
        {"k": b"bytes"},
        {"k-bin": "text"},
        {"k": 5},
        {5: "x"},
        {"k": "\ud800"},
        {"k": "x" * 70_000},
        {f"k{i}": "x" * 1000 for i in range(9)},
    ],
)
def test_bad_metadata_is_misuse(metadata: dict[str, str]) -> None:
    with pytest.raises(MisuseError, match="metadata"):
        encode_metadata(metadata)


@pytest.mark.parametrize("method", ["", "m" * 256, "é" * 128, "\ud800", 5])
def test_bad_method_is_misuse(method: str) -> None:
    with pytest.raises(MisuseError):
        encode(CallFrame(1, method))


@given(IDS, st.integers(1, 16), st.text())
def test_details_are_cut_to_what_a_status_carries(call_id: int, code: int, details: str) -> None:
    details = details * 300
    frame = decode(status_head(call_id, code, details))
    assert isinstance(frame, StatusFrame)
    assert len(frame.details.encode()) <= MAX_DETAILS
    clean = details.encode(errors="replace").decode()
    assert clean.startswith(frame.details)
    assert (
        len(clean.encode()) - len(frame.details.encode()) < 4 or len(frame.details.encode()) > MAX_DETAILS - 4
    )


@pytest.mark.parametrize(
    ("seconds", "microseconds"),
    [(None, 0), (1e-9, 1), (0, 1), (1.5, 1_500_000), (1e12, 0), (float("inf"), 0)],
)
def test_timeouts(seconds: float | None, microseconds: int) -> None:
    assert check_timeout(seconds) == microseconds


@pytest.mark.parametrize("seconds", ["1", float("nan")])
def test_bad_timeouts(seconds: float) -> None:
    with pytest.raises(MisuseError, match="timeout"):
        check_timeout(seconds)


def test_codes_are_those_of_grpc() -> None:
    assert [code.name for code in StatusCode][:5] == [
        *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED")
    ]
    assert (StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE, StatusCode.UNAUTHENTICATED) == (8, 14, 16)
