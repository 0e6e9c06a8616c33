"""The bootstrap's machines pushed through each other, and every kind of hostile input pushed into them."""

from __future__ import annotations

import hashlib
import hmac
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiordma.errors import (
    AuthenticationError,
    BootstrapError,
    BootstrapTimeoutError,
    CompletionError,
    IncompatibleError,
    MalformedHandshakeError,
    MisuseError,
    ProtocolError,
    VersionMismatchError,
)
from aiordma.protocol import bootstrap as b
from aiordma.protocol.bootstrap_models import HANDSHAKE_MODELS, SESSION_MODELS, Refused, frame, parse_object

DOC = pathlib.Path(__file__).parents[2] / "docs" / "protocol.md"
SERVER_NONCE = bytes(range(32))
CLIENT_NONCE = bytes(range(32, 64))
TOKEN = "correct horse battery staple"
Obj = dict[str, Any]
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def endpoint(**changes: Any) -> b.Endpoint:
    fields: Obj = {
        "link_layer": "ethernet",
        "gid": "::ffff:192.0.2.1",
        "gid_type": "roce_v2",
        "qp_num": 0x11,
        "psn": 0x123456,
        "mtu": 4096,
        "initiator_depth": 16,
        "responder_depth": 16,
        "eager_size": 8192,
        "receive_credits": 64,
        "receive_credits_max": 64,
        "control_credits": 4,
        "rendezvous_depth": 8,
        "max_message_size": 1 << 30,
        "device": "usroce0",
    }
    return b.Endpoint(**{**fields, **changes})


CLIENT_END = endpoint()
SERVER_END = endpoint(gid="::ffff:192.0.2.2", qp_num=0x12, psn=0xABCDEF, mtu=1024, device="rxe0")


def client(**changes: Any) -> b.ClientHandshake:
    return b.ClientHandshake(
        **{"nonce": CLIENT_NONCE, "features": ["rpc"], "software": "example 1", "peer": "server", **changes}
    )


def server(**changes: Any) -> b.ServerHandshake:
    return b.ServerHandshake(
        **{
            "nonce": SERVER_NONCE,
            "features": ["rpc", "streams"],
            "software": "example 2",
            "peer": "client",
            **changes,
        }
    )


class Pair:
    """A client and a server; every step passes its bytes through ``wire``, which may chop or alter them."""

    def __init__(
        self, token: str | None = None, wire: Callable[[bytes], Iterator[bytes]] | None = None
    ) -> None:
        self.client, self.server = client(token=token), server(token=token)
        self.wire = wire or (lambda data: iter([data]))
        self.sent: list[bytes] = []

    def pass_to(self, side: b.ClientHandshake | b.ServerHandshake, data: bytes) -> b.Event:
        self.sent.append(data)
        events = [event for chunk in self.wire(data) for event in side.receive_data(chunk)]
        assert len(events) == 1
        return events[0]

    def up_to_hello(self) -> bytes:
        assert isinstance(self.pass_to(self.client, self.server.greeting()), b.Greeted)
        return self.client.hello(CLIENT_END)

    def up_to_welcome(self) -> bytes:
        event = self.pass_to(self.server, self.up_to_hello())
        assert isinstance(event, b.HelloReceived)
        assert event.hello.endpoint == CLIENT_END
        return self.server.welcome(SERVER_END)

    def run(self) -> tuple[b.Agreed, b.Agreed]:
        welcomed = self.pass_to(self.client, self.up_to_welcome())
        established = self.pass_to(self.server, self.client.ready())
        assert isinstance(welcomed, b.Welcomed)
        assert isinstance(established, b.Established)
        return welcomed.agreed, established.agreed


def outcome_of(call: Callable[[bytes], Any], data: bytes, allowed: type[Exception]) -> Any:
    """What ``call(data)`` returned, or the exception it raised; any but an ``allowed`` one fails the test."""
    try:
        return call(data)
    except allowed as exc:
        return exc


def packed(obj: Any) -> bytes:
    return frame(json.dumps(obj).encode())


def unpacked(wire: bytes) -> list[Obj]:
    return [json.loads(body) for body in b.FrameDecoder(b.SESSION_FRAME_LIMIT).feed(wire)]


def waiting_server(token: str | None = None) -> b.ServerHandshake:
    machine = server(token=token)
    machine.greeting()
    return machine


def waiting_client(token: str | None = None) -> b.ClientHandshake:
    """A client that has sent its hello."""
    pair = Pair(token)
    pair.up_to_hello()
    return pair.client


# --- the good case ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, TOKEN])
def test_both_sides_agree(token: str | None) -> None:
    pair = Pair(token)
    ours, theirs = pair.run()
    assert (ours.version, ours.features, ours.mtu, ours.eager_size) == (1, frozenset({"rpc"}), 1024, 8192)
    assert (theirs.features, theirs.mtu, theirs.eager_size) == (ours.features, ours.mtu, ours.eager_size)
    assert (ours.local, ours.remote) == (theirs.remote, theirs.local) == (CLIENT_END, SERVER_END)
    assert (ours.software, theirs.software) == ("example 2", "example 1")
    assert ours.authenticated is theirs.authenticated is (token is not None)
    assert pair.client.agreed is ours
    assert pair.server.agreed is theirs


