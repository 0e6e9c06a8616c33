"""Connection: queue pair, credits, pool and reactor put together as awaitable operations.

The life of a connection: prepare() attaches to the reactor, leases the buffers, makes the queue pair and posts
every receive; the bootstrap (connect.py) exchanges the endpoints; open() brings the queue pair to RTS. From then
on operations go through the send queue and arrivals come through the receive queue.

It ends once, whatever the reason: the first error is kept, the queue pair goes to ERR, every waiter gets an
exception of its own that names the operation, and a task takes things down in the order they may die: drain
with a deadline, memory windows, queue pair, registrations, buffers, reactor, device. Nothing the device may
still touch is given back before the queue pair is destroyed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

from ._native._datapath import ONE_SIDED, Buffer, Endpoint, Grant, OneSided
from ._native._memory import new_bytes
from .adapter import Route
from .buffers import bytes_view
from .config import Config
from .cq_reactor import ReactorStatistics
from .errors import (
    CompletionError,
    ConnectionClosedError,
    ConnectionLostError,
    DeviceError,
    DeviceGoneError,
    FlushedError,
    MisuseError,
    RdmaError,
    WcStatus,
    WrongLoopError,
    completion_error,
)
from .large_messages import LargeReceives, LargeSends, Withdrawer
from .mr_pool import Lease, PoolStatistics
from .protocol.credit import CONTROL_WINDOW, CreditLedger
from .protocol.frames import HEADER_SIZE
from .protocol.rendezvous import Taking
from .protocol.shared_credit import Share
from .receive_queue import MessageLease, OwnRing, ReceiveQueue
from .regions import Announcer, Grants, RemoteRegion, Shares, parse_access
from .registrations import Pinned
from .send_queue import (
    COMPARE_SWAP,
    CONTROL_FRAME,
    FETCH_ADD,
    READ,
    SEND,
    WITHOUT_SLOT,
    WRITE,
    WRITE_IMM,
    Operation,
    SendQueue,
)
from .shared_receives import SharedReceives, SharedReceiveStatistics, SharedRing
from .verbs import Access, AsyncEvent, EventType, Path, QueuePair

if TYPE_CHECKING:
    from .protocol.bootstrap import Agreed


#: A piece of a large transfer never exceeds this, whatever the port allows: lengths in work requests are 32 bit.
_MAX_PIECE = 1 << 30
#: Seconds to wait for the device to say that a queue pair takes no more receives of a shared queue.
_LAST_RECEIVE = 0.25
_RIGHT_READ = int(Access.REMOTE_READ)
_RIGHT_WRITE = int(Access.REMOTE_WRITE)
_RIGHT_ATOMIC = int(Access.REMOTE_ATOMIC)
_U64 = 1 << 64

T = TypeVar("T")

#: asyncio's own, without a lookup in the module for each operation.
_get_running_loop = asyncio._get_running_loop

State = Literal["preparing", "open", "closing", "closed"]


#: In the inbox, for :meth:`Connection.consume` only: look what holds you.
_LOOK: Any = object()


class Session(Announcer, Withdrawer, Protocol):
    """The bootstrap's TCP connection, as the Connection sees it: liveness, sharing, withdrawing and closing."""

    def send_recall(self, count: int) -> None:
        """Asks for data credits back that the peer does not use."""

    def send_close(self, error: RdmaError | None) -> None:
        """Says goodbye, and why; then closes."""

    async def wait_gone(self, timeout: float) -> None:
        """Waits until it is closed; after so many seconds, closes it without the peer."""

    def get_extra_info(self, name: str) -> Any:
        """``peername``, ``sockname``, ``socket`` and so on, as asyncio's transports have it."""


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """A snapshot of one connection. Credits in messages, sizes in bytes.

    ``receive_credits`` is what the peer may have under way just now, of up to ``receive_credits_max``.
    ``receives_posted`` are those of the shared queue where there is one (``shared_receives``), else the
    connection's own.
    """

    peer: str
    device: str
    qp_num: int
    state: State
    mode: str
    send_credits: int
    send_slots_used: int
    waiting_for_credit: int
    waiting_for_slot: int
    receive_credits: int
    receive_credits_max: int
    receives_posted: int
    messages_queued: int
    notifications_queued: int
    messages_received: int
    requests_posted: int
    credit_frames: int
    mtu: int
    eager_size: int
    shared: int
    remote: int
    reactor: ReactorStatistics
    pool: PoolStatistics
    shared_receives: SharedReceiveStatistics | None


