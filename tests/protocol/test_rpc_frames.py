"""RPC frames and call ledgers: what goes in comes out, nonsense is a ProtocolError. No device, no loop."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.rpc import (
    HEADER_SIZE,
    CalleeLedger,
    CallerLedger,
    CallFrame,
    CancelFrame,
    ErrorFrame,
    Frame,
    ReplyFrame,
    Status,
    call_overhead,
    decode,
    encode,
    encode_error,
)

IDS = st.integers(0, 2**32 - 1)
METHODS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=63)
STATUSES = st.from_regex(r"\A[a-z][a-z0-9-]{0,31}\Z") | st.sampled_from([str(s) for s in Status])
DETAILS = st.text(st.characters(exclude_categories=["Cs"]))
FRAMES = (
    st.builds(CallFrame, IDS, METHODS, st.binary())
    | st.builds(ReplyFrame, IDS, st.binary())
    | st.builds(ErrorFrame, IDS, STATUSES, DETAILS)
    | st.builds(CancelFrame, IDS)
)


@given(FRAMES)
def test_roundtrip(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


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
    damaged[data.draw(st.integers(0, min(len(damaged), 16) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert encode(decode(bytes(damaged))) == damaged
    except ProtocolError:
        pass


def test_layout() -> None:
    """The bytes that docs/protocol.md shows."""
    assert encode(CallFrame(7, "echo", b"hi")) == bytes.fromhex("01 00 0004 00000007 6563686f 6869")
    assert encode(ReplyFrame(7, b"hi")) == bytes.fromhex("02 00 0000 00000007 6869")
    assert encode(ErrorFrame(7, "busy", "no")) == bytes.fromhex("03 00 0004 00000007 62757379 6e6f")
    assert encode(CancelFrame(7)) == bytes.fromhex("04 00 0000 00000007")
    assert len(encode(CallFrame(7, "écho", b""))) == call_overhead("écho")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("!BBH", 2, 0, 0),
        struct.pack("!BBHI", 0, 0, 0, 1),  # kind
        struct.pack("!BBHI", 5, 0, 0, 1),
        struct.pack("!BBHI", 2, 1, 0, 1),  # flags
        struct.pack("!BBHI", 1, 0, 0, 1),  # a call of nothing
        struct.pack("!BBHI", 1, 0, 9, 1) + b"short",
        struct.pack("!BBHI", 1, 0, 256, 1) + b"m" * 256,
        struct.pack("!BBHI", 1, 0, 1, 1) + b"\xff",
        struct.pack("!BBHI", 2, 0, 1, 1) + b"m",  # a reply with a word
        struct.pack("!BBHI", 3, 0, 0, 1),  # an error without a status
        struct.pack("!BBHI", 3, 0, 4, 1) + b"Busy",
        struct.pack("!BBHI", 3, 0, 4, 1) + b"busy\xff",
        struct.pack("!BBHI", 4, 0, 0, 1) + b"x",  # a cancel with a payload
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@pytest.mark.parametrize("method", ["", "m" * 256, "é" * 128, "\ud800"])
def test_bad_method_is_misuse(method: str) -> None:
    with pytest.raises(MisuseError):
        encode(CallFrame(1, method))


@pytest.mark.parametrize("status", ["", "Busy", "-x", "x" * 33, "not found"])
def test_bad_status_is_misuse(status: str) -> None:
    with pytest.raises(MisuseError):
        encode(ErrorFrame(1, status))


@given(IDS, STATUSES, DETAILS, st.integers(64, 256))
def test_error_details_are_cut_to_the_limit(call_id: int, status: str, details: str, limit: int) -> None:
    data = encode_error(call_id, status, details, limit)
    frame = decode(data)
    assert len(data) <= limit
    assert isinstance(frame, ErrorFrame)
    assert details.startswith(frame.details)
    if len(details.encode()) <= limit - HEADER_SIZE - len(status):
        assert frame.details == details


def test_caller_answers_once() -> None:
    calls = CallerLedger()
    first, second = calls.begin(), calls.begin()
    assert first != second
    assert calls.answered(ReplyFrame(second, b"x")) == ReplyFrame(second, b"x")
    with pytest.raises(ProtocolError, match="not asked"):
        calls.answered(ReplyFrame(second))
    assert calls.answered(ErrorFrame(first, "busy")) == ErrorFrame(first, "busy")
    assert len(calls) == 0


def test_caller_drops_the_answer_of_an_abandoned_call() -> None:
    calls = CallerLedger()
    call_id = calls.begin()
    assert calls.abandon(call_id)
    assert not calls.abandon(call_id)
    assert len(calls) == 1
    assert calls.answered(ReplyFrame(call_id)) is None
    assert not calls.abandon(call_id)
    assert len(calls) == 0


def test_caller_does_not_reuse_an_id_in_use() -> None:
    calls = CallerLedger(first_id=2**32 - 1)
    last, zero = calls.begin(), calls.begin()
    assert (last, zero) == (2**32 - 1, 0)
    calls._next = last
    assert calls.begin() == 1
    calls.forget(zero)
    calls._next = last
    assert calls.begin() == 0


@pytest.mark.parametrize("frame", [CallFrame(1, "m"), CancelFrame(1)])
def test_caller_refuses_what_only_clients_send(frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        CallerLedger().answered(frame)


@pytest.mark.parametrize("frame", [ReplyFrame(1), ErrorFrame(1, "busy")])
def test_callee_refuses_what_only_servers_send(frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        CalleeLedger(1).received(frame)


def test_callee_counts_until_the_answer_has_left() -> None:
    calls = CalleeLedger(1)
    assert calls.begin(1)
    assert not calls.begin(2)
    with pytest.raises(ProtocolError, match="in use"):
        calls.received(CallFrame(1, "m"))
    calls.received(CancelFrame(1))
    assert calls.is_running(1)
    calls.answering(1)
    assert not calls.is_running(1)
    calls.received(CallFrame(1, "m"))  # the client may have the answer before we know that it left
    assert not calls.begin(1)
    calls.answered()
    assert calls.begin(1)
