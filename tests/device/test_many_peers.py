"""Many connections to one server: little memory each, credits where they are used, nobody in another's way."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import aiordma
from aiordma import Config, Connection, Server
from tests.conftest import device_under_test
from tests.device.conftest import Acceptor, MakePair
from tests.device.crowd import GO, STOP, allow_files, cpu, crowd_server, flood, report

pytestmark = pytest.mark.device

Listen = Callable[..., Awaitable[tuple[Server, Acceptor]]]

#: A client of whom there are many in this process: it shall not need much either.
SMALL = Config(receive_credits=4, rendezvous_depth=1, send_depth=64, keepalive=0)


async def connect(port: int, config: Config = SMALL) -> Connection:
    return await aiordma.connect("127.0.0.1", port, config=config, timeout=120)


async def connect_many(port: int, count: int) -> list[Connection]:
    """Some at a time: a server drops the oldest handshake when there are too many."""
    found: list[Connection] = []
    while len(found) < count:
        found += await asyncio.gather(*[connect(port) for _ in range(min(20, count - len(found)))])
    return found


async def close_all(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()
    await asyncio.gather(*[connection.wait_closed() for connection in connections])


async def until(asking: Connection, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Asks until the server's report is as it should be."""
    while not condition(found := await report(asking)):
        await asyncio.sleep(0.01)  # let it work
    return found


# On one loop only, because it is long.
@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.timeout(900)
async def test_a_thousand_connections_ten_of_them_busy(no_leaked_tasks: None) -> None:
    total = 1000 if device_under_test().is_usroce else 100
    allow_files(total + 500)
    async with crowd_server() as port:
        asking = await connect(port)
        busy = await connect_many(port, 10)
        alone = await rate(busy)
        before = await report(asking)
        idle = await connect_many(port, total - 10)
        after = await until(asking, lambda found: found["connections"] == total + 1)  # clients know it first
        together = await rate(busy)
        loaded = await report(asking)
        resting = await cpu_of_a_second(asking)
        each = {key: (after[key] - before[key]) / len(idle) for key in ("rss", "shared_bytes", "leased")}
        kib = {key: f"{value / 1024:.1f} KiB" for key, value in each.items()}
        print(
            f"{total} connections; each idle one: {kib['shared_bytes']} of receives, {kib['leased']} registered, "
            f"{kib['rss']} RSS. {alone:.0f} messages/s of 10 alone, {together:.0f} with the others; "
            f"{loaded['queues']} completion queues, {resting:.3f} s CPU in 1 s idle"
        )
        assert each["leased"] < 48 << 10
        assert each["rss"] < (512 if "AIORDMA_SANITIZE" in os.environ else 256) << 10  # ASan adds its own
        assert loaded["queues"] <= 4
        assert loaded["windows"][-10:] == [64] * 10, "the busy have all they can use"
        assert loaded["windows"][-20:-11] == [4] * 9, "the idle have what they need"
        assert loaded["reserved"] <= loaded["receives"]
        assert loaded["rnr_naks"] == 0
        assert resting < 0.2
        await flood(idle[-1], 100)  # each is as alive as on the first day
        await close_all([*busy, *idle])
        await until(asking, lambda found: found["sharing"] == 1 and found["posted"] == found["receives"])
        await close_all([asking])


