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
from typing import Any, Protocol

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


class SharedUser(Protocol):
    """The receive side of one connection (receive_queue.py)."""

    def completed(
        self, index: int, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int
    ) -> None:
        """Something arrived in buffer ``index``, which is the connection's until it posts it again."""

    def credits_changed(self) -> None:
        """The peer may be told of more credits."""

    def recall(self, count: int) -> None:
        """Ask the peer for ``count`` credits."""


class _Buffer:
    """One receive buffer in the pending table."""

    __slots__ = ("address", "index", "lease", "lkey", "posted", "shared", "view", "wr_id")

    def __init__(self, shared: SharedReceives, index: int, lease: Lease, view: memoryview, at: int) -> None:
        self.shared = shared
        self.index = index
        self.lease = lease
        self.lkey = lease.lkey
        self.address = lease.address + at
        self.view = view[at : at + shared.size]
        self.posted = False
        self.wr_id = 0

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """Something arrived in this buffer, or its queue pair failed while it was filled."""
        shared = self.shared
        self.posted = False
        shared.posted -= 1
        user = shared.users.get(qp_num)
        if user is not None:
            user.completed(self.index, status, opcode, byte_len, imm, vendor_err)
        else:
            shared.post_one(self.index)  # of a queue pair that is gone


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
            self.cq = reactor.reserve(capacity)  # whatever is posted can complete
        except BaseException:
            self.srq.close()
            raise
        self.books = SharedCredits(limit)
        self.users: dict[int, SharedUser] = {}  # by qp_num
        self._owners: dict[Share, SharedUser] = {}
        self._chunks: list[tuple[Lease, memoryview]] = []
        self.buffers: list[_Buffer] = []
        self.posted = 0
        self.tells_last = True  # the device says when a queue pair takes no more (QP_LAST_WQE_REACHED)
        self.closed = False

    # --- buffers -------------------------------------------------------------------------------------

    def has_room(self, minimum: int, control: int) -> bool:
        """True when another connection fits."""
        return self.books.missing(minimum, control) <= self.capacity - len(self.buffers)

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
        return min(chunks * self._chunk, self.capacity - len(self.buffers))

    def _add(self, lease: Lease, count: int) -> None:
        if self.closed:
            lease.release_nowait()
            raise DeviceError("the shared receive queue is closed")
        view = memoryview(lease)
        self._chunks.append((lease, view))
        first = len(self.buffers)
        added = [_Buffer(self, first + i, lease, view, i * self._stride) for i in range(count)]
        self.buffers += added
        self.srq.post_recv([self._enter(buffer) for buffer in added])
        self.posted += count
        self.act(self.books.enlarged(count, self._loop.time()))

    def _enter(self, buffer: _Buffer) -> tuple[int, int, int, int]:
        buffer.wr_id = self._reactor.add(buffer)
        buffer.posted = True
        return buffer.wr_id, buffer.address, self.size, buffer.lkey

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

    def post_one(self, index: int) -> None:
        """Posts a buffer. Raises :class:`DeviceError` when the device refuses."""
        buffer = self.buffers[index]
        self.srq.post_recv_one(*self._enter(buffer))
        self.posted += 1

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

    def enter(self, qp_num: int, share: Share, user: SharedUser) -> SharedRing:
        """``user`` gets what arrives for this queue pair from now on."""
        self.users[qp_num] = user
        self._owners[share] = user
        return SharedRing(self, share, qp_num)

    def forget(self, qp_num: int, share: Share) -> None:
        """The queue pair is gone."""
        self.users.pop(qp_num, None)
        self._owners.pop(share, None)

    def leave(self, share: Share, lent: int) -> None:
        """The connection is gone; ``lent`` buffers hold messages of it that are still looked at."""
        self.act(self.books.leave(share, lent, self._loop.time()))

    def comes_back(self, index: int) -> None:
        """A buffer with a message of a connection that has left was looked at for the last time."""
        if not self.closed:
            self.post_one(index)
            self.act(self.books.enlarged(1, self._loop.time()))

    def used(self, share: Share) -> None:
        """The user has taken as many messages as ``share.mark`` says."""
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
            receives=len(self.buffers),
            posted=self.posted,
            reserved=books.reserved,
            limit=books.limit,
            registered=sum(lease.nbytes for lease, _ in self._chunks),
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
            for buffer in self.buffers:
                self._reactor.remove(buffer.wr_id, buffer)
                buffer.view.release()
            self._reactor.unreserve(self.cq, self.capacity)
            for lease, view in self._chunks:
                view.release()
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
        return self._shared.posted

    def post_one(self, index: int) -> None:
        """Posts a buffer again. Raises :class:`DeviceError` when the device refuses."""
        self._shared.post_one(index)

    def unused(self, index: int) -> None:
        """A buffer whose contents nobody will take goes back, if it has not yet."""
        shared = self._shared
        if not self._left and not shared.buffers[index].posted:
            shared.post_one(index)

    def tells_last(self) -> None:
        """The device says when a queue pair takes no more receives."""
        self._shared.tells_last = True

    def used(self) -> None:
        """As many messages were taken as ``share.mark`` says."""
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

    def address(self, index: int) -> int:
        """Where a buffer starts."""
        return self._shared.buffers[index].address

    def buffer(self, index: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of a buffer that has arrived."""
        return self._shared.buffers[index].view[:nbytes]

    def lend(self, index: int) -> Callable[[], None]:
        """A buffer is looked at for longer, after :meth:`close` too; call the result when that is over."""
        hold: Any = memoryview(self._shared.buffers[index].lease)
        self._lent += 1

        def take_back() -> None:
            hold.release()
            self._lent -= 1
            if self._left:
                self._shared.comes_back(index)

        return take_back

    def close(self) -> None:
        """The queue pair is gone; its messages have been taken or copied."""
        self._left = True
        self._shared.forget(self._qp_num, self.share)
        self._shared.leave(self.share, self._lent)


__all__ = ["SharedReceiveStatistics", "SharedReceives", "SharedRing", "SharedUser"]
