"""Latency of single operations: C, aiordma, naive add_reader, pyverbs and TCP, side by side.

    python -m benchmarks.core            python -m tools.rxe run -- python -m benchmarks.core

Two processes on one machine talk over one device. Everything is measured in the same run, in alternated
rounds (A B C ..., A B C ...). Each round gives the median of operations done one after the other; the table
shows the median of the round medians and their range. Processes and queues are made before the clock starts;
what is timed runs from the end of one operation to the end of the next.

Rows: C is verbs_lat.c, which does what the await does (one signaled request, its own completion): polled at both
ends, polled while the target of a write or read is asleep, and blocking (event). perftest
measures writes and sends as half of a ping-pong, so its figures stand apart, as a check on the order of
magnitude. Between the measured sessions no process of ours runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # python benchmarks/core.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, programs
from benchmarks.processes import BenchmarkError, WorkerPair, cores
from benchmarks.text import note, placement

LOOPS = ("asyncio", "uvloop")
MODES = ("busy", "adaptive", "event")
OPERATIONS = ("write", "read", "echo")
LONG_SPIN_US = 1000
START_DEADLINE = 90.0
SESSION_DEADLINE = 75.0

#: Name of a contender, and the operation.
Key = tuple[str, str]


@dataclass(frozen=True)
class Contender:
    """A session of the Python workers that is measured once in each round."""

    name: str
    worker: str
    command: dict[str, Any]


@dataclass
class Results:
    """Round medians in ns, and why rows are missing."""

    rounds: dict[Key, list[float]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, operation: str, median_ns: float) -> None:
        """One round's median."""
        self.rounds.setdefault((name, operation), []).append(median_ns)

    def median(self, name: str, operation: str) -> float | None:
        """Median of the round medians in ns."""
        values = self.rounds.get((name, operation))
        return statistics.median(values) if values else None


# --- who takes part -----------------------------------------------------------------------------------------


def aiordma_contenders(loop: str) -> list[Contender]:
    """The modes with the default Config, then those that spin with a longer spin."""
    found = []
    for spin_us, modes in ((None, MODES), (LONG_SPIN_US, MODES[:2])):
        for mode in modes:
            config = {"mode": mode} | ({"inline_spin_us": spin_us} if spin_us else {})
            command = {"kind": "aiordma", "config": config, "operations": OPERATIONS}
            found.append(Contender(aiordma_name(mode, loop, spin_us), loop, command))
    return found


def aiordma_name(mode: str, loop: str, spin_us: int | None = None) -> str:
    """How the table calls it."""
    return f"aiordma {mode}" + (f", inline_spin_us={spin_us}" if spin_us else "") + f" ({loop})"


def naive_name(binding: str, wait: str, loop: str) -> str:
    """How the table calls it."""
    if wait == "busy":
        return f"{binding} post and poll, no event loop"
    how = "add_reader kept" if wait == "kept" else "add_reader for each operation"
    return f"naive {how}, {binding} ({loop})"


def naive_contenders(binding: str, loop: str, worker: str) -> list[Contender]:
    """Both variants of the naive design; messages need the reader that stays."""
    found = []
    for wait, operations in (("each", OPERATIONS[:2]), ("kept", OPERATIONS)):
        command = {"kind": "naive", "binding": binding, "wait": wait, "operations": operations}
        found.append(Contender(naive_name(binding, wait, loop), worker, command))
    return found


def contenders() -> list[Contender]:
    """In the order of a round."""
    found: list[Contender] = []
    for loop in LOOPS:
        found += aiordma_contenders(loop)
        found += naive_contenders("aiordma.verbs", loop, loop)
        found.append(Contender(f"TCP streams ({loop})", loop, {"kind": "tcp"}))
    for binding, worker in (("aiordma.verbs", "asyncio"), ("pyverbs", "pyverbs")):
        busy = {"kind": "naive", "binding": binding, "wait": "busy"}
        found.append(Contender(naive_name(binding, "busy", ""), worker, busy))
    return found + naive_contenders("pyverbs", "asyncio", "pyverbs")


# --- measuring ----------------------------------------------------------------------------------------------


