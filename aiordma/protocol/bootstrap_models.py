"""What the bootstrap connection carries: framing, hardened JSON, and one pydantic model for each frame.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON, an object with a ``type``. All of it
is hostile until validated, so each step bounds its own work: the length is judged before anything is
buffered, the number of JSON containers before the recursive parser sees them, the digits of a number before
they are converted, each string and list by its model. Whatever fails is a MalformedHandshakeError that names
the field and quotes next to nothing. The order of frames is the business of ``bootstrap.py``.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from ..errors import MalformedHandshakeError, MisuseError

PROTOCOL_VERSIONS = (1,)
HANDSHAKE_FRAME_LIMIT = 16 << 10  # bytes of one body while the peer is a stranger
SESSION_FRAME_LIMIT = 64 << 10  # bytes of one body afterwards
NONCE_SIZE = 32  # bytes
MAX_CONTAINERS = 256  # JSON arrays and objects in one body: bounds the depth of recursion as well
MAX_DIGITS = 20  # of a JSON integer: 2**64 - 1 has 20
MAX_MESSAGE = 512  # characters of text for the other side's log

Auth = Literal["none", "token"]
LinkLayer = Literal["ethernet", "infiniband", "iwarp"]
GidType = Literal["ib", "roce_v1", "roce_v2"]
Access = Literal["read", "write", "atomic"]
RefusalCode = Literal["version", "token", "malformed", "timeout", "busy", "incompatible", "internal"]


def printable(text: str, limit: int = 80) -> str:
    """``text`` made safe for a log line: at most ``limit`` characters, no control or direction characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


# --- framing ------------------------------------------------------------------------------------------

# What strangers send to the wrong port, told by the four bytes that should have been a length.
_STRANGERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        re.compile(rb"[\x14-\x17]\x03", re.DOTALL),
        "this looks like TLS: one side was given an ssl context, the other was not",
    ),
    (
        re.compile(rb"GET |HEAD|POST|PUT |DELE|OPTI|PATC|CONN|TRAC|HTTP|PRI "),
        "this looks like HTTP: check the port number",
    ),
    (re.compile(rb"SSH-"), "this looks like SSH: check the port number"),
    (
        re.compile(rb"PROX|\r\n\r\n"),
        "this looks like a PROXY protocol header: RDMA peers must reach each other without a load balancer",
    ),
)


def _reject_length(prefix: bytes, limit: int) -> NoReturn:
    length = int.from_bytes(prefix, "big")
    if length < 2:
        raise MalformedHandshakeError(f"frame of {length} bytes: a JSON object has at least 2")
    for pattern, hint in _STRANGERS:
        if pattern.match(prefix):
            raise MalformedHandshakeError(f"the peer does not speak aiordma: {hint}")
    raise MalformedHandshakeError(f"frame of {length} bytes announced, the limit is {limit}")


class FrameDecoder:
    """Cuts a byte stream into frame bodies; never keeps more than one incomplete frame.

    ``limit`` is the longest body in bytes. A longer length raises MalformedHandshakeError as soon as its four
    bytes are there; the decoder is then empty and of no further use.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes held back."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """All bodies that ``data`` completes."""
        self.push(data)
        bodies = []
        while (body := self.next_body()) is not None:
            bodies.append(body)
        return bodies

    def push(self, data: bytes) -> None:
        """Append without looking; for callers who must stop between two frames (:meth:`next_body`)."""
        self._buffer += data

    def next_body(self) -> bytes | None:
        """The next complete body, or None when more bytes are needed."""
        if len(self._buffer) < 4:
            return None
        prefix = bytes(self._buffer[:4])
        length = int.from_bytes(prefix, "big")
        if not 2 <= length <= self.limit:
            self._buffer.clear()
            _reject_length(prefix, self.limit)
        if len(self._buffer) < 4 + length:
            return None
        body = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        return body

    def take_rest(self) -> bytes:
        """What was fed and not yet cut; the decoder is empty afterwards."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


