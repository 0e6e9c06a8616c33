"""The handshake and the session on the bootstrap TCP connection, as sans-IO state machines.

Bytes go in (``receive_data``), events come out; methods named after a frame return the bytes to send. No
socket, no clock, no randomness: deadlines are the caller's, nonces are arguments. The server speaks first,
so that its nonce makes each handshake unique; it emits :class:`HelloReceived` only when the client has been
validated and, with a token, authenticated, so that a stranger costs no device resource. Which frame may come
or go in which state is written in the tables ``_STEPS``; everything else is refused.

With a token both sides prove its knowledge by a MAC over all frames before the proof. Who alters a frame on
its way breaks the proof; who records one meets another nonce. The exceptions: a peer's misbehaviour is a
:class:`~aiordma.errors.BootstrapError` (handshake) or :class:`~aiordma.errors.ProtocolError` (session), a
call in the wrong state is our own caller's :class:`~aiordma.errors.MisuseError`.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from ..errors import (
    AuthenticationError,
    BootstrapError,
    BootstrapTimeoutError,
    IncompatibleError,
    MalformedHandshakeError,
    MisuseError,
    ProtocolError,
    VersionMismatchError,
)
from .bootstrap_models import (
    HANDSHAKE_FRAME_LIMIT,
    HANDSHAKE_MODELS,
    MAX_MESSAGE,
    NONCE_SIZE,
    PROTOCOL_VERSIONS,
    SESSION_FRAME_LIMIT,
    SESSION_MODELS,
    Access,
    Auth,
    AuthFrame,
    Close,
    Endpoint,
    FrameDecoder,
    GidType,
    Greeting,
    HandshakeFrame,
    Hello,
    LinkLayer,
    OwnSide,
    Ready,
    Recall,
    RefusalCode,
    Refused,
    SessionMessage,
    Share,
    Unshare,
    Welcome,
    Withdraw,
    encode,
    frame,
    parse_object,
    printable,
    type_of,
    validate,
)

__all__ = [
    "HANDSHAKE_FRAME_LIMIT",
    "MAX_SHARED_NAMES",
    "NONCE_SIZE",
    "PROTOCOL_VERSIONS",
    "SESSION_FRAME_LIMIT",
    "Access",
    "Agreed",
    "ClientHandshake",
    "Close",
    "Endpoint",
    "Established",
    "Event",
    "FrameDecoder",
    "GidType",
    "Greeted",
    "Greeting",
    "Hello",
    "HelloReceived",
    "LinkLayer",
    "Recall",
    "RefusalCode",
    "ServerHandshake",
    "SessionDecoder",
    "SessionMessage",
    "Share",
    "State",
    "Unshare",
    "Welcomed",
    "Withdraw",
    "check_compatible",
    "encode",
    "negotiate",
    "printable",
    "refusal_code",
]

MAX_SHARED_NAMES = 1024  # names one peer may have shared at a time
ROCE_UDP_PORT = 4791  # InfiniBand Architecture Specification, annex A17


# --- what the two sides agree on ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agreed:
    """The outcome of a handshake, seen from one side.

    ``initiator_depth`` and ``responder_depth`` go into ``max_rd_atomic`` and ``max_dest_rd_atomic``;
    ``send_credits`` and ``control_credits`` are the receives the peer has posted for us at first,
    ``send_credits_max`` what it may give us later, ``max_message_size`` the
    largest message it takes. ``authenticated`` says that the peer has proved to know the token.
    """

    version: int
    features: frozenset[str]
    mtu: int
    eager_size: int
    initiator_depth: int
    responder_depth: int
    send_credits: int
    send_credits_max: int
    control_credits: int
    rendezvous_depth: int
    max_message_size: int
    local: Endpoint
    remote: Endpoint
    software: str = ""
    authenticated: bool = False


def check_compatible(
    remote: Endpoint, *, link_layer: LinkLayer, gid_type: GidType, gid: bytes, lid: int
) -> None:
    """Raise IncompatibleError, with the reason, if our port and GID cannot reach ``remote``.

    Needs no queue pair of ours, so that a server can ask before it makes one.
    """
    if link_layer != remote.link_layer:
        raise IncompatibleError(
            f"link layers differ: {link_layer} here, {remote.link_layer} there; both must be on one fabric"
        )
    if gid_type != remote.gid_type:
        raise IncompatibleError(
            f"GID types differ: {gid_type} here, {remote.gid_type} there; choose a GID index of the same type"
        )
    # The network header of RoCE v2 follows the GID's form, and one packet has one header.
    ours, theirs = _ip_version(gid), _ip_version(remote.gid_bytes)
    if gid_type == "roce_v2" and ours != theirs:
        raise IncompatibleError(
            f"address families differ: the GID is IPv{ours} here, IPv{theirs} there; "
            "connect by an address of the family that both devices have"
        )
    if gid_type == "roce_v2":
        _check_udp_ports(lid, remote.lid)


def _check_udp_ports(ours: int, theirs: int) -> None:
    # RoCE has no LIDs. usroce names its UDP port there, and knows how to send to another's; every other device
    # leaves it 0 and knows port 4791 only.
    for lid, other, whose in ((ours, theirs, "this side's"), (theirs, ours, "the peer's")):
        if lid > 1023 and lid != ROCE_UDP_PORT and other == 0:
            raise IncompatibleError(
                f"{whose} usroce device is at UDP port {lid}, for port {ROCE_UDP_PORT} was taken at its address, "
                "and the other side's device can send to that port only; give usroce an address of its own "
                "(AIORDMA_USROCE_ADDRESS) where nothing else, soft RoCE included, has the port"
            )


def _ip_version(gid: bytes) -> int:
    return 4 if gid[:12] == bytes(10) + b"\xff\xff" else 6


def negotiate(
    local: Endpoint,
    remote: Endpoint,
    *,
    version: int,
    features: Iterable[str],
    software: str = "",
    authenticated: bool = False,
) -> Agreed:
    """What two endpoints can do together. Raises IncompatibleError if that is nothing."""
    # The transport has one value so far; the model refuses others.
    check_compatible(
        remote, link_layer=local.link_layer, gid_type=local.gid_type, gid=local.gid_bytes, lid=local.lid
    )
    return Agreed(
        version=version,
        features=frozenset(features),
        mtu=min(local.mtu, remote.mtu),
        eager_size=min(local.eager_size, remote.eager_size),
        initiator_depth=min(local.initiator_depth, remote.responder_depth),
        responder_depth=min(local.responder_depth, remote.initiator_depth),
        send_credits=remote.receive_credits,
        send_credits_max=remote.receive_credits_max,
        control_credits=remote.control_credits,
        rendezvous_depth=min(local.rendezvous_depth, remote.rendezvous_depth),
        max_message_size=remote.max_message_size,
        local=local,
        remote=remote,
        software=software,
        authenticated=authenticated,
    )


# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greeted:
    """Client: the server is there and a version is found; make a queue pair, then call ``hello``."""

    greeting: Greeting
    version: int


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """Server: the client is valid (and knows the token); make a queue pair, then call ``welcome``."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Welcomed:
    """Client: bring the queue pair to RTS, then call ``ready``."""

    agreed: Agreed


