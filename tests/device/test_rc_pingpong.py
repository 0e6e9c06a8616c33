"""examples/rc_pingpong.py against rdma-core's own ibv_rc_pingpong: whoever serves, polled and on events."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import aiordma
from aiordma.cli.usroce import program_environment
from aiordma.verbs.gid_choice import choose_gid, interface_addresses
from tests.conftest import device_under_test, required_devices

pytestmark = pytest.mark.device

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rc_pingpong.py"
PACKAGE = Path(aiordma.__file__).resolve().parents[1]
ITERATIONS = 5
DEADLINE = 60.0  # seconds; the machine may be emulated
_LISTEN = "0A"  # proc(5), /proc/net/tcp: the state of a socket


@dataclass
class Bench:
    """The programs on one device, and the processes started."""

    c_program: str
    usroce: bool
    device: str
    gid_index: int | None
    address: str
    port: int
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, program: str, *options: str) -> subprocess.Popen[str]:
        if program == "c":
            command = [self.c_program, "-d", self.device]
            if self.gid_index is not None:
                command += ["-g", str(self.gid_index)]
        else:
            command = [sys.executable, str(EXAMPLE), "-d", self.device, "-c"]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        if program == "c" and self.usroce:
            environment = program_environment(base=environment)
        process = subprocess.Popen(
            [*command, "-p", str(self.port), "-n", str(ITERATIONS), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.running.append(process)
        return process

    def run(self, server: str, client: str, *options: str) -> tuple[str, str]:
        """Runs both ends to their end and returns what they printed."""
        serving = self.start(server, *options)
        wait_until_listening(serving, self.port)
        connected = self.start(client, *options, self.address)
        outputs = connected.communicate(timeout=DEADLINE)[0], serving.communicate(timeout=DEADLINE)[0]
        assert (connected.returncode, serving.returncode) == (0, 0), "\n".join(outputs)
        return outputs

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


def wait_until_listening(process: subprocess.Popen[str], port: int) -> None:
    """Looks into /proc/net/tcp: the C program serves one connection only, and a trial would be that one."""
    deadline = time.monotonic() + DEADLINE
    while not _listening(port):
        assert time.monotonic() < deadline, "the server does not listen"
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"the server ended early: {process.communicate()[0]}")


def _listening(port: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for row in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = row.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def c_program() -> str:
    """The C program; without it there is nothing to compare with, a failure where a device is required."""
    found = shutil.which("ibv_rc_pingpong")
    if found is None:
        reason = "ibv_rc_pingpong is not installed (Debian: ibverbs-utils)"
        if required_devices():
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    device = device_under_test()
    with device.open() as context:
        choice = choose_gid(
            context.ports(), context.gids(), local=None, remote=None, interfaces=interface_addresses()
        )
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    entry = choice.entry
    address = str(entry.address) if entry else str(ipaddress.IPv4Address("127.0.0.1"))
    index = entry.index if entry else None
    made = Bench(c_program(), device.is_usroce, device.name, index, address, port)
    try:
        yield made
    finally:
        made.stop()


def check_result(output: str, size: int) -> None:
    assert f"{2 * size * ITERATIONS} bytes in " in output
    assert f"{ITERATIONS} iters in " in output
    assert output.count("QPN 0x") == 2


@pytest.mark.parametrize("size", [1, 4096, 65536])
@pytest.mark.parametrize("mode", [(), ("-e",)], ids=["polled", "events"])
@pytest.mark.parametrize(("server", "client"), [("c", "python"), ("python", "c")])
def test_against_the_c_program(
    bench: Bench, server: str, client: str, mode: tuple[str, ...], size: int
) -> None:
    for output in bench.run(server, client, "-s", str(size), *mode):
        check_result(output, size)


def test_both_ends_ours_and_few_receives(bench: Bench) -> None:
    """Two receives at a time: the queue is refilled while messages come."""
    for output in bench.run("python", "python", "-s", "1000", "-r", "2", "-e"):
        check_result(output, 1000)