def frame(body: bytes) -> bytes:
    """``body`` with its length before it."""
    return len(body).to_bytes(4, "big") + body


# --- JSON ---------------------------------------------------------------------------------------------

# A string to its end, or to the end of the text when it is not closed: one pass, no backtracking (possessive
# quantifiers), so hostile text cannot make it quadratic.
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class _Rejected(ValueError):
    """Raised inside the JSON parser's hooks; the text is ours and safe to show."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # RFC 8259 section 4 leaves duplicates open; two parsers that differ would let a frame mean two things.
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Rejected("a key appears twice in one object")
    return result


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise _Rejected(f"an integer of more than {MAX_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Rejected("a number too large for a double")
    return value


def _no_constant(text: str) -> NoReturn:
    raise _Rejected(f"{text} is not JSON")


def parse_object(body: bytes) -> dict[str, object]:
    """``body`` as a JSON object without duplicate keys, NaN, giant numbers or deep nesting.

    Raises MalformedHandshakeError.
    """
    bare = _JSON_STRING.sub(b"", body)
    if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS:
        raise MalformedHandshakeError(f"frame holds more than {MAX_CONTAINERS} JSON arrays and objects")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError:
        raise MalformedHandshakeError("frame is not UTF-8") from None
    except _Rejected as exc:
        raise MalformedHandshakeError(f"frame is not acceptable JSON: {exc}") from None
    except (ValueError, RecursionError):
        raise MalformedHandshakeError("frame is not JSON") from None
    if not isinstance(value, dict):
        raise MalformedHandshakeError("frame is JSON but not an object")
    return value


def type_of(obj: Mapping[str, object]) -> str:
    """The discriminator of a parsed frame. Raises MalformedHandshakeError."""
    kind = obj.get("type")
    if not isinstance(kind, str) or not 1 <= len(kind) <= 32:
        raise MalformedHandshakeError("type: a string of 1 to 32 characters is due")
    return kind


# --- models -------------------------------------------------------------------------------------------

U64_LIMIT = 1 << 64


def _gid_hex(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{32}", text):
        return text.lower()
    if "%" in text:
        raise ValueError("a GID has no scope id")
    return ipaddress.IPv6Address(text).packed.hex()


def _all_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) != len(values):
        raise ValueError("an entry appears twice")
    return values


def _path_mtu(value: int) -> int:
    if value not in (256, 512, 1024, 2048, 4096):
        raise ValueError("one of 256, 512, 1024, 2048, 4096 is due")
    return value


# Free text of the peer is cleaned on the way in, so that no reader can log a control character.
ShortText = Annotated[str, Field(max_length=64), AfterValidator(lambda text: printable(text, 64))]
LongText = Annotated[
    str, Field(max_length=MAX_MESSAGE), AfterValidator(lambda text: printable(text, MAX_MESSAGE))
]
# Strict(False) admits JSON's list where a tuple is stored; the entries stay strict.
_LIST = (Strict(False), AfterValidator(_distinct))
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Gid = Annotated[str, Field(max_length=45), AfterValidator(_gid_hex)]
Version = Annotated[int, Field(ge=1, le=0xFFFF)]
Versions = Annotated[tuple[Version, ...], Field(min_length=1, max_length=16), *_LIST]
Feature = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")]
Features = Annotated[tuple[Feature, ...], Field(max_length=64), *_LIST]
AccessList = Annotated[tuple[Access, ...], Field(min_length=1, max_length=3), *_LIST]
Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_all_printable)]
# Not a Literal: pydantic lets 256.0 pass for one, even in strict mode.
Mtu = Annotated[int, AfterValidator(_path_mtu)]
Depth = Annotated[int, Field(ge=0, le=255)]


class Model(BaseModel):
    """Strict about types (no "1" or true for 1), indifferent to fields of the future, immutable."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    @classmethod
    def make(cls, **fields: object) -> Self:
        """As the constructor, for values of our own user: raises MisuseError instead of ValidationError."""
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            raise MisuseError(f"{cls.__name__}: {_first_error(exc)}") from None


