"""docs/performance.md from the results of `python -m benchmarks`: a table, plots, and the reports of the suites.

Pure text: documents in, Markdown and SVG out. The page keeps what is outside the two marks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .text import number

BEGIN = "<!-- begin: results -->"
END = "<!-- end: results -->"

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def fill(page: str, results: str) -> str:
    """``page`` with ``results`` between its marks. Raises ValueError where they are missing."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n\n{results.strip()}\n\n{END}{tail}"


# --- the table ----------------------------------------------------------------------------------------------


def report(document: Document) -> str:
    """Markdown: machine, one row for each criterion, what is missing."""
    lines = [f"- {name}: {value}" for name, value in document["facts"].items()]
    heads = ("", "aiordma", "compared with", "held against the target (middle half)", "target", "")
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for contest in document["contests"]:
        if contest["criteria"]:
            lines.append(f"| **{contest['title']}** | | | | | |")
            lines += [f"| {' | '.join(cells(row))} |" for row in contest["criteria"]]
    lines += ["", met_in_all(document)]
    return "\n".join([*lines, *missing(document)])


def cells(row: Row) -> list[str]:
    """One row of the table."""
    subject = row["subject"]
    if row["value"] is None:
        return [subject, "not measured", row["reference"] or "", "", target(row), ""]
    beside = f"{row['reference']}: {figure(row, row['beside'])}" if row["beside"] else ""
    return [
        subject,
        figure(row, row["own"]),
        beside,
        spread(row),
        target(row),
        "met" if row["met"] else "NOT met",
    ]


def figure(row: Row, values: Mapping[str, float]) -> str:
    """The median with its unit."""
    unit = row["unit"]
    return f"{number(values['median'] * unit['scale'])} {unit['name']}"


def spread(row: Row) -> str:
    """What is held against the limit, with the middle half of the rounds."""
    value = row["value"]
    scale = 1.0 if row["compare"] == "ratio" else row["unit"]["scale"]
    low, high = number(value["low"] * scale), number(value["high"] * scale)
    return f"{_compared(row, value['median'])} ({low} to {high})"


def target(row: Row) -> str:
    """``<= 0.30 x``, ``<= +2.5 us``, ``>= 1000 k/s``."""
    sign = "<=" if row["unit"]["lower_is_better"] else ">="
    return f"{sign} {_compared(row, row['limit'])}"


def _compared(row: Row, value: float) -> str:
    unit = row["unit"]
    if row["compare"] == "ratio":
        return f"{number(value)} x"
    shown = number(value * unit["scale"])
    return f"{'+' if row['compare'] == 'difference' and value > 0 else ''}{shown} {unit['name']}"


def met_in_all(document: Document) -> str:
    """One sentence."""
    rows = list(criteria(document))
    measured = [row for row in rows if row["value"] is not None]
    met = sum(bool(row["met"]) for row in measured)
    quiet = sum(row["quiet"] for row in measured)
    rounds = sum(row["rounds"] for row in measured)
    left = f"; {len(rows) - len(measured)} not measured" if len(measured) < len(rows) else ""
    return f"{met} of {len(measured)} met{left}. Of {rounds} rounds {quiet} were quiet."


def missing(document: Document) -> list[str]:
    """What failed, and why."""
    problems = document["problems"]
    rows = [f"- {one['contest']}, {one['subject']}: {one['reasons'][-1]}" for one in problems]
    return ["", "Failed at least once:", "", *rows] if rows else []


def criteria(document: Document) -> Iterator[Row]:
    """Of all contests."""
    for contest in document["contests"]:
        yield from contest["criteria"]


# --- plots --------------------------------------------------------------------------------------------------

_WIDTH = 900
_LINE = 22
_LABEL = 370
_RIGHT = 150
_STYLE = (
    "text{font:12px sans-serif;fill:#555}.t{font-weight:bold}.own{fill:#4051b5}.other{fill:#9e9e9e}"
    ".met{fill:#2e7d32;stroke:#2e7d32}.not{fill:#c62828;stroke:#c62828}.goal{stroke:#555;stroke-width:2}"
)


