"""RPC over a real queue pair: many calls, errors, cancelling, and the end of either side in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

import aiordma
from aiordma import Config, Connection
from aiordma.errors import ConnectionLostError, MessageTooLargeError, MisuseError, ProtocolError
from aiordma.protocol.rpc import CallFrame, CancelFrame, ErrorFrame, ReplyFrame, decode, encode
from aiordma.rpc import RpcClient, RpcError, RpcServer, Status

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

CONFIG = Config(mode="event", receive_credits=16, send_depth=16)


@asynccontextmanager
async def connected(server: RpcServer) -> AsyncIterator[Connection]:
    """A connection to ``server``, run here."""
    async with (
        aiordma.serve(server, "127.0.0.1", 0, config=CONFIG) as listening,
        aiordma.connect("127.0.0.1", listening.port, config=CONFIG) as connection,
    ):
        yield connection


@asynccontextmanager
async def calling(server: RpcServer) -> AsyncIterator[RpcClient]:
    """A client of ``server``."""
    async with connected(server) as connection, RpcClient(connection) as client:
        yield client


@contextmanager
def reports() -> Iterator[list[dict[str, Any]]]:
    """What goes to the loop's exception handler meanwhile."""
    loop, seen = asyncio.get_running_loop(), list[dict[str, Any]]()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: seen.append(context))
    yield seen
    loop.set_exception_handler(before)


