"""aiordma.verbs on its own: states, order of death, events, shared receive queues, errors that say what."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from aiordma.errors import DeviceError, MisuseError, WcStatus
from aiordma.verbs import (
    SEND_WR_STRUCT,
    Access,
    CompletionChannel,
    CompletionQueue,
    Context,
    EventType,
    GidType,
    LinkLayer,
    MemoryRegion,
    MemoryWindow,
    Path,
    ProtectionDomain,
    QpState,
    QueuePair,
    SendFlags,
    SharedReceiveQueue,
    WcOpcode,
    WorkCompletion,
    WrOpcode,
    open_device,
)
from aiordma.verbs.gid_choice import choose_gid, interface_addresses
from tests.conftest import device_under_test

pytestmark = pytest.mark.device

SECOND = 1_000_000_000


@dataclass
class Bench:
    """Two connected queue pairs on one completion queue, and 64 KiB of registered memory."""

    context: Context
    pd: ProtectionDomain
    channel: CompletionChannel
    cq: CompletionQueue
    a: QueuePair
    b: QueuePair
    buffer: bytearray
    region: MemoryRegion

    def completions(self, count: int) -> list[WorkCompletion]:
        found: list[WorkCompletion] = []
        deadline = time.monotonic() + 20
        while len(found) < count:
            assert time.monotonic() < deadline, f"{len(found)} of {count} completions"
            found += self.cq.poll(SECOND // 10)
        return found


def connect(context: Context, one: QueuePair, other: QueuePair) -> None:
    choice = choose_gid(
        context.ports(), context.gids(), local=None, remote=None, interfaces=interface_addresses()
    )
    gid = choice.entry.gid if choice.entry else None
    path = Path(choice.port.port, choice.port.lid, gid, choice.entry.index if choice.entry else 0)
    for qp, peer in ((one, other), (other, one)):
        qp.to_init(choice.port.port)
        qp.to_rtr(path, qp_num=peer.qp_num, psn=7, mtu=1024, responder_depth=4)
        qp.to_rts(psn=7, timeout=14, retry_count=3, rnr_retry=0, initiator_depth=4)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with device_under_test().open() as context:
        pd = ProtectionDomain(context)
        channel = CompletionChannel(context)
        cq = CompletionQueue(context, 256, channel)
        a, b = (QueuePair(pd, cq, max_send_wr=128, max_recv_wr=128, max_inline=64) for _ in range(2))
        connect(context, a, b)
        buffer = bytearray(64 << 10)
        rights = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
        yield Bench(context, pd, channel, cq, a, b, buffer, pd.register(buffer, rights))


def test_what_a_device_says_of_itself() -> None:
    with open_device(device_under_test().name) as context:
        attributes = context.attributes()
        assert attributes.max_qp > 0
        assert attributes.max_cqe > 0
        ports = context.ports()
        assert len(ports) == attributes.ports
        assert ports[0].max_mtu in (256, 512, 1024, 2048, 4096)
        assert all(gid.type in GidType for gid in context.gids())
        assert ports[0].link_layer in (LinkLayer.ETHERNET, LinkLayer.INFINIBAND)
    with pytest.raises(DeviceError, match="nosuch0"):
        open_device("nosuch0")


def test_send_and_receive_many_with_one_call(bench: Bench) -> None:
    base, lkey = bench.region.address, bench.region.lkey
    bench.b.post_recv([(i, base + 4096 + 16 * i, 16, lkey) for i in range(100)])
    for i in range(100):
        bench.buffer[16 * i : 16 * i + 16] = b"%016d" % i
    packed = b"".join(
        SEND_WR_STRUCT.pack(
            1000 + i, base + 16 * i, 0, 0, 0, 16, lkey, 0, 0, WrOpcode.SEND, SendFlags.SIGNALED
        )
        for i in range(100)
    )
    assert bench.a.post_send_many(packed, 100) == (100, 0)
    done = bench.completions(200)
    assert all(wc.status == WcStatus.SUCCESS for wc in done)
    assert [wc.wr_id for wc in done if wc.opcode == WcOpcode.RECV] == list(range(100))
    assert bytes(bench.buffer[4096:5696]) == b"".join(b"%016d" % i for i in range(100))


def test_a_full_send_queue_takes_what_fits_and_says_so(bench: Bench) -> None:
    base, lkey, rkey = bench.region.address, bench.region.lkey, bench.region.rkey
    count = bench.a.max_send_wr + 50
    write = (base, base + 8192, 0, 0, 8, lkey, rkey, 0, WrOpcode.RDMA_WRITE, SendFlags.SIGNALED)
    packed = b"".join(SEND_WR_STRUCT.pack(i, *write) for i in range(count))
    taken, rc = bench.a.post_send_many(packed, count)
    if rc:
        assert bench.a.max_send_wr <= taken < count
    done = bench.completions(taken)
    assert [wc.wr_id for wc in done] == list(range(taken))


def test_events_arm_drain_and_acknowledge(bench: Bench) -> None:
    assert bench.channel.get_events() == []
    bench.cq.arm()
    base, lkey, rkey = bench.region.address, bench.region.lkey, bench.region.rkey
    for round_trip in range(150):  # more than one batch of acknowledgements
        rc = bench.a.post_send(
            round_trip, WrOpcode.RDMA_WRITE, SendFlags.SIGNALED, base, 8, lkey, base + 64, rkey
        )
        assert rc == 0
        bench.completions(1)
        deadline = time.monotonic() + 20
        while not (queues := bench.channel.get_events()):
            assert time.monotonic() < deadline
        assert queues == [bench.cq]
        bench.cq.arm()
    # The fixture closes with events unacknowledged: ibv_destroy_cq would hang if the count were wrong.


def test_a_shared_receive_queue_and_its_limit_event(bench: Bench) -> None:
    srq = SharedReceiveQueue(bench.pd, 64)
    assert srq.max_wr >= 64
    a, b = (QueuePair(bench.pd, bench.cq, max_send_wr=16, max_recv_wr=0, srq=srq) for _ in range(2))
    connect(bench.context, a, b)
    base, lkey = bench.region.address, bench.region.lkey
    srq.post_recv([(100 + i, base + 1024 + 64 * i, 64, lkey) for i in range(8)])
    srq.arm(6)
    for qp in (a, b, a, b):
        bench.buffer[:5] = b"hello"
        assert qp.post_send(1, WrOpcode.SEND, SendFlags.SIGNALED, base, 5, lkey) == 0
        done = bench.completions(2)
        assert {wc.status for wc in done} == {WcStatus.SUCCESS}
    deadline = time.monotonic() + 20
    while (event := bench.context.get_async_event()) is None or event.type is not EventType.SRQ_LIMIT_REACHED:
        assert time.monotonic() < deadline
    assert bytes(bench.buffer[1024:1029]) == b"hello"
    srq.close()
    assert a.closed
    assert b.closed


def test_states_are_a_table(bench: Bench) -> None:
    fresh = QueuePair(bench.pd, bench.cq, max_send_wr=4, max_recv_wr=4)
    assert fresh.query_state() is QpState.RESET
    with pytest.raises(MisuseError, match="cannot go from RESET to RTS"):
        fresh.to_rts(psn=0, timeout=1, retry_count=1, rnr_retry=0, initiator_depth=1)
    with pytest.raises(MisuseError, match="cannot go from RESET to RTR"):
        fresh.to_rtr(Path(1, 0, None, 0), qp_num=5, psn=0, mtu=1024, responder_depth=1)
    fresh.to_error()  # nothing to do
    assert fresh.state is QpState.RESET
    fresh.to_init(1)
    with pytest.raises(MisuseError, match="from INIT to RTS"):
        fresh.to_rts(psn=0, timeout=1, retry_count=1, rnr_retry=0, initiator_depth=1)
    base, lkey = bench.region.address, bench.region.lkey
    bench.a.post_recv([(i, base, 8, lkey) for i in range(10)])
    bench.a.to_error()
    bench.a.to_error()
    assert bench.a.query_state() is QpState.ERR
    flushed = bench.completions(10)
    assert {wc.status for wc in flushed} == {WcStatus.WR_FLUSH_ERR}
    assert {wc.qp_num for wc in flushed} == {bench.a.qp_num}
    assert {(wc.opcode, wc.byte_len, wc.imm) for wc in flushed} == {(0, 0, 0)}, "mean nothing on an error"
    fresh.close()


def test_order_of_death(bench: Bench) -> None:
    window = MemoryWindow(bench.pd)
    children = [bench.a, bench.b, bench.cq, bench.channel, bench.region, window, bench.pd]
    assert not any(child.closed for child in children)
    bench.context.close()
    assert all(child.closed for child in children)
    bench.context.close()
    for use in (
        lambda: ProtectionDomain(bench.context),
        bench.a.query_state,
        lambda: bench.a.post_recv([]),
        bench.context.ports,
    ):
        with pytest.raises(DeviceError, match="is closed"):
            use()
    bench.buffer.extend(b"the region no longer holds it")


def test_a_forgotten_owner_warns() -> None:
    context = device_under_test().open()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pd = ProtectionDomain(context)
        del pd
        gc.collect()
    assert any("never closed" in str(warning.message) for warning in caught)
    context.close()  # the recorded warning still holds the object, so it can be given back after all


@pytest.mark.parametrize(
    ("buffer", "match"),
    [
        (bytearray(), "empty"),
        (memoryview(bytearray(64))[::2], "contiguous"),
        (b"read-only", "writable"),
        (3, "buffer"),
    ],
)
def test_what_cannot_be_registered(bench: Bench, buffer: object, match: str) -> None:
    with pytest.raises(MisuseError, match=match):
        bench.pd.register(buffer)


def test_impossible_sizes(bench: Bench) -> None:
    limit = bench.context.attributes().max_cqe
    for size in (0, -1, limit + 1):
        with pytest.raises(MisuseError, match="allows 1 to"):
            CompletionQueue(bench.context, size)
    with pytest.raises(DeviceError, match="ibv_create_qp"):
        QueuePair(bench.pd, bench.cq, max_send_wr=1 << 30, max_recv_wr=1)


def test_a_window_is_bound_again_and_again(bench: Bench) -> None:
    if not bench.context.attributes().memory_windows:
        pytest.skip("no memory windows on this device")
    buffer = bytearray(4096)
    region = bench.pd.register(buffer, Access.LOCAL_WRITE | Access.MW_BIND)
    window = MemoryWindow(bench.pd)
    keys = []
    for i in range(5):
        window_key = bench.a.post_bind(1, window, region, region.address, 4096, Access.REMOTE_READ)
        keys.append(window_key)
        (bound,) = bench.completions(1)
        assert bound.status == WcStatus.SUCCESS
        buffer[0] = i
        address, lkey = bench.region.address, bench.region.lkey
        assert (
            bench.b.post_send(
                2, WrOpcode.RDMA_READ, SendFlags.SIGNALED, address, 1, lkey, region.address, window_key
            )
            == 0
        )
        (read,) = bench.completions(1)
        assert (read.status, bench.buffer[0]) == (WcStatus.SUCCESS, i)
        bench.a.post_invalidate(3, window_key)
        assert bench.completions(1)[0].status == WcStatus.SUCCESS
    assert len(set(keys)) == 5
    window.close()
    region.close()
