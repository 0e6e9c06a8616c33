"""The credit protocol: never more in flight than posted, no deadlock, nothing lost. No device, no clock."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.credit import CONTROL_WINDOW, CreditLedger

# What travels: ("data" | "notify" | "control", data limit, control limit).
Frame = tuple[str, int, int]


class Side:
    """One end as Connection drives a ledger: a receive queue, the user's inbox, frames on the way out."""

    def __init__(self, window: int, peer_window: int, control: int = CONTROL_WINDOW) -> None:
        self.ledger = CreditLedger(
            window=window, peer_window=peer_window, control=control, peer_control=control
        )
        self.posted = window + control
        self.inbox = 0
        self.wire: deque[Frame] = deque()

    def key(self) -> tuple[object, ...]:
        """The state up to the absolute counters: what decides about every future."""
        led = self.ledger
        return (
            led.data_credits,
            led.control_credits,
            led.data_told - led.data_received,
            led.data_released + led._window - led.data_told,
            led.control_received + led._control - led.control_told,
            self.posted,
            self.inbox,
            tuple((k, d - led.data_released, c - led.control_received) for k, d, c in self.wire),
        )

    def clone(self) -> Side:
        other = Side.__new__(Side)
        other.ledger = CreditLedger.__new__(CreditLedger)
        for name in CreditLedger.__slots__:
            setattr(other.ledger, name, getattr(self.ledger, name))
        other.posted, other.inbox, other.wire = self.posted, self.inbox, deque(self.wire)
        return other

    def send(self, kind: str) -> None:
        if kind == "notify":
            self.ledger.send_data()
            self.wire.append(("notify", 0, 0))
            return
        if kind == "data":
            self.ledger.send_data()
        else:
            self.ledger.send_control()
        self.wire.append((kind, *self.ledger.stamp()))

    def update(self) -> None:
        while self.ledger.update_due():
            self.send("control")

    def deliver_from(self, other: Side) -> None:
        kind, data, control = other.wire.popleft()
        assert self.posted > 0, "receiver not ready"
        self.posted -= 1
        if kind == "control":
            self.posted += 1
            self.ledger.receive_control()
        else:
            self.inbox += 1
            self.ledger.receive_data()
        if kind != "notify":
            self.ledger.learn(data, control)
        self.update()

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
        elif take and a.inbox:
            a.take()
        elif take and b.inbox:
            b.take()
        else:
            return
    raise AssertionError("credit frames answer each other without end")


@pytest.mark.parametrize(("window_a", "window_b", "control"), [(1, 1, 3), (1, 1, 4), (2, 1, 4), (2, 2, 4)])
def test_every_order_of_events(window_a: int, window_b: int, control: int) -> None:
    """From every reachable state, once all is delivered and taken, both can send again.

    The search is exhaustive for windows of 1; for larger ones it ends, breadth first, after 5,000 states.
    """
    start = (Side(window_a, window_b, control), Side(window_b, window_a, control))
    seen = {(start[0].key(), start[1].key())}
    todo = deque([start])
    while todo and len(seen) < 5_000:
        a, b = todo.popleft()
        final = (a.clone(), b.clone())
        quiesce(*final, take=True)
        for side in final:
            assert side.ledger.data_credits > 0, "a sender is blocked though its peer took everything"
        for step in range(8):
            after = (a.clone(), b.clone())
            me, peer = (after[0], after[1]) if step % 2 == 0 else (after[1], after[0])
            action = step // 2
            if action == 0 and me.ledger.data_credits:
                me.send("data")
            elif action == 1 and me.ledger.data_credits:
                me.send("notify")
            elif action == 2 and peer.wire:
                me.deliver_from(peer)
            elif action == 3 and me.inbox:
                me.take()
            else:
                continue
            key = (after[0].key(), after[1].key())
            if key not in seen:
                seen.add(key)
                todo.append(after)
    assert len(seen) > 50


class CreditMachine(RuleBasedStateMachine):
    """Random windows, random order: the invariants hold in every state."""

    @initialize(a=st.integers(1, 40), b=st.integers(1, 40))
    def start(self, a: int, b: int) -> None:
        self.sides = (Side(a, b), Side(b, a))
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
            assert peer.posted + peer.inbox == peer.ledger._window + peer.ledger._control

    @invariant()
    def nothing_lost(self) -> None:
        if not hasattr(self, "sides"):
            return
        for who in (0, 1):
            flying = sum(kind != "control" for kind, _, _ in self.sides[who].wire)
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


def test_misuse_is_told_apart() -> None:
    ledger = CreditLedger(window=1, peer_window=1)
    ledger.send_data()
    with pytest.raises(MisuseError, match="no data credit"):
        ledger.send_data()
    with pytest.raises(MisuseError, match="released"):
        ledger.release()
    with pytest.raises(MisuseError, match="at least 1"):
        CreditLedger(window=0, peer_window=1)
