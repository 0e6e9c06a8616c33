"""The credit protocol: never more in flight than posted, no deadlock, nothing lost. No device, no clock."""

from __future__ import annotations

from collections import deque
from types import MemberDescriptorType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiordma._native._ledger import Ledger
from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.credit import CONTROL_WINDOW, CreditLedger

#: All that a ledger knows.
COUNTERS = [name for name, value in vars(Ledger).items() if isinstance(value, MemberDescriptorType)]

# What travels: ("data" | "notify" | "control" | "return", data limit, control limit, credits given up).
Frame = tuple[str, int, int, int]


class Side:
    """One end as Connection drives a ledger: a receive queue, the user's inbox, frames on the way out."""

    def __init__(
        self, window: int, peer_window: int, control: int = CONTROL_WINDOW, most: int = 0, peer_most: int = 0
    ) -> None:
        self.ledger = CreditLedger(
            window=window,
            peer_window=peer_window,
            peer_window_max=peer_most,
            control=control,
            peer_control=control,
        )
        self.most = max(most, window)
        self.posted = window + control
        self.inbox = 0
        self.wire: deque[Frame] = deque()
        self.recalls: deque[int] = deque()  # on the way to the peer, by TCP: in no order with the wire
        self.wish = 0  # what the peer recalled and we have not answered

    def key(self) -> tuple[object, ...]:
        """The state up to the absolute counters: what decides about every future."""
        led = self.ledger
        return (
            led.data_credits,
            led.control_credits,
            led.data_told - led.data_received,
            led.data_released + led.window - led.data_told,
            led.control_received + led.control - led.control_told,
            self.posted,
            self.inbox,
            tuple((k, d - led.data_released, c - led.control_received, n) for k, d, c, n in self.wire),
            (led.window, led.asked, self.wish, tuple(self.recalls)),
        )

    def clone(self) -> Side:
        other = Side.__new__(Side)
        other.ledger = CreditLedger.__new__(CreditLedger)
        for name in COUNTERS:
            setattr(other.ledger, name, getattr(self.ledger, name))
        other.posted, other.inbox, other.wire = self.posted, self.inbox, deque(self.wire)
        other.most, other.recalls, other.wish = self.most, deque(self.recalls), self.wish
        return other

    def send(self, kind: str) -> None:
        if kind == "notify":
            self.ledger.send_data()
            self.wire.append(("notify", 0, 0, 0))
            return
        if kind == "data":
            self.ledger.send_data()
        else:
            self.ledger.send_control()
        self.wire.append((kind, *self.ledger.stamp(), 0))

    def update(self) -> None:
        while self.ledger.update_due():
            self.send("control")

    def deliver_from(self, other: Side) -> None:
        kind, data, control, given_up = other.wire.popleft()
        assert self.posted > 0, "receiver not ready"
        self.posted -= 1
        if kind == "control":
            self.posted += 1
            self.ledger.receive_control()
        elif kind == "return":
            self.posted += 1 - given_up
            self.ledger.receive_return(given_up)
        else:
            self.inbox += 1
            self.ledger.receive_data()
        if kind != "notify":
            self.ledger.learn(data, control)
        self.update()

    def grow(self) -> None:
        """A receive more for the peer."""
        self.posted += 1
        self.ledger.grow(1)
        self.update()

    def shrink(self, count: int) -> None:
        """Less for the peer: at once what it was not told of, by a recall what it was."""
        at_once = self.ledger.shrink(count)
        self.posted -= at_once
        if asked := self.ledger.recall(count - at_once):
            self.recalls.append(asked)
        self.update()

    def hear_recall(self, other: Side) -> None:
        """A recall of the other side arrives."""
        assert not self.wish, "one at a time"
        self.wish = other.recalls.popleft()

    def may_give_back(self) -> bool:
        return self.wish > 0 and self.ledger.data_credits > 0

    def give_back(self) -> None:
        count = self.ledger.give_back(self.wish, 0)
        self.wish = 0
        self.wire.append(("return", *self.ledger.stamp(), count))

    def take(self) -> None:
        self.inbox -= 1
        self.posted += 1
        self.ledger.release()
        self.update()


def quiesce(a: Side, b: Side, *, take: bool) -> None:
    """Delivers everything (and lets both users take everything) until nothing moves any more."""
    for _ in range(10_000):
        if a.wire:
            b.deliver_from(a)
        elif b.wire:
            a.deliver_from(b)
        elif a.recalls:
            b.hear_recall(a)
        elif b.recalls:
            a.hear_recall(b)
        elif a.may_give_back():
            a.give_back()
        elif b.may_give_back():
            b.give_back()
        elif take and a.inbox:
            a.take()
        elif take and b.inbox:
            b.take()
        else:
            return
    raise AssertionError("credit frames answer each other without end")