@quick
@given(st.data(), st.sampled_from([None, TOKEN]))
def test_any_segmentation(data: st.DataObject, token: str | None) -> None:
    def chop(wire: bytes) -> Iterator[bytes]:
        cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=8).map(sorted))
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            if end > start:
                yield wire[start:end]

    assert Pair(token, chop).run() == Pair(token).run()


def test_byte_by_byte() -> None:
    Pair(TOKEN, lambda wire: (wire[i : i + 1] for i in range(len(wire)))).run()


def test_session_bytes_behind_ready_are_kept() -> None:
    pair = Pair(TOKEN)
    pair.pass_to(pair.client, pair.up_to_welcome())
    share = b.Share(name="inbox", address=4096, length=8, rkey=7, access=("read",))
    behind = b.encode(share) + b.encode(b.Close())[:5]
    events = pair.server.receive_data(pair.client.ready() + behind)
    assert [type(event) for event in events] == [b.Established]
    session = b.SessionDecoder()
    assert session.receive_data(pair.server.take_rest()) == [share]
    assert session.receive_data(b.encode(b.Close())[5:]) == [b.Close()]


def test_largest_frames_fit() -> None:
    wide = "\N{GRINNING FACE}" * 64
    features = [f"f{i:031}" for i in range(64)]
    versions = range(1, 17)
    end = endpoint(device=wide, psn=0xFFFFFF, qp_num=0xFFFFFE)
    options: Obj = {"features": features, "versions": versions, "software": wide, "token": TOKEN}
    one, two = client(**options), server(**options)
    one.receive_data(two.greeting())
    two.receive_data(one.hello(end))
    (event,) = one.receive_data(two.welcome(end))
    assert isinstance(event, b.Welcomed)
    assert (event.agreed.version, event.agreed.software) == (16, wide)
    assert len(one.refuse("internal", "\N{GRINNING FACE}" * 10_000)) < b.HANDSHAKE_FRAME_LIMIT


def test_worked_example_in_the_docs() -> None:
    text = DOC.read_text()
    block = text.split("```json transcript\n")[1].split("\n```")[0].splitlines()
    frames = [frame(line.encode()) for line in block]
    for label, count, line in (("client", 2, 2), ("server", 4, 4)):
        digest = hashlib.sha256(b"".join(frames[:count])).digest()
        mac = hmac.new(TOKEN.encode(), f"aiordma {label}".encode() + digest, "sha256").hexdigest()
        assert f"`{digest.hex()}`" in text
        assert json.loads(block[line]) == {"type": "auth", "mac": mac}
    assert f"`{frames[0][:4].hex(' ')}`" in text
    pair = Pair(TOKEN)
    ours, _ = pair.run()
    assert b"".join(pair.sent) == b"".join(frames)
    assert (ours.mtu, ours.eager_size, ours.initiator_depth, ours.responder_depth) == (1024, 8192, 16, 16)


def test_docs_name_every_field_and_code() -> None:
    text = DOC.read_text()
    for kind, model in {**HANDSHAKE_MODELS, **SESSION_MODELS}.items():
        assert f"`{kind}`" in text
        for field in model.model_fields:
            assert f"`{field}`" in text
    for field in b.Endpoint.model_fields:
        assert f"| `{field}` |" in text
    for code, (error, _) in REFUSALS.items():
        assert any(f"| `{code}` |" in line and f"`{error.__name__}`" in line for line in text.splitlines())


# --- tokens, replay, alteration -----------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(None, TOKEN), (TOKEN, None)])
def test_token_on_one_side_only(ours: str | None, theirs: str | None) -> None:
    one, two = client(token=ours), server(token=theirs)
    with pytest.raises(AuthenticationError, match="token") as caught:
        one.receive_data(two.greeting())
    assert caught.value.peer == "server"
    with pytest.raises(AuthenticationError, match=r"refused.*\(token\)"):
        two.receive_data(one.refuse_error(caught.value))


def test_wrong_token_of_the_client() -> None:
    one, two = client(token="guess"), server(token=TOKEN)
    one.receive_data(two.greeting())
    with pytest.raises(AuthenticationError) as caught:
        two.receive_data(one.hello(CLIENT_END))
    with pytest.raises(AuthenticationError, match="refused"):
        one.receive_data(two.refuse_error(caught.value))


def test_server_that_does_not_know_the_token() -> None:
    """A false server can copy the client's whole stream, but has no proof of its own; not even ours back."""
    one = client(token=TOKEN)
    false = waiting_server(None)
    one.receive_data(server(token=TOKEN).greeting())
    hello, auth = unpacked(one.hello(CLIENT_END))
    false.receive_data(packed(hello))
    with pytest.raises(AuthenticationError):
        one.receive_data(false.welcome(SERVER_END) + packed(auth))


def test_client_believes_nothing_before_the_proof() -> None:
    pair = Pair(TOKEN)
    wire = pair.up_to_welcome()
    assert pair.client.receive_data(wire[: wire.index(b'{"type":"auth"') - 4]) == []
    assert pair.client.state is b.State.WAIT_SERVER_AUTH
    with pytest.raises(MisuseError):
        _ = pair.client.agreed
    with pytest.raises(MisuseError):
        pair.client.ready()


