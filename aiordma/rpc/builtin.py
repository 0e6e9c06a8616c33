"""What every server offers: its health, and the list of its methods. Both are ordinary methods, but are served
while the server drains or is full.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from ..protocol.rpc import StatusCode
from .errors import RpcError
from .service import Method, Service

HEALTH = "health/check"
REFLECTION = "reflection/methods"


class Health(enum.StrEnum):
    """Serving status of a service."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"


class HealthRequest(BaseModel):
    """``service`` "" asks for the server as a whole."""

    service: str = ""


class HealthReply(BaseModel):
    """The serving status."""

    status: Health


class ReflectionRequest(BaseModel):
    """``prefix``: only methods whose names begin so."""

    prefix: str = ""


class MethodInfo(BaseModel):
    """A method. ``kind`` is the name of a :class:`CallKind` in lower case; ``request`` and ``reply`` are JSON
    schemas, None for bytes."""

    name: str
    kind: str
    description: str = ""
    request: dict[str, Any] | None = None
    reply: dict[str, Any] | None = None


class ReflectionReply(BaseModel):
    """The methods of a server, by name."""

    methods: list[MethodInfo]


def health_service(status_of: Callable[[str], Health | None]) -> Service:
    """``health/check``."""
    service = Service("health")

    async def check(request: HealthRequest) -> HealthReply:
        """The serving status of a service, or of the server."""
        status = status_of(request.service)
        if status is None:
            raise RpcError(StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return HealthReply(status=status)

    service.add(check, exempt=True)
    return service


def reflection_service(methods: Callable[[], list[Method]]) -> Service:
    """``reflection/methods``."""
    service = Service("reflection")

    async def list_methods(request: ReflectionRequest) -> ReflectionReply:
        """The methods of this server, and the JSON schemas of their messages."""
        found = [_info(method) for method in methods() if method.name.startswith(request.prefix)]
        return ReflectionReply(methods=sorted(found, key=lambda info: info.name))

    service.add(list_methods, name="methods", exempt=True)
    return service


def _info(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        kind=method.kind.name.lower(),
        description=method.description,
        request=method.request.schema,
        reply=method.reply.schema,
    )
