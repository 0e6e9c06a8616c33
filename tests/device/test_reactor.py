"""No lost wakeup, no slot lost, and other tasks get their turns."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from aiordma import Config, Connection
from aiordma.testing import connected_pair
from tests.conftest import device_under_test
from tests.device.conftest import MakePair

pytestmark = pytest.mark.device


@pytest.mark.parametrize("mode", ["event", "adaptive"])
async def test_no_lost_wakeup(pair: MakePair, mode: str) -> None:
    """Thousands of sleeps and wakeups at every alignment of drain, arm and arrival: one lost, and it hangs."""
    random.seed(11)
    both = await pair(Config(mode=mode, receive_credits=8, send_depth=8))  # type: ignore[arg-type]

    async def echo(end: Connection) -> None:
        async for message in end:
            for _ in range(random.randrange(3)):
                await asyncio.sleep(0)
            await end.send(message)

    echoing = asyncio.ensure_future(echo(both.server))
    for _ in range(500):
        burst = random.choice([1, 1, 1, 2, 7])
        sends = [both.client.send(b"%d" % j) for j in range(burst)]
        for j in range(burst):
            assert await both.client.recv() == b"%d" % j
        await asyncio.gather(*sends)
        for _ in range(random.randrange(3)):
            await asyncio.sleep(0)
    stats = both.client.statistics()
    assert stats.send_slots_used == 0
    assert stats.reactor.stale_completions == 0
    if mode == "event":
        assert stats.reactor.wakeups > 100, "it did sleep in between"
        assert stats.reactor.turns == 0
        assert stats.reactor.spin_seconds == 0
    both.client.close()
    await echoing


@pytest.mark.parametrize("mode", ["busy", "adaptive"])
async def test_spinning_takes_no_longer_than_there_is_time(pair: MakePair, mode: str) -> None:
    """Those that a poll on a turn of the loop wakes spin in their turn, and work: that is no part of its own."""
    both = await pair(Config(mode=mode, inline_spin_us=1000))  # type: ignore[arg-type]

    async def work(end: Connection) -> None:
        async for message in end:
            until = time.perf_counter() + 0.0005
            while time.perf_counter() < until:
                pass
            await end.send(message)

    working = asyncio.ensure_future(work(both.server))
    began, before = time.perf_counter(), both.client.statistics().reactor.spin_seconds
    for _ in range(200):
        await both.client.send(b"x")
        await both.client.recv()
    spun = both.client.statistics().reactor.spin_seconds - before
    assert 0 < spun <= time.perf_counter() - began - 200 * 0.0005
    both.client.close()
    await working


@pytest.mark.parametrize("mode", ["busy", "adaptive"])
async def test_other_tasks_get_their_turns(pair: MakePair, mode: str) -> None:
    """A task whose awaits all complete inside the call still lets others run."""
    both = await pair(Config(mode=mode, inline_spin_us=1000))  # type: ignore[arg-type]
    _, remote = await both.region(64)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    for _ in range(200):
        await both.client.write(b"x" * 64, remote)
    assert turns > 10
    task.cancel()
    await asyncio.wait([task])
    both.client.close()
    both.server.close()
    await both.client.wait_closed()
    await both.server.wait_closed()


async def test_inline_completion_is_counted(pair: MakePair) -> None:
    both = await pair(Config(mode="busy", inline_spin_us=1000))
    _, remote = await both.region(64)
    before = both.client.statistics().reactor
    for _ in range(50):
        await both.client.write(b"x" * 64, remote)
    after = both.client.statistics().reactor
    assert after.inline_polls > before.inline_polls
    assert after.inline_hits > before.inline_hits
    both.client.close()
    both.server.close()
    await both.client.wait_closed()
    await both.server.wait_closed()


async def test_many_operations_in_one_turn_and_few_crossings(pair: MakePair) -> None:
    both = await pair(Config(send_depth=64))
    _, remote = await both.region(64)
    before = both.client.statistics().reactor.polls
    async with both.client.batch() as batch:
        for _ in range(64):
            batch.write(b"x", remote)
    assert both.client.statistics().reactor.polls - before < 64


# --- interruptions ----------------------------------------------------------------------------------------


class Interrupted(asyncio.SelectorEventLoop):
    """Ctrl-C, mostly, comes while C polls, and its exception out of what Python runs next."""

    times = 0

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        if self.times and getattr(callback, "__name__", "") == "poll_turn":
            self.times -= 1
            raise KeyboardInterrupt
        return super().call_soon(callback, *args, context=context)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interruption_while_polling_stops_nothing(times: int) -> None:
    """The program may go on, or has to clean up."""
    with asyncio.Runner(loop_factory=Interrupted) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Interrupted)
        pair = connected_pair(Config(mode="busy"), device=device_under_test().name)
        both = runner.run(pair.__aenter__())

        async def exchange() -> None:
            for number in range(40):
                messages = [b"%d" % (number + i) for i in range(3)]
                for message in messages:
                    both.client.send(message)
                assert [await both.server.recv() for _ in messages] == messages

        for _ in range(3):
            loop.times = times
            with pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(loop.create_future())
            loop.times = 0
            runner.run(exchange())
        runner.run(pair.__aexit__(None, None, None))
