"""What every part of the tool shares: messages, the failure exception, the cache directory and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

STATUS_DEADLINE = 124
STATUS_FAILED = 125

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RxeError(Exception):
    """The tool cannot go on; the text says what is missing and how to get it."""


def say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"rxe: {message}", file=sys.stderr, flush=True)


def find_program(name: str) -> str | None:
    """Like shutil.which, with the sbin directories that a user's PATH often lacks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def cache_dir() -> Path:
    base = os.environ.get("AIORDMA_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser().resolve() / "aiordma" / "rxe"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as an exclusive lock between processes; the kernel drops it if we die."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another instance to finish setting up")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_dir(parent: Path) -> Iterator[Path]:
    """A directory beside its destination, so that a finished result is moved into place by one rename."""
    path = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    with scratch_dir(path.parent) as scratch:
        (scratch / path.name).write_bytes(data)
        (scratch / path.name).rename(path)


def call(argv: Sequence[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a helper program quietly, without our standard input; the caller looks at the return code."""
    try:
        return subprocess.run(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, stdout=f"{argv[0]}: {error.strerror}")


def call_or_fail(argv: Sequence[str], what: str, *, cwd: Path | None = None) -> str:
    result = call(argv, cwd=cwd)
    if result.returncode:
        raise RxeError(f"{what} failed (status {result.returncode}): {' '.join(argv)}\n{tail(result.stdout)}")
    return result.stdout


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])
