"""Tables of the documentation that come from the source: ``<!-- name argument -->`` in a page is replaced.

mkdocs calls the ``on_`` functions (mkdocs.yml, ``hooks``).  Only modules without native code are imported.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from aiordma import config, errors

ROOT = Path(__file__).resolve().parents[2]

_MARK = re.compile(r"^<!-- (\w+)(?: (.+))? -->$", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([\w.]+)`")
_log = logging.getLogger("mkdocs.aiordma")

#: Powers of two for people, largest first.
_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Puts the tables in."""

    def replace(match: re.Match[str]) -> str:
        name, argument = match.groups()
        maker = MAKERS.get(name)
        if maker is None:
            _log.warning("%s: there is no table %r", page.file.src_path, name)
            return match.group()
        return maker(argument) if argument else maker()

    return _MARK.sub(replace, markdown)


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# --- Config -------------------------------------------------------------------------------------------


def knobs() -> str:
    """Every setting of Config."""
    rows = [
        (f"`{knob['name']}`", _value(knob, knob["default"]), _range(knob), knob["unit"], knob["doc"])
        for knob in config.Config.knobs()
    ]
    return table(("setting", "default", "range", "unit", "meaning"), rows)


def _range(knob: dict[str, Any]) -> str:
    if "low" in knob:
        return f"{_value(knob, knob['low'])} to {_value(knob, knob['high'])}"
    words = {"mode": get_args(config.Mode), "huge_pages": get_args(config.HugePages)}.get(knob["name"], ())
    return ", ".join(f"`{word}`" for word in words)


def _value(knob: dict[str, Any], value: Any) -> str:
    if knob["unit"] == "bytes":
        for size, unit in _SIZES:
            if value >= size and value % size == 0:
                return f"{value // size} {unit}"
    return f"`{value}`" if isinstance(value, str) or value is None else f"{value:,}".replace(",", " ")


# --- errors -------------------------------------------------------------------------------------------


def statuses() -> str:
    """Every work-completion status."""
    rows = []
    for status in errors.WcStatus:
        text = errors.STATUS_TEXT[status]
        raised = type(errors.completion_error(status)).__name__ if status else "-"
        rows.append((f"`{status.name}`", str(status.value), *text, f"`{raised}`" if status else raised))
    heads = ("status", "number", "meaning", "usual cause", "look at", "exception")
    return table(heads, rows)


def exception(name: str) -> str:
    """What an exception is: its docstring, and what else it can be caught as."""
    from aiordma import rpc  # heavy: only where it is asked for

    cls = getattr(errors, name, None) or getattr(rpc, name)
    text = inspect.getdoc(cls) or ""
    also = [f"`{base.__name__}`" for base in cls.__mro__[1:-2] if base is not Exception]
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    return f"{text}\n\nCaught as: {', '.join([f'`{name}`', *also])}."


# --- the command line ---------------------------------------------------------------------------------


def command(name: str) -> str:
    """What ``aiordma NAME --help`` prints."""
    from aiordma import cli

    os.environ["COLUMNS"] = "100"  # argparse fills lines to the width of the terminal
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*name.split(), "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```"


# --- the examples -------------------------------------------------------------------------------------


def examples() -> str:
    """Every program in examples/, by the first line of its docstring."""
    rows = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
            rows.append((f"`examples/{path.name}`", first))
    return table(("program", "what it is"), rows)


MAKERS: dict[str, Callable[..., str]] = {
    "knobs": knobs,
    "statuses": statuses,
    "exception": exception,
    "command": command,
    "examples": examples,
}
