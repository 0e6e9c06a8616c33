"""``aiordma ping HOST:PORT``: round trips of a small message, one a line, in the manner of ping(8).

The peer is ``aiordma bench --serve``. What ping(8) asks of the network, this asks of the whole way: the bootstrap,
the device and GID that it led to, the queue pair, and the event loops of both ends.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RdmaError
from .bench import add_end_options, end
from .histogram import duration
from .loops import run as run_loop
from .options import address, nbytes, positive, seconds
from .output import print_json

if TYPE_CHECKING:
    from ..transport import Connection
    from .bench_client import Where

HELP = "send messages there and back, as ping(8) does: to an `aiordma bench --serve`"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    parser.add_argument("address", metavar="HOST:PORT", type=address, help="of aiordma bench --serve")
    parser.add_argument(
        "-c", "--count", metavar="COUNT", type=positive, help="round trips (default: until Ctrl-C)"
    )
    parser.add_argument(
        "-i",
        "--interval",
        metavar="S",
        type=_interval,
        default=1.0,
        help="seconds from one to the next; 0: none",
    )
    parser.add_argument(
        "-s", "--size", metavar="BYTES", type=nbytes, default=64, help="of a message (default: 64)"
    )
    parser.add_argument(
        "-W",
        "--timeout",
        metavar="S",
        type=seconds,
        default=10.0,
        help="for each round trip (default: 10)",
    )
    add_end_options(parser)


def _interval(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else seconds(text)


@dataclass
class Pings:
    """What has happened so far. ``bootstrap`` is in seconds, the round trips in nanoseconds."""

    sent: int = 0
    bootstrap: float | None = None
    client: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)
    problem: RdmaError | None = None


def run(args: argparse.Namespace) -> int:
    """Status 0 when every message came back; after Ctrl-C too, if any did."""
    pings = Pings()
    where = end(args, *args.address)
    try:
        run_loop(_ping(args, where, pings), args.loop)
    except KeyboardInterrupt:
        if not pings.times:
            raise
    except RdmaError as error:
        if pings.bootstrap is None:
            raise
        pings.problem = error
    if args.json:
        print_json(as_json(pings, str(where)))
    else:
        print("\n".join(summary_lines(pings, str(where))))
    if pings.problem is not None:
        raise pings.problem
    return 0


async def _ping(args: argparse.Namespace, where: Where, pings: Pings) -> None:
    from .bench_server import Setup, about, route_text

    started = time.perf_counter()
    async with where.connection(Setup("echo", args.size)) as (connection, pings.server):
        pings.bootstrap = time.perf_counter() - started
        pings.client = about(connection, args.loop)
        if not args.json:
            print(f"PING {where} over {route_text(connection)}; {args.mode}, {args.size} bytes")
            print(f"bootstrap {duration(pings.bootstrap * 1e9)}; server: {pings.server['route']}", flush=True)
        await _round_trips(connection, args, pings, str(where))


async def _round_trips(connection: Connection, args: argparse.Namespace, pings: Pings, server: str) -> None:
    import asyncio

    from .bench_client import in_time

    data = bytes(args.size)
    too_late = f"{server} did not answer message %d within {args.timeout:g} s"

    async def there_and_back() -> bytes:
        await connection.send(data)
        return await connection.recv()

    while True:
        before = time.perf_counter_ns()
        pings.sent += 1
        answer = await in_time(there_and_back(), args.timeout, too_late % pings.sent)
        pings.times.append(time.perf_counter_ns() - before)
        if answer != data:
            raise RdmaError(f"{server} answered message {pings.sent} with another one")
        if not args.json:
            took = duration(pings.times[-1])
            print(f"{len(data)} bytes from {server}: seq={pings.sent} time={took}", flush=True)
        if pings.sent == args.count:
            return
        await asyncio.sleep(args.interval)


def summary_lines(pings: Pings, server: str) -> list[str]:
    """As ping(8) ends."""
    lines = ["", f"--- {server} ping statistics ---", f"{pings.sent} sent, {len(pings.times)} received"]
    if pings.times:
        names = ("min", "p50", "avg", "max", "mdev")
        times = "/".join(duration(value) for value in _statistics(pings.times).values())
        lines.append(f"round trip {'/'.join(names)} = {times}")
    return lines


def _statistics(times: list[int]) -> dict[str, float]:
    """In nanoseconds."""
    return {
        "min": min(times),
        "p50": statistics.median(times),
        "mean": statistics.fmean(times),
        "max": max(times),
        "deviation": statistics.pstdev(times),
    }


def as_json(pings: Pings, server: str) -> dict[str, Any]:
    """Times in microseconds."""
    found = {name: value / 1000 for name, value in _statistics(pings.times).items()} if pings.times else None
    return {
        "address": server,
        "bootstrap_ms": None if pings.bootstrap is None else pings.bootstrap * 1000,
        "sent": pings.sent,
        "received": len(pings.times),
        "round_trips_us": [ns / 1000 for ns in pings.times],
        "round_trip_us": found,
        "client": pings.client,
        "server": pings.server,
        "error": str(pings.problem) if pings.problem else None,
    }
