"""usroce from Python: its addresses, counters, settings, and other programs on it."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import aiordma
from aiordma import Config
from aiordma._native._datapath import ONE_SIDED
from aiordma.adapter import open_route
from aiordma.cli import usroce as command
from aiordma.errors import DeviceError, MisuseError
from aiordma.testing import connected_pair
from aiordma.verbs import usroce
from aiordma.verbs.gid_choice import interface_addresses
from aiordma.verbs.usroce import Fault
from tests.device.pcap import packets

pytestmark = [pytest.mark.device, pytest.mark.usroce]

PACKAGE = Path(aiordma.__file__).resolve().parents[1]
DOCUMENTATION_ADDRESS = "192.0.2.1"  # RFC 5737: nobody has it

SEND_ONLY, ACKNOWLEDGE = 0x04, 0x11


def own_address(version: int) -> str:
    """An address of this machine that is not loopback's."""
    for name, addresses in interface_addresses().items():
        for address in addresses:
            if name != "lo" and address.version == version and not address.is_link_local:
                return str(address)
    pytest.skip(f"this machine has no IPv{version} address but loopback's")


# --- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_loopback_of_either_family(host: str) -> None:
    async with connected_pair(host=host) as pair:
        for end in pair:
            entry = end.route.choice.entry
            assert entry is not None
            assert str(entry.address) == host
            assert entry.interface == "lo"
        await pair.client.send(b"hello")
        assert await pair.server.recv() == b"hello"


@pytest.mark.parametrize("version", [4, 6])
async def test_an_address_of_this_machine(version: int) -> None:
    address = own_address(version)
    config = Config(usroce_address=address)
    async with connected_pair(config, host=address) as pair:
        entry = pair.client.route.choice.entry
        assert entry is not None
        assert str(entry.address) == address
        assert [str(row.address) for row in pair.client.route.adapter.context.gids()] == [address]
        await pair.client.send(b"hello")
        assert await pair.server.recv() == b"hello"


async def test_two_configurations_in_one_loop_are_two_devices() -> None:
    """Neither gets the addresses of the other, whichever comes first."""
    one, other = Config(), Config(usroce_address="127.0.0.2, 127.0.0.3")
    async with connected_pair(one) as first, connected_pair(one, server_config=other) as second:
        assert first.client.route.adapter is first.server.route.adapter is second.client.route.adapter
        assert second.server.route.adapter is not second.client.route.adapter
        for pair, addresses in ((first, {"127.0.0.1"}), (second, {"127.0.0.2", "127.0.0.3"})):
            rows = pair.server.route.adapter.context.gids()
            assert {str(row.address) for row in rows if row.gid.ipv4_mapped} == addresses
            lease, remote = await pair.region(1 << 20)
            await pair.client.write(b"x" * (1 << 20), remote)
            assert bytes(lease) == b"x" * (1 << 20)
        async with connected_pair(Config(usroce_address="127.0.0.2,127.0.0.3")) as third:
            assert third.server.route.adapter is second.server.route.adapter


@pytest.mark.parametrize("shared_receives", [None, 64])
async def test_a_message_takes_the_receive_that_was_free_last(shared_receives: int | None) -> None:
    async with connected_pair(Config(shared_receives=shared_receives)) as pair:
        addresses = set()
        for _ in range(20):
            await pair.client.send(b"hello")
            with await pair.server.recv_lease() as lease:
                addresses.add(lease.address)
        assert len(addresses) <= 3  # of 9 at least: credits that come in between take one, too


