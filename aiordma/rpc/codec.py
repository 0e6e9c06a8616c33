"""Messages as bytes: bytes themselves, or any type that pydantic can validate, as JSON.

What is checked where: a server validates requests (the caller is told which field is wrong) and the replies of
its handlers; a client validates replies. A type is what a handler's annotation or the ``reply_type`` of a call
says: a pydantic model, a dataclass, ``list[int]``, ``dict[str, float]``, ...
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from ..buffers import bytes_view
from ..errors import MisuseError
from ..protocol.rpc import Payload

#: Bytes-like payloads up to this size are copied when a call takes them, so that the caller's buffer is free;
#: larger ones are sent in place.
COPY_LIMIT = 64 * 1024
_FIELDS_TOLD = 5


class InvalidMessage(Exception):
    """A message is not of its type; the text says where, without the values."""


class Codec(Protocol):
    """Between a message and its bytes."""

    def encode(self, message: Any) -> Payload:
        """Raises :class:`InvalidMessage`."""

    def decode(self, payload: Payload) -> Any:
        """Raises :class:`InvalidMessage`."""

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema, None for bytes."""


class BytesCodec:
    """Payloads as they are. What is received is ``bytes``."""

    schema = None

    def encode(self, message: Any) -> Payload:
        """Bytes-like objects, contiguous; large ones are not copied."""
        if message.__class__ is bytes:
            return message
        try:
            view = bytes_view(message)
        except MisuseError:
            raise InvalidMessage(f"bytes are needed, not {type(message).__name__}") from None
        return bytes(view) if view.nbytes <= COPY_LIMIT else view

    def decode(self, payload: Payload) -> Payload:
        """A copy only where the payload is not bytes."""
        return payload if isinstance(payload, bytes) else bytes(payload)


class ViewCodec(BytesCodec):
    """The same, but what is received is a ``memoryview``, which saves the copy of a large one."""

    def decode(self, payload: Payload) -> Payload:
        """A view of the message as it was received."""
        return memoryview(payload)


class JsonCodec:
    """A type of Python or pydantic, as JSON."""

    def __init__(self, kind: Any) -> None:
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
        except Exception as error:  # pydantic raises several kinds, some of them private
            raise MisuseError(f"{kind!r} is not a type that pydantic can validate: {error}") from error
        self._schema: dict[str, Any] | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the type."""
        if self._schema is None:
            try:
                self._schema = self._adapter.json_schema()
            except Exception:  # types with custom validators may have none
                self._schema = {}
        return self._schema

    def encode(self, message: Any) -> bytes:
        """Validates, so that a dictionary will do for a model; an instance of a model counts as valid."""
        try:
            valid = self._adapter.validate_python(message)
            return self._adapter.dump_json(valid, warnings="error")
        except ValidationError as error:
            raise InvalidMessage(explain(error)) from error
        except PydanticSerializationError as error:
            raise InvalidMessage(str(error)) from error
        except Exception as error:  # a validator of the user's may raise anything
            raise InvalidMessage(type(error).__name__) from error

    def decode(self, payload: Payload) -> Any:
        """Parses and validates."""
        data = payload if isinstance(payload, bytes | bytearray) else bytes(payload)
        try:
            return self._adapter.validate_json(data)
        except ValidationError as error:
            raise InvalidMessage(explain(error)) from error
        except Exception as error:
            raise InvalidMessage(type(error).__name__) from error


BYTES = BytesCodec()
_VIEW = ViewCodec()


@functools.lru_cache(maxsize=1024)
def _json_codec(kind: Any) -> JsonCodec:
    return JsonCodec(kind)


def codec_for(kind: Any) -> Codec:
    """The codec of a type: of ``bytes`` and ``memoryview`` as they are, of others as JSON. Raises
    :class:`MisuseError`."""
    if kind is bytes:
        return BYTES
    if kind is memoryview:
        return _VIEW
    try:
        return _json_codec(kind)
    except TypeError:  # a type that cannot be hashed
        return JsonCodec(kind)


def encode_request(message: Any) -> Payload:
    """A request of a client: bytes-like objects as they are, else JSON of the object's own type."""
    if message.__class__ is bytes:
        return message
    if isinstance(message, bytearray | memoryview) or not _has_json(message):
        return BYTES.encode(message)
    return codec_for(type(message)).encode(message)


def _has_json(message: Any) -> bool:
    """Whether it is JSON rather than a buffer, such as an array of numpy."""
    try:
        memoryview(message).release()
    except TypeError:
        return True
    return False


def explain(error: ValidationError) -> str:
    """Which fields are wrong and why, in one line and without the values, which may be secrets."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, e['loc'])) or 'message'}: {e['msg']}" for e in errors[:_FIELDS_TOLD]]
    if len(errors) > _FIELDS_TOLD:
        told.append(f"and {len(errors) - _FIELDS_TOLD} more")
    return "; ".join(told)
