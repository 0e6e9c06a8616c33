"""One side of a session of benchmarks.messaging: a process with one contestant and one scenario, server or client.

The server says {"port": ...}, and ends when a line comes on its stdin. The client gets the port as a line,
measures, and says {"figures": {figure: value}, "versions": {...}}, or {"error": why}. What cannot take part here
says {"unavailable": why}.

Every answer is compared with its request. Blocks are looked at by the server, whose report at the end must know
of every one, and of none that was damaged. Processor time is that of both processes, all their threads, from the
report of the server right before the timed part to that right after it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from typing import Any

if not __package__:
    raise SystemExit("started by benchmarks.messaging")

from .contestants import Contestant
from .interface import (
    LARGE,
    OUTSTANDING,
    PUSHERS,
    Client,
    Desk,
    Peer,
    Report,
    Unavailable,
    large_message,
    small_message,
)

Figures = dict[str, float]
#: Of a scenario that is warmed up or settled, a part of its time; and how long (s) the server may be behind.
WARM_UP = 0.2
SETTLE_DEADLINE = 20.0

_now_ns = time.perf_counter_ns


class WrongAnswer(Exception):
    """The contestant does not do what it is measured at."""


class Driver:
    """The line to benchmarks.messaging: stdout, kept from the libraries that print there themselves (UCX)."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **answer: Any) -> None:
        """One line."""
        print(json.dumps(answer), file=self._out, flush=True)


async def ask_report(client: Client, request: bytes = Report.REQUEST) -> Report:
    """What the server has seen."""
    return Report.decode(await client.request(request))


class Meter:
    """Wall clock and processor time of both sides from :meth:`start` to :meth:`stop`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def start(self) -> None:
        """The server's report comes first, so that the clock starts last. Neither side has garbage left of its
        set-up: a full collection takes 20 ms, and who has imported more has it earlier."""
        gc.collect()
        self._server = (await ask_report(self._client, Report.FIRST_REQUEST)).cpu_ns
        self._own = time.process_time_ns()
        self._started = _now_ns()

    async def stop(self, count: int) -> tuple[float, Figures]:
        """Seconds, and the figures that every scenario has; ``count`` is of requests, or of blocks."""
        seconds = (_now_ns() - self._started) / 1e9
        own = time.process_time_ns() - self._own
        report = await ask_report(self._client)
        cpu_ns = own + report.cpu_ns - self._server
        return seconds, {"count": count, "cpu_us": cpu_ns / 1000 / count}


# --- the scenarios ----------------------------------------------------------------------------------------


async def ask(client: Client, data: bytes, end: int) -> list[int]:
    """Requests one after the other until ``end``, one at least: a connection may be made for it, which is then
    no part of what is measured later. A time stamp before the first, and one after each."""
    request = client.request
    stamps = [_now_ns()]
    while len(stamps) == 1 or stamps[-1] < end:
        if await request(data) != data:
            raise WrongAnswer("an answer differs from its request")
        stamps.append(_now_ns())
    return stamps


def after(seconds: float) -> int:
    """On the clock of the stamps."""
    return _now_ns() + int(seconds * 1e9)


async def latency(client: Client, seconds: float) -> Figures:
    """One request at a time."""
    data = small_message(0)
    await ask(client, data, after(WARM_UP * seconds))
    meter = Meter(client)
    await meter.start()
    stamps = await ask(client, data, after(seconds))
    _, figures = await meter.stop(len(stamps) - 1)
    steps = sorted(later - earlier for earlier, later in itertools.pairwise(stamps))
    p99 = steps[int(len(steps) * 0.99)]
    return figures | {"p50_us": statistics.median(steps) / 1000, "p99_us": p99 / 1000}


async def together(jobs: list[Coroutine[Any, Any, int]]) -> int:
    """Runs tasks; the sum of what they did. The first one that fails ends all."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
    return sum(task.result() for task in tasks)