@pytest.mark.parametrize("token", [None, TOKEN])
def test_replay_of_a_client_stream(token: str | None) -> None:
    pair = Pair(token)
    pair.run()
    _, hello, _, _ = pair.sent
    fresh = server(token=token, nonce=b"\x55" * 32)
    fresh.greeting()
    with pytest.raises(AuthenticationError, match="replay"):
        fresh.receive_data(hello)


def test_replay_with_the_echo_put_right_fails_by_the_proof() -> None:
    pair = Pair(TOKEN)
    pair.run()
    fresh = server(token=TOKEN, nonce=b"\x55" * 32)
    fresh.greeting()
    with pytest.raises(AuthenticationError):
        fresh.receive_data(pair.sent[1].replace(SERVER_NONCE.hex().encode(), b"55" * 32))


@pytest.mark.parametrize("token", [None, TOKEN])
def test_replay_of_a_server_stream(token: str | None) -> None:
    pair = Pair(token)
    pair.run()
    victim = client(token=token, nonce=b"\x66" * 32)
    victim.receive_data(pair.sent[0])
    victim.hello(CLIENT_END)
    with pytest.raises(AuthenticationError, match="replay"):
        victim.receive_data(pair.sent[2])


def altered(wire: bytes, position: int, flip: int) -> bytes:
    return wire[:position] + bytes([wire[position] ^ flip]) + wire[position + 1 :]


def silent_or_refused(side: b.ClientHandshake | b.ServerHandshake, wire: bytes) -> None:
    """An altered stream may leave the receiver waiting for more, or be refused; it is never taken."""
    error = outcome_of(side.receive_data, wire, BootstrapError)
    if isinstance(error, BootstrapError):
        assert side.refuse_error(error) or side.state is b.State.CLOSED
    else:
        assert error == []


def test_every_altered_byte_is_noticed() -> None:
    pair = Pair(TOKEN)
    hello = pair.up_to_hello()
    for position in range(len(hello)):
        silent_or_refused(waiting_server(TOKEN), altered(hello, position, 1 + position % 255))
    pair = Pair(TOKEN)
    welcome = pair.up_to_welcome()
    for position in range(len(welcome)):
        silent_or_refused(waiting_client(TOKEN), altered(welcome, position, 1 + position % 255))


@quick
@given(st.data())
def test_altered_greeting_is_noticed(data: st.DataObject) -> None:
    one, two = client(token=TOKEN), server(token=TOKEN)
    greeting = two.greeting()
    position = data.draw(st.integers(0, len(greeting) - 1))
    try:
        events = one.receive_data(altered(greeting, position, data.draw(st.integers(1, 255))))
    except BootstrapError:
        return
    if events:
        silent_or_refused(two, one.hello(CLIENT_END))


def test_added_white_space_is_noticed() -> None:
    pair = Pair(TOKEN)
    hello, auth = unpacked(pair.up_to_hello())
    with pytest.raises(AuthenticationError):
        pair.server.receive_data(packed(hello) + packed(auth))


@pytest.mark.parametrize("token", ["", b"", 5, "\ud800"])
def test_bad_token_arguments(token: Any) -> None:
    with pytest.raises(MisuseError, match="token"):
        server(token=token)


def test_text_and_bytes_tokens_are_the_same() -> None:
    one, two = client(token="héslo"), server(token="héslo".encode())
    one.receive_data(two.greeting())
    assert two.receive_data(one.hello(CLIENT_END))


def test_token_is_in_no_repr() -> None:
    machine = server(token=TOKEN)
    assert TOKEN not in repr(machine)


# --- versions and features ----------------------------------------------------------------------------


def test_highest_common_version() -> None:
    one, two = client(versions=[1, 2, 3]), server(versions=[2, 1, 9])
    one.receive_data(two.greeting())
    two.receive_data(one.hello(CLIENT_END))
    one.receive_data(two.welcome(SERVER_END))
    assert one.agreed.version == two.agreed.version == 2


def test_no_common_version() -> None:
    one, two = client(versions=[1]), server(versions=[2, 3])
    with pytest.raises(VersionMismatchError, match=r"1 here, 2, 3 at the server") as caught:
        one.receive_data(two.greeting())
    with pytest.raises(VersionMismatchError, match=r"\[it speaks protocol versions 1\]"):
        two.receive_data(one.refuse_error(caught.value))


@pytest.mark.parametrize(("version", "versions"), [(3, [3]), (1, [1, 2])])
def test_server_checks_the_choice(version: int, versions: list[int]) -> None:
    two = server(versions=[1, 2])
    two.greeting()
    hello = {**good_hello(), "version": version, "versions": versions}
    with pytest.raises(VersionMismatchError):
        two.receive_data(packed(hello))


def test_unoffered_version_or_feature_in_welcome() -> None:
    (welcome,) = unpacked(Pair().up_to_welcome())
    with pytest.raises(VersionMismatchError):
        waiting_client().receive_data(packed({**welcome, "version": 2}))
    with pytest.raises(MalformedHandshakeError, match="features"):
        waiting_client().receive_data(packed({**welcome, "features": ["streams"]}))


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_server_refuses_a_client_without_what_it_requires(token: str | None) -> None:
    pair = Pair(token)
    pair.server = server(token=token, requires=["stream"])
    with pytest.raises(IncompatibleError, match="speaks stream, and the client does not") as caught:
        pair.pass_to(pair.server, pair.up_to_hello())
    with pytest.raises(IncompatibleError, match="speaks stream"):
        pair.client.receive_data(pair.server.refuse_error(caught.value))


