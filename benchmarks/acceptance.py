"""What aiordma set out to reach, each beside what it is compared with: contests, criteria, and a run of them.

Two processes, each on a core of its own, talk over the loopback interface; usroce over UDP and over shared memory.
In each round every contest is measured once, its references right before and right after every second of the
others, so that a ratio is one to the mean of both. A criterion is met when the median of its rounds meets it.

The result is a plain document (JSON), of which page.py makes text and plots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import aiordma

from . import machine
from .peers.interface import Unavailable
from .processes import BenchmarkError
from .rounds import Figures, QuietMeter, Sample, Spread
from .subjects import LINKS, MIB, Setting, Subject, c_batch, c_write, memcpy, operation, peer, python, session
from .text import note, placement

#: The references are measured again after so many others.
GROUP = 2
#: One that has never worked is not asked again after so many failures.
FAILURES = 2
POLLING = ("busy", "adaptive")
LARGE = 16 * MIB

Compare = Literal["ratio", "difference", "value"]

STREAMS = "uvloop streams, TCP"
PROTOCOL = "uvloop Protocol, TCP, one future a request"
UCXX = "ucxx, polling"
GRPC = "grpc.aio, unary"
HTTP = "aiohttp, TCP"


@dataclass(frozen=True)
class Unit:
    """How a figure is shown: times ``scale``."""

    name: str
    scale: float = 1.0
    lower_is_better: bool = True


UNITS = {
    "p50_us": Unit("us, p50"),
    "cpu_us": Unit("us of CPU"),
    "per_second": Unit("k/s", 1e-3, lower_is_better=False),
    "gb_per_s": Unit("GB/s", lower_is_better=False),
    "share_percent": Unit("% of a core"),
    "ms": Unit("ms"),
}


@dataclass(frozen=True)
class Criterion:
    """The figure of a subject: as it is (``value``), as a multiple of that of ``reference`` (``ratio``), or how
    far it is above it (``difference``); and the limit, at most or at least as the figure's unit has it."""

    subject: str
    figure: str
    limit: float
    reference: str | None = None
    compare: Compare = "ratio"

    @property
    def unit(self) -> Unit:
        """Of the figure."""
        return UNITS[self.figure]

    def judge(self, own: float, reference: float | None) -> float:
        """What is held against the limit."""
        if self.compare == "value":
            return own
        assert reference is not None
        return own / reference if self.compare == "ratio" else own - reference

    def is_met(self, value: float) -> bool:
        """Whether that is good enough."""
        return value <= self.limit if self.unit.lower_is_better else value >= self.limit


@dataclass(frozen=True)
class Contest:
    """Subjects that are measured side by side, and what is expected of them."""

    name: str
    title: str
    references: tuple[Subject, ...]
    subjects: tuple[Subject, ...]
    criteria: tuple[Criterion, ...]


# --- the contests -----------------------------------------------------------------------------------------


def contests(*, quick: bool = False) -> list[Contest]:
    """In the order of a round. ``quick``: fewer connections."""
    return [
        _echo(),
        _requests(),
        *(_write(link) for link in LINKS),
        _blocks(),
        _large_write(),
        _batch(),
        _event(),
        *_rpc(),
        *_http(),
        _idle(),
        _connections((10,) if quick else (10, 100, 1000)),
        _import(),
    ]


def _messages(mode: str, link: str, scenario: str) -> Subject:
    return peer(f"messages, {mode}, {link}", "rdma:Messages", scenario, link, mode=mode)


def _reference(name: str, scenario: str) -> Subject:
    """One of the peers over TCP."""
    peers: dict[str, tuple[str, dict[str, Any]]] = {
        STREAMS: ("streams:Streams", {}),
        PROTOCOL: ("protocol:Protocol", {}),
        UCXX: ("ucx:ActiveMessages", {"progress": "polling"}),
        GRPC: ("grpc_aio:Unary", {}),
        HTTP: ("http:Aiohttp", {}),
    }
    module, options = peers[name]
    return peer(name, module, scenario, **options)


