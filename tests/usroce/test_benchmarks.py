"""python -m benchmarks runs: some of its contests, quick, for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.usroce.processes import Processes

pytestmark = [pytest.mark.device, pytest.mark.usroce]

CONTESTS = ("write-udp", "large-write", "batch", "http-latency", "import")


def test_contests_have_their_figures(processes: Processes, tmp_path: Path) -> None:
    run = ("benchmarks", "acceptance", "--quick", "--results", str(tmp_path), "--only", *CONTESTS)
    report = processes.python(*run).finish()
    found = json.loads((tmp_path / "acceptance.json").read_text(encoding="utf-8"))
    assert found["problems"] == []
    assert [contest["name"] for contest in found["contests"]] == list(CONTESTS)
    for contest in found["contests"]:
        for row in contest["criteria"]:
            assert row["own"]["median"] > 0
            assert row["met"] in (True, False)
            assert row["subject"] in report
    assert "not measured" not in report


def test_what_cannot_be_measured_is_named_with_the_reason(processes: Processes, tmp_path: Path) -> None:
    run = ("benchmarks", "acceptance", "--quick", "--results", str(tmp_path), "--device", "none0")
    report = processes.python(*run, "--only", "idle", "import").finish()
    (missing,) = [line for line in report.splitlines() if line.startswith("- idle, event, UDP: ")]
    assert "no RDMA device 'none0' on this machine" in missing
    assert "| event, UDP | not measured |" in report
    assert "| import aiordma |" in report
