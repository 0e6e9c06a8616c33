"""Messages above eager_size: offered by their sender, read by their receiver, in place on both sides.

The protocol and its tables are in protocol/rendezvous.py; here are the memory and the work requests. On the way
out a message is pinned, and a type-2 window of this queue pair is bound over each part of it that is not small
(where the device has no windows, the registration itself lets the peer in, and ends with the message). On the way
in it is read in pieces, a bounded number of them over all messages, so that neither other operations nor the
peer's wait long behind a large one.

Memory follows the device, not the wait: what was offered stays pinned until the peer has answered and the window
is revoked, what is read into until the last read has come back, or until the queue pair is destroyed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ._native._memory import new_bytes
from .adapter import Adapter
from .errors import DeviceError, MessageTooLargeError, ProtocolError
from .mr_pool import Lease
from .protocol.frames import FrameKind
from .protocol.rendezvous import (
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
from .receive_queue import ReceiveQueue
from .registrations import Pinned, PinnedParts
from .send_queue import READ, SEND, Operation, SendQueue, SpinningFuture, Step
from .verbs import Access, MemoryWindow, QueuePair

#: One read. Large enough that its fixed costs vanish, small enough that others get their turn.
_PIECE = 1 << 20
_WRAP = 1 << 32


class Withdrawer(Protocol):
    """The part of the session that takes offers back."""

    def send_withdraw(self, transfer: int) -> None:
        """Tells the peer."""


class Exposure:
    """A part of an outgoing message, open to the peer of this connection for reading."""

    __slots__ = ("bound", "pinned", "window")

    def __init__(self, pinned: Pinned, window: MemoryWindow | None) -> None:
        self.pinned = pinned
        self.window = window
        self.bound = False  # the window's binding was posted

    @property
    def next_rkey(self) -> int:
        """The key the peer will use."""
        if self.window is not None:
            return self.window.next_rkey()
        assert self.pinned.region is not None
        return self.pinned.region.rkey


class LargeSend(SpinningFuture):
    """A large message on its way; what :meth:`Connection.send` returns for one.

    Cancelled before it was offered: not sent. Later it is withdrawn: it arrives only if the receiver was faster;
    the memory is free again when the peer has answered.
    """

    def __init__(self, sends: LargeSends, nbytes: int, transfer: int) -> None:
        super().__init__(sends.queue.loop, sends.queue.spin)
        self._sends = sends
        self.nbytes = nbytes
        self.transfer = transfer
        self.state = SendState.WAITING
        self.exposures: list[Exposure] = []
        self.steps: list[Operation] = []  # not posted yet, as far as is known
        self.revoking = 0  # invalidations under way

    @property
    def in_flight(self) -> int:
        """Not 0 once the peer may know of the message."""
        return int(self.state is not SendState.WAITING)

    def cancel(self, msg: Any | None = None) -> bool:
        """Abandons the message; see the class."""
        if not super().cancel(msg):
            return False
        self._sends.abandoned(self)
        return True


class LargeSends:
    """The large messages of one connection that are on their way out."""

    def __init__(
        self,
        *,
        adapter: Adapter,
        queue: SendQueue,
        qp: QueuePair,
        broken: Callable[[DeviceError], None],
        session: Callable[[], Withdrawer | None],
    ) -> None:
        self.queue = queue
        self._adapter = adapter
        self._qp = qp
        self._broken = broken
        self._session = session
        self._windows = adapter.attributes.memory_windows
        self._idle: list[MemoryWindow] = []
        self._active: dict[int, LargeSend] = {}
        self._next = 0
        self._closed = False
        self._room = 0  # bytes of an OFFER frame
        self._limit = 0  # largest message the peer takes

    def __len__(self) -> int:
        return len(self._active)

    def open(self, room: int, limit: int) -> None:
        """The handshake has settled the size of a frame and the largest message that the peer takes."""
        self._room = room
        self._limit = limit

    # --- out -----------------------------------------------------------------------------------------

    def send(self, parts: tuple[memoryview, ...], nbytes: int) -> LargeSend:
        """Starts to send; errors as Connection.send."""
        if nbytes > self._limit:
            raise MessageTooLargeError(nbytes, self._limit)
        inline = plan([part.nbytes for part in parts], self._room)
        send = LargeSend(self, nbytes, self._next)
        segments = []
        try:
            for part, is_inline in zip(parts, inline, strict=True):
                segments.append(self._segment(send, part, is_inline))
        except BaseException:
            self._release(send)
            raise
        self._next = (self._next + 1) % _WRAP
        self._active[send.transfer] = send
        self._adapter.reactor.posted()
        for exposure in send.exposures:
            if exposure.window is not None:
                self._bind(send, exposure, exposure.window)
        if not send.done():  # a window that cannot be bound has ended it
            self._offer(send, encode_offer(send.transfer, segments))
        return send

    def _segment(self, send: LargeSend, part: memoryview, inline: bool) -> Segment:
        if inline:
            return Segment(part.nbytes, data=bytes(part))
        access = Access.MW_BIND if self._windows else Access.REMOTE_READ
        pinned = self._adapter.pool.pin_exposed(part, access)
        exposure = Exposure(pinned, None)
        send.exposures.append(exposure)
        if self._windows:
            exposure.window = self._idle.pop() if self._idle else MemoryWindow(self._adapter.pd)
        return Segment(part.nbytes, pinned.address, exposure.next_rkey)

    def _bind(self, send: LargeSend, exposure: Exposure, window: MemoryWindow) -> None:
        def post(wr_id: int) -> None:
            pinned = exposure.pinned
            assert pinned.region is not None
            self._qp.post_bind(
                wr_id, window, pinned.region, pinned.address, pinned.nbytes, Access.REMOTE_READ
            )
            exposure.bound = True

        step = Step(self.queue, "bind", -1, 0, lambda error: self._step_ended(send, error))
        step.post = post
        send.steps.append(step)
        self.queue.submit(step)

    def _offer(self, send: LargeSend, payload: bytes) -> None:
        step = Offering(self.queue, send, payload, lambda error: self._step_ended(send, error))
        send.steps.append(step)
        self.queue.submit(step)

    def _step_ended(self, send: LargeSend, error: BaseException | None) -> None:
        """A binding or the offer was done, or could not be."""
        if error is not None:
            send.fail(error)
            self.abandoned(send)

    # --- the peer answers ----------------------------------------------------------------------------

    def answered(self, payload: bytes) -> None:
        """A DONE frame. Raises :class:`ProtocolError` when it answers nothing."""
        transfer, answer = decode_done(payload)
        send = self._active.get(transfer)
        if send is None:
            raise ProtocolError(f"the peer answers offer {transfer}, which was not made")
        if answer is Answer.WITHDRAWN and send.state is not SendState.WITHDRAWN:
            raise ProtocolError(f"the peer says that offer {transfer} was withdrawn, which it was not")
        send.state = next_send_state(send.state, SendEvent.ANSWERED)
        self._revoke(send)
        self.queue.offer_ended()

    def abandoned(self, send: LargeSend) -> None:
        """Nobody waits for it any more, or a step of it failed."""
        before = send.state
        send.state = next_send_state(before, SendEvent.ABANDONED)
        if self._closed:
            return
        if before is SendState.WAITING:
            for step in send.steps:
                step.cancel()
            self._revoke(send)
        elif before is SendState.OFFERED and (session := self._session()) is not None:
            session.send_withdraw(send.transfer)

    # --- taking the memory back ----------------------------------------------------------------------

    def _revoke(self, send: LargeSend) -> None:
        """Ends the peer's access; the message has ended when the device says so."""
        bound = [e.window for e in send.exposures if e.window is not None and e.bound]
        send.revoking = len(bound)
        if not bound:
            self._revoked(send)
        for window in bound:
            self._invalidate(send, window.rkey)

    def _invalidate(self, send: LargeSend, rkey: int) -> None:
        def ended(error: BaseException | None) -> None:
            send.revoking -= 1
            if error is None and not send.revoking:
                self._revoked(send)
            elif error is not None and not self._closed and isinstance(error, DeviceError):
                self._broken(error)

        step = Step(self.queue, "invalidate", -1, 0, ended)
        step.post = lambda wr_id: self._qp.post_invalidate(wr_id, rkey)
        self.queue.submit(step)

    def _revoked(self, send: LargeSend) -> None:
        send.state = next_send_state(send.state, SendEvent.REVOKED)
        del self._active[send.transfer]
        self._adapter.reactor.finished()
        self._release(send)
        if not send.done():
            send.set_result(None)

    def _release(self, send: LargeSend) -> None:
        """The peer cannot reach the memory (any more)."""
        for exposure in send.exposures:
            if exposure.window is not None:
                self._idle.append(exposure.window)
            exposure.pinned.release()
        send.exposures.clear()
        send.steps.clear()

    # --- the end -------------------------------------------------------------------------------------

    def fail_all(self, make_error: Callable[[str], BaseException]) -> None:
        """Ends every wait; the memory stays as it is until :meth:`close`."""
        self._closed = True
        for send in self._active.values():
            send.fail(make_error("send"))

    def close_windows(self) -> None:
        """A window bound to a queue pair holds it (rxe): the windows go before the queue pair."""
        windows = [e.window for send in self._active.values() for e in send.exposures]
        for window in [*self._idle, *windows]:
            if window is not None:
                window.close()
        self._idle.clear()

    def close(self) -> None:
        """The queue pair is gone: nothing reaches the memory any more."""
        for send in self._active.values():
            self._adapter.reactor.finished()
            for exposure in send.exposures:
                exposure.pinned.release()
        self._active.clear()


