"""usroce beside plain UDP, which it travels over: latency, message rate and bandwidth of C programs.

    python -m benchmarks.usroce          (make bench-usroce)

Two processes, each on a core of its own, talk over the loopback interface. verbs_pingpong.c is an ordinary
verbs program (RC) that runs on libusroce.so because that is preloaded; udp_pingpong.c does the same over
bare sockets, which lose, confuse and check nothing. Both wait either busily (polling, receiving without blocking)
or blocking (on the completion channel, in recv).

- latency: one 64-byte message there and back at a time; the median round trip.
- rate: 64 messages of 64 bytes outstanding, each echoed; messages a second. Whatever arrived together is
  answered together: by a list of work requests; over UDP by one call with UDP_SEGMENT and UDP_GRO, so
  that 64 messages are but one packet to the kernel.
- bandwidth: one way in blocks of 1 MiB, in packets of 4 KiB: RDMA WRITEs, 8 outstanding, to a target that
  polls or sleeps; over UDP with UDP_SEGMENT and UDP_GRO, at the pace of a window that loses nothing.

All is measured in one run, in alternated rounds, and in each round every program has its reference right before
and right after it: usroce's share is that of the mean of both. Virtual machines change their pace
within seconds (where the two cores share a cache and where not, copying differs by a factor of 3), and others
may work on the same machine, so a measurement whose two references disagree, or during which others were busy,
is repeated; a round without a good one in a few attempts is left out. The table shows the median of the rounds
and their range. Where others never rest, `chrt -f 1` before the command (root) keeps them off the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

if not __package__:  # python benchmarks/usroce.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, programs
from benchmarks.processes import ROOT, BenchmarkError, cores
from benchmarks.rounds import QUIET
from benchmarks.text import note, number, placement

HOST = "127.0.0.1"
LIBRARY = ROOT / "aiordma" / "_native" / "libusroce.so"
WAITS = ("busy", "blocking")

#: A measurement is repeated, up to so often, unless the references differ by less and others used less.
ATTEMPTS = 5
STEADY = 0.15
#: So long (seconds) a run waits for others to come to rest, all in all.
PATIENCE = 60.0


@dataclass(frozen=True)
class Pattern:
    """What is measured, the figure of the programs that it shows, and what usroce set out to reach."""

    name: str
    title: str
    figure: str
    unit: str
    scale: float
    target: float
    lower_is_better: bool = False

    def meets(self, ratio: float) -> bool:
        """Whether this much of plain UDP's figure is enough."""
        return ratio <= self.target if self.lower_is_better else ratio >= self.target


PATTERNS = (
    Pattern("latency", "64-byte round trip, p50", "p50_ns", "us", 1e-3, 2.0, lower_is_better=True),
    Pattern("rate", "64 messages of 64 bytes outstanding, echoed", "per_second", "1000/s", 1e-3, 0.5),
    Pattern("bandwidth", "1 MiB blocks one way", "per_second", "GB/s", 1e-9, 0.6),
)


@dataclass(frozen=True)
class Contest:
    """usroce and plain UDP at the same thing, both waiting in the same way."""

    pattern: Pattern
    wait: str

    def __str__(self) -> str:
        return f"{self.pattern.name} {self.wait}"


@dataclass(frozen=True)
class Sample:
    """usroce's figure, UDP's before and after it, and the share of the cores that others used meanwhile."""

    usroce: float
    before: float
    after: float
    others: float

    @property
    def udp(self) -> float:
        """The reference."""
        return (self.before + self.after) / 2

    @property
    def ratio(self) -> float:
        """usroce's figure as a multiple of UDP's."""
        return self.usroce / self.udp

    @property
    def unsteadiness(self) -> float:
        """By which part of it the reference changed."""
        return abs(self.before - self.after) / self.udp

    @property
    def is_good(self) -> bool:
        """Worth to be kept without another attempt."""
        return self.unsteadiness <= STEADY and self.others <= QUIET


# --- measuring ----------------------------------------------------------------------------------------------


