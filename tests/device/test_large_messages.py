"""Messages above eager_size: whole, in order, without a copy, and with nothing left pinned, however they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy
import pytest

from aiordma import Config, Connection, Server
from aiordma.errors import ConnectionLostError, MemoryLimitError, MisuseError, ProtocolError, RdmaError
from aiordma.protocol.frames import FrameKind
from aiordma.protocol.rendezvous import Answer, Segment, encode_done, encode_offer
from aiordma.send_queue import SEND, Operation
from aiordma.testing import Pair
from tests.conftest import device_under_test
from tests.device.conftest import MakePair
from tests.device.large_peer import digest
from tests.device.test_failures import Listen, process_peer

pytestmark = pytest.mark.device

KIB, MIB = 1 << 10, 1 << 20
EAGER = Config().eager_size
SOAK = bool(os.environ.get("AIORDMA_SOAK"))  # then a GiB


def pattern(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


async def until(condition: Callable[[], bool], connection: Connection) -> None:
    """Lets the loop turn until it is so; what is awaited comes from the peer's side of the same loop."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)
            assert not connection.is_closing()


async def nothing_left(both: Pair) -> None:
    """Neither side holds anything of a large message."""
    for connection in both:
        sends = connection._large_sends
        await until(lambda sends=sends: not len(sends), connection)  # type: ignore[misc]
        await until(lambda c=connection: not c.statistics().pool.pinned, connection)  # type: ignore[misc]
        assert not len(connection._large_receives._ledger)


# --- whole and in order ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nbytes", [EAGER - 1, EAGER, EAGER + 1, 64 * KIB, MIB - 1, MIB, MIB + 1, 2 * MIB + 12345, 16 * MIB]
)
async def test_both_ways_at_once(pair: MakePair, nbytes: int) -> None:
    both = await pair()
    there, back = pattern(nbytes, 1), pattern(nbytes, 2)
    sends = [both.client.send(there), both.server.send(back)]
    assert await both.server.recv() == there
    buffer = bytearray(nbytes + 1)
    assert await both.client.recv_into(buffer) == nbytes
    assert buffer[:nbytes] == back
    await asyncio.gather(*sends)
    await nothing_left(both)


@pytest.mark.parametrize("mode", ["event", "busy", "adaptive"])
async def test_large_and_small_ones_keep_their_order(pair: MakePair, mode: Any) -> None:
    both = await pair(Config(mode=mode, receive_credits=8, rendezvous_depth=2))
    rng = random.Random(3)
    messages = [pattern(rng.choice([0, 10, EAGER, EAGER + 1, 50_000, 300_000]), i) for i in range(60)]
    sends: list[asyncio.Future[None]] = [both.client.send(message) for message in messages]
    for message in messages:
        assert await both.server.recv() == message
    await asyncio.gather(*sends)
    await nothing_left(both)


async def test_a_hundred_at_a_time(pair: MakePair) -> None:
    both = await pair()
    messages = [pattern(100_000 + i, i) for i in range(100)]

    async def exchange(source: Connection, sink: Connection) -> None:
        sends = [asyncio.ensure_future(source.send(message)) for message in messages]
        received = await asyncio.gather(*[sink.recv() for _ in messages])
        assert received == messages, "receivers are served in turn"
        await asyncio.gather(*sends)

    await asyncio.gather(exchange(both.client, both.server), exchange(both.server, both.client))
    await nothing_left(both)


async def test_a_mixture_with_writes_reads_and_notifications(pair: MakePair) -> None:
    both = await pair(Config(read_depth=2))
    _, remote = await both.region(MIB)
    data = pattern(MIB)
    others: list[asyncio.Future[Any]] = []
    for i in range(10):
        others += [
            both.client.send(data),
            both.client.write(data, remote, notify=i),
            both.client.read(remote),
        ]
    for i in range(10):
        assert await both.server.recv() == data
        assert await both.server.notified() == i
    await asyncio.gather(*others)
    await nothing_left(both)


# --- parts and arrays --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [[], [0], [5], [1, 0, 2], [100, EAGER - 100], [16, 100_000], [100_000, 16, 3], [9000] * 20]
)
async def test_parts_arrive_as_one_message(pair: MakePair, sizes: list[int]) -> None:
    both = await pair()
    parts = [pattern(size, i) for i, size in enumerate(sizes)]
    for given in (parts, tuple(map(bytearray, parts))):
        send = both.client.send(given)
        assert await both.server.recv() == b"".join(parts)
        await send
    await nothing_left(both)


async def test_too_many_parts_say_how_many_there_may_be(pair: MakePair) -> None:
    both = await pair(Config(eager_size=64))
    with pytest.raises(MisuseError, match=r"3 parts: .* at most 2"):
        both.client.send([bytes(30), bytes(30), bytes(30)])
    with pytest.raises(MisuseError, match="not str"):
        both.client.send([b"bytes", "text"])
    await nothing_left(both)


