"""Deadlines, cancellation, limits and the end in order, over a real queue pair."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

import pytest

import aiordma
from aiordma import Connection
from aiordma.errors import MisuseError
from aiordma.rpc import Health, RpcClient, RpcError, RpcServer, RpcTimeoutError, ServerContext, StatusCode
from tests.device.calling import (
    CONFIG,
    Gate,
    Stubborn,
    calling,
    connected,
    echo,
    eventually,
    reports,
    service,
)

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


# --- deadlines ----------------------------------------------------------------------------------------


async def test_the_deadline_travels_and_cancels_the_handler() -> None:
    gate = Gate()
    async with calling(service(wait=gate, echo=echo)) as client:
        call = client.unary("wait", timeout=2)
        await gate.entered.acquire()
        remaining = gate.contexts[0].time_remaining()
        assert remaining is not None
        assert 0 < remaining < 2.01
        with pytest.raises(RpcTimeoutError, match="'wait': DEADLINE_EXCEEDED") as caught:
            await call
        assert isinstance(caught.value, TimeoutError)
        assert call.code() is StatusCode.DEADLINE_EXCEEDED
        await gate.cancelled.acquire()
        assert gate.contexts[0].cancelled()
        assert (gate.contexts[0].time_remaining() or 0.0) < remaining
        assert await client.unary("echo", b"x", timeout=30) == b"x"
        await eventually(lambda: client.statistics().pending == 0)
        gate.open.set()
        assert await client.unary("wait", b"x") == b"x"
        assert gate.contexts[1].time_remaining() is None


async def test_the_server_keeps_the_deadline_by_itself() -> None:
    """The client's own clock is stopped here."""
    gate = Gate()
    async with calling(service(wait=gate)) as client:
        call = client.unary("wait", timeout=1)
        assert call._timer is not None
        call._timer.cancel()
        with pytest.raises(RpcTimeoutError, match="was not answered in time"):
            await call
        await gate.cancelled.acquire()


async def test_the_longest_time_that_the_server_gives() -> None:
    gate = Gate()
    async with calling(service(wait=gate), max_call_time=0.5) as client:
        calls = [client.unary("wait"), client.unary("wait", timeout=60)]
        for _ in calls:
            await gate.entered.acquire()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [RpcTimeoutError] * 2
        for _ in calls:
            await gate.cancelled.acquire()


async def test_no_time_left() -> None:
    server = RpcServer(service(echo=echo))
    async with calling(server) as client:
        for timeout in (0, -1):
            with pytest.raises(RpcTimeoutError, match="not sent"):
                await client.unary("echo", timeout=timeout)
        assert server.statistics().codes == {}


async def test_a_deadline_that_passes_in_the_queue() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1)
    async with calling(server) as client:
        first = client.unary("wait", b"1")
        await gate.entered.acquire()
        with pytest.raises(RpcTimeoutError):
            await client.unary("wait", b"2", timeout=0.05)
        await eventually(lambda: server.statistics().waiting == 0)
        gate.open.set()
        assert await first == b"1"
        assert len(gate.contexts) == 1
        codes = server.statistics().codes  # by the server's clock or by the client's, which also cancels
        assert codes in ({"OK": 1, "DEADLINE_EXCEEDED": 1}, {"OK": 1, "CANCELLED": 1})


async def test_a_call_that_is_stopped_when_its_turn_has_come_does_not_run() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1)
    async with calling(server) as client:
        first, second = client.unary("wait", b"1"), client.unary("wait", b"2")
        await gate.entered.acquire()
        await eventually(lambda: server.statistics().waiting == 1)
        running, waiting = server._active

        def stop(_: object) -> None:
            assert waiting._lined_up
            waiting._serving.stop(waiting, RpcError(StatusCode.ABORTED, "stopped"))

        assert running._task is not None
        running._task.add_done_callback(stop)  # behind the server's own, which starts the next
        gate.open.set()
        assert await first == b"1"
        with pytest.raises(RpcError, match="ABORTED: stopped"):
            await second
        await eventually(lambda: server.statistics().unanswered == 0)
        assert server.statistics().running == 0
        assert len(gate.contexts) == 1
        assert await client.unary("wait", b"3") == b"3"


