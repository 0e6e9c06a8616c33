"""A receive queue that many connections share: its buffers, who gets what arrives in them, and the books.

The device takes a posted buffer for whichever queue pair has a message; the completion says which (``qp_num``),
and that connection has the buffer until its user has taken the message. How many messages each peer may send is
in protocol/shared_credit.py; what that wants done is done here: buffers are added in chunks leased from the
memory pool, connections are told that they may send credits, or recall some.

Buffers are never withdrawn from the device while the queue lives. When a queue pair is destroyed, those posted
stay posted; the one it was just filling completes with an error, and those with messages come back as the
messages go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._native._datapath import Buffer, Receiver, Ring
from .cq_reactor import CqReactor
from .errors import DeviceError, MemoryLimitError
from .mr_pool import ALIGNMENT, Lease, MemoryPool, round_up
from .protocol.shared_credit import Action, Enlarge, Recall, Share, SharedCredits
from .verbs import ProtectionDomain, SharedReceiveQueue

#: Bytes leased at a time.
_CHUNK = 64 << 10


@dataclass(frozen=True, slots=True)
class SharedReceiveStatistics:
    """A snapshot of a shared receive queue. Counts of receive buffers, unless it says otherwise.

    ``connections`` share it. ``receives`` there are: ``posted`` ones, and those with a message that was not taken.
    ``reserved`` of them belong to a connection, up to ``limit`` more than each connection's least. ``registered``
    bytes of memory; ``waiting`` connections could use more; ``recalls`` were sent since the start.
    """

    connections: int
    receives: int
    posted: int
    reserved: int
    limit: int
    registered: int
    waiting: int
    recalls: int


class SharedUser(Receiver):
    """The receive side of one connection (receive_queue.py)."""

    __slots__ = ()

    def credits_changed(self) -> None:
        """The peer may be told of more credits."""
        raise NotImplementedError

    def recall(self, count: int) -> None:
        """Ask the peer for ``count`` credits."""
        raise NotImplementedError


class SharedReceives:
    """One ``ibv_srq`` with buffers of ``size`` bytes, at most ``capacity`` of them. Belongs to one event loop."""

    def __init__(
        self,
        *,
        pd: ProtectionDomain,
        reactor: CqReactor,
        memory: MemoryPool,
        size: int,
        limit: int,
        capacity: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._reactor = reactor
        self._memory = memory
        self.size = size
        self.capacity = capacity
        self._stride = round_up(size, ALIGNMENT)
        self._chunk = max(1, _CHUNK // self._stride)  # buffers that are added at a time
        self.srq = SharedReceiveQueue(pd, capacity)
        try:
            self.srq.newest_first()
            self.cq = reactor.reserve(capacity)  # whatever is posted can complete
        except BaseException:
            self.srq.close()
            raise
        self.ring = Ring(reactor, size, srq=self.srq.pointer)
        self.books = SharedCredits(limit)
        self._owners: dict[Share, SharedUser] = {}
        self._leases: list[Lease] = []
        self.tells_last = True  # the device says when a queue pair takes no more (QP_LAST_WQE_REACHED)
        self.closed = False

    # --- buffers -------------------------------------------------------------------------------------

    def has_room(self, minimum: int, control: int) -> bool:
        """True when another connection fits."""
        return self.books.missing(minimum, control) <= self.capacity - len(self.ring.buffers)

    async def join(self, minimum: int, maximum: int, control: int) -> Share:
        """A share for one connection more; buffers are added as needed, memory for them is waited for.

        Raises :class:`MemoryLimitError`, :class:`DeviceError`.
        """
        while missing := self.books.missing(minimum, control):
            count = self._count(missing)
            if count < missing:
                raise DeviceError(f"the shared receive queue has all its {self.capacity} receives")
            self._add(await self._memory.acquire(count * self._stride), count)
        return self.books.join(minimum, maximum, control, self._loop.time())

    def _count(self, wanted: int) -> int:
        """How many buffers to add: whole chunks, as long as the queue takes them."""
        chunks = -(-wanted // self._chunk)
        return min(chunks * self._chunk, self.capacity - len(self.ring.buffers))

    def _add(self, lease: Lease, count: int) -> None:
        if self.closed:
            lease.release_nowait()
            raise DeviceError("the shared receive queue is closed")
        self._leases.append(lease)
        for at in range(0, count * self._stride, self._stride):
            self.ring.post(self.ring.add(lease, lease.address + at, lease.lkey))
        self.act(self.books.enlarged(count, self._loop.time()))

    def _enlarge(self, wanted: int) -> int:
        """Adds a chunk if there is memory for it now; returns how many buffers were added."""
        count = self._count(min(wanted, self._chunk))
        if count <= 0:
            return 0
        try:
            lease = self._memory.acquire_nowait(count * self._stride)
        except (MemoryLimitError, DeviceError):
            return 0
        self._add(lease, count)
        return count

    # --- books ---------------------------------------------------------------------------------------

    def act(self, actions: list[Action]) -> None:
        """Does what the books want done."""
        for action in actions:
            if isinstance(action, Enlarge):
                if not self._enlarge(action.count):
                    self.act(self.books.enlarged(0, self._loop.time()))
            elif (owner := self._owners.get(action.share)) is not None:
                if isinstance(action, Recall):
                    owner.recall(action.count)
                else:
                    owner.credits_changed()

    def enter(self, qp_num: int, share: Share, user: SharedUser) -> None:
        """``user`` gets what arrives for this queue pair from now on."""
        self.ring.enter(qp_num, user)
        self._owners[share] = user

    def leave(self, qp_num: int, share: Share, held: int) -> None:
        """The queue pair is gone; ``held`` buffers with messages of it are still looked at."""
        self.ring.forget(qp_num)
        self._owners.pop(share, None)
        self.act(self.books.leave(share, held, self._loop.time()))

    def unused(self, buffer: Buffer, *, left: bool) -> None:
        """A buffer whose contents nobody takes is posted again, if it was not; its connection may have left."""
        if not self.closed and not buffer.posted:
            self.ring.post(buffer)
            if left:
                self.act(self.books.enlarged(1, self._loop.time()))

    def used(self, share: Share) -> None:
        """The user has taken as many messages as the ledger's ``mark`` says."""
        self.act(self.books.used(share, self._loop.time()))

    def returned(self, share: Share, count: int) -> None:
        """The peer gave ``count`` credits back."""
        self.act(self.books.returned(share, count, self._loop.time()))

    def more_offers(self, share: Share) -> bool:
        """Keeps a receive more for the answer to an offer, if there is one or can be."""
        return self.books.more_offers(share) or (self._enlarge(1) > 0 and self.books.more_offers(share))

    def fewer_offers(self, share: Share) -> None:
        """One less."""
        self.act(self.books.fewer_offers(share, self._loop.time()))

    def statistics(self) -> SharedReceiveStatistics:
        """A snapshot."""
        books = self.books
        return SharedReceiveStatistics(
            connections=len(books),
            receives=len(self.ring.buffers),
            posted=self.ring.posted,
            reserved=books.reserved,
            limit=books.limit,
            registered=sum(lease.nbytes for lease in self._leases),
            waiting=books.waiting,
            recalls=books.recalls,
        )

    def close(self) -> None:
        """Every queue pair is gone: destroys the queue, and gives the memory back. Idempotent."""
        if self.closed:
            return
        self.closed = True
        try:
            self.srq.close()
        finally:
            self.ring.close()
            self._reactor.unreserve(self.cq, self.capacity)
            for lease in self._leases:
                lease.release_nowait()