async def rate(connections: list[Connection], count: int = 1000) -> float:
    """Messages per second of all together, in the best of three rounds."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        await asyncio.gather(*[flood(connection, count) for connection in connections])
        best = max(best, len(connections) * count / (time.perf_counter() - started))
    return best


async def cpu_of_a_second(asking: Connection) -> float:
    before = await cpu(asking)
    await asyncio.sleep(1)
    return await cpu(asking) - before


@pytest.mark.timeout(200)
async def test_credits_move_to_the_busy_and_come_back(no_leaked_tasks: None) -> None:
    async with crowd_server(shared_receives=120, receive_credits=32) as port:
        asking = await connect(port)
        first, second = await connect_many(port, 4), await connect_many(port, 4)
        for group in (first, second, first):
            # 4 more windows of 28 than there are: the others have to give theirs back.
            while True:
                await asyncio.gather(*[flood(connection, 200) for connection in group])
                windows = [(await report(connection))["window"] for connection in group]
                if min(windows) == 32:
                    break
        found = await report(asking)
        assert found["recalls"] >= 4
        assert found["reserved"] <= found["receives"]
        assert found["rnr_naks"] == 0
        await close_all([*first, *second])
        await until(asking, lambda found: found["sharing"] == 1 and found["posted"] == found["receives"])
        await close_all([asking])


@pytest.mark.timeout(200)
async def test_a_slow_reader_holds_only_its_own_share(no_leaked_tasks: None) -> None:
    async with crowd_server(shared_receives=64) as port:
        slow, quick = await connect(port), await connect(port)
        await slow.send(STOP)
        stuck = [slow.send(bytes(100)) for _ in range(100)]
        await flood(quick, 2000)
        found = await report(quick)
        assert found["window"] == 64
        assert slow.statistics().waiting_for_credit >= 95
        assert found["receives"] - found["posted"] <= 4
        await quick.send(GO)
        await asyncio.gather(*stuck)
        await close_all([slow, quick])


@pytest.mark.timeout(600)
async def test_churn_leaves_every_receive_posted(no_leaked_tasks: None) -> None:
    """Connections that close in the midst of everything, their messages taken or not."""
    async with crowd_server(shared_receives=100, min_credits=2) as port:
        asking = await connect(port)
        for round_ in range(4):
            connections = await connect_many(port, 20)
            for connection in connections[::3]:
                await connection.send(STOP)
            sends = [connection.send(bytes(3000)) for connection in connections for _ in range(20)]
            await asyncio.wait(sends[20:40])  # of one that is read
            if round_ % 2:
                await asyncio.wait(sends, timeout=0.05)
            await asking.send(GO)
            await close_all(connections)
            await asyncio.gather(*sends, return_exceptions=True)
        found = await until(asking, lambda found: found["sharing"] == 1)
        assert found["posted"] == found["receives"]
        assert found["rnr_naks"] == 0
        await close_all([asking])


@pytest.mark.parametrize(("spare", "least"), [(1, 1), (8, 2), (200, 4)])
async def test_random_traffic_over_a_small_pool(listen: Listen, spare: int, least: int) -> None:
    """Bursts both ways, with pauses, over connections that take credits from each other."""
    rng = random.Random(spare)
    server, acceptor = await listen(Config(shared_receives=spare, min_credits=least, receive_credits=32))
    clients, accepted = [], []
    for _ in range(8):
        clients.append(await aiordma.connect("127.0.0.1", server.port))
        accepted.append(await acceptor.accepted.get())
    pairs = [pair for both in zip(clients, accepted, strict=True) for pair in (both, both[::-1])]
    counts = [0] * len(pairs)

    async def send(number: int) -> None:
        sender = pairs[number][0]
        for _ in range(20):
            burst = rng.choice([1, 5, 60])
            counts[number] += burst
            sizes = rng.choices([0, 10, 3000], k=burst)
            await asyncio.gather(*[sender.send(bytes(size)) for size in sizes])
            for _ in range(rng.choice([0, 1, 10])):
                await asyncio.sleep(0)
        await sender.send(b"the end")
        counts[number] += 1

    async def receive(number: int) -> int:
        count, receiver = 0, pairs[number][1]
        while await receiver.recv() != b"the end":
            count += 1
            if rng.random() < 0.02:
                await asyncio.sleep(rng.choice([0, 0.01]))
        return count + 1

    numbers = range(len(pairs))
    received = await asyncio.gather(*map(receive, numbers), *map(send, numbers))
    assert received[: len(pairs)] == counts
    shared = accepted[0].statistics().shared_receives
    assert shared is not None
    assert shared.reserved <= shared.receives
    assert shared.posted == shared.receives
    await close_all(clients)


async def test_a_message_lease_keeps_its_receive_beyond_the_connection(listen: Listen) -> None:
    server, acceptor = await listen(Config(shared_receives=16))
    client, other = [await aiordma.connect("127.0.0.1", server.port) for _ in range(2)]
    accepted, watching = await acceptor.accepted.get(), await acceptor.accepted.get()
    await client.send(b"kept")
    lease = await accepted.recv_lease()
    await client.send(b"never looked at")
    await close_all([client])
    await accepted.wait_closed()

    def missing() -> int:
        shared = watching.statistics().shared_receives
        assert shared is not None
        return shared.receives - shared.posted

    assert missing() == 1
    assert bytes(lease) == b"kept"
    lease.release()
    assert missing() == 0
    await other.send(b"all is well")
    assert await watching.recv() == b"all is well"
    await close_all([other])


async def test_a_client_may_share_and_a_server_need_not(pair: MakePair) -> None:
    both = await pair(Config(shared_receives=32), Config(shared_receives=0))
    assert both.client.statistics().shared_receives is not None
    assert both.server.statistics().shared_receives is None
    assert both.server.statistics().receive_credits == 64
    assert both.client.statistics().receive_credits == 4
    for sender, receiver in ((both.client, both.server), (both.server, both.client)):
        sends = [sender.send(b"%d" % i) for i in range(500)]
        for i in range(500):
            assert await receiver.recv() == b"%d" % i
        await asyncio.gather(*sends)
    assert 36 <= both.client.statistics().receive_credits < 64, (
        "4, the 32 of the pool, and the rest of a chunk"
    )


async def test_a_pool_without_memory_takes_credits_back(listen: Listen) -> None:
    """The registered memory ends before the limit does."""
    config = Config(shared_receives=60_000, pool_limit=2 << 20, slab_size=256 << 10, receive_credits=256)
    server, acceptor = await listen(config)
    small = Config(receive_credits=4, rendezvous_depth=1, pool_limit=2 << 20, slab_size=256 << 10)
    first, second = [await aiordma.connect("127.0.0.1", server.port, config=small) for _ in range(2)]
    ends = [await acceptor.accepted.get(), await acceptor.accepted.get()]
    for client, end in ((first, ends[0]), (second, ends[1])):
        while end.statistics().receive_credits < 200:  # more than half of all
            sends = [client.send(bytes(100)) for _ in range(256)]
            for _ in sends:
                await end.recv()
            await asyncio.gather(*sends)
    shared = ends[0].statistics().shared_receives
    assert shared is not None
    assert shared.recalls > 0
    assert ends[0].statistics().pool.registered <= 2 << 20
    await close_all([first, second])


async def test_a_recall_of_the_peer_is_answered_when_a_credit_is_free(pair: MakePair) -> None:
    """The client is blocked when it is asked, and has nothing to give; it answers when it can."""
    both = await pair(Config(shared_receives=64))
    sends = [both.client.send(b"%d" % i) for i in range(300)]
    for i in range(300):
        assert await both.server.recv() == b"%d" % i
    await asyncio.gather(*sends)
    assert both.server.statistics().receive_credits == 64
    blocked = [both.client.send(b"more") for _ in range(80)]
    await asyncio.wait(blocked[:1])
    ledger = both.server._receives.ledger
    assert ledger is not None
    while ledger.data_received < ledger.data_told:
        await asyncio.sleep(0)
    assert ledger.recall(10) == 0, "it is known to have none"
    ledger.asked = 10
    assert both.server._session is not None
    both.server._session.send_recall(10)
    for _ in blocked:
        await both.server.recv()
    await asyncio.gather(*blocked)
    while ledger.asked:
        await asyncio.sleep(0)
    assert 54 <= ledger.window < 64
