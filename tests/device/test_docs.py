"""Every Python block in README and docs/ is a whole program, and runs as it stands.

The programs of a page run in order, each in a process of its own, in one directory. One with a title is saved
under that name, and those after it may import it. One that is called server... is left running until the page is
done; its first line of output says that it is ready. A block with test functions is run by pytest. A text block
titled "output" is what the program above it prints; "..." in it stands for anything. Where a page says port 7471,
it is a free one here.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Block, Page, read_page

DEADLINE = 100  # seconds for a program; the machine may be emulated
PORT = "7471"

#: What only usroce has.
_USROCE = re.compile(r"aiordma\.testing|aiordma_pair|usroce")


def parameters() -> Iterator[object]:
    for page in map(read_page, PAGES):
        programs = [block.text for block in page.blocks if block.language == "python"]
        if programs:
            needs_usroce = any(map(_USROCE.search, programs))
            marks = [pytest.mark.device, *[pytest.mark.usroce] * needs_usroce]
            yield pytest.param(page, id=page.name, marks=marks)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", list(parameters()))
def test_the_programs_run(page: Page, tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as servers:
        for index, block in enumerate(page.blocks):
            text = block.text.replace(PORT, port)
            if block.language == "sh":
                prepare(text, tmp_path)
            if block.language != "python":
                continue
            path = tmp_path / (block.title or f"block_{index}.py")
            path.write_text(text, encoding="utf-8")
            if path.name.startswith("server"):
                servers.enter_context(running(path, block))
            elif path.name != "conftest.py":
                run(path, block)


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def environment(directory: Path) -> dict[str, str]:
    """The package of this run (that of a sanitizer run lies elsewhere), and the other programs of the page."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(directory)]
    return {**os.environ, "PYTHONPATH": ":".join(filter(None, paths))}


def prepare(commands: str, directory: Path) -> None:
    """Makes the certificates that a page tells how to make."""
    for line in commands.replace("\\\n", " ").splitlines():
        if line.startswith("openssl "):
            subprocess.run(shlex.split(line), cwd=directory, capture_output=True, check=True)


def command(path: Path) -> list[str]:
    python = [sys.executable, "-W", "error"]
    if re.search(r"^(async )?def test_", path.read_text(), re.MULTILINE):
        options = ["-q", "-p", "aiordma.pytest_plugin", "-p", "no:cacheprovider"]
        options += ["--asyncio-mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
        return [*python, "-m", "pytest", *options, str(path)]
    return [*python, str(path)]


def run(path: Path, block: Block) -> None:
    """A program that ends by itself, and well."""
    done = subprocess.run(
        command(path),
        cwd=path.parent,
        env=environment(path.parent),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    place = f"{block.page.relative_to(ROOT)}:{block.line}"
    assert done.returncode == 0, f"{place}\n{done.stdout}{done.stderr}"
    assert not done.stderr, place
    if block.output is not None:
        alike = doctest.OutputChecker().check_output(block.output, done.stdout, doctest.ELLIPSIS)
        assert alike, f"{place} prints\n{done.stdout}"


@contextlib.contextmanager
def running(path: Path, block: Block) -> Iterator[None]:
    """A program that goes on until it is interrupted."""
    argv = [sys.executable, "-u", *command(path)[1:]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=path.parent, env=environment(path.parent), **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline(), process.stderr.read()
            yield
        finally:
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, f"{block.page.relative_to(ROOT)}:{block.line}\n{complaint}"
    assert not complaint