@dataclass(frozen=True, slots=True)
class Established:
    """Server: the client's queue pair is RTS; the session has begun."""

    agreed: Agreed


Event = Greeted | HelloReceived | Welcomed | Established


# --- refusals -----------------------------------------------------------------------------------------

_CODE_ERROR: dict[RefusalCode, type[BootstrapError]] = {
    "version": VersionMismatchError,
    "token": AuthenticationError,
    "malformed": MalformedHandshakeError,
    "timeout": BootstrapTimeoutError,
    "incompatible": IncompatibleError,
    "busy": BootstrapError,
    "internal": BootstrapError,
}


def refusal_code(error: BaseException) -> RefusalCode:
    """The code under which ``error`` is told to the peer; what it need not know is ``internal``."""
    for code, cls in _CODE_ERROR.items():
        if cls is not BootstrapError and isinstance(error, cls):
            return code
    return "internal"


def _refusal_error(refused: Refused) -> BootstrapError:
    classes: dict[str, type[BootstrapError]] = {str(code): cls for code, cls in _CODE_ERROR.items()}
    return classes.get(refused.code, BootstrapError)(_refusal_text(refused))


def _refusal_text(refused: Refused) -> str:
    text = f"the peer refused the connection ({refused.code})"
    if refused.message:
        text += f": {refused.message}"
    if refused.versions:
        text += f" [it speaks protocol versions {_listed(refused.versions)}]"
    return text


