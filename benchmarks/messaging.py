"""Messages between two services: aiordma beside what they are written with today.

    python -m benchmarks.messaging          (make bench-messaging)

Two processes on one machine, each on a core of its own, talk over the loopback interface: aiordma over usroce,
the others over TCP. Each contestant is a small file in benchmarks/peers; what is asked, timed and checked is
the same for all of them (benchmarks/peers/worker.py). A server answers a small message with the same message,
one after the other on a connection, and drops large ones.

- latency: a message of 64 bytes there and back, one at a time: p50 and p99.
- rate: 64 tasks, each waits for the answer to its own request: requests a second.
- throughput: messages of 1 MiB one way, up to 8 being sent at a time, until the server has them all.

Processor time is that of both processes, all their threads, for each request or block: polling has its price.

All is measured in one run, in alternated rounds (A B C ..., A B C ...), and every measurement has processes of
its own, which end with it: nothing of ours runs beside. The reference, uvloop's streams, is measured again after
every third contestant, for machines change their pace within seconds: a ratio is that to the mean of the
reference before and after. The tables show medians of the rounds. A measurement during which others used the cores
is repeated; a round that did not get quiet counts only where there is no quiet one. The column "quiet" says how
many were.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

if not __package__:  # python benchmarks/messaging.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import messaging_report
from benchmarks.messaging_report import SCENARIOS, Results, Scenario
from benchmarks.peers import driver
from benchmarks.peers.contestants import REFERENCE, Contestant, contestants
from benchmarks.peers.interface import Unavailable
from benchmarks.processes import BenchmarkError, cores
from benchmarks.rounds import QuietMeter, Sample
from benchmarks.text import note

#: The reference is measured again after so many contestants.
REFERENCE_EVERY = 3
#: One that has never worked is not asked again after so many failures in a scenario.
FAILURES = 2


def groups(everyone: list[Contestant], size: int) -> Iterator[list[Contestant]]:
    """One after the other, so many at a time; one empty group if there is nobody."""
    rest = iter(everyone)
    group = list(islice(rest, size))
    yield group
    while group := list(islice(rest, size)):
        yield group


class Benchmark:
    """One run: the rounds, the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pin = cores(pin=True)
        self.results = Results()
        self.scenarios = [scenario for scenario in SCENARIOS if scenario.name in options.scenarios]
        self.contestants = chosen(contestants(options.device), options.only)
        self._meter = QuietMeter(0.0, 1) if options.quick else QuietMeter()

    def run(self) -> None:
        """All rounds."""
        for number in range(1, self.options.rounds + 1):
            started = time.monotonic()
            for scenario in self.scenarios:
                self._round(scenario)
            note(f"round {number} of {self.options.rounds}: {time.monotonic() - started:.0f} s")

    def _round(self, scenario: Scenario) -> None:
        before = self._measure(scenario, REFERENCE)
        for group in groups(self.contestants, REFERENCE_EVERY):
            samples = [(contestant.name, self._measure(scenario, contestant)) for contestant in group]
            after = self._measure(scenario, REFERENCE)
            for name, sample in samples:
                self.results.add(scenario, name, sample, before, after)
            self.results.add(scenario, REFERENCE.name, before, before, after)
            before = after

    def _measure(self, scenario: Scenario, contestant: Contestant) -> Sample | None:
        """A quiet one, if possible. Why there is none is kept for the report."""
        results, name = self.results, contestant.name
        if name in results.unavailable or results.failures(scenario, name) >= FAILURES:
            return None
        try:
            return self._meter.measure(lambda: self._attempt(scenario, contestant))
        except Unavailable as error:
            note(f"{name} cannot take part: {error}")
            results.unavailable[name] = str(error)
        except (BenchmarkError, OSError) as error:
            note(f"{name}, {scenario.name}: {error}")
            results.fail(scenario, name, str(error))
        return None

    def _attempt(self, scenario: Scenario, contestant: Contestant) -> dict[str, float]:
        figures, versions = driver.measure(contestant, scenario.name, self.options.seconds, self.pin)
        self.results.versions |= versions
        return figures


def chosen(everyone: Iterable[Contestant], only: list[str]) -> list[Contestant]:
    """Those with one of the texts in their name; all, if there is none."""
    return [one for one in everyone if not only or any(text in one.name for text in only)]


# --- the command --------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.messaging", description=description)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement; default 0.5")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contestants with one of these in their name"
    )
    parser.add_argument(
        "--scenarios", nargs="+", default=names, choices=names, metavar="SCENARIO", help=" ".join(names)
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it work?")
    parser.add_argument("--list", action="store_true", help="the names of the contestants")
    parser.add_argument("--device", default="usroce0", help="aiordma's; default usroce0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every round, as JSON")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, min(options.seconds, 0.05)
    if options.rounds < 1 or not 0 < options.seconds <= 30:
        parser.error("--rounds is at least 1, --seconds above 0 and at most 30")
    return options


def main() -> int:
    options = parse()
    if options.list:
        print("\n".join(one.name for one in [REFERENCE, *chosen(contestants(options.device), options.only)]))
        return 0
    benchmark = Benchmark(options)
    with contextlib.suppress(KeyboardInterrupt):  # the rounds so far are worth a table
        benchmark.run()
    facts = messaging_report.facts(options, benchmark.pin, benchmark.results)
    print(messaging_report.report(facts, benchmark.results))
    if options.json:
        messaging_report.write_json(options.json, facts, benchmark.results)
    return 0 if benchmark.results.rows else 1


if __name__ == "__main__":
    sys.exit(main())