class Endpoint(Model):
    """One side's queue pair and what it offers. Units: bytes for sizes, messages for credits.

    ``initiator_depth`` and ``responder_depth`` are the RDMA READs and atomics it may have outstanding and is
    ready to serve (``max_rd_atomic`` and ``max_dest_rd_atomic`` of ibv_modify_qp(3)). ``receive_credits`` are
    receives posted for data at first, ``receive_credits_max`` what may become of them, ``control_credits`` those
    reserved for control frames on top. ``rendezvous_depth``
    offers of large messages may be under way to it, of up to ``max_message_size`` bytes. ``gid`` may be given as
    IPv6 text and is kept as 32 hex digits.
    """

    transport: Literal["rc"] = "rc"
    link_layer: LinkLayer
    qp_num: Annotated[int, Field(ge=2, le=0xFFFFFE)]  # 0, 1 and 0xffffff are QP0, QP1 and multicast
    psn: Annotated[int, Field(ge=0, le=0xFFFFFF)]
    lid: Annotated[int, Field(ge=0, le=0xFFFF)] = 0
    gid: Gid
    gid_type: GidType
    mtu: Mtu
    initiator_depth: Depth
    responder_depth: Depth
    eager_size: Annotated[int, Field(ge=64, le=1 << 20)]
    receive_credits: Annotated[int, Field(ge=1, le=4096)]
    receive_credits_max: Annotated[int, Field(ge=1, le=4096)]
    control_credits: Annotated[int, Field(ge=4, le=64)]
    rendezvous_depth: Annotated[int, Field(ge=1, le=64)]
    max_message_size: Annotated[int, Field(ge=64, le=1 << 40)]
    device: ShortText = ""

    @property
    def gid_bytes(self) -> bytes:
        """The 16 bytes that go into ``union ibv_gid``."""
        return bytes.fromhex(self.gid)

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The GID read as an IP address (RoCE v2); an IPv4-mapped one as IPv4."""
        full = ipaddress.IPv6Address(self.gid_bytes)
        return full.ipv4_mapped or full

    @model_validator(mode="after")
    def _addressable(self) -> Self:
        # IBA vol. 1, 4.1.3: LID 0 is reserved, from 0xc000 on they are multicast.
        if self.link_layer == "infiniband" and not 1 <= self.lid <= 0xBFFF:
            raise ValueError("lid: InfiniBand needs a unicast LID, 1 to 49151")
        if (self.link_layer == "ethernet") != self.gid_type.startswith("roce"):
            raise ValueError(f"gid_type: {self.gid_type} does not occur on {self.link_layer}")
        if self.link_layer == "ethernet" and not _is_unicast(self.address):
            raise ValueError("gid: a unicast address is due")
        return self

    @model_validator(mode="after")
    def _starts_below_its_maximum(self) -> Self:
        if self.receive_credits > self.receive_credits_max:
            raise ValueError("receive_credits: more than receive_credits_max")
        return self


def _is_unicast(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    broadcast = ipaddress.IPv4Address(0xFFFFFFFF)
    return not (address.is_multicast or address.is_unspecified or address == broadcast)


class Greeting(Model):
    """Server's first frame: which versions, whether a token is needed, and a nonce against replay."""

    type: Literal["greeting"] = "greeting"
    magic: Literal["aiordma"]
    versions: Versions
    nonce: Hex32
    auth: Auth


class Hello(Model):
    """Client's request; ``greeting`` repeats the server's nonce, so a recorded hello is worthless."""

    type: Literal["hello"] = "hello"
    version: Version
    versions: Versions
    features: Features = ()
    nonce: Hex32
    greeting: Hex32
    software: ShortText = ""
    endpoint: Endpoint

    @model_validator(mode="after")
    def _chosen_is_offered(self) -> Self:
        if self.version not in self.versions:
            raise ValueError("version: not among versions")
        return self


class AuthFrame(Model):
    """Proof of the token: a MAC over every frame before this one."""

    type: Literal["auth"] = "auth"
    mac: Hex32