@pytest.mark.parametrize("shared", [True, False])
async def test_whether_memory_is_shared(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration comes before the environment; one that says nothing shares."""
    monkeypatch.setenv("AIORDMA_USROCE_SHM", "0" if shared else "1")
    one = Config(usroce_address="127.0.0.4", usroce_shared_memory=shared)
    other = Config(usroce_address="127.0.0.5", usroce_shared_memory=shared)
    async with connected_pair(one, server_config=other) as pair:
        for _ in range(50):
            await pair.client.send(b"hello")
            assert await pair.server.recv() == b"hello"
        for end in pair:
            counters = usroce.counters(end.route.adapter.context)
            assert (counters.shm_peers, counters.shm_sent > 0) == (int(shared), shared)


async def test_devices_of_one_address_find_each_other_by_their_ports() -> None:
    """Processes on one address are like these: the second has another UDP port, which the handshake tells."""
    plain, same = Config(), Config(usroce_address="127.0.0.1")
    async with connected_pair(plain, server_config=same) as pair:
        ports = [end.route.choice.port.lid for end in pair]
        assert len(set(ports)) == 2
        assert all(port > 1023 for port in ports)
        await pair.client.send(b"hello")
        assert await pair.server.recv() == b"hello"
        await pair.server.send(b"hello yourself")
        assert await pair.client.recv() == b"hello yourself"


async def test_an_address_that_is_not_ours() -> None:
    config = Config(usroce_address=DOCUMENTATION_ADDRESS)
    with pytest.raises(DeviceError, match=r"EADDRNOTAVAIL.*Config\.usroce_address") as caught:
        open_route("usroce0", None, None, config)
    assert caught.value.errno == errno.EADDRNOTAVAIL


async def test_the_environment_gives_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIORDMA_USROCE_ADDRESS", "127.0.0.4")
    async with connected_pair() as pair:
        rows = pair.client.route.adapter.context.gids()
        assert [str(row.address) for row in rows] == ["127.0.0.4"]


# --- settings of the process --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("colour", "red"), ("address", "eth0"), ("fault", "drop=2")])
def test_a_setting_that_usroce_does_not_take(name: str, value: str) -> None:
    with pytest.raises(MisuseError, match=name):
        usroce.set_option(name, value)


def test_settings_end_with_their_block() -> None:
    def addresses() -> list[str]:
        with usroce.usroce_device().open() as context:
            return [str(row.address) for row in context.gids()]

    before = addresses()
    with usroce.options(address="127.0.0.5"):
        assert addresses() == ["127.0.0.5"]
        with usroce.options(address="127.0.0.6"):
            assert addresses() == ["127.0.0.6"]
        assert addresses() == ["127.0.0.5"]
    assert addresses() == before
    with pytest.raises(MisuseError), usroce.options(address="127.0.0.5", fault="nonsense"):
        pass
    assert addresses() == before


def test_settings_of_one_thread_do_not_meet_another_one() -> None:
    """Each thread gets the address it asked for, however they interleave."""
    wrong: list[str] = []

    def open_and_look(address: str | None) -> None:
        for _ in range(20):
            if address is None:
                with usroce.usroce_device().open() as context:
                    found = str(context.gids()[0].address)
            else:
                with usroce.options(address=address), usroce.usroce_device().open() as context:
                    found = str(context.gids()[0].address)
            if found != (address or "127.0.0.1"):
                wrong.append(f"{found} instead of {address}")

    threads = [threading.Thread(target=open_and_look, args=(f"127.0.0.{i}",)) for i in (7, 8)]
    threads.append(threading.Thread(target=open_and_look, args=(None,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- faults, counters, captures -----------------------------------------------------------------------


async def test_counters_count() -> None:
    async with connected_pair() as pair:
        context = pair.client.route.adapter.context
        before = usroce.counters(context)
        await pair.client.send(bytes(1000))
        await pair.server.recv()
        after = usroce.counters(context)
        assert after.sent - before.sent >= 2, "the message and its acknowledgement"
        assert after.sent_bytes - before.sent_bytes > 1000
        assert (after.bad_icrc, after.malformed) == (0, 0)
        assert after.timeouts or not after.retransmitted, "nothing is lost; but the machine may stall"


async def test_damage_is_seen_and_mended() -> None:
    async with connected_pair(Config(ack_timeout=10)) as pair:
        context = pair.client.route.adapter.context
        lease, remote = await pair.region(1 << 20)
        usroce.set_fault(context, Fault(corrupt=0.05, seed=3))
        data = os.urandom(1 << 20)
        await pair.client.write(data, remote)
        assert await pair.client.read(remote) == data
        assert bytes(lease) == data
        usroce.set_fault(context, None)
        counted = usroce.counters(context)
        assert counted.faults_corrupted > 0
        assert counted.bad_icrc > 0
        assert counted.retransmitted > 0


async def test_a_long_batch_is_cancelled() -> None:
    """What is under way happens all the same; the rest of it does not."""
    async with connected_pair() as pair:
        context = pair.client.route.adapter.context
        lease, remote = await pair.region(8)
        operations: list[asyncio.Future[Any]] = []

        async def add() -> None:
            async with pair.client.batch() as batch:
                operations.extend(batch.fetch_add(remote, 1) for _ in range(300))

        usroce.set_fault(context, Fault(drop=1.0))
        adding = asyncio.ensure_future(add())
        while not pair.client.statistics().requests_posted:
            await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding
        assert all(each.cancelled() for each in operations)
        usroce.set_fault(context, None)
        assert await pair.client.fetch_add(remote, 0) == ONE_SIDED


async def test_a_capture_shows_who_said_what(tmp_path: Path) -> None:
    plain, other = Config(), Config(usroce_address="127.0.0.2")
    async with connected_pair(plain, server_config=other) as pair:
        context = pair.client.route.adapter.context
        usroce.capture(context, tmp_path / "x.pcap")
        await pair.client.send(b"look here")
        await pair.server.recv()
        await pair.client.flush()  # acknowledged
        usroce.capture(context, None)
        ours, theirs = (end.route.choice.port.lid for end in pair)
    found = list(packets(tmp_path / "x.pcap"))
    (message,) = [packet for packet in found if b"look here" in packet.payload]
    assert (str(message.source_address), str(message.destination_address)) == ("127.0.0.1", "127.0.0.2")
    assert message.destination == theirs
    assert message.opcode == SEND_ONLY
    assert any(packet.opcode == ACKNOWLEDGE and packet.destination == ours for packet in found)
    assert [packet.time for packet in found] == sorted(packet.time for packet in found)


def test_where_no_capture_can_be_written(tmp_path: Path) -> None:
    with usroce.usroce_device().open() as context:
        with pytest.raises(DeviceError, match=r"ENOENT.*") as caught:
            usroce.capture(context, tmp_path / "nowhere" / "x.pcap")
        assert caught.value.errno == errno.ENOENT
        usroce.capture(context, None)  # there is none


# --- other programs -----------------------------------------------------------------------------------


def devinfo(environment: dict[str, str]) -> str:
    program = shutil.which("ibv_devinfo")
    if program is None:
        pytest.skip("ibv_devinfo is not installed (Debian: ibverbs-utils)")
    done = subprocess.run(
        [program, "-d", "usroce0"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_c_program_on_usroce() -> None:
    assert "PORT_ACTIVE" in devinfo(command.program_environment())


def test_a_c_program_without_libibverbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """libusroce.so is found under the name of the library that is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(command, "libibverbs_is_installed", lambda: False)
    environment = command.program_environment()
    preloaded = environment["LD_PRELOAD"].split()
    environment["LD_PRELOAD"] = " ".join(word for word in preloaded if "libusroce" not in word)
    assert "PORT_ACTIVE" in devinfo(environment)


def test_the_command_runs_a_program() -> None:
    """Status, arguments and environment are the program's own."""
    code = "import os, sys; print(os.environ['AIORDMA_USROCE_ADDRESS'], sys.argv[1:]); sys.exit(7)"
    line = [sys.executable, "-m", "aiordma", "usroce", "run", "--address", "127.0.0.9", "--"]
    done = subprocess.run(
        [*line, sys.executable, "-c", code, "--address", "x"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "127.0.0.9 ['--address', 'x']\n"), done.stderr


def test_aiordma_itself_under_the_command_sees_usroce_once() -> None:
    code = "import aiordma; print([device.name for device in aiordma.devices()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=command.program_environment(base={**os.environ, "PYTHONPATH": str(PACKAGE)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "['usroce0']\n"), done.stderr
