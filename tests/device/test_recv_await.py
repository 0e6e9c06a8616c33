"""What conn.recv() returns is a coroutine, as far as asyncio and its users can tell; it is written in C."""

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from aiordma import Config, Connection
from aiordma.errors import ConnectionClosedError, DeviceGoneError, WrongLoopError
from aiordma.receive_queue import ReceiveQueue
from tests.device.conftest import MakePair, Pair

pytestmark = pytest.mark.device


async def test_whatever_takes_a_coroutine_takes_it(pair: MakePair) -> None:
    both = await pair()
    receive = both.server.recv()
    assert asyncio.iscoroutine(receive)
    assert isinstance(receive, Coroutine)
    task = asyncio.create_task(receive)
    assert "Connection.recv" in repr(task)
    for i in range(4):
        await both.client.send(b"%d" % i)
    assert await task == b"0"
    assert await asyncio.wait_for(both.server.recv(), 10) == b"1"
    second, third = await asyncio.gather(both.server.recv(), both.server.recv())
    assert (second, third) == (b"2", b"3")


async def test_one_that_is_never_awaited_is_told_of(pair: MakePair) -> None:
    both = await pair()
    with pytest.warns(RuntimeWarning, match=r"'Connection.recv' was never awaited"):
        both.server.recv()  # type: ignore[unused-coroutine]
    with pytest.warns(RuntimeWarning, match=r"'Connection.__anext__' was never awaited"):
        both.server.__anext__()  # type: ignore[unused-coroutine]
    await _still_receives(both)


async def test_one_cannot_be_awaited_twice(pair: MakePair) -> None:
    both = await pair()
    receive = both.server.recv()
    await both.client.send(b"once")
    assert await receive == b"once"
    with pytest.raises(RuntimeError, match="cannot be again"):
        await receive
    receive.close()  # as with any coroutine
    await _still_receives(both)


@pytest.mark.parametrize("arrived", [False, True], ids=["still waits", "has its message"])
async def test_a_second_task_does_not_disturb_the_first(pair: MakePair, arrived: bool) -> None:
    both = await pair()
    receive = both.server.recv()
    first = asyncio.create_task(receive)
    await asyncio.sleep(0)
    second = asyncio.create_task(receive)
    if arrived:
        await both.client.send(b"for the first")
        await both.client.flush()
    with pytest.raises(RuntimeError, match=r"is being awaited already|cannot be again"):
        await second
    if not arrived:
        await both.client.send(b"for the first")
    assert await first == b"for the first"
    await _still_receives(both)


async def test_it_cannot_be_awaited_while_it_is(pair: MakePair) -> None:
    both = await pair(Config(max_message_size=64 << 20))
    receive = both.server.recv()

    async def await_it() -> bytes:
        return await receive

    first = asyncio.create_task(await_it())
    await asyncio.sleep(0)
    large = bytes(32 << 20)
    sending = asyncio.ensure_future(both.client.send(large))
    refused = 0
    while not first.done():  # in line, and then while the message is being read
        with pytest.raises(RuntimeError, match=r"is being awaited already|cannot be again"):
            await asyncio.create_task(await_it())
        refused += 1
        await asyncio.sleep(0)
    assert refused
    assert await first == large
    await sending


