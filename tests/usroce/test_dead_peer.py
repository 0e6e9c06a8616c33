"""A peer that does not answer any more is given up when the connection's settings say so, and not before.

That is (retry_count + 1) * 4.096 us * 2**ack_timeout after its last sign of life, whoever waits and how.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

import pytest

import aiordma
from aiordma import Config
from aiordma.errors import RetryExceededError, WcStatus
from aiordma.verbs import WrOpcode, usroce
from aiordma.verbs.usroce import Fault
from tests.usroce.conftest import Target
from tests.usroce.processes import Processes

pytestmark = [pytest.mark.device, pytest.mark.usroce]

COUNT = 16  # operations in flight


@pytest.fixture(autouse=True)
def by_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process stands for a silent host here; one-sided operations without packets would not need it."""
    monkeypatch.setenv("AIORDMA_USROCE_DIRECT", "0")


def configured(timeout: int, retry_count: int) -> float:
    """Seconds, by IBA 9.7.6.1.3 and ibv_modify_qp(3)."""
    return float((retry_count + 1) * 4.096e-6 * 2**timeout)


def fall_silent(target: Target) -> None:
    usroce.set_fault(target.end.context, Fault(drop=1.0))


def stop(target: Target) -> None:
    target.process.stop()


def kill(target: Target) -> None:
    target.process.end()


@pytest.mark.parametrize("wait", ["polled", "slept"])
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ], ids=["write", "read"])
@pytest.mark.parametrize("settings", [(14, 3), (16, 0), (12, 1)], ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("death", [fall_silent, stop, kill], ids=lambda death: death.__name__)
def test_it_is_given_up_in_time(
    target: Target, death: Callable[[Target], None], settings: tuple[int, int], opcode: WrOpcode, wait: str
) -> None:
    end = target.end
    target.connect(timeout=settings[0], retry_count=settings[1])
    target.begin("sleep")
    end.write(b"alive", 100)
    death(target)
    started = time.monotonic()
    for number in range(COUNT):
        end.post(opcode, 3000, local=3000 * number)
    first, *rest = end.completions(COUNT, wait=getattr(end, wait))
    seconds = time.monotonic() - started
    assert (first.status, first.wr_id) == (WcStatus.RETRY_EXC_ERR, end.posted - COUNT + 1)
    assert {completion.status for completion in rest} == {WcStatus.WR_FLUSH_ERR}
    assert configured(*settings) / 2 < seconds < configured(*settings) * 1.2 + 0.2
    assert usroce.counters(end.context).timeouts > 0


def test_signs_of_life_count_anew(target: Target) -> None:
    """A peer that stops for a while, but not for too long, has missed nothing: every time it may be as long."""
    end = target.end
    target.connect(timeout=17, retry_count=1)  # 0.54 s apiece
    target.begin("sleep")
    for round_trip in range(3):
        target.process.stop()
        timeouts = usroce.counters(end.context).timeouts
        end.memory[:8] = round_trip.to_bytes(8, "little")
        for _ in range(COUNT):
            end.post(WrOpcode.RDMA_WRITE, 8, remote=8)
        while usroce.counters(end.context).timeouts < timeouts + 3:
            assert not end.cq.poll()
        target.process.go_on()
        end.complete(COUNT)
        assert end.read(8, 8, local=64) == round_trip.to_bytes(8, "little")


def test_a_stall_of_our_own_is_not_held_against_the_peer(target: Target) -> None:
    """Time alone does not say that a peer is dead: it must also have been asked as often as is configured."""
    end = target.end
    target.connect(timeout=14, retry_count=7)
    target.begin("sleep")
    end.write(b"alive", 100)
    before = usroce.counters(end.context).timeouts
    usroce.set_fault(end.context, Fault(drop=1.0))
    end.post(WrOpcode.RDMA_WRITE, 8)
    stall = f"kill -STOP {os.getpid()}; sleep {1.5 * configured(14, 7)}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", stall]) as stalling:
        (completion,) = end.completions(1, wait=end.slept)
        assert stalling.wait() == 0
    assert completion.status == WcStatus.RETRY_EXC_ERR
    assert usroce.counters(end.context).timeouts - before >= 7


async def test_a_connection_to_a_stopped_process(processes: Processes, address: str) -> None:
    """Its TCP connection still looks alive: the device finds out."""
    server = processes.python("tests.usroce.silent", settings={"ADDRESS": address})
    port = int(server.line())
    config = Config(ack_timeout=15, retry_count=2, usroce_address=address)
    async with aiordma.connect("127.0.0.1", port, device="usroce0", config=config) as connection:
        inbox = await connection.remote("inbox")
        await connection.write(b"alive", inbox[:5])
        server.stop()
        started = time.monotonic()
        with pytest.raises(RetryExceededError):
            await connection.write(b"dead", inbox[:4])
        seconds = time.monotonic() - started
        assert configured(15, 2) / 2 < seconds < configured(15, 2) * 1.2 + 0.2
