"""The receive side of a connection: posted buffers, the inbox, and who waits for it.

A message stays in the buffer it arrived in until the user takes it; then it is copied out (or lent: MessageLease),
the buffer is posted again, and a credit is owed to the peer. So a slow user slows the sender, and memory is
bounded by the ring. A notification, and the offer of a large message, free their buffer at once, but their credit
is owed only when the user has taken them, for the same reason.

Taking is separate from waking: a receiver that is cancelled between its wake-up and its turn has taken nothing,
and the wake-up goes to the next in line. Receivers are served in the order they came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

from ._native import ffi
from ._native._memory import Memory
from .cq_reactor import CqReactor, SpinGovernor
from .errors import DeviceError, ProtocolError
from .mr_pool import Lease, ReceiveRing
from .protocol.credit import CreditLedger
from .protocol.frames import HEADER, HEADER_SIZE, RETURN, FrameKind, check_header
from .protocol.rendezvous import Taking
from .send_queue import SendQueue, SpinningFuture
from .shared_receives import SharedRing
from .verbs import QueuePair, WcOpcode

_RECV_WITH_IMM = int(WcOpcode.RECV_RDMA_WITH_IMM)
_now_ns = time.perf_counter_ns

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items in order of arrival, and a fair line of those who wait for one."""

    __slots__ = ("_governor", "_loop", "_spin", "_waiters", "_woken", "items")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        spin: Callable[[SpinningFuture], None] | None,
        governor: SpinGovernor | None,
    ) -> None:
        self._loop = loop
        self._spin = spin
        self._governor = governor
        self._waiters: deque[SpinningFuture] = deque()
        self._woken: deque[SpinningFuture] = (
            deque()
        )  # have not taken their turn yet: the first items are theirs
        self.items: deque[T] = deque()

    def put(self, item: T) -> None:
        """One more item; wakes the first in line."""
        self.items.append(item)
        self._wake()

    def put_back(self, item: T) -> None:
        """An item that was taken is the next one again; wakes the first in line."""
        self.items.appendleft(item)
        self._wake()

    def remove(self, item: T) -> None:
        """An item is gone; a receiver that was woken for it finds nothing."""
        self.items.remove(item)

    def look_again(self) -> None:
        """Somebody leaves an item to others: wakes the first in line."""
        self._wake()

    def _wake(self) -> None:
        while self._waiters and len(self.items) > len(self._woken):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._woken.append(waiter)
                waiter.set_result(True)

    @property
    def place(self) -> int | None:
        """Where the next item is that is promised to nobody; None when there is none."""
        place = len(self._woken)
        return place if len(self.items) > place else None

    def take(self, place: int) -> T:
        """Takes the item at a place that :attr:`place` or :meth:`wait` has just given."""
        if not place:
            return self.items.popleft()
        item = self.items[place]
        del self.items[place]
        return item

    async def wait(self) -> int:
        """Returns when it is the caller's turn, with the place of its item: it must take it before it awaits
        anything, and look first whether it is there (:meth:`remove`).

        Cancelled: the turn goes to the next. Raises what :meth:`fail` was given.
        """
        waiter = SpinningFuture(self._loop, self._spin)
        self._waiters.append(waiter)
        started = _now_ns()
        try:
            await waiter
        except BaseException:
            if waiter in self._woken:
                self._woken.remove(waiter)
                self._wake()
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise
        place = self._woken.index(waiter)
        del self._woken[place]
        if self._governor is not None:
            self._governor.learn(_now_ns() - started)
        return place

    def fail(self, make_error: Callable[[], BaseException]) -> None:
        """Everyone in line gets an error of their own; those already woken still get their item."""
        while self._waiters:
            self._waiters.popleft().fail(make_error())


class LargeArrivals(Protocol):
    """Who handles large messages (large_messages.py)."""

    def offered(self, payload: bytes) -> None:
        """An OFFER frame."""

    def answered(self, payload: bytes) -> None:
        """A DONE frame."""