async def test_what_cannot_be_taken_raises(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer cannot be given back, because the device is gone."""
    both = await pair()
    receives = both.server._receives
    receive = both.server.recv()
    receive.send(None)
    await both.client.send(b"taken too late")
    while not receives.handed:
        await asyncio.sleep(0)

    def left(self: ReceiveQueue, buffer: object) -> None:
        raise DeviceGoneError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(ReceiveQueue, "left", left)
        receives.closed = True
        with pytest.raises(DeviceGoneError):
            receive.send(None)
        receives.closed = False
    await _still_receives(both)


async def test_one_in_a_cycle_of_garbage_gives_back_what_it_has_got(pair: MakePair) -> None:
    both = await pair()
    receive = both.server.recv()
    receive.send(None)
    await both.client.send(b"message")
    while not both.server._receives.handed:
        await asyncio.sleep(0)
    cycle: list[object] = [receive]
    cycle.append(cycle)
    del receive, cycle
    gc.collect()
    assert await both.server.recv() == b"message"


async def test_one_that_is_closed_or_forgotten_leaves_the_line(pair: MakePair) -> None:
    both = await pair()
    closed, forgotten = both.server.recv(), both.server.recv()
    for receive in (closed, forgotten):
        receive.send(None)  # in line now, without a task
    closed.close()
    del receive, forgotten
    gc.collect()
    await _still_receives(both)
    with pytest.raises(RuntimeError, match="cannot be again"):
        closed.send(None)


@pytest.mark.parametrize("end", ["close", "throw", "forget"])
async def test_what_it_has_got_goes_back(pair: MakePair, end: str) -> None:
    """A message is its own from its completion on; it ends before it runs."""
    both = await pair()
    receive = both.server.recv()
    receive.send(None)
    await both.client.send(b"first")
    await both.client.send(b"second")
    await both.client.flush()
    while both.server.statistics().messages_queued < 1:  # "second" lies behind it
        await asyncio.sleep(0)
    if end == "close":
        receive.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            receive.throw(KeyError("why"))
    del receive
    assert [await both.server.recv(), await both.server.recv()] == [b"first", b"second"]


class Waker:
    """Its method is a callback, as a task's is; nothing else about it is right."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    def wake(self, _: object) -> None:
        self.woken.set()

    def get_coro(self) -> Waker:
        return self

    @property
    def cr_await(self) -> Waker:  # without an end
        return self

    def __sizeof__(self) -> int:
        return 1 << 80


class Raiser(Waker):
    def get_coro(self) -> Waker:
        raise LookupError("no coroutine")

    def __sizeof__(self) -> int:
        raise LookupError("no size")


class HalfRaiser(Waker):
    @property
    def cr_await(self) -> Waker:
        raise LookupError("no await")

    def __sizeof__(self) -> int:
        return 1 << 40


@pytest.mark.parametrize("kind", [Waker, Raiser, HalfRaiser, None])
async def test_whoever_waits_with_a_callback_is_called(pair: MakePair, kind: type[Waker] | None) -> None:
    """What asyncio's tasks are made of helps to wake them fast, and no more."""
    both = await pair()
    for message in (b"first", b"second"):
        waker = (kind or Waker)()
        receive = both.server.recv()
        wait: Any = receive.send(None)
        callback = waker.wake if kind else lambda wait, waker=waker: waker.wake(wait)
        wait.add_done_callback(callback, context=contextvars.copy_context())
        await both.client.send(message)
        await asyncio.wait_for(waker.woken.wait(), 10)
        with pytest.raises(StopIteration) as taken:
            receive.send(None)
        assert taken.value.value == message
    await _still_receives(both)


async def _by_hand(pair: Pair, message: bytes) -> tuple[Any, Any]:
    """A receive and what it waited with, both over."""
    receive: Any = pair.server.recv()
    wait = receive.send(None)
    await pair.client.send(message)
    while not pair.server._receives.handed:
        await asyncio.sleep(0)
    with pytest.raises(StopIteration) as taken:
        receive.send(None)
    assert taken.value.value == message
    return receive, wait


async def test_what_is_over_is_not_used_again_while_somebody_has_it(pair: MakePair) -> None:
    both = await pair()
    kept = [await _by_hand(both, b"%d" % i) for i in range(3)]
    assert len({id(part) for parts in kept for part in parts}) == 6
    for receive, wait in kept:
        assert receive.__name__ == "Connection.recv"
        with pytest.raises(RuntimeError, match="cannot be again"):
            receive.send(None)
        with pytest.raises(asyncio.CancelledError):
            wait.result()
        assert not wait.cancel()
        waker = Waker()
        wait.add_done_callback(waker.wake, context=contextvars.copy_context())
        await asyncio.wait_for(waker.woken.wait(), 10)
    del receive, wait
    kept.clear()
    for i in range(3):
        await _by_hand(both, b"%d" % i)
    await _still_receives(both)


@pytest.mark.parametrize(
    "thrown",
    [(ValueError("text"),), (ValueError, "text"), (ValueError, ValueError("text"), None)],
    ids=["instance", "class and text", "all three"],
)
async def test_what_is_thrown_is_raised(pair: MakePair, thrown: tuple[object, ...]) -> None:
    both = await pair()
    receive = both.server.recv()
    receive.send(None)
    with pytest.raises(ValueError, match="text"):
        receive.throw(*thrown)  # type: ignore[call-overload]
    unused = both.server.recv()
    with pytest.raises(TypeError, match="takes an exception"):
        unused.throw("text")  # type: ignore[call-overload]
    await _still_receives(both)


async def test_cancelled_before_it_began(pair: MakePair) -> None:
    both = await pair()
    task = asyncio.create_task(both.server.recv())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _still_receives(both)


async def test_a_large_message_is_cancelled_and_received_again(pair: MakePair) -> None:
    both = await pair(Config(max_message_size=64 << 20))
    large = bytes(32 << 20)
    sending = asyncio.ensure_future(both.client.send(large))
    while not both.server.statistics().messages_queued:
        await asyncio.sleep(0)
    receive = both.server.recv()
    task = asyncio.create_task(receive)
    await asyncio.sleep(0)
    task.cancel()
    try:
        message = await task
    except asyncio.CancelledError:
        message = await both.server.recv()
    assert message == large
    await sending


async def test_iteration_ends_and_recv_raises_after_a_close_in_order(pair: MakePair) -> None:
    both = await pair()
    await both.client.send(b"last")
    both.client.close()
    await both.client.wait_closed()
    waiting = asyncio.create_task(_collect(both.server))
    assert await waiting == [b"last"]
    assert await _collect(both.server) == []
    with pytest.raises(ConnectionClosedError):
        await both.server.recv()


async def test_those_in_line_are_told_of_the_end(pair: MakePair) -> None:
    both = await pair()
    tasks = [asyncio.create_task(both.server.recv()), asyncio.create_task(_collect(both.server))]
    await asyncio.sleep(0)
    both.client.close()
    await both.client.wait_closed()
    receiver, collector = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(receiver, ConnectionClosedError)
    assert collector == []


async def test_in_another_loop_it_raises(pair: MakePair) -> None:
    both = await pair()

    def elsewhere() -> None:
        with pytest.raises(WrongLoopError):
            asyncio.run(both.server.recv())

    await asyncio.to_thread(elsewhere)
    await _still_receives(both)


async def _still_receives(both: Pair) -> None:
    await both.client.send(b"next")
    assert await both.server.recv() == b"next"


async def _collect(connection: Connection) -> list[bytes]:
    return [message async for message in connection]
