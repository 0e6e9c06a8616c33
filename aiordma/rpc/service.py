"""Services: methods by name, each with its kind and the types of its messages.

Two ways to write one. With a :class:`Service` object and its decorators::

    kv = Service("kv")

    @kv.unary
    async def get(request: GetRequest) -> GetReply: ...

    @kv.server_stream
    async def scan(request: ScanRequest, context: ServerContext) -> AsyncIterator[Item]:
        yield Item(...)

or as a class, with the decorators of this module::

    class KeyValue(Service):
        @unary
        async def get(self, request: GetRequest) -> GetReply: ...

    RpcServer([kv, KeyValue("other")])

A handler takes the request, or an async iterator of requests, and the context if it has a second parameter. It
returns the reply, or is an async generator of replies (or a coroutine that calls ``context.write``). Types come
from the annotations: ``bytes``, or whatever pydantic can validate; what is not annotated is bytes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ..errors import MisuseError
from ..protocol.rpc import CallKind, check_method
from .codec import BYTES, Codec, codec_for

if TYPE_CHECKING:
    from .context import ServerContext

F = TypeVar("F", bound=Callable[..., Any])
#: What runs a call: request (or iterator of requests) and context to the reply (None where replies are a stream).
Handler = Callable[[Any, "ServerContext"], Awaitable[Any]]

_MARK = "_aiordma_rpc"
_STREAMS = ("AsyncIterator", "AsyncIterable", "AsyncGenerator", "Requests")


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a service. ``name`` is how it is called, with the service's: ``kv/get``."""

    name: str
    kind: CallKind
    handler: Handler
    request: Codec
    reply: Codec
    description: str = ""
    exempt: bool = False  # not counted against limits, served while draining: health and reflection
    task_name: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_name", f"aiordma RPC {self.name}")


class _Decorator:
    """``@unary`` or ``@unary(name=..., request=..., reply=...)``."""

    def __init__(self, kind: CallKind, use: Callable[[Any, CallKind, dict[str, Any]], None]) -> None:
        self._kind = kind
        self._use = use

    @overload
    def __call__(self, function: F) -> F: ...

    @overload
    def __call__(
        self, *, name: str | None = None, request: Any = None, reply: Any = None
    ) -> Callable[[F], F]: ...

    def __call__(self, function: Any = None, **options: Any) -> Any:
        def decorate(function: F) -> F:
            self._use(function, self._kind, options)
            return function

        return decorate if function is None else decorate(function)


def _mark(function: Any, kind: CallKind, options: dict[str, Any]) -> None:
    setattr(function, _MARK, (kind, options))


unary = _Decorator(CallKind.UNARY, _mark)
server_stream = _Decorator(CallKind.SERVER_STREAM, _mark)
client_stream = _Decorator(CallKind.CLIENT_STREAM, _mark)
bidi = _Decorator(CallKind.BIDI, _mark)


class Service:
    """Methods under one name; see the module. ``name`` may be empty: then methods have no prefix."""

    def __init__(self, name: str | None = None) -> None:
        self.name = type(self).__name__ if name is None else name
        self.methods: dict[str, Method] = {}
        self.unary = _Decorator(CallKind.UNARY, self._add_decorated)
        self.server_stream = _Decorator(CallKind.SERVER_STREAM, self._add_decorated)
        self.client_stream = _Decorator(CallKind.CLIENT_STREAM, self._add_decorated)
        self.bidi = _Decorator(CallKind.BIDI, self._add_decorated)
        for attribute, function in inspect.getmembers(type(self), lambda member: hasattr(member, _MARK)):
            kind, options = getattr(function, _MARK)
            self.add(getattr(self, attribute), kind, **options)

    def _add_decorated(self, function: Any, kind: CallKind, options: dict[str, Any]) -> None:
        self.add(function, kind, **options)

    def add(
        self,
        function: Callable[..., Any],
        kind: CallKind = CallKind.UNARY,
        *,
        name: str | None = None,
        request: Any = None,
        reply: Any = None,
        exempt: bool = False,
    ) -> Method:
        """Adds a method. ``name`` is the function's unless given; ``request`` and ``reply`` are the types of its
        messages where the annotations do not say so.

        Raises :class:`MisuseError` for a name that is taken or too long (255 bytes with the service's), a
        function that does not fit the kind, and types that pydantic does not know.
        """
        short = name or str(getattr(function, "__name__", ""))
        full = f"{self.name}/{short}" if self.name else short
        check_method(full)
        if full in self.methods:
            raise MisuseError(f"there is a method {full!r} already")
        shape = _Shape(function, kind, full)
        method = self.methods[full] = Method(
            name=full,
            kind=kind,
            handler=shape.handler(),
            request=BYTES if (found := request or shape.request_type()) is None else codec_for(found),
            reply=BYTES if (found := reply or shape.reply_type()) is None else codec_for(found),
            description=(inspect.getdoc(function) or "").split("\n\n")[0],
            exempt=exempt,
        )
        return method


