"""Times as a histogram: what percentiles and bars are made of, in memory that does not grow. No I/O.

Buckets are exact up to 255 ns; above, each power of two has 128, so a bucket is at most 0.8 % wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: What is shown of a distribution: name and share of the times at or below.
PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))

_SUB_BITS = 7
_BUCKETS = (64 - _SUB_BITS) << _SUB_BITS
#: An eighth of a character more each.
_BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Row:
    """One bar: times from ``low`` to below ``high`` (ns, None: whatever is above)."""

    low: int
    high: int | None
    count: int


class Histogram:
    """Times in nanoseconds, 0 to 2**63 - 1. ``min`` and ``max`` are exact."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.total = 0
        self.min = 0
        self.max = 0

    def record(self, ns: int) -> None:
        """One time more."""
        shift = ns.bit_length() - _SUB_BITS - 1
        self._counts[(shift << _SUB_BITS) + (ns >> shift) if shift > 0 else ns] += 1
        if not self.count or ns < self.min:
            self.min = ns
        if ns > self.max:
            self.max = ns
        self.count += 1
        self.total += ns

    @property
    def mean(self) -> float:
        """0 when there is nothing."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, share: float) -> int:
        """The time that this share (0 to 1) of all does not exceed, to the width of a bucket; 0 when there is
        nothing."""
        if share >= 1:
            return self.max
        left = share * self.count
        for index, count in self._filled():
            left -= count
            if left <= 0:
                middle = (_low(index) + _low(index + 1)) // 2
                return max(self.min, min(middle, self.max))
        return self.max

    def rows(self, limit: int) -> list[Row]:
        """At most ``limit`` (from 2) bars of about equal width on a logarithmic scale; the last one is whatever is
        above the 99.9th percentile's bar, if there is anything."""
        if not self.count:
            return []
        first, last = _index(self.min), _index(self.percentile(0.999))
        step = -(-(last - first + 1) // (limit - 1))
        edges = range(first, last + 1, step)
        sums = [0] * (len(edges) + 1)
        for index, count in self._filled():
            sums[min((index - first) // step, len(edges))] += count
        rows = [Row(max(self.min, _low(e)), _low(e + step), n) for e, n in zip(edges, sums, strict=False)]
        return [*rows, Row(_low(edges[-1] + step), None, sums[-1])] if sums[-1] else rows

    def _filled(self) -> Iterator[tuple[int, int]]:
        return ((index, count) for index, count in enumerate(self._counts) if count)


def _index(ns: int) -> int:
    shift = ns.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (ns >> shift) if shift > 0 else ns


def _low(index: int) -> int:
    """The least time of a bucket."""
    shift = max(0, (index >> _SUB_BITS) - 1)
    return (index - (shift << _SUB_BITS)) << shift


# --- for people ---------------------------------------------------------------------------------------


def duration(ns: float) -> str:
    """``12.3 us``: three digits and a unit."""
    for limit, unit in ((1e3, "ns"), (1e6, "us"), (1e9, "ms")):
        if ns < limit:
            return f"{digits(ns * 1e3 / limit)} {unit}"
    return f"{digits(ns / 1e9)} s"


def digits(value: float) -> str:
    """To three digits, or whole."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percentile_lines(histogram: Histogram) -> list[str]:
    """Two lines: names, and times in columns."""
    cells = [("min", histogram.min), *((name, histogram.percentile(share)) for name, share in PERCENTILES)]
    columns = [(name, duration(ns)) for name, ns in [*cells, ("max", histogram.max)]]
    return ["  ".join(cell.rjust(9) for cell in line).rstrip() for line in zip(*columns, strict=True)]


def bar_lines(histogram: Histogram, width: int, *, unicode: bool, limit: int = 12) -> list[str]:
    """A bar a line, ``width`` characters at most: of block elements, or of ``#``."""
    rows = histogram.rows(limit)
    most = max((row.count for row in rows), default=0)
    labels = [f"{'>' if row.high is None else ' '}{duration(row.low):>9}" for row in rows]
    room = max(4, width - 11 - len(f" {most} "))
    return [
        f"{label} {bar(row.count / most, room, unicode=unicode)} {row.count}"
        for label, row in zip(labels, rows, strict=True)
    ]


def bar(share: float, width: int, *, unicode: bool) -> str:
    """A bar of that share (0 to 1) of ``width`` characters, filled with blanks; whatever is there is seen."""
    if not unicode:
        return ("#" * max(round(share * width), share > 0)).ljust(width)
    eighths = max(round(share * width * 8), share > 0)
    full, rest = divmod(eighths, 8)
    return (_BLOCKS[8] * full + (_BLOCKS[rest] if rest else "")).ljust(width)
