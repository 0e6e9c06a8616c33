"""``aiordma bench``: latency and rate of operations, between two machines or two processes of this one.

``aiordma bench --serve`` is one end, ``aiordma bench HOST:PORT`` the other. Without an address the command starts
the server itself, as a process that ends with it, each of them on a core of its own where there are two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from ..config import Config, Mode
from ..errors import RdmaError
from . import histogram
from .loops import LoopName, default_loop
from .loops import run as run_loop
from .options import (
    add_client_options,
    add_server_options,
    address,
    address_text,
    client_tls,
    positive,
    seconds,
    server_tls,
    sizes,
)
from .output import pairs, print_json, size, table

if TYPE_CHECKING:
    from .bench_client import Outcome, Where

HELP = "measure latency and rate of operations: against a server, or between two processes here"

INTERRUPTED = 130

_OPERATIONS = ("echo", "send", "write", "read", "fetch-add", "compare-swap", "rpc", "stream")
_DEFAULT_SERVER = ("127.0.0.1", 7471)
_HOST = "127.0.0.1"
#: Seconds that the server's process has to end.
_END = 10.0
#: A measurement that takes longer (seconds) tells how far it is.
_LONG = 1.5

#: The server's process gets our path, as multiprocessing does it: the package may lie anywhere.
_CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop(1))
from aiordma.cli import main
sys.exit(main())
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    parser.add_argument(
        "address", metavar="HOST:PORT", nargs="?", type=address, help="a server; none: one is started here"
    )
    parser.add_argument(
        "--serve",
        metavar="HOST:PORT",
        nargs="?",
        type=address,
        const=_DEFAULT_SERVER,
        help=f"be the server, for ping too (default: {address_text(*_DEFAULT_SERVER)})",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help=argparse.SUPPRESS
    )  # the process that we start
    parser.add_argument(
        "-o",
        "--operation",
        choices=_OPERATIONS,
        default="echo",
        help="echo: a message there and back (default); send: one way, until it has arrived; write, read, "
        "fetch-add, compare-swap: one-sided; rpc: a unary call; stream: bytes there and back",
    )
    parser.add_argument(
        "--size", metavar="BYTES", type=sizes, default=[64], help="such as 64, or 64,4KiB,1MiB (default: 64)"
    )
    parser.add_argument(
        "--outstanding", metavar="N", type=positive, default=1, help="operations under way on a connection"
    )
    parser.add_argument("--connections", metavar="N", type=positive, default=1, help="default: 1")
    parser.add_argument(
        "--seconds", metavar="S", type=seconds, help="of each size (default: 2, or what --count takes)"
    )
    parser.add_argument("--count", metavar="N", type=positive, help="operations of each size")
    add_end_options(parser)
    add_server_options(parser)
    parser.add_argument("--core", metavar="N", type=int, help="run on this core")
    parser.add_argument(
        "--no-pin", action="store_true", help="without an address: let the kernel place the processes"
    )


def add_end_options(parser: argparse.ArgumentParser) -> None:
    """How this end waits, and the options of connecting: for ``ping`` as well."""
    parser.add_argument(
        "--mode", choices=get_args(Mode), default="adaptive", help="how completions are awaited"
    )
    parser.add_argument(
        "--loop", choices=get_args(LoopName), default=default_loop(), help="default: uvloop, if installed"
    )
    add_client_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Status 0 when all was measured; 130 after an interruption, with what was measured by then."""
    if args.serve is not None:
        if args.address is not None:
            raise RdmaError("--serve is for the server, HOST:PORT for the client: one of them")
        with pinned(args.core):
            return _serve(args)
    if args.address is not None:
        with pinned(args.core):
            return _measure(args, *args.address)
    return _both(args)


def end(args: argparse.Namespace, host: str, port: int) -> Where:
    """The server that is meant, with the options of connecting."""
    from .bench_client import Where

    return Where(host, port, args.device, Config(mode=args.mode), client_tls(args), args.token)


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This thread, and those it starts, run on that core meanwhile. Raises :class:`~aiordma.errors.RdmaError`
    when there is no such core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        there = ", ".join(map(str, sorted(before)))
        raise RdmaError(f"--core {core}: this process may use {there}") from None
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# --- the server ---------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    with contextlib.suppress(KeyboardInterrupt):  # that is how it ends
        run_loop(_listen(args), args.loop)
    return 0