def _listed(versions: Iterable[int]) -> str:
    return ", ".join(str(version) for version in sorted(versions))


# --- states -------------------------------------------------------------------------------------------


class State(enum.Enum):
    """Where a handshake stands; the value is the text for "while ..." in messages and logs."""

    START = "before the greeting is sent"
    WAIT_GREETING = "waiting for the server's greeting"
    GREETED = "preparing the hello"
    HELLO_SENT = "sending the proof of the token"
    WAIT_HELLO = "waiting for the client's hello"
    WAIT_CLIENT_AUTH = "waiting for the client's proof of the token"
    VERIFIED = "preparing the welcome"
    WAIT_WELCOME = "waiting for the server's welcome"
    WELCOME_SENT = "sending the proof of the token to the client"
    WAIT_SERVER_AUTH = "waiting for the server's proof of the token"
    WELCOMED = "bringing up the queue pair"
    WAIT_READY = "waiting for the client's ready"
    ESTABLISHED = "established"
    FAILED = "failed"
    CLOSED = "closed"


class _Way(enum.Enum):
    SEND = "send"
    RECEIVE = "receive"


_S, _SEND, _RECV = State, _Way.SEND, _Way.RECEIVE
_Steps = Mapping[tuple[State, _Way, str], State]

_CLIENT_STEPS: dict[Auth, _Steps] = {
    "none": {
        (_S.WAIT_GREETING, _RECV, "greeting"): _S.GREETED,
        (_S.GREETED, _SEND, "hello"): _S.WAIT_WELCOME,
        (_S.WAIT_WELCOME, _RECV, "welcome"): _S.WELCOMED,
        (_S.WELCOMED, _SEND, "ready"): _S.ESTABLISHED,
    },
    "token": {
        (_S.WAIT_GREETING, _RECV, "greeting"): _S.GREETED,
        (_S.GREETED, _SEND, "hello"): _S.HELLO_SENT,
        (_S.HELLO_SENT, _SEND, "auth"): _S.WAIT_WELCOME,
        (_S.WAIT_WELCOME, _RECV, "welcome"): _S.WAIT_SERVER_AUTH,
        (_S.WAIT_SERVER_AUTH, _RECV, "auth"): _S.WELCOMED,
        (_S.WELCOMED, _SEND, "ready"): _S.ESTABLISHED,
    },
}
_SERVER_STEPS: dict[Auth, _Steps] = {
    "none": {
        (_S.START, _SEND, "greeting"): _S.WAIT_HELLO,
        (_S.WAIT_HELLO, _RECV, "hello"): _S.VERIFIED,
        (_S.VERIFIED, _SEND, "welcome"): _S.WAIT_READY,
        (_S.WAIT_READY, _RECV, "ready"): _S.ESTABLISHED,
    },
    "token": {
        (_S.START, _SEND, "greeting"): _S.WAIT_HELLO,
        (_S.WAIT_HELLO, _RECV, "hello"): _S.WAIT_CLIENT_AUTH,
        (_S.WAIT_CLIENT_AUTH, _RECV, "auth"): _S.VERIFIED,
        (_S.VERIFIED, _SEND, "welcome"): _S.WELCOME_SENT,
        (_S.WELCOME_SENT, _SEND, "auth"): _S.WAIT_READY,
        (_S.WAIT_READY, _RECV, "ready"): _S.ESTABLISHED,
    },
}
_SETTLED = (State.WELCOMED, State.WAIT_READY, State.ESTABLISHED)
_FINISHED = (State.ESTABLISHED, State.FAILED, State.CLOSED)


