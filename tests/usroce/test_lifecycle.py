"""Ten thousand of everything, one after the other, leave nothing behind; and a fork does no harm."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aiordma.verbs import CompletionChannel, CompletionQueue, Context, QueuePair, usroce
from tests.conftest import open_fds
from tests.usroce.ends import End
from tests.usroce.processes import Processes

pytestmark = [pytest.mark.device, pytest.mark.usroce]

#: ASan is slow, and keeps freed memory for a while; leaks of the C code are found by tests/native then.
SANITIZED = "AIORDMA_SANITIZE" in os.environ
COUNT = 500 if SANITIZED else 10_000
GROWTH = 256 << 20 if SANITIZED else 1 << 20  # bytes: 100 for each


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident_bytes() -> int:
    """proc(5), statm."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leaves_nothing(once: Callable[[], None]) -> None:
    for _ in range(COUNT // 20):
        once()  # what is allocated once, caches, the allocator's arenas
    gc.collect()
    before = resident_bytes(), len(open_fds()), threads()
    for _ in range(COUNT):
        once()
    gc.collect()
    after = resident_bytes(), len(open_fds()), threads()
    assert after[1:] == before[1:], "descriptors, threads"
    assert after[0] - before[0] < GROWTH, f"{after[0] - before[0]} bytes more"


def open_device(address: str) -> Context:
    with usroce.options(address=address):
        return usroce.usroce_device().open()


def use(end: End) -> None:
    """A queue pair connected with itself."""
    end.connect(end.card())
    end.write(b"hello", 100)
    assert end.memory[100:105] == b"hello"


def test_devices(address: str) -> None:
    def once() -> None:
        with open_device(address) as context:
            end = End(context, 4096)
            use(end)

    leaves_nothing(once)


def test_completion_queues(address: str) -> None:
    with open_device(address) as context:

        def once() -> None:
            with CompletionChannel(context) as channel, CompletionQueue(context, 100, channel) as cq:
                cq.arm()
                assert not cq.poll()

        leaves_nothing(once)


def test_queue_pairs(address: str) -> None:
    """Each with a message under way when it is destroyed."""
    with open_device(address) as context:
        end = End(context, 1 << 16)
        end.connect(end.card())
        for _ in range(20):
            end.write(bytes(1 << 16))  # the memory that it shares with itself is touched once, up to there
        end.qp.close()

        def once() -> None:
            with QueuePair(end.pd, end.cq, max_send_wr=16, max_recv_wr=16) as end.qp:
                use(end)
                end.qp.post_recv([(1, end.region.address, 64, end.region.lkey)])

        leaves_nothing(once)


def test_many_queue_pairs_at_a_time(address: str) -> None:
    """A number comes back only after a long time, so that late packets find nobody."""
    with open_device(address) as context:
        end = End(context, 4096)
        queues = [QueuePair(end.pd, end.cq, max_send_wr=1, max_recv_wr=1) for _ in range(COUNT)]
        numbers = {qp.qp_num for qp in queues}
        assert len(numbers) == COUNT
        for qp in queues:
            qp.close()
        use(end)


def test_fork(processes: Processes, address: str) -> None:
    output = processes.python("tests.usroce.forked", settings={"ADDRESS": address}).finish()
    assert output.splitlines()[-1] == "right"
    assert output.count("was opened before fork() and cannot be used in the child") == 1, (
        "the C library says so"
    )