@dataclass
class Results:
    """A sample for each round that succeeded, and why others did not."""

    samples: dict[Contest, list[Sample]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    lost: int = 0

    def kept(self, contest: Contest) -> list[Sample]:
        """The good ones; all, if none is good."""
        samples = self.samples[contest]
        return [sample for sample in samples if sample.is_good] or samples


class Benchmark:
    """One run: the rounds, the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results()
        self.pin = cores(pin=True)
        self._patience = PATIENCE
        contests = [Contest(pattern, wait) for pattern in PATTERNS for wait in WAITS]
        self.contests = [contest for contest in contests if options.only in str(contest)]
        preload = [str(options.library), os.environ.get("LD_PRELOAD", "")]
        # Over UDP, as what it is compared with, unless the environment has an opinion.
        self.preloaded = {
            "AIORDMA_USROCE_SHM": "0",
            **os.environ,
            "LD_PRELOAD": " ".join(filter(None, preload)),
        }

    def run(self) -> None:
        """All rounds."""
        self.udp = programs.build("udp_pingpong")
        self.verbs = programs.build("verbs_pingpong")
        for turn in range(1, self.options.rounds + 1):
            for contest in self.contests:
                self._measure(contest)
            note(f"round {turn} of {self.options.rounds}")

    def _measure(self, contest: Contest) -> None:
        """One round's sample: the first good one, else the steadiest. The last failure is shown in the report."""
        found: list[Sample] = []
        for _ in range(ATTEMPTS):
            self._patience -= machine.wait_for_rest(QUIET, self._patience)
            try:
                found.append(self._attempt(contest))
            except (BenchmarkError, OSError) as error:
                if str(contest) not in self.results.problems:
                    note(f"{contest}: {error}")
                self.results.problems[str(contest)] = str(error)
                continue
            if found[-1].is_good:
                break
        if found:
            best = min(found, key=lambda sample: (not sample.is_good, sample.unsteadiness + sample.others))
            self.results.samples.setdefault(contest, []).append(best)

    def _attempt(self, contest: Contest) -> Sample:
        """UDP, usroce, UDP."""
        self.results.attempts += 1
        bystanders = machine.Bystanders()
        before, usroce, after = (run(contest) for run in (self._run_udp, self._run_usroce, self._run_udp))
        return Sample(usroce, before, after, bystanders.share())

    def _run_udp(self, contest: Contest) -> float:
        argv = [str(self.udp), contest.pattern.name, contest.wait, str(self.options.seconds)]
        figures = programs.figures(programs.run_pair(argv, HOST, self.pin))
        self.results.lost += int(figures.get("lost", 0))
        return figures[contest.pattern.figure] * contest.pattern.scale

    def _run_usroce(self, contest: Contest) -> float:
        argv = [str(self.verbs), self.options.device, str(self.options.gid_index)]
        argv += [contest.pattern.name, contest.wait, str(self.options.seconds)]
        figures = programs.figures(programs.run_pair(argv, HOST, self.pin, self.preloaded))
        return figures[contest.pattern.figure] * contest.pattern.scale


# --- the report ---------------------------------------------------------------------------------------------


def header(benchmark: Benchmark) -> list[str]:
    """Machine, settings, and how quiet it was."""
    options, results = benchmark.options, benchmark.results
    facts = dict(machine.describe())
    facts["pinned"] = placement(benchmark.pin)
    facts["settings"] = f"{options.rounds} rounds, {options.seconds:g} s for each program"
    kept = [sample for contest in results.samples for sample in results.kept(contest)]
    if kept:
        change = max(sample.unsteadiness for sample in kept)
        others = max(sample.others for sample in kept)
        facts["samples"] = (
            f"{len(kept)} kept of {results.attempts} attempts; in the worst of them UDP changed by {change:.0%} "
            f"and others used {others:.0%} of the cores"
        )
    facts["packets that UDP lost"] = str(results.lost)
    return ["# usroce beside plain UDP", "", *(f"- {name}: {value}" for name, value in facts.items())]


def summary(values: list[float]) -> str:
    """Median, and the range in brackets."""
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def table_rows(results: Results, pattern: Pattern) -> Iterator[str]:
    """The rows of one pattern."""
    for contest in results.samples:
        if contest.pattern == pattern:
            samples = results.kept(contest)
            cells = [contest.wait, summary([sample.usroce for sample in samples])]
            cells += [summary([sample.udp for sample in samples])]
            cells += [summary([sample.ratio for sample in samples]), verdict(contest, samples)]
            yield f"| {' | '.join(cells)} |"


def verdict(contest: Contest, samples: list[Sample]) -> str:
    """The target and whether the median ratio meets it."""
    pattern = contest.pattern
    met = pattern.meets(statistics.median(sample.ratio for sample in samples))
    return f"{'<=' if pattern.lower_is_better else '>='} {pattern.target:g} x: {'met' if met else 'NOT met'}"


def report(benchmark: Benchmark) -> str:
    """The whole report as markdown."""
    results = benchmark.results
    lines = header(benchmark)
    for pattern in PATTERNS:
        rows = list(table_rows(results, pattern))
        if rows:
            lines += ["", f"## {pattern.name}: {pattern.title} ({pattern.unit})", ""]
            lines += ["| waiting | usroce | UDP | usroce / UDP | target |", "|---|---:|---:|---:|---|", *rows]
    lines += [""] if results.problems else []
    for name, problem in results.problems.items():
        lines.append(f"At least one attempt failed: {name}: {problem}")
    return "\n".join(lines)


def write_json(path: Path, benchmark: Benchmark) -> None:
    """Facts and figures for other programs."""
    options, results = benchmark.options, benchmark.results
    rows = [
        {
            "pattern": contest.pattern.name,
            "wait": contest.wait,
            "unit": contest.pattern.unit,
            "target": verdict(contest, results.kept(contest)),
            "median_ratio": statistics.median(sample.ratio for sample in results.kept(contest)),
            "rounds": [asdict(sample) | {"kept": sample in results.kept(contest)} for sample in samples],
        }
        for contest, samples in results.samples.items()
    ]
    document = {
        "machine": machine.describe(),
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "device": options.device},
        "rows": rows,
        "lost": results.lost,
        "problems": results.problems,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


# --- the command --------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.usroce", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each program; default 0.3")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='contests with this in their name, as "rate busy"'
    )
    parser.add_argument("--device", default="usroce0")
    parser.add_argument("--gid-index", type=int, default=0)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="libusroce.so; default: the checkout's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every round and ratio, as JSON")
    options = parser.parse_args()
    if options.rounds < 1 or not 0 < options.seconds <= 30:
        parser.error("--rounds is at least 1, --seconds above 0 and at most 30")
    if not options.library.exists():
        parser.error(f"there is no {options.library}: python3 tools/setup.py builds it")
    options.library = options.library.resolve()
    return options


def main() -> int:
    try:
        benchmark = Benchmark(parse())
        with contextlib.suppress(KeyboardInterrupt):  # the rounds so far are worth a table
            benchmark.run()
    except BenchmarkError as error:
        note(f"benchmarks.usroce: {error}")
        return 1
    print(report(benchmark))
    if benchmark.options.json:
        write_json(benchmark.options.json, benchmark)
    return 0 if benchmark.results.samples else 1


if __name__ == "__main__":
    sys.exit(main())
