"""Programs that others wrote for other devices, unmodified, on usroce: rdma-core's examples, perftest, pyverbs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aiordma.cli.usroce import program_environment
from tests.conftest import required_devices
from tests.usroce.processes import Processes, finish, free_port

pytestmark = [pytest.mark.device, pytest.mark.usroce]

DEVICE = "usroce0"
MIB = 1 << 20


def need(program: str) -> str:
    """A program's path. Its absence is a failure where a device is required."""
    found = shutil.which(program)
    if found is None:
        package = "ibverbs-utils" if program.startswith("ibv_") else "perftest"
        reason = f"{program} is not installed (Debian: {package})"
        if required_devices():
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def run_pair(processes: Processes, address: str, program: str, *options: str) -> list[str]:
    """A program with itself, as server and client; what both printed."""
    port = free_port()
    environment = program_environment({"ADDRESS": address})
    command = [need(program), "-d", DEVICE, "-p", str(port), *options]
    server = processes.start(*command, environment=environment)
    server.wait_until_listening(port)
    client = processes.start(*command, "127.0.0.1", environment=environment)
    return finish(client, server)


# --- ibv_devinfo ---------------------------------------------------------------------------------------------


def run_devinfo(address: str, *options: str) -> dict[str, str]:
    """What it prints, of the lines that have a name and a value."""
    done = subprocess.run(
        [need("ibv_devinfo"), *options],
        env=program_environment({"ADDRESS": address}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.partition(":") for line in done.stdout.splitlines()]
    return {name.strip(): value.strip() for name, colon, value in rows if colon}


def test_devinfo(address: str) -> None:
    found = run_devinfo(address)
    assert found["hca_id"] == DEVICE
    assert found["transport"] == "InfiniBand (0)"
    assert found["state"] == "PORT_ACTIVE (4)"
    assert found["max_mtu"] == "4096 (5)"
    assert found["link_layer"] == "Ethernet"
    assert found["port_lid"] == "4791"


def test_devinfo_verbose(address: str) -> None:
    found = run_devinfo(address, "-v")
    assert found["hca_id"] == DEVICE
    assert int(found["max_qp"]) > 0
    assert found["atomic_cap"] == "ATOMIC_GLOB (2)"
    assert found["GID[  0]"] == f"::ffff:{address}, RoCE v2"
    assert re.fullmatch(r"([0-9a-f]{4}:){3}[0-9a-f]{4}", found["node_guid"])


# --- rdma-core's ping-pongs ----------------------------------------------------------------------------------


def play(
    processes: Processes,
    address: str,
    program: str,
    size: int,
    iterations: int,
    *options: str,
    queues: int = 1,
) -> None:
    """A ping-pong whose both ends say how far they came and that the data was right."""
    arguments = ["-g", "0", "-s", str(size), "-n", str(iterations), "-c", *options]
    for output in run_pair(processes, address, program, *arguments):
        exchanges = iterations * queues
        assert f"{2 * size * exchanges} bytes in " in output
        assert f"{exchanges} iters in " in output
        assert "invalid data" not in output
        assert f"GID ::ffff:{address}" in output


SIZES = [(1, 300), (4096, 300), (65536, 100), (MIB, 20)]
POLLED_OR_EVENTS = pytest.mark.parametrize("mode", [(), ("-e",)], ids=["polled", "events"])


@pytest.mark.parametrize(
    "mode", [(), ("-e",), ("-N",), ("-N", "-e")], ids=["polled", "events", "new", "new-events"]
)
@pytest.mark.parametrize(("size", "iterations"), SIZES)
def test_rc_pingpong(
    processes: Processes, address: str, size: int, iterations: int, mode: tuple[str, ...]
) -> None:
    play(processes, address, "ibv_rc_pingpong", size, iterations, *mode)


@pytest.mark.parametrize("mtu", [256, 512, 2048, 4096])
def test_rc_pingpong_with_each_mtu(processes: Processes, address: str, mtu: int) -> None:
    play(processes, address, "ibv_rc_pingpong", 65537, 50, "-m", str(mtu))


def test_rc_pingpong_with_completion_timestamps(processes: Processes, address: str) -> None:
    """Through the extended completion queue."""
    play(processes, address, "ibv_rc_pingpong", 4096, 200, "-t")


@POLLED_OR_EVENTS
@pytest.mark.parametrize(("size", "iterations"), SIZES)
def test_srq_pingpong(
    processes: Processes, address: str, size: int, iterations: int, mode: tuple[str, ...]
) -> None:
    play(processes, address, "ibv_srq_pingpong", size, iterations, "-q", "4", *mode)


@POLLED_OR_EVENTS
@pytest.mark.parametrize("size", [1, 1024, 4096])
def test_ud_pingpong(processes: Processes, address: str, size: int, mode: tuple[str, ...]) -> None:
    play(processes, address, "ibv_ud_pingpong", size, 300, *mode)


@POLLED_OR_EVENTS
@pytest.mark.parametrize("size", [1, 4096, 65536])
def test_uc_pingpong(processes: Processes, address: str, size: int, mode: tuple[str, ...]) -> None:
    """Not larger: nothing repairs what a socket buffer without privileges cannot hold."""
    play(processes, address, "ibv_uc_pingpong", size, 100, *mode)


@pytest.mark.parametrize("program", ["ibv_rc_pingpong", "ibv_ud_pingpong"])
def test_ipv6(processes: Processes, program: str) -> None:
    for output in run_pair(processes, "::1", program, "-g", "0", "-s", "1024", "-n", "100", "-c"):
        assert "100 iters in " in output
        assert "GID ::1" in output
        assert "invalid data" not in output


def test_started_by_aiordma(processes: Processes, address: str) -> None:
    """The command that people use for all this."""
    port = free_port()
    run = ["usroce", "run", "--address", address, "--", need("ibv_rc_pingpong")]
    options = ["-d", DEVICE, "-g", "0", "-n", "100", "-p", str(port)]
    server = processes.python("aiordma", *run, *options)
    server.wait_until_listening(port)
    client = processes.python("aiordma", *run, *options, "127.0.0.1")
    for output in finish(client, server):
        assert "100 iters in " in output
        assert f"GID ::ffff:{address}" in output


# --- perftest ------------------------------------------------------------------------------------------------


def measure(processes: Processes, address: str, program: str, *options: str) -> list[float]:
    """The figures of the client: size, iterations, and what it measured."""
    output, _ = run_pair(processes, address, program, "-F", *options)
    rows = [line.split() for line in output.splitlines() if re.match(r" *\d+ +\d+ +[\d.]+\s", line)]
    assert len(rows) == 1, output
    return [float(word) for word in rows[0]]


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("ib_send_lat", ["-s", "64"]),
        ("ib_send_lat", ["-s", "64", "-e"]),
        ("ib_send_lat", ["-s", "1024", "-c", "UD"]),
        ("ib_send_lat", ["-s", "65536", "-c", "UC"]),
        ("ib_write_lat", ["-s", "64"]),
        ("ib_write_lat", ["-s", "100000"]),
        ("ib_read_lat", ["-s", "64"]),
        ("ib_read_lat", ["-s", "100000"]),
        ("ib_atomic_lat", ["-A", "FETCH_AND_ADD"]),
        ("ib_atomic_lat", ["-A", "CMP_AND_SWAP"]),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_perftest_latency(processes: Processes, address: str, program: str, options: list[str]) -> None:
    size, iterations, least, most, typical, average, *_ = measure(
        processes, address, program, "-n", "200", *options
    )
    assert (size, iterations) == (int(options[1]) if options[0] == "-s" else 8, 200)
    assert 0 < least <= typical <= most
    assert least <= average <= most
    assert average < 1_000_000, "microseconds"


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("ib_write_bw", ["-s", "65536"]),
        ("ib_write_bw", ["-s", "1000000", "-n", "20"]),
        ("ib_write_bw", ["-s", "65536", "-q", "4", "-b"]),
        ("ib_send_bw", ["-s", "65536"]),
        ("ib_send_bw", ["-s", "65536", "-b"]),
        ("ib_send_bw", ["-s", "64", "--use-srq"]),
        ("ib_read_bw", ["-s", "65536"]),
        ("ib_atomic_bw", ["-A", "FETCH_AND_ADD"]),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_perftest_bandwidth(processes: Processes, address: str, program: str, options: list[str]) -> None:
    size, _, peak, average, rate = measure(processes, address, program, "-n", "200", *options)
    assert size == (int(options[1]) if options[0] == "-s" else 8)
    assert average > 0
    assert peak > 0
    assert rate > 0


# --- pyverbs -------------------------------------------------------------------------------------------------

PYVERBS_PYTHON = "/usr/bin/python3"


def test_pyverbs(processes: Processes, address: str) -> None:
    """rdma-core's own Python binding, in the interpreter that it was built for."""
    probe = [PYVERBS_PYTHON, "-c", "import pyverbs.device"]
    if (
        not os.path.exists(PYVERBS_PYTHON)
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip("pyverbs is not installed for the system's Python (Debian: python3-pyverbs)")
    program = str(Path(__file__).with_name("pyverbs_loop.py"))
    environment = program_environment({"ADDRESS": address})
    done = processes.start(PYVERBS_PYTHON, program, environment=environment)
    assert done.finish().splitlines()[-1] == "right"