class OnlyDlpack:
    """An array of a library whose arrays have no buffer protocol."""

    def __init__(self, array: numpy.ndarray[Any, Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("count", [0, 3, 100_000])
async def test_arrays_go_in_and_out(pair: MakePair, count: int) -> None:
    both = await pair()
    array = numpy.arange(count, dtype="f8").reshape(1, count)
    for source in (array, OnlyDlpack(array)):
        landing = numpy.empty_like(array)
        target = landing if source is array else OnlyDlpack(landing)
        send = both.client.send(source)
        assert await both.server.recv_into(target) == array.nbytes
        await send
        assert (landing == array).all()
    dates = numpy.array(["2026-11-24"] * count, "M8[s]")  # a type that memoryview does not know
    send = both.client.send(dates)
    assert await both.server.recv() == dates.tobytes()
    await send


async def test_arrays_that_cannot_go_say_why(pair: MakePair) -> None:
    both = await pair()
    array = numpy.zeros((10, 10))
    for wrong, why in (
        (array[:, :5], "contiguous"),
        (OnlyDlpack(array[::2]), "contiguous"),
        ("text", "not str"),
    ):
        with pytest.raises(MisuseError, match=why):
            both.client.send(wrong)
    frozen = numpy.zeros(10)
    frozen.flags.writeable = False
    with pytest.raises(MisuseError, match="writable"):
        await both.client.recv_into(frozen)
    await both.client.send(array)
    assert await both.server.recv() == array.tobytes()


async def test_the_same_array_is_registered_once(pair: MakePair) -> None:
    both = await pair()
    array, landing = numpy.ones(50_000), numpy.empty(50_000)
    for _ in range(5):
        send = both.client.send(array)
        await both.server.recv_into(landing)
        await send
    pool = both.client.statistics().pool
    assert (pool.cache_misses, pool.cache_hits) == (2, 8), "one registration on each side, one pool for both"
    await nothing_left(both)


# --- leases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, EAGER, EAGER + 1, 500_000])
async def test_a_message_is_lent_where_it_arrived(pair: MakePair, nbytes: int) -> None:
    both = await pair()
    data = pattern(nbytes)
    before = both.client.statistics().pool.leased
    send = both.client.send(data)
    with await both.server.recv_lease() as lease:
        assert len(lease) == lease.nbytes == nbytes
        assert bytes(lease) == data
        copy = numpy.asarray(memoryview(lease)).copy() if nbytes else None
    assert copy is None or copy.tobytes() == data
    await send
    assert lease.released
    with pytest.raises(BufferError):
        memoryview(lease)
    assert both.client.statistics().pool.leased == before
    await nothing_left(both)


async def test_the_credit_goes_back_with_the_lease(pair: MakePair) -> None:
    both = await pair(Config(receive_credits=2))
    for i in range(2):
        await both.client.send(b"%d" % i)
    leases = [await both.server.recv_lease() for _ in range(2)]
    third = asyncio.ensure_future(both.client.send(b"2"))
    await both.server.send(b"something that carries what is owed")
    await both.client.recv()
    assert not third.done(), "both receives are lent out"
    view = memoryview(leases[0])
    leases[0].release()
    leases[0].release()
    await both.server.send(b"nothing is owed: a view is alive")
    await both.client.recv()
    assert not third.done()
    assert bytes(view) == b"0"
    view.release()
    await third
    assert await both.server.recv() == b"2"
    leases[1].release()


async def test_a_lease_outlives_its_connection(pair: MakePair) -> None:
    both = await pair()
    await both.client.send(b"small")
    small = await both.server.recv_lease()
    send = both.client.send(bytes(100_000))
    large = await both.server.recv_lease()
    await send
    await both.client.send(b"was there before the end")
    await both.server.send(b"")
    await both.client.recv()
    both.client.close()
    await both.client.wait_closed()
    late = await both.server.recv_lease()
    assert bytes(late) == b"was there before the end"
    both.server.close()
    await both.server.wait_closed()
    assert bytes(small) == b"small"
    assert bytes(large) == bytes(100_000)
    for lease in (small, large, late):
        lease.release()


async def test_a_lease_larger_than_the_pool_is_refused_and_the_message_stays(pair: MakePair) -> None:
    both = await pair(Config(pool_limit=2 * MIB, slab_size=MIB // 2))
    data = pattern(4 * MIB)
    send = both.client.send(data)
    with pytest.raises(MemoryLimitError):
        await both.server.recv_lease()
    assert await both.server.recv() == data
    await send


async def test_a_buffer_that_is_too_small_leaves_the_message(pair: MakePair) -> None:
    both = await pair()
    data = pattern(50_000)
    send = both.client.send(data)
    with pytest.raises(MisuseError, match="50000 bytes, the buffer 49999"):
        await both.server.recv_into(bytearray(49_999))
    assert await both.server.recv() == data
    await send


# --- cancelled, withdrawn, killed --------------------------------------------------------------------


async def test_a_message_that_nobody_takes_is_withdrawn(pair: MakePair) -> None:
    both = await pair(Config(rendezvous_depth=2, receive_credits=4))
    for round_ in range(20):
        sends = [both.client.send(bytearray(100_000)) for _ in range(5)]
        for _ in range(round_ % 7):
            await asyncio.sleep(0)
        for send in sends:
            send.cancel()
        await nothing_left(both)
    await both.client.send(b"and nothing is in the way")
    assert await both.server.recv() == b"and nothing is in the way"


async def test_a_cancelled_receiver_loses_no_large_message(pair: MakePair) -> None:
    both = await pair()
    data = pattern(3 * MIB)
    for turns in range(30):
        send = both.client.send(data)
        receiver = asyncio.ensure_future(both.server.recv())
        for _ in range(turns):
            await asyncio.sleep(0)
        receiver.cancel()
        try:
            message = await receiver
        except asyncio.CancelledError:
            message = await both.server.recv()
        assert message == data
        await send
    await nothing_left(both)


@pytest.mark.parametrize("seed", range(10))
async def test_cancelled_at_every_step(pair: MakePair, seed: int) -> None:
    """A schedule drawn from the seed: what is not cancelled arrives whole, once and in order; nothing stays."""
    rng = random.Random(seed)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    both = await pair(Config(rendezvous_depth=rng.choice([1, 3, 8]), receive_credits=rng.choice([2, 8])))
    received: list[bytes] = []
    messages = [i.to_bytes(4, "big") + pattern(rng.choice([0, 5000, 80_000, 2 * MIB]), i) for i in range(40)]
    sends = [(message, both.client.send(message)) for message in messages]

    async def receive_all() -> None:
        while True:
            receiver = asyncio.ensure_future(some_receive(both.server, rng))
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            if rng.random() < 0.4:
                receiver.cancel()
            try:
                await asyncio.wait([receiver])
            finally:  # when the sink itself is cancelled
                receiver.cancel()
            if not receiver.cancelled():
                received.append(receiver.result())

    sink = asyncio.ensure_future(receive_all())
    kept = set(messages)
    for message, send in rng.sample(sends, len(sends)):
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        if rng.random() < 0.5 and send.cancel():
            kept.discard(message)
    await asyncio.wait([send for _, send in sends])
    await until(lambda: kept <= set(received), both.client)
    sink.cancel()
    await asyncio.wait([sink])
    assert len(set(received)) == len(received)
    assert received == [message for message in messages if message in set(received)]
    await nothing_left(both)
    assert not problems


async def some_receive(connection: Connection, rng: random.Random) -> bytes:
    """Any of the ways to receive."""
    way = rng.randrange(3)
    if way == 0:
        return await connection.recv()
    if way == 1:
        with await connection.recv_lease() as lease:
            return bytes(lease)
    buffer = bytearray(3 * MIB)
    length = await connection.recv_into(buffer)
    return bytes(buffer[:length])


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_the_connection_closes_in_the_middle(pair: MakePair, turns: int, who: str) -> None:
    other, both = await pair(), await pair()
    sends = [asyncio.ensure_future(both.client.send(bytes(2 * MIB))) for _ in range(4)]
    receives = [asyncio.ensure_future(both.server.recv()) for _ in range(4)]
    for _ in range(turns):
        await asyncio.sleep(0)
    getattr(both, who).close()
    for result in await asyncio.gather(*sends, *receives, return_exceptions=True):
        assert result is None or isinstance(result, bytes | ConnectionLostError), result
    await both.client.wait_closed()
    both.server.close()
    await both.server.wait_closed()
    await other.client.send(b"others go on")
    assert await other.server.recv() == b"others go on"
    pool = other.client.statistics().pool
    assert (pool.pinned, pool.waiting) == (0, 0)


@pytest.mark.parametrize("turns", [0, 2, 5, 15])
async def test_the_peer_is_killed_in_the_middle(listen: Listen, pair: MakePair, turns: int) -> None:
    """It never receives, so offers wait for it."""
    other = await pair()
    server, acceptor = await listen()
    async with process_peer(server) as process:
        connection = await acceptor.accepted.get()
        sends = [asyncio.ensure_future(connection.send(bytes(MIB))) for _ in range(12)]
        for _ in range(turns):
            await asyncio.sleep(0)
        process.kill()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*sends, return_exceptions=True)
    assert all(isinstance(result, ConnectionLostError) for result in results), results
    await connection.wait_closed()
    assert other.client.statistics().pool.pinned == 0
    send = other.client.send(pattern(MIB))
    assert await other.server.recv() == pattern(MIB)
    await send


@pytest.mark.parametrize("seed", range(6))
async def test_the_peer_is_killed_while_both_read(listen: Listen, pair: MakePair, seed: int) -> None:
    other = await pair()
    server, acceptor = await listen()
    async with large_peer(server, "loop", 3 * MIB) as process:
        connection = await acceptor.accepted.get()
        data = pattern(3 * MIB)
        sends = [connection.send(data) for _ in range(20)]
        receives = [asyncio.ensure_future(some_receive(connection, random.Random(i))) for i in range(20)]
        await receives[0]
        for _ in range(random.Random(seed).randrange(200)):
            await asyncio.sleep(0)
        process.kill()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*sends, *receives, return_exceptions=True)
    assert all(result is None or isinstance(result, bytes | ConnectionLostError) for result in results)
    await connection.wait_closed()
    assert other.client.statistics().pool.pinned == 0
    send = other.client.send(data)
    assert await other.server.recv() == data
    await send


@contextlib.asynccontextmanager
async def large_peer(server: Server, what: str, nbytes: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """tests/device/large_peer.py as a client of ``server``."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-W", "error", "-m", "tests.device.large_peer", "127.0.0.1"],
        *[str(server.port), what, str(nbytes)],
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


# --- a peer that breaks the rules --------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["answer to nothing", "answer twice", "withdrawn without cause", "impossible offer", "too large"]
)
async def test_a_peer_that_breaks_the_rules_loses_its_connection_only(pair: MakePair, what: str) -> None:
    other, both = await pair(), await pair(Config(max_message_size=MIB))
    send = asyncio.ensure_future(both.server.send(bytes(100_000)))
    await until(lambda: both.client.statistics().messages_queued == 1, both.client)
    transfer = both.client._receives.messages.items()[0].offer.transfer  # type: ignore[union-attr]
    answers = {
        "answer to nothing": [(transfer + 1, Answer.READ)],
        "answer twice": [(transfer, Answer.READ)] * 2,
        "withdrawn without cause": [(transfer, Answer.WITHDRAWN)],
    }
    for answer in answers.get(what, []):
        both.client._sends.answer(encode_done(*answer))
    if what == "impossible offer":
        forge_offer(both.client, bytes(40))
    if what == "too large":
        forge_offer(both.client, encode_offer(1, [Segment(2 * MIB, 4096, 5)]))
    with pytest.raises(ConnectionLostError) as caught:
        while True:
            await both.server.recv()
    assert isinstance(caught.value.__cause__, ProtocolError)
    with contextlib.suppress(RdmaError):
        await send
    both.client.close()
    await both.client.wait_closed()
    await both.server.wait_closed()
    assert other.client.statistics().pool.pinned == 0
    await other.client.send(b"others go on")
    assert await other.server.recv() == b"others go on"


def forge_offer(connection: Connection, payload: bytes) -> None:
    operation = Operation(connection._sends, "send", SEND, len(payload))
    operation.frame = int(FrameKind.OFFER)
    operation.credit = True
    operation.data = payload
    connection._sends.submit(operation)


async def test_what_was_offered_cannot_be_read_afterwards(pair: MakePair) -> None:
    """The key of an offer opens nothing once its message has arrived."""
    both = await pair()
    send = both.client.send(bytes(100_000))
    await until(lambda: both.server.statistics().messages_queued == 1, both.server)
    offer = both.server._receives.messages.items()[0].offer  # type: ignore[union-attr]
    await both.server.recv()
    await send
    both.server.peer_shared(
        "stolen", offer.segments[0].address, offer.segments[0].length, offer.segments[0].rkey, ["read"]
    )
    with pytest.raises(ConnectionLostError):
        await both.server.read(await both.server.remote("stolen"))


# --- memory ------------------------------------------------------------------------------------------


async def test_very_large_ones_both_ways_at_once(listen: Listen) -> None:
    """With a process that receives into a buffer: its peak is the buffer, what it sends, and a bounded pool."""
    nbytes = 1 << 30 if SOAK else 256 * MIB if device_under_test().is_usroce else 32 * MIB
    server, acceptor = await listen()
    async with large_peer(server, "once", nbytes) as process:
        connection = await asyncio.wait_for(acceptor.accepted.get(), 60)
        data = numpy.random.default_rng(1).integers(0, 256, nbytes, "u1")
        landing = numpy.empty(nbytes, "u1")
        received, _ = await asyncio.gather(connection.recv_into(landing), connection.send(data))
        printed, _ = await process.communicate()
    report = json.loads(printed)
    assert received == nbytes
    assert report["received"] == digest(data)
    assert report["sent"] == digest(landing)
    assert report["peak"] < 2 * nbytes + 64 * MIB
