"""What a handler knows of the call that it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar

from ..protocol.rpc import CallKind, Metadata, Payload, StatusCode, encode_metadata
from ..protocol.rpc_calls import CalleeCall
from ..transport import Connection
from .codec import InvalidMessage
from .errors import RpcError, status_error
from .pacing import Incoming, Outgoing, Sent
from .service import Method

if TYPE_CHECKING:
    from .serving import Serving

T = TypeVar("T")


class EndOfStream:
    """The type of :data:`EOF`."""

    def __repr__(self) -> str:
        return "<EOF>"

    def __bool__(self) -> bool:
        return False


#: What ``read()`` returns when the peer has ended its stream.
EOF = EndOfStream()


class InvalidReplyError(RpcError):
    """``INTERNAL``: a reply is not of its type. Raised where a handler made it, and where a client received it."""

    def __init__(self, details: str, *, method: str | None = None) -> None:
        super().__init__(StatusCode.INTERNAL, f"the reply is not valid: {details}", method=method)


class Requests(Generic[T]):
    """The requests of a call, as its handler sees them: an async iterator.

    Raises :class:`RpcError` with ``INVALID_ARGUMENT`` at a request that is not valid, which ends the call so if
    the handler lets it pass, and with the reason when the call has ended meanwhile.
    """

    __slots__ = ("_context",)

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        request = await self._context.read()
        if isinstance(request, EndOfStream):
            raise StopAsyncIteration
        item: T = request
        return item


class ServerContext:
    """One call, for its handler: who calls, until when, with which metadata, and how to end it otherwise than
    by returning. ``method`` is its name, ``kind`` how many messages it has, ``metadata`` the caller's."""

    __slots__ = (
        "_answer",
        "_call",
        "_ended",
        "_incoming",
        "_lined_up",
        "_metadata",
        "_method",
        "_outgoing",
        "_payload",
        "_placed",
        "_serving",
        "_task",
        "_timer",
        "_trailing",
    )

    def __init__(
        self,
        serving: Serving,
        call: CalleeCall[ServerContext],
        method: Method,
        payload: Payload,
        metadata: Metadata,
    ) -> None:
        self._serving = serving
        self._call = call
        self._method = method
        self._payload = payload  # until the handler runs
        self._metadata = metadata
        self._task: asyncio.Task[Payload] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answer: Sent | None = None  # the status, on its way
        self._ended: RpcError | None = None  # why the call has ended while its handler runs
        self._placed = False  # holds a place of the limits
        self._lined_up = False  # its handler is about to run
        self._trailing = b""
        self._incoming: Incoming | None = None
        self._outgoing: Outgoing | None = None
        if not call.kind:
            return
        if call.receive_window is not None:
            self._incoming = Incoming(serving.loop, serving.connection, call.receive_window, call.call_id)
        if call.send_window is not None:
            self._outgoing = Outgoing(serving.loop, serving.connection, call.send_window, call.call_id)

    # --- what the caller said ------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The full name, such as ``kv/get``."""
        return self._method.name

    @property
    def kind(self) -> CallKind:
        """How many requests and replies the call has."""
        return self._method.kind

    @property
    def metadata(self) -> Metadata:
        """The caller's; keys that end in ``-bin`` have bytes, others text."""
        return self._metadata

    @property
    def peer(self) -> str:
        """The caller's bootstrap address, ``host:port``."""
        return self._serving.connection.peer

    @property
    def connection(self) -> Connection:
        """The connection that the call came by: for one-sided operations, and for what it shares. Messages on it
        belong to the RPC layer."""
        return self._serving.connection

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, 0.0 at least; None when the caller has set none."""
        deadline = self._call.deadline
        return None if deadline is None else max(deadline - self._serving.loop.time(), 0.0)

    def cancelled(self) -> bool:
        """True when nobody waits for the result any more: cancelled, past its deadline, the server shuts down, or
        the connection is gone. The handler's task has been cancelled then, too."""
        return self._ended is not None

    # --- how it ends ---------------------------------------------------------------------------------

    def abort(
        self, code: StatusCode, details: str = "", *, trailing_metadata: Metadata | None = None
    ) -> NoReturn:
        """Ends the call with a status other than OK, by raising :class:`RpcError`; as raising one does.

        Raises :class:`MisuseError` for OK.
        """
        if trailing_metadata is not None:
            self.set_trailing_metadata(trailing_metadata)
        raise RpcError(code, details)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """What the caller finds as ``trailing_metadata`` when the call has ended, well or not. The last one
        counts. Raises :class:`MisuseError` for bad keys and more than 8192 bytes."""
        self._trailing = encode_metadata(metadata)

    # --- streams -------------------------------------------------------------------------------------

    async def read(self) -> Any:
        """The next request of a stream, or :data:`EOF`. Raises as :class:`Requests`. Cancelled: nothing is
        lost."""
        if self._incoming is None:
            raise RpcError(StatusCode.INTERNAL, f"{self.method} has one request, given to its handler")
        payload = await self._incoming.take()
        if payload is None:
            return EOF
        return self._decode(payload)

    def _decode(self, payload: Payload) -> Any:
        try:
            return self._method.request.decode(payload)
        except InvalidMessage as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"the request is not valid: {error}") from error

    async def write(self, reply: Any) -> None:
        """Sends one reply of a stream; waits while the caller does not take those before.

        Raises :class:`InvalidReplyError`, and :class:`RpcError` when the call has ended or the reply is too
        large. Cancelled: the reply has been sent, or will not be.
        """
        if self._outgoing is None:
            raise RpcError(StatusCode.INTERNAL, f"{self.method} has one reply, returned by its handler")
        payload = self._encode(reply)
        await self._outgoing.send(payload)

    def _encode(self, reply: Any) -> Payload:
        try:
            payload = self._method.reply.encode(reply)
        except InvalidMessage as error:
            raise InvalidReplyError(str(error)) from error
        if len(payload) > self._serving.server.max_message_size:
            raise self._serving.too_large(payload, "a reply")
        return payload

    # --- for the server ------------------------------------------------------------------------------

    async def _run(self, handler: Callable[[Any, ServerContext], Any]) -> Payload:
        """Runs the handler; whatever is wrong with it, down to its result, is an exception of this task."""
        kind = self._method.kind
        payload, self._payload = self._payload, b""  # not held while the handler runs
        request: Any = Requests(self) if kind & 1 else self._decode(payload)
        del payload
        reply = await handler(request, self)
        if not kind & 2:
            encoded = self._encode(reply)
            if self._ended is None:
                self._serving.answer(self, None, encoded)  # a turn of the loop before the task has ended
            return encoded
        if reply is not None:
            raise InvalidReplyError(f"a stream's handler returned {type(reply).__name__}, not None")
        return b""

    def _close(self, error: RpcError) -> None:
        """The call has its status: nothing more comes in, nothing more goes out."""
        self._ended = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

        if self._incoming is None and self._outgoing is None:
            return

        def again() -> RpcError:
            return status_error(error.code, error.details)

        if self._incoming is not None:
            self._incoming.end(again, drop=True)
        if self._outgoing is not None:
            self._outgoing.end(again)

    def __repr__(self) -> str:
        return f"<ServerContext {self.method} of {self.peer}>"