def _echo() -> Contest:
    subjects = [_messages(mode, link, "latency") for link in LINKS for mode in POLLING]
    udp, shared = [one.name for one in subjects[:2]], [one.name for one in subjects[2:]]
    criteria = [Criterion(name, "p50_us", 0.30, STREAMS) for name in udp]
    criteria += [Criterion(name, "p50_us", 0.70, UCXX) for name in udp]
    criteria += [Criterion(name, "p50_us", 0.10, STREAMS) for name in shared]
    return Contest(
        "echo",
        "64 bytes there and back, one at a time",
        (_reference(STREAMS, "latency"), _reference(UCXX, "latency")),
        tuple(subjects),
        tuple(criteria),
    )


def _requests() -> Contest:
    udp, shared = [_messages("adaptive", link, "rate") for link in LINKS]
    return Contest(
        "requests",
        "64 bytes there and back, 64 tasks, a future each",
        (_reference(PROTOCOL, "rate"),),
        (udp, shared),
        (
            Criterion(udp.name, "per_second", 1.5, PROTOCOL),
            Criterion(shared.name, "per_second", 3.0, PROTOCOL),
            Criterion(shared.name, "cpu_us", 0.3, PROTOCOL),
        ),
    )


def _write(link: str) -> Contest:
    """The target of a write polls in mode busy and sleeps in mode adaptive, since nothing completes there: C does
    each of the two as well."""
    pairs = [
        (operation(f"write, {mode}, {link}", "write", 64, mode, link), c_write(f"C, {what}", link, 64, wait))
        for mode, what, wait in (
            ("busy", "both ends polling", "polled"),
            ("adaptive", "target asleep", "asleep"),
        )
    ]
    limit: tuple[float, Compare] = (1.5, "ratio") if link == "UDP" else (2.5, "difference")
    return Contest(
        f"write-{link.split()[0].lower()}",
        f"`await conn.write` of 64 bytes, one at a time, {link}",
        tuple(program for _, program in pairs),
        tuple(subject for subject, _ in pairs),
        tuple(
            Criterion(subject.name, "p50_us", limit[0], program.name, limit[1]) for subject, program in pairs
        ),
    )


def _blocks() -> Contest:
    udp, shared = [_messages("adaptive", link, "throughput") for link in LINKS]
    return Contest(
        "blocks",
        "messages of 1 MiB one way",
        (_reference(STREAMS, "throughput"),),
        (udp, shared),
        (
            Criterion(udp.name, "gb_per_s", 1.5, STREAMS),
            Criterion(shared.name, "gb_per_s", 4.0, STREAMS),
        ),
    )


def _large_write() -> Contest:
    copy = memcpy("memcpy", LARGE)
    link = "shared memory"
    subjects = [operation(f"write, {mode}, {link}", "write", LARGE, mode, link) for mode in POLLING]
    return Contest(
        "large-write",
        "`await conn.write` of 16 MiB, one at a time",
        (copy,),
        tuple(subjects),
        tuple(Criterion(one.name, "gb_per_s", 0.8, copy.name) for one in subjects),
    )


def _batch() -> Contest:
    link = "shared memory"
    program = c_batch(f"C, {link}", link)
    subject = session(f"conn.batch(), {link}", "batch", "busy", link)
    criterion = Criterion(subject.name, "per_second", 1e6, compare="value")
    return Contest(
        "batch",
        "`conn.batch()` of 64 writes of 64 bytes: writes a second",
        (program,),
        (subject,),
        (criterion,),
    )


def _event() -> Contest:
    subjects = [_messages("event", link, "latency") for link in LINKS]
    return Contest(
        "event",
        "64 bytes there and back, one at a time, both ends asleep meanwhile",
        (_reference(PROTOCOL, "latency"),),
        tuple(subjects),
        tuple(Criterion(one.name, "p50_us", 1.1, PROTOCOL) for one in subjects),
    )


