"""README and docs/ as tests see them: code blocks with language, title and place, links, headings.

What is held of every page is in tests/test_docs.py; its programs are run by tests/device/test_docs.py.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_FENCE = re.compile(r"^ *```+(.*)$")
_TITLE = re.compile(r'title="([^"]*)"')
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_HEADING = re.compile(r"^#{1,6} +(.*?)$")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is that of its first line in the page; ``output`` is the text block behind it."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    output: str | None = None


@dataclass(frozen=True)
class Page:
    """A page taken apart; ``prose`` has everything outside of fences, by line."""

    path: Path
    blocks: tuple[Block, ...]
    prose: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    def links(self) -> Iterator[str]:
        for line in self.prose:
            yield from _LINK.findall(_CODE.sub("", line))

    def inline_code(self) -> Iterator[str]:
        for line in self.prose:
            yield from _CODE.findall(line)

    def anchors(self) -> set[str]:
        found = (_HEADING.match(line) for line in self.prose)
        return {slug(match.group(1)) for match in found if match}


def slug(heading: str) -> str:
    """The anchor of a heading, as both mkdocs and forges make it for plain ones."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")


def read_page(path: Path) -> Page:
    blocks: list[Block] = []
    prose: list[str] = []
    fence: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if match is None:
            (prose if fence is None else inside).append(line)
        elif fence is None:
            fence, inside = (number + 1, match.group(1)), []
        else:
            blocks.append(_block(path, *fence, inside))
            fence = None
    assert fence is None, f"{path}: a block is not closed"
    return Page(path, tuple(_with_outputs(blocks)), tuple(prose))


def _block(path: Path, line: int, info: str, lines: list[str]) -> Block:
    title = _TITLE.search(info)
    language = info.split()[0] if info.split() else ""
    text = textwrap.dedent("\n".join(lines)) + "\n"
    return Block(path, line, language, title.group(1) if title else None, text)


def _with_outputs(blocks: list[Block]) -> Iterator[Block]:
    """Text blocks titled "output" belong to the program before them."""
    for index, block in enumerate(blocks):
        following = blocks[index + 1] if index + 1 < len(blocks) else None
        printed = following.text if following is not None and following.title == "output" else None
        yield Block(block.page, block.line, block.language, block.title, block.text, printed)