class Benchmark:
    """One run: the processes, the rounds, the results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results = Results()
        self.where: tuple[str, int, str] = (options.device, options.gid_index, options.host)
        self.pin = cores(options.pin)
        self.contenders = [c for c in contenders() if options.only in c.name]
        self.workers = self._workers({c.worker for c in self.contenders})
        self.perftest = programs.perftest_programs() if not options.only else {}
        self.common = {
            "device": options.device,
            "gid_index": options.gid_index,
            "host": options.host,
            "size": options.size,
            "iterations": options.iterations,
        }

    def _workers(self, wanted: set[str]) -> dict[str, WorkerPair]:
        module = ["-m", "benchmarks.worker"]
        python, system_python = sys.executable, self.options.pyverbs_python
        argvs = {loop: [python, *module, "--loop", loop] for loop in LOOPS}
        argvs["pyverbs"] = [system_python, *module, "--binding", "pyverbs"]
        return {name: WorkerPair(argv, self.pin) for name, argv in argvs.items() if name in wanted}

    def run(self) -> None:
        """All rounds; every child is gone afterwards."""
        try:
            self._start()
            for number in range(1, self.options.rounds + 1):
                started = time.monotonic()
                self._round()
                note(f"round {number} of {self.options.rounds}: {time.monotonic() - started:.0f} s")
        finally:
            for pair in self.workers.values():
                pair.end()

    def _start(self) -> None:
        note("starting processes and compiling")
        for name, pair in self.workers.items():
            try:
                pair.start()
            except OSError as error:
                pair.problem = f"cannot start {name}'s Python: {error}"
        self.program = programs.build("verbs_lat")
        for name, pair in self.workers.items():
            pair.wait_ready(START_DEADLINE)
            if pair.problem:
                note(f"{name}: {pair.problem}")

    def _round(self) -> None:
        self._attempt("C", self._run_c)
        for operation, name in self.perftest.items():
            self._attempt(f"perftest {name}", partial(self._run_perftest, operation, name))
        for contender in self.contenders:
            self._attempt(contender.name, partial(self._run_worker, contender))

    def _attempt(self, name: str, run: Callable[[], None]) -> None:
        """A contender that fails loses this round's figure; the last reason is shown below the table."""
        try:
            run()
        except (BenchmarkError, OSError) as error:
            if name not in self.results.problems:
                note(f"{name}: {error}")
            self.results.problems[name] = str(error)

    def _run_c(self) -> None:
        options = self.options
        medians = programs.run_c(self.program, self.where, options.size, options.iterations, self.pin)
        for (operation, wait), median in medians.items():
            self.results.add(f"C {wait}", operation, median)

    def _run_perftest(self, operation: str, name: str) -> None:
        options = self.options
        median = programs.run_perftest(name, self.where, options.size, options.iterations, self.pin)
        self.results.add(f"perftest {name}", operation, median)

    def _run_worker(self, contender: Contender) -> None:
        pair = self.workers[contender.worker]
        samples = pair.run({**self.common, **contender.command}, SESSION_DEADLINE)
        for operation, (_, median, _) in samples.items():
            self.results.add(contender.name, operation, median)


# --- the report ---------------------------------------------------------------------------------------------


def header(benchmark: Benchmark) -> list[str]:
    """Machine, versions, settings."""
    options = benchmark.options
    facts = dict(machine.describe())
    versions: dict[str, str] = {}
    for pair in benchmark.workers.values():
        versions = pair.versions | versions
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    facts["libibverbs"] = machine.libibverbs_version()
    facts["device"] = f"{options.device}, GID index {options.gid_index}, {options.host}"
    facts["pinned"] = placement(benchmark.pin)
    facts["settings"] = f"{options.size} bytes, {options.rounds} rounds of {options.iterations} operations"
    return ["# Latency of single operations", "", *(f"- {name}: {value}" for name, value in facts.items())]


def ratio(value: float, base: float | None) -> str:
    """To two digits, or a dash."""
    return f"{value / base:.2f}" if base else "-"


def table_rows(results: Results, operation: str) -> Iterator[str]:
    """The rows of one operation."""
    polled, event = (results.median(f"C {wait}", operation) for wait in ("polled", "event"))
    for (name, what), values in results.rounds.items():
        if what != operation:
            continue
        median = statistics.median(values)
        figures = f"{median / 1000:.1f} | {min(values) / 1000:.1f} to {max(values) / 1000:.1f}"
        yield f"| {name} | {figures} | {ratio(median, polled)} | {ratio(median, event)} |"


TITLES = {
    "write": "write: until the local completion",
    "read": "read",
    "echo": "echo: a message there and back, both completions",
    "send": "send, perftest only: half a ping-pong",
}