def _rpc() -> list[Contest]:
    made = []
    for scenario, figure, limit in (("latency", "p50_us", 0.05), ("rate", "per_second", 20.0)):
        subjects = [
            peer(f"RPC, adaptive, {link}", "rdma:Rpc", scenario, link, mode="adaptive") for link in LINKS
        ]
        what = "one at a time" if scenario == "latency" else "64 tasks"
        criteria = tuple(Criterion(one.name, figure, limit, GRPC) for one in subjects)
        references = (_reference(GRPC, scenario),)
        made.append(
            Contest(f"rpc-{scenario}", f"unary RPC, 64 bytes, {what}", references, tuple(subjects), criteria)
        )
    return made


def _http() -> list[Contest]:
    made = []
    for scenario, figure in (("latency", "p50_us"), ("rate", "per_second")):
        subjects = [
            peer(f"aiohttp, adaptive, {link}", "http:Aiohttp", scenario, link, mode="adaptive")
            for link in LINKS
        ]
        what = "one at a time" if scenario == "latency" else "64 tasks"
        criteria = tuple(Criterion(one.name, figure, 1.0, HTTP) for one in subjects)
        title = f"HTTP: small replies of aiohttp, kept alive, {what}"
        made.append(
            Contest(f"http-{scenario}", title, (_reference(HTTP, scenario),), tuple(subjects), criteria)
        )
    return made


def _idle() -> Contest:
    subjects = [
        session(f"{mode}, {link}", "idle", mode, link) for link in LINKS for mode in ("event", "adaptive")
    ]
    criteria = tuple(Criterion(one.name, "share_percent", 0.1, compare="value") for one in subjects)
    return Contest("idle", "processor time of both ends when nothing happens", (), tuple(subjects), criteria)


def _connections(counts: Sequence[int]) -> Contest:
    one, *others = (
        session(f"{count} connection{'s' * (count > 1)}", "connections", "busy", "UDP", count=count)
        for count in (1, *counts)
    )
    criteria = tuple(Criterion(many.name, "p50_us", 1.25, one.name) for many in others)
    title = "64 bytes there and back, each time on the next of many connections"
    return Contest("connections", title, (one,), tuple(others), criteria)


def _import() -> Contest:
    bare, subject = python("python", "pass"), python("import aiordma", "import aiordma")
    criterion = Criterion(subject.name, "ms", 150.0, bare.name, "difference")
    return Contest("import", "start of an interpreter", (bare,), (subject,), (criterion,))


# --- a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What a subject did, and its references before and after it."""

    sample: Sample
    references: dict[str, tuple[Sample, Sample]]

    @property
    def is_quiet(self) -> bool:
        """All of them."""
        around = (one for both in self.references.values() for one in both)
        return self.sample.is_quiet and all(one.is_quiet for one in around)

    def reference(self, name: str, figure: str) -> float | None:
        """The mean of both; None where it was not measured, or has no such figure."""
        both = self.references.get(name)
        if both is None or any(figure not in one.figures for one in both):
            return None
        return sum(one.figures[figure] for one in both) / 2


@dataclass
class Results:
    """The rounds of each subject of each contest, and why others have none: by contest and name."""

    rounds: dict[tuple[str, str], list[Round]] = field(default_factory=dict)
    problems: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def kept(self, contest: str, subject: str) -> list[Round]:
        """The quiet ones; all, if none is quiet."""
        rounds = self.rounds.get((contest, subject), [])
        return [one for one in rounds if one.is_quiet] or rounds


