"""Peers on one host share memory, by themselves; where they may not, UDP carries the same."""

from __future__ import annotations

import hashlib

import pytest

from aiordma.verbs import usroce
from aiordma.verbs.usroce import Fault
from tests.usroce.conftest import Target
from tests.usroce.ends import End
from tests.usroce.processes import Processes

pytestmark = [pytest.mark.device, pytest.mark.usroce]

DATA = bytes(range(256)) * 64


def exchange(end: End) -> None:
    for round in range(20):
        end.write(DATA[: 600 * round + 1], 100, local=1 << 15)
        assert end.read(600 * round + 1, 100) == DATA[: 600 * round + 1]
    assert end.fetch_add(5, 0) == 0
    assert end.read(8) == (5).to_bytes(8, "little")


def test_peers_on_one_host_share_memory(target: Target) -> None:
    target.connect()
    exchange(target.end)
    counters = usroce.counters(target.end.context)
    assert counters.shm_peers == 1
    assert counters.shm_sent > 0
    assert counters.shm_received > 0
    assert counters.shm_refused == 0
    assert counters.direct > 0


def test_one_sided_operations_do_not_need_the_peers_processor(target: Target) -> None:
    """As with a card: even a process that is stopped is written to and read from."""
    target.connect()
    exchange(target.end)
    before = usroce.counters(target.end.context)
    target.process.stop()
    target.end.write(DATA, 100, local=1 << 15)
    assert target.end.read(len(DATA), 100) == DATA
    after = usroce.counters(target.end.context)
    assert (after.direct - before.direct, after.sent - before.sent) == (2, 0)


def test_packets_where_one_end_wants_them(processes: Processes, address: str) -> None:
    with usroce.options(address=address):
        context = usroce.usroce_device().open()
    with context:
        settings = {"ADDRESS": address, "DIRECT": "0"}
        target = Target(processes.python("tests.usroce.target", settings=settings), End(context))
        target.connect()
        exchange(target.end)
        assert usroce.counters(context).direct == 0


@pytest.mark.parametrize("off", ["here", "there", "both"])
def test_udp_where_one_end_has_none(processes: Processes, address: str, off: str) -> None:
    with usroce.options(address=address, shm="1" if off == "there" else "0"):
        context = usroce.usroce_device().open()
    settings = {"ADDRESS": address, "SHM": "1" if off == "here" else "0"}
    with context:
        target = Target(processes.python("tests.usroce.target", settings=settings), End(context))
        target.connect()
        exchange(target.end)
        counters = usroce.counters(context)
        assert (counters.shm_peers, counters.shm_sent, counters.shm_received, counters.shm_refused) == (
            0,
        ) * 4


def test_faults_happen_to_what_goes_through_memory(target: Target) -> None:
    """Damage is found by the ICRC, which frames in memory do without otherwise."""
    usroce.set_fault(target.end.context, Fault(drop=0.02, corrupt=0.1, duplicate=0.05, reorder=0.05, seed=1))
    target.connect()
    for _ in range(20):
        exchange_once(target.end)
    counters = usroce.counters(target.end.context)
    assert counters.faults_corrupted > 0
    assert counters.retransmitted > 0
    assert counters.shm_sent > 0


def exchange_once(end: End) -> None:
    end.write(DATA, 1000, local=1 << 15)
    assert hashlib.sha256(end.read(len(DATA), 1000)).digest() == hashlib.sha256(DATA).digest()