def test_a_stranger_is_not_told_what_a_server_requires() -> None:
    pair = Pair(TOKEN)
    pair.server = server(token="another token", requires=["stream"])
    with pytest.raises(AuthenticationError):
        pair.pass_to(pair.server, pair.up_to_hello())


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_client_refuses_a_server_without_what_it_requires(token: str | None) -> None:
    pair = Pair(token)
    pair.client = client(token=token, requires=["stream"])
    with pytest.raises(IncompatibleError, match="speaks stream, and the server does not"):
        pair.pass_to(pair.client, pair.up_to_welcome())


def test_what_is_required_is_offered() -> None:
    pair = Pair()
    pair.client, pair.server = client(requires=["stream"]), server(requires=["stream"])
    ours, theirs = pair.run()
    assert ours.features == theirs.features == {"rpc", "stream"}


def test_unknown_fields_are_ignored() -> None:
    hello = good_hello()
    hello["future"] = {"deep": [1, {"x": None}], "real": 1.5}
    hello["endpoint"]["future"] = True
    assert waiting_server().receive_data(packed(hello))


@pytest.mark.parametrize(
    "arguments",
    [
        {"features": ["UPPER"]},
        {"features": [f"f{i}" for i in range(65)]},
        {"versions": []},
        {"versions": [0]},
    ],
)
def test_own_arguments_that_no_frame_can_carry(arguments: Obj) -> None:
    with pytest.raises(MisuseError):
        client(**arguments)


def test_nonce_length() -> None:
    with pytest.raises(MisuseError, match="nonce"):
        client(nonce=b"short")


# --- negotiation --------------------------------------------------------------------------------------


def test_negotiate_takes_what_both_can() -> None:
    local = endpoint(initiator_depth=4, responder_depth=100, eager_size=64, mtu=256, control_credits=9)
    remote = endpoint(
        initiator_depth=7,
        responder_depth=2,
        eager_size=4096,
        receive_credits=5,
        receive_credits_max=7,
        control_credits=6,
    )
    agreed = b.negotiate(local, remote, version=1, features=["rpc"])
    assert (agreed.initiator_depth, agreed.responder_depth) == (2, 7)
    assert (agreed.mtu, agreed.eager_size) == (256, 64)
    assert (agreed.send_credits, agreed.send_credits_max, agreed.control_credits) == (5, 7, 6)


INFINIBAND: Obj = {"link_layer": "infiniband", "gid_type": "ib", "lid": 3, "gid": "fe80::1"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (INFINIBAND, "link layers differ: ethernet here, infiniband there"),
        ({"gid_type": "roce_v1"}, "GID types differ: roce_v2 here, roce_v1 there"),
        ({"gid": "2001:db8::1"}, "IPv4 here, IPv6 there"),
    ],
)
def test_incompatible_endpoints(changes: Obj, text: str) -> None:
    remote = endpoint(**changes)
    with pytest.raises(IncompatibleError, match=text):
        b.negotiate(CLIENT_END, remote, version=1, features=[])


@pytest.mark.parametrize("gid", ["2001:db8::1", "fe80::1", "::1"])
def test_ipv6_with_ipv6(gid: str) -> None:
    b.negotiate(endpoint(gid=gid), endpoint(gid="2001:db8::2"), version=1, features=[])


@pytest.mark.parametrize(
    ("ours", "theirs"), [(0, 0), (4791, 0), (0, 4791), (50_000, 4791), (50_000, 40_000), (1, 0)]
)
def test_udp_ports_that_reach_each_other(ours: int, theirs: int) -> None:
    agreed = b.negotiate(endpoint(lid=ours), endpoint(lid=theirs), version=1, features=[])
    assert agreed.remote.lid == theirs


@pytest.mark.parametrize(("ours", "theirs", "whose"), [(50_000, 0, "this side's"), (0, 50_000, "the peer's")])
def test_usroce_beside_another_device_at_one_address(ours: int, theirs: int, whose: str) -> None:
    """rxe sends to port 4791 only, and has it at every address of its machine."""
    with pytest.raises(IncompatibleError, match=f"{whose} usroce device is at UDP port 50000"):
        b.negotiate(endpoint(lid=ours), endpoint(lid=theirs), version=1, features=[])


def test_incompatible_server_refuses_and_stays_consistent() -> None:
    pair = Pair()
    pair.pass_to(pair.server, pair.up_to_hello())
    with pytest.raises(IncompatibleError) as caught:
        pair.server.welcome(endpoint(gid="2001:db8::1"))
    with pytest.raises(IncompatibleError, match="address families differ"):
        pair.client.receive_data(pair.server.refuse_error(caught.value))


