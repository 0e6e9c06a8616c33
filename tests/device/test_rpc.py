"""Unary RPC over a real queue pair: many calls, errors, sizes, and the end of either side in the middle."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import pytest
import uvloop

import aiordma
from aiordma import Config, Connection
from aiordma.errors import ConnectionLostError, MisuseError, ProtocolError
from aiordma.protocol.rpc import (
    CallFrame,
    CallKind,
    CancelFrame,
    EndFrame,
    Frame,
    MessageFrame,
    StatusFrame,
    WindowFrame,
    decode,
    encode,
)
from aiordma.protocol.rpc_calls import INITIAL_MESSAGES
from aiordma.rpc import (
    CallDetails,
    ClientInterceptor,
    RpcClient,
    RpcConnectionError,
    RpcError,
    RpcServer,
    ServerContext,
    Service,
    StatusCode,
    StreamCall,
)
from tests.device.calling import CONFIG, Gate, calling, connected, echo, eventually, reports, service

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


async def outcome(client: RpcClient, method: str, **options: Any) -> tuple[StatusCode, str]:
    """The status of a call that fails."""
    call = client.unary(method, **options)
    with pytest.raises(RpcError) as caught:
        await call
    assert caught.value.method == method
    assert (call.code(), call.details()) == (caught.value.code, caught.value.details)
    return caught.value.code, caught.value.details


# --- replies ------------------------------------------------------------------------------------------


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

    async with calling(service(reverse=reversed_pairs)) as client:
        payloads = [b"payload %d" % i for i in range(200)]
        replies = await asyncio.gather(*(client.unary("reverse", p) for p in payloads))
        assert replies == [p[::-1] for p in payloads]
        assert client.statistics().pending == 0
        assert client.statistics().calls == 200


@pytest.mark.timeout(600)  # an emulated machine takes its time
async def test_ten_thousand_calls_at_the_same_time() -> None:
    """All of them wait at the server at once, for none is answered before the last has come."""
    count, come = 10_000, 0
    everyone = asyncio.Event()

    async def meet(payload: bytes) -> bytes:
        nonlocal come
        come += 1
        if come == count:
            everyone.set()
        await everyone.wait()
        return payload

    async with calling(service(meet=meet), max_concurrent=count) as client:
        calls = [client.unary("meet", b"%d" % i) for i in range(count)]
        assert await asyncio.gather(*calls) == [b"%d" % i for i in range(count)]
        assert client.statistics().pending == 0


@pytest.mark.timeout(600)  # an emulated machine takes its time
async def test_ten_thousand_calls_through_the_queue() -> None:
    """With the limits as they are by default, most of them wait for their turn."""
    async with calling(service(echo=echo)) as client:
        calls = [client.unary("echo", b"%d" % i, timeout=100) for i in range(10_000)]
        assert await asyncio.gather(*calls) == [b"%d" % i for i in range(10_000)]


async def test_a_call_is_a_future() -> None:
    gate = Gate()
    async with calling(service(wait=gate)) as client:
        call = client.unary("wait", b"x")
        assert (call.done(), call.code(), call.details()) == (False, None, "")
        await gate.entered.acquire()  # it has begun, though nobody awaits it
        gate.open.set()
        assert await call == await call == b"x"
        assert (call.code(), call.details(), dict(call.trailing_metadata())) == (StatusCode.OK, "", {})
        assert not call.cancel()


async def test_payloads_of_other_kinds() -> None:
    async with calling(service(echo=echo)) as client:
        assert await client.unary("echo") == b""
        data = bytearray(b"abc")
        call = client.unary("echo", data)
        data[:] = b"xyz"  # small payloads are copied
        assert await call == b"abc"
        assert await client.unary("echo", memoryview(b"abcd")[1:3]) == b"bc"


async def test_metadata_both_ways() -> None:
    seen: list[Any] = []

    async def method(payload: bytes, context: ServerContext) -> bytes:
        seen.append((dict(context.metadata), context.method, context.kind, context.peer))
        context.set_trailing_metadata({"took": "1 ms", "raw-bin": b"\x00\xff"})
        if payload:
            raise RpcError(StatusCode.ABORTED, "no", trailing_metadata={"why": "because"})
        return b""

    async with calling(service(method=method)) as client:
        call = client.unary("method", metadata={"user": "größe", "token-bin": b"\x00\x01"})
        await call
        assert dict(call.trailing_metadata()) == {"took": "1 ms", "raw-bin": b"\x00\xff"}
        metadata, name, kind, peer = seen[0]
        assert metadata == {"user": "größe", "token-bin": b"\x00\x01"}
        assert (name, kind) == ("method", CallKind.UNARY)
        assert peer.startswith("127.0.0.1:")
        with pytest.raises(RpcError) as caught:
            await client.unary("method", b"fail")
        assert caught.value.trailing_metadata == {"why": "because"}
        with pytest.raises(MisuseError, match="metadata"):
            client.unary("method", metadata={"Bad Key": "x"})
        assert client.statistics().pending == 0


# --- errors -------------------------------------------------------------------------------------------


async def test_errors_end_their_call_and_nothing_else() -> None:
    methods = service(echo=echo)

    @methods.unary
    async def on_purpose(payload: bytes) -> bytes:
        raise RpcError(StatusCode.NOT_FOUND, "there is no user 7")

    @methods.unary
    async def aborts(payload: bytes, context: ServerContext) -> bytes:
        context.abort(StatusCode.PERMISSION_DENIED, "not you")

    @methods.unary
    async def bug(payload: bytes) -> bytes:
        raise KeyError("a secret")

    @methods.unary
    async def not_bytes(payload: bytes) -> bytes:
        return 5  # type: ignore[return-value]

    @methods.unary
    async def passed_on(payload: bytes) -> bytes:
        raise RpcError(StatusCode.NOT_FOUND, "a secret of another server", method="other")

    @methods.unary
    async def fine(payload: bytes, context: ServerContext) -> bytes:
        context.abort(StatusCode.OK)

    @methods.unary
    async def gives_up(payload: bytes) -> bytes:
        raise asyncio.CancelledError

    async with calling(methods) as client:
        with reports() as seen:
            assert await outcome(client, "on_purpose") == (StatusCode.NOT_FOUND, "there is no user 7")
            assert await outcome(client, "aborts") == (StatusCode.PERMISSION_DENIED, "not you")
            assert await outcome(client, "gives_up") == (StatusCode.CANCELLED, "the handler was cancelled")
            assert not seen
            assert await outcome(client, "bug") == (StatusCode.UNKNOWN, "the handler raised KeyError")
            code, details = await outcome(client, "not_bytes")
            assert code is StatusCode.INTERNAL
            assert details == "the reply is not valid: bytes are needed, not int"
            assert await outcome(client, "passed_on") == (StatusCode.UNKNOWN, "the handler raised RpcError")
            assert await outcome(client, "fine") == (StatusCode.UNKNOWN, "the handler raised MisuseError")
            types = [type(context["exception"]).__name__ for context in seen]
            assert types == ["KeyError", "InvalidReplyError", "RpcError", "MisuseError"]
            assert "'bug'" in seen[0]["message"]
        code, details = await outcome(client, "nothing")
        assert code is StatusCode.UNIMPLEMENTED
        assert "'nothing'" in details
        assert await client.unary("echo", b"still here") == b"still here"


async def test_a_method_called_as_what_it_is_not() -> None:
    async with calling(service(echo=echo)) as client:
        async with client.bidi("echo") as call:
            with pytest.raises(RpcError, match="is UNARY, and was called as BIDI") as caught:
                await call.read()
        assert caught.value.code is StatusCode.UNIMPLEMENTED
        assert await client.unary("echo", b"x") == b"x"


async def test_details_and_trailing_metadata_that_do_not_fit() -> None:
    methods = service(echo=echo)

    @methods.unary
    async def wordy(payload: bytes) -> bytes:
        raise RpcError(StatusCode.ABORTED, "ü" * 5000)

    @methods.unary
    async def bad_metadata(payload: bytes) -> bytes:
        raise RpcError(StatusCode.ABORTED, "no", trailing_metadata={"x": "y" * 9000})

    async with calling(methods) as client:
        assert await outcome(client, "wordy") == (StatusCode.ABORTED, "ü" * 512)
        with reports() as seen:
            assert await outcome(client, "bad_metadata") == (StatusCode.ABORTED, "no")
        assert [type(context["exception"]) for context in seen] == [MisuseError]


# --- sizes --------------------------------------------------------------------------------------------


async def test_the_limit_of_the_server() -> None:
    async def grow(payload: bytes) -> bytes:
        return bytes(int(payload))

    async with calling(service(echo=echo, grow=grow), max_message_size=1000) as client:
        assert len(await client.unary("grow", b"1000")) == 1000
        assert await outcome(client, "grow", request=b"1001") == (
            StatusCode.RESOURCE_EXHAUSTED,
            "a reply of 1001 bytes; the server allows 1000",
        )
        assert await client.unary("echo", bytes(1000)) == bytes(1000)
        code, details = await outcome(client, "echo", request=bytes(1001))
        assert code is StatusCode.RESOURCE_EXHAUSTED
        assert details == "a request of 1001 bytes; the server allows 1000"
        assert await client.unary("echo", b"x") == b"x"


async def test_the_limit_of_the_client() -> None:
    async def grow(payload: bytes) -> bytes:
        return bytes(int(payload))

    server = RpcServer(service(echo=echo, grow=grow))
    async with calling(server, max_message_size=1000) as client:
        code, details = await outcome(client, "grow", request=b"1001")
        assert code is StatusCode.RESOURCE_EXHAUSTED
        assert details == "a reply of 1001 bytes; this client allows 1000"
        assert (await outcome(client, "echo", request=bytes(1001)))[0] is StatusCode.RESOURCE_EXHAUSTED
        assert await client.unary("echo", bytes(1000)) == bytes(1000)
        assert client.statistics().pending == 0
        assert server.statistics().codes == {"OK": 2}  # the second was not even sent


# --- misuse -------------------------------------------------------------------------------------------


async def test_a_client_that_is_not_open() -> None:
    async with connected(RpcServer(service(echo=echo))) as connection:
        client = RpcClient(connection)
        with pytest.raises(MisuseError, match="not open"):
            client.unary("echo")
        async with client:
            with pytest.raises(MisuseError, match="once"):
                await client.__aenter__()
            with pytest.raises(MisuseError, match="1 to 255"):
                client.unary("")
            with pytest.raises(MisuseError, match="timeout"):
                client.unary("echo", timeout="1")  # type: ignore[call-overload]
            with pytest.raises(MisuseError, match="iterable of messages"):
                client.client_stream("echo", b"not a stream")
            with pytest.raises(MisuseError, match="pydantic"):
                client.unary("echo", reply_type=asyncio.Event)
        with pytest.raises(MisuseError, match="not open"):
            client.unary("echo")


def test_handlers_that_do_not_fit() -> None:
    methods = Service("kv")

    def plain(payload: bytes) -> bytes:
        return payload

    async def generator(payload: bytes) -> Any:
        yield payload

    async def three(payload: bytes, context: ServerContext, more: int) -> bytes:
        return payload

    async def strange(payload: Nowhere) -> bytes:  # type: ignore[name-defined]  # noqa: F821
        return b""

    async def not_a_stream(payload: bytes) -> bytes:
        return payload

    with pytest.raises(MisuseError, match="neither a coroutine"):
        methods.unary(plain)
    with pytest.raises(MisuseError, match="is a generator"):
        methods.unary(generator)
    with pytest.raises(MisuseError, match="takes a request"):
        methods.unary(three)
    with pytest.raises(MisuseError, match="cannot be resolved"):
        methods.unary(strange)
    with pytest.raises(MisuseError, match="AsyncIterator"):
        methods.client_stream(not_a_stream)
    methods.unary(not_a_stream)
    with pytest.raises(MisuseError, match="already"):
        methods.unary(not_a_stream)
    with pytest.raises(MisuseError, match="already"):
        RpcServer([methods, Service("kv")])
    with pytest.raises(MisuseError, match="already"):
        RpcServer(Service("health"))


# --- interceptors -------------------------------------------------------------------------------------


async def test_server_interceptors_wrap_every_call() -> None:
    order: list[str] = []

    async def outer(proceed: Any, request: Any, context: ServerContext) -> Any:
        order.append(f"outer {context.method}")
        if context.metadata.get("token") != "secret":
            context.abort(StatusCode.UNAUTHENTICATED, "who are you?")
        try:
            return await proceed(request, context)
        finally:
            order.append("outer ends")

    async def inner(proceed: Any, request: Any, context: ServerContext) -> Any:
        order.append("inner")
        reply = await proceed(request + b"!", context)
        return reply * 2

    async with calling(service(echo=echo), interceptors=[outer, inner]) as client:
        assert await client.unary("echo", b"x", metadata={"token": "secret"}) == b"x!x!"
        assert order == ["outer echo", "inner", "outer ends"]
        assert await outcome(client, "echo") == (StatusCode.UNAUTHENTICATED, "who are you?")
        with pytest.raises(RpcError, match="who are you"):
            await client.health()


async def test_client_interceptors_change_and_repeat_calls() -> None:
    class Token(ClientInterceptor):
        async def unary(self, proceed: Any, request: Any, details: CallDetails) -> Any:
            metadata = {**details.metadata, "token": "t"}
            return await proceed(request, CallDetails(details.method, details.kind, 30, metadata))

        def stream(self, proceed: Any, details: CallDetails) -> StreamCall[Any]:
            metadata = {**details.metadata, "token": "t"}
            call: StreamCall[Any] = proceed(CallDetails(details.method, details.kind, 30, metadata))
            call.add_done_callback(lambda call: ended.append(call.code()))
            return call

    class Again(ClientInterceptor):
        async def unary(self, proceed: Any, request: Any, details: CallDetails) -> Any:
            for _ in range(3):
                try:
                    return await proceed(request, details)
                except RpcError:
                    continue
            return b"gave up"

    ended: list[StatusCode | None] = []
    tries = 0
    methods = service(echo=echo)

    @methods.unary
    async def third_time(payload: bytes, context: ServerContext) -> bytes:
        nonlocal tries
        tries += 1
        assert context.metadata == {"token": "t"}
        context.set_trailing_metadata({"try": str(tries)})
        if tries < 3:
            context.abort(StatusCode.UNAVAILABLE)
        return payload

    @methods.server_stream
    async def stream(payload: bytes, context: ServerContext) -> Any:
        assert context.metadata == {"token": "t"}
        yield payload

    gate = Gate()
    methods.add(gate, name="wait")
    async with calling(RpcServer(methods), interceptors=[Token(), Again()]) as client:
        call = client.unary("third_time", b"x")
        assert await call == b"x"
        assert (call.code(), dict(call.trailing_metadata())) == (StatusCode.OK, {"try": "3"})
        assert [reply async for reply in client.server_stream("stream", b"y")] == [b"y"]
        await eventually(lambda: ended)
        assert ended == [StatusCode.OK]
        waiting = client.unary("wait")
        await gate.entered.acquire()
        assert waiting.cancel()
        await gate.cancelled.acquire()
        with pytest.raises(asyncio.CancelledError):
            await waiting


# --- the end in the middle ----------------------------------------------------------------------------


async def test_closing_the_client_ends_its_calls_and_keeps_the_connection() -> None:
    gate = Gate()
    async with connected(RpcServer(service(wait=gate, echo=echo))) as connection:
        async with RpcClient(connection) as client:
            call = client.unary("wait")
            await gate.entered.acquire()
        with pytest.raises(RpcError) as caught:
            await call
        assert caught.value.code is StatusCode.CANCELLED
        await gate.cancelled.acquire()
        assert isinstance(decode(await connection.recv()), StatusFrame)  # the late answer, for whoever reads
        async with RpcClient(connection) as another:
            assert await another.unary("echo", b"x") == b"x"


@pytest.mark.parametrize("side", ["client", "server"])
async def test_a_broken_connection_fails_every_pending_call(side: str) -> None:
    gate = Gate()
    ends: list[Connection] = []
    rpc = RpcServer(service(wait=gate))

    async def handler(connection: Connection) -> None:
        ends.append(connection)
        await rpc(connection)

    async with (
        aiordma.serve(handler, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        calls = [client.unary("wait") for _ in range(5)]
        for _ in calls:
            await gate.entered.acquire()
        broken = connection if side == "client" else ends[0]
        broken.fail(ConnectionLostError("broken on purpose"))
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, RpcConnectionError) for error in errors)
        assert all(call.code() is StatusCode.UNAVAILABLE for call in calls)
        assert len({id(error) for error in errors}) == len(errors)
        assert "broken on purpose" in str(errors[0])
        assert isinstance(errors[0], ConnectionLostError)
        assert errors[0].peer == connection.peer
        for _ in calls:
            await gate.cancelled.acquire()
        with pytest.raises(ConnectionLostError):
            await client.unary("wait")
    await eventually(lambda: rpc.statistics().unanswered == 0)
    assert rpc.statistics().running == 0


BIDI = CallFrame(7, "talk", CallKind.BIDI)
BREACHES: list[list[bytes]] = [
    [b""],
    [b"\x09" * 20],
    [encode(StatusFrame(1))],
    [encode(CallFrame(7, "wait"))] * 2,
    [encode(CallFrame(7, "wait")), encode(MessageFrame(7))],
    [encode(BIDI), encode(WindowFrame(7, 2**32 - 1, 2**64 - 1))],
    [encode(BIDI), *[encode(MessageFrame(7))] * (INITIAL_MESSAGES + 1)],
]


@pytest.mark.parametrize("frames", BREACHES)
async def test_a_breach_of_protocol_closes_its_connection_only(frames: list[bytes]) -> None:
    gate, talking = Gate(), asyncio.Event()
    methods = service(wait=gate)

    @methods.bidi
    async def talk(requests: Any, context: ServerContext) -> None:
        await talking.wait()

    async with (
        aiordma.serve(RpcServer(methods), "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as good,
        RpcClient(good) as client,
    ):
        call = client.unary("wait", b"unharmed")
        await gate.entered.acquire()
        with reports() as seen:
            async with aiordma.connect("127.0.0.1", server.port, config=CONFIG) as evil:
                for frame in frames:
                    await evil.send(frame)
                with pytest.raises(ConnectionLostError, match=r"gave the connection up: .*RPC"):
                    await evil.recv()
            await eventually(lambda: seen)
        assert isinstance(seen[0]["exception"], ProtocolError)
        gate.open.set()
        assert await call == b"unharmed"


def random_frame(random: Random) -> bytes:
    """Any frame, mostly a valid one, of few calls: so that they meet."""
    call_id, method = random.randrange(4), random.choice(["echo", "wait", "talk", "nothing"])
    frames: list[Frame] = [
        CallFrame(call_id, method, random.choice(list(CallKind)), b"", random.choice([0, 1, 10**6])),
        CallFrame(call_id, "echo", CallKind.UNARY, random.randbytes(random.choice([0, 100, 9000]))),
        CallFrame(call_id, "talk", CallKind.BIDI),
        MessageFrame(call_id, random.randbytes(random.choice([0, 10, 9000]))),
        EndFrame(call_id),
        CancelFrame(call_id),
        CancelFrame(call_id),
        WindowFrame(call_id, random.randrange(100), random.randrange(10**6)),
    ]
    data = bytearray(encode(random.choice(frames)))
    if not random.randrange(30):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("seed", range(10))
async def test_random_frames_harm_nobody_else(seed: int) -> None:
    random, gate = Random(seed), Gate()
    methods = service(wait=gate, echo=echo)

    @methods.bidi
    async def talk(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    rpc = RpcServer(methods, max_concurrent=4, max_queued=4, max_concurrent_per_connection=3)
    async with (
        aiordma.serve(rpc, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as good,
        RpcClient(good) as client,
    ):
        with reports() as seen:
            async with aiordma.connect("127.0.0.1", server.port, config=CONFIG) as wild:
                try:
                    for _ in range(100):
                        await wild.send(random_frame(random))
                        async with asyncio.timeout(0):
                            await wild.recv()
                except (ConnectionLostError, TimeoutError):
                    pass
                assert await client.unary("echo", b"unharmed") == b"unharmed"
            await eventually(lambda: rpc.statistics().unanswered == 0)
        assert all(isinstance(context["exception"], ProtocolError) for context in seen)
        assert (rpc.statistics().running, rpc.statistics().waiting) == (0, 0)
        assert rpc.admission.waiting_bytes == 0


async def test_the_client_refuses_nonsense_of_the_server() -> None:
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def nonsense(connection: Connection) -> None:
        frame = decode(await connection.recv())
        await connection.send(encode(StatusFrame(frame.call_id + 1)))
        try:
            await connection.recv()
        except ConnectionLostError as error:
            refused.set_result(str(error))

    async with (
        aiordma.serve(nonsense, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        with pytest.raises(RpcConnectionError, match="not made or has ended"):
            await client.unary("m")
        assert "not made or has ended" in await refused


async def test_a_status_that_nobody_knows() -> None:
    async def odd(connection: Connection) -> None:
        async for message in connection:
            await connection.send(encode(StatusFrame(decode(message).call_id, 99, "odd")))

    async with (
        aiordma.serve(odd, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        assert await outcome(client, "m") == (StatusCode.UNKNOWN, "status 99: odd")


async def test_a_cancel_before_the_first_step_and_one_too_late_are_answered_once() -> None:
    """Call and cancel may arrive together: the handler then never starts, and its caller still hears of it."""
    server = RpcServer(service(echo=echo))
    async with connected(server) as connection:
        for call_id in range(3):
            operations = [
                connection.send(encode(CallFrame(call_id, "echo"))),
                connection.send(encode(CancelFrame(call_id))),
                connection.send(encode(CancelFrame(call_id))),
            ]
            await asyncio.gather(*operations)
            answer = decode(await connection.recv())
            assert isinstance(answer, StatusFrame)
            assert answer.call_id == call_id
            assert answer.code in (StatusCode.OK, StatusCode.CANCELLED)
        await connection.send(encode(CallFrame(3, "echo", payload=b"last")))
        assert decode(await connection.recv()) == StatusFrame(3, 0, "", b"last")
        await eventually(lambda: server.statistics().unanswered == 0)
        assert server.statistics().running == 0


async def test_each_handler_has_a_task_and_variables_of_its_own() -> None:
    """Those that are done at once and those that are not, mixed."""
    variable = contextvars.ContextVar[bytes | None]("variable", default=None)
    alive: set[asyncio.Task[Any] | None] = set()

    async def look(payload: bytes, context: ServerContext) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        assert task not in alive
        assert task.get_name() == "aiordma RPC look"
        assert variable.get() is None
        if payload.startswith(b"set"):
            variable.set(payload)
        if payload.endswith(b"wait"):
            alive.add(task)
            for _ in range(3):
                await asyncio.sleep(0)
                assert asyncio.current_task() is task
            alive.remove(task)
        assert variable.get() == (payload if payload.startswith(b"set") else None)
        return payload

    kinds = [b"plain", b"set", b"wait", b"set, wait"]
    async with calling(service(look=look)) as client:
        calls = [client.unary("look", kinds[i % 4]) for i in range(100)]
        assert await asyncio.gather(*calls) == kinds * 25


async def test_a_server_goes_on_when_somebody_cancels_all_tasks() -> None:
    """The one that waits for a handler among them."""
    names = ("aiordma RPC echo", "aiordma RPC, next handler")
    async with calling(service(echo=echo)) as client:
        for i in range(4):
            assert await client.unary("echo", b"%d" % i) == b"%d" % i
            (ready,) = [task for task in asyncio.all_tasks() if task.get_name() in names]
            ready.cancel()
            await asyncio.wait([ready])


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_what_a_handler_raises_to_end_the_program_reaches_the_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """And its caller gets an answer, should the program go on."""

    async def leave(payload: bytes, context: ServerContext) -> bytes:
        raise SystemExit(payload.decode())

    async def call() -> None:
        async with calling(service(leave=leave)) as client:
            ended.append(await outcome(client, "leave", request=b"enough"))

    ended: list[Any] = []
    with asyncio.Runner(loop_factory=new_loop) as runner:
        loop = runner.get_loop()
        task = loop.create_task(call())
        with pytest.raises(SystemExit, match="enough"):
            loop.run_until_complete(task)
        loop.run_until_complete(task)
    assert ended == [(StatusCode.UNKNOWN, "the handler raised SystemExit")]


@pytest.mark.parametrize("mode", ["busy", "adaptive"])
async def test_other_modes(mode: Any) -> None:
    config = Config(mode=mode)
    async with connected(RpcServer(service(echo=echo)), config) as connection:
        async with RpcClient(connection) as client:
            calls = [client.unary("echo", b"%d" % i) for i in range(100)]
            assert await asyncio.gather(*calls) == [b"%d" % i for i in range(100)]
            assert await client.unary("echo", b"x") == b"x"