@pytest.mark.parametrize(
    ("window_a", "window_b", "control", "most"),
    [(1, 1, 3, 1), (1, 1, 4, 1), (2, 1, 4, 2), (2, 2, 4, 2), (1, 1, 3, 3), (2, 1, 4, 4)],
)
def test_every_order_of_events(window_a: int, window_b: int, control: int, most: int) -> None:
    """From every reachable state, once all is delivered and taken, both can send again.

    The search is exhaustive for windows of 1; for larger ones, and for those that grow to ``most`` and shrink, it
    ends, breadth first, after 5,000 states.
    """
    start = (
        Side(window_a, window_b, control, most, most),
        Side(window_b, window_a, control, most, most),
    )
    seen = {(start[0].key(), start[1].key())}
    todo = deque([start])
    while todo and len(seen) < 5_000:
        a, b = todo.popleft()
        final = (a.clone(), b.clone())
        quiesce(*final, take=True)
        for side in final:
            assert side.ledger.data_credits > 0, "a sender is blocked though its peer took everything"
            assert not side.ledger.asked, "a recall without an answer"
        for index in range(16):
            after = (a.clone(), b.clone())
            me, peer = after if index % 2 == 0 else after[::-1]
            if not step(me, peer, index // 2):
                continue
            assert len(me.wire) <= peer.posted
            assert len(peer.wire) <= me.posted
            key = (after[0].key(), after[1].key())
            if key not in seen:
                seen.add(key)
                todo.append(after)
    assert len(seen) > 50


def step(me: Side, peer: Side, action: int) -> bool:
    """One event, if it can happen now."""
    match action:
        case 0 if me.ledger.data_credits:
            me.send("data")
        case 1 if me.ledger.data_credits:
            me.send("notify")
        case 2 if peer.wire:
            me.deliver_from(peer)
        case 3 if me.inbox:
            me.take()
        case 4 if me.ledger.window < me.most:
            me.grow()
        case 5 if me.ledger.window > 1 and me.most > 2:
            me.shrink(me.ledger.window - 1)
        case 6 if peer.recalls:
            me.hear_recall(peer)
        case 7 if me.may_give_back():
            me.give_back()
        case _:
            return False
    return True


class CreditMachine(RuleBasedStateMachine):
    """Random windows, random order: the invariants hold in every state."""

    @initialize(a=st.integers(1, 40), b=st.integers(1, 40), more=st.sampled_from([0, 1, 40]))
    def start(self, a: int, b: int, more: int) -> None:
        self.sides = (
            Side(a, b, most=a + more, peer_most=b + more),
            Side(b, a, most=b + more, peer_most=a + more),
        )
        self.sent = [0, 0]
        self.taken = [0, 0]

    @rule(who=st.integers(0, 1), kind=st.sampled_from(["data", "notify"]), count=st.integers(1, 50))
    def send(self, who: int, kind: str, count: int) -> None:
        for _ in range(min(count, self.sides[who].ledger.data_credits)):
            self.sides[who].send(kind)
            self.sent[who] += 1

    @rule(who=st.integers(0, 1), count=st.integers(1, 50))
    def deliver(self, who: int, count: int) -> None:
        for _ in range(min(count, len(self.sides[1 - who].wire))):
            self.sides[who].deliver_from(self.sides[1 - who])

    @rule(who=st.integers(0, 1), count=st.integers(1, 50))
    def take(self, who: int, count: int) -> None:
        for _ in range(min(count, self.sides[who].inbox)):
            self.sides[who].take()
            self.taken[who] += 1

    @rule(who=st.integers(0, 1), count=st.integers(1, 20))
    def grow(self, who: int, count: int) -> None:
        side = self.sides[who]
        for _ in range(min(count, side.most - side.ledger.window)):
            side.grow()

    @rule(who=st.integers(0, 1), count=st.integers(1, 50))
    def shrink(self, who: int, count: int) -> None:
        self.sides[who].shrink(count)

    @rule(who=st.integers(0, 1))
    def recall_arrives(self, who: int) -> None:
        if self.sides[1 - who].recalls:
            self.sides[who].hear_recall(self.sides[1 - who])

    @rule(who=st.integers(0, 1))
    def give_back(self, who: int) -> None:
        if self.sides[who].may_give_back():
            self.sides[who].give_back()

    @precondition(lambda self: hasattr(self, "sides"))
    @rule()
    def both_only_send(self) -> None:
        """Both send until blocked, neither takes; then both take: both can send again."""
        for who, side in enumerate(self.sides):
            while side.ledger.data_credits:
                side.send("data")
                self.sent[who] += 1
        quiesce(*self.sides, take=False)
        for who, side in enumerate(self.sides):
            self.taken[who] += side.inbox
        quiesce(*self.sides, take=True)
        assert all(side.ledger.data_credits for side in self.sides)

    @invariant()
    def never_more_in_flight_than_posted(self) -> None:
        if not hasattr(self, "sides"):
            return
        for me, peer in (self.sides, self.sides[::-1]):
            assert len(me.wire) <= peer.posted
            assert peer.posted + peer.inbox == peer.ledger.window + peer.ledger.control
            assert 1 <= peer.ledger.window <= peer.most

    @invariant()
    def nothing_lost(self) -> None:
        if not hasattr(self, "sides"):
            return
        for who in (0, 1):
            flying = sum(kind in ("data", "notify") for kind, *_ in self.sides[who].wire)
            assert self.sent[who] == flying + self.sides[1 - who].inbox + self.taken[1 - who]


CreditMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestCreditMachine = CreditMachine.TestCase


def test_limits_wrap_on_the_wire() -> None:
    side = Side(4, 4)
    other = Side(4, 4)
    near = (1 << 32) - 2
    for ledger in (side.ledger, other.ledger):
        ledger.data_sent = ledger.data_received = ledger.data_released = near
        ledger.data_limit = ledger.data_told = near + 4
    for _ in range(20):
        side.send("data")
        other.deliver_from(side)
        other.take()
        quiesce(side, other, take=True)
    assert side.ledger.data_credits > 0
    assert side.ledger.data_sent == near + 20


def test_a_peer_that_sends_without_credit_is_found() -> None:
    ledger = CreditLedger(window=2, peer_window=2)
    ledger.receive_data()
    ledger.receive_data()
    with pytest.raises(ProtocolError, match="with credit for 2"):
        ledger.receive_data()
    for _ in range(CONTROL_WINDOW):
        ledger.receive_control()
    with pytest.raises(ProtocolError, match="credit frame"):
        ledger.receive_control()


@pytest.mark.parametrize(("data", "control"), [(3, 4), (1, 4), (2, 5), (2, 3), (2**32 - 1, 4)])
def test_impossible_limits_are_refused(data: int, control: int) -> None:
    """At the start the peer has told us 2 and 4: it can neither raise nor lower them before we send."""
    with pytest.raises(ProtocolError, match="grants"):
        CreditLedger(window=2, peer_window=2).learn(data, control)


def test_credits_are_given_back_only_when_asked_for() -> None:
    ledger = CreditLedger(window=8, peer_window=8)
    with pytest.raises(ProtocolError, match="0 were asked for"):
        ledger.receive_return(0)
    assert ledger.recall(5) == 5
    assert ledger.recall(5) == 0, "one recall at a time"
    with pytest.raises(ProtocolError, match="5 were asked for"):
        ledger.receive_return(6)
    ledger.receive_return(3)
    assert (ledger.window, ledger.asked) == (5, 0)
    assert ledger.recall(100) == 4, "neither more than it has, nor all of the window"
    for _ in range(4):
        ledger.receive_data()
    with pytest.raises(ProtocolError, match="it has 0"):
        ledger.receive_return(4)


def test_what_was_not_told_is_taken_back_at_once() -> None:
    ledger = CreditLedger(window=4, peer_window=4)
    assert ledger.shrink(2) == 0, "the peer knows of all four"
    ledger.grow(3)
    assert ledger.shrink(2) == 2
    assert ledger.stamp()[0] == 5
    assert ledger.shrink(2) == 0


def test_reserved_credits_stay() -> None:
    ledger = CreditLedger(window=4, peer_window=10)
    assert ledger.give_back(20, 3) == 6
    assert ledger.data_credits == 3


def test_misuse_is_told_apart() -> None:
    ledger = CreditLedger(window=1, peer_window=1)
    ledger.send_data()
    with pytest.raises(MisuseError, match="no data credit"):
        ledger.send_data()
    with pytest.raises(MisuseError, match="released"):
        ledger.release()
    with pytest.raises(MisuseError, match="at least 1"):
        CreditLedger(window=0, peer_window=1)