class MessageLease(Memory):
    """A received message in the registered memory it arrived in: a buffer (``memoryview(lease)``, numpy).

    :meth:`release`, or the end of a ``with`` block, gives the memory back; the credit goes to the sender then.
    While a view of it is alive after that, the memory is not used again.
    """

    __slots__ = ("_give_back", "_loop", "_released")

    def __init__(self, address: int, nbytes: int, owner: object, give_back: Callable[[], None]) -> None:
        super().__init__(address, nbytes, owner)
        self._loop = asyncio.get_running_loop()
        self._give_back = give_back
        self._released = False

    @classmethod
    def of_copy(cls, data: bytes) -> Self:
        """For a message that has left registered memory because its connection has ended."""
        copy = bytearray(data)
        view = ffi.from_buffer(copy, require_writable=True)
        return cls(int(ffi.cast("uintptr_t", view)), len(copy), view, lambda: None)

    @property
    def released(self) -> bool:
        """True after :meth:`release`."""
        return self._released

    def release(self) -> None:
        """Gives the memory back. Idempotent. Called in the connection's event loop."""
        if self._released:
            return
        self._released = True
        self._close_memory()
        if not self.exports:
            self._give_back()

    def _last_view_gone(self) -> None:
        """Called by the buffer type, in whatever thread, when no view of a released lease is left."""
        try:
            self._loop.call_soon_threadsafe(self._give_back)
        except RuntimeError:
            pass  # the loop is closed, and the connection with it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<MessageLease {self.nbytes} bytes{' released' if self._released else ''}>"


class ReceiveSlot:
    """One receive buffer of a connection's own ring in the pending table."""

    __slots__ = ("index", "queue", "ring", "wr_id")

    def __init__(self, queue: ReceiveQueue, ring: OwnRing, index: int) -> None:
        self.queue = queue
        self.ring = ring
        self.index = index
        self.wr_id = 0

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """Something arrived in this buffer, or it was flushed."""
        self.ring.arrived()
        self.queue.completed(self.index, status, opcode, byte_len, imm, vendor_err)


class OwnRing(ReceiveRing):
    """The ring of a connection that shares its receives with no other."""

    __slots__ = ("_reactor", "_slots")

    def __init__(
        self, queue: ReceiveQueue, reactor: CqReactor, qp: QueuePair, lease: Lease, count: int, size: int
    ) -> None:
        super().__init__(lease, count, size, wr_id=self._enter, post=qp.post_recv, post_one=qp.post_recv_one)
        self._reactor = reactor
        self._slots = [ReceiveSlot(queue, self, index) for index in range(count)]

    def _enter(self, index: int) -> int:
        slot = self._slots[index]
        slot.wr_id = self._reactor.add(slot)
        return slot.wr_id

    def unused(self, index: int) -> None:
        """The contents of a buffer will not be taken: nothing to do, for the ring ends with its connection."""

    def lend(self, index: int) -> Callable[[], None]:
        """A buffer is looked at for longer, after :meth:`close` too; call the result when that is over."""
        return self.hold().release

    def close(self) -> None:
        """The queue pair is gone: nothing can touch the ring any more."""
        for slot in self._slots:
            self._reactor.remove(slot.wr_id, slot)
        super().close()


