"""The receive side of a connection: posted buffers, the inbox, and who waits for it.

A message stays in the buffer it arrived in until the user takes it; then it is copied out (or lent: MessageLease),
the buffer is posted again, and a credit is owed to the peer. So a slow user slows the sender, and memory is
bounded by the ring. A notification, and the offer of a large message, free their buffer at once, but their credit
is owed only when the user has taken them, for the same reason.

A message that arrives while somebody waits is the first receiver's at once, as the result of its future; one that
is cancelled before it has run puts it back, at the head. Receivers are served in the order they came.

Messages in good order take the way of native/datapath/receive.c: from the completion into the inbox, and out of it
to the user. Here is the rest: other frames, errors, and the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, Self

from ._native import ffi
from ._native._datapath import Buffer, Governor, Inbox, Ring
from ._native._memory import Memory
from .cq_reactor import CqReactor
from .errors import DeviceError, ProtocolError
from .mr_pool import Lease
from .protocol.credit import CreditLedger
from .protocol.frames import HEADER, HEADER_SIZE, RETURN, FrameKind, check_header
from .protocol.rendezvous import Taking
from .send_queue import SendQueue
from .shared_receives import SharedRing, SharedUser
from .verbs import QueuePair, WcOpcode

_RECV_WITH_IMM = int(WcOpcode.RECV_RDMA_WITH_IMM)


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


class OwnRing(Ring):
    """The receives of a connection that shares them with no other."""

    def __init__(self, reactor: CqReactor, qp: QueuePair, lease: Lease, count: int, size: int) -> None:
        super().__init__(reactor, size, qp=qp.pointer)
        qp.newest_first()
        self._qp_num = qp.qp_num
        self._lease = lease
        for at in range(0, count * size, size):
            self.add(lease, lease.address + at, lease.lkey)

    def open(self, receiver: ReceiveQueue) -> None:
        """Posts every buffer; what arrives is the receiver's. Raises :class:`DeviceError`."""
        self.enter(self._qp_num, receiver)
        for buffer in self.buffers:
            self.post(buffer)

    def unused(self, buffer: Buffer) -> None:
        """The contents of a buffer will not be taken: nothing to do, for the ring ends with its connection."""

    def lend(self, buffer: Buffer) -> Callable[[], None]:
        """A buffer is looked at for longer, after :meth:`close` too; call the result when that is over."""
        hold: Any = memoryview(self._lease)
        return lambda: hold.release()

    def leave(self, handed: int) -> None:
        """The queue pair is gone: nothing can touch the ring any more."""
        self.close()
        self._lease.release_nowait()


