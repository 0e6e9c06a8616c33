"""Small reads and atomic operations, which go from the call to the device and back in C
(native/datapath/one_sided.c)."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import sys
import weakref
from typing import Any

import pytest

from aiordma import Config
from aiordma._native._datapath import OneSided
from aiordma.errors import (
    ConnectionClosedError,
    ConnectionLostError,
    MisuseError,
    RemoteAccessError,
)
from tests.device.conftest import MakePair, Pair
from tests.device.test_access import forge
from tests.device.test_staging import Hog, nothing_is_lent, staging_of

pytestmark = pytest.mark.device

SIZE = 4096


async def region_of(both: Pair, data: bytes) -> tuple[Any, Any]:
    lease, remote = await both.region(SIZE)
    memoryview(lease)[: len(data)] = data
    return lease, remote


async def test_a_read_is_a_future(pair: MakePair) -> None:
    both = await pair()
    _, remote = await region_of(both, b"what is there")
    loop = asyncio.get_running_loop()
    read: Any = both.client.read(remote[:13])
    assert isinstance(read, OneSided)
    assert asyncio.isfuture(read)
    assert read.get_loop() is loop
    assert repr(read) in ("<read posted>", "<read done>")
    assert await read == b"what is there"
    assert await read == b"what is there", "as often as one likes"
    assert type(read.result()) is bytes
    assert (read.done(), read.cancelled(), read.exception()) == (True, False, None)
    assert not read.cancel()
    assert await both.client.read(remote=remote[5:7]) == b"is"


async def test_what_asyncio_does_with_futures(pair: MakePair) -> None:
    both = await pair()
    data = bytes(range(100))
    _, remote = await region_of(both, data)
    read = both.client.read
    assert b"".join(await asyncio.gather(*[read(remote[i : i + 1]) for i in range(100)])) == data
    done, pending = await asyncio.wait([read(remote[i : i + 1]) for i in range(10)])
    assert not pending
    assert {future.result() for future in done} == {bytes([i]) for i in range(10)}
    assert await asyncio.shield(read(remote[:2])) == data[:2]
    assert await asyncio.wait_for(read(remote[:2]), 10) == data[:2]
    called: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    read(remote[1:3]).add_done_callback(lambda future: called.set_result(future.result()))
    assert await called == data[1:3]


@pytest.mark.parametrize("size", [1, 64, 1000, SIZE])
async def test_sizes(pair: MakePair, size: int) -> None:
    both = await pair()
    data = bytes(number % 251 for number in range(size))
    _, remote = await region_of(both, data)
    read = both.client.read(remote[:size])
    assert isinstance(read, OneSided)
    assert await read == data
    assert nothing_is_lent(both.client)


async def test_reads_and_writes_are_done_in_the_order_they_were_issued(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(8)
    reads = []
    for i in range(200):
        both.client.write(i.to_bytes(8, "big"), remote)
        reads.append(both.client.read(remote))
        if i % 7 == 0:
            await asyncio.sleep(0)
    assert [int.from_bytes(data, "big") for data in await asyncio.gather(*reads)] == list(range(200))
    assert nothing_is_lent(both.client)


async def test_more_than_go_at_a_time(pair: MakePair) -> None:
    """Beyond what goes without a slot they wait in line, with the large ones among them."""
    both = await pair()
    data = bytes(range(256)) * 16
    _, remote = await region_of(both, data)
    large, far = await both.region(1 << 20)
    memoryview(large)[:4] = b"last"
    reads = [both.client.read(remote[i : i + 8]) for i in range(500)]
    assert not all(isinstance(read, OneSided) for read in reads)
    assert (await both.client.read(far))[:4] == b"last"
    assert await asyncio.gather(*reads) == [data[i : i + 8] for i in range(500)]
    assert nothing_is_lent(both.client)


async def test_a_cancelled_read_keeps_its_buffer_until_it_has_come(pair: MakePair) -> None:
    both = await pair()
    _, remote = await region_of(both, b"data")
    free = len(both.client._staging.free)
    reads = [both.client.read(remote[:4]) for _ in range(10)]
    assert all(read.cancel() for read in reads if not read.done())
    assert len(both.client._staging.free) < free
    for read in reads:
        if read.cancelled():
            with pytest.raises(asyncio.CancelledError):
                await read
    assert await both.client.read(remote[:4]) == b"data"
    assert nothing_is_lent(both.client)


async def test_a_task_that_waits_for_a_read_is_cancelled(pair: MakePair) -> None:
    both = await pair()
    _, remote = await region_of(both, b"data")
    for i in range(50):
        reads = [both.client.read(remote[:4]) for _ in range(3)]

        async def wait_for_them(reads: list[asyncio.Future[bytes]] = reads) -> None:
            for read in reads:
                assert await read == b"data"

        task = asyncio.ensure_future(wait_for_them())
        for _ in range(i % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert await both.client.read(remote[:4]) == b"data"
    assert both.client._sends.one_sided == both.client._sends.posted == 0
    assert nothing_is_lent(both.client)


async def test_a_refused_read_tells_everybody(pair: MakePair) -> None:
    """And gives back what was lent to all of them, when the device has none of it any more."""
    both = await pair()
    _, remote = await both.region(64)
    bad = forge(remote, both.client, address=remote.address + 4096)
    read = both.client.read(bad)
    others = [both.client.read(remote) for _ in range(100)]
    with pytest.raises(RemoteAccessError, match="read"):
        await read
    for other in others:
        with pytest.raises(ConnectionLostError):
            await other
    await both.client.wait_closed()
    assert nothing_is_lent(both.client)


async def test_reads_under_way_when_the_connection_ends(pair: MakePair) -> None:
    both, other = await pair(), await pair()
    _, remote = await region_of(both, b"data")
    reads = [both.client.read(remote[:4]) for _ in range(40)]
    both.client.fail(ConnectionLostError("by the test"))
    for end in await asyncio.gather(*reads, return_exceptions=True):
        assert end == b"data" or isinstance(end, ConnectionLostError | ConnectionClosedError)
    await asyncio.gather(both.client.wait_closed(), both.server.wait_closed())
    assert nothing_is_lent(other.client)


async def test_reads_that_never_complete(pair: MakePair) -> None:
    """A queue pair that is destroyed before the device has handed them back: it has their buffers no more."""
    both = await pair()
    _, remote = await both.region(64)
    reads = [both.client.read(remote) for _ in range(10)]
    assert both.client._sends.posted
    assert not nothing_is_lent(both.client)
    both.client._sends.forget()
    assert nothing_is_lent(both.client)
    assert all(read.cancel() for read in reads)


async def test_reads_that_are_refused_before_anything_is_sent(pair: MakePair) -> None:
    both, other = await pair(), await pair()
    _, remote = await both.region(64, access="write")
    with pytest.raises(MisuseError, match="read"):
        both.client.read(remote)
    with pytest.raises(MisuseError, match="another connection"):
        other.client.read(remote)
    await both.server.unshare(remote.name)
    while not remote.grant.revoked:
        await asyncio.sleep(0)
    with pytest.raises(MisuseError, match="revoked"):
        both.client.read(remote)
    with pytest.raises((TypeError, AttributeError)):
        both.client.read("no region")  # type: ignore[arg-type]
    assert both.client.statistics().requests_posted == 0
    assert nothing_is_lent(both.client)


async def test_without_a_staging_buffer_reads_wait(pair: MakePair) -> None:
    both = await pair(Config(pool_limit=8 << 20))
    _, remote = await region_of(both, b"0123456789")
    hog = Hog(staging_of(both))
    reads = [both.client.read(remote[i : i + 1]) for i in range(10)]
    assert not any(read.done() for read in reads)
    assert both.client.statistics().waiting_for_slot == 10
    hog.give(1)
    assert await asyncio.gather(*reads) == [b"%d" % i for i in range(10)]
    hog.give(len(hog.held))


async def test_a_read_that_nobody_awaits_is_forgotten_when_it_is_done(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    read = both.client.read(remote)
    gone = weakref.ref(read)
    del read
    await both.client.read(remote)
    gc.collect()
    assert gone() is None
    assert nothing_is_lent(both.client)


# --- atomic operations --------------------------------------------------------------------------------


async def test_atomic_operations_are_futures(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(16)
    word = remote[8:]
    add, swap = both.client.fetch_add(word, 5), both.client.compare_swap(word, 5, 1 << 63)
    assert isinstance(add, OneSided)
    assert isinstance(swap, OneSided)
    assert (await add, await swap) == (0, 5)
    assert (add.result(), swap.exception()) == (0, None)
    assert await both.client.fetch_add(remote=word, value=-1) == 1 << 63
    assert await both.client.compare_swap(word, 0, 7) == (1 << 63) - 1, "not replaced"
    assert int.from_bytes(bytes(lease)[8:], sys.byteorder) == (1 << 63) - 1
    assert nothing_is_lent(both.client)


@pytest.mark.parametrize("value", [0, 1, -1, -(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
async def test_words(pair: MakePair, value: int) -> None:
    both = await pair()
    _, word = await both.region(8)
    assert await both.client.fetch_add(word, value) == 0
    assert await both.client.compare_swap(word, value, 1) == value % (1 << 64)
    assert await both.client.fetch_add(word, 0) == 1


async def test_what_is_no_word_is_refused(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(16)
    for value in (-(1 << 63) - 1, 1 << 64):
        with pytest.raises(MisuseError, match="value"):
            both.client.fetch_add(remote[:8], value)
        with pytest.raises(MisuseError, match="desired"):
            both.client.compare_swap(remote[:8], 0, value)
    with pytest.raises(TypeError):
        both.client.fetch_add(remote[:8], "1")  # type: ignore[arg-type]
    for place in (remote[4:12], remote[:4], remote):
        with pytest.raises(MisuseError, match="8 bytes"):
            both.client.fetch_add(place, 1)
    assert both.client.statistics().requests_posted == 0


async def test_many_at_once_count_each(pair: MakePair) -> None:
    both = await pair()
    _, word = await both.region(8)
    adds = [both.client.fetch_add(word, 1) for _ in range(300)]
    assert adds[5].cancel() or adds[5].done(), "it adds all the same"
    ends = await asyncio.gather(*adds, return_exceptions=True)
    assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == [
        number for number in range(300) if not adds[number].cancelled()
    ]
    assert await both.client.fetch_add(word, 0) == 300
    assert nothing_is_lent(both.client)


async def test_on_a_device_without_atomic_operations(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await pair()
    attributes = first.client._adapter.attributes
    monkeypatch.setattr(first.client._adapter, "attributes", dataclasses.replace(attributes, atomics=False))
    both = await pair()
    _, word = await both.region(8)
    with pytest.raises(MisuseError, match="no atomic operations"):
        both.client.fetch_add(word, 1)
    assert await both.client.read(word) == bytes(8)
