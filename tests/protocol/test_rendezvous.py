"""Rendezvous without a device: its frames, and every order of offers, withdrawals, reads and cancellations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.rendezvous import (
    INLINE_PART,
    MIN_OFFER_SIZE,
    SEND_TABLE,
    Answer,
    Offer,
    Segment,
    SendEvent,
    SendState,
    TakerLedger,
    Taking,
    decode_done,
    decode_offer,
    encode_done,
    encode_offer,
    next_send_state,
    plan,
)

LIMIT = 1 << 40

# --- frames -------------------------------------------------------------------------------------------

remote_segments = st.builds(
    lambda address, length, rkey: Segment(length, address, rkey),
    st.integers(0, (1 << 64) - LIMIT),
    st.integers(1, 1 << 32),
    st.integers(0, (1 << 32) - 1),
)
inline_segments = st.binary(min_size=1, max_size=50).map(lambda data: Segment(len(data), data=data))
segment_lists = st.lists(remote_segments | inline_segments, min_size=1, max_size=20)


@given(st.integers(0, (1 << 32) - 1), segment_lists)
def test_an_offer_comes_out_as_it_went_in(transfer: int, segments: list[Segment]) -> None:
    offer = decode_offer(encode_offer(transfer, segments), LIMIT)
    assert (offer.transfer, offer.segments) == (transfer, tuple(segments))
    assert offer.nbytes == sum(segment.length for segment in segments)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_offer_or_refused(payload: bytes) -> None:
    try:
        offer = decode_offer(payload, LIMIT)
    except ProtocolError:
        return
    assert encode_offer(offer.transfer, offer.segments) == payload


@given(segment_lists, st.data())
def test_a_damaged_offer_is_never_more_than_it_says(segments: list[Segment], data: st.DataObject) -> None:
    payload = bytearray(encode_offer(1, segments))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    try:
        offer = decode_offer(bytes(payload), LIMIT)
    except ProtocolError:
        return
    assert offer.nbytes == sum(segment.length for segment in offer.segments) <= LIMIT
    assert all(s.data is None or len(s.data) == s.length for s in offer.segments)


def test_what_an_offer_cannot_be() -> None:
    good = encode_offer(1, [Segment(100, 4096, 7)])
    assert len(good) == MIN_OFFER_SIZE
    segment = slice(16, 40)
    for bad in (
        good[:-1],
        good + b"x",
        good[:6] + b"\0\1" + good[8:],  # reserved
        good[:8] + bytes(8) + good[16:],  # a total of 0
        good[:20] + b"\0\0\0\2" + good[24:],  # neither inline nor not
        good[:24] + b"\xff" * 8 + good[32:],  # beyond the end of memory
        good[:4] + b"\0\0" + good[6:],  # no segment
        good[:4] + b"\xff\xff" + good[6:],  # more than are there
        encode_offer(1, [Segment(3, data=b"abc")])[: MIN_OFFER_SIZE + 2],
    ):
        with pytest.raises(ProtocolError):
            decode_offer(bad, LIMIT)
    assert good[segment]
    with pytest.raises(ProtocolError, match="limit is 99"):
        decode_offer(good, 99)


def test_done() -> None:
    assert decode_done(encode_done(5, Answer.WITHDRAWN)) == (5, Answer.WITHDRAWN)
    with pytest.raises(ProtocolError, match="unknown answer"):
        decode_done(bytes(4) + b"\0\0\0\2")


@given(st.lists(st.integers(1, 3 * INLINE_PART), min_size=1, max_size=40), st.integers(64, 8192))
def test_a_plan_fits_the_frame(lengths: list[int], room: int) -> None:
    try:
        inline = plan(lengths, room)
    except MisuseError:
        assert len(lengths) > (room - 16) // 24
        return
    segments = [
        Segment(length, data=bytes(length)) if here else Segment(length, 0, 0)
        for length, here in zip(lengths, inline, strict=True)
    ]
    assert len(encode_offer(0, segments)) <= room


def test_every_event_in_every_state_has_its_place_or_is_refused() -> None:
    for state in SendState:
        for event in SendEvent:
            if (state, event) in SEND_TABLE:
                assert next_send_state(state, event) is SEND_TABLE[state, event]
            else:
                with pytest.raises(ProtocolError, match=f"{event.value} while {state.value}"):
                    next_send_state(state, event)
    assert all((state, SendEvent.ABANDONED) in SEND_TABLE for state in SendState), "cancelled at any time"


# --- both sides, and two ways between them -------------------------------------------------------------

DEPTH = 3


@dataclass(eq=False)
class Message:
    """One large message at its sender."""

    transfer: int
    state: SendState = SendState.WAITING
    wanted: bool = True

    @property
    def exposed(self) -> bool:
        return self.state in (SendState.OFFERED, SendState.WITHDRAWN)


@dataclass(eq=False)
class Reading:
    """A receive of the user's; its reads may outlive it."""

    taking: Taking
    in_flight: int = 0
    to_read: int = 2
    given_up: bool = False


