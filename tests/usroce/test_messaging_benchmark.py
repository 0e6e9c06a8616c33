"""benchmarks.messaging runs, on contestants that need no package beside those of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.usroce.processes import Processes

pytestmark = [pytest.mark.device, pytest.mark.usroce]

REFERENCE = "uvloop streams, TCP"
OTHERS = ("uvloop Protocol, TCP", "aiordma messages, adaptive (asyncio)")
SCENARIOS = {"latency": "p50_us", "rate": "per_second", "throughput": "gb_per_s"}


def test_every_scenario_has_its_figures(processes: Processes, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    run = ("benchmarks.messaging", "--quick", "--only", *OTHERS, "--json", str(results))
    report = processes.python(*run).finish()
    assert "Missing" not in report
    found = json.loads(results.read_text(encoding="utf-8"))
    for name in (REFERENCE, *OTHERS):
        for scenario, figure in SCENARIOS.items():
            (row,) = [
                row for row in found["rows"] if row["scenario"] == scenario and row["name"].startswith(name)
            ]
            assert row["median_ratio"] > 0
            assert all(one["count"] > 0 and one["cpu_us"] > 0 and one[figure] > 0 for one in row["rounds"])


def test_whoever_cannot_take_part_is_named_with_the_reason(processes: Processes) -> None:
    run = ("benchmarks.messaging", "--quick", "--scenarios", "latency", "--device", "none0")
    report = processes.python(*run, "--only", "messages, event (asyncio)").finish()
    assert f"| {REFERENCE} |" in report
    assert "- aiordma messages, event (asyncio), latency: failed once: " in report
    assert "none0" in report