class ReceiveQueue:
    """The ring, or the part of a shared one, the inbox of messages and the inbox of notifications.

    A message in the inbox is (buffer index, payload length), bytes once the ring is gone, or the offer of a large
    one, which only large_messages.py can read.
    """

    def __init__(
        self,
        *,
        ring: Callable[[ReceiveQueue], OwnRing | SharedRing],
        sends: SendQueue,
        spin: Callable[[SpinningFuture], None] | None,
        governor: SpinGovernor | None,
        failed: Callable[[int, int, str], None],
        broken: Callable[[DeviceError | ProtocolError], None],
        recall: Callable[[int], None],
    ) -> None:
        self._sends = sends
        self._failed = failed
        self._broken = broken
        self._recall = recall
        self.ring = ring(self)
        self.shared = self.ring if isinstance(self.ring, SharedRing) else None
        loop = asyncio.get_running_loop()
        self.messages: Inbox[tuple[int, int] | bytes | Taking] = Inbox(loop, spin, governor)
        self.notifications: Inbox[int] = Inbox(loop, spin, governor)
        self.ledger: CreditLedger | None = None
        self.large: LargeArrivals | None = None  # set with the ledger
        self.closed = False
        self.on_idle: Callable[[], None] | None = None
        self.received = 0
        self._last_taken = False  # a shared queue: the device has told that the queue pair takes no more

    def post_all(self) -> None:
        """Posts every buffer of an own ring; the queue pair is in INIT. Raises :class:`DeviceError`."""
        if isinstance(self.ring, OwnRing):
            self.ring.post(range(self.ring.count))

    # --- arrivals ------------------------------------------------------------------------------------

    def completed(
        self, index: int, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int
    ) -> None:
        """A posted buffer came back."""
        if status:
            self.ring.unused(index)
            self._failed(status, vendor_err, "recv")
        elif self.closed:
            self.ring.unused(index)
        else:
            try:
                self._arrived(index, opcode, byte_len, imm)
            except (ProtocolError, DeviceError) as error:
                self.ring.unused(index)
                self._broken(error)
        if self.on_idle is not None and self.drained:
            self.on_idle()

    @property
    def drained(self) -> bool:
        """True when nothing more can arrive; the queue pair is in ERR."""
        return self._last_taken if self.shared is not None else self.ring.posted == 0

    def last_taken(self) -> None:
        """The device says that the queue pair has taken its last receive of a shared queue."""
        self._last_taken = True
        if self.shared is not None:
            self.shared.tells_last()
        if self.on_idle is not None:
            self.on_idle()

    def _arrived(self, index: int, opcode: int, byte_len: int, imm: int) -> None:
        ledger = self.ledger
        if ledger is None:
            raise ProtocolError("the peer sent before the connection was established")
        if opcode == _RECV_WITH_IMM:
            ledger.receive_data()
            self.ring.post_one(index)
            self.notifications.put(imm)
            return
        if byte_len < HEADER_SIZE:
            raise ProtocolError(f"frame of {byte_len} bytes, shorter than its header")
        kind, flags, reserved, length, data, control = HEADER.unpack_from(
            self.ring.buffer(index, HEADER_SIZE)
        )
        check_header(kind, flags, reserved, length, byte_len)
        if kind == FrameKind.MESSAGE:
            ledger.receive_data()
            self.received += 1
            more = ledger.learn(data, control)
            self.messages.put((index, length))
        else:
            more = self._control_arrived(ledger, kind, index, length, (data, control))
        if more:
            self._sends.pump()
        self._sends.send_control()

    def _control_arrived(
        self, ledger: CreditLedger, kind: int, index: int, length: int, limits: tuple[int, int]
    ) -> bool:
        """A frame whose buffer is free at once; True when the limit for our data rose."""
        payload = bytes(self.ring.buffer(index, HEADER_SIZE + length)[HEADER_SIZE:])
        self.ring.post_one(index)
        more = ledger.learn(*limits)
        assert self.large is not None
        if kind == FrameKind.CREDIT:
            ledger.receive_control()
        elif kind == FrameKind.RETURN:
            self._returned(ledger, *RETURN.unpack(payload))
        elif kind == FrameKind.OFFER:
            ledger.receive_data()
            self.received += 1
            self.large.offered(payload)
        else:
            self.large.answered(payload)
        return more

    # --- the share of a shared queue (shared_receives.SharedUser) ------------------------------------

    def _returned(self, ledger: CreditLedger, count: int) -> None:
        ledger.receive_return(count)
        assert self.shared is not None  # nothing was recalled otherwise, and the ledger has raised
        self.shared.returned(count)

    def credits_changed(self) -> None:
        """The peer may be told of more credits."""
        self._sends.send_control()

    def recall(self, count: int) -> None:
        """Asks the peer for credits that it does not use."""
        self._recall(count)

    # --- taking --------------------------------------------------------------------------------------

    def peek(self, place: int) -> int:
        """The length in bytes of a message."""
        item = self.messages.items[place]
        if isinstance(item, tuple):
            return item[1]
        return item.offer.nbytes if isinstance(item, Taking) else len(item)

    @property
    def unread(self) -> bool:
        """True when a message waits that is not empty."""
        return any(item[1] if isinstance(item, tuple) else item for item in self.messages.items)

    def take(self, place: int) -> bytes | Taking:
        """A message, as bytes; its buffer is posted again. The offer of a large one is the caller's now."""
        item = self.messages.take(place)
        if not isinstance(item, tuple):
            return item
        index, length = item
        data = bytes(self.ring.buffer(index, HEADER_SIZE + length)[HEADER_SIZE:])
        self._recycle(index)
        return data

    def take_into(self, place: int, view: memoryview) -> int | Taking:
        """A message, copied to the start of ``view``, which is large enough; returns its length. Offers as in
        :meth:`take`."""
        item = self.messages.take(place)
        if isinstance(item, Taking):
            return item
        if isinstance(item, bytes):
            view[: len(item)] = item
            return len(item)
        index, length = item
        view[:length] = self.ring.buffer(index, HEADER_SIZE + length)[HEADER_SIZE:]
        self._recycle(index)
        return length

    def take_lease(self, place: int) -> MessageLease | bytes | Taking:
        """A message where it lies, its buffer lent until the lease is released; bytes when the ring is gone.
        Offers as in :meth:`take`."""
        item = self.messages.take(place)
        if not isinstance(item, tuple):
            return item
        index, length = item
        take_back = self.ring.lend(index)  # the memory outlives the connection, if the lease does

        def give_back() -> None:
            take_back()
            self._recycle(index)

        return MessageLease(self.ring.address(index) + HEADER_SIZE, length, take_back, give_back)

    def put_back(self, item: bytes | Taking) -> None:
        """What was taken is next again."""
        if not self.closed or isinstance(item, bytes):
            self.messages.put_back(item)

    def take_notification(self, place: int) -> int:
        """A notification."""
        imm = self.notifications.take(place)
        self.owe()
        return imm

    def _recycle(self, index: int) -> None:
        if self.closed:
            self.ring.unused(index)
            return
        try:
            self.ring.post_one(index)
        except DeviceError as error:
            self._broken(error)
            return
        self.owe()

    def owe(self) -> None:
        """The user has taken something whose receive was posted again: its credit is owed."""
        ledger = self.ledger
        if ledger is not None and not self.closed:
            ledger.release()
            if self.shared is not None and ledger.data_released >= self.shared.share.mark:
                self.shared.used()
            self._sends.send_control()

    # --- the end -------------------------------------------------------------------------------------

    def stop(self, *, keep: bool) -> None:
        """Nothing more is taken in. With ``keep``, what has arrived is copied out of the ring and stays, up to the
        first large message: that can be read no more, and there must be no gap."""
        if self.closed:
            return
        self.closed = True
        items = list(self.messages.items)
        self.messages.items.clear()
        if not keep:
            self.notifications.items.clear()
        for item in items:
            keep = keep and not isinstance(item, Taking)
            data = self._leave(item)
            if keep:
                self.messages.items.append(data)

    def _leave(self, item: tuple[int, int] | bytes | Taking) -> bytes:
        """The message, copied; its buffer is free."""
        if not isinstance(item, tuple):
            return item if isinstance(item, bytes) else b""
        index, length = item
        data = bytes(self.ring.buffer(index, HEADER_SIZE + length)[HEADER_SIZE:])
        self.ring.unused(index)
        return data

    def fail_all(self, make_error: Callable[[str], BaseException]) -> None:
        """Ends every wait for which nothing is there."""
        self.messages.fail(lambda: make_error("recv"))
        self.notifications.fail(lambda: make_error("notified"))

    def close(self) -> None:
        """The queue pair is gone: nothing can touch the buffers any more."""
        self.stop(keep=False)
        self.ring.close()
