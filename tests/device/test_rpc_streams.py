"""Streams of requests and replies: all kinds, pacing, and every way for a call to end in the middle of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aiordma.errors import MisuseError
from aiordma.protocol.rpc_calls import INITIAL_BYTES, INITIAL_MESSAGES
from aiordma.rpc import (
    EOF,
    Requests,
    RpcError,
    RpcServer,
    RpcTimeoutError,
    ServerContext,
    Service,
    StatusCode,
)
from tests.device.calling import Gate, calling, echo, eventually, reports, service

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


def streams() -> Service:
    """One method of each kind."""
    made = service(echo=echo)

    @made.server_stream
    async def count(payload: bytes) -> AsyncIterator[bytes]:
        for i in range(int(payload)):
            yield b"%d" % i

    @made.client_stream
    async def join(requests: AsyncIterator[bytes]) -> bytes:
        return b",".join([request async for request in requests])

    @made.bidi
    async def double(requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request * 2
        context.set_trailing_metadata({"seen": "all"})

    @made.bidi
    async def by_hand(requests: Requests[bytes], context: ServerContext) -> None:
        while (request := await context.read()) is not EOF:
            await context.write(request + b"?")
        await context.write(b"end")

    return made


# --- the kinds ----------------------------------------------------------------------------------------


async def test_server_stream() -> None:
    async with calling(streams()) as client:
        async with client.server_stream("count", b"500") as call:
            assert [int(reply) async for reply in call] == list(range(500))
            assert (call.done(), call.code(), call.details()) == (True, StatusCode.OK, "")
            assert await call.read() is EOF
            assert not call.cancel()
        assert [reply async for reply in client.server_stream("count", b"0")] == []
        assert client.statistics().pending == 0


async def test_client_stream() -> None:
    async def requests() -> AsyncIterator[bytes]:
        for i in range(100):
            yield b"%d" % i

    expected = b",".join(b"%d" % i for i in range(100))
    async with calling(streams()) as client:
        async with client.client_stream("join") as call:
            for i in range(100):
                await call.write(b"%d" % i)
            assert call.code() is None
            await call.done_writing()
            await call.done_writing()
            assert await call == expected
            assert await call == expected
            assert call.code() is StatusCode.OK
            with pytest.raises(MisuseError, match="done_writing"):
                await call.write(b"x")
        assert await client.client_stream("join", [b"%d" % i for i in range(100)]) == expected
        assert await client.client_stream("join", requests()) == expected
        assert await client.client_stream("join", []) == b""


async def test_bidi() -> None:
    async with calling(streams()) as client:
        async with client.bidi("double") as call:
            for i in range(100):
                await call.write(b"%d" % i)
                assert await call.read() == b"%d" % i * 2
            await call.done_writing()
            assert await call.read() is EOF
            assert await call.wait() is StatusCode.OK
            assert call.trailing_metadata() == {"seen": "all"}
        many = (b"%d" % i for i in range(1000))
        replies = [reply async for reply in client.bidi("double", many)]
        assert replies == [b"%d" % i * 2 for i in range(1000)]
        assert [reply async for reply in client.bidi("by_hand", [b"a", b"b"])] == [b"a?", b"b?", b"end"]


async def test_many_streams_at_the_same_time() -> None:
    async with calling(streams()) as client:

        async def one(number: int) -> None:
            requests = [b"%d.%d" % (number, i) for i in range(100)]
            replies = [reply async for reply in client.bidi("double", requests)]
            assert replies == [request * 2 for request in requests]

        await asyncio.gather(*(one(number) for number in range(30)))
        assert client.statistics().pending == 0


# --- pacing -------------------------------------------------------------------------------------------


async def test_a_reader_that_waits_holds_up_its_own_call_only() -> None:
    """The stream stops at its window; the same connection goes on serving others."""
    written = 0
    made = streams()

    @made.server_stream
    async def endless(payload: bytes) -> AsyncIterator[bytes]:
        nonlocal written
        while True:
            yield payload
            written += 1

    async with calling(made) as client:
        async with client.server_stream("endless", b"x") as call:
            for _ in range(50):
                assert await client.unary("echo", b"y") == b"y"
            assert written == INITIAL_MESSAGES
            assert [int(reply) async for reply in client.server_stream("count", b"100")] == list(range(100))
            assert written == INITIAL_MESSAGES
            for _ in range(INITIAL_MESSAGES):
                assert await call.read() == b"x"
            await eventually(lambda: written == 2 * INITIAL_MESSAGES)
        assert call.code() is StatusCode.CANCELLED


async def test_large_messages_stop_earlier() -> None:
    written = 0
    made = Service("")

    @made.server_stream
    async def endless(payload: bytes) -> AsyncIterator[bytes]:
        nonlocal written
        while True:
            yield bytes(3000)
            written += 1

    config_free = INITIAL_BYTES // 3000 + 1
    assert config_free > INITIAL_MESSAGES  # so here it is still the messages that stop it
    async with calling(made) as client:
        async with client.server_stream("endless") as call:
            await eventually(lambda: written == INITIAL_MESSAGES)
            assert await call.read() == bytes(3000)


async def test_a_handler_that_does_not_read_holds_up_its_own_caller() -> None:
    gate = asyncio.Event()
    made = service(echo=echo)

    @made.client_stream
    async def lazy(requests: AsyncIterator[bytes]) -> bytes:
        await gate.wait()
        return b"%d" % len([request async for request in requests])

    async with calling(made) as client:
        async with client.client_stream("lazy") as call:
            for _ in range(INITIAL_MESSAGES):
                await call.write(b"x")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await call.write(b"never sent")
            assert await client.unary("echo", b"y") == b"y"
            gate.set()
            for _ in range(100):
                await call.write(b"x")
            await call.done_writing()
            assert await call == b"%d" % (INITIAL_MESSAGES + 100)


# --- ends in the middle -------------------------------------------------------------------------------


async def test_replies_come_before_the_error_that_ended_them() -> None:
    made = Service("")

    @made.server_stream
    async def breaks(payload: bytes, context: ServerContext) -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"
        context.abort(StatusCode.DATA_LOSS, "the rest is gone", trailing_metadata={"lost": "3"})

    @made.server_stream
    async def bug(payload: bytes) -> AsyncIterator[bytes]:
        yield b"1"
        raise ValueError

    @made.server_stream
    async def garbage(payload: bytes) -> AsyncIterator[bytes]:
        yield 5  # type: ignore[misc]

    @made.server_stream
    async def returns(payload: bytes, context: ServerContext) -> bytes:
        return b"not like this"

    async with calling(made) as client:
        call, got = client.server_stream("breaks"), []
        with pytest.raises(RpcError, match="the rest is gone") as caught:
            async for reply in call:
                got.append(reply)
        assert got == [b"1", b"2"]
        assert caught.value.trailing_metadata == call.trailing_metadata() == {"lost": "3"}
        assert (call.code(), call.details()) == (StatusCode.DATA_LOSS, "the rest is gone")
        with pytest.raises(RpcError):
            await call.read()
        with reports() as seen:
            for method, code in [
                ("bug", StatusCode.UNKNOWN),
                ("garbage", StatusCode.INTERNAL),
                ("returns", StatusCode.INTERNAL),
            ]:
                with pytest.raises(RpcError) as caught:
                    assert [reply async for reply in client.server_stream(method)]
                assert caught.value.code is code
            assert len(seen) == 3


async def test_a_server_that_ends_before_all_was_written() -> None:
    made = Service("")

    @made.client_stream
    async def first(requests: AsyncIterator[bytes]) -> bytes:
        async for request in requests:
            return request
        return b""

    @made.bidi
    async def refuse(requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        context.abort(StatusCode.FAILED_PRECONDITION, "not now")
        yield b""

    async with calling(made) as client:
        async with client.client_stream("first") as call:
            await call.write(b"1")
            assert await call == b"1"
            with pytest.raises(RpcError, match="reads no more") as caught:
                await call.write(b"2")
            assert caught.value.code is StatusCode.ABORTED
            await call.done_writing()
        assert await client.client_stream("first", (b"%d" % i for i in range(1000))) == b"0"
        call_again = client.bidi("refuse")
        assert await call_again.wait() is StatusCode.FAILED_PRECONDITION
        with pytest.raises(RpcError, match="not now"):
            await call_again.write(b"1")
        with pytest.raises(RpcError, match="not now"):
            await call_again.read()


class Talk:
    """A bidirectional handler that tells what happened to it."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.ended: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def __call__(self, requests: AsyncIterator[bytes], context: ServerContext) -> AsyncIterator[bytes]:
        self.begun.release()
        try:
            async for request in requests:
                yield request
        except BaseException as error:
            self.ended.put_nowait(error)
            raise
        self.ended.put_nowait(None)