class Transcript:
    """Hash of every handshake frame so far, lengths included, in the order of the protocol."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, wire: bytes) -> None:
        """Append one whole frame."""
        self._hash.update(wire)

    def mac(self, key: bytes, label: bytes) -> str:
        """HMAC-SHA256(key, label || SHA256(frames so far)) in hex; the label tells the roles apart."""
        return hmac.new(key, label + self._hash.digest(), hashlib.sha256).hexdigest()


CLIENT_LABEL = b"aiordma client"
SERVER_LABEL = b"aiordma server"


def _key(token: str | bytes | None) -> bytes | None:
    if token is None:
        return None
    if not isinstance(token, str | bytes):
        raise MisuseError(f"token: str or bytes, not {type(token).__name__}")
    try:
        key = token.encode("utf-8") if isinstance(token, str) else token
    except UnicodeEncodeError:
        raise MisuseError("token: not encodable as UTF-8") from None
    if not key:
        raise MisuseError("token: must not be empty")
    return key


def _nonce_hex(nonce: bytes) -> str:
    if len(nonce) != NONCE_SIZE:
        raise MisuseError(f"nonce: {NONCE_SIZE} bytes from secrets.token_bytes, not {len(nonce)}")
    return nonce.hex()


class _Handshake:
    """What both roles share: framing, the step table, the transcript, refusals.

    ``nonce``: 32 fresh random bytes. ``token``: the secret that both sides know. ``features``: what this side
    can do beyond the version. ``requires``: those (offered as well) without which a peer is of no use.
    ``software``: free text for the peer's log. ``peer``: the other side's address, for exceptions. Raises
    MisuseError for arguments that no frame can carry.
    """

    _ROLE_STEPS: ClassVar[Mapping[Auth, _Steps]]
    _START: ClassVar[State]

    def __init__(
        self,
        *,
        nonce: bytes,
        token: str | bytes | None = None,
        features: Iterable[str] = (),
        requires: Iterable[str] = (),
        software: str = "",
        versions: Iterable[int] = PROTOCOL_VERSIONS,
        peer: str | None = None,
    ) -> None:
        self._key = _key(token)
        self._auth: Auth = "none" if self._key is None else "token"
        self._steps = self._ROLE_STEPS[self._auth]
        self._state = self._START
        self._nonce = _nonce_hex(nonce)
        self._required = frozenset(requires)
        own = OwnSide.of(versions, {*features, *self._required})
        self._versions = own.versions
        self._features = own.features
        self._software = printable(software, 64)
        self._peer = peer
        self._decoder = FrameDecoder(HANDSHAKE_FRAME_LIMIT)
        self._transcript = Transcript()
        self._agreed: Agreed | None = None

    @property
    def state(self) -> State:
        """Where the handshake stands; ``state.value`` reads well in a timeout's message."""
        return self._state

    @property
    def agreed(self) -> Agreed:
        """What was settled. Server: from ``welcome`` on, for its queue pair must be up before ``ready``."""
        # The client fills _agreed from a welcome whose proof may still be due: not before WELCOMED.
        if self._agreed is None or self._state not in _SETTLED:
            raise MisuseError(f"agreed: nothing yet, the handshake is {self._state.value}")
        return self._agreed

    def receive_data(self, data: bytes) -> list[Event]:
        """Take in bytes of the peer, return what they brought.

        Raises a BootstrapError (its subclass says why) and is of no use afterwards but for
        :meth:`refuse_error`. Events before the violation in the same bytes are dropped with it: nothing is
        to be built for such a peer. What follows the last handshake frame is kept for :meth:`take_rest`.
        """
        if self._state in _FINISHED:
            raise MisuseError(f"receive_data: the handshake is {self._state.value}")
        self._decoder.push(data)
        try:
            return self._drain()
        except BootstrapError as exc:
            exc.peer = exc.peer or self._peer
            self._fail()
            raise

    def _drain(self) -> list[Event]:
        events = []
        while self._state is not State.ESTABLISHED and (body := self._decoder.next_body()) is not None:
            if (event := self._receive(body)) is not None:
                events.append(event)
        return events

    def receive_eof(self) -> None:
        """The peer closed its side. Raises BootstrapError, unless the handshake is over."""
        if self._state not in _FINISHED:
            during = self._state.value
            self._fail()
            raise BootstrapError(f"the peer closed the connection while {during}", peer=self._peer)

    def take_rest(self) -> bytes:
        """Bytes that came after the handshake's last frame: the first food of the :class:`SessionDecoder`."""
        if self._state is not State.ESTABLISHED:
            raise MisuseError("take_rest: the handshake is not over")
        return self._decoder.take_rest()

    def refuse(self, code: RefusalCode, message: str) -> bytes:
        """The frame that ends the handshake; empty when either side has refused already."""
        if self._state is State.ESTABLISHED:
            raise MisuseError("refuse: the handshake is over, send a close message")
        if self._state is State.CLOSED:
            return b""
        self._fail()
        self._state = State.CLOSED
        versions = self._versions if code == "version" else None
        return encode(Refused(code=code, message=printable(message, MAX_MESSAGE), versions=versions))

    def refuse_error(self, error: BaseException) -> bytes:
        """:meth:`refuse` for an exception; one that is not about the handshake keeps its text to itself."""
        known = isinstance(error, BootstrapError)
        return self.refuse(refusal_code(error), str(error) if known else "internal error")

    # --- one frame ------------------------------------------------------------------------------------

    def _receive(self, body: bytes) -> Event | None:
        obj = parse_object(body)
        kind = type_of(obj)
        if kind == "refused":
            refused = validate(Refused, obj)
            self._state = State.CLOSED
            raise _refusal_error(refused)
        after = self._steps.get((self._state, _RECV, kind))
        if after is None:
            raise MalformedHandshakeError(f"frame {printable(kind)!r} came while {self._state.value}")
        # The handler runs first: a proof covers the frames before it, not itself.
        event = self._handlers()[kind](validate(HANDSHAKE_MODELS[kind], obj))
        self._transcript.add(frame(body))
        self._state = after
        return event

    def _handlers(self) -> dict[str, Callable[[Any], Event | None]]:
        raise NotImplementedError

    def _send(self, message: HandshakeFrame) -> bytes:
        after = self._steps.get((self._state, _SEND, message.type))
        if after is None:
            raise MisuseError(f"{message.type}: not allowed, the handshake is {self._state.value}")
        wire = encode(message)
        self._transcript.add(wire)
        self._state = after
        return wire

    def _send_proof(self, label: bytes) -> bytes:
        if self._key is None:
            return b""
        return self._send(AuthFrame(mac=self._transcript.mac(self._key, label)))

    def _check_proof(self, proof: AuthFrame, label: bytes, message: str) -> None:
        assert self._key is not None  # the step table admits the frame only with a token
        if not hmac.compare_digest(self._transcript.mac(self._key, label), proof.mac):
            raise AuthenticationError(message)

    def _check_features(self, offered: Iterable[str], who: str) -> None:
        missing = sorted(self._required.difference(offered))
        if missing:
            raise IncompatibleError(f"this side speaks {', '.join(missing)}, and the {who} does not")

    def _check_echo(self, echo: str, what: str) -> None:
        if not hmac.compare_digest(echo, self._nonce):
            raise AuthenticationError(f"the {what}: it was replayed or altered on its way")

    def _fail(self) -> None:
        if self._state is not State.CLOSED:
            self._state = State.FAILED
        self._decoder.take_rest()


