"""The send side of a connection: operations, and the two windows they pass through.

An operation is a future. It waits for up to two things, each in a fair queue of its own: a credit (messages
and notifications only: the peer has a receive posted), then a slot of our own send queue. The two are never
confused, because completions of different queues are not ordered: the peer's credit for a message can arrive
before our own completion for it. Writes and reads need no credit, so they may pass messages that wait for one;
nothing passes a write that was issued before it, unless that is of a long batch (transport.Batch).

A message that is copied and that nothing holds up takes a way of its own (native/datapath/send.c): no slot, no
completion of its own. It is the device's as soon as it was copied, and so are messages on the way described here
once they are posted: then send() is done. That everything sent before has arrived is told by a marker
(:meth:`SendQueue.confirm`). Small one-sided operations take the short way too (native/datapath/one_sided.c), and
end when the device has done them.

Small data is copied once, to a staging buffer that the slot holds until the completion, or to the scratch when it
travels inline (staging.py); so it needs no registration of its own, and the caller's buffer is free as soon as the
request is posted. Without a staging buffer, the queue waits for its turn; nothing passes what waits. Large data is
pinned and moved in place, in pieces where the port limits the size of a message.

Slots for control frames (credits, and answers to offers of large messages) are reserved, and such a frame never
needs a staging buffer: two peers that are both blocked in send still tell each other about credits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from ._native._datapath import MESSAGES, ONE_SIDED, Governor, OneSided, Sender
from .cq_reactor import CqReactor, now_ns
from .errors import DeviceError, call_failed
from .mr_pool import Lease
from .protocol.credit import CreditLedger
from .protocol.frames import HEADER, HEADER_SIZE, RETURN, FrameKind
from .protocol.rendezvous import DONE_SIZE
from .registrations import Pinned, PinnedPart
from .staging import SCRATCH_PLACES, Place, Scratch, StagingBuffer, StagingPool
from .verbs import SEND_WR_STRUCT, CompletionQueue, QueuePair, SendFlags, WrOpcode

_SIGNALED = int(SendFlags.SIGNALED)
_INLINE = int(SendFlags.SIGNALED | SendFlags.INLINE)
# Plain integers: enumeration members cost a conversion in each call.
WRITE = int(WrOpcode.RDMA_WRITE)
WRITE_IMM = int(WrOpcode.RDMA_WRITE_WITH_IMM)
SEND = int(WrOpcode.SEND)
READ = int(WrOpcode.RDMA_READ)
FETCH_ADD = int(WrOpcode.ATOMIC_FETCH_AND_ADD)
COMPARE_SWAP = int(WrOpcode.ATOMIC_CMP_AND_SWP)
_ATOMICS = (FETCH_ADD, COMPARE_SWAP)
_OUTBOUND = (SEND, WRITE, WRITE_IMM)
_MESSAGE = int(FrameKind.MESSAGE)
_OFFER = int(FrameKind.OFFER)
#: Messages and small one-sided operations that may be under way without a slot.
WITHOUT_SLOT = MESSAGES + ONE_SIDED
#: The most bytes of a control frame.
CONTROL_FRAME = HEADER_SIZE + DONE_SIZE

#: A work request as SEND_WR_STRUCT packs it.
PackedFields = tuple[int, int, int, int, int, int, int, int, int, int, int]


class SpinningFuture(asyncio.Future[Any]):
    """A future that, when awaited, first lets the reactor poll for it (see cq_reactor)."""

    __slots__ = ("_spin",)

    def __init__(
        self, loop: asyncio.AbstractEventLoop, spin: Callable[[SpinningFuture], None] | None
    ) -> None:
        super().__init__(loop=loop)
        self._spin = spin

    def __await__(self) -> Generator[Any, None, Any]:
        if self._spin is not None and not self.done():
            self._spin(self)
        return super().__await__()

    __iter__ = __await__

    def fail(self, error: BaseException) -> None:
        """Ends the wait with ``error``, if it has not ended; memory of the operation is not touched."""
        if not self.done():
            self.set_exception(error)


class Operation(SpinningFuture):
    """One operation of a connection, awaitable once or often.

    Cancelling abandons the wait. What was not posted by then is not sent; what was posted may still happen, and
    its memory stays with the device until it has.
    """

    # Defaults on the class: most operations change few of them, and making one is on the hot path.
    offset = 0  # bytes posted so far
    in_flight = 0  # work requests the device has
    counted = False  # the reactor knows of it
    started_ns = 0  # when it was posted; only where the governor learns from it
    data: Any = None  # what staging copies from: a buffer, or a tuple of them
    pinned: Pinned | PinnedPart | None = None  # large data: in place
    landing: bytes | None = None  # the result of a large read(), which lands in it
    into = False  # a read whose result is the byte count: the data is where the caller wants it
    credit = False
    frame = _MESSAGE
    remote_address = 0
    rkey = 0
    imm = 0
    compare_add = 0
    swap = 0
    post: Callable[[int], None] | None = None  # bind and invalidate have work requests of their own

    def __init__(self, queue: SendQueue, kind: str, opcode: int, nbytes: int = 0) -> None:
        super().__init__(queue.loop, queue.spin)
        self.queue = queue
        self.kind = kind
        self.opcode = opcode
        self.nbytes = nbytes

    def cancel(self, msg: Any | None = None) -> bool:
        """Abandons the wait; see the class."""
        if not super().cancel(msg):
            return False
        self.queue.abandoned(self)
        return True

    def release(self) -> None:
        """The device is done with the memory, or never got it."""
        self.data = self.landing = None
        if self.pinned is not None:
            self.pinned.release()
            self.pinned = None

    def staged(self) -> None:
        """An offer goes to the device now."""


class Step(Operation):
    """A part of something larger, which is told at once when it ends and is never awaited itself."""

    def __init__(
        self,
        queue: SendQueue,
        kind: str,
        opcode: int,
        nbytes: int,
        ended: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(queue, kind, opcode, nbytes)
        self.ended = ended

    def set_result(self, result: Any) -> None:
        """The device has done it."""
        super().set_result(result)
        self.ended(None)

    def set_exception(self, exception: type | BaseException) -> None:
        """It failed, or the connection ended."""
        super().set_exception(exception)
        self.ended(self.exception())


class SendSlot:
    """One slot of the send queue; ``buffer`` is the staging buffer it holds, if any."""

    __slots__ = ("buffer", "operation", "queue", "wr_id")

    def __init__(self, queue: SendQueue) -> None:
        self.queue = queue
        self.buffer: StagingBuffer | None = None
        self.operation: Operation | None = None
        self.wr_id = 0

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """The device is done with the work request posted from here."""
        operation = self.operation
        self.operation = None
        queue = self.queue
        if operation is not None:
            queue.completed(self, operation, status, vendor_err)


class OfferRoom(Protocol):
    """A shared receive queue, which keeps a receive for the answer to each offer."""

    def more_offers(self) -> bool:
        """Keeps one more, if it can."""

    def fewer_offers(self) -> None:
        """Keeps one less."""


class ControlSlot(SendSlot):
    """A slot reserved for control frames, and where such a frame is put together."""

    __slots__ = ("flags", "place")

    def __init__(self, queue: SendQueue, place: Place, flags: int) -> None:
        super().__init__(queue)
        self.place = place
        self.flags = flags

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """The frame left, or failed."""
        self.queue.control_completed(self, status, vendor_err)


class Marker:
    """A write of nothing, behind what is to be confirmed: its completion is that of everything before."""

    __slots__ = ("_ended", "wr_id")

    def __init__(self, ended: Callable[[int, int], None]) -> None:
        self._ended = ended
        self.wr_id = 0

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """The device is done with it."""
        self._ended(status, vendor_err)


class SendQueue(Sender):
    """The windows, the slots and the posting. ``failed(status, vendor_err, kind, operation)`` is told of error
    completions, ``broken(error)`` of requests the device refused."""

    __slots__ = (
        "__weakref__",
        "_answers",
        "_broken",
        "_confirmed",
        "_confirming",
        "_control_free",
        "_control_lease",
        "_control_slots",
        "_control_view",
        "_cq",
        "_credit_queue",
        "_depth",
        "_failed",
        "_free",
        "_governor",
        "_inline",
        "_marker",
        "_places",
        "_qp",
        "_reactor",
        "_slot_queue",
        "_slots",
        "_spins",
        "_staged",
        "_staging",
        "_to_confirm",
        "closed",
        "credit_frames",
        "max_message",
        "offers_free",
        "offers_more",
        "on_idle",
        "refused",
        "room",
        "spin",
        "stage_size",
    )

    ledger: CreditLedger | None

    def __init__(
        self,
        *,
        connection: object,
        reactor: CqReactor,
        cq: CompletionQueue,
        qp: QueuePair,
        staging: StagingPool,
        scratch: Scratch,
        control_lease: Lease | None,
        depth: int,
        control: int,
        offers: int,
        max_message: int,
        governor: Governor | None,
        spins: bool,
        atomics: bool,
        failed: Callable[[int, int, str, Operation | OneSided | None], None],
        broken: Callable[[DeviceError], None],
    ) -> None:
        self._credit_queue: deque[Operation] = deque()
        self._slot_queue: deque[Operation] = deque()
        super().__init__(
            table=reactor,
            qp=qp.pointer,
            cq=cq.pointer,
            max_inline=qp.max_inline,
            credit_queue=self._credit_queue,
            slot_queue=self._slot_queue,
            staging=staging,
            connection=connection,
            loop=asyncio.get_running_loop(),
            governor=governor,
            spins=spins,
            atomics=atomics,
        )
        self.spin: Callable[[SpinningFuture], None] = self._spin
        self._spins = spins
        self._reactor = reactor
        self._cq = cq
        self._qp = qp
        self._staging = staging
        self._places = scratch.places
        self._inline = qp.max_inline
        self._governor = governor
        self._failed = failed
        self._broken = broken
        self.stage_size = staging.size
        self.max_message = max_message
        self._depth = depth
        self._slots = [SendSlot(self)]
        self._free = self._slots[:]  # never empty while there are slots to be made: see _take_slot()
        self._control_lease = control_lease
        self._control_slots = self._make_control_slots(control + offers)
        self._control_free = self._control_slots[:]
        self.offers_free = 0  # how many more large messages may be offered to the peer now
        self.offers_more = 0  # ... if a shared receive queue has room for their answers
        self.room: OfferRoom | None = None  # that queue
        self._answers: deque[bytes] = deque()  # to the peer's offers
        self.closed = False
        self.refused: DeviceError | None = None  # a request the device did not take
        self.on_idle: Callable[[], None] | None = None
        self.credit_frames = 0
        self._marker: Marker | None = None
        self._to_confirm: list[asyncio.Future[None]] = []  # by the next marker, when this one is back
        self._confirming: list[asyncio.Future[None]] = []  # by this one
        self._confirmed = 0  # of the messages handed over
        self._staged: list[Operation] = []  # messages that are done when they are posted

    def _make_control_slots(self, count: int) -> list[ControlSlot]:
        """Control frames travel inline; only a device that takes none needs registered memory for them."""
        lease = self._control_lease
        if lease is None:
            return [ControlSlot(self, self._places[0], _INLINE) for _ in range(count)]
        self._control_view = memoryview(lease)
        return [
            ControlSlot(self, Place(lease.address + at, lease.lkey, self._control_view[at:]), _SIGNALED)
            for at in range(0, count * CONTROL_FRAME, CONTROL_FRAME)
        ]

    @property
    def waiting(self) -> tuple[int, int]:
        """How many operations wait for a credit, and for a slot."""
        return len(self._credit_queue), len(self._slot_queue)

    @property
    def in_flight(self) -> int:
        """Data slots in use."""
        return len(self._slots) - len(self._free)

    def _spin(self, future: SpinningFuture) -> None:
        self._reactor.spin(future, self._cq.pointer, self._governor, not self._spins)

    # --- in ------------------------------------------------------------------------------------------

    def submit(self, operation: Operation) -> Operation:
        """Posts the operation now if both windows are open and nobody waits before it; else it waits in turn.

        When the device has refused a request before, it fails at once.
        """
        if self.refused is not None:
            operation.release()
            operation.fail(self.refused)
            return operation
        if self._free and not self._slot_queue and not self.closed and self._takes_short_way(operation):
            self._post((self._stage(operation, self._take_slot(), self._places[0]),))
            return operation
        self._enqueue(operation)
        self.pump()
        return operation

    def _enqueue(self, operation: Operation) -> None:
        self.may_wait = True
        (self._credit_queue if operation.credit else self._slot_queue).append(operation)

    def _takes_short_way(self, operation: Operation) -> bool:
        """One work request, which nothing holds up: pump() would do the same, with more steps."""
        if operation.post is not None or operation.nbytes > self.max_message:
            return False
        if operation.credit:
            if self._credit_queue or not self._may_go(operation):
                return False
            if not self._make_room(operation):
                return False
            self._reserve(operation)
            return True
        return self._make_room(operation)

    def _may_go(self, operation: Operation) -> bool:
        """True when the peer has room for the message."""
        ledger = self.ledger
        if ledger is None or ledger.data_credits <= self.reserved:
            return False
        return operation.frame != _OFFER or self.offers_free > 0 or self._more_offers()

    def _more_offers(self) -> bool:
        if not self.offers_more or self.room is None or not self.room.more_offers():
            return False
        self.offers_more -= 1
        self.offers_free += 1
        return True

    def offer_ended(self) -> None:
        """The peer has answered an offer: another may be made, or the room for it is given back."""
        self.offers_free += 1
        self.pump()
        while self.offers_free > 1 and self.room is not None:
            self.offers_free -= 1
            self.offers_more += 1
            self.room.fewer_offers()

    def _reserve(self, operation: Operation) -> None:
        self.reserved += 1
        if operation.frame == _OFFER:
            self.offers_free -= 1

    def submit_many(self, operations: list[Operation]) -> None:
        """The same for several, with one doorbell for as many as fit."""
        for operation in operations:
            if operation.done():  # cancelled in the meantime: its memory is gone
                continue
            self._enqueue(operation)
            self._promote()
        self.pump()

    def abandoned(self, operation: Operation) -> None:
        """The operation was cancelled: forget what was not posted."""
        for waiting in (self._credit_queue, self._slot_queue):
            try:
                waiting.remove(operation)
            except ValueError:
                continue
            if waiting is self._slot_queue and operation.credit:
                self.reserved -= 1
                self.offers_free += operation.frame == _OFFER
        if not operation.in_flight:
            self._end(operation)
        self.pump()

    def _promote(self) -> None:
        """Moves operations that can have a credit on to the queue for slots."""
        waiting = self._credit_queue
        while waiting and self._may_go(waiting[0]):
            self._reserve(waiting[0])
            self._slot_queue.append(waiting.popleft())

    def staging_ready(self) -> None:
        """A staging buffer has come back, and it is our turn."""
        self.pump()

    def pump(self) -> None:
        """Posts what the windows allow, in order, with one call for all of it."""
        self._promote()
        if self.wanted_back:
            self._give_back()
        if not self._slot_queue or not self._free or self.closed or self.refused is not None:
            return
        batch: list[PackedFields] = []
        while self._slot_queue and self._free:
            operation = self._slot_queue[0]
            if operation.post is not None or len(batch) == SCRATCH_PLACES:
                self._post(batch)
                batch = []
                if self.refused is not None or not self._free:
                    return
                if operation.post is not None:
                    self._slot_queue.popleft()
                    self._post_special(operation)
                continue
            if not self._make_room(operation):
                break
            batch.append(self._stage(operation, self._take_slot(), self._places[len(batch)]))
            if operation.offset >= operation.nbytes:
                self._slot_queue.popleft()
        self._post(batch)

    # --- slots and staging buffers -------------------------------------------------------------------

    def _take_slot(self) -> SendSlot:
        """The next free slot; another is made behind it when none is left and the depth allows it."""
        slot = self._free.pop()
        if not self._free and len(self._slots) < self._depth:
            more = SendSlot(self)
            self._slots.append(more)
            self._free.append(more)
        return slot

    def _make_room(self, operation: Operation) -> bool:
        """Gives the next free slot a staging buffer if the operation needs one. False: it must wait for one."""
        opcode = operation.opcode
        if operation.pinned is not None:
            return True
        nbytes = operation.nbytes + HEADER_SIZE if opcode == SEND else operation.nbytes
        if not nbytes or (nbytes <= self._inline and opcode in _OUTBOUND):
            return True
        buffer = self._staging.take(self)
        self._free[-1].buffer = buffer
        return buffer is not None

    def _free_slot(self, slot: SendSlot) -> None:
        self._free.append(slot)
        buffer = slot.buffer
        if buffer is not None:
            slot.buffer = None
            self._staging.give(buffer)

    # --- building work requests ----------------------------------------------------------------------

    def _stage(self, operation: Operation, slot: SendSlot, inline: Place) -> PackedFields:
        """The next work request of an operation, its data in place: that of the caller, the slot's staging buffer,
        or ``inline`` when it needs none."""
        offset = operation.offset
        nbytes = min(operation.nbytes - offset, self.max_message)
        last = offset + nbytes >= operation.nbytes
        operation.offset = offset + nbytes
        opcode = operation.opcode
        flags = _SIGNALED
        if operation.pinned is not None:
            address, lkey = operation.pinned.address + offset, operation.pinned.lkey
        else:
            place: Place = slot.buffer or inline
            if place is inline and (nbytes or opcode == SEND):
                flags = _INLINE
            address, lkey = place.address, place.lkey
            if opcode == SEND:
                nbytes = self._stage_message(operation, place.view)
            elif nbytes and operation.data is not None:
                place.view[:nbytes] = operation.data
            operation.data = None
        if opcode == WRITE_IMM:
            if last:
                self._use_credit()
            else:
                opcode = WRITE
        return (
            self._enter(slot, operation),
            address if nbytes else 0,
            operation.remote_address + offset,
            operation.compare_add,
            operation.swap,
            nbytes,
            lkey,
            operation.rkey,
            operation.imm,
            opcode,
            flags,
        )

    def _stage_message(self, operation: Operation, view: memoryview) -> int:
        ledger = self._use_credit()
        data = operation.data
        nbytes = operation.nbytes
        if operation.frame == _OFFER:
            operation.staged()
        else:
            self._staged.append(operation)
        HEADER.pack_into(view, 0, operation.frame, 0, 0, nbytes, *ledger.stamp())
        if data.__class__ is tuple:
            at = HEADER_SIZE
            for part in data:
                view[at : at + part.nbytes] = part
                at += part.nbytes
        elif nbytes:
            view[HEADER_SIZE : HEADER_SIZE + nbytes] = data
        return HEADER_SIZE + nbytes

    def _use_credit(self) -> CreditLedger:
        assert self.ledger is not None
        self.reserved -= 1
        self.ledger.send_data()
        return self.ledger

    def _enter(self, slot: SendSlot, operation: Operation) -> int:
        slot.operation = operation
        slot.wr_id = self._reactor.add(slot)
        operation.in_flight += 1
        if not operation.counted:
            operation.counted = True
            if self._governor is not None:
                operation.started_ns = now_ns()
            self._reactor.posted()
        self.posted += 1
        return slot.wr_id

    # --- posting -------------------------------------------------------------------------------------

    def _post(self, batch: Sequence[PackedFields]) -> None:
        if not batch:
            return
        if self.queued:
            self.flush()
        qp = self._qp
        if len(batch) == 1 and batch[0][9] not in _ATOMICS:
            wr_id, address, remote, _, _, nbytes, lkey, rkey, imm, opcode, flags = batch[0]
            rc = qp.post_send(wr_id, opcode, flags, address, nbytes, lkey, remote, rkey, imm)
            done = 0 if rc else 1
        else:
            pack = SEND_WR_STRUCT.pack
            done, rc = qp.post_send_many(b"".join([pack(*fields) for fields in batch]), len(batch))
        self.sent += done
        if rc:
            self._refuse({fields[0] for fields in batch[done:]}, rc)
        if self._staged:
            self._hand_over()

    def _hand_over(self) -> None:
        """Messages that were staged are with the device now: whoever sent them is done."""
        staged, self._staged = self._staged, []
        self.handed += len(staged)
        for operation in staged:
            if not operation.done():
                operation.set_result(None)

    def _refuse(self, wr_ids: set[int], rc: int) -> None:
        """The device did not take these requests: they fail, and nothing may be posted behind the gap."""
        error = call_failed(rc, "ibv_post_send")
        self.refused = error
        self.open = False
        for slot in self._slots:
            operation = slot.operation
            if operation is not None and slot.wr_id in wr_ids:
                operation.fail(error)
                self._take_back(slot)
        self._broken(error)

    def message_refused(self, rc: int) -> DeviceError:
        """The device did not take messages or writes that went the short way; returns what to say of them."""
        self._refuse(set(), rc)
        return call_failed(rc, "ibv_post_send")

    def message_failed(self, status: int, vendor_err: int) -> None:
        """One of them failed."""
        self._failed(status, vendor_err, "send", None)

    def one_sided_failed(self, operation: OneSided, status: int, vendor_err: int) -> None:
        """One that went the short way failed."""
        self._failed(status, vendor_err, operation.kind, operation)

    def idle(self) -> None:
        """After the end: the device has nothing of ours any more."""
        if self.on_idle is not None:
            self.on_idle()

    def _post_special(self, operation: Operation) -> None:
        assert operation.post is not None
        if self.queued:
            self.flush()
        slot = self._take_slot()
        wr_id = self._enter(slot, operation)
        operation.offset = operation.nbytes
        try:
            operation.post(wr_id)
        except DeviceError as error:
            self._take_back(slot)
            operation.fail(error)
            return
        self.sent += 1

    def _take_back(self, slot: SendSlot) -> None:
        """The device refused the request of this slot: slot and memory are ours again."""
        operation, slot.operation = slot.operation, None
        self._reactor.remove(slot.wr_id, slot)
        self._free_slot(slot)
        if operation is not None:
            self._settle(operation)

    def _settle(self, operation: Operation) -> None:
        """One work request of the operation is with us again."""
        self.posted -= 1
        operation.in_flight -= 1
        if operation.in_flight == 0 and (operation.offset >= operation.nbytes or operation.done()):
            self._end(operation)
        if self.posted == 0 and self.on_idle is not None:
            self.on_idle()

    def _end(self, operation: Operation) -> None:
        """Nothing of the operation is with the device, and nothing more will be posted of it."""
        operation.release()
        if operation.counted:
            operation.counted = False
            self._reactor.finished()

    # --- completions ---------------------------------------------------------------------------------

    def completed(self, slot: SendSlot, operation: Operation, status: int, vendor_err: int) -> None:
        """A work request of ``operation`` completed."""
        if status:
            self._free_slot(slot)
            self._settle(operation)
            self._failed(status, vendor_err, operation.kind, operation)
            return
        if operation.in_flight == 1 and operation.offset >= operation.nbytes and not operation.done():
            operation.set_result(self._result(operation, slot))
            if self._governor is not None and operation.nbytes <= self.stage_size:
                self._governor.learn(now_ns() - operation.started_ns)
        self._free_slot(slot)
        self._settle(operation)
        if self._slot_queue or self._credit_queue:
            self.pump()

    def _result(self, operation: Operation, slot: SendSlot) -> Any:
        opcode, buffer = operation.opcode, slot.buffer
        if opcode == READ:
            if operation.into:
                return operation.nbytes
            if operation.landing is not None:
                return operation.landing
            return bytes(buffer.view[: operation.nbytes]) if buffer is not None else b""
        if opcode in _ATOMICS and buffer is not None:
            # The card has put the old value there in the order of this machine.
            return buffer.view[:8].cast("Q")[0]
        return None

    # --- control frames ------------------------------------------------------------------------------

    def answer(self, payload: bytes) -> None:
        """Sends DONE for an offer of the peer, which keeps a receive for it."""
        self._answers.append(payload)
        self.send_control()

    def send_control(self) -> None:
        """Sends answers, and credit frames as long as one is due, while a reserved slot is free."""
        ledger = self.ledger
        while ledger is not None and not self.closed and self._control_free:
            if self._answers:
                self._post_control(FrameKind.DONE, self._answers.popleft(), ledger)
            elif ledger.update_due():
                ledger.send_control()
                self.credit_frames += 1
                self._post_control(FrameKind.CREDIT, b"", ledger)
            else:
                break
        if self.wanted_back:
            self._give_back()

    def recalled(self, count: int) -> None:
        """The peer asks for up to ``count`` data credits that are not used; it gets an answer as soon as there is
        a credit for that."""
        self.wanted_back = count
        self._give_back()

    def _give_back(self) -> None:
        ledger = self.ledger
        if ledger is None or self.closed or not self._control_free or ledger.data_credits <= self.reserved:
            return
        count = ledger.give_back(self.wanted_back, self.reserved)
        self.wanted_back = 0
        self._post_control(FrameKind.RETURN, RETURN.pack(count), ledger)

    def _post_control(self, kind: FrameKind, payload: bytes, ledger: CreditLedger) -> None:
        if self.queued:
            self.flush()
        slot = self._control_free.pop()
        place = slot.place
        nbytes = HEADER_SIZE + len(payload)
        HEADER.pack_into(place.view, 0, kind, 0, 0, len(payload), *ledger.stamp())
        place.view[HEADER_SIZE:nbytes] = payload
        slot.wr_id = self._reactor.add(slot)
        self.posted += 1
        rc = self._qp.post_send(slot.wr_id, SEND, slot.flags, place.address, nbytes, place.lkey)
        if rc:
            self._reactor.remove(slot.wr_id, slot)
            self.posted -= 1
            self._control_free.append(slot)
            self._broken(call_failed(rc, "ibv_post_send"))

    def control_completed(self, slot: ControlSlot, status: int, vendor_err: int) -> None:
        """A control frame left (or failed)."""
        self.posted -= 1
        self._control_free.append(slot)
        if status:
            self._failed(status, vendor_err, "control frame", None)
        else:
            self.send_control()
        if self.posted == 0 and self.on_idle is not None:
            self.on_idle()

    # --- confirmation --------------------------------------------------------------------------------

    def confirm(self) -> asyncio.Future[None]:
        """Done when every message that was handed over before has arrived. Cancelled when that is not to be known
        any more, failed by :meth:`fail_all`."""
        future = self.loop.create_future()
        if self.handed == self._confirmed:
            future.set_result(None)
        else:
            self._to_confirm.append(future)
            self._post_marker()
        return future

    def _post_marker(self) -> None:
        if self._marker is not None or not self._to_confirm:
            return
        if self.queued:
            self.flush()
        handed = self.handed
        marker = Marker(lambda status, vendor_err: self._marker_ended(handed, status, vendor_err))
        marker.wr_id = self._reactor.add(marker)
        rc = self._qp.post_send(marker.wr_id, WRITE, _SIGNALED, 0, 0, 0)
        if rc:
            self._reactor.remove(marker.wr_id, marker)
            self._broken(call_failed(rc, "ibv_post_send"))
            if self.closed:
                self._not_to_be_known(self._to_confirm)
            return
        self._marker = marker
        self._confirming, self._to_confirm = self._to_confirm, []
        self.posted += 1

    def _marker_ended(self, handed: int, status: int, vendor_err: int) -> None:
        self._marker = None
        self.posted -= 1
        if status:
            self._failed(status, vendor_err, "flush", None)  # which fails those who wait, now or soon
            if self.closed:
                self._not_to_be_known(self._confirming)
        else:
            self._confirmed = handed
            futures, self._confirming = self._confirming, []
            for future in futures:
                if not future.done():
                    future.set_result(None)
            self._post_marker()
        if self.posted == 0 and self.on_idle is not None:
            self.on_idle()

    @staticmethod
    def _not_to_be_known(futures: list[asyncio.Future[None]]) -> None:
        """Asked for after the end, which nothing else fails."""
        for future in futures:
            future.cancel()
        futures.clear()

    # --- the end -------------------------------------------------------------------------------------

    def fail_all(self, make_error: Callable[[str], BaseException]) -> None:
        """Ends every wait, queued or in flight; posted memory stays with the device until it hands it back."""
        self.flush()  # what was gathered fails with the rest
        self.closed = True
        self.open = False
        self._staging.forget(self)
        for future in (*self._confirming, *self._to_confirm):
            if not future.done():
                future.set_exception(make_error("flush"))
        self._to_confirm.clear()
        self._confirming.clear()
        queued = [*self._credit_queue, *self._slot_queue]
        self._credit_queue.clear()
        self._slot_queue.clear()
        self._answers.clear()
        self.reserved = 0
        for operation in queued:
            operation.fail(make_error(operation.kind))
            if not operation.in_flight:
                self._end(operation)
        for slot in self._slots:
            if slot.operation is not None:
                slot.operation.fail(make_error(slot.operation.kind))
        self.fail_one_sided(make_error)

    def close(self) -> None:
        """The queue pair is gone: nothing can touch the memory any more."""
        for slot in self._slots:
            if self._reactor.remove(slot.wr_id, slot):
                operation, slot.operation = slot.operation, None
                self._free_slot(slot)
                if operation is not None:
                    self._settle(operation)
        for control in self._control_slots:
            self._reactor.remove(control.wr_id, control)
        if self._marker is not None:
            self._reactor.remove(self._marker.wr_id, self._marker)
        self.forget()
        if self._control_lease is not None:
            for control in self._control_slots:
                control.place.view.release()
            self._control_view.release()
            self._control_lease.release_nowait()
        self._staging.leave()