def bars(contest: Row, figure_name: str, unit: str, scale: float = 1.0) -> str | None:
    """A bar for the median of each subject and reference; None where nobody has that figure."""
    rows = [
        (name, statistics.median(one[figure_name] for one in rounds) * scale)
        for name, rounds in contest["figures"].items()
        if all(figure_name in one for one in rounds)
    ]
    if not rows:
        return None
    subjects = {row["subject"] for row in contest["criteria"]}
    room = (_WIDTH - _LABEL - _RIGHT) / max(value for _, value in rows)
    body = []
    for line, (name, value) in enumerate(sorted(rows, key=lambda row: row[1]), 2):
        kind = "own" if name in subjects else "other"
        y = line * _LINE
        body.append(_text(_LABEL - 8, y, name, anchor="end"))
        body.append(
            f'<rect class="{kind}" x="{_LABEL}" y="{y - 13}" width="{max(1, value * room):.1f}" height="16"/>'
        )
        body.append(_text(_LABEL + value * room + 6, y, number(value)))
    return _svg(f"{contest['title']} ({unit})", body, len(rows) + 2)


def ratios(document: Document) -> str | None:
    """A point for each ratio on a logarithmic scale, the middle half of its rounds, and a tick at its target."""
    rows = [row for row in criteria(document) if row["compare"] == "ratio" and row["value"]]
    if not rows:
        return None
    ends = [x for row in rows for x in (row["limit"], row["value"]["low"], row["value"]["high"]) if x > 0]
    low, high = math.log10(min(ends)) - 0.05, math.log10(max(ends)) + 0.05
    room = (_WIDTH - _LABEL - _RIGHT) / (high - low)

    def at(value: float) -> float:
        return _LABEL + (math.log10(max(value, 10**low)) - low) * room

    body = []
    for line, row in enumerate(rows, 2):
        y, value = line * _LINE - 5, row["value"]
        kind = "met" if row["met"] else "not"
        x, first, last, goal = (at(v) for v in (value["median"], value["low"], value["high"], row["limit"]))
        body.append(_text(_LABEL - 8, y + 5, f"{row['subject']} / {row['reference']}", anchor="end"))
        body.append(
            f'<line class="{kind}" x1="{first:.1f}" x2="{last:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>'
        )
        body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="5"/>')
        body.append(f'<line class="goal" x1="{goal:.1f}" x2="{goal:.1f}" y1="{y - 8}" y2="{y + 8}"/>')
        body.append(_text(_WIDTH - _RIGHT + 20, y + 5, f"{target(row)}, {row['unit']['name']}"))
    return _svg("Ratio to what it is compared with; the tick is the target", body, len(rows) + 2)


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, body: Sequence[str], lines: int) -> str:
    height = lines * _LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}">'
    shown = _text(8, 18, title.replace("`", ""), kind="t")
    return "\n".join([head, f"<style>{_STYLE}</style>", shown, *body, "</svg>", ""])


# --- the page -----------------------------------------------------------------------------------------------

#: Plots of contests: file name, contest, figure, unit, scale.
PLOTS = (
    ("echo.svg", "echo", "p50_us", "us, p50", 1.0),
    ("requests.svg", "requests", "per_second", "k/s", 1e-3),
    ("blocks.svg", "blocks", "gb_per_s", "GB/s", 1.0),
)


def plots(document: Document) -> dict[str, str]:
    """SVG by file name."""
    contests = {contest["name"]: contest for contest in document["contests"]}
    made = {"ratios.svg": ratios(document)}
    for file, name, figure_name, unit, scale in PLOTS:
        if name in contests:
            made[file] = bars(contests[name], figure_name, unit, scale)
    return {file: svg for file, svg in made.items() if svg is not None}


def results(document: Document | None, reports: Mapping[str, str], folder: str) -> str:
    """What stands between the marks: the document's table and plots, and the reports of the other suites by the
    command that made each. ``folder`` is where the plots are, as the page sees it."""
    parts = []
    if document is not None:
        parts += ["## What was aimed at", f"`{COMMAND} acceptance`", report(document)]
        parts += [f"![{file.partition('.')[0]}]({folder}/{file})" for file in plots(document)]
    for command, text in reports.items():
        title, _, rest = text.strip().partition("\n")
        parts += [f"## {title.lstrip('# ')}", f"`{command}`", _deeper(rest)]
    return "\n\n".join(parts)


COMMAND = "python -m benchmarks"


def _deeper(markdown: str) -> str:
    """Headings one level down."""
    lines = markdown.strip().splitlines()
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in lines)