class Connection(Endpoint):
    """A connection to a peer. Made by :func:`aiordma.connect` and :func:`aiordma.serve`.

    Operations return futures: await them at once, or start several and await them later. Cancelling one
    abandons the wait: what the device has already been given may still happen, and its memory stays alive
    until it has. After the connection has ended, every operation raises
    :class:`~aiordma.errors.ConnectionLostError` (or :class:`~aiordma.errors.ConnectionClosedError` for an end
    in order) with the reason. A connection belongs to the event loop it was made in.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_adapter",
        "_agreed",
        "_closed",
        "_config",
        "_consuming",
        "_control",
        "_cq",
        "_depth",
        "_entries",
        "_error",
        "_grants",
        "_held",
        "_large_receives",
        "_large_sends",
        "_lingering",
        "_lingers",
        "_loop",
        "_peer",
        "_qp",
        "_session",
        "_share",
        "_share_limit",
        "_shared",
        "_shares",
        "_stage",
        "_staging",
        "_state",
        "_teardown_task",
        "eager_size",
        "psn",
        "route",
    )

    _sends: SendQueue
    _receives: ReceiveQueue

    def __init__(self, route: Route, config: Config, peer: str, *, shared_receives: int = 0) -> None:
        """``shared_receives``: what None in the config stands for here."""
        self._loop = asyncio.get_running_loop()
        self._adapter = route.adapter
        self.route = route
        self._config = config
        self._peer = peer
        self._state: State = "preparing"
        self._error: ConnectionLostError | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._session: Session | None = None
        self._teardown_task: asyncio.Task[None] | None = None
        self._consuming = False  # consume() goes on
        self._held: asyncio.Future[Any] | None = None  # ... when this is done
        self._lingers = False  # closed in order on this side: what was sent is to arrive
        self._lingering: asyncio.Future[None] | None = None
        self._shares = Shares(self, route.adapter)
        self._grants = Grants()
        self._agreed: Agreed | None = None
        self.psn = secrets.randbits(24)
        self.eager_size = config.eager_size
        """Bytes: messages up to this go through buffers, larger ones are read in place; agreed with the peer."""
        shared = config.shared_receives if config.shared_receives is not None else shared_receives
        self._share_limit = shared if route.adapter.can_share_receives else 0
        self._shared: SharedReceives | None = None
        self._share: Share | None = None

    # --- coming to life ------------------------------------------------------------------------------

    @property
    def receive_credits(self) -> int:
        """What the peer may send at first, in messages."""
        config = self._config
        return (
            min(config.min_credits, config.receive_credits) if self._share_limit else config.receive_credits
        )

    async def prepare(self) -> None:
        """Makes the queue pair and posts its receives. Raises :class:`DeviceError`, :class:`MemoryLimitError`;
        on any failure (cancellation included) everything is given back."""
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, self, "_state", "closed")
            undo.callback(self._adapter.release)
            self._attach(undo)
            await self._join_staging(undo)
            own = await self._join_shared(undo)
            await self._make_queue_pair(undo, own)
            undo.pop_all()
        try:
            self._qp.to_init(self.route.choice.port.port)
            self._receives.post_all()
        except BaseException:
            self.abort()
            raise

    def _attach(self, undo: contextlib.ExitStack) -> None:
        """Room in a completion queue; a shared receive queue sees to that for the receives."""
        config, reactor = self._config, self._adapter.reactor
        self._control = CONTROL_WINDOW + config.rendezvous_depth
        self._stage = config.eager_size + HEADER_SIZE
        if self._share_limit:
            self._shared = self._adapter.shared_receives(
                self._stage, self._share_limit, self.receive_credits, CONTROL_WINDOW
            )
        own = 0 if self._share_limit else config.receive_credits + self._control
        self._depth = config.send_depth + self._control + WITHOUT_SLOT + 1  # and a marker
        self._entries = self._depth + own
        self._cq = reactor.attach(config.mode, self._entries)
        undo.callback(reactor.detach, config.mode, self._cq, self._entries)

    async def _join_staging(self, undo: contextlib.ExitStack) -> None:
        self._staging = self._adapter.staging(self._stage)
        await self._staging.join()
        undo.callback(self._staging.leave)

    async def _join_shared(self, undo: contextlib.ExitStack) -> Lease | None:
        """A share of a shared receive queue; or memory for a ring of our own."""
        config = self._config
        if self._shared is not None:
            share = await self._shared.join(self.receive_credits, config.receive_credits, CONTROL_WINDOW)
            undo.callback(self._shared.leave, 0, share, 0)
            self._share = share
            return None
        receives = config.receive_credits + self._control
        lease = await self._adapter.pool.acquire(receives * self._stage)
        undo.callback(lease.release_nowait)
        return lease

    async def _make_queue_pair(self, undo: contextlib.ExitStack, own: Lease | None) -> None:
        config, shared = self._config, self._shared
        self._qp = QueuePair(
            self._adapter.pd,
            self._cq,
            shared.cq if shared is not None else None,
            max_send_wr=self._depth,
            max_recv_wr=0 if shared is not None else config.receive_credits + self._control,
            max_inline=config.inline_size,
            srq=shared.srq if shared is not None else None,
        )
        undo.callback(self._qp.close)
        control_lease = None
        if self._qp.max_inline < CONTROL_FRAME:
            control_lease = await self._adapter.pool.acquire(self._control * CONTROL_FRAME)
            undo.callback(control_lease.release_nowait)
        self._make_queues(control_lease, own)

    def _make_queues(self, control_lease: Lease | None, own: Lease | None) -> None:
        config, reactor = self._config, self._adapter.reactor
        adaptive = config.mode == "adaptive"
        self._sends = SendQueue(
            connection=self,
            reactor=reactor,
            cq=self._cq,
            qp=self._qp,
            staging=self._staging,
            scratch=self._adapter.scratch(self._qp.max_inline),
            control_lease=control_lease,
            depth=config.send_depth,
            control=CONTROL_WINDOW,
            offers=config.rendezvous_depth,
            max_message=min(self.route.choice.port.max_message or _MAX_PIECE, _MAX_PIECE),
            governor=reactor.governor if adaptive else None,
            spins=config.mode != "event",
            atomics=self._adapter.attributes.atomics,
            failed=self._completion_failed,
            broken=self._fail_with,
        )
        arrivals = reactor.arrivals if adaptive else None
        self._receives = ReceiveQueue(
            reactor=reactor,
            ring=self._ring(own),
            sends=self._sends,
            cq=0 if config.mode == "event" else self._qp.recv_cq.pointer,
            governor=arrivals,
            failed=lambda status, vendor_err, kind: self._completion_failed(status, vendor_err, kind, None),
            broken=self._fail_with,
            recall=self._recall,
        )
        self._large_sends = LargeSends(
            adapter=self._adapter,
            queue=self._sends,
            qp=self._qp,
            broken=self._fail_with,
            session=lambda: self.session,
        )
        self._large_receives = LargeReceives(
            adapter=self._adapter,
            queue=self._sends,
            receives=self._receives,
            max_message=config.max_message_size,
        )
        reactor.listen(self._qp.qp_num, self._on_async_event)

    def _ring(self, own: Lease | None) -> OwnRing | SharedRing:
        if self._shared is not None and self._share is not None:
            return SharedRing(self._shared, self._share, self._qp.qp_num)
        assert own is not None
        count = self._config.receive_credits + self._control
        return OwnRing(self._adapter.reactor, self._qp, own, count, self._stage)

    def _recall(self, count: int) -> None:
        session = self.session
        if session is not None:
            session.send_recall(count)

    @property
    def qp_num(self) -> int:
        """Number of the local queue pair."""
        return self._qp.qp_num

    def ready_to_receive(self, agreed: Agreed) -> None:
        """INIT to RTR with what the two sides agreed. Raises :class:`DeviceError`."""
        config, choice = self._config, self.route.choice
        remote = agreed.remote
        ledger = CreditLedger(
            window=self.receive_credits,
            peer_window=agreed.send_credits,
            peer_window_max=agreed.send_credits_max,
            control=CONTROL_WINDOW,
            peer_control=agreed.control_credits,
        )
        self._sends.ledger = self._receives.ledger = ledger
        self._agreed = agreed
        self.eager_size = self._sends.eager = agreed.eager_size
        self._sends.offers_free = agreed.rendezvous_depth
        if self._share is not None:
            self._share.ledger = ledger
            self._sends.room = self._receives.shared
            self._sends.offers_free, self._sends.offers_more = 1, agreed.rendezvous_depth - 1
        self._large_sends.open(agreed.eager_size, agreed.max_message_size)
        self._large_receives.open(agreed.rendezvous_depth, agreed.initiator_depth)
        self._receives.large = self
        path = Path(
            port=choice.port.port,
            lid=remote.lid,
            gid=ipaddress.IPv6Address(remote.gid_bytes) if choice.entry is not None else None,
            gid_index=choice.entry.index if choice.entry is not None else 0,
            service_level=config.service_level,
            traffic_class=config.traffic_class,
            hop_limit=config.hop_limit,
        )
        self._qp.to_rtr(
            path,
            qp_num=remote.qp_num,
            psn=remote.psn,
            mtu=agreed.mtu,
            responder_depth=agreed.responder_depth,
        )

    def ready_to_send(self) -> None:
        """RTR to RTS. Raises :class:`DeviceError`."""
        assert self._agreed is not None
        self._qp.to_rts(
            psn=self.psn,
            timeout=self._config.ack_timeout,
            retry_count=self._config.retry_count,
            # Not a retry, ever: a peer without a posted receive is a bug in the credits and must be seen.
            rnr_retry=0,
            initiator_depth=self._agreed.initiator_depth,
        )

    def open(self, session: Session) -> None:
        """The bootstrap is done: the connection may be used, and ``session`` watches over it."""
        self._session = session
        self._state = "open"
        self._sends.open = True
        if self._error is not None:  # it broke while the bootstrap was still talking
            error, self._error = self._error, None
            self._end(error, keep=True)

    # --- messages ------------------------------------------------------------------------------------

    if TYPE_CHECKING:  # at once, these are in native/datapath/endpoint.c

        def send(self, data: Any, /) -> asyncio.Future[Any]:
            """Sends one message: a contiguous buffer object of any size, empty included, or a list or tuple of
            them, which travel one behind the other as one message, without being joined here first.

            Awaiting returns None when ``data`` may change again: up to :attr:`eager_size` bytes when it was handed
            to the device, which delivers it unless the connection fails (:meth:`flush` says that it has arrived,
            and :meth:`close` waits for that); a larger one when the peer's user has taken it, for it is read from
            here, in place, when it is taken. Waits in turn for a credit (the peer has posted receives it has not
            used) and a slot. Messages arrive in the order they were sent.

            Raises :class:`MessageTooLargeError` for more than the peer takes (``Config.max_message_size``),
            :class:`MisuseError` for an object that is no buffer, :class:`MemoryLimitError` when a large one cannot
            be registered. Cancelled before it was handed to the device: not sent; a large one is sent only if the
            peer has begun to read it.
            """

        def recv(self) -> Coroutine[Any, Any, bytes]:
            """The next message, in the order they were sent; several receivers are served in turn.

            After the peer has closed in order, what had arrived is still delivered; then
            :class:`ConnectionClosedError` is raised. Cancelled: no message is lost.
            """

        def __aiter__(self) -> Self:
            """Messages until the connection is closed in order; a lost connection raises."""

        def __anext__(self) -> Coroutine[Any, Any, bytes]: ...

    def _send_later(self, data: Any) -> asyncio.Future[Any]:
        """:meth:`send` of what could not leave at once."""
        parts = data if data.__class__ in (list, tuple) else None
        if parts is None:
            view: Any = bytes_view(data)
            nbytes = view.nbytes
        else:
            view = tuple(part for part in map(bytes_view, parts) if part.nbytes)
            nbytes = sum(part.nbytes for part in view)
        if nbytes > self.eager_size:
            self._check_open("send")
            return self._large_sends.send(view if parts is not None else (view,), nbytes)
        operation = self._operation("send", SEND, nbytes)
        operation.data = view
        operation.credit = True
        return self._sends.submit(operation)

    @property
    def send_first(self) -> Callable[[Any], bool]:
        """Called with a small message: sends it if it is the first in this turn of the event loop and nothing
        holds it up; else does nothing, and returns False: :meth:`send` waits, and says what is wrong."""
        return self._sends.send_first

    @property
    def sent_in_turn(self) -> bool:
        """True when a small message has left in this turn of the event loop: those that follow may be gathered."""
        return self._sends.sent_in_turn

    def flush(self) -> asyncio.Future[None]:
        """Done when the peer's device has every message whose :meth:`send` was done before.

        Raises the error of the connection when it ends first. Cancelled: nothing is lost.
        """
        self._check_open("flush")
        return self._sends.confirm()

    async def _recv_large(self, message: Taking) -> bytes:
        """:meth:`recv`, when what comes next is a large message (native/datapath/next.c calls this)."""
        receives = self._receives
        while message.withdrawn:
            item: Taking | bytes = receives.take(await receives.messages.wait())
            if not isinstance(item, Taking):
                return item
            message = item
        return await self._large_receives.receive(message)

    async def recv_into(self, buffer: Any) -> int:
        """As :meth:`recv`, into the start of a writable buffer; returns the length of the message in bytes. A
        large message lands there without a copy.

        The buffer belongs to the device until then, for a moment also after a cancellation. Raises
        :class:`MisuseError` when the message does not fit; it stays the next one to be received.
        """
        self._check_loop()
        view = bytes_view(buffer, writable=True)
        message = await self._message()
        length = self._receives.length(message)
        if length > view.nbytes:
            self._receives.put_back(message)
            raise MisuseError(f"recv_into: the next message has {length} bytes, the buffer {view.nbytes}")
        if isinstance(message, Taking):
            return await self._large_receives.receive_into(message, view)
        if isinstance(message, Buffer):
            return self._receives.take_into(message, view)
        view[:length] = message
        return length

    async def recv_lease(self) -> MessageLease:
        """As :meth:`recv`, without a copy: the message in the registered memory it arrived in, lent until
        ``release()`` or the end of a ``with`` block. ``memoryview(lease)`` is its contents.

        A lease of a small message keeps its credit from the sender; one of a large message is memory of the pool,
        which is waited for in turn (:class:`MemoryLimitError` when it can never hold it; the message stays next).
        A lease outlives its connection.
        """
        self._check_loop()
        message = await self._message()
        if isinstance(message, Buffer):
            return self._receives.lease(message)
        if isinstance(message, bytes):
            return MessageLease.of_copy(message)
        lease = await self._large_receives.receive_lease(message)
        return MessageLease(lease.address, lease.nbytes, lease, lease.release_nowait)

    async def consume(
        self, handle: Callable[[bytes], asyncio.Future[Any] | None], *, inline: bool = False
    ) -> None:
        """Has ``handle(message)`` called with every message, in order, until the connection ends: then it raises
        as :meth:`recv`. For protocols built on top, which receive alone.

        A small message is handled where its completion is, without a turn of the event loop for a reader: from a
        callback of the loop, or with ``inline`` also inside the await of any other task (then ``handle`` only
        notes what has come). It raises nothing. When it returns a future, no message is handled before that is
        done, and what that raises ends this. Cancelled, or after :meth:`stop_consuming`: no message is lost.
        """
        self._check_loop()
        receives, inbox = self._receives, self._receives.messages
        receives.consumes_inline = inline
        self._consuming = True
        try:
            while self._consuming:
                if (held := self._held) is not None:
                    await asyncio.wait([held])
                    if self._held is held:
                        self._held = None
                    if not held.cancelled():
                        held.result()
                    continue
                message: Taking | bytes | None = receives.take_next()
                if message is None:
                    receives.consumer = handle
                    item = await inbox.wait()
                    receives.consumer = None
                    if item is _LOOK:
                        continue
                    if self._held is not None or not self._consuming:
                        receives.put_back(item)
                        continue
                    message = receives.take(item)
                if isinstance(message, Taking):
                    if message.withdrawn:
                        continue
                    message = await self._large_receives.receive(message)
                if (until := handle(message)) is not None:
                    self.hold(until)
        finally:
            receives.consumer = None

    def hold(self, until: asyncio.Future[Any]) -> None:
        """:meth:`consume` handles no message before ``until`` is done, and raises what it raises."""
        self._held = until
        self._receives.consumer = None
        if self._consuming and self._receives.messages.waiting:
            self._receives.messages.put(_LOOK)  # whoever waits for messages waits for that now

    def stop_consuming(self) -> None:
        """:meth:`consume` handles no message any more, and returns when it is its turn."""
        self._consuming = False
        self._receives.consumer = None

    def soon(self, callback: Callable[[], object]) -> None:
        """Has ``callback()`` called by the event loop, outside of any task: sooner than ``loop.call_soon()`` where
        a message is being handled, and cheaper. What it raises is reported to the loop's exception handler."""
        self._adapter.reactor.soon(callback)

    def spin(self, future: asyncio.Future[Any]) -> None:
        """Polls for a bounded and learned time for what will make ``future`` done, as an await of :meth:`recv`
        does."""
        self._receives.messages.spin(future)

    async def _message(self) -> Buffer | bytes | Taking:
        """The next message, where it lies; the caller takes it before it awaits anything."""
        while True:
            message: Buffer | bytes | Taking = await self._receives.messages.wait()
            if not isinstance(message, Taking) or not message.withdrawn:
                return message

    # --- what the receive queue says (receive_queue.LargeArrivals) -----------------------------------

    def offered(self, payload: bytes) -> None:
        """The peer offers a large message."""
        self._large_receives.offered(payload)

    def answered(self, payload: bytes) -> None:
        """The peer answers an offer of ours."""
        self._large_sends.answered(payload)

    async def notified(self) -> int:
        """The value of the next notification (``write(..., notify=value)`` at the peer), in order.

        The data it announces is in place. Errors and cancellation as :meth:`recv`.
        """
        self._check_loop()
        return self._receives.take_notification(await self._receives.notifications.wait())

    # --- one-sided operations ------------------------------------------------------------------------

    if TYPE_CHECKING:  # at once, this is in native/datapath/endpoint.c

        def write(self, data: Any, remote: RemoteRegion, *, notify: int | None = None) -> asyncio.Future[Any]:
            """Writes a contiguous buffer object of any size to the start of ``remote`` (RDMA WRITE).

            Awaiting returns None when the data is in the peer's memory. ``notify`` (0 to 2**32 - 1) also wakes the
            peer's :meth:`notified` with that value, after the data is in place; it needs a credit, as a message
            does, and while it waits for one, operations issued later pass it. ``data`` must not change until then;
            large data is read in place by the device. Raises :class:`MisuseError` (or :class:`RemoteBoundsError`)
            before anything is sent, when ``remote`` is too small, not writable, revoked, or of another connection;
            :class:`RemoteAccessError` when the peer's device refuses, which ends the connection.
            """

    def _write_later(
        self, data: Any, remote: RemoteRegion, *, notify: int | None = None
    ) -> asyncio.Future[Any]:
        """:meth:`write` of what could not leave at once."""
        return self._sends.submit(self._write(data, remote, notify))

    def _write(self, data: Any, remote: RemoteRegion, notify: int | None) -> Operation:
        view = bytes_view(data)
        nbytes = view.nbytes
        remote.check(self, nbytes, _RIGHT_WRITE, "write")
        if notify is not None and not 0 <= notify < 1 << 32:
            raise MisuseError(f"notify={notify}: 0 to {(1 << 32) - 1}")
        operation = self._operation("write", WRITE if notify is None else WRITE_IMM, nbytes)
        self._aim(operation, remote)
        if notify is not None:
            operation.imm = notify
            operation.credit = True
        if nbytes > self._sends.stage_size:
            operation.pinned = self._adapter.pool.pin(view, writable=False)
        elif nbytes:
            operation.data = view
        return operation

    if TYPE_CHECKING:

        def read(self, remote: RemoteRegion) -> asyncio.Future[bytes]:
            """Reads all of ``remote`` (RDMA READ). Awaiting returns the bytes. Errors as :meth:`write`."""

    def _read_later(self, remote: RemoteRegion) -> Operation:
        """:meth:`read` of what could not leave at once."""
        return self._sends.submit(self._read(remote))

    def _read(self, remote: RemoteRegion) -> Operation:
        nbytes = len(remote)
        remote.check(self, nbytes, _RIGHT_READ, "read")
        operation = self._operation("read", READ, nbytes)
        self._aim(operation, remote)
        if nbytes > self._sends.stage_size:
            operation.landing = new_bytes(nbytes)  # nobody has seen it yet, so it may be written to
            operation.pinned = self._adapter.pool.pin_new_bytes(operation.landing)
        return operation

    if TYPE_CHECKING:

        def read_into(self, remote: RemoteRegion, buffer: Any) -> asyncio.Future[int]:
            """Reads all of ``remote`` into the start of a writable contiguous buffer; what is larger than
            ``Config.eager_size`` without a copy.

            Awaiting returns the number of bytes. The buffer belongs to the device until then, also after the wait
            was cancelled. Errors as :meth:`write`, and :class:`MisuseError` for a buffer that is too small.
            """

    def _read_into_later(self, remote: RemoteRegion, buffer: Any) -> Operation:
        """:meth:`read_into` of what could not leave at once."""
        return self._sends.submit(self._read_into(remote, buffer))

    def _read_into(self, remote: RemoteRegion, buffer: Any) -> Operation:
        nbytes = len(remote)
        remote.check(self, nbytes, _RIGHT_READ, "read_into")
        view = bytes_view(buffer, writable=True)
        if view.nbytes < nbytes:
            raise MisuseError(f"read_into: {nbytes} bytes do not fit a buffer of {view.nbytes}")
        operation = self._operation("read_into", READ, nbytes)
        self._aim(operation, remote)
        operation.into = True
        if nbytes:
            operation.pinned = self._adapter.pool.pin(view[:nbytes], writable=True)
        return operation

    if TYPE_CHECKING:

        def fetch_add(self, remote: RemoteRegion, value: int) -> asyncio.Future[int]:
            """Adds ``value`` (-2**63 to 2**64 - 1, modulo 2**64) to 8 remote bytes, atomically among the
            operations of the peer's device. Awaiting returns the old value (unsigned, in the peer's byte order as
            an integer).

            ``remote`` is 8 bytes long and at an address that is a multiple of 8. Errors as :meth:`write`.
            """

        def compare_swap(self, remote: RemoteRegion, expected: int, desired: int) -> asyncio.Future[int]:
            """Replaces 8 remote bytes by ``desired`` if they are ``expected``, atomically. Awaiting returns the
            old value: equal to ``expected`` when it was replaced. Range, alignment and errors as
            :meth:`fetch_add`."""

    def _fetch_add_later(self, remote: RemoteRegion, value: int) -> Operation:
        """:meth:`fetch_add` of what could not leave at once."""
        return self._sends.submit(self._fetch_add(remote, value))

    def _compare_swap_later(self, remote: RemoteRegion, expected: int, desired: int) -> Operation:
        """:meth:`compare_swap` of what could not leave at once."""
        return self._sends.submit(self._compare_swap(remote, expected, desired))

    def _fetch_add(self, remote: RemoteRegion, value: int) -> Operation:
        return self._atomic("fetch_add", FETCH_ADD, remote, _word("value", value), 0)

    def _compare_swap(self, remote: RemoteRegion, expected: int, desired: int) -> Operation:
        words = _word("expected", expected), _word("desired", desired)
        return self._atomic("compare_swap", COMPARE_SWAP, remote, *words)

    def _atomic(self, kind: str, opcode: int, remote: RemoteRegion, compare_add: int, swap: int) -> Operation:
        remote.check(self, 8, _RIGHT_ATOMIC, kind)
        if len(remote) != 8 or remote.address % 8:
            raise MisuseError(
                f"{kind} needs 8 bytes at an address that is a multiple of 8, not {len(remote)} at "
                f"{remote.address:#x}"
            )
        if not self._adapter.attributes.atomics:
            raise MisuseError(f"{kind}: device {self._adapter.name} has no atomic operations")
        operation = self._operation(kind, opcode, 8)
        self._aim(operation, remote)
        operation.compare_add = compare_add
        operation.swap = swap
        return operation

    def batch(self) -> Batch:
        """Collects operations and posts them with one doorbell: see :class:`Batch`."""
        return Batch(self)

    def _operation(self, kind: str, opcode: int, nbytes: int) -> Operation:
        self._check_open(kind)
        return Operation(self._sends, kind, opcode, nbytes)

    def _check_open(self, kind: str) -> None:
        self._check_loop()
        if self._state != "open":
            raise self.lost_error(kind)

    # --- what regions.py needs (regions.Host) --------------------------------------------------------

    @property
    def session(self) -> Session | None:
        """Where announcements go; None when there is nobody to tell any more."""
        return self._session if self._state == "open" else None

    @property
    def queue_pair(self) -> QueuePair:
        """The queue pair that windows are bound to."""
        return self._qp

    def special(self, kind: str, post: Callable[[int], None]) -> Operation:
        """Submits a work request that is not data: ``post`` posts it, given the id."""
        operation = self._operation(kind, -1, 0)
        operation.post = post
        return self._sends.submit(operation)

    @staticmethod
    def _aim(operation: Operation, remote: RemoteRegion) -> None:
        grant = remote.grant
        operation.remote_address = grant.address + remote.offset
        operation.rkey = grant.rkey

    def _check_loop(self) -> None:
        if _get_running_loop() is not self._loop:
            raise WrongLoopError(
                "a connection is used in the event loop, thread and process it was made in, and only there"
            )

    # --- memory --------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Allocation:
        """Registered memory of ``nbytes`` (at least 1), filled with zeros: await it, or use it as an async
        context manager. Data in it moves without a copy, and it can be shared.

        Waits in turn while the pool is at its limit. Raises :class:`MemoryLimitError` for more than the limit.
        """
        self._check_loop()
        return Allocation(self, nbytes)

    def register(self, buffer: Any) -> Pinned:
        """Registers a writable buffer of the user's until ``release()`` (or the end of a ``with`` block), so
        that operations on it start at once. It cannot be resized or closed meanwhile.

        Operations on large buffers register them by themselves; this is for those used again and again.
        """
        self._check_loop()
        return self._adapter.pool.register(buffer)

    async def share(self, name: str, lease: Lease, access: str = "read|write|atomic") -> None:
        """Lets the peer of this connection (and no other) into a lease, under a name.

        ``access``: any of the words read, write, atomic, joined by ``|``. Returns when the key is valid and the
        announcement is on its way. Ends with :meth:`unshare`, with the release of the lease, and with the
        connection. Raises :class:`MisuseError` for a bad name, access word, or a name that is in use. Cancelled:
        the region is not shared.
        """
        rights = parse_access(access)
        self._check_open("share")
        await self._shares.share(name, lease, rights)

    async def unshare(self, name: str) -> None:
        """Ends the sharing: when this returns, the device refuses the key. Unknown names are ignored.

        An operation of the peer that comes later fails, and its connection with it. Cancelled: the region stays
        unusable by its owner until the connection ends or unshare() was called again.
        """
        await self._shares.unshare(name)

    async def remote(self, name: str) -> RemoteRegion:
        """The region that the peer shares under ``name``; waits until it does (use ``asyncio.timeout``).

        Raises :class:`ConnectionLostError` when the connection ends first.
        """
        self._check_open("remote")
        return await self._grants.wait(name)

    # --- what the session says -----------------------------------------------------------------------

    def peer_shared(self, name: str, address: int, length: int, rkey: int, access: list[str]) -> None:
        """The peer announced a region."""
        self._grants.announce(Grant(self, name, address, length, rkey, int(parse_access("|".join(access)))))

    def peer_unshared(self, name: str) -> None:
        """The peer took a region back."""
        self._grants.withdraw(name)

    def peer_withdrew(self, transfer: int) -> None:
        """The peer takes the offer of a large message back."""
        self._large_receives.withdrawn(transfer)

    def peer_recalled(self, count: int) -> None:
        """The peer would like to have data credits back that we do not use."""
        self._sends.recalled(count)

    def peer_closed(self, message: str, *, in_order: bool) -> None:
        """The peer said goodbye."""
        if in_order:
            error: ConnectionLostError = self._lost(ConnectionClosedError, "the peer closed the connection")
        else:
            error = self._lost(ConnectionLostError, f"the peer gave the connection up: {message}")
        self._end(error, keep=True)

    def session_lost(self, error: Exception | None) -> None:
        """The TCP connection ended without goodbye: the peer process died, or its host, or the network."""
        detail = f": {error}" if error else ""
        self._end(
            self._lost(
                ConnectionLostError,
                f"the peer is gone (its TCP connection ended without goodbye{detail}); the process was "
                "killed, or its host or the network failed",
            ),
            keep=True,
        )

    def fail(self, error: RdmaError) -> None:
        """Ends the connection because of ``error``: every waiter and the peer are told. For protocols built on
        top, when the peer breaks theirs."""
        self._fail_with(error)

    # --- failure -------------------------------------------------------------------------------------

    def _completion_failed(
        self, status: int, vendor_err: int, kind: str, operation: Operation | OneSided | None
    ) -> None:
        """A work request ended in an error: the first one that is not a flush names the reason."""
        error = completion_error(
            status, peer=self._peer, qp_num=self.qp_num, opcode=kind, vendor_err=vendor_err
        )
        if operation is not None:
            operation.fail(error if self._error is None else self.lost_error(kind))
        if status == WcStatus.WR_FLUSH_ERR and self._error is None:
            # Flushed before anything else was reported: the device moved the queue pair by itself.
            error.add_note("the device moved the queue pair to the error state")
        self._end(error, keep=True)

    def _fail_with(self, error: RdmaError) -> None:
        """Something that is no completion broke the connection."""
        if isinstance(error, ConnectionLostError):
            error.peer, error.qp_num = self._peer, self.qp_num
            self._end(error, keep=True)
            return
        lost = self._lost(ConnectionLostError, str(error))
        lost.__cause__ = error
        self._end(lost, keep=True)

    def _on_async_event(self, event: AsyncEvent) -> None:
        """Dead devices, ports and queue pairs speak through asynchronous events."""
        if event.type == EventType.DEVICE_FATAL:
            self._fail_with(DeviceGoneError(f"device {self._adapter.name} failed or was removed"))
        elif event.type in (EventType.QP_FATAL, EventType.QP_REQ_ERR, EventType.QP_ACCESS_ERR):
            name = event.type.name if isinstance(event.type, EventType) else str(event.type)
            self._end(
                self._lost(
                    ConnectionLostError,
                    f"the device reports {name} for this queue pair: a request of the peer was refused, or the "
                    "queue pair failed",
                ),
                keep=True,
            )
        elif event.type == EventType.QP_LAST_WQE_REACHED:
            self._receives.last_taken()
        elif event.type == EventType.SRQ_ERR and self._shared is not None:
            self._fail_with(DeviceError("the shared receive queue failed"))
        elif event.type == EventType.CQ_ERR and event.cookie in (self._cq.cookie, self._qp.recv_cq.cookie):
            self._fail_with(DeviceError("the completion queue failed (overrun, or a device error)"))
        elif event.type == EventType.PORT_ERR and event.port == self.route.choice.port.port:
            self._fail_with(
                DeviceError(f"port {event.port} of {self._adapter.name} went down (link or interface)")
            )

    def _lost(self, cls: type[ConnectionLostError], reason: str) -> ConnectionLostError:
        return cls(f"connection to {self._peer}: {reason}", peer=self._peer, qp_num=self.qp_num)

    def lost_error(self, kind: str) -> RdmaError:
        """The exception for an operation that the end of the connection took down."""
        root = self._error
        if root is None:
            return MisuseError(f"{kind}: the connection is not open yet")
        error: ConnectionLostError
        if isinstance(root, CompletionError):
            error = FlushedError(
                WcStatus.WR_FLUSH_ERR,
                peer=self._peer,
                qp_num=self.qp_num,
                opcode=kind,
                detail=f"after {root.opcode} ended with {root.status.name}",
            )
        else:
            cls = ConnectionClosedError if isinstance(root, ConnectionClosedError) else ConnectionLostError
            error = cls(
                f"{kind} to {self._peer} failed: {root}", peer=self._peer, qp_num=self.qp_num, opcode=kind
            )
        error.__cause__ = root
        return error

    def _end(self, error: ConnectionLostError, *, keep: bool) -> None:
        """The one way a connection ends; only the first call counts. ``keep``: messages that have arrived can
        still be received."""
        if self._error is not None:
            if self._lingering is not None:
                self._lingering.cancel()  # nobody is there to wait for
            return
        self._error = error
        if self._state == "preparing":
            return  # the bootstrap sees the error and calls abort()
        self._state = "closing"
        self._sends.open = False
        if self._adapter.reactor.dispatching:
            # The completions polled together with the one that ended us may hold messages: they come first.
            self._loop.call_soon(self._shut, keep)
        else:
            self._shut(keep)

    def _shut(self, keep: bool) -> None:
        """The rest of :meth:`_end`: fails who waits, and starts the teardown."""
        try:
            if keep:
                self._adapter.reactor.poll_now()
        except DeviceError:
            pass
        if not self._lingers:
            self._to_error()
        self._receives.stop(keep=keep)
        self._large_receives.fail_all(self.lost_error)
        self._large_sends.fail_all(self.lost_error)
        self._sends.fail_all(self.lost_error)
        self._receives.fail_all(self.lost_error)
        self._grants.fail_all(lambda: self.lost_error("remote"))
        if not self._lingers:
            self._say_goodbye()
        self._teardown_task = self._loop.create_task(self._teardown(), name=f"aiordma close {self._peer}")

    def _to_error(self) -> None:
        try:
            self._qp.to_error()
        except DeviceError:
            pass  # a dead device refuses; the queue pair is destroyed all the same

    def _say_goodbye(self) -> None:
        if self._session is not None:
            error = self._error
            self._session.send_close(None if isinstance(error, ConnectionClosedError) else error)

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the connection: operations in flight end with :class:`ConnectionClosedError`; the peer still
        receives every message whose :meth:`send` was done. Returns at once; see :meth:`wait_closed`, which waits
        for that too, for ``Config.close_timeout`` at most. Idempotent."""
        if self._state == "preparing":
            raise MisuseError("the connection is not open yet")
        if self._state == "open":
            self._check_loop()
            self._lingers = True
            self._end(self._lost(ConnectionClosedError, "closed on this side"), keep=False)
        else:
            self._receives.stop(keep=False)
            self._receives.messages.drain()

    async def wait_closed(self) -> None:
        """Waits until everything is given back: queue pair, memory, descriptors. Raises nothing of its own."""
        await asyncio.shield(self._closed)

    def is_closing(self) -> bool:
        """True from the first step of the end on."""
        return self._state in ("closing", "closed")

    def abort(self) -> None:
        """The bootstrap failed after prepare(): gives everything back at once."""
        if self._state == "preparing":
            self._destroy()
            self._closed.set_result(None)

    async def _teardown(self) -> None:
        try:
            if self._lingers:
                await self._linger()
            await self._drain()
        finally:
            self._destroy()
            try:
                if self._session is not None:  # TLS waits for the peer to say goodbye as well
                    await self._session.wait_gone(self._config.close_timeout)
            finally:
                self._closed.set_result(None)

    async def _linger(self) -> None:
        """Closed in order on this side: the peer is told when it has all that was sent, or cannot get it."""
        try:
            self._lingering = self._sends.confirm()
            await asyncio.wait([self._lingering], timeout=self._config.close_timeout)
        finally:
            self._to_error()
            self._say_goodbye()

    async def _drain(self) -> None:
        """Waits until the device has handed back every work request, or the deadline has passed: a dead device
        never flushes."""
        shared, timeout = self._shared, self._config.close_timeout
        if shared is None:
            await self._until(lambda: self._sends.posted == 0 and self._receives.drained, timeout)
            return
        await self._until(lambda: self._sends.posted == 0, timeout)
        if shared.tells_last:
            # Not every device does; then the receive of a message that broke off is lost, at most.
            shared.tells_last = await self._until(lambda: self._receives.drained, min(timeout, _LAST_RECEIVE))

    async def _until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Waits until what comes back from the device makes the condition true; False: it did not in time."""
        met: asyncio.Future[None] = self._loop.create_future()

        def check() -> None:
            if condition() and not met.done():
                met.set_result(None)

        self._sends.on_idle = self._receives.on_idle = check
        check()
        await asyncio.wait([met], timeout=timeout)
        self._sends.on_idle = self._receives.on_idle = None
        return met.done()

    def _collect_shared(self) -> None:
        """What this queue pair has taken of a shared receive queue: its completions would go with it."""
        if self._shared is not None:
            self._qp.to_error()
            self._adapter.reactor.poll_now()

    def _destroy(self) -> None:
        """In the order things may die; a step that fails does not keep the next from happening."""
        adapter, config = self._adapter, self._config
        steps: list[Callable[[], object]] = [lambda: adapter.reactor.unlisten(self._qp.qp_num)]
        # A window bound to a queue pair holds it (rxe), so windows go first; then nothing reaches the memory.
        steps += [
            self._shares.close_windows,
            self._large_sends.close_windows,
            self._collect_shared,
            self._qp.close,
            self._shares.close,
            self._sends.close,
            self._large_sends.close,
            self._receives.close,
            lambda: adapter.reactor.detach(config.mode, self._cq, self._entries),
            adapter.release,
        ]
        for step in steps:
            try:
                step()
            except Exception as error:
                self._loop.call_exception_handler(
                    {"message": f"closing the connection to {self._peer}", "exception": error}
                )
        self._state = "closed"

    # --- what it is ----------------------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The peer's bootstrap address, ``host:port``."""
        return self._peer

    @property
    def unread(self) -> bool:
        """True when messages have arrived, other than empty ones, that were not received yet."""
        return self._receives.unread

    def get_extra_info(self, name: str) -> Any:
        """What asyncio knows of the bootstrap's TCP connection: ``peername``, ``sockname``, ``socket``,
        ``ssl_object`` and more, as :meth:`asyncio.BaseTransport.get_extra_info`; None for what it does not."""
        return self._session.get_extra_info(name) if self._session is not None else None

    def statistics(self) -> ConnectionStatistics:
        """A snapshot of windows, queues, reactor and pool."""
        ledger = self._sends.ledger
        waiting_credit, waiting_slot = self._sends.waiting
        return ConnectionStatistics(
            peer=self._peer,
            device=self._adapter.name,
            qp_num=self.qp_num,
            state=self._state,
            mode=self._config.mode,
            send_credits=ledger.data_credits if ledger else 0,
            send_slots_used=self._sends.in_flight,
            waiting_for_credit=waiting_credit,
            waiting_for_slot=waiting_slot,
            receive_credits=self._receives.ledger.window if self._receives.ledger else 0,
            receive_credits_max=self._config.receive_credits,
            receives_posted=self._receives.ring.posted,
            messages_queued=len(self._receives.messages),
            notifications_queued=len(self._receives.notifications),
            messages_received=self._receives.received,
            requests_posted=self._sends.sent,
            credit_frames=self._sends.credit_frames,
            mtu=self._agreed.mtu if self._agreed else 0,
            eager_size=self.eager_size,
            shared=len(self._shares),
            remote=len(self._grants),
            reactor=self._adapter.reactor.statistics(),
            pool=self._adapter.pool.statistics(),
            shared_receives=self._shared.statistics() if self._shared is not None else None,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    def __repr__(self) -> str:
        qp = f" qp {self._qp.qp_num:#x}" if hasattr(self, "_qp") else ""
        return f"<Connection to {self._peer}{qp} {self._state}>"


class Allocation:
    """What :meth:`Connection.allocate` returns: a lease once awaited or entered."""

    __slots__ = ("_connection", "_lease", "_nbytes")

    def __init__(self, connection: Connection, nbytes: int) -> None:
        self._connection = connection
        self._nbytes = nbytes
        self._lease: Lease | None = None

    async def _acquire(self) -> Lease:
        connection = self._connection
        if connection._state != "open":
            raise connection.lost_error("allocate")
        return (await connection._adapter.pool.acquire(self._nbytes)).zero()

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._acquire().__await__()

    async def __aenter__(self) -> Lease:
        self._lease = await self._acquire()
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        if self._lease is not None:
            await self._lease.release()


class Batch:
    """Operations that are posted together when the ``async with`` block ends, which then waits for all of them.
    Those of a long batch are posted as there is room, 64 at first; operations of other tasks may come in between.

    Each method returns its operation, as the connection's does; its result is there after the block. When the
    body raises, nothing is posted. The first operation that fails raises from the end of the block, after all
    have ended; one that was cancelled before is left out.
    """

    __slots__ = ("_connection", "_operations", "_sends")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sends = connection._sends
        self._operations: list[Operation | OneSided] = []

    def _add(self, operation: Operation) -> Operation:
        """One that takes the long way."""
        operation._spin = None
        self._operations.append(operation)
        return operation

    def write(self, data: Any, remote: RemoteRegion, *, notify: int | None = None) -> asyncio.Future[Any]:
        """As :meth:`Connection.write`."""
        if (operation := self._sends.prepare_write(data, remote, notify)) is None:
            return self._add(self._connection._write(data, remote, notify))
        self._operations.append(operation)
        return operation

    def read(self, remote: RemoteRegion) -> asyncio.Future[bytes]:
        """As :meth:`Connection.read`."""
        if (operation := self._sends.prepare_ask(READ, remote)) is None:
            return self._add(self._connection._read(remote))
        self._operations.append(operation)
        return operation

    def read_into(self, remote: RemoteRegion, buffer: Any) -> asyncio.Future[int]:
        """As :meth:`Connection.read_into`."""
        if (operation := self._sends.prepare_read_into(remote, buffer)) is None:
            return self._add(self._connection._read_into(remote, buffer))
        self._operations.append(operation)
        return operation

    def fetch_add(self, remote: RemoteRegion, value: int) -> asyncio.Future[int]:
        """As :meth:`Connection.fetch_add`."""
        if (operation := self._sends.prepare_ask(FETCH_ADD, remote, value)) is None:
            return self._add(self._connection._fetch_add(remote, value))
        self._operations.append(operation)
        return operation

    def compare_swap(self, remote: RemoteRegion, expected: int, desired: int) -> asyncio.Future[int]:
        """As :meth:`Connection.compare_swap`."""
        if (operation := self._sends.prepare_ask(COMPARE_SWAP, remote, expected, desired)) is None:
            return self._add(self._connection._compare_swap(remote, expected, desired))
        self._operations.append(operation)
        return operation

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        operations, self._operations = self._operations, []
        if kind is not None:
            for operation in operations:
                operation.cancel()
            return
        connection = self._connection
        if connection._state != "open":
            for operation in operations:
                operation.cancel()
            raise connection.lost_error("batch")
        rest: list[Operation] = []
        try:
            posted = await self._post_prepared(operations)
            if connection._state == "open":
                for operation in operations[posted:]:
                    if not operation.done():
                        rest.append(self._slow(operation))
                self._sends.submit_many(rest)
            else:  # since the first were posted
                for operation in operations[posted:]:
                    _give_up(operation, connection.lost_error("batch"))
            await _all_ended(operations, posted)
        except BaseException:
            for each in (*operations, *rest):
                each.cancel()
            raise

    async def _post_prepared(self, operations: list[Operation | OneSided]) -> int:
        """Posts from the first on, as many at a time as may be under way. Returns where that ends: at one that
        was not prepared, or is held up by something else."""
        before, posted = 0, self._sends.post_prepared(operations, 0)
        while before < posted < len(operations) and self._sends.one_sided == ONE_SIDED:
            if not isinstance(operations[posted], OneSided):
                break
            # For half of them; the device has the other half meanwhile.
            for half in operations[max(0, posted - ONE_SIDED // 2 - 1) : posted]:
                if not half.done():
                    if not _found(half):
                        await asyncio.wait([half])
                    break
            before, posted = posted, self._sends.post_prepared(operations, posted)
        return posted

    def _slow(self, operation: Operation | OneSided) -> Operation:
        """An operation that nothing held up when it was made, and that has to wait now."""
        if isinstance(operation, Operation):
            return operation
        connection, region = self._connection, operation.region
        if operation.kind == "write":
            slow = connection._write(operation.data, region, operation.notify)
        elif operation.kind == "read":
            slow = connection._read(region)
        elif operation.kind == "read_into":
            slow = connection._read_into(region, operation.data)
        elif operation.kind == "fetch_add":
            slow = connection._fetch_add(region, operation.compare_add)
        else:
            slow = connection._compare_swap(region, operation.compare_add, operation.swap)
        slow.add_done_callback(operation.follow)
        operation.add_done_callback(lambda _: slow.cancel())
        return slow


def _give_up(operation: Operation | OneSided, error: BaseException) -> None:
    """One that was never posted."""
    if isinstance(operation, Operation):
        operation.release()
    operation.fail(error)


def _found(operation: Operation | OneSided) -> bool:
    """Whether it is over when it was polled for, as an await does first."""
    if isinstance(operation, OneSided):
        operation.spin()
    return operation.done()


async def _all_ended(operations: list[Operation | OneSided], posted: int) -> None:
    """Waits for all, the last one first, for they end in order; raises the first error in the order given. Those
    from ``posted`` on take the long way, and are not to be found by polling."""
    for operation in reversed(operations[posted:]):
        if not operation.done():
            await asyncio.wait([operation])
    for operation in reversed(operations[:posted]):
        if not operation.done() and not _found(operation):
            await asyncio.wait([operation])
    for operation in operations:
        if not operation.cancelled() and (error := operation.exception()) is not None:
            raise error


def _word(name: str, value: int) -> int:
    """A 64-bit value, negative ones in two's complement."""
    if not -(1 << 63) <= value < _U64:
        raise MisuseError(f"{name}={value}: -2**63 to 2**64 - 1")
    return value % _U64


__all__ = ["Allocation", "Batch", "Connection", "ConnectionStatistics"]
