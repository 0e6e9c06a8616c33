"""What benchmarks.acceptance measures: each subject is processes of its own, which end with the measurement."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiordma.cli.usroce import program_environment

from . import programs
from .peers import driver
from .peers.contestants import Contestant
from .processes import Child, answer
from .rounds import Figures

HOST = "127.0.0.1"
START_DEADLINE = 60.0
SESSION_DEADLINE = 180.0
#: What usroce's packets travel over: the environment of both processes.
LINKS = {"UDP": "0", "shared memory": "1"}
MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """For all measurements of a run. ``pin`` are the cores of server and client."""

    seconds: float
    pin: tuple[int | None, int | None]
    device: str


@dataclass(frozen=True)
class Subject:
    """A name for the tables, and how to get its figures. ``measure`` raises
    :class:`~benchmarks.processes.BenchmarkError`, :class:`~benchmarks.peers.interface.Unavailable` or OSError."""

    name: str
    measure: Callable[[Setting], Figures]


def environment(link: str | None) -> dict[str, str]:
    """Of a process whose usroce uses that link."""
    return {**os.environ, **({"AIORDMA_USROCE_SHM": LINKS[link]} if link else {})}


def peer(name: str, module: str, scenario: str, link: str | None = None, **options: Any) -> Subject:
    """A contestant of benchmarks.peers on uvloop; with a link it is one of aiordma."""

    def measure(setting: Setting) -> Figures:
        given = options | ({"device": setting.device} if link else {})
        contestant = Contestant(name, module, "uvloop", given)
        env = environment(link)
        return driver.measure(contestant, scenario, setting.seconds, setting.pin, env)[0]

    return Subject(name, measure)


def session(name: str, scenario: str, mode: str, link: str, **options: Any) -> Subject:
    """A scenario of benchmarks.sessions, both ends in that mode."""

    def measure(setting: Setting) -> Figures:
        serve = ["bench", "--serve", f"{HOST}:0", "--until-eof", "--json", "--loop", "uvloop"]
        serve += ["--mode", mode, "--device", setting.device]
        given = {"mode": mode, "seconds": setting.seconds, "device": setting.device, **options}
        env = environment(link)
        with contextlib.ExitStack() as stack:
            server = Child([sys.executable, "-m", "aiordma", *serve], setting.pin[0], env)
            stack.callback(server.end)
            port = answer(server, START_DEADLINE)["listening"]["port"]
            module = [sys.executable, "-m", "benchmarks.sessions"]
            client = Child([*module, scenario, json.dumps(given | {"port": port})], setting.pin[1], env)
            stack.callback(client.end)
            figures: Figures = answer(client, SESSION_DEADLINE + 2 * setting.seconds)["figures"]
            return figures

    return Subject(name, measure)


def operation(name: str, what: str, size: int, mode: str, link: str, outstanding: int = 1) -> Subject:
    """An operation of `aiordma bench`."""
    return session(name, "operation", mode, link, operation=what, size=size, outstanding=outstanding)


def c_write(name: str, link: str, size: int, wait: str) -> Subject:
    """verbs_lat.c: one signaled write after the other, with that way of waiting (polled, asleep, event).
    ``Setting.seconds`` is turned into operations."""

    def measure(setting: Setting) -> Figures:
        program = programs.build("verbs_lat")
        iterations = max(100, int(setting.seconds * 10_000))
        env = program_environment({"SHM": LINKS[link]})
        where = (setting.device, 0, HOST)
        medians = programs.run_c(program, where, size, iterations, setting.pin, env)
        return {"p50_us": medians["write", wait] / 1000}

    return Subject(name, measure)


def c_batch(name: str, link: str) -> Subject:
    """verbs_pingpong.c, pattern batch: lists of 64 writes of 64 bytes."""

    def measure(setting: Setting) -> Figures:
        program = programs.build("verbs_pingpong")
        argv = [str(program), setting.device, "0", "batch", "busy", str(setting.seconds)]
        env = program_environment({"SHM": LINKS[link]})
        return programs.figures(programs.run_pair(argv, HOST, setting.pin, env))

    return Subject(name, measure)


#: One core copies from one buffer to another: what a byte costs at least.
_MEMCPY = """
import json, sys, time
size, seconds = int(sys.argv[1]), float(sys.argv[2])
source, target = memoryview(bytearray(b"x" * size)), memoryview(bytearray(b"y" * size))
target[:] = source
count, started = 0, time.perf_counter()
while (elapsed := time.perf_counter() - started) < seconds:
    target[:] = source
    count += 1
print(json.dumps({"gb_per_s": count * size / elapsed / 1e9}))
"""


def memcpy(name: str, size: int) -> Subject:
    """A slice assignment between buffers, which is one call of memmove."""

    def measure(setting: Setting) -> Figures:
        argv = [sys.executable, "-c", _MEMCPY, str(size), str(setting.seconds)]
        return _run(argv, setting.pin[1])

    return Subject(name, measure)


def python(name: str, code: str, times: int = 5) -> Subject:
    """A new interpreter that runs this; the least of a few times, in milliseconds from its start to its end."""

    def measure(setting: Setting) -> Figures:
        return {"ms": min(_time_of([sys.executable, "-c", code], setting.pin[1]) for _ in range(times))}

    return Subject(name, measure)


def _time_of(argv: list[str], core: int | None) -> float:
    started = time.perf_counter()
    child = Child(argv, core)
    try:
        child.read_rest(START_DEADLINE)
        return (time.perf_counter() - started) * 1000
    finally:
        child.end()


def _run(argv: list[str], core: int | None) -> Figures:
    child = Child(argv, core)
    try:
        figures: Figures = answer(child, SESSION_DEADLINE)
        child.read_rest(START_DEADLINE)
        return figures
    finally:
        child.end()
