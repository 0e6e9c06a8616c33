"""Remote procedure calls over a connection: bytes in, bytes out, any number at a time.

The frames and the rules are in protocol/rpc.py; here are the tasks. A server runs each call in a task of its
own, and answers from the task's done callback: so a call is answered once however it ended, even if it was
cancelled before its first step. A client has one task that reads answers; a call is a future in its table.

Server::

    server = RpcServer({"echo": echo})              # async def echo(payload: bytes) -> bytes
    async with aiordma.serve(server, host, port):
        ...

Client::

    async with aiordma.connect(host, port) as conn, RpcClient(conn) as client:
        reply = await client.call("echo", b"hello", timeout=1.0)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, overload

from .errors import (
    ConnectionClosedError,
    ConnectionLostError,
    MessageTooLargeError,
    MisuseError,
    ProtocolError,
    RdmaError,
)
from .large_messages import LargeSend
from .protocol.rpc import (
    HEADER_SIZE,
    CalleeLedger,
    CallerLedger,
    CallFrame,
    CancelFrame,
    ErrorFrame,
    ReplyFrame,
    Status,
    call_overhead,
    check_method,
    check_status,
    decode,
    encode,
    encode_error,
)
from .send_queue import Operation
from .transport import Connection

Bytes = bytes | bytearray | memoryview
Method = Callable[[bytes], Awaitable[Bytes]]


class RpcError(RdmaError):
    """A call has no result. Raised by :meth:`RpcClient.call`, and by methods on purpose.

    Attributes: ``status``, one of :class:`~aiordma.protocol.rpc.Status` (``"internal"``, ``"not-found"``,
    ``"invalid"``, ``"cancelled"``, ``"too-large"``, ``"busy"``) or a word of the application's (1 to 32 of
    ``a-z0-9-``, a letter first); ``details``, text for people that the caller gets to see; ``method``, set at
    the caller.
    """

    def __init__(self, status: str, details: str = "", *, method: str | None = None) -> None:
        self.status = check_status(status)
        self.details = details
        self.method = method
        called = f"call of {method!r}: " if method is not None else ""
        super().__init__(f"{called}{status}{': ' + details if details else ''}")


# --- the server ---------------------------------------------------------------------------------------


class RpcServer:
    """Methods by name, callable by every client: give it to :func:`aiordma.serve` as its handler.

    A method is a coroutine function from bytes to bytes. It raises :class:`RpcError` to tell the caller
    something; whatever else it raises harms only this call: the caller is told the exception's type, the
    loop's exception handler gets all of it. It is cancelled when the caller cancels, and when the connection
    ends. ``max_concurrent`` (1 or more) bounds the calls of one connection that run at a time, further ones
    end with status ``"busy"``.
    """

    def __init__(self, methods: Mapping[str, Method] | None = None, *, max_concurrent: int = 1024) -> None:
        if max_concurrent < 1:
            raise MisuseError(f"max_concurrent={max_concurrent}: 1 or more")
        self.max_concurrent = max_concurrent
        self._methods: dict[str, Method] = {}
        for name, function in (methods or {}).items():
            self.add(name, function)

    def add(self, name: str, function: Method) -> None:
        """Adds a method. Raises :class:`MisuseError` for a bad name (1 to 255 bytes) or one that is taken."""
        check_method(name)
        if name in self._methods:
            raise MisuseError(f"there is a method {name!r} already")
        if not callable(function):
            raise MisuseError(f"method {name!r} is not callable")
        self._methods[name] = function

    @overload
    def method(self, name: str) -> Callable[[Method], Method]: ...

    @overload
    def method(self, name: Method) -> Method: ...

    def method(self, name: str | Method) -> Method | Callable[[Method], Method]:
        """Decorator: ``@server.method`` (the function's name) or ``@server.method("name")``."""
        if not isinstance(name, str):
            self.add(getattr(name, "__name__", ""), name)
            return name

        def decorate(function: Method) -> Method:
            self.add(name, function)
            return function

        return decorate

    def get(self, name: str) -> Method | None:
        """The method of that name."""
        return self._methods.get(name)

    async def __call__(self, connection: Connection) -> None:
        """Serves one connection until it ends. The methods still running then are cancelled and waited for.

        A malformed frame fails the connection with :class:`ProtocolError`; the client is told why.
        """
        serving = _Serving(self, connection)
        try:
            while True:
                await serving.received(await connection.recv())
        except ConnectionClosedError:
            pass  # in order
        finally:
            await serving.end()


class _Serving:
    """The calls of one connection."""

    def __init__(self, server: RpcServer, connection: Connection) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._connection = connection
        self._ledger = CalleeLedger(server.max_concurrent)
        self._tasks: dict[int, asyncio.Task[bytes]] = {}

    async def received(self, message: bytes) -> None:
        """A frame of the client. Raises :class:`ProtocolError` when it is none."""
        try:
            frame = decode(message)
            self._ledger.received(frame)
        except ProtocolError as error:
            self._connection.fail(error)  # closes, and tells the client why
            raise
        if isinstance(frame, CallFrame):
            await self._call(frame)
        elif self._ledger.is_running(frame.call_id):
            self._tasks[frame.call_id].cancel()

    async def _call(self, frame: CallFrame) -> None:
        method = self._server.get(frame.method)
        if method is None:
            await self._refuse(frame, Status.NOT_FOUND, f"there is no method {frame.method!r}")
        elif not self._ledger.begin(frame.call_id):
            await self._refuse(frame, Status.BUSY, f"{self._server.max_concurrent} calls are running")
        else:
            task = self._loop.create_task(_invoke(method, frame.payload), name=f"aiordma RPC {frame.method}")
            self._tasks[frame.call_id] = task
            task.add_done_callback(lambda task: self._ended(frame, task))

    async def _refuse(self, frame: CallFrame, status: Status, details: str) -> None:
        # Awaited, and so the next frame is not read before: refusals must not pile up either.
        await self._connection.send(self._error(frame.call_id, status, details))

    def _ended(self, frame: CallFrame, task: asyncio.Task[bytes]) -> None:
        """Answers the call. A callback: no cancellation can come between the method and its answer."""
        del self._tasks[frame.call_id]
        answer = self._answer(frame, task)
        self._ledger.answering(frame.call_id)
        if self._connection.is_closing():
            return
        self._connection.send(answer).add_done_callback(self._answered)

    def _answered(self, operation: asyncio.Future[Any]) -> None:
        _retrieve(operation)  # a failure ends the connection, which says so itself
        self._ledger.answered()

    def _answer(self, frame: CallFrame, task: asyncio.Task[bytes]) -> bytes:
        if task.cancelled():
            return self._error(frame.call_id, Status.CANCELLED, "the call was cancelled")
        error = task.exception()
        if error is None:
            return self._reply(frame.call_id, task.result())
        if isinstance(error, RpcError) and error.method is None:
            return self._error(frame.call_id, error.status, error.details)
        # Also an RpcError that came from another server: its details were not meant for this caller.
        self._report(frame, error)
        return self._error(frame.call_id, Status.INTERNAL, f"the method raised {type(error).__name__}")

    def _reply(self, call_id: int, result: bytes) -> bytes:
        limit = self._connection.eager_size - HEADER_SIZE
        if len(result) > limit:
            details = f"a reply of {len(result)} bytes; this connection carries up to {limit}"
            return self._error(call_id, Status.TOO_LARGE, details)
        return encode(ReplyFrame(call_id, result))

    def _error(self, call_id: int, status: str, details: str) -> bytes:
        return encode_error(call_id, status, details, self._connection.eager_size)

    def _report(self, frame: CallFrame, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"RPC method {frame.method!r}, called by {self._connection.peer}, failed",
                "exception": error,
            }
        )

    async def end(self) -> None:
        """The connection has ended: cancels what runs and waits for it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _invoke(method: Method, payload: bytes) -> bytes:
    """Runs a method; whatever is wrong with it, down to its result, is an exception of this task."""
    result = await method(payload)
    if not isinstance(result, bytes | bytearray | memoryview):
        raise TypeError(f"an RPC method returns bytes, not {type(result).__name__}")
    return bytes(result)


# --- the client ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Waiting:
    """A call whose answer somebody waits for."""

    method: str
    answer: asyncio.Future[bytes]


class RpcClient:
    """Calls methods of the peer: ``async with RpcClient(connection) as client``.

    While it is open it alone receives on the connection. It does not close the connection: that is for who
    made it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ledger = CallerLedger()
        self._waiting: dict[int, _Waiting] = {}
        self._reader: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        if self._reader is not None or self._closed:
            raise MisuseError("an RpcClient is entered once")
        name = f"aiordma RPC client of {self._connection.peer}"
        self._reader = asyncio.get_running_loop().create_task(self._read(), name=name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    async def call(self, method: str, payload: Bytes = b"", *, timeout: float | None = None) -> bytes:
        """Calls a method of the peer with a payload (bytes-like, may be empty) and returns its reply.

        ``timeout`` in seconds covers everything, waiting for a credit included; None is for ever.

        Raises :class:`RpcError` when the call has no result, TimeoutError,
        :class:`~aiordma.errors.MessageTooLargeError` for a payload larger than the connection's
        ``eager_size`` less 8 bytes and those of the name, :class:`~aiordma.errors.ConnectionLostError` (or a
        subclass) when the connection ends first: the method may then have run or not. Cancelled or timed out:
        a call that was not sent yet never is; otherwise the server is told to cancel it, and what it still
        answers is dropped.
        """
        data = self._payload(method, payload)
        try:
            async with asyncio.timeout(timeout):
                return await self._exchange(method, data)
        except TimeoutError as error:
            if isinstance(error, RdmaError):
                raise  # the device's timeout, not ours
            raise TimeoutError(f"call of {method!r} not answered within {timeout} s") from None

    def _payload(self, method: str, payload: Bytes) -> bytes:
        limit = self._connection.eager_size - call_overhead(method)
        try:
            data = bytes(memoryview(payload))
        except TypeError:
            raise MisuseError(f"the payload of a call is bytes, not {type(payload).__name__}") from None
        if len(data) > limit:
            raise MessageTooLargeError(len(data), max(limit, 0))
        return data

    async def _exchange(self, method: str, payload: bytes) -> bytes:
        if self._closed or self._reader is None:
            raise MisuseError("the RpcClient is not open: use it inside `async with RpcClient(connection)`")
        call_id = self._ledger.begin()
        try:
            operation = self._connection.send(encode(CallFrame(call_id, method, payload)))
        except BaseException:
            self._ledger.forget(call_id)
            raise
        operation.add_done_callback(_retrieve)  # its failure ends the connection, and so the call
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = _Waiting(method, answer)
        try:
            return await answer
        except asyncio.CancelledError:
            _retrieve(answer)
            self._abandon(call_id, operation)
            raise

    def _abandon(self, call_id: int, operation: Operation | LargeSend) -> None:
        """Nobody waits for the call any more."""
        self._waiting.pop(call_id, None)
        if not (operation.done() or operation.in_flight):
            operation.cancel()  # it waits for a credit or a slot: now it is never sent
            self._ledger.forget(call_id)
        elif self._ledger.abandon(call_id):
            self._send_cancel(call_id)

    def _send_cancel(self, call_id: int) -> None:
        if not self._connection.is_closing():
            self._connection.send(encode(CancelFrame(call_id))).add_done_callback(_retrieve)

    # --- answers -------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """The reader task: hands each answer to its call until the connection ends."""
        try:
            while True:
                self._received(await self._connection.recv())
        except ProtocolError as error:
            if not self._connection.is_closing():
                self._connection.fail(error)
            self._connection_ended()
        except ConnectionLostError:
            self._connection_ended()

    def _received(self, message: bytes) -> None:
        frame = self._ledger.answered(decode(message))
        waiting = self._waiting.pop(frame.call_id, None) if frame is not None else None
        if waiting is None or waiting.answer.done():
            return
        if isinstance(frame, ErrorFrame):
            waiting.answer.set_exception(RpcError(frame.status, frame.details, method=waiting.method))
        elif isinstance(frame, ReplyFrame):
            waiting.answer.set_result(frame.payload)

    def _connection_ended(self) -> None:
        """Each pending call gets an exception of its own, of the type the connection ended with."""
        self._fail_all(lambda method: self._connection.lost_error(f"call of {method!r}"))

    def _fail_all(self, make_error: Callable[[str], Exception]) -> None:
        waiting, self._waiting = self._waiting, {}
        for call in waiting.values():
            if not call.answer.done():
                call.answer.set_exception(make_error(call.method))

    # --- the end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends pending calls with :class:`RpcError` of status ``"cancelled"``, and tells the server. Returns
        at once; see :meth:`wait_closed`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for call_id in self._waiting:
            if self._ledger.abandon(call_id):
                self._send_cancel(call_id)
        self._fail_all(lambda method: RpcError(Status.CANCELLED, "the client was closed", method=method))
        if self._reader is not None:
            self._reader.cancel()

    async def wait_closed(self) -> None:
        """Waits until the reader task has ended; the connection can then be received on again."""
        if self._reader is not None:
            await asyncio.wait([self._reader])


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Marks a future's exception as seen."""
    if future.done() and not future.cancelled():
        future.exception()


__all__ = ["Method", "RpcClient", "RpcError", "RpcServer", "Status"]