class Welcome(Model):
    """Server's answer; ``hello`` repeats the client's nonce."""

    type: Literal["welcome"] = "welcome"
    version: Version
    features: Features = ()
    hello: Hex32
    software: ShortText = ""
    endpoint: Endpoint


class Ready(Model):
    """Client's queue pair is ready to send; the session begins."""

    type: Literal["ready"] = "ready"


class Refused(Model):
    """The sender gives up. ``code`` may be one of the future; ``versions`` comes with code ``version``."""

    type: Literal["refused"] = "refused"
    code: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,31}$")]
    message: LongText = ""
    versions: Versions | None = None


class Share(Model):
    """The sender's memory that the receiver may now touch, under a name."""

    type: Literal["share"] = "share"
    name: Name
    address: Annotated[int, Field(ge=0, lt=U64_LIMIT)]
    length: Annotated[int, Field(ge=1, le=1 << 63)]
    rkey: Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
    access: AccessList

    @model_validator(mode="after")
    def _does_not_wrap(self) -> Self:
        if self.address + self.length > U64_LIMIT:
            raise ValueError("length: address + length exceeds 2**64")
        return self


class Unshare(Model):
    """The name is withdrawn; its rkey no longer works."""

    type: Literal["unshare"] = "unshare"
    name: Name


class Withdraw(Model):
    """The offer of a large message is taken back: protocol/rendezvous.py."""

    type: Literal["withdraw"] = "withdraw"
    transfer: Annotated[int, Field(ge=0, le=0xFFFFFFFF)]


class Recall(Model):
    """The sender would like to have data credits back that the receiver does not use: protocol/credit.py."""

    type: Literal["recall"] = "recall"
    count: Annotated[int, Field(ge=1, le=4096)]


class Close(Model):
    """Last frame of a session. ``status`` is a completion status by name when one was the reason."""

    type: Literal["close"] = "close"
    code: Literal["normal", "error"] = "normal"
    message: LongText = ""
    status: Annotated[str, Field(pattern=r"^[A-Z][A-Z_]{0,31}$")] | None = None


HandshakeFrame = Greeting | Hello | AuthFrame | Welcome | Ready | Refused
SessionMessage = Share | Unshare | Withdraw | Recall | Close

HANDSHAKE_MODELS: dict[str, type[HandshakeFrame]] = {
    "greeting": Greeting,
    "hello": Hello,
    "auth": AuthFrame,
    "welcome": Welcome,
    "ready": Ready,
    "refused": Refused,
}
SESSION_MODELS: dict[str, type[SessionMessage]] = {
    "share": Share,
    "unshare": Unshare,
    "withdraw": Withdraw,
    "recall": Recall,
    "close": Close,
}

M = TypeVar("M", bound=Model)


def _first_error(exc: ValidationError) -> str:
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(str(part) for part in errors[0]["loc"])
    what = errors[0]["msg"].removeprefix("Value error, ")
    return printable(f"{where}: {what}" if where else what, 160)


def validate(model: type[M], obj: Mapping[str, object]) -> M:
    """``obj`` as ``model``. Raises MalformedHandshakeError that names the frame and the first bad field."""
    try:
        return model.model_validate(obj)
    except ValidationError as exc:
        name = model.model_fields["type"].default
        raise MalformedHandshakeError(f"{name} frame: {_first_error(exc)}") from None


def encode(message: HandshakeFrame | SessionMessage) -> bytes:
    """One frame, length and compact JSON; fields that are None are left out."""
    fields = message.model_dump(mode="json", exclude_none=True)
    return frame(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8"))


class OwnSide(Model):
    """What this side is configured to offer, checked by the rules that its frames must meet."""

    versions: Versions
    features: Features

    @classmethod
    def of(cls, versions: Iterable[int], features: Iterable[str]) -> Self:
        """Sorted and without repetitions. Raises MisuseError."""
        return cls.make(versions=tuple(sorted(set(versions))), features=tuple(sorted(set(features))))