class Refused(RpcError):
    """What the handlers here raise."""


@pytest.mark.parametrize("how", ["at once", "later", "cancelled"])
async def test_what_a_handler_raises_leaves_no_garbage(how: str) -> None:
    """It would hold the frames, and so the request, until the next collection."""

    async def refuse(payload: bytes, context: ServerContext) -> bytes:
        if how == "later":
            await asyncio.sleep(0)
        if how == "cancelled":
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError as error:
                raise Refused(StatusCode.ABORTED, "refused") from error
        raise Refused(StatusCode.ABORTED, "refused")

    server = RpcServer(service(refuse=refuse))
    async with calling(server) as client:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                call = client.unary("refuse", timeout=0.01 if how == "cancelled" else None)
                with contextlib.suppress(RpcError):
                    await call
            await eventually(lambda: server.statistics().unanswered == 0)
            left = [error for error in gc.get_objects() if isinstance(error, Refused)]
        finally:
            gc.enable()
    assert len(left) <= 1, "the last one may still be under way"


async def test_a_handler_that_ignores_its_deadline() -> None:
    stubborn = Stubborn()
    server = RpcServer(service(wait=stubborn, echo=echo), max_concurrent=2)
    async with calling(server) as client:
        call = client.unary("wait", timeout=2)
        await stubborn.entered.acquire()
        with pytest.raises(RpcTimeoutError):
            await call
        await stubborn.cancelled.acquire()
        assert await client.unary("echo", b"x", timeout=30) == b"x"
        await eventually(lambda: client.statistics().pending == 0)  # the answer did not wait for it
        assert server.statistics().running == 1  # but its place is taken
        stubborn.open.set()
        await eventually(lambda: server.statistics().running == 0)
        assert sum(server.statistics().codes.values()) == 2  # the late result was no second answer


# --- cancellation -------------------------------------------------------------------------------------


