"""All benchmarks by one command: runs suites, one after the other, and fills docs/performance.md.

    python -m benchmarks [SUITE ...]          (make bench)

- acceptance: what aiordma set out to reach, each beside what it is compared with (benchmarks/acceptance.py).
- messaging: messages, RPC and streams beside what services use today.
- usroce: the device in user space beside plain UDP.
- many-peers: busy connections alone, and beside many idle ones.
- rxe: single operations beside C and pyverbs on the kernel's soft RoCE. Where that is emulated it takes an hour,
  so it runs only when it is named.

What they say goes to bench-results/, a document (JSON) and a text for each, and from there into the page: what a
run leaves out stays as it was measured before. Figures are of use only from a machine that is quiet: each suite
waits for that, and says how quiet it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import acceptance, machine, page
from .processes import ROOT, cores
from .rounds import QuietMeter
from .subjects import Setting
from .text import note

RESULTS = ROOT / "bench-results"
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
QUICK_SECONDS = 0.05


@dataclass(frozen=True)
class Suite:
    """A benchmark with a command of its own: its module, and what it is given, also for a quick run."""

    module: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As one types it."""
        return " ".join(["python", *self.before, *(["python"] if self.before else []), "-m", self.module])

    def argv(self, *, quick: bool) -> list[str]:
        """As it is executed."""
        python = sys.executable
        before = [python, *self.before] if self.before else []
        return [*before, python, "-m", self.module, *self.arguments, *(self.quick if quick else ())]


SUITES = {
    "messaging": Suite("benchmarks.messaging", (), ("--quick",)),
    "usroce": Suite("benchmarks.usroce", (), ("--rounds", "1", "--seconds", "0.05")),
    "many-peers": Suite(
        "benchmarks.many_peers", (), ("--rounds", "1", "--idle", "20", "--seconds", "0.1", "--patience", "0")
    ),
    "rxe": Suite("benchmarks.core", (), ("--quick",), ("-m", "tools.rxe", "run", "--")),
}
ACCEPTANCE = "acceptance"
DEFAULT = (ACCEPTANCE, "messaging", "usroce", "many-peers")


def run_acceptance(options: argparse.Namespace) -> bool:
    """All rounds; after an interruption, those until then. False when nothing was measured."""
    chosen = [one for one in acceptance.contests(quick=options.quick) if _wanted(one.name, options.only)]
    setting = Setting(options.seconds, cores(pin=True), options.device)
    meter = QuietMeter(0.0, 1) if options.quick else QuietMeter()
    run = acceptance.Run(chosen, setting, meter)
    machine.raise_file_limit()
    done = 0
    interrupted = False
    try:
        for _ in range(options.rounds):
            started = time.monotonic()
            run.round()
            done += 1
            note(f"round {done} of {options.rounds}: {time.monotonic() - started:.0f} s")
    except KeyboardInterrupt:  # the rounds so far are worth a table
        interrupted = True
    document = acceptance.document(run, max(done, 1))
    text = page.report(document)
    print(f"# {ACCEPTANCE}\n\n{text}", flush=True)
    options.results.joinpath(f"{ACCEPTANCE}.json").write_text(json.dumps(document, indent=1) + "\n")
    if interrupted:
        raise KeyboardInterrupt
    return bool(run.results.rounds)


def _wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(text in name for text in only)


def run_suite(name: str, options: argparse.Namespace) -> bool:
    """What it prints is shown, and kept. False when it failed."""
    suite = SUITES[name]
    argv = [*suite.argv(quick=options.quick), "--json", str(options.results / f"{name}.json")]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode == 0:
        options.results.joinpath(f"{name}.md").write_text(done.stdout)
    return done.returncode == 0


def fill_page(results: Path, target: Path = PAGE, plots: Path = PLOTS) -> None:
    """The page and its plots, of what lies in that folder."""
    found = results / f"{ACCEPTANCE}.json"
    document = json.loads(found.read_text()) if found.exists() else None
    reports = {
        suite.command: path.read_text()
        for name, suite in SUITES.items()
        if (path := results / f"{name}.md").exists()
    }
    if document is not None:
        plots.mkdir(exist_ok=True)
        for file, svg in page.plots(document).items():
            (plots / file).write_text(svg)
    text = page.results(document, reports, plots.name)
    target.write_text(page.fill(target.read_text(), text))
    note(f"filled {target}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    first = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=first)
    names = [ACCEPTANCE, *SUITES]
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}; default: all but rxe"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="of acceptance, at least 5 for figures; default 7"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of each measurement of acceptance; default 0.5"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="contests of acceptance with this in their name"
    )
    parser.add_argument("--list", action="store_true", help="the suites, and the contests of acceptance")
    parser.add_argument("--quick", action="store_true", help="one short round, no page: does it work?")
    parser.add_argument("--device", default="usroce0", help="of acceptance; default usroce0")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="default bench-results"
    )
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--no-page", action="store_true", help="leave docs/performance.md as it is")
    pages.add_argument(
        "--page-only", action="store_true", help="measure nothing, fill the page from the results"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.suites) - set(names)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.rounds < 1 or not 0 < options.seconds <= 30:
        parser.error("--rounds is at least 1, --seconds above 0 and at most 30")
    if options.quick:
        options.rounds, options.seconds = 1, min(options.seconds, QUICK_SECONDS)
        options.no_page = True
        if options.results == RESULTS:  # what was measured in earnest stays
            options.results = RESULTS / "quick"
    return options


def show_list() -> None:
    """The names that the command line takes."""
    for name in (ACCEPTANCE, *SUITES):
        print(name)
        if name == ACCEPTANCE:
            for contest in acceptance.contests():
                print(f"  {contest.name}: {contest.title}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 when every suite has figures; 1 when one has none; 130 after an interruption."""
    options = parse(arguments)
    if options.list:
        show_list()
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    failed = []
    try:
        for name in () if options.page_only else options.suites or DEFAULT:
            note(f"suite {name}")
            if not (run_acceptance(options) if name == ACCEPTANCE else run_suite(name, options)):
                failed.append(name)
    except KeyboardInterrupt:
        return 130
    if not options.no_page:
        fill_page(options.results)
    for name in failed:
        note(f"benchmarks: {name} has no figures")
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