class ReceiveQueue(SharedUser):
    """The ring, or the part of a shared one, the inbox of messages and the inbox of notifications.

    A message in the inbox is the buffer it lies in, bytes once the ring is gone, or the offer of a large one,
    which only large_messages.py can read.
    """

    __slots__ = (
        "__weakref__",
        "_broken",
        "_failed",
        "_last_taken",
        "_recall",
        "_sends",
        "large",
        "notifications",
        "on_idle",
        "ring",
        "shared",
    )

    messages: Inbox[Buffer | bytes | Taking]
    ledger: CreditLedger | None

    def __init__(
        self,
        *,
        reactor: CqReactor,
        ring: OwnRing | SharedRing,
        sends: SendQueue,
        cq: int,
        governor: Governor | None,
        failed: Callable[[int, int, str], None],
        broken: Callable[[DeviceError | ProtocolError], None],
        recall: Callable[[int], None],
    ) -> None:
        super().__init__(sends, Inbox(reactor, cq, governor, self.put_back))
        self._sends = sends
        self._failed = failed
        self._broken = broken
        self._recall = recall
        self.ring = ring
        self.shared = ring if isinstance(ring, SharedRing) else None
        self.notifications: Inbox[int] = Inbox(reactor, cq, governor)
        self.large: LargeArrivals | None = None  # set with the ledger
        self.on_idle: Callable[[], None] | None = None
        self._last_taken = False  # a shared queue: the device has told that the queue pair takes no more

    def post_all(self) -> None:
        """Takes its place at the ring, whose buffers are posted; the queue pair is in INIT. Raises
        :class:`DeviceError`."""
        self.ring.open(self)

    # --- arrivals ------------------------------------------------------------------------------------

    def completed(
        self, buffer: Buffer, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int
    ) -> None:
        """A posted buffer came back, and not with a message in good order."""
        if status:
            self.ring.unused(buffer)
            self._failed(status, vendor_err, "recv")
        elif self.closed:
            self.ring.unused(buffer)
        else:
            try:
                self._arrived(buffer, opcode, byte_len, imm)
            except (ProtocolError, DeviceError) as error:
                self.ring.unused(buffer)
                self._broken(error)
        if self.on_idle is not None and self.drained:
            self.on_idle()

    def refused(self, error: DeviceError | ProtocolError) -> None:
        """A frame of the peer breaks the protocol, or a receive could not be posted."""
        self._broken(error)

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

    def _arrived(self, buffer: Buffer, opcode: int, byte_len: int, imm: int) -> None:
        ledger = self.ledger
        if ledger is None:
            raise ProtocolError("the peer sent before the connection was established")
        if opcode == _RECV_WITH_IMM:
            ledger.receive_data()
            self.ring.post(buffer)
            self.notifications.put(imm)
            return
        if byte_len < HEADER_SIZE:
            raise ProtocolError(f"frame of {byte_len} bytes, shorter than its header")
        frame = buffer.frame(byte_len)
        kind, flags, reserved, length, *limits = HEADER.unpack_from(frame)
        check_header(kind, flags, reserved, length, byte_len)
        self.ring.post(buffer)
        more = ledger.learn(*limits)
        self._take_in(ledger, kind, frame[HEADER_SIZE:])
        if more:
            self._sends.pump()
        self._sends.send_control()

    def _take_in(self, ledger: CreditLedger, kind: int, payload: bytes) -> None:
        """A frame whose buffer is free at once."""
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

    def used(self) -> None:
        """As many messages were taken as the ledger's ``mark`` says."""
        if self.shared is not None:
            self.shared.used()

    # --- taking: take(), take_next() and take_into() are the base's ----------------------------------

    @staticmethod
    def length(item: Buffer | bytes | Taking) -> int:
        """The length in bytes of a message."""
        if isinstance(item, Buffer):
            return item.length
        return item.offer.nbytes if isinstance(item, Taking) else len(item)

    @property
    def unread(self) -> bool:
        """True when a message waits that is not empty."""
        return any(map(self.length, self.messages.items()))

    def lease(self, buffer: Buffer) -> MessageLease:
        """A message that was taken where it lies, its buffer lent until the lease is released."""
        if self.closed:
            return MessageLease.of_copy(self.take(buffer))
        self.lend(buffer)
        take_back = self.ring.lend(buffer)  # the memory outlives the connection, if the lease does

        def give_back() -> None:
            take_back()
            self.recycle(buffer)

        return MessageLease(buffer.address, buffer.length, take_back, give_back)

    def put_back(self, item: Buffer | bytes | Taking, /) -> None:
        """What was taken is next again, unless nothing can be read any more, or the peer has withdrawn it."""
        if not isinstance(item, Buffer | bytes | Taking):
            return  # no message: whoever it was for is gone
        if self.closed:
            if isinstance(item, Taking):
                return
            item = self._leave(item)
        elif isinstance(item, Taking) and item.withdrawn:
            return
        super().put_back(item)

    def take_notification(self, imm: int) -> int:
        """A notification."""
        self.owe()
        return imm

    def left(self, buffer: Buffer) -> None:
        """A buffer that was looked at when everything ended is free."""
        self.ring.unused(buffer)

    # --- the end -------------------------------------------------------------------------------------

    def stop(self, *, keep: bool) -> None:
        """Nothing more is taken in. With ``keep``, what has arrived is copied out of the ring and stays, up to the
        first large message: that can be read no more, and there must be no gap."""
        if self.closed:
            return
        self.closed = True
        if not keep:
            self.notifications.drain()
        for item in self.messages.drain():
            keep = keep and not isinstance(item, Taking)
            data = self._leave(item)
            if keep:
                self.messages.put(data)

    def _leave(self, item: Buffer | bytes | Taking) -> bytes:
        """The message, copied; its buffer is free."""
        if not isinstance(item, Buffer):
            return item if isinstance(item, bytes) else b""
        data = item.message()
        self.lend(item)
        self.ring.unused(item)
        return data

    def fail_all(self, make_error: Callable[[str], BaseException]) -> None:
        """Ends every wait for which nothing is there."""
        self.messages.fail(lambda: make_error("recv"))
        self.notifications.fail(lambda: make_error("notified"))

    def close(self) -> None:
        """The queue pair is gone: nothing can touch the buffers any more."""
        self.stop(keep=False)
        self.ring.leave(self.handed)
