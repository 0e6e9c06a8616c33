"""Calls as their callers see them: a unary call is a future; the other kinds are objects to read and write.

All of them begin when they are made, and go on whether or not somebody awaits them, until their status has come,
their deadline has passed or they were cancelled. None has a task of its own, except to send the requests of an
iterator that was given, and where interceptors wrap a unary call.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from ..errors import MisuseError
from ..protocol.rpc import CallKind, Metadata, Payload, StatusCode, StatusFrame, end_frame
from ..protocol.rpc_calls import ReceiveWindow, SendWindow
from .codec import Codec, InvalidMessage
from .context import EOF, EndOfStream, InvalidReplyError
from .errors import RpcError, RpcTimeoutError, status_error
from .pacing import Incoming, Outgoing, Sent, retrieve, send_frame

if TYPE_CHECKING:
    from .client import RpcClient

T = TypeVar("T")


_init, _await = asyncio.Future.__init__, asyncio.Future.__await__
_NO_METADATA: Metadata = types.MappingProxyType({})


def _too_late(method: str) -> RpcTimeoutError:
    return RpcTimeoutError(StatusCode.DEADLINE_EXCEEDED, "not answered in time", method=method)


class UnaryCall(asyncio.Future[T]):
    """One request, one reply: ``reply = await client.unary(...)``.

    Awaiting raises :class:`RpcError`. Cancelling it (or the task that awaits it) tells the server to cancel; a
    call that was not sent yet never is.
    """

    __slots__ = (
        "_client",
        "_codec",
        "_operation",
        "_timer",
        "_trailing",
        "abandoned",
        "call_id",
        "method",
    )
    kind = CallKind.UNARY
    requests_ended = True
    send_window: SendWindow | None = None
    receive_window: ReceiveWindow | None = None
    abandoned: bool

    def __init__(self, client: RpcClient, method: str, codec: Codec) -> None:
        _init(self, loop=client._loop)
        self.method = method
        self.call_id = -1  # until it is sent
        self._client = client
        self._codec = codec
        self._operation: Sent | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._trailing = _NO_METADATA

    # --- for the caller ------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, T]:
        client = self._client
        # The reply may come faster than the event loop turns. With several under way it completes them together.
        if len(client._calls.pending) == 1 and not self.done():
            client.connection.spin(self)
        return _await(self)

    __iter__ = __await__

    def code(self) -> StatusCode | None:
        """How the call ended, None while it has not."""
        if not self.done():
            return None
        if self.cancelled():
            return StatusCode.CANCELLED
        error = self.exception()
        if error is None:
            return StatusCode.OK
        return error.code if isinstance(error, RpcError) else StatusCode.UNKNOWN

    def details(self) -> str:
        """The text that came with a status other than OK."""
        error = self.exception() if self.done() and not self.cancelled() else None
        return error.details if isinstance(error, RpcError) else ""

    def trailing_metadata(self) -> Metadata:
        """The metadata that came with the status; empty before."""
        return self._trailing

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancels the call; False when it has ended already."""
        if not super().cancel(msg):
            return False
        self._over()
        self._client._abandon(self, self._operation)
        return True

    # --- for the client ------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        if not self.done():
            self._over()
            self.set_exception(error)
            self.exception()  # seen: nobody need await a call

    def _expired(self) -> None:
        self._timer = None
        self._fail(_too_late(self.method))
        self._client._abandon(self, self._operation)

    def _status(self, frame: StatusFrame) -> None:
        self._trailing = frame.metadata
        if frame.code:  # not OK
            self._fail(status_error(frame.code, frame.details, self.method, frame.metadata))
            return
        self._reply(frame.payload)

    def _reply(self, payload: Payload) -> None:
        try:
            reply = self._codec.decode(payload)
        except InvalidMessage as error:
            invalid = InvalidReplyError(str(error), method=self.method)
            invalid.__cause__ = error
            self._fail(invalid)
            return
        if not self.done():
            self._over()
            self.set_result(reply)

    def _over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class InterceptedCall(UnaryCall[T]):
    """A unary call within interceptors: ``chain`` is what they make of it."""

    __slots__ = ("_task", "inner")

    def __init__(self, client: RpcClient, method: str, codec: Codec) -> None:
        super().__init__(client, method, codec)
        self.inner: UnaryCall[Any] | None = None  # the last that was made
        self._task: asyncio.Task[T] | None = None

    def run(self, chain: Coroutine[Any, Any, T]) -> None:
        """Starts the interceptors."""
        self._task = self._client._start_task(chain, f"aiordma RPC interceptors of {self.method}")
        self._task.add_done_callback(self._chain_ended)

    def trailing_metadata(self) -> Metadata:
        """That of the last call that was made."""
        return self.inner.trailing_metadata() if self.inner is not None else {}

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancels interceptors and call."""
        if not super().cancel(msg):
            return False
        if self._task is not None:
            self._task.cancel()
        return True

    def _chain_ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            super().cancel()
            return
        error = task.exception()
        if isinstance(error, Exception):
            self._fail(error)
        elif error is None and not self.done():
            self.set_result(task.result())


# --- streams ------------------------------------------------------------------------------------------


class StreamCall(Generic[T]):
    """What the calls with streams have in common. Use it as ``async with client.bidi(...) as call``: a call that
    has not ended by the end of the block is cancelled then."""

    def __init__(self, client: RpcClient, method: str, kind: CallKind, codec: Codec) -> None:
        self.method = method
        self.kind = kind
        self._client = client
        self._loop = client._loop
        self._codec = codec
        self.call_id = -1  # until it is sent
        self.abandoned = False
        self.requests_ended = False
        self.send_window: SendWindow | None = None
        self.receive_window: ReceiveWindow | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._incoming: Incoming | None = None
        self._outgoing: Outgoing | None = None
        self._ended = self._loop.create_future()  # its result is the code
        self._error: RpcError | None = None
        self._trailing: Metadata = {}
        self._reply: asyncio.Future[T] | None = None

    # --- for the caller ------------------------------------------------------------------------------

    def done(self) -> bool:
        """Whether the call has ended; replies may still be there to be read."""
        return self._ended.done()

    def code(self) -> StatusCode | None:
        """How the call ended, None while it has not."""
        return self._ended.result() if self._ended.done() else None

    def details(self) -> str:
        """The text that came with a status other than OK."""
        return self._error.details if self._error is not None else ""

    def trailing_metadata(self) -> Metadata:
        """The metadata that came with the status; empty before."""
        return self._trailing

    async def wait(self) -> StatusCode:
        """Waits for the end of the call and returns its code. Cancelled: the call goes on."""
        await asyncio.wait([self._ended])
        code: StatusCode = self._ended.result()
        return code

    def cancel(self) -> bool:
        """Cancels the call; who reads or writes gets :class:`RpcError` with CANCELLED. False when it has ended
        already."""
        if self.done():
            return False
        self._stop(RpcError(StatusCode.CANCELLED, "cancelled here", method=self.method))
        return True

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Has ``callback(call)`` called from the event loop when the call has ended."""
        self._ended.add_done_callback(lambda _: callback(self))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __repr__(self) -> str:
        code = self.code()
        return f"<{type(self).__name__} {self.method} {'open' if code is None else code.name}>"

    # --- for the client ------------------------------------------------------------------------------

    def _begin(self) -> None:
        connection = self._client.connection
        if self.receive_window is not None:
            self._incoming = Incoming(self._loop, connection, self.receive_window, self.call_id)
        if self.send_window is not None:
            self._outgoing = Outgoing(self._loop, connection, self.send_window, self.call_id)
        if not self.kind & 2:
            self._reply = self._loop.create_future()

    def _feed(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._feeder = self._client._start_task(
            self._send_all(requests), f"aiordma RPC requests of {self.method}"
        )

    async def _send_all(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        try:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    await self._write(request)
            else:
                for request in requests:
                    await self._write(request)
            self._end_requests()
        except RpcError as error:
            self._stop(error)
        except Exception as error:
            details = f"the requests raised {type(error).__name__}: {error}"
            failure = RpcError(StatusCode.CANCELLED, details, method=self.method)
            failure.__cause__ = error
            self._stop(failure)

    async def _write(self, request: Any) -> None:
        assert self._outgoing is not None
        if self.requests_ended:
            raise MisuseError(f"{self.method}: done_writing() was called")
        payload = self._client._encode(request)
        if len(payload) > self._client.max_message_size:
            raise self._client._too_large("a request", payload, self.method)
        await self._outgoing.send(payload)

    def _end_requests(self) -> None:
        if self.call_id < 0 or self.requests_ended or self.done():
            return
        self.requests_ended = True
        if not self._client.connection.is_closing():
            send_frame(self._client.connection, end_frame(self.call_id))

    def _message(self, payload: Payload) -> None:
        assert self._incoming is not None
        self._incoming.put(payload)

    def _window_opened(self) -> None:
        assert self._outgoing is not None
        self._outgoing.opened()

    def _status(self, frame: StatusFrame) -> None:
        self._trailing = frame.metadata
        if frame.code:  # not OK
            self._fail(status_error(frame.code, frame.details, self.method, frame.metadata), drop=False)
            return
        if self._reply is not None and not self._reply.done():
            try:
                self._reply.set_result(self._codec.decode(frame.payload))
            except InvalidMessage as error:
                invalid = InvalidReplyError(str(error), method=self.method)
                invalid.__cause__ = error
                self._fail(invalid)
                return
        self._over(StatusCode.OK)
        if self._incoming is not None:
            self._incoming.end()

    def _expired(self) -> None:
        self._timer = None
        self._stop(_too_late(self.method))

    def _stop(self, error: RpcError) -> None:
        """Ends the call from here."""
        if not self.done():
            self._fail(error)
            self._client._abandon(self, None)

    def _fail(self, error: RpcError, *, drop: bool = True) -> None:
        if self.done():
            return
        self._error = error
        if self._incoming is not None:
            self._incoming.end(self._new_error, drop=drop)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
            retrieve(self._reply)
        self._over(error.code)

    def _new_error(self) -> Exception:
        """An exception for one more reader or writer."""
        error = self._error
        if error is None:
            return RpcError(
                StatusCode.ABORTED, "the server ended the call, and reads no more", method=self.method
            )
        again = status_error(error.code, error.details, self.method, error.trailing_metadata)
        again.__cause__ = error
        return again

    def _over(self, code: StatusCode) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ended.set_result(code)
        if self._outgoing is not None:
            self._outgoing.end(self._new_error)
        if self._feeder is not None:
            self._feeder.cancel()


class _Readable(StreamCall[T]):
    """Replies are a stream."""

    async def read(self) -> T | EndOfStream:
        """The next reply, or :data:`EOF` when all have been read and the call ended well.

        Raises :class:`RpcError` when it ended otherwise (after the replies that came before, unless it was ended
        here), and :class:`InvalidReplyError` for a reply that is not of its type. Cancelled: no reply is lost.
        """
        if self._incoming is None:  # never begun
            raise self._new_error()
        payload = await self._incoming.take()
        if payload is None:
            return EOF
        try:
            reply: T = self._codec.decode(payload)
        except InvalidMessage as error:
            raise InvalidReplyError(str(error), method=self.method) from error
        return reply

    def __aiter__(self) -> Self:
        """Replies until the call has ended well; else :class:`RpcError` is raised. Cancelled in between, the call
        is cancelled."""
        return self

    async def __anext__(self) -> T:
        try:
            reply = await self.read()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(reply, EndOfStream):
            raise StopAsyncIteration
        return reply


class _Writable(StreamCall[T]):
    """Requests are a stream."""

    async def write(self, request: Any) -> None:
        """Sends one request; waits while the server does not take those before.

        Raises :class:`RpcError` when the call has ended or the request is too large, and
        :class:`~aiordma.errors.MisuseError` after :meth:`done_writing`, or when the requests are an iterable's.
        Cancelled: the request has been sent, or will not be.
        """
        if self._feeder is not None:
            raise MisuseError(f"{self.method}: its requests come from the iterable it was given")
        if self._outgoing is None:
            raise self._new_error()
        await self._write(request)

    async def done_writing(self) -> None:
        """Tells the server that no more requests follow. Idempotent; does not wait."""
        self._end_requests()


class ServerStreamCall(_Readable[T]):
    """One request, many replies: ``async for reply in client.server_stream(...)``."""


class ClientStreamCall(_Writable[T]):
    """Many requests, one reply: ``await call.write(...)``, ``await call.done_writing()``, ``reply = await call``.

    Awaiting raises :class:`RpcError`; when the task that awaits is cancelled, so is the call.
    """

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait_reply().__await__()

    async def _wait_reply(self) -> T:
        if self._reply is None:
            raise self._new_error()
        try:
            return await self._reply
        except asyncio.CancelledError:
            self.cancel()
            raise


class BidiCall(_Readable[T], _Writable[T]):
    """Many requests, many replies, in any order: write and read, in one task or in two."""
