"""Many peers, one pool of receives: never more granted than posted, whoever comes, grows, gives back or dies."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from aiordma.errors import MisuseError
from aiordma.protocol.credit import CONTROL_WINDOW, CreditLedger
from aiordma.protocol.shared_credit import (
    BUSY_WITHIN,
    LOOK_EVERY,
    Action,
    Enlarge,
    Grown,
    Recall,
    Share,
    SharedCredits,
)
from tests.protocol.test_credit import Frame, Side

MAXIMUM = 16
CLIENT_WINDOW = 4


class Pool:
    """The shared receive queue as its owner drives the books: receives are posted, or have a message in them."""

    def __init__(self, limit: int, chunk: int, memory: int) -> None:
        self.books = SharedCredits(limit)
        self.posted = 0
        self.chunk = chunk
        self.memory = memory  # receives that can be made
        self.now = 0.0
        self.peers: list[Peer] = []
        self.lent = 0  # receives with a message of a peer that is gone

    def enlarge(self) -> int:
        count = min(self.chunk, self.memory)
        self.memory -= count
        self.posted += count
        return count

    def act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Enlarge):
                self.act(self.books.enlarged(self.enlarge(), self.now))
                continue
            peer = next(peer for peer in self.peers if peer.share is action.share)
            if isinstance(action, Recall):
                peer.recalls.append(action.count)
            peer.update()

    def connect(self, minimum: int) -> Peer | None:
        while self.books.missing(minimum, CONTROL_WINDOW):
            count = self.enlarge()
            if not count:
                return None
            self.act(self.books.enlarged(count, self.now))
        peer = Peer(self, self.books.join(minimum, MAXIMUM, CONTROL_WINDOW, self.now))
        self.peers.append(peer)
        return peer


class Peer:
    """One connection: our end of it, which shares the pool, and the peer, with a queue of its own."""

    def __init__(self, pool: Pool, share: Share) -> None:
        self.pool = pool
        self.share = share
        self.ledger = share.ledger = CreditLedger(window=share.minimum, peer_window=CLIENT_WINDOW)
        self.client = Side(CLIENT_WINDOW, share.minimum, peer_most=MAXIMUM)
        self.inbox = 0
        self.wire: deque[Frame] = deque()  # from us to the peer
        self.recalls: deque[int] = deque()

    def update(self) -> None:
        while self.ledger.update_due():
            self.ledger.send_control()
            self.wire.append(("control", *self.ledger.stamp(), 0))

    def send(self) -> None:
        self.ledger.send_data()
        self.wire.append(("data", *self.ledger.stamp(), 0))

    def receive(self) -> None:
        """The next frame of the peer arrives here."""
        pool, ledger, share = self.pool, self.ledger, self.share
        kind, data, control, given_up = self.client.wire.popleft()
        assert pool.posted > 0, "receiver not ready"
        pool.posted -= 1
        actions: list[Action] = []
        if kind == "control":
            pool.posted += 1
            ledger.receive_control()
        elif kind == "return":
            pool.posted += 1
            ledger.receive_return(given_up)
            actions = pool.books.returned(share, given_up, pool.now)
        else:
            self.inbox += 1
            ledger.receive_data()
        if kind != "notify":
            ledger.learn(data, control)
        pool.act(actions)
        self.update()

    def take(self) -> None:
        self.inbox -= 1
        self.pool.posted += 1
        self.ledger.release()
        if self.ledger.data_released >= self.ledger.mark:
            self.pool.act(self.pool.books.used(self.share, self.pool.now))
        self.update()

    def hear_recall(self) -> None:
        self.client.wish = self.recalls.popleft()

    def die(self, lent: int) -> None:
        """Frames in flight are lost; of the messages that were not taken, ``lent`` stay in their receives."""
        lent = min(lent, self.inbox)
        self.pool.posted += self.inbox - lent
        self.pool.lent += lent
        self.pool.peers.remove(self)
        self.pool.act(self.pool.books.leave(self.share, lent, self.pool.now))

    def settle(self) -> bool:
        """One step towards the state in which nothing moves any more."""
        if self.client.wire:
            self.receive()
        elif self.wire:
            self.client.deliver_from(self)  # type: ignore[arg-type]
        elif self.recalls:
            self.hear_recall()
        elif self.client.may_give_back():
            self.client.give_back()
        elif self.inbox:
            self.take()
        elif self.client.inbox:
            self.client.take()
        else:
            return False
        return True


class SharedMachine(RuleBasedStateMachine):
    """Random peers, random order."""

    @initialize(limit=st.integers(0, 40), chunk=st.integers(1, 20), memory=st.integers(20, 150))
    def start(self, limit: int, chunk: int, memory: int) -> None:
        self.pool = Pool(limit, chunk, memory)

    def peer(self, who: int) -> Peer | None:
        peers = self.pool.peers
        return peers[who % len(peers)] if peers else None

    @rule(minimum=st.integers(1, 4))
    def connect(self, minimum: int) -> None:
        self.pool.connect(minimum)

    @rule(who=st.integers(0, 9), count=st.integers(1, 20), kind=st.sampled_from(["data", "notify"]))
    def peer_sends(self, who: int, count: int, kind: str) -> None:
        if peer := self.peer(who):
            for _ in range(min(count, peer.client.ledger.data_credits)):
                peer.client.send(kind)

    @rule(who=st.integers(0, 9), count=st.integers(1, 20))
    def we_receive(self, who: int, count: int) -> None:
        if peer := self.peer(who):
            for _ in range(min(count, len(peer.client.wire))):
                peer.receive()

    @rule(who=st.integers(0, 9), count=st.integers(1, 20))
    def we_take(self, who: int, count: int) -> None:
        if peer := self.peer(who):
            for _ in range(min(count, peer.inbox)):
                peer.take()

    @rule(who=st.integers(0, 9), count=st.integers(1, 20))
    def traffic(self, who: int, count: int) -> None:
        """A busy peer and a quick receiver."""
        if peer := self.peer(who):
            for _ in range(count):
                while peer.client.ledger.data_credits:
                    peer.client.send("data")
                while peer.settle():
                    pass

    @rule(who=st.integers(0, 9), count=st.integers(1, 4))
    def we_send(self, who: int, count: int) -> None:
        if peer := self.peer(who):
            for _ in range(min(count, peer.ledger.data_credits)):
                peer.send()

    @rule(who=st.integers(0, 9), count=st.integers(1, 20))
    def peer_receives(self, who: int, count: int) -> None:
        if peer := self.peer(who):
            for _ in range(min(count, len(peer.wire))):
                peer.client.deliver_from(peer)  # type: ignore[arg-type]

    @rule(who=st.integers(0, 9))
    def recall_arrives(self, who: int) -> None:
        if (peer := self.peer(who)) and peer.recalls:
            peer.hear_recall()

    @rule(who=st.integers(0, 9))
    def peer_gives_back(self, who: int) -> None:
        if (peer := self.peer(who)) and peer.client.may_give_back():
            peer.client.give_back()

    @rule(who=st.integers(0, 9), lent=st.integers(0, 3))
    def peer_dies(self, who: int, lent: int) -> None:
        if peer := self.peer(who):
            peer.die(lent)

    @rule()
    def lent_messages_come_back(self) -> None:
        count, self.pool.lent = self.pool.lent, 0
        self.pool.posted += count
        if count:
            self.pool.act(self.pool.books.enlarged(count, self.pool.now))

    @rule(who=st.integers(0, 9))
    def we_offer(self, who: int) -> None:
        if peer := self.peer(who):
            self.pool.books.more_offers(peer.share)

    @rule(who=st.integers(0, 9))
    def our_offer_is_answered(self, who: int) -> None:
        if (peer := self.peer(who)) and peer.share.offers > 1:
            self.pool.act(self.pool.books.fewer_offers(peer.share, self.pool.now))

    @rule(seconds=st.sampled_from([0.01, BUSY_WITHIN, 10.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.pool.now += seconds

    @rule()
    def all_settle(self) -> None:
        """Everything delivered and taken: whoever wants to send can."""
        for peer in list(self.pool.peers):
            while peer.settle():
                pass
            assert peer.client.ledger.data_credits > 0
            assert peer.ledger.data_credits > 0
            assert not peer.ledger.asked

    @invariant()
    def never_more_granted_than_posted(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is None:
            return
        books = pool.books
        assert books.reserved == sum(peer.share.reserved for peer in pool.peers) <= books.count
        assert pool.posted + sum(peer.inbox for peer in pool.peers) == books.count
        expected = 0
        for peer in pool.peers:
            ledger = peer.ledger
            assert len(peer.client.wire) <= ledger.data_told - ledger.data_received + CONTROL_WINDOW
            assert peer.share.minimum <= ledger.window <= MAXIMUM
            expected += ledger.data_told - ledger.data_received  # what peers may send now,
            expected += ledger.control_told - ledger.control_received  # ... and these,
            expected += peer.share.offers  # ... and the answers to what we offered
        assert expected <= pool.posted


SharedMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestSharedMachine = SharedMachine.TestCase


def flood(pool: Pool, peer: Peer, rounds: int = 40) -> None:
    """The peer sends all it may, again and again; we take all of it."""
    for _ in range(rounds):
        while peer.client.ledger.data_credits:
            peer.client.send("data")
        while peer.settle():
            pass
        pool.now += 0.001


def connected(pool: Pool, minimum: int = 4) -> Peer:
    peer = pool.connect(minimum)
    assert peer is not None
    return peer


def test_a_busy_peer_grows_to_its_maximum_and_no_further() -> None:
    pool = Pool(limit=100, chunk=8, memory=1000)
    peer = connected(pool)
    flood(pool, peer)
    assert peer.share.window == MAXIMUM
    assert peer.client.ledger.data_credits > MAXIMUM // 2, "the rest is owed"


def test_a_slow_peer_stays_small() -> None:
    pool = Pool(limit=100, chunk=8, memory=1000)
    peer = connected(pool)
    for _ in range(100):
        peer.client.send("data")
        while peer.settle():
            pass
        pool.now += BUSY_WITHIN
    assert peer.share.window == peer.share.minimum


def test_idle_peers_give_back_to_busy_ones() -> None:
    pool = Pool(limit=MAXIMUM, chunk=8, memory=1000)
    first, second = connected(pool), connected(pool)
    flood(pool, first)
    assert first.share.window == MAXIMUM
    flood(pool, second, rounds=3)
    pool.now += BUSY_WITHIN
    flood(pool, second)
    while first.settle():
        pass
    flood(pool, second)
    assert pool.books.recalls == 1
    assert first.share.window == first.share.minimum
    assert 0 < first.client.ledger.data_credits <= first.share.minimum
    assert second.share.window == MAXIMUM
    flood(pool, first, rounds=2)
    assert first.share.window == first.share.minimum, "the other is busy, and may stay so"


def test_busy_peers_come_to_about_the_same() -> None:
    pool = Pool(limit=12, chunk=4, memory=1000)
    peers = [connected(pool, minimum=2) for _ in range(3)]
    flood(pool, peers[0])
    assert peers[0].share.window > 8
    for _ in range(40):
        for peer in peers:
            flood(pool, peer, rounds=1)
    windows = sorted(peer.share.window for peer in peers)
    assert windows[0] * 2 >= windows[-1] // 2, windows
    assert pool.books.reserved <= pool.books.count


def test_where_nobody_can_give_they_are_not_asked_for_every_message() -> None:
    pool = Pool(limit=8, chunk=8, memory=1000)
    peers = [connected(pool) for _ in range(40)]
    rounds = 20
    for _ in range(rounds):
        for peer in peers:
            pool.now += LOOK_EVERY / 100
            peer.client.send("data")
            while peer.settle():
                pass
    assert pool.books.waiting > 20
    assert 0 < pool.books.vain <= len(peers) * rounds // 100


def test_after_a_look_in_vain_an_idle_peer_is_found() -> None:
    pool = Pool(limit=MAXIMUM - 4, chunk=8, memory=1000)
    idle, busy = connected(pool), connected(pool)
    flood(pool, idle)
    flood(pool, busy)
    assert pool.books.vain > 0
    assert busy.share.window < MAXIMUM
    pool.now += BUSY_WITHIN
    while idle.settle():
        pass
    flood(pool, busy)
    while idle.settle():
        pass
    flood(pool, busy)
    assert busy.share.window == MAXIMUM


def test_without_memory_credits_are_taken_back_instead() -> None:
    pool = Pool(limit=1000, chunk=10, memory=30)
    first, second = connected(pool), connected(pool)
    flood(pool, first)
    grown = first.share.window
    assert grown > 4
    pool.now += 1
    flood(pool, second)
    while first.settle():
        pass
    flood(pool, second)
    assert first.share.window == 4
    assert second.share.window == grown


def test_who_waits_is_served_when_somebody_leaves() -> None:
    pool = Pool(limit=0, chunk=1, memory=1000)
    first, second = connected(pool), connected(pool)
    flood(pool, second)
    assert second.share.window == 4
    assert pool.books.waiting == 1
    first.die(0)
    assert pool.books.waiting == 0
    assert second.share.window == 8


def test_a_slow_reader_keeps_only_its_share() -> None:
    pool = Pool(limit=20, chunk=4, memory=1000)
    slow, quick = connected(pool), connected(pool)
    while slow.client.ledger.data_credits:
        slow.client.send("data")
    while slow.client.wire:
        slow.receive()
    assert slow.inbox == 4
    flood(pool, quick)
    assert quick.share.window == MAXIMUM
    assert slow.share.window == 4


def test_offers_take_what_is_spare() -> None:
    pool = Pool(limit=0, chunk=1, memory=10)
    peer = connected(pool)
    assert not pool.books.more_offers(peer.share)
    pool.act(pool.books.enlarged(pool.enlarge(), pool.now))
    assert pool.books.more_offers(peer.share)
    assert not pool.books.more_offers(peer.share)
    assert pool.books.fewer_offers(peer.share, pool.now) == []
    assert pool.books.spare == 1


def test_joining_needs_receives() -> None:
    books = SharedCredits(100)
    assert books.missing(4, 4) == 9
    with pytest.raises(MisuseError, match="not enough"):
        books.join(4, 8, 4, 0.0)
    books.enlarged(9, 0.0)
    with pytest.raises(MisuseError, match="share of 8 to 4"):
        books.join(8, 4, 4, 0.0)
    share = books.join(4, 8, 4, 0.0)
    assert (books.spare, len(books)) == (0, 1)
    assert books.leave(share, 0, 0.0) == []
    assert (books.spare, len(books)) == (9, 0)


def test_actions_name_their_share() -> None:
    pool = Pool(limit=8, chunk=8, memory=17)
    peer = connected(pool)
    peer.share.ledger = peer.ledger
    actions = pool.books.enlarged(8, 0.0)
    assert actions == []
    for _ in range(4):
        peer.ledger.receive_data()
        peer.ledger.release()
    assert pool.books.used(peer.share, 0.1) == [Grown(peer.share)]
