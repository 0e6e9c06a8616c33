"""A network that loses, doubles, reorders and damages packets changes nothing but the time things take.

What two processes do to each other, and how it is checked, is in mixed.py. The full matrix (every fault at both
rates with 20 seeds) runs with AIORDMA_SOAK=1 and takes minutes; without it, each fault has one seed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.usroce import mixed
from tests.usroce.processes import Processes, finish

pytestmark = [pytest.mark.device, pytest.mark.usroce]

#: The faults, and the counters of each.
COUNTED = {"drop": "dropped", "duplicate": "duplicated", "reorder": "reordered", "corrupt": "corrupted"}
SEEDS = range(1, 21) if os.environ.get("AIORDMA_SOAK") else (1,)


def run_mixed(
    processes: Processes, address: str, faults: str, seed: int, *options: str
) -> list[dict[str, Any]]:
    """What the server and the client report; each has its own sequence of faults."""
    ends = [f"{faults},seed={2 * seed + end}" if faults else "" for end in range(2)]
    settings = [{"ADDRESS": address, "FAULT": fault} for fault in ends]
    options = ("--seed", str(seed), *options)
    server = processes.python("tests.usroce.mixed", "serve", *options, settings=settings[0])
    port = server.line().removeprefix("listening ")
    client = processes.python(
        "tests.usroce.mixed", "connect", "127.0.0.1", port, *options, settings=settings[1]
    )
    reports = [json.loads(output.splitlines()[-1]) for output in finish(client, server)]
    for report in reports:
        assert report["operations"] == mixed.OPERATIONS
        assert report["device"] == "usroce0"
        assert report["counters"]["rnr_naks_sent"] == 0
    return reports


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.01, 0.05])
@pytest.mark.parametrize("kind", COUNTED)
def test_one_fault(processes: Processes, address: str, kind: str, rate: float, seed: int) -> None:
    done = COUNTED[kind]
    for report in run_mixed(processes, address, f"{kind}={rate}", seed):
        counters = report["counters"]
        assert counters[f"faults_{done}"] > counters["sent"] * rate / 2
        if kind == "duplicate":
            assert counters["duplicates"] > 0
        else:
            assert counters["retransmitted"] > 0
        if kind == "corrupt":
            refused = counters["bad_icrc"] + counters["malformed"] + counters["unknown_qp"]
            assert refused > counters["received"] * rate / 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_all_faults_at_once(processes: Processes, address: str, rate: float, seed: int) -> None:
    faults = ",".join(f"{kind}={rate}" for kind in COUNTED)
    for report in run_mixed(processes, address, faults, seed):
        for done in COUNTED.values():
            assert report["counters"][f"faults_{done}"] > report["counters"]["sent"] * rate / 3


@pytest.mark.parametrize("mode", ["event", "busy"])
def test_however_completions_are_awaited(processes: Processes, address: str, mode: str) -> None:
    run_mixed(processes, address, "drop=0.02,duplicate=0.02,reorder=0.02", 1, "--mode", mode)


def test_delay(processes: Processes, address: str) -> None:
    """Some packets wait for longer than a round trip takes: late ones look like lost ones."""
    for report in run_mixed(processes, address, "delay=0.05,delay_us=2000", 1):
        assert report["counters"]["faults_delayed"] > 0


def test_without_faults_little_is_sent_twice(processes: Processes, address: str) -> None:
    """What is sent again then is what a busy processor was late to answer."""
    for report in run_mixed(processes, address, "", 1):
        counters = report["counters"]
        assert counters["naks_sent"] == counters["bad_icrc"] == counters["malformed"] == 0
        assert counters["retransmitted"] < counters["sent"] / 3
