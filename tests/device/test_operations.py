"""Every operation, at every size that matters, in every mode: the right data."""

from __future__ import annotations

import asyncio
import hashlib
import mmap

import numpy as np
import pytest

from aiordma import Config
from aiordma.errors import MessageTooLargeError, MisuseError, RemoteBoundsError
from tests.device.conftest import MakePair

pytestmark = pytest.mark.device

MIB = 1 << 20
EAGER = Config().eager_size
MODES = ["event", "busy", "adaptive"]
# 0, 1, around the MTU of rxe (1024) and the largest (4096), the staging limit, and large.
SIZES = [0, 1, 63, 64, 1023, 1024, 1025, 4095, 4096, 4097, EAGER + 16, EAGER + 17, MIB, 16 * MIB]


def pattern(nbytes: int, seed: int = 1) -> bytes:
    block = hashlib.sha256(seed.to_bytes(4, "big")).digest()
    return (block * (nbytes // len(block) + 1))[:nbytes]


@pytest.mark.parametrize("nbytes", SIZES)
async def test_write_and_read_move_the_bytes(pair: MakePair, nbytes: int) -> None:
    both = await pair()
    lease, remote = await both.region(max(nbytes, 1) + 64)
    data = pattern(nbytes)
    await both.client.write(data, remote[:nbytes])
    view = memoryview(lease)
    assert view[:nbytes] == data
    assert bytes(view[nbytes:]) == bytes(len(view) - nbytes), "nothing behind it was touched"
    view.release()
    assert await both.client.read(remote[:nbytes]) == data
    buffer = bytearray(nbytes + 8)
    assert await both.client.read_into(remote[:nbytes], buffer) == nbytes
    assert buffer == data + bytes(8)


@pytest.mark.parametrize("mode", MODES)
async def test_each_mode(pair: MakePair, mode: str) -> None:
    both = await pair(Config(mode=mode))  # type: ignore[arg-type]
    lease, remote = await both.region(4096)
    for round_trip in range(20):
        data = pattern(100, round_trip)
        await both.client.write(data, remote[:100])
        assert await both.client.read(remote[:100]) == data
        await both.client.send(data)
        assert await both.server.recv() == data
        await both.server.send(data[::-1])
        assert await both.client.recv() == data[::-1]
    assert both.client.statistics().reactor.mode == mode
    assert await both.client.fetch_add(remote[104:112], 3) == 0
    del lease


@pytest.mark.parametrize("nbytes", [0, 1, 200, 204, 205, 1023, 1024, 1025, EAGER - 1, EAGER])
async def test_messages_of_every_size(pair: MakePair, nbytes: int) -> None:
    both = await pair()
    data = pattern(nbytes)
    await both.client.send(data)
    assert await both.server.recv() == data
    await both.server.send(memoryview(bytearray(data)))
    buffer = bytearray(EAGER)
    assert await both.client.recv_into(buffer) == nbytes
    assert buffer[:nbytes] == data


async def test_a_message_beyond_what_the_peer_takes_is_refused_and_harms_nothing(pair: MakePair) -> None:
    both = await pair(Config(eager_size=1000), Config(eager_size=500, max_message_size=10_000))
    assert both.client.eager_size == both.server.eager_size == 500
    with pytest.raises(MessageTooLargeError) as caught:
        await both.client.send(bytes(10_001))
    assert (caught.value.nbytes, caught.value.limit) == (10_001, 10_000)
    await both.client.send(bytes(500))
    assert await both.server.recv() == bytes(500)


async def test_order_of_messages_writes_and_notifications(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(8)
    operations: list[asyncio.Future[None]] = []
    for i in range(300):
        operations.append(both.client.write(i.to_bytes(8, "little"), remote, notify=i))
        operations.append(both.client.send(b"%d" % i))
    for i in range(300):
        assert await both.server.notified() == i
        assert await both.server.recv() == b"%d" % i
    await asyncio.gather(*operations)
    assert await both.client.read(remote) == (299).to_bytes(8, "little")


async def test_the_data_is_there_when_the_notification_is(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(MIB)
    data = pattern(MIB)
    operation = both.client.write(data, remote, notify=0xFFFFFFFF)
    assert await both.server.notified() == 0xFFFFFFFF
    with memoryview(lease) as view:
        assert view == data
    await operation
    await both.client.write(b"", remote, notify=0)
    assert await both.server.notified() == 0


async def test_atomics(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    counter = remote[8:16]
    assert await both.client.fetch_add(counter, 5) == 0
    assert await both.client.fetch_add(counter, -1) == 5
    assert await both.client.compare_swap(counter, 4, (1 << 64) - 1) == 4
    assert await both.client.compare_swap(counter, 4, 1) == (1 << 64) - 1, "not swapped"
    assert await both.client.fetch_add(counter, 1) == (1 << 64) - 1
    assert await both.client.read(counter) == bytes(8), "modulo 2**64"
    await asyncio.gather(*[both.client.fetch_add(counter, 1) for _ in range(100)])
    assert int.from_bytes(await both.client.read(counter), "little") == 100


async def test_batch(pair: MakePair) -> None:
    both = await pair(Config(send_depth=16))
    _, remote = await both.region(4096)
    async with both.client.batch() as batch:
        for i in range(100):
            batch.write(bytes([i]), remote[i : i + 1])
        old = batch.fetch_add(remote[1024:1032], 9)
        batch.write(pattern(2000), remote[2000:4000], notify=5)
        read = batch.read(remote[:100])
    assert await read == bytes(range(100))
    assert await old == 0
    assert await both.server.notified() == 5
    assert await both.client.read(remote[2000:4000]) == pattern(2000)


async def test_a_batch_whose_body_raises_posts_nothing(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(8)
    with pytest.raises(ZeroDivisionError):
        async with both.client.batch() as batch:
            batch.write(b"12345678", remote)
            _ = 1 // 0
    assert await both.client.read(remote) == bytes(8)


async def test_every_kind_of_buffer(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(2 * MIB)
    size = 512 * 1024
    array = np.arange(size // 8, dtype=np.int64).reshape(64, -1)
    plain = array.tobytes()
    mapped = mmap.mmap(-1, size)
    async with both.client.allocate(size) as own:
        mapped[:] = plain
        memoryview(own)[:] = plain
        for source in (
            plain,
            bytearray(plain),
            memoryview(plain),
            array,
            mapped,
            own,
            np.frombuffer(memoryview(own), np.uint8),
        ):
            await both.client.write(bytes(64), remote[:64])
            await both.client.write(source, remote[:size])
            assert await both.client.read(remote[:size]) == plain, type(source)
        target = np.zeros_like(array)
        assert await both.client.read_into(remote[:size], target) == size
        assert (target == array).all()
        assert await both.client.read_into(remote[:size], mapped) == size
    mapped.close()  # not held by anything any more
    resized = bytearray(plain)
    await both.client.write(resized, remote[:size])
    resized.extend(b"a buffer is free again after its operation")
    with memoryview(lease) as view:
        assert view[:size] == plain


async def test_misuse_is_refused_before_anything_is_sent(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64, access="read")
    other = await pair()
    _, foreign = await other.region(64)
    client = both.client
    for call in (
        lambda: client.write(b"x", remote),  # not shared for writing
        lambda: client.fetch_add(remote[:8], 1),
        lambda: client.read(foreign),
        lambda: client.send(3),
        lambda: client.send("text"),
        lambda: client.send(np.zeros((8, 8))[:, 0]),
        lambda: client.read_into(remote, bytearray(63)),
        lambda: client.read_into(remote, bytes(64)),
        lambda: remote[::2],
    ):
        with pytest.raises(MisuseError):
            call()
    for call in (lambda: remote[:65], lambda: remote[65:], lambda: remote[-65:], lambda: remote[9:3]):
        with pytest.raises(RemoteBoundsError):
            call()
    _, writable = await both.region(64)
    for call in (
        lambda: client.fetch_add(writable[4:12], 1),
        lambda: client.fetch_add(writable[:16], 1),
        lambda: client.fetch_add(writable[:8], 1 << 64),
        lambda: client.write(b"", writable, notify=1 << 32),
        lambda: client.write(b"", writable, notify=-1),
        lambda: client.write(bytes(65), writable),
    ):
        with pytest.raises(MisuseError):
            call()
    assert await client.read(remote) == bytes(64), "the connection is as it was"


async def test_receivers_take_turns_and_iteration_ends(pair: MakePair) -> None:
    both = await pair()
    receivers = [asyncio.ensure_future(both.server.recv()) for _ in range(5)]
    await asyncio.sleep(0)
    for i in range(5):
        await both.client.send(b"%d" % i)
    assert await asyncio.gather(*receivers) == [b"%d" % i for i in range(5)]
    count = both.client.statistics().send_credits  # what can be sent to a server that does not read
    for i in range(count):
        await both.client.send(b"%d" % i)
    both.client.close()
    assert [message async for message in both.server] == [b"%d" % i for i in range(count)]


async def test_recv_into_a_small_buffer_loses_nothing(pair: MakePair) -> None:
    both = await pair()
    await both.client.send(b"12345678")
    with pytest.raises(MisuseError, match="8 bytes"):
        await both.server.recv_into(bytearray(7))
    assert await both.server.recv() == b"12345678"


async def test_a_registered_buffer_is_used_in_place(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(MIB)
    buffer = bytearray(pattern(MIB))
    with both.client.register(buffer):
        before = both.client.statistics().pool.cache_misses
        for _ in range(3):
            await both.client.write(buffer, remote)
        assert both.client.statistics().pool.cache_misses == before
        with pytest.raises(BufferError):
            buffer.append(0)
    buffer.append(0)


async def test_registrations_of_arrays_are_kept_and_die_with_them(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(MIB)
    array = np.ones(MIB, dtype=np.uint8)
    for _ in range(3):
        await both.client.write(array, remote)
    stats = both.client.statistics().pool
    assert (stats.cache_misses, stats.cache_hits, stats.cached) == (1, 2, MIB)
    del array
    assert both.client.statistics().pool.cached == 0
