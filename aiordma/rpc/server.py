"""The server: services, limits, interceptors, health, and the end in order. One server serves any number of
connections, of one event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import MisuseError
from ..protocol.rpc import Payload, StatusCode
from ..protocol.rpc_admission import Admission
from ..transport import Connection
from .builtin import Health, health_service, reflection_service
from .context import ServerContext
from .errors import RpcError
from .interceptors import ServerInterceptor
from .service import Handler, Method, Service
from .serving import Serving

MAX_MESSAGE_SIZE = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RpcServerStatistics:
    """A snapshot. ``codes`` counts the answers by the name of their status, refusals included."""

    connections: int
    running: int
    waiting: int
    unanswered: int
    refused: int
    codes: Mapping[str, int]
    draining: bool


class RpcServer:
    """Services that clients call: give it to :func:`aiordma.serve` as its handler.

    ``services`` are one or several :class:`Service`. ``interceptors`` wrap every call, the first one outermost:
    ``async def interceptor(proceed, request, context)`` returns ``await proceed(request, context)``, or raises
    :class:`RpcError` instead. ``max_concurrent`` (1 or more) calls run at a time and ``max_queued`` (0 or more)
    wait; what comes beyond is refused with ``RESOURCE_EXHAUSTED``. ``max_concurrent_per_connection`` and
    ``max_queued_per_connection`` are the same for each connection, None for no other limit than the server's.
    The requests of calls that wait hold up to ``max_queued_bytes``. ``max_message_size`` in bytes is for requests
    and replies, each message of a stream by itself; what a connection receives at all is limited by
    ``Config.max_message_size``.
    ``max_call_time`` in seconds is the longest that any call may take, with a deadline of its caller or without;
    None: as long as the caller waits. ``cancel_grace`` in seconds is how long a handler may take to end after its
    cancellation when its connection has ended or the server drains; then it is reported and left alone.
    ``reflection=False`` hides the list of methods.

    A handler begins where its request was found, together with others that came with it, and runs until it waits
    for something; so what computes for long before its first ``await`` holds up the event loop, as it does behind
    one. It sees a task and a context (of ``contextvars``) of its own.

    A handler that raises, hangs or returns what is not of its type harms only its call: :class:`RpcError` tells
    the caller something, of any other exception the caller hears the type (``UNKNOWN``), and the loop's exception
    handler gets all of it.
    """

    def __init__(
        self,
        services: Service | Iterable[Service] = (),
        *,
        interceptors: Sequence[ServerInterceptor] = (),
        max_concurrent: int = 1024,
        max_queued: int = 16384,
        max_concurrent_per_connection: int | None = None,
        max_queued_per_connection: int | None = None,
        max_queued_bytes: int = 256 * 1024 * 1024,
        max_message_size: int = MAX_MESSAGE_SIZE,
        max_call_time: float | None = None,
        cancel_grace: float = 5.0,
        reflection: bool = True,
    ) -> None:
        if min(max_message_size, max_queued_bytes, cancel_grace) < 0:
            raise MisuseError("max_message_size, max_queued_bytes and cancel_grace are not negative")
        if max_call_time is not None and not max_call_time > 0:
            raise MisuseError(f"max_call_time={max_call_time}: more than 0 seconds, or None")
        self.admission: Admission[ServerContext] = Admission(
            max_running=max_concurrent,
            max_waiting=max_queued,
            lane_running=max_concurrent_per_connection,
            lane_waiting=max_queued_per_connection,
            max_bytes=max_queued_bytes,
        )
        self.max_message_size = max_message_size
        self.max_call_time = max_call_time
        self.cancel_grace = cancel_grace
        self.refused = 0
        self.draining = False
        self._interceptors = tuple(interceptors)
        self._services: dict[str, Service] = {}
        self._methods: dict[str, Method] = {}
        self._handlers: dict[str, Handler] = {}
        self._health: dict[str, Health] = {}
        self._active: dict[ServerContext, None] = {}
        self._idle: asyncio.Event | None = None
        self._serving: set[Serving] = set()
        self._codes: Counter[StatusCode] = Counter()
        for service in [services] if isinstance(services, Service) else services:
            self.add(service)
        self.add(health_service(self.health))
        if reflection:
            self.add(reflection_service(self.methods))

    # --- services ------------------------------------------------------------------------------------

    def add(self, service: Service) -> None:
        """Adds a service; methods that are added to it later are found as well. Raises :class:`MisuseError` for a
        name that is taken."""
        if service.name in self._services:
            raise MisuseError(f"there is a service {service.name!r} already")
        self._services[service.name] = service
        self._methods.update(service.methods)

    def methods(self) -> list[Method]:
        """The methods of all services."""
        return [method for service in self._services.values() for method in service.methods.values()]

    def method(self, name: str) -> Method | None:
        """The method of that full name."""
        method = self._methods.get(name)
        if method is None:
            service = self._services.get(name.rpartition("/")[0])
            method = service.methods.get(name) if service is not None else None
            if method is not None:
                self._methods[name] = method
        return method

    def handler(self, method: Method) -> Handler:
        """What runs a method: its handler, within the interceptors."""
        handler = self._handlers.get(method.name)
        if handler is None:
            handler = method.handler
            for interceptor in reversed(self._interceptors):
                handler = _wrap(interceptor, handler)
            self._handlers[method.name] = handler
        return handler

    # --- health --------------------------------------------------------------------------------------

    def set_health(self, service: str, status: Health) -> None:
        """What ``health/check`` says of a service; ``""`` stands for the server as a whole."""
        if service and service not in self._services:
            raise MisuseError(f"there is no service {service!r}")
        self._health[service] = Health(status)

    def health(self, service: str = "") -> Health | None:
        """The serving status: SERVING unless set otherwise, NOT_SERVING while draining, None for a service that
        is not known."""
        if service and service not in self._services:
            return None
        return Health.NOT_SERVING if self.draining else self._health.get(service, Health.SERVING)

    # --- connections ---------------------------------------------------------------------------------

    async def __call__(self, connection: Connection) -> None:
        """Serves one connection until it ends; then handlers still running are cancelled and waited for, up to
        ``cancel_grace``.

        A malformed frame fails the connection with :class:`~aiordma.errors.ProtocolError`; the client is told why.
        """
        serving = Serving(self, connection)
        self._serving.add(serving)
        try:
            await serving.run()
        finally:
            self._serving.discard(serving)

    def _left(self, context: ServerContext) -> None:
        self._active.pop(context, None)
        if not self._active and self._idle is not None:
            self._idle.set()

    def _start_waiting(self) -> None:
        """Starts the calls that wait for a place and have one now."""
        while (context := self.admission.next_call()) is not None:
            context._serving.start(context)

    # --- the end -------------------------------------------------------------------------------------

    async def drain(self, grace: float | None = None) -> bool:
        """Ends in order: from now on calls are refused with ``UNAVAILABLE``, and health says NOT_SERVING. Waits
        ``grace`` seconds (None: for ever) for the calls in flight, those that wait included; then cancels the
        rest, whose callers get ``UNAVAILABLE``, and waits up to ``cancel_grace`` for their handlers.

        Returns True when all had ended within the grace time. Connections stay open: close the
        :class:`aiordma.Server` next. Cancelled: no more is waited for, and calls are refused still.
        """
        self.draining = True
        if await self._wait_idle(grace):
            return True
        tasks = {context._task for context in self._active if context._task is not None}
        for context in list(self._active):
            context._serving.stop(context, RpcError(StatusCode.UNAVAILABLE, "the server is shutting down"))
        await self._wait_idle(self.cancel_grace)
        self._report_stubborn(tasks)
        return False

    async def _wait_idle(self, timeout: float | None) -> bool:
        if not self._active:
            return True
        if self._idle is None or self._idle.is_set():
            self._idle = asyncio.Event()
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _report_stubborn(self, tasks: Iterable[asyncio.Task[Payload]]) -> None:
        for task in tasks:
            if task.done():
                continue
            message = f"{task.get_name()} goes on after its cancellation, for more than {self.cancel_grace} s"
            task.get_loop().call_exception_handler({"message": message, "task": task})

    def statistics(self) -> RpcServerStatistics:
        """A snapshot of calls and answers."""
        return RpcServerStatistics(
            connections=len(self._serving),
            running=self.admission.running,
            waiting=self.admission.waiting,
            unanswered=len(self._active),
            refused=self.refused,
            codes={code.name: count for code, count in self._codes.items()},
            draining=self.draining,
        )


def _wrap(interceptor: ServerInterceptor, proceed: Handler) -> Handler:
    return lambda request, context: interceptor(proceed, request, context)
