"""README and docs/ say nothing that is not there: links lead somewhere, commands and files exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from aiordma import cli, errors, rpc
from tests.pages import DOCS, PAGES, ROOT, Page, read_page

pages = pytest.mark.parametrize("page", [read_page(path) for path in PAGES], ids=lambda page: page.name)

_SHELLS = ("", "sh", "console")
_AIORDMA = re.compile(r"^(?:\S*python3? -m )?aiordma (?=[a-z])")
_MAKE = re.compile(r"^make ([a-z][a-z-]*)")
_PROGRAM = re.compile(r"^(?:\S*/)?python3? (?!-)(\S+)")
_MODULE = re.compile(r"^(?:\S*/)?python3? -m (tools|examples|benchmarks)\.(\w+)")
_FILE = re.compile(r"(?:docs|examples|tools|tests|aiordma|native|benchmarks)/[\w./-]+\.\w+")
_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pages
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page.name}: {link}"
        # What a page of the reference has is made when the site is built, which looks at these links, too.
        if anchor and target.parent != DOCS / "reference":
            assert anchor in read_page(target).anchors(), f"{page.name}: {link}"


@pages
def test_commands_exist(page: Page) -> None:
    titles = {block.title for block in page.blocks}
    for block in page.blocks:
        if block.language in _SHELLS:
            for line in block.text.splitlines():
                check_command(line.split("#")[0].strip(), page, titles)
    for code in page.inline_code():
        check_command(code, page, titles)


def check_command(line: str, page: Page, titles: set[str | None]) -> None:
    if _AIORDMA.match(line):
        check_arguments(shlex.split(line[_AIORDMA.match(line).end() :]), page)  # type: ignore[union-attr]
    elif match := _MAKE.match(line):
        assert match.group(1) in _TARGETS, f"{page.name}: {line}"
    elif match := _MODULE.match(line):
        assert Path(ROOT, *match.groups()).with_suffix(".py").exists() or Path(ROOT, *match.groups()).is_dir()
    elif match := _PROGRAM.match(line):
        assert match.group(1) in titles or (ROOT / match.group(1)).exists(), f"{page.name}: {line}"


def check_arguments(arguments: list[str], page: Page) -> None:
    """A subcommand with its arguments, or the mere name of one."""
    assert arguments[0] in cli.COMMANDS, f"{page.name}: aiordma {arguments[0]}"
    if len(arguments) == 1 or "..." in arguments:
        return
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint):
        try:
            cli._parser().parse_args(arguments)
        except SystemExit as exit:
            pytest.fail(f"{page.name}: {shlex.join(arguments)}: {exit.code} {complaint.getvalue()}")


@pages
def test_files_exist(page: Page) -> None:
    for code in page.inline_code():
        for path in _FILE.findall(code):
            if "*" not in path:
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_exception_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^<!-- exception (\w+) -->$", page, re.MULTILINE))
    classes = [
        value for module in (errors, rpc) for value in vars(module).values() if isinstance(value, type)
    ]
    assert explained == {cls.__name__ for cls in classes if issubclass(cls, errors.RdmaError)}


def test_every_status_code_of_a_call_is_explained() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)
    assert explained == [code.name for code in rpc.StatusCode if code]


def test_every_command_has_its_reference() -> None:
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^<!-- command (\w+)", page, re.MULTILINE)) == set(cli.COMMANDS)