def test_gid_forms() -> None:
    forms = ["::ffff:192.0.2.1", "::FFFF:C000:201", "00000000000000000000FFFFC0000201"]
    assert {endpoint(gid=form).gid for form in forms} == {"00000000000000000000ffffc0000201"}
    assert endpoint().gid_bytes == bytes(10) + b"\xff\xff\xc0\x00\x02\x01"
    assert str(endpoint().address) == "192.0.2.1"
    assert endpoint(**INFINIBAND).lid == 3


# --- refusals -----------------------------------------------------------------------------------------

REFUSALS: dict[b.RefusalCode, tuple[type[BootstrapError], BaseException]] = {
    "version": (VersionMismatchError, VersionMismatchError("x")),
    "token": (AuthenticationError, AuthenticationError("x")),
    "malformed": (MalformedHandshakeError, MalformedHandshakeError("x")),
    "timeout": (BootstrapTimeoutError, BootstrapTimeoutError("x")),
    "incompatible": (IncompatibleError, IncompatibleError("x")),
    "busy": (BootstrapError, BootstrapError("x")),
    "internal": (BootstrapError, KeyError("secret")),
}


@pytest.mark.parametrize("code", list(REFUSALS))
def test_each_code_becomes_its_exception(code: b.RefusalCode) -> None:
    error, cause = REFUSALS[code]
    machine = waiting_client()
    with pytest.raises(error, match=rf"refused the connection \({code}\): because") as caught:
        machine.receive_data(server().refuse(code, "because"))
    assert type(caught.value) is error
    assert caught.value.peer == "server"
    assert machine.state is b.State.CLOSED
    assert machine.refuse("internal", "no answer to an answer") == b""
    assert b.refusal_code(cause) == ("internal" if code == "busy" else code)


def test_unknown_code_and_hostile_text() -> None:
    wire = packed({"type": "refused", "code": "solar_flare", "message": "a\x1b[31m\nb\u202ec", "extra": 1})
    with pytest.raises(BootstrapError, match="solar_flare") as caught:
        waiting_client().receive_data(wire)
    assert str(caught.value).isprintable()


def test_internal_errors_are_not_told() -> None:
    (refused,) = unpacked(waiting_server().refuse_error(KeyError("secret path")))
    assert refused == {"type": "refused", "code": "internal", "message": "internal error"}


def test_refuse_once_and_only_during_the_handshake() -> None:
    pair = Pair()
    pair.run()
    with pytest.raises(MisuseError):
        pair.server.refuse("busy", "too late")
    machine = waiting_server()
    assert unpacked(machine.refuse("busy", "full"))[0]["code"] == "busy"
    assert machine.refuse("busy", "full") == b""
    with pytest.raises(MisuseError):
        machine.receive_data(b"x")


@pytest.mark.parametrize("wrong", ["client", "server"])
def test_refusal_while_waiting_for_the_peer(wrong: str) -> None:
    pair = Pair(TOKEN)
    if wrong == "client":
        pair.pass_to(pair.client, pair.up_to_welcome())
        with pytest.raises(IncompatibleError):
            pair.server.receive_data(pair.client.refuse("incompatible", "no route"))
    else:
        pair.pass_to(pair.client, pair.up_to_welcome())
        with pytest.raises(BootstrapTimeoutError):
            pair.client.receive_data(pair.server.refuse("timeout", "too slow"))


def test_end_of_file() -> None:
    machine = waiting_client()
    with pytest.raises(BootstrapError, match="while waiting for the server's welcome"):
        machine.receive_eof()
    machine.receive_eof()
    assert machine.state is b.State.FAILED


# --- order --------------------------------------------------------------------------------------------


def at_each_state() -> list[tuple[str, b.ClientHandshake | b.ServerHandshake, str | None]]:
    """(name, machine, the one frame type it may receive)."""
    result: list[tuple[str, b.ClientHandshake | b.ServerHandshake, str | None]] = []
    for token in (None, TOKEN):
        fresh = Pair(token)
        result.append(("fresh client", fresh.client, "greeting"))
        result.append(("fresh server", fresh.server, None))
        greeted = Pair(token)
        hello = greeted.up_to_hello()
        result.append(("waiting server", greeted.server, "hello"))
        result.append(("waiting client", greeted.client, "welcome"))
        if token:
            half = waiting_server(token)
            half.receive_data(hello[: hello.index(b'{"type":"auth"') - 4])
            result.append(("half authenticated", half, "auth"))
        verified = Pair(token)
        verified.pass_to(verified.server, verified.up_to_hello())
        result.append(("verified server", verified.server, None))
        welcomed = Pair(token)
        welcomed.pass_to(welcomed.client, welcomed.up_to_welcome())
        result.append(("welcomed client", welcomed.client, None))
        result.append(("server waiting for ready", welcomed.server, "ready"))
    return result


@pytest.mark.parametrize(
    "kind", ["greeting", "hello", "auth", "welcome", "ready", "share", "close", "", "x" * 99]
)
def test_frames_out_of_order(kind: str) -> None:
    for name, machine, allowed in at_each_state():
        if kind == allowed:
            continue
        with pytest.raises(MalformedHandshakeError) as caught:
            machine.receive_data(packed({"type": kind}))
        assert machine.state is b.State.FAILED, name
        assert len(str(caught.value)) < 200


