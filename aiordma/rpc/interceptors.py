"""What may stand between a caller and its call, and between a call and its handler."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..protocol.rpc import CallKind, Metadata

if TYPE_CHECKING:
    from .calls import StreamCall
    from .context import ServerContext

#: ``await proceed(request, context)`` runs the rest of the call and returns its reply (None for a stream).
Proceed = Callable[[Any, "ServerContext"], Awaitable[Any]]
#: Wraps the handler of every call: ``async def interceptor(proceed, request, context) -> reply``.
ServerInterceptor = Callable[[Proceed, Any, "ServerContext"], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class CallDetails:
    """What a call is made with. Interceptors may change it with ``dataclasses.replace``."""

    method: str
    kind: CallKind
    timeout: float | None = None
    metadata: Metadata = dataclasses.field(default_factory=dict)


#: ``await proceed(request, details)`` makes the call and returns its reply.
ProceedUnary = Callable[[Any, CallDetails], Awaitable[Any]]
#: ``proceed(details)`` begins the call and returns it.
ProceedStream = Callable[[CallDetails], "StreamCall[Any]"]


class ClientInterceptor:
    """Wraps calls of a client; override what you need. The first one in the list is the outermost."""

    async def unary(self, proceed: ProceedUnary, request: Any, details: CallDetails) -> Any:
        """Around a unary call: may change what it is made with, make it again, or answer itself."""
        return await proceed(request, details)

    def stream(self, proceed: ProceedStream, details: CallDetails) -> StreamCall[Any]:
        """At the beginning of any other call: may change what it is made with, and use its
        ``add_done_callback``."""
        return proceed(details)