# --- the client ---------------------------------------------------------------------------------------


class ClientHandshake(_Handshake):
    """The side that connects: Greeted, then hello(); Welcomed, then ready(); then a SessionDecoder.

    With a ``token``, a server that does not ask for it is refused, for otherwise anyone on the way could
    switch the check off. Arguments: see the base class.
    """

    _ROLE_STEPS = _CLIENT_STEPS
    _START = State.WAIT_GREETING
    _version = 0
    _server_nonce = ""
    _local: Endpoint | None = None

    def hello(self, endpoint: Endpoint) -> bytes:
        """The hello and, with a token, the proof; ``endpoint`` is our queue pair, which must exist by now."""
        if self._state is not State.GREETED:
            raise MisuseError(f"hello: not allowed, the handshake is {self._state.value}")
        hello = Hello(
            version=self._version,
            versions=self._versions,
            features=self._features,
            nonce=self._nonce,
            greeting=self._server_nonce,
            software=self._software,
            endpoint=endpoint,
        )
        wire = self._send(hello)
        self._local = endpoint
        return wire + self._send_proof(CLIENT_LABEL)

    def ready(self) -> bytes:
        """Our queue pair is RTS: the last frame of the handshake."""
        return self._send(Ready())

    def _handlers(self) -> dict[str, Callable[[Any], Event | None]]:
        return {"greeting": self._on_greeting, "welcome": self._on_welcome, "auth": self._on_auth}

    def _on_greeting(self, greeting: Greeting) -> Event:
        common = set(self._versions) & set(greeting.versions)
        if not common:
            raise VersionMismatchError(
                f"no common protocol version: {_listed(self._versions)} here, "
                f"{_listed(greeting.versions)} at the server"
            )
        if greeting.auth != self._auth:
            raise AuthenticationError(
                "the server asks for a token and none was given"
                if self._key is None
                else "a token was given and the server does not ask for one"
            )
        self._version = max(common)
        self._server_nonce = greeting.nonce
        return Greeted(greeting, self._version)

    def _on_welcome(self, welcome: Welcome) -> Event | None:
        self._check_echo(welcome.hello, "welcome answers another hello")
        if welcome.version != self._version:
            raise VersionMismatchError(
                f"the server welcomes with version {welcome.version}, {self._version} was asked for"
            )
        if not set(welcome.features) <= set(self._features):
            raise MalformedHandshakeError("welcome frame: features: one that was not offered")
        self._check_features(welcome.features, "server")
        assert self._local is not None
        self._agreed = negotiate(
            self._local,
            welcome.endpoint,
            version=self._version,
            features=welcome.features,
            software=welcome.software,
            authenticated=self._key is not None,
        )
        # With a token nothing of this is believed before the proof.
        return Welcomed(self._agreed) if self._key is None else None

    def _on_auth(self, proof: AuthFrame) -> Event:
        self._check_proof(proof, SERVER_LABEL, "the server does not know the token, or a frame was altered")
        assert self._agreed is not None
        return Welcomed(self._agreed)


