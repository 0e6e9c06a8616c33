"""Bugs that were found, each by the scenario that showed it."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiordma
from aiordma import Config, Connection
from aiordma._native import ffi
from aiordma.cli.loops import LoopName, run
from aiordma.cq_reactor import CqReactor
from aiordma.errors import ConnectionLostError, DeviceError, MemoryLimitError, RdmaError
from aiordma.regions import RemoteRegion
from aiordma.verbs import QpState, QueuePair
from tests.device.conftest import MakePair
from tests.device.test_access import forge
from tests.device.test_bootstrap_hostile import certificate

pytestmark = pytest.mark.device

MIB = 1 << 20


async def test_operations_flushed_behind_a_failed_one_all_end(pair: MakePair) -> None:
    """The flush of the second came in the same batch as the error of the first, and nobody told its waiter."""
    both = await pair()
    _, remote = await both.region(64)
    bad = forge(remote, both.client, address=remote.address + 4096)
    async with asyncio.timeout(20):
        operations = [both.client.write(b"x", bad)] + [both.client.write(b"y", remote) for _ in range(30)]
        results = await asyncio.gather(*operations, return_exceptions=True)
    assert all(isinstance(result, ConnectionLostError) for result in results)


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
async def test_a_loop_that_ends_leaves_no_tls_behind(tmp_path: Path, loop_name: LoopName) -> None:
    """wait_closed() did not wait for the TCP connection, which in TLS waits for the peer: the loop ended first."""
    server_tls, client_tls = certificate(tmp_path)
    config = Config(close_timeout=0.2)  # the peer says goodbye too late

    async def handler(connection: Connection) -> None:
        async for message in connection:
            await connection.send(message)

    async def client(port: int, echoed: Callable[[], object], may_end: threading.Event) -> None:
        async with aiordma.connect("127.0.0.1", port, config=config, ssl=client_tls) as connection:
            await connection.send(b"message")
            assert await connection.recv() == b"message"
            echoed()
            may_end.wait()

    async with aiordma.serve(handler, "127.0.0.1", 0, ssl=server_tls) as server:
        loop, echoed, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        failures: list[BaseException] = []

        def in_a_thread() -> None:
            tell = functools.partial(loop.call_soon_threadsafe, echoed.set)
            try:
                run(client(server.port, tell, may_end), loop_name)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        await echoed.wait()
        may_end.set()
        thread.join()  # the server's loop stands still
    assert not failures


async def test_a_lease_outlives_the_device(pair: MakePair) -> None:
    """The last connection closed the pool and unmapped the slab under a lease that was still held: SIGSEGV."""
    both = await pair()
    small, large = await both.client.allocate(100), await both.client.allocate(3 * MIB)
    for connection in (both.client, both.server):
        connection.close()
        await connection.wait_closed()
    both.listener.close()
    await both.listener.wait_closed()
    for lease in (small, large):
        view = memoryview(lease)
        view[:] = b"\x01" * len(view)
        assert view[-1] == 1
        view.release()
        await lease.release()


async def test_a_lease_and_its_view_are_collected_in_any_order(pair: MakePair) -> None:
    """The garbage collector had cleared the lease when its view went and told it: an unraisable AttributeError."""
    both = await pair()
    gc.disable()  # a collection in between might change the order
    lease = await both.client.allocate(100)
    view = memoryview(lease)
    for connection in (both.client, both.server):
        connection.close()
        await connection.wait_closed()
    both.listener.close()
    await both.listener.wait_closed()
    await lease.release()
    cycle: list[object] = [lease, view]
    cycle.append(cycle)
    del lease, view, cycle
    gc.enable()
    gc.collect()


async def test_a_waiter_that_gave_up_does_not_block_those_behind(pair: MakePair) -> None:
    both = await pair(Config(pool_limit=8 * MIB))
    held = await both.client.allocate(3 * MIB)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await both.client.allocate(7 * MIB)
    async with asyncio.timeout(5):
        await (await both.client.allocate(64)).release()
    await held.release()


async def test_memory_comes_back_with_the_last_view(pair: MakePair) -> None:
    """A lease released under a live view: nobody woke those who waited when the view went."""
    both = await pair(Config(pool_limit=10 * MIB))
    held = await both.client.allocate(3 * MIB)
    view = memoryview(held)
    await held.release()
    waiting = asyncio.ensure_future(_allocate(both.client, 5 * MIB))
    await asyncio.sleep(0)
    assert not waiting.done()
    view.release()
    async with asyncio.timeout(5):
        await (await waiting).release()


async def _allocate(connection: Connection, nbytes: int) -> aiordma.Lease:
    return await connection.allocate(nbytes)


async def test_an_operation_cancelled_inside_a_batch_is_not_posted(pair: MakePair) -> None:
    """It was posted without its memory: a megabyte over a 4 KiB staging buffer."""
    both = await pair()
    _, remote = await both.region(MIB)
    posted = both.client.statistics().requests_posted
    async with both.client.batch() as batch:
        for operation in (batch.read_into(remote, bytearray(MIB)), batch.write(bytes(MIB), remote)):
            operation.cancel()
        last = batch.write(b"x", remote)
    assert last.done()
    assert both.client.statistics().requests_posted == posted + 1


@pytest.mark.parametrize("nbytes", [1, 2000], ids=["inline", "staged"])
async def test_a_request_the_device_refuses_fails_and_nothing_follows_it(pair: MakePair, nbytes: int) -> None:
    both = await pair()
    _, remote = await both.region(4096)
    both.client._qp._modify(QpState.RESET, ffi.new("struct ibv_qp_attr *"))  # takes no requests there
    first = both.client.write(bytes(nbytes), remote)
    second = both.client.write
    with pytest.raises(RdmaError, match="EINVAL"):
        await first
    with pytest.raises(ConnectionLostError):
        await second(b"2", remote)
    await both.client.wait_closed()
    statistics = both.client.statistics()
    assert statistics.send_slots_used == 0
    assert both.client._sends.posted == both.client._sends.one_sided == 0


async def test_closed_between_the_wake_up_and_the_turn(pair: MakePair) -> None:
    both = await pair()
    receiver = asyncio.ensure_future(both.server.recv())
    await asyncio.sleep(0)
    both.server._receives.messages.put(b"wakes the receiver")
    both.server.close()
    assert await receiver == b"wakes the receiver"  # it was its message already
    with pytest.raises(ConnectionLostError):
        await both.server.recv()


async def test_ending_a_share_twice_at_once(pair: MakePair) -> None:
    """Two revocations of one window broke the queue pair."""
    both = await pair()
    lease, remote = await both.region(64)
    await asyncio.gather(both.server.unshare(remote.name), both.server.unshare(remote.name), lease.release())
    await both.client.send(b"lives on")
    assert await both.server.recv() == b"lives on"


async def test_a_share_given_up_while_it_waits_for_a_slot(pair: MakePair) -> None:
    """Its window was freed, and then bound."""
    both = await pair(Config(send_depth=2, receive_credits=2))
    lease = await both.server.allocate(64)
    theirs = await both.client.allocate(MIB)
    await both.client.share("there", theirs)
    there: RemoteRegion = await both.server.remote("there")
    for _ in range(10):
        writes = [both.server.write(bytes(MIB), there) for _ in range(4)]
        sharing = asyncio.ensure_future(both.server.share("mine", lease))
        await asyncio.sleep(0)
        sharing.cancel()
        await asyncio.wait([sharing])
        await asyncio.gather(*writes)
    await both.server.share("mine", lease)
    await both.client.write(b"still right", (await both.client.remote("mine"))[:11])
    assert bytes(lease)[:11] == b"still right"


async def test_waiting_for_a_server_that_nobody_closed(no_leaked_tasks: None) -> None:
    """It cancelled the handlers of a server that was not closing."""
    server = await aiordma.serve(_echo, "127.0.0.1", 0, config=Config(close_timeout=0.05))
    waiting = asyncio.ensure_future(server.wait_closed())
    async with aiordma.connect("127.0.0.1", server.port) as client:
        for _ in range(5):
            await client.send(b"served")
            assert await client.recv() == b"served"
            await asyncio.sleep(0.02)
        assert not waiting.done()
    server.close()
    await waiting


async def _echo(connection: Connection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_no_room_in_the_completion_queues_gives_everything_back(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = await pair()
    users = both.client._adapter.users

    def full(*_: Any) -> None:
        raise DeviceError("ibv_create_cq failed: ENOMEM")

    with monkeypatch.context() as patch:
        patch.setattr(CqReactor, "attach", full)
        with pytest.raises(DeviceError, match="ibv_create_cq"):
            await aiordma.connect("127.0.0.1", both.listener.port)
    while both.listener._pending:
        await asyncio.sleep(0)
    assert both.client._adapter.users == users


async def test_a_pool_too_small_for_a_connection_says_so() -> None:
    config = Config(pool_limit=MIB, slab_size=MIB // 4, receive_credits=4096)
    async with aiordma.serve(_echo, "127.0.0.1", 0, config=config) as server:
        with pytest.raises((MemoryLimitError, aiordma.errors.BootstrapError)):
            await aiordma.connect("127.0.0.1", server.port, config=config)


async def test_a_new_receiver_does_not_overtake_one_that_was_woken(pair: MakePair) -> None:
    """Receivers that wait get the messages in the order they came, however late one is that was woken."""
    both = await pair()
    numbers = [b"%d" % i for i in range(200)]
    order: list[tuple[int, bytes]] = []

    async def receive(which: int) -> None:
        order.append((which, await both.server.recv()))

    receivers = [asyncio.ensure_future(receive(i)) for i in range(100)]
    await asyncio.sleep(0)
    sends = [both.client.send(number) for number in numbers]
    while both.server.statistics().messages_received < 100:
        await asyncio.sleep(0)
        # The loop is in between: some receivers are woken, and others ask anew.
        receivers.append(asyncio.ensure_future(receive(len(receivers))))
        if len(receivers) == 200:
            break
    receivers += [asyncio.ensure_future(receive(i)) for i in range(len(receivers), 200)]
    await asyncio.gather(*receivers, *sends)
    assert [message for _, message in sorted(order)] == numbers


async def test_a_window_that_cannot_be_bound_fails_its_message_only(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offer was sent all the same, and send() raised "posted while ended" on this side."""
    client, server = await pair()
    if client.route.adapter.attributes.memory_windows:
        with monkeypatch.context() as patch:
            patch.setattr(QueuePair, "post_bind", refuse_to_bind)
            with pytest.raises(DeviceError, match="refuses to bind"):
                await client.send(bytes(100_000))
    send = client.send(bytes(100_000))
    assert await server.recv() == bytes(100_000)
    await send


def refuse_to_bind(*_: Any) -> None:
    raise DeviceError("the device refuses to bind")


async def test_a_window_is_bound_again_and_again(pair: MakePair) -> None:
    """The library's structure kept the window's first key, so rxe refused every binding but the first."""
    client, server = await pair()
    for i in range(5):
        send = client.send(bytes([i]) * 100_000)
        assert await server.recv() == bytes([i]) * 100_000
        await send
