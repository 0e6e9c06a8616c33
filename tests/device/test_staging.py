"""Staging buffers: shared by all connections, held only while a request is in flight, never a dead end."""

from __future__ import annotations

import asyncio

import pytest

from aiordma import Config, Connection
from aiordma.adapter import Adapter
from aiordma.protocol.frames import HEADER_SIZE
from aiordma.staging import StagingBuffer, StagingPool
from tests.device.conftest import MakePair, Pair

pytestmark = pytest.mark.device

SIZE = Config().eager_size + HEADER_SIZE


def adapter_of(both: Pair) -> Adapter:
    return both.client._adapter


def staging_of(both: Pair) -> StagingPool:
    return adapter_of(both).staging(SIZE)


def nothing_is_lent(connection: Connection) -> bool:
    staging = connection._staging
    return len(staging.free) == sum(len(chunk.buffers) for chunk in staging._chunks)


class Hog:
    """Takes every staging buffer there is, and keeps them."""

    def __init__(self, pool: StagingPool) -> None:
        self.pool = pool
        self.held: list[StagingBuffer] = []
        while (buffer := pool.take(self)) is not None:
            self.held.append(buffer)
        pool.forget(self)

    def staging_ready(self) -> None:
        raise AssertionError("it is not in line")

    def give(self, count: int) -> None:
        for _ in range(count):
            self.pool.give(self.held.pop())


async def test_connections_hold_staging_only_while_they_send(pair: MakePair) -> None:
    both = await pair()
    at_first = staging_of(both).registered
    more = [await pair() for _ in range(5)]
    assert all(adapter_of(other) is adapter_of(both) for other in more)
    assert staging_of(both).registered == at_first, "idle connections cost staging"
    _, remote = await both.region(SIZE)
    data = [bytes([i]) * 1000 for i in range(200)]
    for one in data:
        await both.client.write(one, remote)
        assert await both.client.read(remote[:1000]) == one
    assert staging_of(both).registered == at_first, "one at a time needs one buffer"


async def test_what_a_burst_took_goes_back(pair: MakePair) -> None:
    both = await pair(Config(send_depth=1024))
    _, remote = await both.region(SIZE)
    await asyncio.gather(*[both.client.write(bytes(2000), remote) for _ in range(3000)])
    kept = staging_of(both).registered
    assert kept <= 1 << 20
    await asyncio.gather(*[both.client.read(remote[:2000]) for _ in range(3000)])
    assert staging_of(both).registered <= kept


async def test_without_a_buffer_sends_wait_in_order_and_credit_frames_go(pair: MakePair) -> None:
    """A pool at its limit: small messages (inline) and credit frames need nothing of it, the rest waits."""
    config = Config(pool_limit=8 << 20, receive_credits=8)
    both = await pair(config)
    assert both.client._qp.max_inline >= HEADER_SIZE + 8, "what follows needs inline data"
    hog = Hog(staging_of(both))
    _, remote = await both.region(64)
    for i in range(40):  # five windows: the credits came back
        await both.client.send(b"%d" % i)
        assert await both.server.recv() == b"%d" % i
    while both.client.statistics().send_credits < 8:  # told of the last ones by a frame of its own
        await asyncio.sleep(0)
    large = [b"%d" % i + bytes(2000) for i in range(4)]
    waiting = [both.client.send(data) for data in large]
    atomic = both.client.fetch_add(remote[:8], 1)
    assert both.client.statistics().waiting_for_slot == 5
    waiting[1].cancel()
    hog.give(1)
    for i in (0, 2, 3):
        assert await both.server.recv() == large[i]
        await waiting[i]
    assert await atomic == 0
    hog.give(len(hog.held))


async def test_waiting_connections_are_served_in_turn(pair: MakePair) -> None:
    config = Config(pool_limit=8 << 20)
    pairs = [await pair(config) for _ in range(3)]
    hog = Hog(staging_of(pairs[0]))
    data = bytes(2000)
    sends = [[each.client.send(data) for _ in range(30)] for each in pairs]
    assert staging_of(pairs[0]).waiting == 3
    hog.give(1)
    for each, futures in zip(pairs, sends, strict=True):
        assert [await each.server.recv() for _ in futures] == [data] * 30
        await asyncio.gather(*futures)
    assert staging_of(pairs[0]).waiting == 0
    hog.give(len(hog.held))


async def test_a_connection_that_ends_leaves_the_line(pair: MakePair) -> None:
    config = Config(pool_limit=8 << 20)
    first, second = await pair(config), await pair(config)
    hog = Hog(staging_of(first))
    lost = first.client.send(bytes(2000))
    kept = second.client.send(bytes(2000))
    first.client.close()
    await asyncio.gather(lost, return_exceptions=True)
    await first.client.wait_closed()
    hog.give(1)
    await kept
    assert await second.server.recv() == bytes(2000)
    hog.give(len(hog.held))


@pytest.mark.parametrize("credits", [2, 64])
async def test_without_inline_data(pair: MakePair, credits: int) -> None:
    """A device that takes none: credit frames have registered memory of their own."""
    both = await pair(Config(inline_size=0, receive_credits=credits))
    assert both.client._sends._control_lease is not None or both.client._qp.max_inline >= HEADER_SIZE
    sends = [both.client.send(b"%d" % i) for i in range(200)]
    for i in range(200):
        assert await both.server.recv() == b"%d" % i
    await asyncio.gather(*sends)
    _, remote = await both.region(64)
    await both.client.write(b"12345678", remote[:8])
    assert await both.client.read(remote[:8]) == b"12345678"
    assert await both.client.read(remote[:0]) == b""