def test_calls_out_of_order_are_misuse() -> None:
    for call in (
        lambda: client().hello(CLIENT_END),
        lambda: client().ready(),
        lambda: client().take_rest(),
        lambda: server().welcome(SERVER_END),
        lambda: waiting_server().welcome(SERVER_END),
        lambda: waiting_server().greeting(),
        lambda: waiting_client().hello(CLIENT_END),
        lambda: waiting_client().agreed,
    ):
        with pytest.raises(MisuseError):
            call()


def test_hello_followed_by_garbage_costs_nothing() -> None:
    """The event is dropped with the violation: no queue pair is made for such a client."""
    with pytest.raises(MalformedHandshakeError):
        waiting_server().receive_data(packed(good_hello()) + b"\0\0\0\x02[]")


# --- hostile frames -----------------------------------------------------------------------------------


def good_hello() -> Obj:
    return unpacked(Pair().up_to_hello())[0]


def test_good_hello_is_good() -> None:
    assert waiting_server().receive_data(packed(good_hello()))


JUNK: list[Any] = [
    None,
    True,
    False,
    -1,
    1.0,
    1.5,
    2**64,
    10**19,
    "",
    "1",
    "x" * 600,
    "\ud800",
    [],
    [[]],
    {},
    [None],
]
MAY_BE_EMPTY = {"software", "features", "endpoint.device"}


@pytest.mark.parametrize(
    "field", [*b.Hello.model_fields, *(f"endpoint.{f}" for f in b.Endpoint.model_fields)]
)
def test_every_field_of_hello_fuzzed(field: str) -> None:
    for junk in JUNK:
        if field in MAY_BE_EMPTY and junk in ("", [], "1", "\ud800"):
            continue
        hello = good_hello()
        *path, last = field.split(".")
        (hello["endpoint"] if path else hello)[last] = junk
        with pytest.raises(BootstrapError) as caught:
            waiting_server().receive_data(packed(hello))
        assert len(str(caught.value)) < 250
        if field != "type":
            assert isinstance(caught.value, MalformedHandshakeError)
            assert last in str(caught.value)


def test_required_fields() -> None:
    optional = {"features", "software", "transport", "lid", "device"}
    for field in [*b.Hello.model_fields, *b.Endpoint.model_fields]:
        hello = good_hello()
        (hello if field in hello else hello["endpoint"]).pop(field)
        if field in optional:
            assert waiting_server().receive_data(packed(hello))
        else:
            with pytest.raises(MalformedHandshakeError, match=field):
                waiting_server().receive_data(packed(hello))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("qp_num", [0, 1, 0xFFFFFF, 1 << 24]),
        ("psn", [-1, 1 << 24]),
        ("lid", [-1, 1 << 16]),
        ("mtu", [0, 255, 256.0, 1500, 8192]),
        ("initiator_depth", [-1, 256]),
        ("eager_size", [63, (1 << 20) + 1]),
        ("receive_credits", [0, 4097]),
        ("receive_credits_max", [0, 63, 4097]),
        ("control_credits", [0, 3, 65]),
        ("rendezvous_depth", [0, 65]),
        ("max_message_size", [0, 63, (1 << 40) + 1]),
        ("gid", ["::", "ff02::1", "fe80::1%eth0", "192.0.2.1", "::ffff:224.0.0.1", "::ffff:255.255.255.255"]),
        ("gid_type", ["ib", "roce_v3"]),
        ("link_layer", ["infiniband", "iwarp", "token ring"]),
        ("transport", ["ud"]),
        ("device", ["x" * 65]),
    ],
)
def test_ranges_of_the_endpoint(field: str, bad: list[Any]) -> None:
    for value in bad:
        hello = good_hello()
        hello["endpoint"][field] = value
        with pytest.raises(MalformedHandshakeError, match="endpoint"):
            waiting_server().receive_data(packed(hello))


@pytest.mark.parametrize("lid", [0, 0xC000])
def test_infiniband_needs_a_unicast_lid(lid: int) -> None:
    hello = good_hello()
    hello["endpoint"].update(INFINIBAND, lid=lid)
    with pytest.raises(MalformedHandshakeError, match="lid"):
        waiting_server().receive_data(packed(hello))


@pytest.mark.parametrize("nonce", ["ab" * 31, "AB" * 32, "ab" * 32 + "\n", "zz" * 32])
def test_nonces_are_exact(nonce: str) -> None:
    with pytest.raises(MalformedHandshakeError, match="nonce"):
        waiting_server().receive_data(packed({**good_hello(), "nonce": nonce}))


HOSTILE_BODIES = {
    "nesting": b"[" * 16_000,
    "nested objects": b'{"a":' * 2_500,
    "nesting in a field": b'{"type":"hello","x":' + b"[" * 8_000 + b"]" * 8_000 + b"}",
    "giant integer": b'{"type":' + b"9" * 16_000 + b"}",
    "long integer": b'{"type":"hello","version":' + b"9" * 21 + b"}",
    "giant exponent": b'{"type":"hello","version":1e999}',
    "NaN": b'{"type":"hello","x":NaN}',
    "Infinity": b'{"type":"hello","x":-Infinity}',
    "duplicate": b'{"type":"hello","type":"hello"}',
    "duplicate inside": b'{"type":"hello","x":[{"a":1,"a":1}]}',
    "array": b"[1,2]",
    "string": b'"hello"',
    "null": b"null",
    "not UTF-8": b'{"type":"\xff\xfe"}',
    "UTF-16": '{"type":"hello"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "no type": b"{}",
    "type null": b'{"type":null}',
    "type surrogate": b'{"type":"\\ud800"}',
    "two objects": b"{}{}",
    "truncated": b'{"type":"hel',
    "quotes": b'"\\' * 8_000,
    "escaped quotes": b'\\"' * 8_000,
    "control character": b'{"type":"\x00"}',
}