# --- the server ---------------------------------------------------------------------------------------


class ServerHandshake(_Handshake):
    """The side that listens: greeting(), HelloReceived, welcome(), Established; then a SessionDecoder.

    With a ``token`` only clients that know it get in. Arguments: see the base class.
    """

    _ROLE_STEPS = _SERVER_STEPS
    _START = State.START
    _hello: Hello | None = None

    def greeting(self) -> bytes:
        """The first frame, due as soon as the connection is accepted."""
        return self._send(
            Greeting(magic="aiordma", versions=self._versions, nonce=self._nonce, auth=self._auth)
        )

    def welcome(self, endpoint: Endpoint) -> bytes:
        """The answer to a HelloReceived and, with a token, our proof. Raises IncompatibleError."""
        if self._state is not State.VERIFIED or self._hello is None:
            raise MisuseError(f"welcome: not allowed, the handshake is {self._state.value}")
        hello = self._hello
        features = tuple(sorted(set(self._features) & set(hello.features)))
        self._agreed = negotiate(
            endpoint,
            hello.endpoint,
            version=hello.version,
            features=features,
            software=hello.software,
            authenticated=self._key is not None,
        )
        answer = Welcome(
            version=hello.version,
            features=features,
            hello=hello.nonce,
            software=self._software,
            endpoint=endpoint,
        )
        return self._send(answer) + self._send_proof(SERVER_LABEL)

    def _handlers(self) -> dict[str, Callable[[Any], Event | None]]:
        return {"hello": self._on_hello, "auth": self._on_auth, "ready": self._on_ready}

    def _on_hello(self, hello: Hello) -> Event | None:
        self._check_echo(hello.greeting, "hello answers another greeting")
        common = set(self._versions) & set(hello.versions)
        if not common or hello.version != max(common):
            raise VersionMismatchError(
                f"version {hello.version} chosen: {_listed(self._versions)} here, "
                f"{_listed(hello.versions)} at the client"
            )
        self._hello = hello
        return self._believed(hello) if self._key is None else None

    def _on_auth(self, proof: AuthFrame) -> Event:
        self._check_proof(proof, CLIENT_LABEL, "the token is wrong, or a frame was altered on its way")
        assert self._hello is not None
        return self._believed(self._hello)

    def _believed(self, hello: Hello) -> Event:
        self._check_features(hello.features, "client")
        return HelloReceived(hello)

    def _on_ready(self, ready: Ready) -> Event:
        return Established(self.agreed)