class Offering(Step):
    """The OFFER frame of a large message."""

    credit = True
    frame = int(FrameKind.OFFER)

    def __init__(
        self, queue: SendQueue, send: LargeSend, payload: bytes, ended: Callable[[BaseException | None], None]
    ) -> None:
        super().__init__(queue, "send", SEND, len(payload), ended)
        self.data = payload
        self._send = send

    def staged(self) -> None:
        """It goes to the device: from now on the peer may answer."""
        self._send.state = next_send_state(self._send.state, SendEvent.POSTED)


class LargeReceive:
    """A message that is being read into its place."""

    __slots__ = ("abandoned", "future", "missing", "parts", "pieces", "taking", "unposted")

    def __init__(self, taking: Taking, parts: PinnedParts, future: SpinningFuture) -> None:
        self.taking = taking
        self.parts = parts
        self.future = future
        self.pieces = _pieces(taking.offer)
        # Counted, not listed: there may be a million of them.
        remote = (segment.length for segment in taking.offer.segments if segment.data is None)
        self.unposted = self.missing = sum(-(-length // _PIECE) for length in remote)
        self.abandoned = False


def _pieces(offer: Offer) -> Iterator[tuple[int, int, int, int]]:
    """What to read: where in the message, remote address, remote key, length."""
    at = 0
    for segment in offer.segments:
        if segment.data is None:
            for offset in range(0, segment.length, _PIECE):
                length = min(_PIECE, segment.length - offset)
                yield at + offset, segment.address + offset, segment.rkey, length
        at += segment.length


class LargeReceives:
    """The offers of the peer, and the messages that are being read."""

    def __init__(
        self, *, adapter: Adapter, queue: SendQueue, receives: ReceiveQueue, max_message: int
    ) -> None:
        self._adapter = adapter
        self._queue = queue
        self._receives = receives
        self._max_message = max_message
        self._ledger = TakerLedger(0)  # until the handshake is over
        self._waiting: deque[LargeReceive] = deque()  # with pieces left to post, in turn
        self._active: set[LargeReceive] = set()
        self._room = 1  # reads that may be posted now
        self._make_error: Callable[[str], BaseException] | None = None  # after fail_all()

    def open(self, depth: int, read_depth: int) -> None:
        """The handshake has settled how many offers and reads there may be at a time."""
        self._ledger = TakerLedger(depth)
        # Reads beyond what the peer serves at a time hold up everything behind them: half is for others.
        self._room = max(1, read_depth // 2)

    # --- offers --------------------------------------------------------------------------------------

    def offered(self, payload: bytes) -> None:
        """An OFFER frame. Raises :class:`ProtocolError`."""
        offer = decode_offer(payload, self._max_message)
        taking = self._ledger.arrived(offer)
        if taking is None:
            self._receives.owe()
            self._queue.answer(encode_done(offer.transfer, Answer.WITHDRAWN))
        else:
            self._receives.messages.put(taking)

    def withdrawn(self, transfer: int) -> None:
        """The peer takes an offer back. Raises :class:`ProtocolError`."""
        taking = self._ledger.withdraw(transfer)
        if taking is not None and self._make_error is None:
            self._receives.messages.remove(taking)
            self._answer_withdrawn(taking)

    def _answer_withdrawn(self, taking: Taking) -> None:
        if self._ledger.answer_due(taking):
            self._answer(taking, Answer.WITHDRAWN)

    def _answer(self, taking: Taking, answer: Answer) -> None:
        self._ledger.answered(taking)
        if self._make_error is None:
            self._receives.owe()
            self._queue.answer(encode_done(taking.offer.transfer, answer))

    # --- reading -------------------------------------------------------------------------------------

    async def receive(self, taking: Taking) -> bytes:
        """Reads an offered message that the caller has taken. Cancelled or failed: it is the next one again."""
        try:
            data = new_bytes(taking.offer.nbytes)
            pinned = self._adapter.pool.pin_new_bytes(data)
        except BaseException:
            self._receives.put_back(taking)
            raise
        # Nobody has seen the object yet, so it may be written to.
        await self._read(taking, pinned, lambda: data)
        return data

    async def receive_into(self, taking: Taking, view: memoryview) -> int:
        """The same, into the start of a writable buffer that is large enough; returns the length."""
        nbytes = taking.offer.nbytes
        try:
            pinned = self._adapter.pool.pin(view[:nbytes], writable=True)
        except BaseException:
            self._receives.put_back(taking)
            raise
        await self._read(taking, pinned, lambda: bytes(view[:nbytes]))
        return nbytes

    async def receive_lease(self, taking: Taking) -> Lease:
        """The same, into memory of the pool, which is waited for in turn."""
        try:
            lease = await self._adapter.pool.acquire(taking.offer.nbytes)
        except BaseException:
            self._receives.put_back(taking)
            raise
        try:
            pinned = self._adapter.pool.pin(lease, writable=True)
            await self._read(taking, pinned, lambda: bytes(lease))
        except BaseException:
            lease.release_nowait()
            raise
        return lease

    async def _read(self, taking: Taking, pinned: Pinned, landed: Callable[[], bytes]) -> None:
        if self._make_error is not None:  # it ended between the arrival and the receiver's turn
            pinned.release()
            raise self._make_error("recv")
        taking.taken = True
        receive = LargeReceive(
            taking, PinnedParts(pinned), SpinningFuture(self._queue.loop, self._queue.spin)
        )
        own = receive.parts.part(0)
        self._adapter.reactor.posted()
        try:
            self._active.add(receive)
            self._copy_inline(taking.offer, pinned)
            if receive.missing:
                self._waiting.append(receive)
                self._advance()
            else:
                self._deliver(receive)
            await receive.future
        except asyncio.CancelledError:
            if receive.future.done() and not receive.future.cancelled() and not receive.future.exception():
                self._receives.put_back(landed())  # it came at the same moment: not lost
            else:
                self._abandon(receive)
            raise
        finally:
            self._active.discard(receive)
            self._adapter.reactor.finished()
            own.release()

    @staticmethod
    def _copy_inline(offer: Offer, pinned: Pinned) -> None:
        at = 0
        for segment in offer.segments:
            if segment.data is not None:
                pinned.copy_in(at, segment.data)
            at += segment.length

    def _advance(self) -> None:
        """Posts reads while there is room, of each message in turn."""
        while self._waiting and self._room and self._make_error is None:
            receive = self._waiting.popleft()
            if receive.abandoned:
                continue
            piece = next(receive.pieces)
            receive.unposted -= 1
            if receive.unposted:
                self._waiting.append(receive)
            self._room -= 1
            self._post(receive, *piece)

    def _post(self, receive: LargeReceive, at: int, address: int, rkey: int, length: int) -> None:
        step = Step(self._queue, "recv", READ, length, lambda error: self._piece_ended(receive, error))
        step.into = True
        step.remote_address = address
        step.rkey = rkey
        step.pinned = receive.parts.part(at)
        receive.taking.reads += 1
        self._queue.submit(step)

    def _piece_ended(self, receive: LargeReceive, error: BaseException | None) -> None:
        self._room += 1
        receive.missing -= 1
        receive.taking.reads -= 1
        if error is not None:
            receive.future.fail(error)
            return
        if receive.abandoned:
            self._answer_withdrawn(receive.taking)
        elif not receive.missing and not receive.future.done():
            self._deliver(receive)
        self._advance()

    def _deliver(self, receive: LargeReceive) -> None:
        self._answer(receive.taking, Answer.READ)
        receive.future.set_result(None)

    def _abandon(self, receive: LargeReceive) -> None:
        """The receive was cancelled: what is in flight lands, and the message is the next one again."""
        receive.abandoned = True
        if self._make_error is not None:
            return
        if self._ledger.put_back(receive.taking):
            self._receives.put_back(receive.taking)
        else:
            self._answer_withdrawn(receive.taking)

    # --- the end -------------------------------------------------------------------------------------

    def fail_all(self, make_error: Callable[[str], BaseException]) -> None:
        """Ends every receive."""
        self._make_error = make_error
        for receive in self._active:
            receive.future.fail(make_error("recv"))