class Gate:
    """A method that waits until it may go on, and tells what happened to it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.entered = asyncio.Semaphore(0)
        self.cancelled = asyncio.Semaphore(0)

    async def __call__(self, payload: bytes) -> bytes:
        self.entered.release()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.release()
            raise
        return payload


async def echo(payload: bytes) -> bytes:
    return payload


async def test_calls_at_the_same_time_get_their_own_replies() -> None:
    """More calls than credits and slots, answered in another order than asked."""
    waiting: list[asyncio.Event] = []

    async def reversed_pairs(payload: bytes) -> bytes:
        if len(waiting) % 2 == 0:
            waiting.append(event := asyncio.Event())
            await event.wait()
        else:
            waiting.append(asyncio.Event())
            waiting[-2].set()
        return payload[::-1]

    async with calling(RpcServer({"reverse": reversed_pairs})) as client:
        payloads = [b"payload %d" % i for i in range(200)]
        replies = await asyncio.gather(*(client.call("reverse", p) for p in payloads))
        assert replies == [p[::-1] for p in payloads]
        assert len(client._ledger) == 0


async def test_methods_by_decorator_and_empty_payloads() -> None:
    server = RpcServer()

    @server.method
    async def plain(payload: bytes) -> bytes:
        return payload

    @server.method("größe")
    async def size(payload: bytes) -> bytes:
        return b"%d" % len(payload)

    with pytest.raises(MisuseError, match="already"):
        server.add("plain", size)
    async with calling(server) as client:
        assert await client.call("plain") == b""
        assert await client.call("größe", bytearray(5)) == b"5"


async def test_errors_end_their_call_and_nothing_else() -> None:
    server = RpcServer({"echo": echo})

    @server.method
    async def on_purpose(payload: bytes) -> bytes:
        raise RpcError("no-such-user", "there is no user 7")

    @server.method
    async def bug(payload: bytes) -> bytes:
        raise KeyError("a secret")

    @server.method
    async def not_bytes(payload: bytes) -> bytes:
        return 5  # type: ignore[return-value]

    @server.method
    async def passed_on(payload: bytes) -> bytes:
        raise RpcError("busy", "a secret of another server", method="other")

    async with calling(server) as client:
        with reports() as seen:
            assert await outcome(client, "on_purpose") == ("no-such-user", "there is no user 7")
            assert not seen
            assert await outcome(client, "bug") == (Status.INTERNAL, "the method raised KeyError")
            assert await outcome(client, "not_bytes") == (Status.INTERNAL, "the method raised TypeError")
            assert await outcome(client, "passed_on") == (Status.INTERNAL, "the method raised RpcError")
            assert [type(context["exception"]) for context in seen] == [KeyError, TypeError, RpcError]
        status, details = await outcome(client, "nothing")
        assert status == Status.NOT_FOUND
        assert "'nothing'" in details
        assert await client.call("echo", b"still here") == b"still here"


async def outcome(client: RpcClient, method: str) -> tuple[str, str]:
    with pytest.raises(RpcError) as caught:
        await client.call(method)
    assert caught.value.method == method
    return caught.value.status, caught.value.details


async def test_sizes_up_to_the_limit_and_beyond() -> None:
    async def grow(payload: bytes) -> bytes:
        return bytes(int(payload))

    async with calling(RpcServer({"echo": echo, "grow": grow})) as client:
        limit = CONFIG.eager_size - 8
        assert len(await client.call("grow", b"%d" % limit)) == limit
        with pytest.raises(RpcError) as caught:
            await client.call("grow", b"%d" % (limit + 1))
        assert caught.value.status == Status.TOO_LARGE
        assert await client.call("echo", bytes(limit - 4)) == bytes(limit - 4)
        with pytest.raises(MessageTooLargeError) as refused:
            await client.call("echo", bytes(limit - 3))
        assert (refused.value.nbytes, refused.value.limit) == (limit - 3, limit - 4)
        with pytest.raises(MisuseError):
            await client.call("echo", 5)  # type: ignore[arg-type]
        assert len(client._ledger) == 0


async def test_cancelling_a_call_cancels_it_at_the_server() -> None:
    gate = Gate()
    async with calling(RpcServer({"wait": gate, "echo": echo})) as client:
        call = asyncio.create_task(client.call("wait"))
        await gate.entered.acquire()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await gate.cancelled.acquire()
        assert await client.call("echo", b"x") == b"x"  # by now the late answer was dropped
        assert len(client._ledger) == 0


async def test_a_call_that_was_not_sent_yet_never_is() -> None:
    """The first calls use up the peer's credits, since the server does not read while it refuses."""
    stuck = asyncio.Event()

    async def deaf(connection: Connection) -> None:
        await stuck.wait()

    async with (
        aiordma.serve(deaf, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        calls = [asyncio.create_task(client.call("m", timeout=0.01)) for _ in range(40)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {TimeoutError}
        assert len(client._ledger) == CONFIG.receive_credits  # those were sent; the rest is forgotten
        stuck.set()


async def test_timeout_cancels_and_drops_the_late_reply() -> None:
    gate = Gate()

    async def stubborn(payload: bytes) -> bytes:
        try:
            return await gate(payload)
        except asyncio.CancelledError:
            return b"all the same"

    async with calling(RpcServer({"stubborn": stubborn, "echo": echo})) as client:
        with pytest.raises(TimeoutError, match=r"'stubborn'.*0\.05 s"):
            await client.call("stubborn", timeout=0.05)
        await gate.cancelled.acquire()
        assert await client.call("echo", b"x", timeout=30) == b"x"
        assert len(client._ledger) == 0


async def test_too_many_calls_are_refused_and_later_ones_served() -> None:
    gate = Gate()
    async with calling(RpcServer({"wait": gate}, max_concurrent=2)) as client:
        calls = [asyncio.create_task(client.call("wait", b"%d" % i)) for i in range(2)]
        for _ in calls:
            await gate.entered.acquire()
        with pytest.raises(RpcError) as caught:
            await client.call("wait")
        assert caught.value.status == Status.BUSY
        gate.open.set()
        assert await asyncio.gather(*calls) == [b"0", b"1"]
        # An answer counts until our side knows that it left, which may be later than the caller has it.
        assert await persistent(client, "wait", b"2") == b"2"


async def persistent(client: RpcClient, method: str, payload: bytes) -> bytes:
    while True:
        try:
            return await client.call(method, payload)
        except RpcError as error:
            if error.status != Status.BUSY:
                raise


async def test_closing_the_client_ends_its_calls_and_keeps_the_connection() -> None:
    gate = Gate()
    async with connected(RpcServer({"wait": gate, "echo": echo})) as connection:
        async with RpcClient(connection) as client:
            call = asyncio.create_task(client.call("wait"))
            await gate.entered.acquire()
        with pytest.raises(RpcError) as caught:
            await call
        assert caught.value.status == Status.CANCELLED
        with pytest.raises(MisuseError, match="not open"):
            await client.call("echo")
        await gate.cancelled.acquire()
        assert isinstance(decode(await connection.recv()), ErrorFrame)  # the late answer, for whoever reads
        async with RpcClient(connection) as another:
            assert await another.call("echo", b"x") == b"x"


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_broken_connection_fails_every_pending_call(side: str) -> None:
    gate = Gate()
    ends: list[Connection] = []
    rpc = RpcServer({"wait": gate})

    async def handler(connection: Connection) -> None:
        ends.append(connection)
        await rpc(connection)

    async with (
        aiordma.serve(handler, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        calls = [asyncio.create_task(client.call("wait")) for _ in range(5)]
        for _ in calls:
            await gate.entered.acquire()
        broken = connection if side == "client" else ends[0]
        broken.fail(ConnectionLostError("broken on purpose"))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, ConnectionLostError) for error in errors)
        assert len({id(error) for error in errors}) == len(errors)
        assert "broken on purpose" in str(errors[0])
        for _ in calls:
            await gate.cancelled.acquire()
        with pytest.raises(ConnectionLostError):
            await client.call("wait")


@pytest.mark.parametrize("bad", [b"", b"\x09" * 20, encode(ReplyFrame(1)), "the same id twice"])
async def test_a_malformed_frame_closes_its_connection_only(bad: bytes | str) -> None:
    gate = Gate()
    frames = [bad] if isinstance(bad, bytes) else [encode(CallFrame(7, "wait"))] * 2
    async with (
        aiordma.serve(RpcServer({"wait": gate}), "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as good,
        RpcClient(good) as client,
    ):
        call = asyncio.create_task(client.call("wait", b"unharmed"))
        await gate.entered.acquire()
        async with aiordma.connect("127.0.0.1", server.port, config=CONFIG) as evil:
            for frame in frames:
                await evil.send(frame)
            with pytest.raises(ConnectionLostError, match=r"gave the connection up: .*RPC"):
                await evil.recv()
        gate.open.set()
        assert await call == b"unharmed"


async def test_the_client_refuses_nonsense_of_the_server() -> None:
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def nonsense(connection: Connection) -> None:
        frame = decode(await connection.recv())
        await connection.send(encode(ReplyFrame(frame.call_id + 1)))
        try:
            await connection.recv()
        except ConnectionLostError as error:
            refused.set_result(str(error))

    async with (
        aiordma.serve(nonsense, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        with pytest.raises(ConnectionLostError, match="not asked") as caught:
            await client.call("m")
        assert isinstance(caught.value.__cause__, ProtocolError)
        assert "not asked" in await refused


async def test_a_cancel_before_the_first_step_and_one_too_late_are_answered_once() -> None:
    """Call and cancel may arrive together: the method then never starts, and its caller still hears of it."""
    async with connected(RpcServer({"echo": echo})) as connection:
        for call_id in range(3):
            operations = [
                connection.send(encode(CallFrame(call_id, "echo"))),
                connection.send(encode(CancelFrame(call_id))),
                connection.send(encode(CancelFrame(call_id))),
            ]
            await asyncio.gather(*operations)
            answer = decode(await connection.recv())
            assert answer.call_id == call_id
            assert isinstance(answer, ReplyFrame) or answer == ErrorFrame(
                call_id, Status.CANCELLED, "the call was cancelled"
            )
        await connection.send(encode(CallFrame(3, "echo", b"last")))
        assert decode(await connection.recv()) == ReplyFrame(3, b"last")
