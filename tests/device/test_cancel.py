"""Cancelling abandons the wait, never the memory."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from aiordma import Config, Connection
from aiordma.errors import RdmaError
from tests.device.conftest import MakePair

pytestmark = pytest.mark.device


async def test_a_thousand_cancellations_at_random_points(pair: MakePair) -> None:
    random.seed(7)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    both = await pair(Config(send_depth=16, receive_credits=16))
    client, server = both.client, both.server
    _, remote = await both.region(1 << 16)
    counter = remote[60_000:60_008]  # what no other operation here touches
    before = client.statistics()
    common = shared_by_all(client, server)
    sink = asyncio.ensure_future(_drain(server))
    sources = [bytes([i]) * 20_000 for i in range(8)]

    async def some_operation(i: int) -> object:
        kind = i % 6
        if kind == 0:
            return await client.write(b"x" * 64, remote[:64])
        if kind == 1:
            return await client.write(sources[i % 8], remote[:20_000])  # pinned, not staged
        if kind == 2:
            return await client.read(remote[:30_000])
        if kind == 3:
            return await client.send(b"message")
        if kind == 4:
            return await client.fetch_add(counter, 0)
        return await client.read_into(remote[:9_000], bytearray(9_000))

    for first in range(0, 1000, 50):
        tasks = [asyncio.ensure_future(some_operation(i)) for i in range(first, first + 50)]
        for _ in range(random.randrange(4)):
            await asyncio.sleep(0)
        for task in random.sample(tasks, 50):
            task.cancel()
            if random.random() < 0.2:
                await asyncio.sleep(0)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert not isinstance(result, RdmaError)

    await client.write(b"after all", remote[:9])
    assert await client.read(remote[:9]) == b"after all"
    assert await client.fetch_add(counter, 1) == 0
    sink.cancel()
    await asyncio.wait([sink])
    after = client.statistics()
    assert after.send_slots_used == after.waiting_for_credit == after.waiting_for_slot == 0
    # What all connections share may have grown; nothing of these operations is left.
    leased, posted = shared_by_all(client, server)
    assert after.pool.leased - leased == before.pool.leased - common[0]
    messages = 2  # each side has one entry at most for messages that went the short way
    assert 0 <= (after.reactor.pending - posted) - (before.reactor.pending - common[1]) <= messages
    assert not problems


def shared_by_all(client: Connection, server: Connection) -> tuple[int, int]:
    """Bytes of staging and of the shared receive queue, and how many receives that has posted."""
    shared = server.statistics().shared_receives
    assert shared is not None
    return client._sends._staging.registered + shared.registered, shared.posted


async def _drain(connection: Any) -> None:
    async for _ in connection:
        pass


async def test_timeouts_of_every_wait(pair: MakePair) -> None:
    both = await pair(Config(receive_credits=2))
    for wait in (both.client.recv, both.client.notified, lambda: both.client.remote("nobody shares this")):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await wait()
    for _ in range(2):
        await both.client.send(b"fills the window")
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(both.client.send(b"never posted"), 0.005)
    assert both.client.statistics().waiting_for_credit == 0, "what was given up is forgotten"
    await both.server.recv()
    await both.server.recv()
    await both.client.send(b"next")
    assert await both.server.recv() == b"next"


async def test_a_cancelled_receiver_loses_no_message(pair: MakePair) -> None:
    both = await pair()
    for i in range(50):
        receiver = asyncio.ensure_future(both.server.recv())
        await asyncio.sleep(0)
        await both.client.send(b"%d" % i)
        # Cancel after the wake-up and before the receiver's turn: the narrowest place.
        while both.server.statistics().messages_queued == 0 and not receiver.done():
            await asyncio.sleep(0)
        receiver.cancel()
        try:
            message = await receiver
        except asyncio.CancelledError:
            message = await both.server.recv()
        assert message == b"%d" % i


async def test_a_read_that_was_given_up_does_not_touch_what_comes_after(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(1 << 20)
    await both.client.write(b"\xff" * (1 << 20), remote)
    for _ in range(20):
        buffer = bytearray(1 << 20)
        operation = both.client.read_into(remote, buffer)
        operation.cancel()
        with pytest.raises(BufferError):
            buffer.clear()  # the device may still write there: the buffer is held
        await both.client.read(remote[:8])  # completes after it, on the same queue pair
        buffer.clear()