async def rate(client: Client, seconds: float) -> Figures:
    """Many tasks, each with a request of its own."""

    async def one(number: int, end: int) -> int:
        return len(await ask(client, small_message(number), end)) - 1

    async def all_of_them(time: float) -> int:
        return await together([one(number, after(time)) for number in range(OUTSTANDING)])

    await all_of_them(WARM_UP * seconds)
    meter = Meter(client)
    await meter.start()
    count = await all_of_them(seconds)
    elapsed, figures = await meter.stop(count)
    return figures | {"per_second": count / elapsed}


async def throughput(client: Client, seconds: float) -> Figures:
    """Blocks one way, a few of them being sent at a time, until the server has them all."""
    block = large_message()

    async def push(end: int) -> int:
        count = 0
        while _now_ns() < end:
            await client.push(block)
            count += 1
        return count

    async def all_of_them(time: float) -> int:
        return await together([push(after(time)) for _ in range(PUSHERS)])

    await client.push(block)
    sent = 1 + await all_of_them(WARM_UP * seconds)
    await settle(client, sent)
    meter = Meter(client)
    await meter.start()
    count = await all_of_them(seconds)
    await settle(client, sent + count)
    elapsed, figures = await meter.stop(count)
    return figures | {"gb_per_s": count * LARGE / elapsed / 1e9}


async def settle(client: Client, sent: int) -> None:
    """Until the server has all blocks; where order is kept, the first answer says so."""
    deadline = after(SETTLE_DEADLINE)
    while True:
        report = await ask_report(client)
        if report.damaged:
            raise WrongAnswer(f"{report.damaged} of {report.blocks} blocks arrived damaged")
        if report.blocks >= sent:
            return
        if _now_ns() > deadline:
            raise WrongAnswer(f"{report.blocks} of {sent} blocks arrived")


SCENARIOS: dict[str, tuple[int, Callable[[Client, float], Awaitable[Figures]]]] = {
    "latency": (1, latency),
    "rate": (OUTSTANDING, rate),
    "throughput": (PUSHERS, throughput),
}


# --- the process ------------------------------------------------------------------------------------------


async def serve(peer: Peer, driver: Driver) -> None:
    """Until the driver says that it is over."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    async with peer.serve(Desk()) as port:
        loop.add_reader(sys.stdin.fileno(), over.set)
        driver.say(port=port)
        await over.wait()
        loop.remove_reader(sys.stdin.fileno())


async def measure(peer: Peer, driver: Driver, port: int, scenario: str, seconds: float) -> None:
    """The figures are told when the connection is closed: that is part of what a contestant must do."""
    outstanding, run_scenario = SCENARIOS[scenario]
    try:
        async with peer.connect(port, outstanding) as client:
            figures = await run_scenario(client, seconds)
    except Exception as error:
        driver.say(error=explain(error))
        return
    driver.say(figures=figures, versions=peer.versions())


def explain(error: BaseException) -> str:
    """The first of several, and what it came from."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = f"{type(error).__name__}: {error}"
    return f"{text}; from {explain(error.__cause__)}" if error.__cause__ else text


def run(job: Coroutine[Any, Any, None], loop: str) -> None:
    if loop == "uvloop":
        import uvloop

        uvloop.run(job)
    else:
        asyncio.run(job)


def encode(contestant: Contestant, scenario: str, seconds: float) -> str:
    """The second argument of the process."""
    return json.dumps({"contestant": asdict(contestant), "scenario": scenario, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description="started by benchmarks.messaging")
    parser.add_argument("role", choices=("server", "client"))
    parser.add_argument("command", type=json.loads)
    options = parser.parse_args()
    command, driver = options.command, Driver()
    contestant = Contestant(**command["contestant"])
    try:
        peer = contestant.make()
    except Unavailable as error:
        driver.say(unavailable=str(error))
        return
    if options.role == "server":
        run(serve(peer, driver), contestant.loop)
        return
    port = int(sys.stdin.readline())
    run(measure(peer, driver, port, command["scenario"], command["seconds"]), contestant.loop)


if __name__ == "__main__":
    main()
