"""What the benchmarks make of measurements: rounds, spreads, criteria, the page and its plots."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import acceptance, machine, page
from benchmarks.acceptance import UNITS, Contest, Criterion, Results, Round, Run, contests, verdict
from benchmarks.peers.interface import Unavailable
from benchmarks.processes import ROOT, BenchmarkError
from benchmarks.rounds import Figures, QuietMeter, Sample, Spread
from benchmarks.subjects import Setting, Subject
from benchmarks.text import number

SETTING = Setting(0.1, (None, None), "none0")


class Others:
    """Stands for machine.Bystanders: what others use during one measurement after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
        self._shares = itertools.chain(shares, itertools.repeat(0.0))
        self.waited = 0
        monkeypatch.setattr(machine, "Bystanders", lambda: self)
        monkeypatch.setattr(machine, "wait_for_rest", self._wait)

    def share(self) -> float:
        return next(self._shares)

    def _wait(self, share: float, timeout: float) -> float:
        self.waited += 1
        return 1.0


def counting() -> Callable[[], Figures]:
    """Measurements 1, 2, 3, ..."""
    numbers = itertools.count(1)
    return lambda: {"value": float(next(numbers))}


class TestRounds:
    def test_spread(self) -> None:
        assert Spread.of([3]) == Spread(3, 3, 3)
        assert Spread.of([5, 1, 4, 2, 3]) == Spread(3, 2, 4)
        assert Spread.of([1, 2, 3, 100]) == Spread(2.5, 2, 3)

    def test_the_first_quiet_one_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        others = Others(monkeypatch, 0.5, 0.01, 0.0)
        assert QuietMeter(10, 3).measure(counting()) == Sample({"value": 2.0}, 0.01)
        assert others.waited == 2

    def test_else_the_quietest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Others(monkeypatch, 0.5, 0.2, 0.3)
        assert QuietMeter(10, 3).measure(counting()) == Sample({"value": 2.0}, 0.2)

    def test_a_failure_is_raised_unless_there_is_something(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Others(monkeypatch, 0.5)
        measure = counting()

        def once() -> Figures:
            found = measure()
            if found["value"] > 1:
                raise BenchmarkError("broke off")
            return found

        meter = QuietMeter(10, 3)
        assert meter.measure(once).figures == {"value": 1.0}
        with pytest.raises(BenchmarkError):
            meter.measure(once)

    def test_numbers(self) -> None:
        assert [number(value) for value in (0.12345, 12.345, 123.45, -250.4)] == [
            "0.123",
            "12.3",
            "123",
            "-250",
        ]


# --- criteria -------------------------------------------------------------------------------------------


def rounds_of(*pairs: tuple[float, float], others: float = 0.0) -> list[Round]:
    """Rounds of a subject with its own p50 and that of the reference."""
    return [
        Round(Sample({"p50_us": own}, others), {"it": (Sample({"p50_us": beside}, 0.0),) * 2})
        for own, beside in pairs
    ]


class TestCriteria:
    def test_a_ratio_is_one_of_each_round(self) -> None:
        results = Results({("c", "we"): rounds_of((10, 100), (40, 100), (30, 100))})
        row = verdict("c", Criterion("we", "p50_us", 0.30, "it"), results)
        assert row["value"] == {"median": 0.3, "low": 0.1, "high": 0.4}
        assert row["met"] is True
        assert (row["rounds"], row["quiet"]) == (3, 3)

    def test_the_reference_is_the_mean_of_both(self) -> None:
        both = (Sample({"p50_us": 10}, 0.0), Sample({"p50_us": 30}, 0.0))
        assert Round(Sample({}, 0.0), {"it": both}).reference("it", "p50_us") == 20

    @pytest.mark.parametrize(("limit", "met"), [(2.0, False), (2.5, True)])
    def test_a_difference(self, limit: float, met: bool) -> None:
        results = Results({("c", "we"): rounds_of((12.5, 10))})
        row = verdict("c", Criterion("we", "p50_us", limit, "it", "difference"), results)
        assert (row["value"]["median"], row["met"]) == (2.5, met)

    def test_more_is_better_for_rates(self) -> None:
        assert Criterion("we", "per_second", 1.5, "it").is_met(1.6)
        assert not Criterion("we", "per_second", 1.5, "it").is_met(1.4)
        assert not Criterion("we", "cpu_us", 0.3, "it").is_met(0.4)

    def test_loud_rounds_count_only_without_quiet_ones(self) -> None:
        loud = rounds_of((90, 100), others=0.5)
        criterion = Criterion("we", "p50_us", 0.5, "it")
        assert verdict("c", criterion, Results({("c", "we"): loud}))["met"] is False
        mixed = Results({("c", "we"): [*loud, *rounds_of((10, 100))]})
        assert verdict("c", criterion, mixed)["value"]["median"] == 0.1

    def test_what_was_not_measured_is_neither_met_nor_missed(self) -> None:
        criterion = Criterion("we", "p50_us", 0.5, "it")
        assert verdict("c", criterion, Results())["met"] is None
        alone = Results({("c", "we"): [Round(Sample({"p50_us": 1}, 0.0), {})]})
        assert verdict("c", criterion, alone)["met"] is None


def test_contests_hang_together() -> None:
    every = contests()
    assert len({contest.name for contest in every}) == len(every)
    for contest in every:
        subjects = [one.name for one in contest.subjects]
        references = [one.name for one in contest.references]
        assert len({*subjects, *references}) == len(subjects) + len(references)
        for criterion in contest.criteria:
            assert criterion.subject in subjects
            assert criterion.figure in UNITS
            assert (criterion.reference is None) == (criterion.compare == "value")
            assert criterion.reference is None or criterion.reference in references
    plotted = {name: figure for _, name, figure, _, _ in page.PLOTS}
    assert set(plotted) <= {contest.name for contest in every}


# --- a run of made-up subjects --------------------------------------------------------------------------


class Stage:
    """Subjects that say what they are told, and in which order they were asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def subject(self, name: str, *values: float | Exception) -> Subject:
        left = itertools.chain(values, itertools.repeat(values[-1]))

        def measure(setting: Setting) -> Figures:
            assert setting is SETTING
            self.asked.append(name)
            value = next(left)
            if isinstance(value, Exception):
                raise value
            return {"p50_us": value}

        return Subject(name, measure)

    def run(self, contest: Contest, rounds: int = 1) -> Run:
        run = Run([contest], SETTING, QuietMeter(0.0, 1))
        for _ in range(rounds):
            run.round()
        return run


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    Others(monkeypatch)
    return Stage()


def contest_of(stage: Stage, *subjects: Subject, reference: Subject | None = None) -> Contest:
    reference = reference or stage.subject("it", 100.0)
    criteria = tuple(Criterion(one.name, "p50_us", 0.5, reference.name) for one in subjects)
    return Contest("c", "a <title> & more", (reference,), subjects, criteria)


class TestRun:
    def test_references_stand_around_every_two(self, stage: Stage) -> None:
        stage.run(contest_of(stage, *(stage.subject(name, 10.0) for name in "abc")))
        assert stage.asked == ["it", "a", "b", "it", "c", "it"]

    def test_a_ratio_is_to_the_references_next_to_it(self, stage: Stage) -> None:
        three = [stage.subject(name, 10.0) for name in "abc"]
        run = stage.run(contest_of(stage, *three, reference=stage.subject("it", 10.0, 30.0, 50.0)))
        rows = acceptance.document(run, 1)["contests"][0]["criteria"]
        assert [row["value"]["median"] for row in rows] == [0.5, 0.5, 0.25]

    def test_who_cannot_take_part_is_asked_once(self, stage: Stage) -> None:
        run = stage.run(contest_of(stage, stage.subject("a", Unavailable("no package"))), rounds=3)
        assert stage.asked.count("a") == 1
        (problem,) = acceptance.document(run, 3)["problems"]
        assert problem == {"contest": "c", "subject": "a", "reasons": ["no package"]}

    def test_who_never_works_is_asked_twice(self, stage: Stage) -> None:
        stage.run(contest_of(stage, stage.subject("a", BenchmarkError("broke off"))), rounds=4)
        assert stage.asked.count("a") == 2

    def test_one_failure_costs_a_round(self, stage: Stage) -> None:
        broken = stage.subject("a", 10.0, BenchmarkError("broke off"), 30.0)
        run = stage.run(contest_of(stage, broken), rounds=3)
        (row,) = acceptance.document(run, 3)["contests"][0]["criteria"]
        assert (row["rounds"], row["value"]["median"]) == (2, 0.2)

    def test_without_its_reference_a_figure_is_not_compared(self, stage: Stage) -> None:
        gone = stage.subject("it", Unavailable("no package"))
        run = stage.run(contest_of(stage, stage.subject("a", 10.0), reference=gone))
        document = acceptance.document(run, 1)
        assert document["contests"][0]["criteria"][0]["met"] is None
        assert document["contests"][0]["figures"] == {"a": [{"p50_us": 10.0}]}


# --- the page -------------------------------------------------------------------------------------------


@pytest.fixture
def document(stage: Stage) -> Any:
    subjects = [
        stage.subject("a", 10.0, 20.0, 30.0),
        stage.subject("b", 90.0),
        stage.subject("x", Unavailable("gone")),
    ]
    made = acceptance.document(stage.run(contest_of(stage, *subjects), rounds=3), 3)
    return json.loads(json.dumps(made))  # as it is read from its file


class TestPage:
    def test_a_row_for_each_criterion(self, document: Any) -> None:
        lines = page.report(document).splitlines()
        assert "| **a <title> & more** | | | | | |" in lines
        assert "| a | 20 us, p50 | it: 100 us, p50 | 0.2 x (0.1 to 0.3) | <= 0.5 x | met |" in lines
        assert "| b | 90 us, p50 | it: 100 us, p50 | 0.9 x (0.9 to 0.9) | <= 0.5 x | NOT met |" in lines
        assert "| x | not measured | it |  | <= 0.5 x |  |" in lines
        assert "1 of 2 met; 1 not measured. Of 6 rounds 6 were quiet." in lines
        assert lines[-1] == "- c, x: gone"

    @pytest.mark.parametrize(
        ("criterion", "text"),
        [
            (Criterion("a", "per_second", 1e6, compare="value"), ">= 1000 k/s"),
            (Criterion("a", "p50_us", 2.5, "it", "difference"), "<= +2.5 us, p50"),
            (Criterion("a", "gb_per_s", 0.8, "it"), ">= 0.8 x"),
        ],
    )
    def test_targets(self, criterion: Criterion, text: str) -> None:
        assert page.target(verdict("c", criterion, Results())) == text

    def test_plots_are_well_formed_and_show_every_row(self, document: Any) -> None:
        drawn = page.ratios(document)
        assert drawn is not None
        root = ElementTree.fromstring(drawn)
        circles = [node for node in root if node.tag.endswith("circle")]
        assert [node.get("class") for node in circles] == ["met", "not"]
        assert float(circles[0].attrib["cx"]) < float(circles[1].attrib["cx"])
        bars = page.bars(document["contests"][0], "p50_us", "us")
        assert bars is not None
        widths = [
            float(node.attrib["width"]) for node in ElementTree.fromstring(bars) if node.tag.endswith("rect")
        ]
        assert widths == sorted(widths)
        assert len(widths) == 3
        assert "a &lt;title&gt; &amp; more (us)" in bars

    def test_nothing_to_plot(self, stage: Stage) -> None:
        empty = acceptance.document(
            Run([contest_of(stage, stage.subject("a", 1.0))], SETTING, QuietMeter()), 1
        )
        assert page.plots(empty) == {}

    def test_only_what_is_between_the_marks_changes(self) -> None:
        text = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
        assert page.fill(text, "new") == f"before\n{page.BEGIN}\n\nnew\n\n{page.END}\nafter\n"
        assert page.fill(page.fill(text, "x"), "new") == page.fill(text, "new")
        with pytest.raises(ValueError, match="the page has no"):
            page.fill(f"{page.BEGIN} only", "new")

    def test_the_page_is_made_of_what_is_there(self, document: Any, tmp_path: Path) -> None:
        target = tmp_path / "performance.md"
        target.write_text(command.PAGE.read_text())
        (tmp_path / "acceptance.json").write_text(json.dumps(document))
        (tmp_path / "usroce.md").write_text("# Beside UDP\n\n- cores: 2\n\n## latency\n")
        command.fill_page(tmp_path, target, tmp_path / "plots")
        text = target.read_text()
        assert text.startswith(command.PAGE.read_text().partition(page.BEGIN)[0])
        assert "Not filled yet" not in text
        assert "## Beside UDP\n\n`python -m benchmarks.usroce`\n\n- cores: 2\n\n### latency" in text
        assert "(plots/ratios.svg)" in text
        ElementTree.parse(tmp_path / "plots" / "ratios.svg")


class TestCommand:
    def test_the_suites_are_modules(self) -> None:
        for suite in command.SUITES.values():
            assert (ROOT / suite.module.replace(".", "/")).with_suffix(".py").exists()
        assert command.SUITES["rxe"].command == "python -m tools.rxe run -- python -m benchmarks.core"
        assert set(command.DEFAULT) == {"acceptance", *command.SUITES} - {"rxe"}

    def test_a_quick_run_leaves_page_and_results_alone(self) -> None:
        options = command.parse(["--quick"])
        assert (options.rounds, options.no_page) == (1, True)
        assert options.results != command.parse([]).results

    @pytest.mark.parametrize("line", [["nothing"], ["--rounds", "0"], ["--seconds", "0"]])
    def test_a_wrong_command_line(self, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            command.parse(line)
        assert "error:" in capsys.readouterr().err

    def test_the_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["--list"]) == 0
        names = {line.strip().partition(":")[0] for line in capsys.readouterr().out.splitlines()}
        assert names >= {"rxe", "many-peers", "echo", "import", "connections"}