# --- the session --------------------------------------------------------------------------------------


class SessionDecoder:
    """Messages of the peer after the handshake, and the book of the names it shares.

    Feed it :meth:`take_rest` of the handshake first. Raises ProtocolError; after that, and after a ``close``,
    further bytes are dropped.
    """

    def __init__(self, *, peer: str | None = None) -> None:
        self._peer = peer
        self._decoder = FrameDecoder(SESSION_FRAME_LIMIT)
        self._shared: dict[str, Share] = {}
        self._over = False

    @property
    def shared(self) -> Mapping[str, Share]:
        """What the peer shares right now, by name; a live view."""
        return MappingProxyType(self._shared)

    def receive_data(self, data: bytes) -> list[SessionMessage]:
        """The messages that ``data`` completes, in order. Raises ProtocolError."""
        if self._over:
            return []
        self._decoder.push(data)
        try:
            return self._drain()
        except (MalformedHandshakeError, ProtocolError) as exc:
            self._finish()
            raise ProtocolError(str(exc), peer=self._peer) from None

    def _drain(self) -> list[SessionMessage]:
        messages = []
        while (body := self._decoder.next_body()) is not None:
            if (message := self._message(body)) is not None:
                messages.append(message)
        return messages

    def _message(self, body: bytes) -> SessionMessage | None:
        obj = parse_object(body)
        kind = type_of(obj)
        if kind == "refused":
            return self._late_refusal(validate(Refused, obj))
        model = SESSION_MODELS.get(kind)
        if model is None:
            if obj.get("optional") is True:
                return None
            raise ProtocolError(f"message {printable(kind)!r} is unknown and not optional")
        message = validate(model, obj)
        self._note(message)
        return message

    def _late_refusal(self, refused: Refused) -> Close:
        # The server's deadline and our ready may cross on the wire; to us the session had begun.
        self._finish()
        return Close(code="error", message=printable(_refusal_text(refused), MAX_MESSAGE))

    def _note(self, message: SessionMessage) -> None:
        match message:
            case Share(name=name):
                self._note_share(name, message)
            case Unshare(name=name):
                # TCP keeps the order, so withdrawing what is not there is a bug of the peer.
                if self._shared.pop(name, None) is None:
                    raise ProtocolError(f"unshare of {printable(name)!r}, which is not shared")
            case Close():
                self._finish()

    def _note_share(self, name: str, message: Share) -> None:
        if name in self._shared:
            raise ProtocolError(f"share of {printable(name)!r}, which is shared already")
        if len(self._shared) >= MAX_SHARED_NAMES:
            raise ProtocolError(f"the peer shares more than {MAX_SHARED_NAMES} names")
        self._shared[name] = message

    def _finish(self) -> None:
        self._over = True
        self._decoder.take_rest()
