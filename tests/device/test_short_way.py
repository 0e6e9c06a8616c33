"""Small messages and small writes, which go from the call to the device in C (native/datapath)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import aiordma
from aiordma import Config, Connection, RemoteRegion
from aiordma._native._datapath import OneSided
from aiordma.errors import ConnectionClosedError, ConnectionLostError, MisuseError, RemoteAccessError
from aiordma.protocol.frames import HEADER_SIZE
from tests.device.conftest import MakePair
from tests.device.test_access import forge
from tests.device.test_staging import Hog, nothing_is_lent

pytestmark = pytest.mark.device


#: A window of its own: so many messages need no receiver.
OWN_WINDOW = Config(shared_receives=0)


def small(connection: Connection) -> int:
    """The largest message that travels inline."""
    return connection._qp.max_inline - HEADER_SIZE


# --- messages -----------------------------------------------------------------------------------------


async def test_messages_of_both_ways_keep_their_order(pair: MakePair) -> None:
    both = await pair()
    limit = small(both.client)
    sizes = [0, 1, limit - 1, limit, limit + 1, 3000, 7, both.client.eager_size, 5] * 20
    messages = [bytes([i % 251]) * size for i, size in enumerate(sizes)]

    async def send() -> None:
        for message in messages:
            await both.client.send(message)

    sender = asyncio.ensure_future(send())
    for message in messages:
        assert await both.server.recv() == message
    await sender


async def test_a_turn_shares_a_doorbell_and_nothing_waits_for_its_end(pair: MakePair) -> None:
    """The first message leaves at once; the others leave when somebody polls, at the latest when the turn ends."""
    both = await pair(OWN_WINDOW)
    sends = both.client._sends
    await asyncio.sleep(0)
    for i in range(10):
        assert both.client.send(b"%d" % i).done()
        assert sends.queued == i
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sends.queued == 0
    assert [await both.server.recv() for _ in range(10)] == [b"%d" % i for i in range(10)]


async def test_a_write_that_finds_nothing_under_way_waits_for_no_other(pair: MakePair) -> None:
    """Though another one went out in this turn of the loop, which is done."""
    both = await pair()
    _, remote = await both.region(64)
    sends = both.client._sends
    for i in range(40):
        await both.client.write(b"1", remote[i:])
        alone = both.client.write(b"2", remote[i:])
        assert sends.queued == 0
        shares = both.client.write(b"3", remote[i:])
        assert sends.queued == 1
        await asyncio.gather(alone, shares)


async def test_a_peer_whose_buffers_are_smaller_than_our_inline_data(pair: MakePair) -> None:
    both = await pair(Config(inline_size=220), Config(eager_size=64))
    for size in (64, 65, 200, 300):
        sending = asyncio.ensure_future(both.client.send(bytes([size % 251]) * size))
        assert await both.server.recv() == bytes([size % 251]) * size
        await sending


async def test_messages_in_staging_buffers(pair: MakePair) -> None:
    """They need no slot, several share a doorbell, and when they are confirmed no buffer is lent any more."""
    both = await pair(OWN_WINDOW)
    sends, staging = both.client._sends, both.client._staging
    free = len(staging.free)
    sizes = [small(both.client) + 1, both.client.eager_size, 5, 1000]
    messages = [bytes([i]) * size for i, size in enumerate(sizes * 5)]
    await asyncio.sleep(0)
    assert all(both.client.send(message).done() for message in messages)
    assert sends.in_flight == 0  # slots
    assert 0 < sends.queued < len(messages)
    assert [await both.server.recv() for _ in messages] == messages
    await both.client.flush()
    assert staging.registered
    assert len(staging.free) >= free
    assert nothing_is_lent(both.client)


async def test_messages_of_one_doorbell_each(pair: MakePair) -> None:
    """More of them than there are groups: each ends one, and the next wait for their completions."""
    both = await pair(OWN_WINDOW)
    for _ in range(3):
        for i in range(30):
            await both.client.send(bytes([i]) * 500)
            both.client._sends.flush()
        assert [await both.server.recv() for _ in range(30)] == [bytes([i]) * 500 for i in range(30)]


async def test_no_staging_buffer_is_lost_with_a_connection(pair: MakePair) -> None:
    both = await pair(OWN_WINDOW)
    for i in range(20):
        await both.client.send(bytes([i]) * 1000)
    both.client.fail(ConnectionLostError("by the test"))
    await asyncio.gather(both.client.wait_closed(), both.server.wait_closed())
    assert nothing_is_lent(both.client)


async def test_what_is_sent_may_change_at_once(pair: MakePair) -> None:
    both = await pair()
    data = bytearray(b"first")
    await both.client.send(data)
    await both.client.send(memoryview(data)[1:3])
    data[:] = b"later"
    assert [await both.server.recv(), await both.server.recv()] == [b"first", b"ir"]


async def test_writes_and_messages_arrive_in_the_order_they_were_issued(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    for i in range(200):
        both.client.write(i.to_bytes(8, "big"), remote)
        both.client.send(b"written")
        assert await both.server.recv() == b"written"
        assert int.from_bytes(bytes(lease)[:8], "big") >= i


async def test_more_messages_than_go_without_a_slot(pair: MakePair) -> None:
    both = await pair(Config(receive_credits=1000, shared_receives=0))
    sends = [both.client.send(b"%d" % i) for i in range(1000)]
    for i in range(1000):
        assert await both.server.recv() == b"%d" % i
    await asyncio.gather(*sends)


async def test_consume_has_every_message_in_order_and_can_be_held(pair: MakePair) -> None:
    both = await pair()
    sizes = [0, 5, small(both.client) + 1, both.client.eager_size + 1, 7, 100_000, 3] * 5
    messages = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    got: list[bytes] = []
    everything = asyncio.Event()
    gate = asyncio.get_running_loop().create_future()

    def handle(message: bytes) -> asyncio.Future[Any] | None:
        got.append(message)
        if len(got) == len(messages):
            everything.set()
        return gate if len(got) == 10 else None

    consumer = asyncio.ensure_future(both.server.consume(handle))
    sends = [both.client.send(message) for message in messages]
    while len(got) < 10:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(got) == 10
    gate.set_result(None)
    await everything.wait()
    await asyncio.gather(*sends)
    assert got == messages
    both.server.stop_consuming()
    consumer.cancel()
    await asyncio.wait([consumer])
    await both.client.send(b"for recv")
    assert await both.server.recv() == b"for recv"


async def test_what_handle_waits_for_may_fail(pair: MakePair) -> None:
    both = await pair()
    failing = asyncio.get_running_loop().create_future()
    failing.set_exception(KeyError("from handle"))
    await both.client.send(b"x")
    with pytest.raises(KeyError):
        await both.server.consume(lambda message: failing)


# --- what has arrived ---------------------------------------------------------------------------------


async def test_flush_is_done_when_everything_has_arrived(pair: MakePair) -> None:
    both = await pair(OWN_WINDOW)
    assert both.client.flush().done(), "nothing was sent"
    for i in range(50):
        await both.client.send(b"%d" % i)
    await both.client.flush()
    both.server._adapter.reactor.poll_now()
    received = both.server.statistics()
    assert received.messages_received == received.messages_queued == 50
    assert both.client.flush().done()


async def test_flush_by_several_at_once_and_cancelled(pair: MakePair) -> None:
    both = await pair()
    await both.client.send(b"1")
    first, second = both.client.flush(), both.client.flush()
    await both.client.send(b"2")
    third = both.client.flush()
    first.cancel()
    await asyncio.gather(second, third)
    assert [await both.server.recv() for _ in range(2)] == [b"1", b"2"]


async def test_flush_fails_with_the_connection(pair: MakePair) -> None:
    both = await pair()
    await both.client.send(b"1")
    flushed = both.client.flush()
    both.client.close()
    with pytest.raises(ConnectionClosedError):
        await flushed
    with pytest.raises(ConnectionClosedError):
        both.client.flush()


async def test_flush_says_why_nothing_arrived(pair: MakePair) -> None:
    both = await pair(OWN_WINDOW)
    _, remote = await both.region(64)
    await both.client.send(b"1")
    refused = both.client.write(b"x", forge(remote, both.client, address=remote.address + 4096))
    await both.client.send(b"never arrives")
    flushed = both.client.flush()
    with pytest.raises(ConnectionLostError):
        await flushed
    assert isinstance(refused.exception(), RemoteAccessError)


async def test_a_message_without_credit_costs_the_others_no_receive(pair: MakePair) -> None:
    """The buffer of the frame that broke the protocol was lost to the shared queue."""
    other = await pair()
    shared = other.server.statistics().shared_receives
    assert shared is not None, "servers share their receives"
    for _ in range(5):
        both = await pair()
        ledger = both.client._sends.ledger
        assert ledger is not None
        ledger.data_limit += 10
        for _ in range(8):
            both.client.send(b"more than it may")
        await both.server.wait_closed()
        await both.client.wait_closed()
    await other.client.send(b"others go on")
    assert await other.server.recv() == b"others go on"
    after = other.server.statistics().shared_receives
    assert after is not None
    assert after.posted == after.receives


@pytest.mark.parametrize("count", [1, 15, 16, 40])
async def test_what_was_sent_arrives_though_the_sender_closes(pair: MakePair, count: int) -> None:
    both = await pair(OWN_WINDOW)
    for i in range(count):
        await both.client.send(b"%d" % i)
    both.client.close()
    assert [message async for message in both.server] == [b"%d" % i for i in range(count)]
    await both.client.wait_closed()


async def test_both_close_with_messages_under_way(pair: MakePair) -> None:
    both = await pair(Config(close_timeout=5.0))
    await both.client.send(b"from the client")
    await both.server.send(b"from the server")
    both.client.close()
    both.server.close()
    async with asyncio.timeout(10):
        await asyncio.gather(both.client.wait_closed(), both.server.wait_closed())


# --- a write as a future ------------------------------------------------------------------------------


async def test_a_write_is_a_future(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    loop = asyncio.get_running_loop()
    write = both.client.write(b"a", remote)
    assert isinstance(write, OneSided)
    assert asyncio.isfuture(write)
    assert asyncio.ensure_future(write) is write
    assert write.get_loop() is loop
    assert await write is None
    assert await write is None, "as often as one likes"
    assert (write.done(), write.cancelled(), write.result(), write.exception()) == (True, False, None, None)
    assert not write.cancel()
    assert bytes(lease)[:1] == b"a"


async def test_a_write_that_is_told_to_notify_nobody_goes_as_fast(pair: MakePair) -> None:
    """Who wraps a write passes on all it has."""
    both = await pair()
    lease, remote = await both.region(64)
    write = both.client.write(b"a", remote, notify=None)
    assert isinstance(write, OneSided)
    await write
    assert bytes(lease)[:1] == b"a"
    with pytest.raises(TypeError, match="inform"):
        both.client.write(b"b", remote, inform=None)  # type: ignore[call-arg]


async def test_what_asyncio_does_with_futures(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    write = both.client.write
    assert await asyncio.gather(*[write(b"%d" % i, remote[i:]) for i in range(10)]) == [None] * 10
    assert bytes(lease)[:10] == b"0123456789"
    done, pending = await asyncio.wait([write(b"x", remote[i:]) for i in range(10)])
    assert len(done) == 10
    assert not pending
    for future in asyncio.as_completed([write(b"y", remote[i:]) for i in range(5)]):
        assert await future is None
    assert await asyncio.shield(write(b"z", remote)) is None
    assert await asyncio.wait_for(write(b"z", remote), 10) is None
    async with asyncio.TaskGroup() as group:

        async def one() -> None:
            await write(b"t", remote)

        for _ in range(20):
            group.create_task(one())
    assert bytes(lease)[:5] == b"tyyyy"


async def test_done_callbacks(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    calls: list[Any] = []
    write = both.client.write(b"a", remote)

    def callback(of: Any) -> None:
        calls.append((of, variable.get()))

    def removed(of: Any) -> None:
        raise AssertionError("it was removed")

    variable.set("then")
    write.add_done_callback(callback)
    write.add_done_callback(removed)
    write.add_done_callback(removed)
    assert write.remove_done_callback(removed) == 2
    variable.set("later")
    await write
    assert calls == [], "in the next turn of the loop"
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert calls == [(write, "then")]
    write.add_done_callback(callback)
    await asyncio.sleep(0)
    assert calls[1:] == [(write, "later")]


async def test_a_cancelled_write(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    write = both.client.write(b"a", remote)
    called = asyncio.Event()
    write.add_done_callback(lambda _: called.set())
    assert write.cancel()
    assert write.cancelled()
    assert not write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    with pytest.raises(asyncio.CancelledError):
        write.exception()
    await called.wait()
    await both.client.write(b"b", remote)


async def test_a_task_that_waits_for_a_write_is_cancelled(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    for i in range(50):
        writes = [both.client.write(b"a", remote) for _ in range(3)]

        async def wait_for_them(writes: list[asyncio.Future[Any]] = writes) -> None:
            for write in writes:
                await write

        task = asyncio.ensure_future(wait_for_them())
        for _ in range(i % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await both.client.write(b"b", remote)
    assert both.client._sends.one_sided == both.client._sends.posted == 0


async def test_writes_in_gather_are_cancelled_with_it(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)

    async def together() -> None:
        await asyncio.gather(*[both.client.write(b"a", remote) for _ in range(5)])

    task = asyncio.ensure_future(together())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    one, other = both.client.write(b"a", remote), both.client.write(b"b", remote)
    assert one.cancel("because")
    ends: list[Any] = list(await asyncio.gather(one, other, return_exceptions=True))
    assert isinstance(ends[0], asyncio.CancelledError)
    assert ends[1] is None
    with pytest.raises(asyncio.CancelledError):
        await asyncio.gather(one, other)


async def test_others_hear_when_a_task_that_waits_is_cancelled(pair: MakePair) -> None:
    both = await pair(Config(mode="event"))
    _, remote = await both.region(64)
    both.client.write(b"first", remote)
    write = both.client.write(b"gathered", remote)

    async def wait_for_it() -> None:
        await write

    waiting = asyncio.ensure_future(asyncio.wait([write]))
    task = asyncio.ensure_future(wait_for_it())
    await asyncio.sleep(0)
    if not write.done():  # else it was too fast for this
        task.cancel()
        await waiting
        assert write.cancelled()
    await asyncio.wait([task, waiting])


async def test_a_write_has_nothing_of_one_before(pair: MakePair) -> None:
    """Its memory may be that of one that was cancelled, failed, was watched or looked at."""
    both = await pair()
    _, remote = await both.region(64)
    for i in range(40):
        before = both.client.write(b"x", remote[i:])
        before.add_done_callback(lambda future: None)
        before.cancel("nobody wants it")
        seen = weakref.ref(before)
        await both.client.write(b"-", remote[i:])
        del before
        await asyncio.sleep(0)  # its callback had it
        assert seen() is None
        write = both.client.write(b"y", remote[i:])
        assert gc.is_tracked(write)
        assert not write.cancelled()
        assert weakref.getweakrefcount(write) == 0
        assert await write is None
        assert write.exception() is None


async def test_an_unfinished_write_has_no_result(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    both.client.write(b"first", remote)
    write = both.client.write(b"gathered, and not posted yet", remote)
    assert not write.done()
    for ask in (write.result, write.exception):
        with pytest.raises(asyncio.InvalidStateError):
            ask()
    await write


async def test_a_refused_write_tells_everybody(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    bad = forge(remote, both.client, address=remote.address + 4096)
    write = both.client.write(b"x", bad)
    others = [both.client.write(b"y", remote) for _ in range(100)]
    with pytest.raises(RemoteAccessError):
        await write
    for other in others:
        with pytest.raises(ConnectionLostError):
            await other
    assert isinstance(write.exception(), RemoteAccessError)
    await both.client.wait_closed()


async def test_writes_that_are_refused_before_anything_is_sent(pair: MakePair) -> None:
    both, other = await pair(), await pair()
    _, remote = await both.region(64)
    with pytest.raises(MisuseError, match="does not fit"):
        both.client.write(bytes(65), remote)
    with pytest.raises(MisuseError, match="another connection"):
        other.client.write(b"x", remote)
    await both.server.unshare(remote.name)
    while not remote.grant.revoked:
        await asyncio.sleep(0)
    with pytest.raises(MisuseError, match="revoked"):
        both.client.write(b"x", remote)
    assert both.client.statistics().requests_posted == 0


async def test_a_write_that_nobody_awaits_is_forgotten_when_it_is_done(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    write = both.client.write(b"x", remote)
    gone = weakref.ref(write)
    del write
    await both.client.write(b"y", remote)
    gc.collect()
    assert gone() is None


async def test_a_batch_beyond_what_goes_without_a_slot(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(4096)
    async with both.client.batch() as batch:
        writes = [batch.write(i.to_bytes(8, "big"), remote[8 * i :]) for i in range(500)]
        value = batch.fetch_add(remote[:8], 0)
        writes[3].cancel()
    assert value.result() is not None
    numbers = [int.from_bytes(bytes(lease)[8 * i : 8 * i + 8], "big") for i in range(500)]
    assert numbers == [0 if i == 3 else i for i in range(500)]


async def test_reads_and_atomic_operations_of_a_batch(pair: MakePair) -> None:
    """They go as its writes do: in the order they were made, each with its result when the block is over."""
    both = await pair()
    lease, remote = await both.region(64)
    word = remote[8:16]
    async with both.client.batch() as batch:
        batch.write(b"12345678", remote)
        asked: list[asyncio.Future[Any]] = [
            batch.read(remote[:8]),
            batch.fetch_add(word, -1),
            batch.compare_swap(word, (1 << 64) - 1, 7),
            batch.read(word),
            batch.compare_swap(word, 6, 8),
        ]
        given_up = batch.read(remote[:8])
        given_up.cancel()
    assert {type(each) for each in asked} == {OneSided}
    assert [each.result() for each in asked] == [b"12345678", 0, (1 << 64) - 1, bytes(lease)[8:16], 7]
    assert given_up.cancelled()
    assert int.from_bytes(bytes(lease)[8:16], sys.byteorder) == 7
    assert nothing_is_lent(both.client)


async def test_a_batch_that_asks_for_more_than_goes_without_a_slot(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(4096)
    memoryview(lease)[:] = bytes(i % 251 for i in range(4096))
    counter = remote[4088:]
    memoryview(lease)[4088:] = bytes(8)
    async with both.client.batch() as batch:
        reads = [batch.read(remote[i : i + 9]) for i in range(200)]
        sums = [batch.fetch_add(counter, 1) for _ in range(200)]
        swaps = [batch.compare_swap(counter, 200 + i, 201 + i) for i in range(10)]
        reads[150].cancel()
    del reads[150]
    assert [read.result() for read in reads] == [bytes(lease)[i : i + 9] for i in range(200) if i != 150]
    assert [each.result() for each in sums + swaps] == list(range(210))
    assert nothing_is_lent(both.client)


async def test_a_write_that_notifies(pair: MakePair) -> None:
    both = await pair()
    most = both.client._sends.stage_size
    lease, remote = await both.region(most)
    data = os.urandom(most)
    writes = [both.client.write(data, remote, notify=7), both.client.write(b"", remote, notify=(1 << 32) - 1)]
    async with both.client.batch() as batch:
        writes.append(batch.write(b"a", remote, notify=0))
        writes.append(batch.write(b"b", remote[1:]))
    assert {type(write) for write in writes} == {OneSided}
    assert [await both.server.notified() for _ in range(3)] == [7, (1 << 32) - 1, 0]
    assert bytes(lease) == b"ab" + data[2:]
    assert nothing_is_lent(both.client)


async def test_notifications_wait_for_credits_in_turn_with_messages(pair: MakePair) -> None:
    """None passes another, whichever way it goes, nor is one lost when its wait is cancelled."""
    both = await pair(Config(shared_receives=0, receive_credits=4))
    _, remote = await both.region(64)
    issued: list[asyncio.Future[Any]] = []
    for i in range(40):
        issued.append(both.client.write(b"x", remote, notify=i))
        issued.append(both.client.send(b"%d" % i))
    issued[-2].cancel()
    async with both.client.batch() as batch:
        last = [batch.write(b"x", remote, notify=100 + i) for i in range(40)]
        taking = asyncio.gather(messages_of(both.server, 40), notifications_of(both.server, 79))
    messages, notifications = await taking
    assert messages == [b"%d" % i for i in range(40)]
    assert notifications == [*range(39), *range(100, 140)]
    assert all(each.done() for each in last)


async def messages_of(connection: Connection, count: int) -> list[bytes]:
    return [await connection.recv() for _ in range(count)]


async def notifications_of(connection: Connection, count: int) -> list[int]:
    return [await connection.notified() for _ in range(count)]


async def test_writes_that_do_not_travel_inline(pair: MakePair) -> None:
    both = await pair()
    most = both.client._sends.stage_size
    lease, remote = await both.region(2 * most)
    for size in (both.client._qp.max_inline, both.client._qp.max_inline + 1, most):
        data = os.urandom(2 * size)
        write = both.client.write(memoryview(data)[:size], remote)
        async with both.client.batch() as batch:
            another = batch.write(data[size:], remote[size:])
        assert {type(write), type(another)} == {OneSided}
        assert bytes(lease)[: 2 * size] == data
    assert nothing_is_lent(both.client)


async def test_reading_into_a_buffer(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(4096)
    data = os.urandom(4096)
    memoryview(lease)[:] = data
    buffer, array = bytearray(4098), np.zeros(512, np.int64)
    read = both.client.read_into(remote, buffer)
    assert isinstance(read, OneSided)
    with pytest.raises(BufferError):
        buffer.append(1)  # until it has come
    assert await read == 4096
    buffer.append(1)
    assert buffer == data + b"\0\0\1"
    async with both.client.batch() as batch:
        whole = batch.read_into(remote, array)
        parts = [batch.read_into(remote[i : i + 2], memoryview(buffer)[i + 2 :]) for i in range(0, 4096, 16)]
    assert {type(each) for each in (whole, *parts)} == {OneSided}
    assert (whole.result(), {part.result() for part in parts}) == (4096, {2})
    assert array.tobytes() == data
    assert all(buffer[i + 2 : i + 4] == data[i : i + 2] for i in range(0, 4096, 16))
    assert nothing_is_lent(both.client)


async def test_a_buffer_is_free_when_the_wait_is_given_up(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    memoryview(lease)[:] = b"x" * 64
    buffer = bytearray(64)
    await both.client.write(b"y", remote)
    reads = [both.client.read_into(remote, buffer) for _ in range(3)]
    assert reads[1].cancel()
    del reads[1]
    await asyncio.gather(*reads)
    buffer.append(1)
    assert buffer == b"y" + b"x" * 63 + b"\1"
    assert nothing_is_lent(both.client)


@pytest.mark.parametrize(
    ("buffer", "what"),
    [
        (bytearray(63), "64 bytes do not fit a buffer of 63"),
        (bytes(64), "writable"),
        (memoryview(bytearray(128))[::2], "contiguous"),
        (None, "NoneType"),
    ],
)
async def test_buffers_that_nothing_can_be_read_into(pair: MakePair, buffer: Any, what: str) -> None:
    both = await pair()
    _, remote = await both.region(64)
    with pytest.raises(MisuseError, match=what):
        both.client.read_into(remote, buffer)
    async with both.client.batch() as batch:
        with pytest.raises(MisuseError, match=what):
            batch.read_into(remote, buffer)
    assert both.client.statistics().requests_posted == 0


async def test_writes_for_which_there_is_no_staging_buffer(pair: MakePair) -> None:
    """They wait for one in turn, and those behind them too."""
    both = await pair()
    lease, remote = await both.region(8192)
    hog = Hog(both.client._staging)
    large, small = both.client.write(b"a" * 4000, remote), both.client.write(b"b", remote)
    batch = asyncio.ensure_future(write_both(both.client, remote[4000:]))
    await asyncio.sleep(0)
    assert [each.done() for each in (large, small, batch)] == [False] * 3
    hog.give(len(hog.held))
    await asyncio.gather(large, small, batch)
    assert bytes(lease)[:8000] == b"b" + b"a" * 3999 + b"d" + b"c" * 3999
    assert nothing_is_lent(both.client)


async def write_both(connection: Connection, remote: RemoteRegion) -> None:
    async with connection.batch() as batch:
        batch.write(b"c" * 4000, remote)
        batch.write(b"d", remote)


async def test_a_region_is_revoked_while_a_batch_waits(pair: MakePair) -> None:
    """Nothing of the batch is done then, nor kept."""
    both = await pair()
    _, remote = await both.region(4096)
    _, other = await both.region(64)
    hog = Hog(both.client._staging)
    with pytest.raises(MisuseError, match="revoked"):
        async with both.client.batch() as batch:
            first = batch.read_into(remote, bytearray(4096))
            batch.read(other)
            await both.server.unshare(other.name)
            while not other.grant.revoked:
                await asyncio.sleep(0)
    hog.give(len(hog.held))
    assert first.cancelled()
    assert both.client.statistics().pool.pinned == 0
    assert nothing_is_lent(both.client)


async def test_what_is_given_up_while_a_batch_waits_is_not_sent(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    hog = Hog(both.client._staging)
    async with both.client.batch() as batch:
        added, read = batch.fetch_add(remote[:8], 1), batch.read(remote[:8])
        asyncio.get_running_loop().call_soon(added.cancel)
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, hog.give, len(hog.held))
    assert added.cancelled()
    assert read.result() == bytes(8)


async def test_a_failure_in_the_midst_of_a_long_batch(pair: MakePair) -> None:
    """Those before it are done, and those behind it fail, whether they were posted already or not."""
    both = await pair()
    _, remote = await both.region(64)
    with pytest.raises(RemoteAccessError):
        async with both.client.batch() as batch:
            operations = [batch.write(b"x", remote) for _ in range(100)]
            operations.append(batch.read(forge(remote, both.client, rkey=remote.grant.rkey ^ 1)))
            operations += [batch.read(remote[:8]) for _ in range(300)]
            landing = batch.read_into(remote[:8], bytearray(8))
    assert [each.exception() for each in operations[:100]] == [None] * 100
    assert all(isinstance(each.exception(), ConnectionLostError) for each in (*operations[101:], landing))
    assert nothing_is_lent(both.client)


async def test_what_a_batch_cannot_ask_for(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    async with both.client.batch() as batch:
        with pytest.raises(MisuseError, match="multiple of 8"):
            batch.fetch_add(remote[1:9], 1)
        with pytest.raises(MisuseError, match="value=18446744073709551616"):
            batch.fetch_add(remote[:8], 1 << 64)
        with pytest.raises(MisuseError, match="needs 8 bytes"):
            batch.compare_swap(remote[:16], 1, 1)
        with pytest.raises(MisuseError, match="desired="):
            batch.compare_swap(remote[:8], 1, -(1 << 63) - 1)
        read = batch.read(remote[:0])
    assert read.result() == b""


async def test_a_read_of_a_batch_fails(pair: MakePair) -> None:
    """And with it the connection, as when it is the only one: what was asked behind it says why."""
    both = await pair()
    _, remote = await both.region(64)
    with pytest.raises(RemoteAccessError):
        async with both.client.batch() as batch:
            first = batch.read(remote[:8])
            batch.read(forge(remote, both.client, rkey=remote.grant.rkey ^ 1))
            last = batch.fetch_add(remote[:8], 1)
    assert first.result() == bytes(8)
    assert isinstance(last.exception(), ConnectionLostError)
    assert nothing_is_lent(both.client)


async def test_a_batch_whose_body_raises_writes_nothing(pair: MakePair) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    with pytest.raises(KeyError):
        async with both.client.batch() as batch:
            write = batch.write(b"x", remote)
            raise KeyError
    assert write.cancelled()
    await both.client.write(b"y", remote[1:])
    assert bytes(lease)[:2] == b"\0y"


# --- where it may be used -----------------------------------------------------------------------------


async def test_another_thread_is_refused(pair: MakePair) -> None:
    both = await pair()
    _, remote = await both.region(64)
    caught: list[Exception] = []
    calls: list[Callable[[], object]] = [
        lambda: both.client.send(b"x"),
        lambda: both.client.write(b"x", remote),
        lambda: both.client.read(remote),
    ]

    def elsewhere() -> None:
        for call in calls:
            try:
                call()
            except MisuseError as error:
                caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0)
    thread.join()
    assert [type(error).__name__ for error in caught] == ["WrongLoopError"] * 3


async def test_nothing_is_left_of_connections(listen: Any) -> None:
    """Senders, receivers and their buffers are collected, whatever refers to what."""
    server, acceptor = await listen()
    gone: list[Callable[[], object]] = []
    for _ in range(5):
        connection = await aiordma.connect("127.0.0.1", server.port)
        accepted = await acceptor.accepted.get()
        await connection.send(b"x")
        await accepted.recv()
        gone += [weakref.ref(connection), weakref.ref(connection._sends), weakref.ref(connection._receives)]
        for end in (connection, accepted):
            end.close()
            await end.wait_closed()
        del connection, accepted, end
    await asyncio.sleep(0)
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
