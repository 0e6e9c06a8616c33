"""The client: calls methods of the peer over one connection, any number at a time.

One task reads and hands what comes to the calls; a call is an entry in its table.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from ..errors import ConnectionLostError, MisuseError, ProtocolError, RdmaError
from ..large_messages import LargeSend
from ..protocol.rpc import (
    CallKind,
    MessageFrame,
    Metadata,
    Payload,
    StatusCode,
    StatusFrame,
    call_head,
    cancel_frame,
    check_method,
    check_timeout,
    decode,
    encode_metadata,
    plain_call_frame,
    plain_reply,
)
from ..protocol.rpc_calls import CallerCalls
from ..transport import Connection
from .builtin import HEALTH, Health, HealthReply, HealthRequest
from .calls import (
    BidiCall,
    ClientStreamCall,
    InterceptedCall,
    ServerStreamCall,
    StreamCall,
    UnaryCall,
)
from .codec import COPY_LIMIT, InvalidMessage, codec_for, encode_request
from .errors import RpcConnectionError, RpcError, RpcTimeoutError
from .interceptors import CallDetails, ClientInterceptor, ProceedStream, ProceedUnary
from .pacing import JOIN_LIMIT, Sent, send_frame, send_whole, slices
from .server import MAX_MESSAGE_SIZE

T = TypeVar("T")
C = TypeVar("C", bound=StreamCall[Any])
Requests = AsyncIterable[Any] | Iterable[Any] | None
_Call = UnaryCall[Any] | StreamCall[Any]
#: Names of methods as they travel, remembered. TypeError for what cannot be hashed.
_method_name = functools.lru_cache(maxsize=1024)(check_method)


@dataclass(frozen=True, slots=True)
class RpcClientStatistics:
    """A snapshot: ``pending`` calls have no status yet; ``abandoned`` ones of them nobody waits for."""

    pending: int
    abandoned: int
    calls: int


class RpcClient:
    """Calls methods of the peer: ``async with RpcClient(connection) as client``.

    While it is open it alone receives on the connection. It does not close the connection: that is for who made
    it. ``max_message_size`` in bytes is for requests and replies; ``interceptors`` see
    :class:`ClientInterceptor`.

    What the four kinds of calls have in common: ``request`` is a bytes-like object or anything that pydantic can
    turn into JSON by its own type; ``reply_type`` is ``bytes`` or the type that replies are validated as.
    ``timeout`` in seconds is for the whole call, and travels with it; None is for ever. ``metadata`` is a mapping:
    keys of ``a-z0-9_.-``, values text, or bytes for keys that end in ``-bin``; 8192 bytes at most.

    A call fails with :class:`RpcError`: :class:`RpcTimeoutError` (also a TimeoutError) after its deadline,
    :class:`RpcConnectionError` (also a ConnectionLostError) when the connection ends first: the call may have run
    or not. Bytes-like payloads larger than 64 KiB are not copied, and must not change until the call has ended.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        interceptors: Sequence[ClientInterceptor] = (),
        max_message_size: int = MAX_MESSAGE_SIZE,
    ) -> None:
        self.connection = connection
        self.max_message_size = max_message_size
        self._plain = min(COPY_LIMIT, max_message_size)  # replies up to this are copied, and allowed
        self._interceptors = tuple(interceptors)
        self._loop = asyncio.get_running_loop()
        self._calls: CallerCalls[_Call] = CallerCalls()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._closed = False
        self._made = 0
        self._breach: ProtocolError | None = None  # by the server: it is not heard any more

    async def __aenter__(self) -> Self:
        if self._reader is not None or self._closed:
            raise MisuseError("an RpcClient is entered once")
        name = f"aiordma RPC client of {self.connection.peer}"
        self._reader = self._loop.create_task(self._read(), name=name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    # --- calls ---------------------------------------------------------------------------------------

    @overload
    def unary(
        self,
        method: str,
        request: Any = ...,
        *,
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> UnaryCall[bytes]: ...

    @overload
    def unary(
        self,
        method: str,
        request: Any = ...,
        *,
        reply_type: type[T],
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> UnaryCall[T]: ...

    def unary(
        self,
        method: str,
        request: Any = b"",
        *,
        reply_type: Any = bytes,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> UnaryCall[Any]:
        """One request, one reply: ``reply = await client.unary("kv/get", GetRequest(key="a"), reply_type=Reply)``.

        Raises :class:`~aiordma.errors.MisuseError` at once for a bad method, timeout, metadata or request;
        everything else comes when the call is awaited.
        """
        codec = codec_for(reply_type)
        if not self._interceptors:
            call: UnaryCall[Any] = UnaryCall(self, method, codec)
            self._send_call(call, self._encode(request), timeout, metadata)
            return call
        outer: InterceptedCall[Any] = InterceptedCall(self, method, codec)
        self._check_open()

        async def proceed(request: Any, details: CallDetails) -> Any:
            inner: UnaryCall[Any] = UnaryCall(self, details.method, codec)
            outer.inner = inner
            self._send_call(inner, self._encode(request), details.timeout, details.metadata)
            return await inner

        details = CallDetails(method, CallKind.UNARY, timeout, metadata or {})
        outer.run(self._intercept(proceed)(request, details))
        return outer

    def _intercept(self, proceed: ProceedUnary) -> Callable[[Any, CallDetails], Coroutine[Any, Any, Any]]:
        def wrap(interceptor: ClientInterceptor, inner: ProceedUnary) -> Any:
            return lambda request, details: interceptor.unary(inner, request, details)

        for interceptor in reversed(self._interceptors):
            proceed = wrap(interceptor, proceed)
        return proceed  # type: ignore[return-value]

    @overload
    def server_stream(
        self,
        method: str,
        request: Any = ...,
        *,
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> ServerStreamCall[bytes]: ...

    @overload
    def server_stream(
        self,
        method: str,
        request: Any = ...,
        *,
        reply_type: type[T],
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> ServerStreamCall[T]: ...

    def server_stream(
        self,
        method: str,
        request: Any = b"",
        *,
        reply_type: Any = bytes,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> ServerStreamCall[Any]:
        """One request, a stream of replies. Errors as :meth:`unary`."""
        details = CallDetails(method, CallKind.SERVER_STREAM, timeout, metadata or {})
        return self._stream(ServerStreamCall, details, reply_type, payload=self._encode(request))

    @overload
    def client_stream(
        self,
        method: str,
        requests: Requests = ...,
        *,
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> ClientStreamCall[bytes]: ...

    @overload
    def client_stream(
        self,
        method: str,
        requests: Requests = ...,
        *,
        reply_type: type[T],
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> ClientStreamCall[T]: ...

    def client_stream(
        self,
        method: str,
        requests: Requests = None,
        *,
        reply_type: Any = bytes,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> ClientStreamCall[Any]:
        """A stream of requests, one reply. ``requests`` is an iterable, plain or asynchronous, that a task of the
        client sends; None: the caller writes them. Errors as :meth:`unary`."""
        _check_requests(requests)
        details = CallDetails(method, CallKind.CLIENT_STREAM, timeout, metadata or {})
        return self._stream(ClientStreamCall, details, reply_type, requests=requests)

    @overload
    def bidi(
        self,
        method: str,
        requests: Requests = ...,
        *,
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> BidiCall[bytes]: ...

    @overload
    def bidi(
        self,
        method: str,
        requests: Requests = ...,
        *,
        reply_type: type[T],
        timeout: float | None = ...,
        metadata: Metadata | None = ...,
    ) -> BidiCall[T]: ...

    def bidi(
        self,
        method: str,
        requests: Requests = None,
        *,
        reply_type: Any = bytes,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> BidiCall[Any]:
        """A stream of requests, as in :meth:`client_stream`, and a stream of replies. Errors as :meth:`unary`."""
        _check_requests(requests)
        details = CallDetails(method, CallKind.BIDI, timeout, metadata or {})
        return self._stream(BidiCall, details, reply_type, requests=requests)

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """The serving status of a service of the peer, "" for the server. Raises :class:`RpcError`, NOT_FOUND for
        a service that is not there."""
        request = HealthRequest(service=service)
        return (await self.unary(HEALTH, request, reply_type=HealthReply, timeout=timeout)).status

    # --- how calls begin -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed or self._reader is None:
            raise MisuseError("the RpcClient is not open: use it inside `async with RpcClient(connection)`")

    def _encode(self, request: Any) -> Payload:
        """Raises :class:`MisuseError`."""
        try:
            return encode_request(request)
        except InvalidMessage as error:
            raise MisuseError(f"the request is not valid: {error}") from error

    def _stream(
        self,
        cls: type[C],
        details: CallDetails,
        reply_type: Any,
        *,
        payload: Payload = b"",
        requests: Requests = None,
    ) -> C:
        """A streaming call of class ``cls``, begun inside the interceptors."""

        def begin(details: CallDetails) -> StreamCall[Any]:
            call = cls(self, details.method, details.kind, codec_for(reply_type))
            if self._send_call(call, payload, details.timeout, details.metadata):
                call._begin()
                if requests is not None:
                    call._feed(requests)
            return call

        def wrap(interceptor: ClientInterceptor, inner: ProceedStream) -> ProceedStream:
            return lambda details: interceptor.stream(inner, details)

        proceed: ProceedStream = begin
        for interceptor in reversed(self._interceptors):
            proceed = wrap(interceptor, proceed)
        call = proceed(details)
        assert isinstance(call, cls)
        return call

    def _send_call(
        self,
        call: _Call,
        payload: Payload,
        timeout: float | None,
        metadata: Metadata | None,
    ) -> bool:
        """Sends the call frame; False when the call has failed already."""
        self._check_open()
        method = call.method
        try:
            name = _method_name(method)
        except TypeError:  # one that cannot be hashed
            name = check_method(method)
        microseconds = 0 if timeout is None else check_timeout(timeout)
        encoded = encode_metadata(metadata) if metadata else b""
        if len(payload) > self.max_message_size or (timeout is not None and timeout <= 0):
            call._fail(self._refusal(method, payload, timeout))
            return False
        kind, call_id = call.kind, self._calls.begin(call)
        try:
            if payload.__class__ is bytes and len(payload) <= JOIN_LIMIT and not (kind or encoded):
                operation = send_whole(
                    self.connection, plain_call_frame(call_id, name, microseconds, payload)
                )
            else:
                head = call_head(call_id, kind, name, microseconds, encoded)
                operation = send_frame(self.connection, head, payload)
        except ConnectionLostError as error:
            self._calls.forget(call)
            call._fail(RpcConnectionError(error, call.method))
            return False
        except RdmaError as error:
            self._calls.forget(call)
            call._fail(self._not_sent(error, call.method))
            return False
        self._made += 1
        if isinstance(operation, LargeSend):
            operation.add_done_callback(lambda sent: self._large_ended(call, sent))
        if isinstance(call, UnaryCall):
            call._operation = operation
        if timeout is not None:
            call._timer = self._loop.call_later(timeout, call._expired)
        return True

    def _refusal(self, method: str, payload: Payload, timeout: float | None) -> RpcError:
        """Why a call is not even sent."""
        if timeout is not None and timeout <= 0:
            return RpcTimeoutError(StatusCode.DEADLINE_EXCEEDED, "not sent: no time is left", method=method)
        return self._too_large("a request", payload, method)

    def _too_large(self, what: str, payload: Payload, method: str) -> RpcError:
        details = f"{what} of {len(payload)} bytes; this client allows {self.max_message_size}"
        return RpcError(StatusCode.RESOURCE_EXHAUSTED, details, method=method)

    def _large_ended(self, call: _Call, sent: asyncio.Future[Any]) -> None:
        """A large request was taken by the server, or could not be sent, which does not end the connection."""
        if not self.connection.is_closing() and not sent.cancelled() and (error := sent.exception()):
            self._calls.forget(call)
            call._fail(self._not_sent(error, call.method))

    @staticmethod
    def _not_sent(error: BaseException, method: str) -> RpcError:
        failure = RpcError(
            StatusCode.RESOURCE_EXHAUSTED, f"the request cannot be sent: {error}", method=method
        )
        failure.__cause__ = error
        return failure

    def _start_task(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task that ends before the client has closed."""
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- how calls end -------------------------------------------------------------------------------

    def _abandon(self, call: _Call, operation: Sent | None) -> None:
        """Nobody waits for the call any more."""
        under_way = operation is None or operation.done()
        if isinstance(operation, LargeSend):
            under_way = under_way or operation.in_flight > 0
        if operation is not None and not under_way:
            operation.cancel()  # it waits for a credit or a slot: now it is never sent
            self._calls.forget(call)
        elif self._calls.abandon(call) and not self.connection.is_closing():
            send_frame(self.connection, cancel_frame(call.call_id))

    async def _read(self) -> None:
        """The reader task: hands each frame to its call until the connection ends."""
        try:
            await self.connection.consume(self._frame, inline=True)
        except RdmaError as error:
            # The end of the connection; or no memory for a large reply.
            if not self.connection.is_closing():
                self.connection.fail(error)
            self._connection_ended()

    def _frame(self, message: bytes) -> None:
        if self._breach is not None:
            return
        if len(message) <= self._plain and (reply := plain_reply(message)) is not None:
            call = self._calls.replied(reply[0])
            if call is not None:
                assert isinstance(call, UnaryCall)
                call._reply(reply[1])
                return
        try:
            self._received(message)
        except ProtocolError as error:
            self._breach = error
            self.connection.fail(error)

    def _received(self, message: bytes) -> None:
        frame = decode(slices(message))
        call = self._calls.received(frame)
        if call is None:
            return
        if isinstance(frame, StatusFrame | MessageFrame) and len(frame.payload) > self.max_message_size:
            call._fail(self._too_large("a reply", frame.payload, call.method))
            self._abandon(call, None)
        elif isinstance(frame, StatusFrame):
            call._status(frame)
        elif isinstance(call, StreamCall):
            if isinstance(frame, MessageFrame):
                call._message(frame.payload)
            else:
                call._window_opened()

    def _connection_ended(self) -> None:
        """Each pending call gets an exception of its own, with the reason."""
        self._fail_all(
            lambda method: RpcConnectionError(self.connection.lost_error(f"call of {method!r}"), method)
        )

    def _fail_all(self, make_error: Callable[[str], RpcError]) -> None:
        for call in self._calls.open_calls():
            call._fail(make_error(call.method))

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends pending calls with CANCELLED, and tells the server. Returns at once; see :meth:`wait_closed`.
        Idempotent."""
        if self._closed:
            return
        self._closed = True
        for call in self._calls.open_calls():
            call._fail(RpcError(StatusCode.CANCELLED, "the client was closed", method=call.method))
            self._abandon(call, call._operation if isinstance(call, UnaryCall) else None)
        for task in self._tasks:
            task.cancel()
        if self._reader is not None:
            self._reader.cancel()

    async def wait_closed(self) -> None:
        """Waits until the tasks of the client have ended; the connection can then be received on again."""
        tasks = {*self._tasks, *([self._reader] if self._reader is not None else [])}
        if tasks:
            await asyncio.wait(tasks)

    def statistics(self) -> RpcClientStatistics:
        """A snapshot of the calls."""
        return RpcClientStatistics(
            pending=len(self._calls.pending), abandoned=self._calls.abandoned, calls=self._made
        )


def _check_requests(requests: Requests) -> None:
    """One message is not a stream of messages, though bytes can be iterated. Raises :class:`MisuseError`."""
    if requests is None:
        return
    if isinstance(requests, bytes | bytearray | memoryview | str) or not isinstance(
        requests, AsyncIterable | Iterable
    ):
        raise MisuseError(f"requests are an iterable of messages, not {type(requests).__name__}")
