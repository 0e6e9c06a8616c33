"""The calls of one connection, at the server.

One loop receives; each handler runs in a task (handler_tasks.py). A call is answered exactly once, and at once:
when its handler has a result, or has ended without one, or before that when it is cancelled or its deadline has
passed.
The task is cancelled then, but what a handler makes of that harms nobody's answer; it keeps its place in the
limits until it has really ended.

Refusals are awaited before the next frame is read: a client that does not read them cannot make them pile up.
"""

from __future__ import annotations

import asyncio
import contextvars
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import (
    ConnectionClosedError,
    ConnectionLostError,
    MemoryLimitError,
    MessageTooLargeError,
    MisuseError,
    ProtocolError,
    RdmaError,
)
from ..large_messages import LargeSend
from ..protocol.rpc import (
    CallFrame,
    CallKind,
    CancelFrame,
    EndFrame,
    MessageFrame,
    Metadata,
    Payload,
    StatusCode,
    WindowFrame,
    decode,
    plain_call,
    plain_reply_frame,
    status_head,
)
from ..protocol.rpc_admission import Lane, Verdict
from ..protocol.rpc_calls import CalleeCall, CalleeCalls
from ..transport import Connection
from .codec import COPY_LIMIT
from .context import InvalidReplyError, ServerContext
from .errors import RpcError
from .handler_tasks import HandlerTask
from .pacing import JOIN_LIMIT, Sent, send_frame, send_whole, slices

if TYPE_CHECKING:
    from .server import RpcServer

#: Calls of health and reflection that one connection may have running; they are not counted otherwise.
_MAX_EXEMPT = 64
#: As a module's names: those of an enumeration are slow to look up.
_UNARY, _OK = CallKind.UNARY, StatusCode.OK
_RUN, _REFUSED = Verdict.RUN, Verdict.REFUSED
#: Why a stream of a call that ended well can be read no more; only its code and words are used.
_ENDED = RpcError(StatusCode.CANCELLED, "the call has ended")


