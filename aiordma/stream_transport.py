"""RdmaTransport: a connection as an asyncio transport, with a protocol above it.

Every callback comes when asyncio's TCP transport would make it; tests run both side by side. What a kernel does
for TCP is done here by two bounded windows. Outgoing: what was written waits in ``_out``, which is the write
buffer that the limits are about; a bounded part of it is with the connection at a time, as in a socket's send
buffer. Incoming: a task takes one message after the other and hands it to the protocol. While reading is paused
it takes none, so the peer runs out of credits and its own buffer fills up to its limit.

The end. close() sends what is buffered, and then closes the connection in order; the goodbye on its TCP connection
is the end of the stream, if no end was written before. Everything else (abort, a failure, a dead peer) is a
connection that ended out of order, and a ConnectionResetError for the protocol at the other side. A protocol is
told of its end once.

The names with an underscore that asyncio itself looks for in a transport (TLS upgrade, sendfile) are here too.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import logging
from asyncio import constants, transports
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import (
    ConnectionClosedError,
    ConnectionLostError,
    DeviceError,
    MemoryLimitError,
    MessageTooLargeError,
    ProtocolError,
    RdmaError,
    RetryExceededError,
)
from .protocol.stream import StreamReaderState, StreamWriterState
from .transport import Connection

logger = logging.getLogger("aiordma")

T = TypeVar("T")

#: Chunks from this size on travel by rendezvous, in pieces of at most the second. Bytes.
_LARGE = 64 << 10
_PIECE = 1024 << 10
#: What is with the connection at a time, as in a socket's send buffer.
_WINDOW_MESSAGES = 64
_WINDOW_BYTES = 4 << 20
#: Bytes handed to the protocol before other callbacks of the loop get a turn.
_TURN_BYTES = 256 << 10
#: Writes to a lost connection that are dropped in silence.
_SILENT_WRITES = 5


def stream_error(error: RdmaError) -> OSError:
    """What TCP would have raised: libraries tell these kinds apart. The cause is the error itself."""
    root: BaseException = error
    while isinstance(root.__cause__, RdmaError):
        root = root.__cause__
    if isinstance(root, RetryExceededError):
        translated: OSError = TimeoutError(errno.ETIMEDOUT, str(error))
    elif isinstance(root, DeviceError):
        translated = ConnectionAbortedError(errno.ECONNABORTED, str(error))
    else:
        translated = ConnectionResetError(errno.ECONNRESET, str(error))
    translated.__cause__ = error
    return translated


class RdmaTransport(transports._FlowControlMixin):
    """A byte stream over a connection: what :func:`aiordma.create_connection` returns, and what protocols of
    :func:`aiordma.create_server` get. All of :class:`asyncio.Transport`.

    Write buffer limits are those of asyncio (64 KiB and 16 KiB unless set); what is in the write buffer was not
    handed to the device yet. ``bytes`` (and views of them) are sent from where they are, other buffers are copied
    by :meth:`write`.

    ``get_extra_info`` knows ``peername`` and ``sockname`` (of the bootstrap's TCP connection), ``socket``
    (that connection's own: keepalive options act on how soon a dead peer is noticed, others have no effect on the
    stream), ``rdma_connection`` (the :class:`~aiordma.Connection`; its statistics are of interest, its messages
    are the transport's) and ``qp_num``.
    """

    if TYPE_CHECKING:  # typeshed leaves them out

        def _maybe_pause_protocol(self) -> None: ...
        def _maybe_resume_protocol(self) -> None: ...

    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.FALLBACK

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        protocol: asyncio.BaseProtocol,
        waiter: asyncio.Future[None] | None = None,
    ) -> None:
        names = {name: connection.get_extra_info(name) for name in ("peername", "sockname", "socket")}
        super().__init__({**names, "rdma_connection": connection, "qp_num": connection.qp_num}, loop)
        self._loop = loop
        self._connection = connection
        self._protocol = protocol
        small = connection.eager_size
        large = max(small, _LARGE)
        self._out = StreamWriterState(small=small, large=large, piece=max(large, _PIECE))
        self._in = StreamReaderState()
        self._in_flight = 0  # messages with the connection
        self._bytes_in_flight = 0
        self._flush_due = False  # a flush at the end of this turn of the loop is scheduled
        self._passes = True  # nothing that was written waits, and more may be: see _flush()
        self._send_first = connection.send_first
        self._write_error: OSError | None = None
        self._context = contextvars.copy_context()
        self._closing = False
        self._conn_lost = 0  # connection_lost() is scheduled, or done; counts writes from then on
        self._can_read = asyncio.Event()
        self._can_read.set()
        self._resumed: asyncio.Future[None] | None = None  # done when reading goes on
        self._reader: asyncio.Task[None] | None = None
        self._taking: asyncio.Task[None] | None = (
            None  # hands a message over that the protocol does not take yet
        )
        self._closer: asyncio.Task[None] | None = None
        self._takes = False  # the protocol takes what comes, all of it, at once: see _reading_changed()
        self._held = 0  # bytes that were taken and the protocol has not got yet
        self._turn_bytes = 0
        #: Done when the protocol was told of the end.
        self.ended: asyncio.Future[None] = loop.create_future()
        self._reading_changed()
        loop.call_soon(self._protocol.connection_made, self)
        loop.call_soon(self._start_reading)
        if waiter is not None:
            loop.call_soon(_set_result, waiter)

    # --- what it is ----------------------------------------------------------------------------------

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that gets the data."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another protocol from the next byte on; no callback tells it."""
        self._protocol = protocol
        self._reading_changed()

    def is_closing(self) -> bool:
        """True from :meth:`close`, :meth:`abort` or the loss of the connection on."""
        return self._closing

    def __repr__(self) -> str:
        state = "closed" if self.ended.done() else "closing" if self._closing else "open"
        reading = "reading" if self.is_reading() else "paused"
        return (
            f"<RdmaTransport {state} peer={self._connection.peer} {reading} "
            f"write_buffer={self._out.nbytes} in_flight={self._bytes_in_flight}>"
        )

    # --- reading -------------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """False when paused or closing."""
        return not self._closing and self._can_read.is_set()

    async def _readable(self) -> None:
        while not self._can_read.is_set():  # it may be paused again before a waiter runs
            await self._can_read.wait()

    def _reading_changed(self) -> None:
        buffered = isinstance(self._protocol, asyncio.BufferedProtocol)
        self._takes = self.is_reading() and not self._in.eof and not buffered

    def pause_reading(self) -> None:
        """No data for the protocol until :meth:`resume_reading`; the peer is slowed down. Idempotent."""
        if self.is_reading():
            self._can_read.clear()
            self._reading_changed()
            self._resumed = self._loop.create_future()
            self._connection.hold(self._resumed)
            if self._write_error is not None:  # it waited for the last data, and that does not come
                self._force_close(self._write_error)

    def resume_reading(self) -> None:
        """The opposite. Idempotent."""
        if not self._takes and not self._closing and not self._can_read.is_set():
            self._can_read.set()
            self._reading_changed()
            if self._resumed is not None and not self._resumed.done():
                self._resumed.set_result(None)

    def _start_reading(self) -> None:
        if not self._closing:
            name = f"aiordma stream reader {self._connection.peer}"
            self._reader = self._loop.create_task(self._read(), name=name)

    def _stop_reading(self) -> None:
        self._connection.stop_consuming()
        if self._taking is not None and self._taking is not _current_task(self._loop):
            self._taking.cancel()
        reader = self._reader
        if reader is not None and not reader.done() and reader is not _current_task(self._loop):
            reader.cancel()

    async def _read(self) -> None:
        """The reader task: until the connection or the transport ends."""
        try:
            await self._connection.consume(self._message)
        except ConnectionClosedError:
            await self._readable()
            self._peer_left()
        except ProtocolError as error:
            self._connection.fail(error)
            self._lost(error)
        except RdmaError as error:
            await self._readable()
            self._lost(error)
        except Exception as error:
            self._fatal_error(error, "Fatal read error on a stream")

    def _message(self, data: bytes) -> asyncio.Future[Any] | None:
        """A message has come; most often it is data for a protocol that takes it now, all of it. :meth:`_received`
        would do the same, with more steps."""
        turn_bytes = self._turn_bytes + len(data)
        if not self._takes or not data or turn_bytes >= _TURN_BYTES:
            self._held = len(data)
            name = f"aiordma stream reader {self._connection.peer}"
            self._taking = self._loop.create_task(self._received(data), name=name)
            return self._taking
        self._turn_bytes = turn_bytes
        try:
            self._context.run(self._protocol.data_received, data)  # type: ignore[attr-defined]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._callback_failed("data_received", error)
        return None

    async def _received(self, data: bytes) -> None:
        """One message for the protocol, or the end of the stream."""
        self._in.receive(len(data))
        self._reading_changed()
        await self._readable()  # paused while the message came: it waits here
        if self._closing:
            return
        if not data:
            self._end_of_stream()
            return
        rest = memoryview(data)
        while rest and not self._closing:
            await self._readable()
            rest = self._deliver(data, rest)
        self._turn_bytes += len(data)
        if self._turn_bytes >= _TURN_BYTES:
            self._turn_bytes = 0
            await asyncio.sleep(0)

    def _deliver(self, data: bytes, rest: memoryview) -> memoryview:
        """Hands over ``rest``, the end of ``data``; returns what the protocol had no room for."""
        protocol = self._protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            return self._fill(protocol, rest)
        data = data if len(rest) == len(data) else bytes(rest)
        self._held = 0
        self._guarded("data_received", protocol.data_received, data)  # type: ignore[attr-defined]
        return rest[:0]

    def _fill(self, protocol: asyncio.BufferedProtocol, rest: memoryview) -> memoryview:
        buffer = self._guarded("get_buffer", _get_buffer, protocol)
        if buffer is None:
            return rest[:0]
        nbytes = min(len(buffer), len(rest))
        buffer[:nbytes] = rest[:nbytes]
        self._held -= nbytes
        self._guarded("buffer_updated", protocol.buffer_updated, nbytes)
        return rest[nbytes:]

    def _end_of_stream(self) -> None:
        """The peer's stream ended: the protocol says whether ours goes on."""
        eof_received: Callable[[], bool | None] = self._protocol.eof_received  # type: ignore[attr-defined]
        keep_open = self._guarded("eof_received", eof_received)
        if not keep_open:
            self.close()

    def _peer_left(self) -> None:
        """The connection was closed in order: the end of the stream, and nobody hears us any more."""
        if self._closing:
            return
        if not self._in.eof:
            self._in.eof = True
            self._reading_changed()
            self._end_of_stream()
        if not self._closing and (self._write_error is not None or self._out.nbytes):
            self._force_close(self._write_error or _reset())

    def _lost(self, error: RdmaError) -> None:
        """The connection ended out of order."""
        self._force_close(self._write_error or stream_error(error))

    def _guarded(self, name: str, call: Callable[..., T], *args: Any) -> T | None:
        """A callback of the protocol; what it raises ends the connection, and only that."""
        try:
            return call(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._callback_failed(name, error)
            return None

    def _callback_failed(self, name: str, error: BaseException) -> None:
        self._fatal_error(error, f"Fatal error: protocol.{name}() call failed.")

    # --- writing -------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends ``data``; never blocks, and may buffer. Raises TypeError for what is no such buffer, RuntimeError
        after :meth:`write_eof`. Dropped after the connection was lost, or :meth:`close` called."""
        chunk = data if data.__class__ is bytes else _immutable(data)
        # The first write of a turn leaves at once, those that follow are gathered.
        if self._passes and chunk and self._send_first(chunk):
            return
        if self._out.eof:
            raise RuntimeError("write() after write_eof()")
        if not len(chunk):
            return
        if self._closing or self._write_error is not None:
            self._dropped_write()
            return
        first = not self._flush_due and not self._connection.sent_in_turn
        self._out.add(chunk)
        self._flush_at_turn()
        if first:
            self._post_pending()
        self._maybe_pause_protocol()

    def writelines(self, list_of_data: Any) -> None:
        """Writes them all, gathered: none leaves before the last one is there."""
        self._flush_at_turn()
        for data in list_of_data:
            self.write(data)

    def write_eof(self) -> None:
        """Ends our stream after what was written; the peer's goes on. Idempotent."""
        if self._closing or self._out.eof:
            return
        self._out.eof = True
        self._passes = False
        self._flush()

    def can_write_eof(self) -> bool:
        """True."""
        return True

    def get_write_buffer_size(self) -> int:
        """Bytes that were written and are not with the device yet."""
        return self._out.nbytes

    @property
    def _pending(self) -> bool:
        """True while something written is not with the device (a large piece: with the peer)."""
        return bool(self._in_flight) or not self._out.idle

    def _dropped_write(self) -> None:
        self._conn_lost += bool(self._conn_lost)
        if self._conn_lost > _SILENT_WRITES:
            logger.warning("%r: write() on a connection that is lost or closing", self)

    def _flush_at_turn(self) -> None:
        """What is written until then goes out together."""
        self._passes = False
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        self._flush_due = False
        self._flush()

    def _flush(self) -> None:
        """Sends what the window allows, and what depends on it."""
        self._post_pending()
        if self._conn_lost or self._write_error is not None:
            return
        self._passes = not (self._pending or self._flush_due or self._closing or self._out.eof)
        self._maybe_resume_protocol()  # which may write
        if self._closing and not self._conn_lost and not self._pending:
            self._close_connection()

    def _post_pending(self) -> None:
        while (
            self._in_flight < _WINDOW_MESSAGES
            and self._bytes_in_flight < _WINDOW_BYTES
            and (parts := self._out.take()) is not None
        ):
            self._post(parts)

    def _post(self, parts: list[memoryview]) -> None:
        data: bytes | memoryview = parts[0] if len(parts) == 1 else b"".join(parts)
        nbytes = len(data)
        try:
            operation = self._connection.send(data)
        except ConnectionLostError as error:
            if parts:  # the end of the stream was not needed any more
                self._write_failed(error)
            return
        except (MemoryLimitError, MessageTooLargeError, DeviceError):
            if nbytes <= self._connection.eager_size:
                raise
            # It cannot be registered (RLIMIT_MEMLOCK, mostly), or the peer's Config does not take it.
            self._out.only_small(parts)
            return
        if operation.done() and not operation.cancelled() and operation.exception() is None:
            return  # the device has it
        self._in_flight += 1
        self._bytes_in_flight += nbytes
        operation.add_done_callback(partial(self._sent, nbytes))

    def _sent(self, nbytes: int, operation: asyncio.Future[Any]) -> None:
        """The device has a message (the peer, if it is a large one), or will never have it."""
        self._in_flight -= 1
        self._bytes_in_flight -= nbytes
        error = None if operation.cancelled() else operation.exception()
        if self._conn_lost:
            return
        # After a close in order, what was with the device counts as sent, as with TCP's kernel: whether the
        # acknowledgement or the message was late, nobody here can know.
        if isinstance(error, RdmaError) and not (isinstance(error, ConnectionClosedError) and self._out.idle):
            self._write_failed(error)
        else:
            self._flush()

    def _write_failed(self, error: RdmaError) -> None:
        """There is a gap in our stream now. If it is because the connection is gone, what the peer sent before is
        still for the protocol, if it reads."""
        if self._conn_lost or self._write_error is not None:
            return
        self._write_error = stream_error(error)
        self._passes = False
        self._out.clear()
        gone = self._connection.is_closing()
        if not gone or not self.is_reading() or self._reader is None or self._reader.done():
            self._force_close(self._write_error)

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stops reading, sends what was written and closes; then the protocol's ``connection_lost(None)``.

        That waits for a peer that does not read, as long as it lives; :meth:`abort` does not. Idempotent.
        """
        if self._closing:
            return
        self._closing = True
        self._passes = False
        self._reading_changed()
        self._stop_reading()
        if self._write_error is not None:
            self._force_close(self._write_error)
        else:
            self._flush()

    def abort(self) -> None:
        """Closes at once; what was not sent is lost. The peer gets a ConnectionResetError."""
        self._force_close(None)

    def _close_connection(self) -> None:
        """Everything was sent: closes in order, and tells the protocol when the device is done with it."""
        self._conn_lost += 1
        name = f"aiordma stream close {self._connection.peer}"
        self._closer = self._loop.create_task(self._close_in_order(), name=name)

    async def _close_in_order(self) -> None:
        connection, reader = self._connection, self._reader
        try:
            if reader is not None:
                await asyncio.wait([reader])  # what it was taking is in the inbox again
            if (self._held or connection.unread) and not connection.is_closing():
                # As TCP (RFC 2525, 2.17): the peer is not to believe that all it sent was taken.
                connection.fail(ConnectionLostError("the stream was closed before all of it was read"))
            else:
                connection.close()
            await connection.wait_closed()
        finally:
            connection.close()  # should we have been cancelled
            self._call_connection_lost(None)

    def _fatal_error(self, exc: BaseException, message: str = "Fatal error on transport") -> None:
        """As asyncio's: connection errors are the protocol's to know, others go to the exception handler."""
        if not isinstance(exc, OSError):
            self._loop.call_exception_handler(
                {"message": message, "exception": exc, "transport": self, "protocol": self._protocol}
            )
        self._force_close(exc)

    def _force_close(self, exc: BaseException | None) -> None:
        """Ends at once; only the first call counts."""
        if self._conn_lost:
            return
        self._conn_lost += 1
        self._closing = True
        self._passes = False
        self._reading_changed()
        self._stop_reading()
        self._out.clear()
        if not self._connection.is_closing():
            self._connection.fail(ConnectionLostError("the stream was aborted"))
        self._loop.call_soon(self._call_connection_lost, exc)

    def _call_connection_lost(self, exc: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(exc)  # type: ignore[arg-type]
        finally:
            if not self.ended.done():
                self.ended.set_result(None)


def _reset() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, "the peer closed the connection and did not take all data")


def _immutable(data: bytes | bytearray | memoryview) -> bytes | memoryview:
    """``data`` as something that nobody changes any more: itself, if that is sure."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"a bytes-like object is needed, not {type(data).__name__!r}")
    if isinstance(data, memoryview) and data.obj.__class__ is bytes and data.c_contiguous:
        return data.cast("B")
    return bytes(data)


def _get_buffer(protocol: asyncio.BufferedProtocol) -> memoryview:
    buffer = memoryview(protocol.get_buffer(-1)).cast("B")
    if not len(buffer):
        raise RuntimeError("get_buffer() returned an empty buffer")
    return buffer


def _current_task(loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any] | None:
    return asyncio.current_task(loop)


def _set_result(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


__all__ = ["RdmaTransport", "stream_error"]
