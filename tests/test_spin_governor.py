"""When adaptive mode spins and when it stops: pure arithmetic, no device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiordma._native._datapath import Governor

CAP, TURNS = 50_000, 2_000_000  # ns
PROBE = 64  # one in so many is tried though it did not pay lately (native/datapath/spin.c)


def taught(*elapsed: int) -> Governor:
    governor = Governor(CAP, TURNS)
    for each in elapsed:
        governor.learn(each)
    return governor


def test_fast_completions_are_spun_for_a_little_longer_than_they_take() -> None:
    governor = taught(*[5_000] * 50)
    assert 5_000 < governor.inline_ns() < 15_000
    assert 5_000 < governor.turns_ns() < 40_000


def test_slow_completions_are_only_probed() -> None:
    governor = taught(*[300_000] * 50)
    budgets = [governor.inline_ns() for _ in range(256)]
    assert sum(budget > 0 for budget in budgets) == 256 // PROBE
    assert governor.turns_ns() > 300_000, "turns of the loop still pay"
    governor = taught(*[10_000_000] * 200)
    assert governor.turns_ns() == 0


def test_a_run_of_misses_stops_it_and_hits_bring_it_back() -> None:
    governor = taught(*[5_000] * 50)
    for _ in range(64):
        governor.hit(False)
    assert sum(governor.inline_ns() > 0 for _ in range(64)) <= 1
    for _ in range(16):
        governor.hit(True)
    assert governor.inline_ns() > 0


def test_one_outlier_does_not_end_it() -> None:
    governor = taught(*[5_000] * 50, 60_000_000_000)
    governor.learn(5_000)
    for _ in range(60):
        governor.learn(5_000)
    assert governor.inline_ns() > 0


@given(st.lists(st.one_of(st.booleans(), st.integers(0, 1 << 60)), max_size=200))
def test_never_beyond_its_caps(history: list[bool | int]) -> None:
    governor = Governor(CAP, TURNS)
    for each in history:
        if isinstance(each, bool):
            governor.hit(each)
        else:
            governor.learn(each)
        assert 0 <= governor.inline_ns() <= CAP
        assert 0 <= governor.turns_ns() <= TURNS