class _Shape:
    """What can be seen of a handler from outside."""

    def __init__(self, function: Callable[..., Any], kind: CallKind, name: str) -> None:
        self._function = function
        self._kind = kind
        self._name = name
        self._code = _code(function)
        self._generates = inspect.isasyncgenfunction(self._code)
        self._check()
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if not 1 <= len(parameters) <= 2:
            raise MisuseError(f"handler of {name!r} takes a request and perhaps a context")
        self._parameters = parameters
        self._hints = self._resolve()

    def _check(self) -> None:
        if self._generates and not self._kind.streams_replies:
            raise MisuseError(f"handler of {self._name!r} is a generator: its kind is one with many replies")
        if not self._generates and not inspect.iscoroutinefunction(self._code):
            raise MisuseError(
                f"handler of {self._name!r} is neither a coroutine function nor async generator"
            )

    def _resolve(self) -> dict[str, Any]:
        """The types of request and reply; others, such as that of the context, need not be there at run time."""
        found = inspect.get_annotations(self._code) if inspect.isroutine(self._code) else {}
        wanted = {name: found[name] for name in (self._parameters[0].name, "return") if name in found}
        try:
            return typing.get_type_hints(
                types.SimpleNamespace(__annotations__=wanted),
                globalns=getattr(inspect.unwrap(self._code), "__globals__", None),
                include_extras=True,
            )
        except Exception as error:  # whatever evaluating an annotation may raise
            raise MisuseError(
                f"the annotations of {self._name!r} cannot be resolved ({error}): types are looked up in the "
                "function's module; give others as request=... and reply=..."
            ) from error

    def request_type(self) -> Any:
        """None where it does not say."""
        hint = self._hint(self._parameters[0].name)
        return _item(hint, self._name) if self._kind.streams_requests else hint

    def reply_type(self) -> Any:
        """None where it does not say, or does not return its replies."""
        hint = self._hint("return")
        if not self._kind.streams_replies:
            return hint
        return _item(hint, self._name) if self._generates else None

    def _hint(self, name: str) -> Any:
        return None if (hint := self._hints.get(name)) is Any else hint

    def handler(self) -> Handler:
        """The handler, whatever its form, as a coroutine function of request and context."""
        function = self._function
        with_context = len(self._parameters) == 2
        if not self._generates:
            return function if with_context else lambda request, _: function(request)

        async def write_all(request: Any, context: ServerContext) -> None:
            generator = function(request, context) if with_context else function(request)
            async with contextlib.aclosing(generator):
                async for reply in generator:
                    await context.write(reply)

        return write_all


def _code(function: Any) -> Any:
    """Where the annotations are: the function itself, that of a partial, or the ``__call__`` of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__.__get__(function)


def _item(hint: Any, name: str) -> Any:
    """The type of the items of a stream."""
    if hint is None:
        return None
    origin = typing.get_origin(hint) or hint
    if getattr(origin, "__name__", "") not in _STREAMS:
        raise MisuseError(f"a stream of {name!r} is annotated {hint!r}, not as an AsyncIterator of something")
    arguments = typing.get_args(hint)
    return arguments[0] if arguments else None