class SharedRing:
    """What one connection sees of the shared queue; it stands where its own ring would (receive_queue.OwnRing)."""

    __slots__ = ("_left", "_lent", "_qp_num", "_shared", "share")

    def __init__(self, shared: SharedReceives, share: Share, qp_num: int) -> None:
        self._shared = shared
        self._qp_num = qp_num
        self._lent = 0
        self._left = False
        self.share = share

    @property
    def posted(self) -> int:
        """Receives posted for all."""
        return self._shared.ring.posted

    def open(self, receiver: SharedUser) -> None:
        """What arrives for the queue pair is the receiver's from now on."""
        self._shared.enter(self._qp_num, self.share, receiver)

    def post(self, buffer: Buffer) -> None:
        """Posts a buffer again. Raises :class:`DeviceError` when the device refuses."""
        self._shared.ring.post(buffer)

    def unused(self, buffer: Buffer) -> None:
        """A buffer whose contents nobody will take goes back, if it has not yet."""
        self._shared.unused(buffer, left=self._left)

    def tells_last(self) -> None:
        """The device says when a queue pair takes no more receives."""
        self._shared.tells_last = True

    def used(self) -> None:
        """As many messages were taken as the ledger's ``mark`` says."""
        self._shared.used(self.share)

    def returned(self, count: int) -> None:
        """The peer gave ``count`` credits back."""
        self._shared.returned(self.share, count)

    def more_offers(self) -> bool:
        """Keeps a receive more for the answer to an offer of ours, if there is one or can be."""
        return self._shared.more_offers(self.share)

    def fewer_offers(self) -> None:
        """One less."""
        self._shared.fewer_offers(self.share)

    def lend(self, buffer: Buffer) -> Callable[[], None]:
        """A buffer is looked at for longer, after :meth:`leave` too; call the result when that is over."""
        hold: Any = memoryview(buffer.owner)
        self._lent += 1

        def take_back() -> None:
            hold.release()
            self._lent -= 1

        return take_back

    def leave(self, handed: int) -> None:
        """The queue pair is gone; its messages have been taken or copied, but for ``handed`` ones."""
        self._left = True
        self._shared.leave(self._qp_num, self.share, self._lent + handed)


__all__ = ["SharedReceiveStatistics", "SharedReceives", "SharedRing", "SharedUser"]