async def test_cancelling_a_call_cancels_it_at_the_server() -> None:
    gate = Gate()
    async with calling(service(wait=gate, echo=echo)) as client:
        call = client.unary("wait")
        await gate.entered.acquire()
        task = asyncio.create_task(wait_for(call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.cancelled()
        assert call.code() is StatusCode.CANCELLED
        await gate.cancelled.acquire()
        assert gate.contexts[0].cancelled()
        assert await client.unary("echo", b"x") == b"x"  # by now the late answer was dropped
        assert client.statistics().pending == 0


async def wait_for(call: asyncio.Future[bytes]) -> bytes:
    return await call


async def test_cancelling_calls_that_wait_in_the_queue() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1)
    async with calling(server) as client:
        calls = [client.unary("wait", b"%d" % i) for i in range(4)]
        await gate.entered.acquire()
        await eventually(lambda: server.statistics().waiting == 3)
        calls[1].cancel()
        calls[2].cancel()
        await eventually(lambda: server.statistics().waiting == 1)
        gate.open.set()
        assert await calls[0] == b"0"
        assert await calls[3] == b"3"
        assert len(gate.contexts) == 2


async def test_a_call_that_was_not_sent_yet_never_is() -> None:
    """The first calls use up the peer's credits, since the server does not read."""
    stuck = asyncio.Event()

    async def deaf(connection: Connection) -> None:
        await stuck.wait()

    async with (
        aiordma.serve(deaf, "127.0.0.1", 0, config=CONFIG) as server,
        aiordma.connect("127.0.0.1", server.port, config=CONFIG) as connection,
        RpcClient(connection) as client,
    ):
        calls = [client.unary("m", timeout=0.01) for _ in range(40)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {RpcTimeoutError}
        statistics = client.statistics()
        # Those were sent; the rest is forgotten.
        assert statistics.pending == statistics.abandoned == CONFIG.min_credits
        stuck.set()


@pytest.mark.parametrize("turns", range(12))
async def test_cancelling_at_every_point(turns: int) -> None:
    """After so many turns of the loop, wherever the call is then: nothing is left of it, on either side."""
    server = RpcServer(service(echo=echo))
    async with calling(server) as client:
        calls = [client.unary("echo", b"x", timeout=30) for _ in range(20)]
        stream = client.bidi("echo")
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        stream.cancel()
        assert await client.unary("echo", b"y") == b"y"
        await eventually(lambda: client.statistics().pending == 0)
        await eventually(lambda: server.statistics().unanswered == 0)
        assert (server.statistics().running, server.statistics().waiting) == (0, 0)


# --- limits -------------------------------------------------------------------------------------------


async def test_overload_is_refused_and_served_again_later() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=2, max_queued=3)
    async with calling(server) as client:
        calls = [client.unary("wait", b"%d" % i) for i in range(5)]
        for _ in range(2):
            await gate.entered.acquire()
        with pytest.raises(RpcError, match="too many calls: ") as caught:
            await client.unary("wait", b"too much")
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert await client.health() is Health.SERVING  # not counted
        assert (server.statistics().running, server.statistics().waiting) == (2, 3)
        gate.open.set()
        assert await asyncio.gather(*calls) == [b"%d" % i for i in range(5)]
        assert await client.unary("wait", b"later") == b"later"
        assert server.statistics().refused == 1


async def test_requests_that_wait_are_limited_in_bytes() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1, max_queued_bytes=1000)
    async with calling(server) as client:
        calls = [client.unary("wait", bytes(900)) for _ in range(2)]
        await gate.entered.acquire()
        with pytest.raises(RpcError, match="those that wait hold 900 bytes") as caught:
            await client.unary("wait", bytes(101))
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        gate.open.set()
        assert await asyncio.gather(*calls) == [bytes(900)] * 2


async def test_a_flood_of_refused_calls() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1, max_queued=0)
    async with calling(server) as client:
        first = client.unary("wait", b"x")
        await gate.entered.acquire()
        results = await asyncio.gather(*(client.unary("wait") for _ in range(2000)), return_exceptions=True)
        assert {result.code for result in results if isinstance(result, RpcError)} == {
            StatusCode.RESOURCE_EXHAUSTED
        }
        assert len(results) == server.statistics().refused == 2000
        gate.open.set()
        assert await first == b"x"


async def test_limits_of_one_connection_leave_room_for_another() -> None:
    gate = Gate()
    server = RpcServer(
        service(wait=gate, echo=echo), max_concurrent_per_connection=1, max_queued_per_connection=1
    )
    async with (
        aiordma.serve(server, "127.0.0.1", 0, config=CONFIG) as listening,
        aiordma.connect("127.0.0.1", listening.port, config=CONFIG) as one,
        aiordma.connect("127.0.0.1", listening.port, config=CONFIG) as two,
        RpcClient(one) as greedy,
        RpcClient(two) as modest,
    ):
        calls = [greedy.unary("wait", b"%d" % i) for i in range(2)]
        await gate.entered.acquire()
        with pytest.raises(RpcError, match="1 calls of this connection are running, and 1 wait"):
            await greedy.unary("echo")
        assert await modest.unary("echo", b"x") == b"x"
        gate.open.set()
        assert await asyncio.gather(*calls) == [b"0", b"1"]


# --- the end in order ---------------------------------------------------------------------------------


