"""Tables of calls and windows of streams: two of them wired together, and what a peer must not do. No device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiordma.errors import ProtocolError
from aiordma.protocol.rpc import (
    CallFrame,
    CallKind,
    CancelFrame,
    EndFrame,
    Frame,
    MessageFrame,
    StatusFrame,
    WindowFrame,
)
from aiordma.protocol.rpc_calls import (
    INITIAL_BYTES,
    INITIAL_MESSAGES,
    CalleeCalls,
    CallerCalls,
    ReceiveWindow,
    SendWindow,
)

KINDS = st.sampled_from(list(CallKind))


# --- windows ------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 1000), st.integers(INITIAL_BYTES // 8, 3 * INITIAL_BYTES))


@settings(deadline=None)
@given(st.lists(SIZES, max_size=200), st.data())
def test_a_stream_never_stands_still_and_never_exceeds_its_window(
    sizes: list[int], data: st.DataObject
) -> None:
    """Sender, receiver and the way between them, in any order of steps."""
    sender, receiver = SendWindow(), ReceiveWindow()
    to_send, way, arrived = deque(sizes), deque[int](), deque[int]()
    grants = deque[tuple[int, int]]()
    while to_send or way or arrived:
        steps = []
        if to_send and sender.open:
            steps.append("send")
        if way:
            steps.append("arrive")
        if arrived:
            steps.append("take")
        if grants:
            steps.append("grant")
        step = data.draw(st.sampled_from(steps)) if len(steps) > 1 else steps[0]  # none: it stands still
        if step == "send":
            sender.sent(to_send[0])
            way.append(to_send.popleft())
        elif step == "arrive":
            receiver.received(way[0])  # raises when beyond the window
            arrived.append(way.popleft())
        elif step == "take":
            grant = receiver.taken(arrived.popleft())
            if grant is not None:
                grants.append(grant)
        else:
            sender.granted(*grants.popleft())
        held = [*way, *arrived]
        assert len(held) <= INITIAL_MESSAGES
        assert sum(held) - max(held, default=0) < INITIAL_BYTES


def test_a_message_beyond_the_window() -> None:
    window = ReceiveWindow()
    for _ in range(INITIAL_MESSAGES):
        window.received(0)
    with pytest.raises(ProtocolError, match="beyond the window"):
        window.received(0)
    window = ReceiveWindow()
    window.received(10 * INITIAL_BYTES)  # one may overdraw
    with pytest.raises(ProtocolError, match="beyond the window"):
        window.received(0)


def test_a_window_does_not_grow_without_end() -> None:
    window = SendWindow()
    with pytest.raises(ProtocolError, match="window of"):
        window.granted(2**32 - 1, 0)
    with pytest.raises(ProtocolError, match="window of"):
        SendWindow().granted(0, 2**64 - 1)


# --- the client's table -------------------------------------------------------------------------------


@dataclass
class Call:
    """What waits for a call at its client."""

    kind: CallKind
    call_id: int = -1
    abandoned: bool = False
    requests_ended: bool = True
    send_window: SendWindow | None = None
    receive_window: ReceiveWindow | None = None


def begin(calls: CallerCalls[Call], kind: CallKind) -> Call:
    call = Call(kind)
    assert calls.begin(call) == call.call_id
    return call


def test_an_id_is_used_again_only_after_the_status() -> None:
    calls: CallerCalls[Call] = CallerCalls(first_id=2**32 - 1)
    last, zero = begin(calls, CallKind.UNARY), begin(calls, CallKind.UNARY)
    assert (last.call_id, zero.call_id) == (2**32 - 1, 0)
    calls._next = last.call_id
    assert begin(calls, CallKind.UNARY).call_id == 1
    calls.forget(zero)
    calls._next = last.call_id
    assert begin(calls, CallKind.UNARY).call_id == 0
    calls.forget(zero)  # another call has that id now
    assert len(calls.pending) == 3


def test_a_status_ends_its_call_once() -> None:
    calls: CallerCalls[Call] = CallerCalls()
    call = begin(calls, CallKind.UNARY)
    assert calls.received(StatusFrame(call.call_id, 0, "", b"x")) is call
    assert not calls.abandon(call)
    with pytest.raises(ProtocolError, match="not made or has ended"):
        calls.received(StatusFrame(call.call_id))


def test_what_comes_of_an_abandoned_call_is_dropped() -> None:
    calls: CallerCalls[Call] = CallerCalls()
    call = begin(calls, CallKind.BIDI)
    assert calls.abandon(call)
    assert not calls.abandon(call)
    assert (len(calls.pending), calls.abandoned, calls.open_calls()) == (1, 1, [])
    assert calls.received(MessageFrame(call.call_id, b"x")) is None
    assert calls.received(WindowFrame(call.call_id, 1, 1)) is None
    assert calls.received(StatusFrame(call.call_id)) is None
    assert (len(calls.pending), calls.abandoned) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        (CallKind.UNARY, CallFrame(1, "m")),
        (CallKind.UNARY, CancelFrame(1)),
        (CallKind.BIDI, EndFrame(1)),
        (CallKind.UNARY, MessageFrame(1)),
        (CallKind.CLIENT_STREAM, MessageFrame(1)),
        (CallKind.UNARY, WindowFrame(1, 1, 1)),
        (CallKind.SERVER_STREAM, WindowFrame(1, 1, 1)),
        (CallKind.BIDI, StatusFrame(1, 0, "", b"reply")),
        (CallKind.UNARY, StatusFrame(2)),
    ],
)
def test_the_client_refuses_what_the_server_must_not_send(kind: CallKind, frame: Frame) -> None:
    calls: CallerCalls[Call] = CallerCalls()
    assert begin(calls, kind).call_id == 1
    with pytest.raises(ProtocolError):
        calls.received(frame)


# --- the server's table -------------------------------------------------------------------------------


def test_the_server_knows_the_deadline() -> None:
    calls: CalleeCalls[str] = CalleeCalls()
    call = calls.received(CallFrame(1, "m", timeout=1_500_000), now=10.0)
    assert call is not None
    assert call.deadline == 11.5
    other = calls.received(CallFrame(2, "m"), now=10.0)
    assert other is not None
    assert other.deadline is None
    for known in (call, other):
        known.limit(11.0)
        known.limit(12.0)
        assert known.deadline == 11.0


def test_frames_that_cross_the_status_are_dropped() -> None:
    calls: CalleeCalls[str] = CalleeCalls()
    call = calls.received(CallFrame(1, "m", CallKind.BIDI), now=0.0)
    assert call is not None
    assert calls.answer(call)
    assert not calls.answer(call)
    late: list[Frame] = [MessageFrame(1), EndFrame(1), CancelFrame(1), WindowFrame(1, 1, 1)]
    assert [calls.received(frame, now=0.0) for frame in late] == [None] * 4
    again = calls.received(CallFrame(1, "m"), now=0.0)  # the client may use the id again
    assert again is not None
    assert not calls.answer(call)
    assert calls.open_calls() == [again]


@pytest.mark.parametrize(
    "frames",
    [
        [StatusFrame(1)],
        [CallFrame(1, "m"), CallFrame(1, "m")],
        [CallFrame(1, "m"), MessageFrame(1)],
        [CallFrame(1, "m"), EndFrame(1)],
        [CallFrame(1, "m"), WindowFrame(1, 1, 1)],
        [CallFrame(1, "m", CallKind.BIDI), EndFrame(1), EndFrame(1)],
        [CallFrame(1, "m", CallKind.BIDI), EndFrame(1), MessageFrame(1)],
        [CallFrame(1, "m", CallKind.CLIENT_STREAM), WindowFrame(1, 1, 1)],
        [CallFrame(1, "m", CallKind.CLIENT_STREAM), *[MessageFrame(1)] * (INITIAL_MESSAGES + 1)],
    ],
)
def test_the_server_refuses_what_the_client_must_not_send(frames: list[Frame]) -> None:
    calls: CalleeCalls[str] = CalleeCalls()
    for frame in frames[:-1]:
        assert calls.received(frame, now=0.0) is not None
    with pytest.raises(ProtocolError):
        calls.received(frames[-1], now=0.0)


# --- both ---------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_two_tables_agree_whatever_the_order(data: st.DataObject) -> None:
    """A client and a server that do what they may, on two ways that keep order, with every crossing: neither ever
    finds a fault with the other, and in the end no call is left."""
    client: CallerCalls[Call] = CallerCalls()
    server: CalleeCalls[str] = CalleeCalls()
    up, down = deque[Frame](), deque[Frame]()
    open_here, there = {}, {}
    for _ in range(data.draw(st.integers(5, 60))):
        step = data.draw(
            st.sampled_from(["begin", "message", "end", "cancel", "up", "reply", "status", "down"])
        )
        if step == "begin":
            kind = data.draw(KINDS)
            call = begin(client, kind)
            open_here[call.call_id] = call
            up.append(CallFrame(call.call_id, "m", kind))
        elif step == "up" and up:
            frame = up.popleft()
            seen = server.received(frame, now=0.0)
            if isinstance(frame, CallFrame):
                assert seen is not None
                there[seen.call_id] = seen
        elif step == "down" and down:
            frame = down.popleft()
            client.received(frame)
            if isinstance(frame, StatusFrame):
                open_here.pop(frame.call_id, None)
        elif step in ("reply", "status") and there:
            callee = there[data.draw(st.sampled_from(sorted(there)))]
            if step == "status":
                assert server.answer(callee)
                down.append(StatusFrame(callee.call_id))
                del there[callee.call_id]
            elif callee.send_window is not None and callee.send_window.open:
                callee.send_window.sent(1)
                down.append(MessageFrame(callee.call_id, b"x"))
        elif step in ("message", "end", "cancel") and open_here:
            call = open_here[data.draw(st.sampled_from(sorted(open_here)))]
            if step == "cancel":
                if client.abandon(call):
                    up.append(CancelFrame(call.call_id))
            elif not call.requests_ended and call.send_window is not None and call.send_window.open:
                if step == "end":
                    call.requests_ended = True
                    up.append(EndFrame(call.call_id))
                else:
                    call.send_window.sent(1)
                    up.append(MessageFrame(call.call_id, b"x"))
    while up:
        frame = up.popleft()
        seen = server.received(frame, now=0.0)
        if isinstance(frame, CallFrame) and seen is not None:
            there[seen.call_id] = seen
    for callee in there.values():
        assert server.answer(callee)
        down.append(StatusFrame(callee.call_id))
    while down:
        client.received(down.popleft())
    assert (len(client.pending), client.abandoned, len(server)) == (0, 0, 0)
