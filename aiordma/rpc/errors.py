"""How calls fail, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConnectionLostError, MisuseError, RdmaError
from ..protocol.rpc import Metadata, StatusCode


def check_failure(code: StatusCode) -> StatusCode:
    """The code of a call that fails. Raises :class:`MisuseError` for OK and for what is no code."""
    try:
        known = StatusCode(code)
    except ValueError:
        raise MisuseError(f"{code!r} is no StatusCode") from None
    if known is StatusCode.OK:
        raise MisuseError("a call does not fail with StatusCode.OK: let the handler return")
    return known


class RpcError(RdmaError):
    """A call has no result. Raised by calls, and by handlers on purpose to end theirs.

    Attributes: ``code`` (:class:`StatusCode`; a number that is none of them arrives as ``UNKNOWN``), ``details``
    (text for people; the caller gets to see it), ``trailing_metadata``, and ``method``, which is None until the
    error has come to a caller. Raises :class:`~aiordma.errors.MisuseError` for OK.
    """

    def __init__(
        self,
        code: StatusCode,
        details: str = "",
        *,
        trailing_metadata: Metadata | None = None,
        method: str | None = None,
    ) -> None:
        self.code = check_failure(code)
        self.details = details
        self.trailing_metadata: Mapping[str, str | bytes] = trailing_metadata or {}
        self.method = method
        called = f"call of {method!r}: " if method is not None else ""
        super().__init__(f"{called}{self.code.name}{': ' + details if details else ''}")


class RpcTimeoutError(RpcError, TimeoutError):
    """``DEADLINE_EXCEEDED``: the call was not answered in time."""


class RpcConnectionError(RpcError, ConnectionLostError):
    """``UNAVAILABLE``: the connection ended before the call did, which may have run or not.

    ``__cause__`` is the connection's error; ``peer`` and ``qp_num`` are its.
    """

    def __init__(self, cause: RdmaError, method: str) -> None:
        RpcError.__init__(self, StatusCode.UNAVAILABLE, str(cause), method=method)
        self.peer: str | None = getattr(cause, "peer", None)
        self.qp_num: int | None = getattr(cause, "qp_num", None)
        self.opcode: str | None = None
        self.__cause__ = cause


def status_error(
    code: int, details: str, method: str | None = None, trailing_metadata: Metadata | None = None
) -> RpcError:
    """The exception for a status that is not OK."""
    try:
        known = StatusCode(code)
    except ValueError:
        known, details = StatusCode.UNKNOWN, f"status {code}: {details}"
    cls = RpcTimeoutError if known is StatusCode.DEADLINE_EXCEEDED else RpcError
    return cls(known, details, trailing_metadata=trailing_metadata, method=method)