@pytest.mark.parametrize("name", list(HOSTILE_BODIES))
def test_hostile_json(name: str) -> None:
    for machine in (waiting_server(), waiting_client()):
        with pytest.raises(MalformedHandshakeError) as caught:
            machine.receive_data(frame(HOSTILE_BODIES[name]))
        assert len(str(caught.value)) < 200
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ('"x":[{"a":1,"a":1}]', "twice"),
        ('"x":NaN', "NaN"),
        ('"x":-Infinity', "Infinity"),
        ('"x":1e999', "too large"),
        ('"x":' + "9" * 21, "20 digits"),
        ('"x":' + "[" * 255 + "]" * 255, "256"),
    ],
)
def test_even_fields_to_be_ignored_must_be_sound(extra: str, text: str) -> None:
    body = json.dumps(good_hello())[:-1] + f",{extra}}}"
    with pytest.raises(MalformedHandshakeError, match=text):
        waiting_server().receive_data(frame(body.encode()))


def test_nesting_is_refused_before_the_recursive_parser() -> None:
    """Whatever recursion limit the application has set, the C stack is not at risk."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(MalformedHandshakeError, match="256"):
            parse_object(b"[" * 64_000)
    finally:
        sys.setrecursionlimit(limit)


def test_brackets_in_strings_do_not_count() -> None:
    assert parse_object(json.dumps({"x": '[{"' * 5_000}).encode())["x"] == '[{"' * 5_000


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (bytes.fromhex("160301020001"), "looks like TLS"),
        (bytes.fromhex("15030100020246"), "looks like TLS"),
        (b"GET / HTTP/1.1\r\n", "looks like HTTP"),
        (b"HTTP/1.1 400 Bad Request\r\n", "looks like HTTP"),
        (b"SSH-2.0-OpenSSH", "looks like SSH"),
        (b"PROXY TCP4 ", "PROXY protocol"),
        (b"\r\n\r\n\x00\r\nQUIT\n", "PROXY protocol"),
        (b"\xff\xff\xff\xff", "frame of 4294967295 bytes announced, the limit is 16384"),
        (b"\0\0\0\0", "frame of 0 bytes"),
    ],
)
def test_strangers(data: bytes, text: str) -> None:
    for machine in (waiting_server(), client()):
        with pytest.raises(MalformedHandshakeError, match=text):
            machine.receive_data(data)


# --- framing ------------------------------------------------------------------------------------------


def test_length_is_judged_before_the_body_comes() -> None:
    decoder = b.FrameDecoder(100)
    assert decoder.feed(b"\0\0\0") == []
    with pytest.raises(MalformedHandshakeError, match="101"):
        decoder.feed(b"\x65")
    assert len(decoder) == 0
    assert b.FrameDecoder(100).feed(frame(b"x" * 100)) == [b"x" * 100]


@quick
@given(st.lists(st.binary(min_size=2, max_size=50), max_size=8), st.integers(1, 20))
def test_frames_survive_any_cut(bodies: list[bytes], step: int) -> None:
    wire = b"".join(map(frame, bodies))
    decoder = b.FrameDecoder(50)
    got = []
    for i in range(0, len(wire), step):
        got += decoder.feed(wire[i : i + step])
        assert len(decoder) <= 54
    assert got == bodies


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from(["type", "endpoint", "version", "versions", "nonce", "features", "name", "mac"])
type_names = st.sampled_from([*HANDSHAKE_MODELS, *SESSION_MODELS, "other"])
frames_or_noise = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(frame),
    st.builds(
        lambda kind, obj: packed({**obj, "type": kind}), type_names, st.dictionaries(field_names, json_values)
    ),
)


@quick
@given(st.lists(frames_or_noise, max_size=4))
def test_noise_raises_only_what_is_documented(chunks: list[bytes]) -> None:
    for _, machine, _ in at_each_state():
        for chunk in chunks:
            outcome = outcome_of(machine.receive_data, chunk, BootstrapError)
            if isinstance(outcome, BootstrapError):
                assert outcome.peer in ("client", "server")
                assert str(outcome).isprintable()
                assert len(machine._decoder) == 0
                break
            if machine.state is b.State.ESTABLISHED:
                break
            assert len(machine._decoder) <= b.HANDSHAKE_FRAME_LIMIT + 4


@quick
@given(st.lists(frames_or_noise, max_size=4))
def test_noise_in_a_session(chunks: list[bytes]) -> None:
    session = b.SessionDecoder(peer="client")
    for chunk in chunks:
        outcome = outcome_of(session.receive_data, chunk, ProtocolError)
        if isinstance(outcome, ProtocolError):
            assert outcome.peer == "client"
            assert str(outcome).isprintable()
            assert session.receive_data(b"more") == []
            assert len(session._decoder) == 0
            break
        assert len(session._decoder) <= b.SESSION_FRAME_LIMIT + 4


# --- the session --------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=128).filter(
    str.isprintable
)
shares = st.builds(
    b.Share,
    name=names,
    address=st.integers(0, 2**63),
    length=st.integers(1, 2**63),
    rkey=st.integers(0, 2**32 - 1),
    access=st.lists(st.sampled_from(["read", "write", "atomic"]), min_size=1, unique=True).map(tuple),
)
closes = st.builds(
    b.Close,
    code=st.sampled_from(["normal", "error"]),
    message=st.text(st.characters(exclude_categories=["C"]), max_size=512),
    status=st.none() | st.just("RETRY_EXC_ERR"),
)


@quick
@given(st.lists(shares, unique_by=lambda share: share.name, max_size=5), closes)
def test_session_roundtrip(shared: list[b.Share], close: b.Close) -> None:
    messages: list[b.SessionMessage] = [*shared, *(b.Unshare(name=s.name) for s in shared[1:]), close]
    session = b.SessionDecoder()
    assert session.receive_data(b"".join(map(b.encode, messages))) == messages
    assert dict(session.shared) == {s.name: s for s in shared[:1]}
    assert session.receive_data(b.encode(b.Unshare(name="after the close"))) == []


def good_share(**changes: Any) -> Obj:
    return {
        "type": "share",
        "name": "inbox",
        "address": 4096,
        "length": 8,
        "rkey": 1,
        "access": ["read"],
        **changes,
    }


@pytest.mark.parametrize(
    "message",
    [
        good_share(name=""),
        good_share(name="x" * 129),
        good_share(name="a\nb"),
        good_share(name="\u202egid"),
        good_share(name="\ud800"),
        good_share(address=-1),
        good_share(address=2**64),
        good_share(length=0),
        good_share(length=2**63 + 1),
        good_share(address=2**64 - 8, length=9),
        good_share(rkey=2**32),
        good_share(rkey=True),
        good_share(access=[]),
        good_share(access=["read", "read"]),
        good_share(access=["execute"]),
        good_share(access="read"),
        {"type": "unshare", "name": "never shared"},
        {"type": "close", "code": "odd"},
        {"type": "close", "message": "x" * 513},
        {"type": "close", "status": "lower"},
        {"type": "hello"},
        {"type": "future"},
        {"type": "future", "optional": 1},
        {},
        [],
    ],
)
def test_hostile_session_messages(message: Any) -> None:
    session = b.SessionDecoder(peer="them")
    with pytest.raises(ProtocolError) as caught:
        session.receive_data(packed(message))
    assert caught.value.peer == "them"
    assert not isinstance(caught.value, CompletionError)
    assert not session.shared


def test_extremes_of_share() -> None:
    (share,) = b.SessionDecoder().receive_data(packed(good_share(address=2**64 - 8, length=8)))
    assert isinstance(share, b.Share)
    assert share.address + share.length == 2**64


def test_share_twice_and_unshare_twice() -> None:
    session = b.SessionDecoder()
    again = packed(good_share()) + packed({"type": "unshare", "name": "inbox"})
    assert len(session.receive_data(again * 3)) == 6
    with pytest.raises(ProtocolError, match="already"):
        session.receive_data(packed(good_share()) * 2)


def test_number_of_shared_names_is_bounded() -> None:
    session = b.SessionDecoder()
    for i in range(b.MAX_SHARED_NAMES):
        session.receive_data(packed(good_share(name=f"n{i}")))
    session.receive_data(packed({"type": "unshare", "name": "n0"}) + packed(good_share(name="new")))
    assert len(session.shared) == b.MAX_SHARED_NAMES
    with pytest.raises(ProtocolError, match="1024"):
        session.receive_data(packed(good_share(name="one too many")))


def test_optional_messages_of_the_future_are_ignored() -> None:
    session = b.SessionDecoder()
    future = packed({"type": "future", "optional": True, "x": [1, 2]})
    assert session.receive_data(future + b.encode(b.Close())) == [b.Close()]


def test_late_refusal_is_a_close() -> None:
    pair = Pair()
    pair.pass_to(pair.client, pair.up_to_welcome())
    pair.client.ready()
    late = pair.server.refuse("timeout", "too slow")
    (close,) = b.SessionDecoder().receive_data(pair.client.take_rest() + late)
    assert isinstance(close, b.Close)
    assert close.code == "error"
    assert "(timeout): too slow" in close.message


def test_session_length_limit() -> None:
    with pytest.raises(ProtocolError, match="the limit is 65536"):
        b.SessionDecoder().receive_data((65537).to_bytes(4, "big"))


def test_our_own_bad_values_are_misuse() -> None:
    with pytest.raises(MisuseError, match="name"):
        b.Share.make(name="", address=0, length=1, rkey=0, access=("read",))
    assert b.Share.make(**good_share()) == b.Share(
        name="inbox", address=4096, length=8, rkey=1, access=("read",)
    )


def test_optional_fields_are_left_out() -> None:
    assert unpacked(b.encode(b.Close())) == [{"type": "close", "code": "normal", "message": ""}]
    assert "versions" not in unpacked(b.encode(Refused(code="busy")))[0]
