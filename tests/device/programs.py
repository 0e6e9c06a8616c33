"""The examples, and programs of the tests beside them, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiordma

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples"
PACKAGE = Path(aiordma.__file__).resolve().parents[1]
DEADLINE = 60.0  # seconds; the machine may be emulated


def start(name: str, *options: str, folder: Path = EXAMPLES) -> subprocess.Popen[str]:
    """A program; what is written to its standard input ends it, if it reads that."""
    path = [str(PACKAGE), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(folder / name), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )


@contextlib.contextmanager
def running(
    name: str, *options: str, folder: Path = EXAMPLES, deadline: float = DEADLINE
) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed after the deadline, and at the end of the block."""
    with start(name, *options, folder=folder) as process:
        timer = threading.Timer(deadline, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def finish(process: subprocess.Popen[str]) -> str:
    """What a program prints, to its end, which must be a success."""
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def output(name: str, *options: str, folder: Path = EXAMPLES) -> str:
    """What a program prints that must succeed."""
    with running(name, *options, folder=folder) as process:
        return finish(process)


@contextlib.contextmanager
def serving(
    name: str, *options: str, deadline: float = DEADLINE
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that prints its port: the process, and the port."""
    with running(name, *options, deadline=deadline) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), port + process.stdout.read()
        yield process, int(port)


def served(server: list[str], client: list[str], *common: str) -> str:
    """What a client prints against a server."""
    with serving(*server, *common) as (_, port):
        return output(*client, *common, "--port", str(port))


class Work(NamedTuple):
    """What threads have done: CPU time in clock ticks, and how often they went to sleep."""

    ticks: int
    sleeps: int


def work_of(tasks: list[Path]) -> Work:
    ticks = sleeps = 0
    for task in tasks:
        times = (task / "stat").read_text().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        ticks += int(times[11]) + int(times[12])
        sleeps += int(status["voluntary_ctxt_switches"])
    return Work(ticks, sleeps)


def python_and_device(pid: int) -> tuple[Work, Work]:
    """Of a process: the thread that runs Python, and the others, which are a device's."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    main = [task for task in tasks if task.name == str(pid)]
    return work_of(main), work_of([task for task in tasks if task not in main])