@pytest.fixture
def talk() -> Talk:
    return Talk()


def talking(talk: Talk) -> Service:
    made = streams()
    made.bidi(name="talk")(talk)
    return made


async def test_cancelling_a_stream(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        call = client.bidi("talk")
        await call.write(b"1")
        assert await call.read() == b"1"
        reading = asyncio.create_task(call.read())
        await asyncio.sleep(0)
        assert call.cancel()
        assert not call.cancel()
        with pytest.raises(RpcError, match="cancelled here"):
            await reading
        with pytest.raises(RpcError, match="cancelled here"):
            await call.write(b"2")
        assert isinstance(await talk.ended.get(), asyncio.CancelledError)
        await eventually(lambda: client.statistics().pending == 0)
        assert await client.unary("echo", b"x") == b"x"


async def test_leaving_the_block_cancels(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.bidi("talk") as call:
                await talk.begun.acquire()
                raise ZeroDivisionError
        assert call.code() is StatusCode.CANCELLED
        assert isinstance(await talk.ended.get(), asyncio.CancelledError)


async def test_cancelling_the_task_that_iterates(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        call = client.bidi("talk")

        async def iterate() -> None:
            async for _ in call:
                pass

        task = asyncio.create_task(iterate())
        await talk.begun.acquire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.code() is StatusCode.CANCELLED
        assert isinstance(await talk.ended.get(), asyncio.CancelledError)


async def test_a_read_that_is_cancelled_loses_nothing(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        async with client.bidi("talk") as call:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await call.read()
            await call.write(b"1")
            assert await call.read() == b"1"
            await call.done_writing()
            assert await call.read() is EOF
            assert await talk.ended.get() is None


async def test_cancelling_who_awaits_the_reply() -> None:
    entered, cancelled = asyncio.Event(), asyncio.Event()
    made = Service("")

    @made.client_stream
    async def hang(requests: AsyncIterator[bytes]) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return b""

    async with calling(made) as client:
        call = client.client_stream("hang")

        async def wait() -> bytes:
            return await call

        task = asyncio.create_task(wait())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cancelled.wait()
        assert call.code() is StatusCode.CANCELLED


async def test_deadline_of_a_stream(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        call = client.bidi("talk", timeout=2)
        await call.write(b"1")
        with pytest.raises(RpcTimeoutError):
            async for _ in call:
                pass
        assert call.code() is StatusCode.DEADLINE_EXCEEDED
        assert isinstance(await talk.ended.get(), asyncio.CancelledError)


async def test_requests_that_raise() -> None:
    def broken() -> Any:
        yield b"1"
        raise KeyError("x")

    async with calling(streams(), max_message_size=100) as client:
        call = client.client_stream("join", broken())
        with pytest.raises(RpcError, match="the requests raised KeyError") as caught:
            await call
        assert caught.value.code is StatusCode.CANCELLED
        assert isinstance(caught.value.__cause__, KeyError)
        with pytest.raises(RpcError, match="the requests raised MisuseError"):
            await client.client_stream("join", [asyncio.Event()])
        with pytest.raises(MisuseError, match="come from the iterable"):
            await client.client_stream("join", [b"x"]).write(b"y")
        with pytest.raises(RpcError, match="the server allows 100"):
            await client.client_stream("join", [b"x", bytes(101)])


async def test_messages_that_are_too_large_for_the_client() -> None:
    made = streams()

    @made.server_stream
    async def large(payload: bytes) -> AsyncIterator[bytes]:
        yield bytes(100)
        yield bytes(101)

    async with calling(RpcServer(made), max_message_size=100) as client:
        with pytest.raises(RpcError, match="this client allows 100") as caught:
            assert [reply async for reply in client.server_stream("large")]
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(RpcError, match="this client allows 100"):
            await client.client_stream("join", [bytes(101)])
        async with client.bidi("double") as call:
            with pytest.raises(RpcError, match="this client allows 100"):
                await call.write(bytes(101))
            await call.write(b"x")  # the call goes on
            assert await call.read() == b"xx"


async def test_a_lost_connection_ends_streams(talk: Talk) -> None:
    async with calling(talking(talk)) as client:
        call = client.bidi("talk")
        await talk.begun.acquire()
        reading = asyncio.create_task(call.read())
        await asyncio.sleep(0)
        client.connection.close()
        with pytest.raises(RpcError) as caught:
            await reading
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert isinstance(await talk.ended.get(), asyncio.CancelledError)
        late = client.bidi("talk")
        with pytest.raises(RpcError):
            await late.read()
        with pytest.raises(RpcError):
            await late.write(b"x")
        with pytest.raises(RpcError):
            await client.client_stream("join")


async def test_a_context_that_outlives_its_call() -> None:
    gate = Gate()
    contexts: list[ServerContext] = []
    made = Service("")

    @made.bidi
    async def leak(requests: AsyncIterator[bytes], context: ServerContext) -> None:
        contexts.append(context)

    @made.unary
    async def single(payload: bytes, context: ServerContext) -> bytes:
        for use in (context.read(), context.write(b"x")):
            with pytest.raises(RpcError, match="has one re"):
                await use
        return b"ok"

    async with calling(made) as client:
        assert [reply async for reply in client.bidi("leak")] == []
        with pytest.raises(RpcError, match="has ended"):
            await contexts[0].write(b"x")
        with pytest.raises(RpcError, match="has ended"):
            await contexts[0].read()
        assert contexts[0].cancelled()
        assert await client.unary("single") == b"ok"
        assert gate.contexts == []
