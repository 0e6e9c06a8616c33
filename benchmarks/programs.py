"""The rows in C: our own programs, compiled when needed, and perftest where it is installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .processes import ROOT, BenchmarkError, Child

SOURCES = Path(__file__).parent
#: What a program is made of beside the source of its name, and the libraries.
PARTS = {
    "verbs_lat": ("verbs_lab.c", "-libverbs"),
    "verbs_pingpong": ("verbs_lab.c", "-libverbs"),
    "udp_pingpong": (),
}
PERFTEST = {"write": "ib_write_lat", "read": "ib_read_lat", "send": "ib_send_lat"}
COMPILE_DEADLINE = 120.0
DEADLINE = 60.0


def build(name: str) -> Path:
    """The compiled program, made anew for other sources. Raises :class:`BenchmarkError`."""
    program = _folder() / f"{name}-{_digest()}"
    if program.exists():
        return program
    unfinished = program.with_suffix(f".{os.getpid()}")
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-std=gnu11", "-O2", f"{name}.c", *PARTS[name], "-o", str(unfinished)]
    try:
        subprocess.run(
            command, cwd=SOURCES, check=True, capture_output=True, text=True, timeout=COMPILE_DEADLINE
        )
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{name}.c does not compile: {error.stderr.strip()}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchmarkError(f"{name}.c does not compile: {error}") from None
    unfinished.replace(program)
    return program


def _digest() -> str:
    """Of all sources: checkouts may share the folder, so the times of files say nothing."""
    sources = sorted(SOURCES.glob("*.[ch]"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def _folder() -> Path:
    """In the checkout where it can be written, else a temporary one."""
    folder = ROOT / ".cache" / "benchmarks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    return folder if writable else Path(tempfile.mkdtemp(prefix="aiordma-bench-"))


def run_pair(
    argv: Sequence[str],
    host: str,
    pin: tuple[int | None, int | None],
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Runs a server, which prints its port, and a client. Returns the client's lines."""
    server = Child(argv, pin[0], env)
    try:
        port = server.read_line(DEADLINE)
        client = Child([*argv, host, port], pin[1], env)
        try:
            lines = client.read_rest(DEADLINE).splitlines()
        finally:
            client.end()
        server.read_rest(DEADLINE)
    finally:
        server.end()
    return lines


def figures(lines: Sequence[str]) -> dict[str, float]:
    """Of a program that prints a figure a line, by its name."""
    return {name: float(value) for name, value in map(str.split, lines)}


def run_c(
    program: Path,
    where: tuple[str, int, str],
    size: int,
    iterations: int,
    pin: tuple[int | None, int | None],
    env: Mapping[str, str] | None = None,
) -> dict[tuple[str, str], float]:
    """One round of verbs_lat; ``where`` is device, GID index, address. Median ns by operation and wait."""
    device, gid_index, host = where
    argv = [str(program), device, str(gid_index), str(size), str(iterations)]
    lines = run_pair(argv, host, pin, env)
    return {(operation, wait): float(median) for operation, wait, _, median, _ in map(str.split, lines)}


def perftest_programs() -> dict[str, str]:
    """Those that are installed, by operation."""
    return {operation: name for operation, name in PERFTEST.items() if shutil.which(name)}


def run_perftest(
    name: str,
    where: tuple[str, int, str],
    size: int,
    iterations: int,
    pin: tuple[int | None, int | None],
) -> float:
    """One round of a perftest program: its ``t_typical`` in ns (of writes and sends half a round trip)."""
    device, gid_index, host = where
    port = _free_port()
    argv = [name, "-d", device, "-x", str(gid_index), "-F", "-c", "RC", "-s", str(size)]
    argv += ["-n", str(iterations), "-p", str(port)]
    server = Child(argv, pin[0])
    try:
        _wait_for_listener(port)
        client = Child([*argv, host], pin[1])
        try:
            return _typical(client.read_rest(DEADLINE), size) * 1000
        finally:
            client.end()
    finally:
        server.end()


def _typical(output: str, size: int) -> float:
    """From the row of figures below ``#bytes #iterations t_min t_max t_typical ...``."""
    for line in output.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0] == str(size):
            return float(words[4])
    raise BenchmarkError("perftest printed no row of figures")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def _wait_for_listener(port: int) -> None:
    """Until a socket listens there; a connection to find out would be taken for the client."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            try:
                lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
            except OSError:
                continue
            for words in map(str.split, lines):
                if words[1].endswith(f":{port:04X}") and words[3] == "0A":
                    return
        time.sleep(0.02)
    raise BenchmarkError("perftest's server did not listen in time")
