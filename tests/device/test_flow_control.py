"""Nobody is ever caught without a receive: floods, slow receivers, two sides that only send."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

import aiordma
from aiordma import Config, Connection, Server
from tests.device.conftest import Acceptor, MakePair, rnr_counters

pytestmark = pytest.mark.device

Listen = Callable[..., Awaitable[tuple[Server, Acceptor]]]


# On one loop only: it is 20,000 messages.
@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.timeout(600)
async def test_sixteen_senders_one_slow_receiver(listen: Listen) -> None:
    senders, messages = 16, 20_000 // 16
    config = Config(receive_credits=16, send_depth=32, pool_limit=16 << 20)
    server, acceptor = await listen(config)
    before = rnr_counters()
    clients = [await aiordma.connect("127.0.0.1", server.port, config=config) for _ in range(senders)]
    accepted = [await acceptor.accepted.get() for _ in clients]

    async def flood(client: Connection) -> None:
        for first in range(0, messages, 100):
            await asyncio.gather(*[client.send(b"%d" % i) for i in range(first, min(first + 100, messages))])

    async def receive_slowly() -> None:
        """One task for all connections: each waits while the fifteen others have their turn."""
        for i in range(messages):
            for connection in accepted:
                assert await connection.recv() == b"%d" % i
                assert connection.statistics().messages_queued <= config.receive_credits
            if i % 64 == 0:
                await asyncio.sleep(0.01)

    tasks = [asyncio.ensure_future(flood(client)) for client in clients]
    await receive_slowly()
    await asyncio.gather(*tasks)
    stats = accepted[0].statistics()
    assert stats.pool.registered <= config.pool_limit
    assert rnr_counters() == before
    assert all(c.statistics().messages_queued == 0 for c in accepted)
    for connection in clients:
        connection.close()
        await connection.wait_closed()


async def test_two_peers_that_only_send_then_both_receive(pair: MakePair) -> None:
    both = await pair(Config(receive_credits=4, send_depth=8))
    ends = (both.client, both.server)
    count = 200
    sends = [[end.send(b"%d" % i) for i in range(count)] for end in ends]
    await asyncio.wait([future for half in sends for future in half[:4]])
    while any(end.statistics().send_slots_used for end in ends):
        await asyncio.sleep(0)  # until what had a credit has completed: both are blocked now
    for end, half in zip(ends, sends, strict=True):
        assert sum(future.done() for future in half) == 4
        assert end.statistics().waiting_for_credit == count - 4

    async def receive(end: Connection) -> None:
        for i in range(count):
            assert await end.recv() == b"%d" % i

    await asyncio.gather(*map(receive, ends), *sends[0], *sends[1])


@pytest.mark.parametrize(("credits", "depth"), [(2, 2), (2, 64), (64, 2), (3, 5)])
async def test_small_windows(pair: MakePair, credits: int, depth: int) -> None:
    both = await pair(Config(receive_credits=credits, send_depth=depth))
    _, remote = await both.region(8)

    async def produce(end: Connection) -> None:
        await asyncio.gather(*[end.send(b"%d" % i) for i in range(150)])

    async def consume(end: Connection) -> None:
        for i in range(150):
            assert await end.recv() == b"%d" % i

    async def notify() -> None:
        await asyncio.gather(*[both.client.write(b"", remote, notify=i) for i in range(150)])

    async def notified() -> None:
        for i in range(150):
            assert await both.server.notified() == i

    ends = (both.client, both.server)
    await asyncio.gather(*map(produce, ends), *map(consume, ends), notify(), notified())


async def test_notifications_alone_keep_flowing(pair: MakePair) -> None:
    """They carry no credits, so credit frames must go both ways for them."""
    both = await pair(Config(receive_credits=2))
    lease = await both.client.allocate(8)
    await both.client.share("back", lease)
    back = await both.server.remote("back")
    _, there = await both.region(8)

    async def ring(end: Connection, remote: aiordma.RemoteRegion) -> None:
        for i in range(200):
            await end.write(b"", remote, notify=i)

    async def hear(end: Connection) -> None:
        for i in range(200):
            assert await end.notified() == i

    await asyncio.gather(
        ring(both.client, there), ring(both.server, back), hear(both.client), hear(both.server)
    )


async def test_writes_pass_messages_that_wait_for_credit(pair: MakePair) -> None:
    both = await pair(Config(receive_credits=2))
    _, remote = await both.region(8)
    sends = [both.client.send(b"%d" % i) for i in range(5)]
    await both.client.write(b"12345678", remote)
    assert await both.client.read(remote) == b"12345678"
    assert not sends[4].done()
    for i in range(5):
        assert await both.server.recv() == b"%d" % i
    await asyncio.gather(*sends)


async def test_waiting_for_memory_is_fair_and_bounded(pair: MakePair) -> None:
    both = await pair(Config(pool_limit=10 << 20))
    pool = both.client.statistics().pool
    leases = [await both.client.allocate(1 << 20) for _ in range(5)]
    waiting = [
        asyncio.ensure_future(_take(both.client, 4 << 20)),
        asyncio.ensure_future(_take(both.client, 64)),
    ]
    await asyncio.sleep(0)
    assert both.client.statistics().pool.registered <= pool.limit
    cancelled = asyncio.ensure_future(_take(both.client, 4 << 20))
    await asyncio.sleep(0)
    cancelled.cancel()
    for lease in leases:
        await lease.release()
    for future in waiting:
        await (await future).release()
    with pytest.raises(aiordma.errors.MemoryLimitError) as caught:
        await both.client.allocate(11 << 20)
    assert caught.value.limit == 10 << 20
    assert (await asyncio.gather(cancelled, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def _take(connection: Connection, nbytes: int) -> aiordma.Lease:
    return await connection.allocate(nbytes)