async def _listen(args: argparse.Namespace) -> None:
    import asyncio

    from ..connect import serve
    from .bench_server import BenchServer

    host, port = args.serve
    handler, config, tls = BenchServer(args.loop), Config(mode=args.mode), server_tls(args)
    server = serve(handler, host, port, device=args.device, config=config, ssl=tls, token=args.token)
    try:
        await server
    except OSError as error:
        if isinstance(error, RdmaError):
            raise
        raise RdmaError(f"cannot listen at {address_text(host, port)}: {error.strerror or error}") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        if args.json:
            print(json.dumps({"listening": {"host": host, "port": server.port}}), flush=True)
        else:
            print(f"listening at {address_text(host, server.port)}, {args.mode}, {args.loop}", flush=True)
        if args.until_eof:
            await _end_of_stdin()
        else:
            await asyncio.Event().wait()


async def _end_of_stdin() -> None:
    """Whoever started this process has ended, or wants it to end."""
    import asyncio

    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(0, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(0)


# --- both ends here -----------------------------------------------------------------------------------


def _both(args: argparse.Namespace) -> int:
    server_core, client_core = _cores(args)
    with _server_process(args, server_core) as port, pinned(client_core):
        return _measure(args, _HOST, port)


def _cores(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """For the server and for the client."""
    available = sorted(os.sched_getaffinity(0))
    if args.no_pin:
        return None, args.core
    client = args.core if args.core is not None else available[-1] if len(available) > 1 else None
    return next((core for core in available if core != client), None) if client is not None else None, client


@contextlib.contextmanager
def _server_process(args: argparse.Namespace, core: int | None) -> Iterator[int]:
    """Its port. It ends when its standard input does, so also when we are killed; Ctrl-C reaches us alone."""
    if args.tls or args.tls_ca or args.tls_cert:
        raise RdmaError("TLS is for two machines: give HOST:PORT, and --serve --tls-cert there")
    options = ["--serve", f"{_HOST}:0", "--until-eof", "--json", "--mode", args.mode, "--loop", args.loop]
    options += ["--device", args.device] if args.device else []
    options += ["--token", args.token] if args.token else []
    options += ["--core", str(core)] if core is not None else []
    argv = [sys.executable, "-c", _CHILD, json.dumps(sys.path), "bench", *options]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, process_group=0
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if line:
                yield json.loads(line)["listening"]["port"]
        finally:
            process.stdin.close()
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                process.kill()
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().removeprefix("aiordma: ")
        if not line:
            raise RdmaError(said or "the server's process ended without a word")
        if said:
            print(f"the server's process: {said}", file=sys.stderr)


# --- the client ---------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, host: str, port: int) -> int:
    from .bench_client import Job, measure

    if args.operation in ("fetch-add", "compare-swap"):
        args.size = [8]
    where = end(args, host, port)
    long = args.seconds or (0 if args.count else 2.0)
    progress = sys.stderr.isatty() and (not long or long > _LONG)
    outcomes: list[Outcome] = []
    for nbytes in args.size:
        job = Job(args.operation, nbytes, args.outstanding, args.connections, long or None, args.count)
        outcome = run_loop(measure(where, job, args.loop, progress=progress), args.loop)
        outcomes.append(outcome)
        if not args.json and outcome.times.count:
            print("\n".join([*([""] if len(outcomes) > 1 else []), *outcome_lines(outcome, str(where))]))
        if outcome.interrupted or outcome.problem:
            break
    if args.json:
        print_json({"server": str(where), "results": [as_json(outcome) for outcome in outcomes]})
    elif len(outcomes) > 1:
        print(f"\n{summary(outcomes)}")
    return _status(outcomes[-1])


def _status(last: Outcome) -> int:
    if last.problem is not None:
        if isinstance(last.problem, RdmaError):
            raise last.problem
        raise RdmaError(str(last.problem)) from last.problem
    return INTERRUPTED if last.interrupted else 0


# --- the report ---------------------------------------------------------------------------------------


def outcome_lines(outcome: Outcome, server: str) -> list[str]:
    """For people."""
    job, times = outcome.job, outcome.times
    end = " (interrupted)" if outcome.interrupted else " (broken off)" if outcome.problem else ""
    count = f"{times.count} in {histogram.duration(outcome.elapsed * 1e9)}{end}"
    head = f"{job.operation}, {size(job.size)}, {job.outstanding} outstanding on {job.connections} connection"
    return [
        f"{head}{'s' if job.connections > 1 else ''}: {count}",
        pairs(
            [("client", _end_text(outcome.client)), ("server", f"{server}: {_end_text(outcome.server)}")],
            "  ",
        ),
        "",
        *histogram.percentile_lines(times),
        "",
        *histogram.bar_lines(times, _width(), unicode=_unicode()),
        "",
        pairs(_figures(outcome)),
    ]


def _end_text(about: dict[str, Any]) -> str:
    cores = about.get("cores") or []
    core = f", core {cores[0]}" if len(cores) == 1 else ""
    return f"{about.get('route')}, MTU {about.get('mtu')}; {about.get('mode')}, {about.get('loop')}{core}"


def _figures(outcome: Outcome) -> list[tuple[str, str]]:
    rows = [("rate", f"{thousands(outcome.rate)} operations/s")]
    if outcome.bandwidth:
        both = outcome.job.operation in ("echo", "rpc", "stream")
        rows.append(("bandwidth", f"{bandwidth(outcome.bandwidth)}{' each way' if both else ''}"))
    cpu = {end: outcome.cpu_us(end) for end in ("client", "server")}
    spin = {end: outcome.spin_share(end) for end in ("client", "server")}
    used = [f"{end} {histogram.digits(value)} us" for end, value in cpu.items() if value is not None]
    spun = [f"{end} {value:.0%}" for end, value in spin.items() if value is not None]
    if used:
        rows.append(("CPU", f"{', '.join(used)} an operation"))
    if spun:
        rows.append(("spinning", f"{', '.join(spun)} of the time"))
    return rows


def summary(outcomes: Sequence[Outcome]) -> str:
    """One row for each size."""
    rows = [
        (
            size(one.job.size),
            histogram.duration(one.times.percentile(0.5)),
            histogram.duration(one.times.percentile(0.99)),
            f"{thousands(one.rate)}/s",
            bandwidth(one.bandwidth),
        )
        for one in outcomes
        if one.times.count
    ]
    return table(("size", "p50", "p99", "rate", "bandwidth"), rows)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """For programs: times in microseconds, bandwidth in bytes a second."""
    job, times = outcome.job, outcome.times
    latency = {name: times.percentile(share) / 1000 for name, share in histogram.PERCENTILES}
    return {
        "operation": job.operation,
        "size": job.size,
        "outstanding": job.outstanding,
        "connections": job.connections,
        "operations": times.count,
        "seconds": outcome.elapsed,
        "latency_us": {
            "min": times.min / 1000,
            **latency,
            "max": times.max / 1000,
            "mean": times.mean / 1000,
        },
        "histogram_us": [
            {"from": row.low / 1000, "to": None if row.high is None else row.high / 1000, "count": row.count}
            for row in times.rows(24)
        ],
        "operations_per_second": outcome.rate,
        "bytes_per_second": outcome.bandwidth,
        "cpu_us_per_operation": {end: outcome.cpu_us(end) for end in ("client", "server")},
        "spin_share": {end: outcome.spin_share(end) for end in ("client", "server")},
        "client": outcome.client,
        "server": outcome.server,
        "interrupted": outcome.interrupted,
        "error": str(outcome.problem) if outcome.problem else None,
    }


def thousands(value: float) -> str:
    """``51.2 k``."""
    for limit, unit in ((1e3, ""), (1e6, " k"), (1e9, " M")):
        if value < limit:
            return f"{histogram.digits(value * 1e3 / limit)}{unit}"
    return f"{histogram.digits(value / 1e9)} G"


def bandwidth(value: float) -> str:
    """``3.28 MB/s``; a MB is 1,000,000 bytes. A dash for none."""
    if not value:
        return "-"
    for limit, unit in ((1e6, "kB/s"), (1e9, "MB/s")):
        if value < limit:
            return f"{histogram.digits(value * 1e3 / limit)} {unit}"
    return f"{histogram.digits(value / 1e9)} GB/s"


def _unicode() -> bool:
    """Block elements are for terminals that have them; elsewhere plain characters are read by programs."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return sys.stdout.isatty() and encoding == "utf8"


def _width() -> int:
    return max(40, min(120, shutil.get_terminal_size().columns))
