"""The results of benchmarks.messaging, and what is said of them: tables of medians and ratios, or JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine
from benchmarks.peers.contestants import REFERENCE
from benchmarks.rounds import Sample
from benchmarks.text import number, placement


@dataclass(frozen=True)
class Scenario:
    """What is measured, the figure that contestants are compared by, and what stands beside it."""

    name: str
    title: str
    figure: str
    unit: str
    scale: float
    per: str
    beside: str | None = None


SCENARIOS = (
    Scenario("latency", "64 bytes there and back, one at a time", "p50_us", "p50 us", 1, "request", "p99_us"),
    Scenario("rate", "64 bytes there and back, 64 tasks", "per_second", "1000 requests/s", 1e-3, "request"),
    Scenario("throughput", "1 MiB one way", "gb_per_s", "GB/s", 1, "block"),
)


@dataclass(frozen=True)
class Compared:
    """A sample, and the reference before and after it."""

    sample: Sample
    before: Sample
    after: Sample

    @property
    def is_quiet(self) -> bool:
        """All three of them."""
        return all(sample.is_quiet for sample in (self.sample, self.before, self.after))

    def ratio(self, figure: str) -> float:
        """To the mean of the references."""
        return 2 * self.sample.figures[figure] / (self.before.figures[figure] + self.after.figures[figure])

    def unsteadiness(self, figure: str) -> float:
        """By which part of it the reference changed."""
        before, after = self.before.figures[figure], self.after.figures[figure]
        return 2 * abs(before - after) / (before + after)


Rows = dict[tuple[Scenario, str], list[Compared]]


@dataclass
class Results:
    """What each contestant did in the rounds of a scenario, and why others did nothing."""

    rows: Rows = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    problems: dict[tuple[Scenario, str], list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        scenario: Scenario,
        name: str,
        sample: Sample | None,
        before: Sample | None,
        after: Sample | None,
    ) -> None:
        """One round's; nothing if one of them is missing."""
        if sample and before and after:
            self.rows.setdefault((scenario, name), []).append(Compared(sample, before, after))

    def fail(self, scenario: Scenario, name: str, reason: str) -> None:
        """A measurement that broke off."""
        self.problems.setdefault((scenario, name), []).append(reason)

    def failures(self, scenario: Scenario, name: str) -> int:
        """So often, if it has never worked."""
        key = scenario, name
        return 0 if key in self.rows else len(self.problems.get(key, ()))

    def kept(self, scenario: Scenario, name: str) -> list[Compared]:
        """The quiet ones; all, if none is quiet."""
        samples = self.rows[scenario, name]
        return [sample for sample in samples if sample.is_quiet] or samples


# --- markdown -----------------------------------------------------------------------------------------------


def facts(
    options: argparse.Namespace, pin: tuple[int | None, int | None], results: Results
) -> dict[str, str]:
    """Machine, versions, settings, and how steady it was."""
    found = dict(machine.describe())
    versions = {"python": platform.python_version(), "uvloop": importlib.metadata.version("uvloop")}
    versions |= results.versions
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    found["pinned"] = placement(pin)
    found["settings"] = f"{options.rounds} rounds of {options.seconds:g} s, {options.device}"
    for scenario in SCENARIOS:
        kept = [one for key in results.rows if key[0] is scenario for one in results.kept(*key)]
        if kept:
            change = statistics.median(one.unsteadiness(scenario.figure) for one in kept)
            worst = max(one.unsteadiness(scenario.figure) for one in kept)
            found[f"reference, {scenario.name}"] = (
                f"between two measurements it changed by {change:.0%} (median; at most {worst:.0%})"
            )
    return found


def cells(results: Results, scenario: Scenario, name: str) -> list[str]:
    """One row of a table."""
    kept = results.kept(scenario, name)

    def median(value: Callable[[Compared], float]) -> float:
        return statistics.median(map(value, kept))

    values = [one.sample.figures[scenario.figure] * scenario.scale for one in kept]
    row = [name, number(statistics.median(values)), f"{number(min(values))} to {number(max(values))}"]
    row.append("1" if name == REFERENCE.name else f"{median(lambda one: one.ratio(scenario.figure)):.2f}")
    row.append(number(median(lambda one: one.sample.figures["cpu_us"])))
    if scenario.beside:
        beside = scenario.beside
        row.append(number(median(lambda one: one.sample.figures[beside])))
    quiet = sum(one.is_quiet for one in results.rows[scenario, name])
    return [*row, f"{quiet} of {len(results.rows[scenario, name])}"]


def table(results: Results, scenario: Scenario) -> Iterator[str]:
    """Heading and rows."""
    names = [name for one, name in results.rows if one is scenario]
    if not names:
        return
    titles = ["", scenario.unit, "range", f"x {REFERENCE.name}", f"CPU us/{scenario.per}"]
    titles += [scenario.beside.replace("_", " ")] if scenario.beside else []
    titles.append("quiet")
    yield from ("", f"## {scenario.name}: {scenario.title}", "", f"| {' | '.join(titles)} |")
    yield "|---" + "|---:" * (len(titles) - 1) + "|"
    for name in sorted(names, key=lambda name: name != REFERENCE.name):
        yield f"| {' | '.join(cells(results, scenario, name))} |"


def report(found: dict[str, str], results: Results) -> str:
    """The whole report as markdown."""
    lines = ["# Messages between two services", "", *(f"- {name}: {value}" for name, value in found.items())]
    for scenario in SCENARIOS:
        lines += table(results, scenario)
    missing = [f"- {name}: {reason}" for name, reason in results.unavailable.items()]
    for (scenario, name), reasons in results.problems.items():
        failed = "failed once" if len(reasons) == 1 else f"failed {len(reasons)} times, the last"
        missing.append(f"- {name}, {scenario.name}: {failed}: {reasons[-1]}")
    return "\n".join([*lines, *(["", "## Missing", "", *missing] if missing else [])])


# --- JSON ---------------------------------------------------------------------------------------------------


def write_json(path: Path, found: dict[str, str], results: Results) -> None:
    """Facts and figures for other programs."""
    rows = [
        {
            "scenario": scenario.name,
            "name": name,
            "rounds": [
                one.sample.figures | {"ratio": one.ratio(scenario.figure), "quiet": one.is_quiet}
                for one in samples
            ],
            "median_ratio": statistics.median(
                one.ratio(scenario.figure) for one in results.kept(scenario, name)
            ),
        }
        for (scenario, name), samples in results.rows.items()
    ]
    problems = [
        {"scenario": scenario.name, "name": name, "reasons": reasons}
        for (scenario, name), reasons in results.problems.items()
    ]
    document = {"facts": found, "reference": REFERENCE.name, "rows": rows}
    document |= {"unavailable": results.unavailable, "problems": problems}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
