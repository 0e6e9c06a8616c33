"""Measurements that others did not disturb, and what a few rounds of them are worth, whatever is measured.

A machine changes its pace within seconds, and others work on it. So a measurement during which others used the
cores is repeated, its references stand right before and right after it, and what counts is the ratio to their
mean: the median of the rounds, with the middle half of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import machine

#: A measurement is quiet while others use less of the cores.
QUIET = 0.05
#: A measurement is repeated, up to so often, while others use the cores; so long (s) all of them wait for rest.
ATTEMPTS = 3
PATIENCE = 120.0

Figures = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """The figures of one measurement, and the share of the cores that others used meanwhile."""

    figures: Figures
    others: float

    @property
    def is_quiet(self) -> bool:
        """Worth to be kept without another attempt."""
        return self.others <= QUIET


class QuietMeter:
    """Repeats what others disturbed. ``patience`` is in seconds, for all measurements together."""

    def __init__(self, patience: float = PATIENCE, attempts: int = ATTEMPTS) -> None:
        self._patience = patience
        self._attempts = attempts

    def measure(self, attempt: Callable[[], Figures]) -> Sample:
        """The first quiet one, else the quietest. What the first attempt raises is raised, what a later one does
        is dropped."""
        found: list[Sample] = []
        for _ in range(self._attempts):
            self._patience -= machine.wait_for_rest(QUIET, self._patience)
            bystanders = machine.Bystanders()
            try:
                figures = attempt()
            except Exception:
                if found:
                    break
                raise
            found.append(Sample(figures, bystanders.share()))
            if found[-1].is_quiet:
                break
        return min(found, key=lambda sample: sample.others)


@dataclass(frozen=True)
class Spread:
    """The median, and the ends of the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        ordered = sorted(values)
        quarter = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])