def report(benchmark: Benchmark) -> str:
    """The whole report as markdown."""
    results = benchmark.results
    lines = header(benchmark)
    for operation, title in TITLES.items():
        rows = list(table_rows(results, operation))
        if not rows:
            continue
        lines += ["", f"## {title}", "", "| | median us | range of round medians | x C polled | x C event |"]
        lines += ["|---|---:|---:|---:|---:|", *rows]
    lines += ["", "perftest's write is half a ping-pong; its read is a whole operation."]
    for name, problem in results.problems.items():
        lines.append(f"Missing (at least one round): {name}: {problem}")
    return "\n".join([*lines, "", "## Targets", "", *(f"- {check}" for check in targets(results))])


# --- the targets --------------------------------------------------------------------------------------------


def check(text: str, left: float | None, right: float | None, limit: float) -> str:
    """``left / right`` may be ``limit``."""
    if not left or not right:
        return f"target {text}: not measured"
    value = left / right
    return f"target {text}: {'met' if value <= limit else 'NOT met'} ({value:.2f})"


def targets(results: Results) -> list[str]:
    """What aiordma set out to reach, for 64-byte writes."""

    def of(name: str) -> float | None:
        return results.median(name, "write")

    found = []
    for loop in LOOPS:
        for spin_us, label in ((None, "default Config"), (LONG_SPIN_US, f"inline_spin_us={LONG_SPIN_US}")):
            busy = of(aiordma_name("busy", loop, spin_us))
            adaptive = of(aiordma_name("adaptive", loop, spin_us))
            found.append(check(f"busy write <= 1.5 x C ({loop}, {label})", busy, of("C polled"), 1.5))
            found.append(check(f"adaptive <= 1.2 x busy ({loop}, {label})", adaptive, busy, 1.2))
        for binding in ("pyverbs", "aiordma.verbs"):
            for wait in ("each", "kept"):
                naive = naive_name(binding, wait, loop)
                if binding == "aiordma.verbs" or loop == "asyncio":
                    event = of(aiordma_name("event", loop))
                    found.append(check(f"event faster than {naive}", event, of(naive), 1))
    return found


# --- the command --------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=os.environ.get("AIORDMA_DEVICE"), help="default: the first one")
    parser.add_argument("--gid-index", type=int, help="default: the first IPv4 GID, RoCE v2 before v1")
    parser.add_argument("--host", help="IPv4 address of the device; default: that of the GID")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument(
        "--iterations", type=int, help="of each operation in a round; default 2000, emulated 300"
    )
    parser.add_argument("--size", type=int, default=64, metavar="BYTES")
    parser.add_argument("--quick", action="store_true", help="2 short rounds: does it work?")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only contenders with this in their name, and C"
    )
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let the kernel place the processes"
    )
    parser.add_argument("--pyverbs-python", default="/usr/bin/python3", help="the Python that has pyverbs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every round median in us, as JSON")
    options = parser.parse_args()
    if options.iterations is None:
        options.iterations = 300 if machine.is_emulated() else 2000
    if options.quick:
        options.rounds, options.iterations = 2, min(options.iterations, 50)
    if options.rounds < 1 or options.iterations < 5 or options.size < 1:
        parser.error("--rounds and --size are at least 1, --iterations 5")
    return options


def complete(options: argparse.Namespace) -> None:
    """Device, GID and address that were not given. Raises LookupError."""
    if options.device is None:
        found = machine.devices()
        if not found:
            raise LookupError("no RDMA device; python3 -m tools.rxe run -- COMMAND lends one")
        options.device = found[0]
    if options.gid_index is None or options.host is None:
        index, address = machine.choose_gid(options.device)
        options.gid_index = index if options.gid_index is None else options.gid_index
        options.host = options.host or address


def write_json(path: Path, benchmark: Benchmark) -> None:
    """Facts and figures for other programs."""
    results = benchmark.results
    rows = [
        {"name": name, "operation": operation, "rounds_us": [value / 1000 for value in values]}
        for (name, operation), values in results.rounds.items()
    ]
    facts = {
        "machine": machine.describe(),
        "settings": {**benchmark.common, "rounds": benchmark.options.rounds},
    }
    document = {**facts, "rows": rows, "problems": results.problems, "targets": targets(results)}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    options = parse()
    try:
        complete(options)
        benchmark = Benchmark(options)
        with contextlib.suppress(KeyboardInterrupt):  # the rounds so far are worth a table
            benchmark.run()
    except (LookupError, BenchmarkError) as error:
        note(f"benchmarks.core: {error}")
        return 1
    print(report(benchmark))
    if options.json:
        write_json(options.json, benchmark)
    return 0 if benchmark.results.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
