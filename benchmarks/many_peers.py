"""Ten busy connections to a server, alone and beside 990 idle ones.

    python -m benchmarks.many_peers [--idle 990] [--busy 10] [--rounds 12] [--size 64] [--seconds 1]

Two servers in processes of their own, alike but for the idle connections of the second. One process is the busy
clients of both, one the idle clients. In each round both servers are measured, one after the other, and which is
first alternates; only one is under load at a time. Printed: messages per second of all busy connections together,
the ratio of each pair, and what an idle connection costs the server in registered and in resident memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

import aiordma
from aiordma import Config, Connection

from . import machine
from .processes import BenchmarkError, Child
from .rounds import Spread
from .text import note

#: Idle clients are many in one process: little memory for each.
IDLE = Config(receive_credits=4, rendezvous_depth=1, send_depth=8)
_DEADLINE = 120.0


# --- roles --------------------------------------------------------------------------------------------


def holdings(connections: set[Connection]) -> dict[str, Any]:
    """What the server holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    found = {"rss": pages * resource.getpagesize(), "connections": len(connections)}
    if connections:
        one = next(iter(connections)).statistics()
        found["leased"] = one.pool.leased
        found["registered"] = one.pool.registered
        found["receives"] = one.shared_receives.registered if one.shared_receives else 0
    return found


async def handler(connection: Connection) -> None:
    """Takes every message and drops it."""
    async for _ in connection:
        pass


async def server() -> None:
    """Prints its port; answers each line of its stdin with a report."""
    async with aiordma.serve(handler, "127.0.0.1", 0) as listening:
        print(listening.port, flush=True)
        async for _ in lines():
            print(json.dumps(holdings(listening.connections)), flush=True)


async def idle(port: int, count: int) -> None:
    """So many connections that do nothing until stdin ends."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            connecting = aiordma.connect("127.0.0.1", port, config=IDLE, timeout=_DEADLINE)
            await stack.enter_async_context(connecting)
        print("ready", flush=True)
        async for _ in lines():
            pass


async def busy(ports: list[int], count: int, size: int, seconds: float) -> None:
    """For each line of stdin, the index of a port: sends to that server; prints messages per second."""
    async with contextlib.AsyncExitStack() as stack:
        groups = []
        for port in ports:
            connecting = [aiordma.connect("127.0.0.1", port, timeout=_DEADLINE) for _ in range(count)]
            groups.append([await stack.enter_async_context(one) for one in connecting])
        print("ready", flush=True)
        async for line in lines():
            print(await rate(groups[int(line)], bytes(size), seconds), flush=True)


async def rate(connections: list[Connection], data: bytes, seconds: float) -> float:
    """Messages per second of all connections together."""
    started = time.perf_counter()
    counts = await asyncio.gather(*[send_until(one, data, started + seconds) for one in connections])
    return sum(counts) / (time.perf_counter() - started)


async def send_until(connection: Connection, data: bytes, end: float) -> int:
    """Sends bursts until the time has come; returns how many messages arrived."""
    count = 0
    while time.perf_counter() < end:
        await asyncio.gather(*[connection.send(data) for _ in range(64)])
        count += 64
    return count


async def lines() -> Any:
    """The lines of stdin, until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield line


# --- the measurement ----------------------------------------------------------------------------------


class Row:
    """The processes of one measurement."""

    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self._stack = stack
        self.servers = [self._child("server"), self._child("server")]
        self.ports = [child.read_line(_DEADLINE) for child in self.servers]
        self.busy = self._child(
            "busy", *self.ports, "--busy", options.busy, "--size", options.size, "--seconds", options.seconds
        )
        self._ready(self.busy)
        self.before = self.ask(1)
        self.idle = self._child("idle", self.ports[1], "--idle", options.idle)
        self._ready(self.idle)
        self.after = self.ask(1)

    def _child(self, *arguments: object) -> Child:
        child = Child([sys.executable, "-m", "benchmarks.many_peers", *map(str, arguments)])
        self._stack.callback(child.end)
        return child

    @staticmethod
    def _ready(child: Child) -> None:
        if (line := child.read_line(_DEADLINE)) != "ready":
            raise BenchmarkError(f"said {line!r} instead of being ready")

    def ask(self, index: int) -> dict[str, Any]:
        """A server's report."""
        self.servers[index].write("report")
        found: dict[str, Any] = json.loads(self.servers[index].read_line(_DEADLINE))
        return found

    def rate(self, index: int) -> float:
        """One measurement on one of the servers."""
        self.busy.write(str(index))
        return float(self.busy.read_line(_DEADLINE))


def measure(options: argparse.Namespace) -> None:
    """Runs it all and prints."""
    with contextlib.ExitStack() as stack:
        row = Row(stack, options)
        for index in (0, 1):
            row.rate(index)  # the busy grow to what they can use
        pairs = []
        for turn in range(options.rounds):
            machine.wait_for_rest(0.1, options.patience / options.rounds)
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {index: row.rate(index) for index in order}
            pairs.append((found[0], found[1]))
            note(f"  alone {found[0]:9.0f}/s   with {options.idle} idle {found[1]:9.0f}/s")
        results = document(pairs, row, options)
        print(report(results, options))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def document(pairs: list[tuple[float, float]], row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Rates, their ratios, and the memory of an idle connection in bytes."""
    memory = {
        name: (row.after[name] - row.before[name]) / max(1, options.idle)
        for name in ("leased", "receives", "rss")
    }
    return {
        "facts": machine.describe(),
        "rounds": [{"alone": alone, "beside_idle": beside} for alone, beside in pairs],
        "ratio": asdict(Spread.of([beside / alone for alone, beside in pairs])),
        "bytes_of_an_idle_connection": memory,
        "registered": row.after["registered"],
        "connections": row.after["connections"],
    }


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """As Markdown."""
    ratio, memory = found["ratio"], found["bytes_of_an_idle_connection"]
    alone, beside = (
        statistics.median(one[name] for one in found["rounds"]) for name in ("alone", "beside_idle")
    )
    rows = [
        (f"messages of {options.size} bytes a second, {options.busy} busy connections alone", f"{alone:.0f}"),
        (f"the same beside {options.idle} idle ones", f"{beside:.0f}"),
        ("ratio (middle half)", f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"),
        ("registered bytes of the server for each idle connection", f"{memory['leased']:.0f}"),
        ("of that for receives", f"{memory['receives']:.0f}"),
        ("resident bytes of the server for each idle connection", f"{memory['rss']:.0f}"),
        (f"registered in all, for {found['connections']} connections", f"{found['registered']:.0f}"),
    ]
    facts = [f"- {name}: {value}" for name, value in found["facts"].items()]
    table = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(["# Ten busy connections beside a thousand", "", *facts, "", *table])


def main() -> None:
    """The command line; the roles are for the children."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_peers")
    parser.add_argument("role", nargs="?", default="measure", choices=["measure", "server", "busy", "idle"])
    parser.add_argument("ports", nargs="*", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--idle", type=int, default=990, help="idle connections")
    parser.add_argument("--busy", type=int, default=10, help="busy connections to each server")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="bytes of a message")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for rest, in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every round, as JSON")
    options = parser.parse_args()
    machine.raise_file_limit()
    roles = {
        "server": lambda: server(),
        "idle": lambda: idle(options.ports[0], options.idle),
        "busy": lambda: busy(options.ports, options.busy, options.size, options.seconds),
    }
    if options.role == "measure":
        measure(options)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(roles[options.role]())


if __name__ == "__main__":
    main()