@dataclass
class World:
    messages: dict[int, Message] = field(default_factory=dict)
    frames: deque[tuple[str, int, Answer]] = field(default_factory=deque)  # queue pair, to the receiver
    session: deque[int] = field(default_factory=deque)  # TCP, to the receiver
    answers: deque[tuple[int, Answer]] = field(default_factory=deque)  # queue pair, to the sender


class Rendezvous(RuleBasedStateMachine):
    """As large_messages.py drives the two sides; TCP and the queue pair are not ordered with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.ledger = TakerLedger(DEPTH)
        self.inbox: deque[Taking] = deque()
        self.readings: list[Reading] = []
        self.delivered: list[int] = []
        self.answered: list[int] = []
        self.next = 0xFFFFFFFE  # near the wrap

    # --- the sender

    def under_way(self) -> int:
        return sum(message.exposed for message in self.world.messages.values())

    @rule()
    def send(self) -> None:
        message = Message(self.next)
        self.next = (self.next + 1) % (1 << 32)
        self.world.messages[message.transfer] = message

    @precondition(lambda self: self.under_way() < DEPTH)
    @rule()
    def post(self) -> None:
        waiting = [m for m in self.world.messages.values() if m.state is SendState.WAITING]
        if waiting:
            waiting[0].state = next_send_state(waiting[0].state, SendEvent.POSTED)
            self.world.frames.append(("offer", waiting[0].transfer, Answer.READ))

    @rule(data=st.data())
    def cancel_send(self, data: st.DataObject) -> None:
        wanted = [m for m in self.world.messages.values() if m.wanted]
        if wanted:
            message = data.draw(st.sampled_from(wanted))
            before, message.wanted = message.state, False
            message.state = next_send_state(before, SendEvent.ABANDONED)
            if before is SendState.OFFERED:
                self.world.session.append(message.transfer)

    @rule()
    def hear_answer(self) -> None:
        if self.world.answers:
            transfer, answer = self.world.answers.popleft()
            message = self.world.messages[transfer]
            assert answer is Answer.READ or message.state is SendState.WITHDRAWN
            message.state = next_send_state(message.state, SendEvent.ANSWERED)

    @rule()
    def revoke(self) -> None:
        for message in self.world.messages.values():
            if message.state is SendState.REVOKING:
                message.state = next_send_state(message.state, SendEvent.REVOKED)
                return

    # --- the receiver

    def answer(self, taking: Taking, answer: Answer) -> None:
        self.ledger.answered(taking)
        self.answer_number(taking.offer.transfer, answer)

    def answer_number(self, transfer: int, answer: Answer) -> None:
        assert transfer not in self.answered, "one answer each"
        self.answered.append(transfer)
        self.world.answers.append((transfer, answer))

    @rule()
    def hear_offer(self) -> None:
        if self.world.frames:
            _, transfer, _ = self.world.frames.popleft()
            taking = self.ledger.arrived(Offer(transfer, 2, (Segment(2),)))
            if taking is None:
                self.answer_number(transfer, Answer.WITHDRAWN)
            else:
                self.inbox.append(taking)

    @rule()
    def hear_withdraw(self) -> None:
        if self.world.session:
            taking = self.ledger.withdraw(self.world.session.popleft())
            if taking is not None:
                self.inbox.remove(taking)
                if self.ledger.answer_due(taking):
                    self.answer(taking, Answer.WITHDRAWN)

    @precondition(lambda self: self.inbox)
    @rule()
    def take(self) -> None:
        taking = self.inbox.popleft()
        taking.taken = True
        self.readings.append(Reading(taking))

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        able = [r for r in self.readings if r.to_read and not r.given_up]
        if able:
            reading = data.draw(st.sampled_from(able))
            reading.to_read -= 1
            reading.in_flight += 1
            reading.taking.reads += 1

    @rule(data=st.data())
    def read_done(self, data: st.DataObject) -> None:
        able = [r for r in self.readings if r.in_flight]
        if not able:
            return
        reading = data.draw(st.sampled_from(able))
        reading.in_flight -= 1
        reading.taking.reads -= 1
        if reading.given_up:
            if self.ledger.answer_due(reading.taking):
                self.answer(reading.taking, Answer.WITHDRAWN)
        elif not reading.to_read and not reading.in_flight:
            self.delivered.append(reading.taking.offer.transfer)
            self.readings.remove(reading)
            self.answer(reading.taking, Answer.READ)

    @rule(data=st.data())
    def cancel_receive(self, data: st.DataObject) -> None:
        able = [r for r in self.readings if not r.given_up]
        if able:
            reading = data.draw(st.sampled_from(able))
            reading.given_up = True
            if self.ledger.put_back(reading.taking):
                self.inbox.appendleft(reading.taking)
            elif self.ledger.answer_due(reading.taking):
                self.answer(reading.taking, Answer.WITHDRAWN)

    # --- what must hold

    @invariant()
    def no_read_reaches_memory_that_is_not_exposed(self) -> None:
        for reading in self.readings:
            if reading.in_flight:
                assert self.world.messages[reading.taking.offer.transfer].exposed

    @invariant()
    def no_more_under_way_than_receives_for_the_answers(self) -> None:
        assert len(self.ledger) <= DEPTH
        assert len(self.world.answers) <= DEPTH

    @invariant()
    def nothing_is_delivered_twice(self) -> None:
        assert len(set(self.delivered)) == len(self.delivered)

    def teardown(self) -> None:
        """Left alone, everything ends: no offer stays without an answer."""
        for _ in range(200):
            if self.under_way() < DEPTH:
                self.post()
            self.hear_offer()
            self.hear_withdraw()
            self.finish_readings()
            if self.inbox:
                self.take()
            self.hear_answer()
            self.revoke()
        assert all(m.state in (SendState.ENDED, SendState.REVOKING) for m in self.world.messages.values())
        assert not len(self.ledger)
        unwanted = {m.transfer for m in self.world.messages.values() if not m.wanted}
        assert {m for m in self.world.messages if m not in unwanted} <= set(self.delivered)

    def finish_readings(self) -> None:
        for reading in list(self.readings):
            while not reading.given_up and reading.to_read:
                reading.to_read -= 1
                reading.in_flight += 1
                reading.taking.reads += 1
            for _ in range(reading.in_flight):
                reading.in_flight -= 1
                reading.taking.reads -= 1
            if reading.given_up:
                if reading.taking.offer.transfer not in self.answered and self.ledger.answer_due(
                    reading.taking
                ):
                    self.answer(reading.taking, Answer.WITHDRAWN)
            else:
                self.delivered.append(reading.taking.offer.transfer)
                self.answer(reading.taking, Answer.READ)
            self.readings.remove(reading)


TestRendezvous = Rendezvous.TestCase
TestRendezvous.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_offers_out_of_order_or_too_many() -> None:
    ledger = TakerLedger(2)
    assert ledger.arrived(Offer(5, 1, (Segment(1),))) is not None
    with pytest.raises(ProtocolError, match="offer 5 after offer 5"):
        ledger.arrived(Offer(5, 1, (Segment(1),)))
    assert ledger.arrived(Offer(7, 1, (Segment(1),))) is not None
    with pytest.raises(ProtocolError, match="more than 2 offers"):
        ledger.arrived(Offer(8, 1, (Segment(1),)))


def test_withdrawals_of_what_never_comes_are_bounded() -> None:
    ledger = TakerLedger(2)
    ledger.withdraw(1)
    ledger.withdraw(2)
    with pytest.raises(ProtocolError, match="before they came"):
        ledger.withdraw(3)
