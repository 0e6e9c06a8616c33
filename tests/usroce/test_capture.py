"""Captures open in tshark and decode as RoCE v2, and each ICRC is right by somebody else's computation."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

from aiordma.cli.usroce import program_environment
from aiordma.testing import Capture, Pair, connected_pair
from aiordma.verbs import usroce
from tests.conftest import required_devices
from tests.usroce.frames import WITH_RETH, Endpoint, Opcode, Packet, read_capture
from tests.usroce.processes import CHECKOUT, PACKAGE, Processes, free_port

pytestmark = [pytest.mark.device, pytest.mark.usroce]

STANDARD_PORT = 4791
MTU = 4096

#: What is looked at in each packet. The last is there where tshark has something to say about it.
FIELDS = (
    "frame.protocols",
    "udp.payload",
    "infiniband.bth.opcode",
    "infiniband.bth.psn",
    "infiniband.bth.destqp",
    "infiniband.reth.dmalen",
    "infiniband.invariant.crc",
    "_ws.expert.severity",
)
WARNING = 0x00600000


def need(program: str, package: str) -> str:
    """Its path. That it is not there is a failure where a device is required."""
    found = shutil.which(program)
    if found is None:
        reason = f"{program} is not installed (Debian: {package})"
        if required_devices():
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Decode(Protocol):
    def __call__(self, path: Path, *options: str) -> list[dict[str, str]]: ...


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Decode:
    """Runs tshark on a capture; returns the fields of each packet."""
    program = need("tshark", "tshark")
    # Without the settings of whoever runs the tests.
    home = tmp_path_factory.mktemp("tshark")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}

    def run(path: Path, *options: str) -> list[dict[str, str]]:
        columns = [word for field in FIELDS for word in ("-e", field)]
        command = [program, "-n", "-r", str(path), "-T", "fields", *columns, *options]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        return [dict(zip(FIELDS, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]

    return run


def decode_as(packets: Sequence[Packet]) -> list[str]:
    """tshark knows RoCE v2 by its port; what has it at neither end is named."""
    ports = {packet.source.port for packet in packets} - {STANDARD_PORT}
    return [word for port in sorted(ports) for word in ("-d", f"udp.port=={port},infiniband")]


def check(path: Path, decode: Decode) -> list[Packet]:
    """tshark sees in each packet what is in it, and has nothing to complain of; the ICRCs are right."""
    packets = list(read_capture(path))
    wrong = [number for number, packet in enumerate(packets, 1) if not packet.has_right_icrc]
    assert not wrong, f"wrong ICRC in packets {wrong[:10]} of {len(packets)}"
    decoded = decode(path, *decode_as(packets))
    assert len(decoded) == len(packets)
    for packet, found in zip(packets, decoded, strict=True):
        check_packet(packet, found)
    return packets


def check_packet(packet: Packet, found: dict[str, str]) -> None:
    network = "ip" if packet.source.address.version == 4 else "ipv6"
    assert found["frame.protocols"].startswith(f"raw:{network}:udp:infiniband")
    assert int(found["infiniband.bth.opcode"]) == packet.opcode
    assert int(found["infiniband.bth.psn"]) == packet.psn
    assert int(found["infiniband.bth.destqp"], 16) == packet.qp_num
    assert int(found["infiniband.invariant.crc"], 16) == int.from_bytes(packet.frame[-4:], "big")
    assert bool(found["infiniband.reth.dmalen"]) == (packet.opcode in WITH_RETH)
    severities = map(int, filter(None, found["_ws.expert.severity"].split(",")))
    assert max(severities, default=0) < WARNING, found


def opcodes(packets: Sequence[Packet]) -> set[int]:
    return {packet.opcode for packet in packets}


async def operate(pair: Pair, size: int = 3 * MTU) -> None:
    """Each operation once, some in several packets, some of odd size."""
    client, server = pair
    lease, region = await pair.region(size)
    await client.write(bytes(size), region[:size])
    await client.write(b"odd", region[:3])
    await client.write(bytes(size), region[:size], notify=7)
    assert await server.notified() == 7
    assert len(await client.read(region[:size])) == size
    assert await client.fetch_add(region[:8], 5) == 0
    assert await client.compare_swap(region[:8], 5, 6) == 5
    await client.send(b"one packet")
    assert await server.recv() == b"one packet"


# --- the demo ------------------------------------------------------------------------------------------------


def run_demo(folder: Path) -> list[Path]:
    """Each of its two processes leaves a capture."""
    environment = {
        **os.environ,
        "AIORDMA_USROCE_PCAP": str(folder / "%p.pcap"),
        "PYTHONPATH": f"{PACKAGE}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(CHECKOUT / "examples" / "demo.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.glob("*.pcap"))


def sent(packets: Sequence[Packet], source: Endpoint, destination: Endpoint) -> Counter[bytes]:
    """Without the ICRC, which is another one for each place in a row of segments."""
    return Counter(
        packet.frame[:-4]
        for packet in packets
        if (packet.source, packet.destination) == (source, destination)
    )


def test_demo(decode: Decode, tmp_path: Path) -> None:
    one, other = (check(path, decode) for path in run_demo(tmp_path))
    for packets in (one, other):
        assert opcodes(packets) >= {
            Opcode.SEND_ONLY,
            Opcode.WRITE_FIRST,
            Opcode.WRITE_MIDDLE,
            Opcode.WRITE_LAST_IMM,
            Opcode.READ_REQUEST,
            Opcode.READ_FIRST,
            Opcode.READ_MIDDLE,
            Opcode.READ_LAST,
            Opcode.FETCH_ADD,
            Opcode.ATOMIC_ACKNOWLEDGE,
            Opcode.ACKNOWLEDGE,
        }
    # What one end saw coming, the other saw going.
    between = {(p.source, p.destination) for p in one} & {(p.source, p.destination) for p in other}
    assert len(between) == 2
    for ends in between:
        here, there = sent(one, *ends), sent(other, *ends)
        assert here <= there or there <= here


# --- pieces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_every_operation(decode: Decode, tmp_path: Path, address: str) -> None:
    with usroce.options(address=address), Capture(tmp_path / "capture.pcap") as capture:
        async with connected_pair(host=address) as pair:
            await operate(pair)
    assert capture.paths == [capture.path]
    assert opcodes(check(capture.path, decode)) >= {
        Opcode.SEND_ONLY,
        Opcode.WRITE_FIRST,
        Opcode.WRITE_LAST,
        Opcode.WRITE_LAST_IMM,
        Opcode.WRITE_ONLY,
        Opcode.READ_REQUEST,
        Opcode.READ_FIRST,
        Opcode.READ_LAST,
        Opcode.FETCH_ADD,
        Opcode.COMPARE_SWAP,
        Opcode.ATOMIC_ACKNOWLEDGE,
        Opcode.ACKNOWLEDGE,
    }


async def test_another_port_is_to_be_named(decode: Decode, tmp_path: Path, address: str) -> None:
    """As the documentation says it."""
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind((address, STANDARD_PORT))
        with usroce.options(address=address), Capture(tmp_path / "capture.pcap") as capture:
            async with connected_pair(host=address) as pair:
                await operate(pair)
    packets = check(capture.path, decode)
    assert STANDARD_PORT not in {packet.source.port for packet in packets}
    assert not any("infiniband" in found["frame.protocols"] for found in decode(capture.path))


async def test_a_capture_shows_what_the_faults_left(decode: Decode, tmp_path: Path, address: str) -> None:
    """It is behind the fault link: what that dropped is not in it, what it damaged or doubled is."""
    with usroce.options(address=address), Capture(tmp_path / "capture.pcap") as capture:
        async with connected_pair(host=address) as pair:
            (context,) = usroce.contexts()
            usroce.set_fault(context, usroce.Fault(drop=0.1, corrupt=0.1, duplicate=0.1, seed=1))
            for _ in range(5):
                await operate(pair)
            usroce.set_fault(context, None)
            counters = usroce.counters(context)
    packets = list(read_capture(capture.path))
    assert counters.faults_dropped > 0
    assert counters.faults_duplicated > 0
    assert counters.faults_corrupted > 0
    # Once going, once coming, and a damaged one may have been doubled.
    damaged = sum(not packet.has_right_icrc for packet in packets)
    assert 2 * counters.faults_corrupted <= damaged <= 4 * counters.faults_corrupted
    assert len(decode(capture.path)) == len(packets)


def test_datagrams(decode: Decode, processes: Processes, tmp_path: Path, address: str) -> None:
    port = free_port()
    environment = program_environment({"ADDRESS": address, "PCAP": str(tmp_path / "%p.pcap")})
    command = [
        need("ibv_ud_pingpong", "ibverbs-utils"),
        "-d",
        "usroce0",
        "-g",
        "0",
        "-n",
        "20",
        "-p",
        str(port),
    ]
    server = processes.start(*command, environment=environment)
    server.wait_until_listening(port)
    client = processes.start(*command, "127.0.0.1", environment=environment)
    client.finish()
    server.finish()
    for path in tmp_path.glob("*.pcap"):
        assert opcodes(check(path, decode)) == {Opcode.DATAGRAM}
