"""Large arguments and replies, which go by rendezvous: of every kind of call, and when something is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from aiordma import Config
from aiordma.errors import MemoryLimitError, MessageTooLargeError
from aiordma.protocol.rpc_calls import INITIAL_BYTES
from aiordma.rpc import RpcClient, RpcError, RpcServer, ServerContext, Service, StatusCode
from tests.device.calling import Gate, calling, connected, echo, eventually, reports, service

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

SIZE = 3 << 20
LARGE = bytes(range(256)) * (SIZE // 256)


class Blob(BaseModel):
    text: str


def methods() -> Service:
    made = service(echo=echo)

    @made.unary
    async def length(payload: memoryview) -> bytes:
        return b"%d" % len(payload)

    @made.unary
    async def grow(payload: bytes) -> Any:
        return bytearray(int(payload))

    @made.unary
    async def twice(request: Blob) -> Blob:
        return Blob(text=request.text * 2)

    @made.bidi
    async def mirror(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    return made


async def test_both_ways() -> None:
    async with calling(methods()) as client:
        assert await client.unary("echo", LARGE) == LARGE
        assert await client.unary("echo", memoryview(bytearray(LARGE))) == LARGE
        assert await client.unary("length", np.zeros((1024, 1024), dtype=np.float32)) == b"%d" % (4 << 20)
        assert await client.unary("grow", b"%d" % SIZE) == bytes(SIZE)
        view = await client.unary("grow", b"%d" % SIZE, reply_type=memoryview)
        assert len(view) == SIZE
        text = "ü" * (SIZE // 4)
        reply = await client.unary("twice", Blob(text=text), reply_type=Blob)
        assert reply.text == text * 2


@pytest.mark.parametrize("size", [2048, 2049, 4056, 4074, 4075, 4076, 4096, 4097, 65536, 65537])
async def test_sizes_around_the_limits(size: int) -> None:
    data = LARGE[:size]
    async with calling(methods()) as client:
        reply = await client.unary("echo", data)
        assert type(reply) is bytes
        assert reply == data
        assert await client.unary("echo", bytearray(data)) == data
        assert [reply async for reply in client.bidi("mirror", [data, b"", bytearray(data)])] == [
            data,
            b"",
            data,
        ]


async def test_many_at_the_same_time_among_small_ones() -> None:
    async with calling(methods()) as client:
        payloads = [LARGE[: 1 + (i % 7) * 100_000] for i in range(60)]
        assert await asyncio.gather(*(client.unary("echo", p) for p in payloads)) == payloads


async def test_streams_of_large_messages() -> None:
    sizes = [10, INITIAL_BYTES, 1, 2 * INITIAL_BYTES, 0, INITIAL_BYTES - 1]
    messages = [LARGE[:size] for size in sizes]
    async with calling(methods()) as client:
        replies = [reply async for reply in client.bidi("mirror", messages)]
        assert replies == messages


async def test_large_messages_close_the_window_by_their_bytes() -> None:
    written = 0
    made = Service("")

    @made.server_stream
    async def endless(payload: bytes) -> AsyncIterator[bytes]:
        nonlocal written
        while True:
            yield LARGE[: INITIAL_BYTES // 2]
            written += 1

    async with calling(made) as client:
        async with client.server_stream("endless") as call:
            await eventually(lambda: written == 2)
            assert await client.health()
            assert written == 2
            assert await call.read() == LARGE[: INITIAL_BYTES // 2]
            await eventually(lambda: written == 3)


async def test_cancelling_large_calls() -> None:
    gate = Gate()
    made = methods()
    made.add(gate, name="wait")
    async with calling(made) as client:
        calls = [client.unary("wait", LARGE) for _ in range(12)]
        await gate.entered.acquire()
        for call in calls:
            call.cancel()
        await gate.cancelled.acquire()
        await eventually(lambda: client.statistics().pending == 0)
        large = client.unary("grow", b"%d" % SIZE)
        await asyncio.sleep(0)
        large.cancel()
        assert await client.unary("echo", LARGE) == LARGE
        assert client.statistics().pending == 0


async def test_more_than_the_peers_connection_takes() -> None:
    """Config.max_message_size is below the limit of the RPC layer; either side sends too much."""
    config = Config(mode="event", max_message_size=100_000)
    async with connected(RpcServer(methods()), config) as connection, RpcClient(connection) as client:
        with pytest.raises(RpcError, match="cannot be sent") as caught:
            await client.unary("echo", LARGE)
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(caught.value.__cause__, MessageTooLargeError)
        with reports() as seen:
            with pytest.raises(RpcError, match="the reply cannot be sent") as caught:
                await client.unary("grow", b"200000")
            assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(seen[0]["exception"], MessageTooLargeError)
        with pytest.raises(RpcError):
            await client.client_stream("echo", [LARGE])
        assert await client.unary("echo", LARGE[:90_000]) == LARGE[:90_000]
        assert client.statistics().pending == 0


@pytest.mark.parametrize("side", ["request", "reply"])
async def test_no_memory_for_a_large_message(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device may not have the memory: that call fails, others go on."""
    async with calling(methods()) as client:
        pool = client.connection._adapter.pool

        def refuse(*_: Any) -> Any:
            raise MemoryLimitError("no more memory may be locked")

        with monkeypatch.context() as patch, reports() as seen:
            patch.setattr(pool, "pin_exposed", refuse)
            call = client.unary("echo", LARGE) if side == "request" else client.unary("grow", b"200000")
            with pytest.raises(RpcError, match="no more memory may be locked") as caught:
                await call
            assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
            assert len(seen) == (side == "reply")
        assert await client.unary("echo", LARGE) == LARGE
        assert client.statistics().pending == 0


async def test_no_memory_for_what_the_server_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client cannot take a reply in, and so no later one either: the connection ends with that reason."""
    async with connected(RpcServer(methods())) as connection, RpcClient(connection) as client:

        def refuse(*_: Any) -> Any:
            raise MemoryLimitError("no more memory may be locked")

        with monkeypatch.context() as patch:
            patch.setattr(connection._adapter.pool, "pin_new_bytes", refuse)
            with pytest.raises(RpcError, match="no more memory may be locked") as caught:
                await client.unary("grow", b"200000")
            assert caught.value.code is StatusCode.UNAVAILABLE


async def test_a_handler_uses_the_memory_that_its_caller_shares() -> None:
    """Calls and one-sided operations go together: the call says what to do, RDMA WRITE carries the data."""
    made = Service("")

    @made.unary
    async def fill(payload: bytes, context: ServerContext) -> bytes:
        region = await context.connection.remote("results")
        await context.connection.write(payload * len(region), region)
        return b"%d" % len(region)

    async with calling(made) as client, client.connection.allocate(10_000) as lease:
        await client.connection.share("results", lease, "write")
        assert await client.unary("fill", b"x") == b"10000"
        assert bytes(lease) == b"x" * 10_000