class Run:
    """``rounds`` rounds of the contests."""

    def __init__(self, chosen: Sequence[Contest], setting: Setting, meter: QuietMeter) -> None:
        self.contests = chosen
        self.setting = setting
        self.results = Results()
        self._meter = meter
        self._hopeless: set[tuple[str, str]] = set()

    def round(self) -> None:
        """One, of all contests."""
        for contest in self.contests:
            started = time.monotonic()
            self._contest(contest)
            note(f"  {contest.name}: {time.monotonic() - started:.0f} s")

    def _contest(self, contest: Contest) -> None:
        before = self._measure_all(contest, contest.references)
        for group in groups(contest.subjects, GROUP):
            samples = self._measure_all(contest, group)
            after = self._measure_all(contest, contest.references) if contest.references else {}
            around = {name: (before[name], after[name]) for name in before if name in after}
            for name, sample in samples.items():
                self.results.rounds.setdefault((contest.name, name), []).append(Round(sample, around))
            before = after

    def _measure_all(self, contest: Contest, subjects: Sequence[Subject]) -> dict[str, Sample]:
        found = {}
        for subject in subjects:
            sample = self._measure((contest.name, subject.name), subject)
            if sample is not None:
                found[subject.name] = sample
        return found

    def _measure(self, key: tuple[str, str], subject: Subject) -> Sample | None:
        if key in self._hopeless:
            return None
        problems = self.results.problems
        try:
            return self._meter.measure(lambda: subject.measure(self.setting))
        except (Unavailable, BenchmarkError, OSError) as error:
            note(f"{', '.join(key)}: {error}")
            problems.setdefault(key, []).append(str(error))
            never = key not in self.results.rounds and len(problems[key]) >= FAILURES
            if isinstance(error, Unavailable) or never:
                self._hopeless.add(key)
            return None


def groups(subjects: Sequence[Subject], size: int) -> Iterator[Sequence[Subject]]:
    """One after the other, so many at a time."""
    for start in range(0, len(subjects), size):
        yield subjects[start : start + size]


# --- the document -----------------------------------------------------------------------------------------


def facts(setting: Setting, rounds: int) -> dict[str, str]:
    """What it was measured on."""
    found = dict(machine.describe())
    found["aiordma"] = aiordma.__version__
    found["pinned"] = placement(setting.pin)
    found["settings"] = f"{rounds} rounds of {setting.seconds:g} s, {setting.device}"
    return found


def document(run: Run, rounds: int) -> dict[str, Any]:
    """All that page.py needs, in the types that JSON has."""
    return {
        "facts": facts(run.setting, rounds),
        "contests": [
            {
                "name": contest.name,
                "title": contest.title,
                "figures": _figures(contest, run.results),
                "criteria": [verdict(contest.name, one, run.results) for one in contest.criteria],
            }
            for contest in run.contests
        ],
        "problems": [
            {"contest": contest, "subject": subject, "reasons": reasons}
            for (contest, subject), reasons in run.results.problems.items()
        ],
    }


def _figures(contest: Contest, results: Results) -> dict[str, list[Figures]]:
    """Of each subject and each reference, the rounds that are kept."""
    found: dict[str, list[Figures]] = {}
    for subject in contest.subjects:
        for one in results.kept(contest.name, subject.name):
            found.setdefault(subject.name, []).append(one.sample.figures)
    for name in (one.name for one in contest.references):
        seen = {
            id(sample): sample.figures
            for subject in contest.subjects
            for one in results.kept(contest.name, subject.name)
            for sample in one.references.get(name, ())
        }
        if seen:
            found[name] = list(seen.values())
    return found


def verdict(contest: str, criterion: Criterion, results: Results) -> dict[str, Any]:
    """A criterion and what came of it; ``value`` is None where it was not measured."""
    figure = criterion.figure
    pairs = []
    rounds = results.kept(contest, criterion.subject)
    for one in rounds:
        reference = one.reference(criterion.reference, figure) if criterion.reference else None
        if reference is not None or criterion.reference is None:
            pairs.append((one.sample.figures[figure], reference))
    values = [criterion.judge(own, reference) for own, reference in pairs]
    spread = Spread.of(values) if values else None
    beside = [reference for _, reference in pairs if reference is not None]
    return {
        **asdict(criterion),
        "unit": asdict(criterion.unit),
        "own": asdict(Spread.of([own for own, _ in pairs])) if pairs else None,
        "beside": asdict(Spread.of(beside)) if beside else None,
        "value": asdict(spread) if spread else None,
        "rounds": len(values),
        "quiet": sum(one.is_quiet for one in rounds),
        "met": criterion.is_met(spread.median) if spread else None,
    }