async def test_drain_lets_calls_in_flight_end() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate), max_concurrent=1)
    async with calling(server) as client:
        calls = [client.unary("wait", b"%d" % i) for i in range(3)]  # one runs, two wait
        await gate.entered.acquire()
        await eventually(lambda: server.statistics().waiting == 2)
        draining = asyncio.create_task(server.drain(60))
        await eventually(lambda: server.draining)
        with pytest.raises(RpcError, match="shutting down") as caught:
            await client.unary("wait")
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert await client.health() is Health.NOT_SERVING
        assert not draining.done()
        gate.open.set()
        assert await draining is True
        assert await asyncio.gather(*calls) == [b"0", b"1", b"2"]
        assert await server.drain() is True


async def test_drain_cancels_what_does_not_end() -> None:
    gate, stubborn = Gate(), Stubborn()
    server = RpcServer(service(wait=gate, stubborn=stubborn), cancel_grace=0.1)
    async with calling(server) as client:
        calls = [client.unary("wait"), client.unary("stubborn")]
        await gate.entered.acquire()
        await stubborn.entered.acquire()
        with reports() as seen:
            assert await server.drain(0.05) is False
        assert [context["message"] for context in seen] == [
            "aiordma RPC stubborn goes on after its cancellation, for more than 0.1 s"
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [result.code for result in results if isinstance(result, RpcError)] == [
            StatusCode.UNAVAILABLE
        ] * 2
        await gate.cancelled.acquire()
        stubborn.open.set()
        await eventually(lambda: server.statistics().running == 0)


async def test_drain_ends_streams() -> None:
    made = service()

    @made.bidi
    async def talk(requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    server = RpcServer(made)
    async with calling(server) as client:
        async with client.bidi("talk") as call:
            await call.write(b"1")
            assert await call.read() == b"1"
            assert await server.drain(0) is False
            with pytest.raises(RpcError, match="shutting down"):
                await call.read()
            assert call.code() is StatusCode.UNAVAILABLE


async def test_a_stubborn_handler_does_not_hold_its_connection() -> None:
    stubborn = Stubborn()
    server = RpcServer(service(wait=stubborn), cancel_grace=0.05)
    with reports() as seen:
        async with calling(server) as client:
            client.unary("wait")
            await stubborn.entered.acquire()
        # The listening server has closed, and with it the connection.
        assert [context["message"] for context in seen] == [
            "aiordma RPC wait goes on after its cancellation, for more than 0.05 s"
        ]
        stubborn.open.set()
        await eventually(lambda: server.statistics().unanswered == 0)
    assert len(seen) == 1


async def test_a_handler_that_raises_while_it_is_cancelled() -> None:
    entered = asyncio.Event()

    async def clumsy(payload: bytes, context: ServerContext) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise LookupError("while cleaning up")

    async with calling(service(clumsy=clumsy, echo=echo)) as client:
        with reports() as seen:
            call = client.unary("clumsy")
            await entered.wait()
            call.cancel()
            await eventually(lambda: seen)
        assert isinstance(seen[0]["exception"], LookupError)
        assert await client.unary("echo", b"x") == b"x"


async def test_one_server_for_several_connections_drains_all() -> None:
    gate = Gate()
    server = RpcServer(service(wait=gate))
    async with connected(server) as one, connected(server) as two:
        async with RpcClient(one) as first, RpcClient(two) as second:
            calls = [first.unary("wait", b"1"), second.unary("wait", b"2")]
            for _ in calls:
                await gate.entered.acquire()
            assert server.statistics().connections == 2
            draining = asyncio.create_task(server.drain())
            await eventually(lambda: server.draining)
            gate.open.set()
            assert await draining
            assert await asyncio.gather(*calls) == [b"1", b"2"]


@pytest.mark.parametrize(
    "options", [{"max_concurrent": 0}, {"max_queued": -1}, {"max_message_size": -1}, {"max_call_time": 0}]
)
def test_bad_limits(options: dict[str, int]) -> None:
    with pytest.raises(MisuseError):
        RpcServer(**options)  # type: ignore[arg-type]
