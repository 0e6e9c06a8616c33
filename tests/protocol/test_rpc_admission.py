"""The limits of a server: what runs, what waits, what is refused, and that nothing is forgotten. No device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiordma.errors import MisuseError
from aiordma.protocol.rpc_admission import Admission, Lane, Verdict


def admission(
    running: int, waiting: int, lane: int | None = None, lane_waiting: int | None = None, nbytes: int = 1000
) -> Any:
    return Admission[str](
        max_running=running,
        max_waiting=waiting,
        lane_running=lane,
        lane_waiting=lane_waiting,
        max_bytes=nbytes,
    )


def test_run_wait_refuse() -> None:
    limits, lane = admission(1, 1), Lane[str]()
    assert limits.offer(lane, "a")[0] is Verdict.RUN
    assert limits.offer(lane, "b")[0] is Verdict.WAIT
    verdict, reason = limits.offer(lane, "c")
    assert verdict is Verdict.REFUSED
    assert reason == "1 calls of this connection are running, and 1 wait"
    assert limits.next_call() is None
    limits.handler_ended()
    assert limits.next_call() is None  # the answer of a has not left
    limits.answer_left(lane)
    assert limits.next_call() == "b"
    assert limits.next_call() is None


def test_connections_are_served_in_turn() -> None:
    limits = admission(1, 100, lane=2)
    many, few = Lane[str](), Lane[str]()
    limits.offer(many, "first")
    for i in range(10):
        limits.offer(many, f"many {i}")
    limits.offer(few, "few 0")
    order = []
    lane = many
    for _ in range(4):
        limits.handler_ended()
        limits.answer_left(lane)
        order.append(call := limits.next_call())
        lane = few if call.startswith("few") else many
    assert order == ["many 0", "few 0", "many 1", "many 2"]


def test_the_limit_of_a_connection_holds_up_itself_only() -> None:
    limits = admission(4, 100, lane=1, lane_waiting=1)
    slow, other = Lane[str](), Lane[str]()
    assert limits.offer(slow, "a")[0] is Verdict.RUN
    assert limits.offer(slow, "b")[0] is Verdict.WAIT
    assert limits.offer(slow, "c")[0] is Verdict.REFUSED
    assert limits.offer(other, "d")[0] is Verdict.RUN
    limits.handler_ended()  # but nobody reads the answer
    assert limits.next_call() is None
    assert limits.offer(Lane(), "e")[0] is Verdict.RUN


def test_withdrawing_and_closing() -> None:
    limits, lane, other = admission(1, 100), Lane[str](), Lane[str]()
    limits.offer(lane, "a")
    limits.offer(lane, "b")
    limits.offer(lane, "c")
    limits.offer(other, "d")
    assert limits.withdraw(lane, "b")
    assert not limits.withdraw(lane, "b")
    limits.close(lane)
    assert limits.waiting == 1
    limits.handler_ended()
    assert limits.next_call() == "d"


def test_calls_that_wait_hold_a_limited_number_of_bytes() -> None:
    limits, lane = admission(1, 100, nbytes=10), Lane[str]()
    assert limits.offer(lane, "a", 1000)[0] is Verdict.RUN
    assert limits.offer(lane, "b", 7)[0] is Verdict.WAIT
    verdict, reason = limits.offer(lane, "c", 4)
    assert (verdict, reason) == (Verdict.REFUSED, "those that wait hold 7 bytes")
    assert limits.offer(lane, "d", 3)[0] is Verdict.WAIT
    assert limits.withdraw(lane, "b")
    assert limits.offer(lane, "e", 7)[0] is Verdict.WAIT
    limits.close(lane)
    assert (limits.waiting, limits.waiting_bytes) == (0, 0)


@pytest.mark.parametrize("limits", [(0, 1), (1, -1), (1, 1, 0), (1, 1, 1, -1)])
def test_bad_limits(limits: tuple[int, ...]) -> None:
    with pytest.raises(MisuseError, match="limits"):
        admission(*limits)


class Model(RuleBasedStateMachine):
    """Any order of calls, ends, answers, withdrawals and lost connections."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: Admission[int] = Admission(
            max_running=3, max_waiting=4, lane_running=2, lane_waiting=3, max_bytes=10
        )
        self.lanes = [Lane[int]() for _ in range(3)]
        self.owner: dict[int, Lane[int]] = {}
        self.size: dict[int, int] = {}
        self.running: list[int] = []
        self.answering: list[int] = []
        self.waiting: list[int] = []
        self.count = 0

    def start_waiting(self) -> None:
        while (call := self.limits.next_call()) is not None:
            self.waiting.remove(call)
            self.running.append(call)

    @rule(index=st.integers(0, 2), nbytes=st.integers(0, 6))
    def offer(self, index: int, nbytes: int) -> None:
        self.count += 1
        self.size[self.count] = nbytes
        lane = self.owner[self.count] = self.lanes[index]
        verdict, reason = self.limits.offer(lane, self.count, nbytes)
        assert bool(reason) == (verdict is Verdict.REFUSED)
        if verdict is Verdict.RUN:
            self.running.append(self.count)
        elif verdict is Verdict.WAIT:
            self.waiting.append(self.count)
        self.start_waiting()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.running))
        self.running.remove(call)
        self.answering.append(call)
        self.limits.handler_ended()
        self.start_waiting()

    @precondition(lambda self: self.answering)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.answering))
        self.answering.remove(call)
        self.limits.answer_left(self.owner[call])
        self.start_waiting()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(call)
        assert self.limits.withdraw(self.owner[call], call)

    @rule(index=st.integers(0, 2))
    def close(self, index: int) -> None:
        lane = self.lanes[index]
        self.limits.close(lane)
        self.waiting = [call for call in self.waiting if self.owner[call] is not lane]

    @invariant()
    def limits_hold(self) -> None:
        assert self.limits.running == len(self.running) <= 3
        assert self.limits.waiting == len(self.waiting) <= 4
        assert self.limits.waiting_bytes == sum(self.size[call] for call in self.waiting) <= 10
        for lane in self.lanes:
            busy = [call for call in self.running + self.answering if self.owner[call] is lane]
            assert lane.unanswered == len(busy) <= 2

    @invariant()
    def nothing_waits_that_could_run(self) -> None:
        if len(self.running) < 3:
            assert all(self.owner[call].unanswered == 2 for call in self.waiting)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
