"""What bench and ping are made of, without a device: times in a histogram, figures as text, options."""

from __future__ import annotations

import argparse
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordma.cli import bench, main, ping
from aiordma.cli.bench_client import OPERATIONS, Job, Outcome
from aiordma.cli.bench_server import KEY, VERSION, Setup
from aiordma.cli.histogram import (
    PERCENTILES,
    Histogram,
    bar,
    bar_lines,
    digits,
    duration,
    percentile_lines,
)
from aiordma.cli.options import address, address_text, nbytes, seconds, sizes
from aiordma.errors import ConnectionLostError

times = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=200)


def histogram_of(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


class TestHistogram:
    @given(times, st.floats(0.001, 1))
    def test_a_percentile_is_right_to_a_hundredth(self, values: list[int], share: float) -> None:
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        assert histogram_of(values).percentile(share) == pytest.approx(exact, rel=0.01, abs=1)

    @given(times)
    def test_ends_and_mean_are_exact(self, values: list[int]) -> None:
        histogram = histogram_of(values)
        assert (histogram.min, histogram.max, histogram.count) == (min(values), max(values), len(values))
        assert histogram.mean == sum(values) / len(values)
        assert histogram.percentile(1) == max(values)

    @given(times, st.integers(2, 30))
    def test_rows_hold_every_time_once_and_in_order(self, values: list[int], limit: int) -> None:
        rows = histogram_of(values).rows(limit)
        assert 1 <= len(rows) <= limit
        assert sum(row.count for row in rows) == len(values)
        assert rows[0].low == min(values)
        for row, following in itertools.pairwise(rows):
            assert row.high == following.low
            assert row.count == sum(row.low <= value < following.low for value in values)

    def test_an_outlier_does_not_flatten_the_rest(self) -> None:
        chosen = random.Random(1)
        values = [chosen.randrange(10_000, 20_000) for _ in range(5000)]
        rows = histogram_of([*values, 5_000_000_000]).rows(12)
        assert rows[-1].high is None
        assert rows[-1].count < 10
        assert sum(row.count > 0 for row in rows[:-1]) > 5

    def test_nothing(self) -> None:
        empty = Histogram()
        assert (empty.percentile(0.5), empty.mean, empty.rows(5), bar_lines(empty, 80, unicode=True)) == (
            *(0, 0, []),
            [],
        )


class TestText:
    @pytest.mark.parametrize(
        ("ns", "text"),
        [
            (0, "0 ns"),
            (999, "999 ns"),
            (1234, "1.23 us"),
            (45_678, "45.7 us"),
            (2_500_000, "2.50 ms"),
            (3e9, "3 s"),
        ],
    )
    def test_duration(self, ns: float, text: str) -> None:
        assert duration(ns) == text

    def test_rates(self) -> None:
        assert bench.thousands(950) == "950"
        assert bench.thousands(51_234) == "51.2 k"
        assert bench.thousands(2_345_000) == "2.35 M"
        assert bench.bandwidth(3_280_000) == "3.28 MB/s"
        assert bench.bandwidth(12_300_000_000) == "12.3 GB/s"
        assert bench.bandwidth(0) == "-"
        assert digits(0.123) == "0.12"

    @pytest.mark.parametrize("unicode", [False, True])
    @given(values=times, width=st.integers(40, 120))
    def test_bars_keep_to_the_width(self, values: list[int], width: int, unicode: bool) -> None:
        lines = bar_lines(histogram_of(values), width, unicode=unicode)
        assert max(map(len, lines)) <= width
        assert unicode or all(line.isascii() for line in lines)

    def test_a_single_one_is_seen(self) -> None:
        assert bar(1e-9, 10, unicode=True).strip() == "▏"
        assert bar(1e-9, 10, unicode=False) == "#".ljust(10)
        assert bar(0.5, 4, unicode=True) == "██  "
        assert bar(0, 4, unicode=True) == " " * 4

    def test_percentiles_in_columns(self) -> None:
        names, values = percentile_lines(histogram_of([1000, 2000, 3000]))
        assert names.split() == ["min", *(name for name, _ in PERCENTILES), "max"]
        assert values.split()[:2] == ["1", "us"]


class TestOutcome:
    def outcome(self, operation: str = "echo") -> Outcome:
        made = Outcome(Job(operation, 1000), histogram_of([10_000] * 500), elapsed=0.01)
        made.usage = {"client": {"cpu": 0.005, "spin": 0.0025}}
        return made

    def test_figures(self) -> None:
        one = self.outcome()
        assert one.rate == 50_000
        assert one.bandwidth == 50_000_000
        assert one.cpu_us("client") == pytest.approx(10)
        assert one.spin_share("client") == pytest.approx(0.25)
        assert one.cpu_us("server") is None
        assert self.outcome("fetch-add").bandwidth == 0

    def test_text(self) -> None:
        text = "\n".join(bench.outcome_lines(self.outcome(), "host:1"))
        assert "echo, 1000 bytes, 1 outstanding on 1 connection: 500 in 10 ms" in text
        assert "50 k operations/s" in text
        assert "50 MB/s each way" in text
        assert "client 10 us an operation" in text
        assert "client 25% of the time" in text

    def test_what_broke_off_says_so(self) -> None:
        one = self.outcome()
        one.problem = ConnectionLostError("gone")
        assert "(broken off)" in bench.outcome_lines(one, "host:1")[0]
        assert bench.as_json(one)["error"] == "gone"

    def test_as_many_operations_in_the_help_as_can_be_measured(self) -> None:
        assert set(bench._OPERATIONS) == set(OPERATIONS)

    def test_pings(self) -> None:
        pings = ping.Pings(sent=3, bootstrap=0.01, times=[1000, 3000])
        assert ping.summary_lines(pings, "host:1")[-2:] == [
            "3 sent, 2 received",
            "round trip min/p50/avg/max/mdev = 1 us/2 us/2 us/3 us/1 us",
        ]
        assert ping.as_json(ping.Pings(sent=1), "host:1")["round_trip_us"] is None


class TestOptions:
    def test_addresses(self) -> None:
        assert address("[::1]:7471") == ("::1", 7471)
        assert address_text("::1", 7471) == "[::1]:7471"
        assert address_text("host", 1) == "host:1"

    def test_sizes(self) -> None:
        assert sizes("64,4KiB,1M, 1 GiB") == [64, 4096, 1 << 20, 1 << 30]

    @pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "2GiB", "1 TiB", "64,", "x"])
    def test_no_sizes(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError):
            sizes(text)
        with pytest.raises(argparse.ArgumentTypeError):
            nbytes(text)

    @pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", "86401"])
    def test_no_times(self, text: str) -> None:
        with pytest.raises(argparse.ArgumentTypeError):
            seconds(text)

    def test_both_ends_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "--serve", "127.0.0.1:1", "127.0.0.1:1"]) == 1
        assert "one of them" in capsys.readouterr().err

    def test_a_core_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "127.0.0.1:1", "--core", "100000"]) == 1
        assert "--core 100000: this process may use" in capsys.readouterr().err


class TestSetup:
    def test_there_and_back(self) -> None:
        setup = Setup("target", 4096, "write")
        assert Setup.decode(setup.encode()) == setup

    @pytest.mark.parametrize(
        "message",
        [
            *(b"", b"hello", b"[1]", b"{}", b"\xff" * 10, b"[" * 4000, b" " * 5000),
            b'{"%s": 2, "role": "echo"}' % KEY.encode(),
            b'{"%s": %d, "role": "root"}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": ["echo"]}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": "target", "size": 0}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": "target", "size": true}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": "target", "size": 1e400}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": "target", "access": "all"}' % (KEY.encode(), VERSION),
            b'{"%s": %d, "role": "target", "access": {}}' % (KEY.encode(), VERSION),
        ],
    )
    def test_nonsense_is_refused(self, message: bytes) -> None:
        with pytest.raises(ValueError, match=r"\S"):
            Setup.decode(message)
