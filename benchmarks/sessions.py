"""A client process that measures aiordma against `aiordma bench --serve`: what takes more than that command does.

    python -m benchmarks.sessions SCENARIO '{"port": ..., ...}'         started by benchmarks.acceptance

It says {"figures": {figure: value}} or {"error": why}. Processor time is that of both processes.

- operation: one of those of `aiordma bench`.
- batch: lists of 64 writes of 64 bytes with conn.batch(), one after the other; operations a second.
- connections: echoes one at a time, each on another one of many connections.
- idle: nothing, for a while, on a connection that was in use before; processor time as a share of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop

from aiordma import Config, Connection
from aiordma.cli.bench_client import Job, Where, measure, server_usage
from aiordma.cli.bench_server import REGION, Setup

HOST = "127.0.0.1"
Figures = dict[str, float]
Options = dict[str, Any]

BATCH = 64
SMALL = 64
_WARM_UP = 0.2
#: A thousand connections in one process: little memory for each, as idle clients would have it.
_MANY = {"receive_credits": 4, "rendezvous_depth": 1, "send_depth": 8}


def where(options: Options, **config: Any) -> Where:
    """The server."""
    made = Config(mode=options["mode"], **config)
    return Where(HOST, options["port"], options["device"], made, None, None, timeout=60.0)


@contextlib.asynccontextmanager
async def processor_time(control: Connection) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Seconds of both processes since the start."""
    before = time.process_time() + (await server_usage(control))["cpu"]

    async def since() -> float:
        own = time.process_time()  # first: the question is no part of what is measured
        return own + (await server_usage(control))["cpu"] - before

    yield since


async def operation(options: Options) -> Figures:
    """``operation``, ``size`` and ``outstanding`` as in the command."""
    job = Job(options["operation"], options["size"], options["outstanding"], seconds=options["seconds"])
    outcome = await measure(where(options), job, "uvloop", progress=False)
    if outcome.problem is not None:
        raise outcome.problem
    cpu = [outcome.cpu_us(end) or 0.0 for end in ("client", "server")]
    return {
        "p50_us": outcome.times.percentile(0.5) / 1000,
        "p99_us": outcome.times.percentile(0.99) / 1000,
        "per_second": outcome.rate,
        "gb_per_s": outcome.bandwidth / 1e9,
        "cpu_us": sum(cpu),
    }


async def batch(options: Options) -> Figures:
    """One region, each write of a batch to a place of its own."""
    data = bytes(SMALL)
    async with (
        where(options).connection(Setup("control")) as (control, _),
        where(options).connection(Setup("target", BATCH * SMALL, "write")) as (connection, _),
    ):
        region = await connection.remote(REGION)
        places = [region[i * SMALL : (i + 1) * SMALL] for i in range(BATCH)]

        async def some(seconds: float) -> tuple[int, float]:
            count, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                async with connection.batch() as many:
                    for place in places:
                        many.write(data, place)
                count += BATCH
            return count, elapsed

        await some(_WARM_UP * options["seconds"])
        async with processor_time(control) as since:
            count, elapsed = await some(options["seconds"])
            return {"per_second": count / elapsed, "cpu_us": await since() * 1e6 / count}


async def connections(options: Options) -> Figures:
    """``count`` of them."""
    data = bytes(SMALL)
    async with contextlib.AsyncExitStack() as stack:
        control, _ = await stack.enter_async_context(where(options).connection(Setup("control")))
        many = []
        for _ in range(options["count"]):
            made = where(options, **_MANY).connection(Setup("echo", SMALL))
            many.append((await stack.enter_async_context(made))[0])
        for connection in many:
            await _echo(connection, data)
        async with processor_time(control) as since:
            steps = await _timed_echoes(many, data, options["seconds"])
            cpu = await since()
    return {"p50_us": statistics.median(steps) / 1000, "cpu_us": cpu * 1e6 / len(steps)}


async def _echo(connection: Connection, data: bytes) -> None:
    await connection.send(data)
    await connection.recv()


async def _timed_echoes(many: list[Connection], data: bytes, seconds: float) -> list[int]:
    """Nanoseconds of each."""
    stamps = [time.perf_counter_ns()]
    end = stamps[0] + int(seconds * 1e9)
    for connection in itertools.cycle(many):
        await _echo(connection, data)
        stamps.append(time.perf_counter_ns())
        if stamps[-1] > end:
            break
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


async def idle(options: Options) -> Figures:
    """Forty times as long as the others, a second at least: the two reports themselves take a millisecond, and
    adaptive mode polls for another after each."""
    seconds = max(1.0, 40 * options["seconds"])
    async with (
        where(options).connection(Setup("control")) as (control, _),
        where(options).connection(Setup("echo", SMALL)) as (connection, _),
    ):
        for _ in range(100):
            await _echo(connection, bytes(SMALL))
        await asyncio.sleep(0.1)  # what adaptive mode has learned says that it waits no longer
        async with processor_time(control) as since:
            await asyncio.sleep(seconds)
            return {"share_percent": await since() / seconds * 100}


SCENARIOS = {"operation": operation, "batch": batch, "connections": connections, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(description="started by benchmarks.acceptance")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            figures = runner.run(SCENARIOS[arguments.scenario](arguments.options))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"figures": figures}), flush=True)


if __name__ == "__main__":
    main()