class Serving:
    """One connection of an :class:`RpcServer`."""

    def __init__(self, server: RpcServer, connection: Connection) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = server
        self.connection = connection
        self._context = contextvars.copy_context()  # of each handler; frames come in whatever context
        self.lane: Lane[ServerContext] = Lane()
        self._calls: CalleeCalls[ServerContext] = CalleeCalls()
        self._tasks: set[asyncio.Task[Payload]] = set()
        self._ready: HandlerTask | None = None  # runs the next handler
        self._exempt = 0
        self._breach: ProtocolError | None = None  # by the client: it is not heard any more

    async def run(self) -> None:
        """Serves until the connection has ended, and then sees to the handlers that still run."""
        self._ready = HandlerTask(self.loop, self._context)
        try:
            await self.connection.consume(self._received, inline=True)
        except ConnectionClosedError:
            pass  # in order
        except ConnectionLostError as error:
            raise (self._breach or error) from None
        finally:
            await self._end()

    # --- frames --------------------------------------------------------------------------------------

    def _received(self, message: bytes) -> Sent | None:
        """A frame of the client. Returns an answer that is to leave before the next frame is read."""
        if self._breach is not None:
            return None
        plain = None
        try:
            if len(message) <= COPY_LIMIT and (plain := plain_call(message)) is not None:
                call_id, method, timeout, payload = plain
                deadline = self.loop.time() + timeout / 1e6 if timeout else None
                begun = self._calls.begin(call_id, _UNARY, deadline)
            else:
                frame = decode(slices(message))
                call = self._calls.received(frame, self.loop.time())
        except ProtocolError as error:
            self._breach = error
            self.connection.fail(error)  # closes, and tells the client why
            return None
        if plain is not None:
            return self._begin(begun, method, payload, {})
        if call is None:
            return None
        if isinstance(frame, CallFrame):
            return self._begin(call, frame.method, frame.payload, frame.metadata)
        context = call.owner
        assert context is not None
        if isinstance(frame, MessageFrame):
            return self._message(context, frame.payload)
        if isinstance(frame, EndFrame):
            assert context._incoming is not None
            context._incoming.end()
        elif isinstance(frame, WindowFrame):
            assert context._outgoing is not None
            context._outgoing.opened()
        elif isinstance(frame, CancelFrame):
            self.stop(context, RpcError(StatusCode.CANCELLED, "the caller cancelled the call"))
        return None

    def _message(self, context: ServerContext, payload: Payload) -> Sent | None:
        assert context._incoming is not None
        if len(payload) > self.server.max_message_size:
            self.stop(context, self.too_large(payload, "a request"))
            return context._answer
        context._incoming.put(payload)
        return None

    def too_large(self, payload: Payload, what: str) -> RpcError:
        """For a message larger than the server allows."""
        limit = self.server.max_message_size
        return RpcError(
            StatusCode.RESOURCE_EXHAUSTED, f"{what} of {len(payload)} bytes; the server allows {limit}"
        )

    # --- a call begins -------------------------------------------------------------------------------

    def _begin(
        self, call: CalleeCall[ServerContext], method: str, payload: Payload, metadata: Metadata
    ) -> Sent | None:
        try:
            context = call.owner = self._admit(call, method, payload, metadata)
        except RpcError as error:
            self.server.refused += 1
            return self._send_status(call, error.code, error.details, b"", b"")
        server = self.server
        server._active[context] = None
        if server.max_call_time is not None:
            call.limit(self.loop.time() + server.max_call_time)
        if call.deadline is not None:
            context._timer = self.loop.call_at(call.deadline, self._expired, context)
        return None

    def _admit(
        self, call: CalleeCall[ServerContext], name: str, payload: Payload, metadata: Metadata
    ) -> ServerContext:
        """Raises :class:`RpcError` for a call that is refused."""
        server = self.server
        method = server.method(name)
        if method is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, f"there is no method {name!r}")
        if method.kind != call.kind:
            raise RpcError(
                StatusCode.UNIMPLEMENTED,
                f"{name!r} is {method.kind.name}, and was called as {call.kind.name}",
            )
        if len(payload) > server.max_message_size:
            raise self.too_large(payload, "a request")
        context = ServerContext(self, call, method, payload, metadata)
        if method.exempt:
            if self._exempt >= _MAX_EXEMPT:
                raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"{self._exempt} calls of {method.name!r} run")
            self.start(context)
            return context
        if server.draining:
            raise RpcError(StatusCode.UNAVAILABLE, "the server is shutting down")
        verdict, reason = server.admission.offer(self.lane, context, len(payload))
        if verdict is _REFUSED:
            raise RpcError(StatusCode.RESOURCE_EXHAUSTED, f"too many calls: {reason}")
        if verdict is _RUN:
            self.start(context)
        return context

    def start(self, context: ServerContext) -> None:
        """Has the handler run. The call has its place in the limits, or needs none."""
        if context._method.exempt:
            self._exempt += 1
        else:
            context._placed = True
        context._lined_up = True
        self.connection.soon(partial(self._run, context))

    def _run(self, context: ServerContext) -> None:
        """Runs the handler: its first step, and the rest in its task."""
        context._lined_up = False
        if context._ended is not None:  # stopped before it began
            self._ended(context, asyncio.CancelledError(), b"")
            return
        method, ready = context._method, self._ready
        coroutine = context._run(self.server.handler(method))
        if ready is None or not ready.waiting:
            if ready is not None and ready.task.done():  # somebody cancelled all tasks
                self._ready = HandlerTask(self.loop, self._context)
            task = self.loop.create_task(coroutine, name=method.task_name, context=self._context.copy())
            self._go_on(context, task)
            return
        context._task = ready.task
        try:
            payload = ready.start(coroutine, method.task_name)
        except BaseException as error:
            context._task = None
            self._ended(context, error, b"")
            if isinstance(error, SystemExit | KeyboardInterrupt):
                raise
        else:
            if payload is None:
                self._go_on(context, ready.task)
            else:
                context._task = None
                self._ended(context, None, payload)
        finally:
            if not ready.waiting:
                self._ready = HandlerTask(self.loop, self._context)

    def _go_on(self, context: ServerContext, task: asyncio.Task[Payload]) -> None:
        context._task = task
        self._tasks.add(task)
        task.add_done_callback(partial(self._task_ended, context))

    # --- a call ends ---------------------------------------------------------------------------------

    def _task_ended(self, context: ServerContext, task: asyncio.Task[Payload]) -> None:
        """A callback: no cancellation can come between the end of the handler and its answer."""
        self._tasks.discard(task)
        context._task = None  # whose exception knows the handler's frames, and they the context
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._ended(context, error, task.result() if error is None else b"")

    def _ended(self, context: ServerContext, raised: BaseException | None, payload: Payload) -> None:
        """The handler has ended, with a result or an exception."""
        if context._method.exempt:
            self._exempt -= 1
        else:
            self.server.admission.handler_ended()
        if context._ended is not _ENDED:
            error = self._error(context, raised)
            if context._ended is None:
                self.answer(context, error, payload)
        self._leave_when_answered(context)
        if self.server.admission.waiting:
            self.server._start_waiting()

    def _error(self, context: ServerContext, error: BaseException | None) -> RpcError | None:
        """Why the call has no result; reports what nobody foresaw."""
        if error is None:
            return None
        if isinstance(error, asyncio.CancelledError):
            return RpcError(StatusCode.CANCELLED, "the handler was cancelled")
        # An RpcError with a method is another server's answer, which was not meant for this caller.
        if isinstance(error, RpcError) and error.method is None:
            if isinstance(error, InvalidReplyError):
                self._report(context, error)
            return self._with_metadata(context, error)
        if context._ended is None or not isinstance(error, RdmaError):
            self._report(context, error)
        return RpcError(StatusCode.UNKNOWN, f"the handler raised {type(error).__name__}")

    def _with_metadata(self, context: ServerContext, error: RpcError) -> RpcError:
        """Takes the metadata of an error that a handler raised."""
        if error.trailing_metadata and context._ended is None:
            try:
                context.set_trailing_metadata(error.trailing_metadata)
            except MisuseError as misuse:
                self._report(context, misuse)
        return error

    def _report(self, context: ServerContext, error: BaseException) -> None:
        message = f"RPC method {context.method!r}, called by {self.connection.peer}, failed"
        self.loop.call_exception_handler({"message": message, "exception": error})

    def _expired(self, context: ServerContext) -> None:
        context._timer = None
        self.stop(context, RpcError(StatusCode.DEADLINE_EXCEEDED, "the call was not answered in time"))

    def stop(self, context: ServerContext, error: RpcError) -> None:
        """Ends a call before its handler does: answers it, and cancels the handler if it runs."""
        if context._ended is None:
            self.answer(context, error, b"")
        if context._task is not None:
            context._task.cancel()
        elif not context._lined_up:
            self.server.admission.withdraw(self.lane, context)
            self._leave_when_answered(context)

    def answer(self, context: ServerContext, error: RpcError | None, payload: Payload) -> None:
        """The answer to a call that had none before: what its handler has returned, or why it has not."""
        call = context._call
        if error is None:
            code, details = _OK, ""
            context._close(_ENDED)
        else:
            code, details = error.code, error.details
            # Not the exception that was raised: it knows the handler's frames, and they know the context.
            context._close(RpcError(code, details))
        context._answer = self._send_status(call, code, details, context._trailing, payload)

    def _send_status(
        self,
        call: CalleeCall[ServerContext],
        code: StatusCode,
        details: str,
        trailing: bytes,
        payload: Payload,
    ) -> Sent | None:
        if not self._calls.answer(call):
            return None
        self.server._codes[code] += 1
        try:
            if code is _OK and not trailing and payload.__class__ is bytes and len(payload) <= JOIN_LIMIT:
                return send_whole(self.connection, plain_reply_frame(call.call_id, payload))
            sent = send_frame(self.connection, status_head(call.call_id, code, details, trailing), payload)
        except ConnectionLostError:
            return None
        except (MessageTooLargeError, MemoryLimitError) as error:
            return self._reply_failed(call, error)
        if isinstance(sent, LargeSend):
            sent.add_done_callback(lambda sent: self._large_ended(call, sent))
        return sent

    def _large_ended(self, call: CalleeCall[ServerContext], sent: asyncio.Future[Any]) -> None:
        if not self.connection.is_closing() and not sent.cancelled() and (error := sent.exception()):
            self._reply_failed(call, error)

    def _reply_failed(self, call: CalleeCall[ServerContext], error: BaseException) -> Sent:
        """A large reply cannot be sent, by itself: the caller hears that instead."""
        self.loop.call_exception_handler(
            {"message": f"an RPC reply to {self.connection.peer} cannot be sent", "exception": error}
        )
        details = f"the reply cannot be sent: {error}"
        return send_frame(self.connection, status_head(call.call_id, StatusCode.RESOURCE_EXHAUSTED, details))

    def _leave_when_answered(self, context: ServerContext) -> None:
        """The handler has ended, or never began: what is left is the answer, on its way."""
        answer = context._answer
        if answer is None or answer.done():
            self._leave(context)
        else:
            answer.add_done_callback(lambda _: self._leave(context))

    def _leave(self, context: ServerContext) -> None:
        if context._placed:
            context._placed = False
            self.server.admission.answer_left(self.lane)
            if self.server.admission.waiting:
                self.server._start_waiting()
        self.server._left(context)

    # --- the end of the connection -------------------------------------------------------------------

    async def _end(self) -> None:
        """Cancels what runs and waits for it, for a limited time: a handler that ignores its cancellation is
        reported and left to itself."""
        self.server.admission.close(self.lane)
        lost = RpcError(StatusCode.CANCELLED, "the connection has ended")
        for call in self._calls.open_calls():
            if call.owner is not None:
                self.stop(call.owner, lost)
        for task in self._tasks:
            task.cancel()
        if self._ready is not None:
            self._ready.close()
            self._tasks.add(self._ready.task)
            self._ready = None
        try:
            await asyncio.wait(self._tasks, timeout=self.server.cancel_grace)
        finally:
            self.server._report_stubborn(self._tasks)
