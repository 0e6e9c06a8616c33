"""An idle connection costs nothing in event and adaptive mode; busy mode says what it costs."""

from __future__ import annotations

import asyncio
import time

import pytest

from aiordma import Config
from tests.device.conftest import MakePair

pytestmark = pytest.mark.device


@pytest.mark.parametrize("mode", ["event", "adaptive"])
async def test_idle(pair: MakePair, mode: str) -> None:
    both = await pair(Config(mode=mode))  # type: ignore[arg-type]
    for _ in range(10):
        await both.client.send(b"warm")
        await both.server.recv()
    while both.client._adapter.reactor.polling:
        await asyncio.sleep(0)  # adaptive: until what it learned says that it has waited long enough
    await both.client.flush()
    for _ in range(
        2000
    ):  # strays of what was polled inside an await, and late acknowledgements, are over by then
        await asyncio.sleep(0)
    before = both.client.statistics().reactor
    cpu = time.process_time()
    await asyncio.sleep(5)
    cpu = time.process_time() - cpu
    after = both.client.statistics().reactor
    assert (after.wakeups, after.polls, after.turns) == (before.wakeups, before.polls, before.turns)
    assert cpu < 0.1, f"{cpu:.3f} s of CPU in 5 s"
    await both.client.send(b"wake up")
    assert await both.server.recv() == b"wake up"


async def test_busy_mode_says_so(pair: MakePair) -> None:
    both = await pair(Config(mode="busy"))
    before = both.client.statistics().reactor
    for _ in range(50):
        await asyncio.sleep(0)
    after = both.client.statistics().reactor
    assert after.mode == "busy"
    assert after.turns >= before.turns + 40
    assert after.spin_share > 0
    both.client.close()
    both.server.close()
    await both.client.wait_closed()
    await both.server.wait_closed()
