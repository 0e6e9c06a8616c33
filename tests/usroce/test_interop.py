"""usroce and the kernel's own soft-RoCE talk with each other, each as server and as client, and the way is bad.

rxe has port 4791 of the namespace that it is in, so usroce is in one of its own, at the other end of a cable. This
runs where the kernel can make rxe devices: in the virtual machine of tools/rxe.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from aiordma.cli.usroce import program_environment
from tests.usroce import networks
from tests.usroce.networks import Side
from tests.usroce.processes import DEADLINE, Process, Processes, finish, free_port
from tests.usroce.test_programs import need

pytestmark = [pytest.mark.device, pytest.mark.rxe]

MIB = 1 << 20
SOAK = bool(os.environ.get("AIORDMA_SOAK"))
OPERATIONS = 5000 if SOAK else 1000  # of each end
LIMIT = 500.0 if SOAK else DEADLINE  # seconds for them
LARGE_FRAMES = 9000  # bytes: for RoCE's largest MTU


@dataclass(frozen=True)
class Host:
    """One of the two hosts, and the device that is on it."""

    device: str
    side: Side

    @property
    def is_usroce(self) -> bool:
        return self.device == "usroce0"

    def settings(self, family: str) -> dict[str, str]:
        """One frame a packet, so that what happens on the way happens to each."""
        return {"ADDRESS": self.address(family), "GSO": "0"} if self.is_usroce else {}

    def address(self, family: str) -> str:
        return str(getattr(self.side, family))

    def gid_index(self, family: str) -> int:
        if self.is_usroce:
            return 0
        return rxe_gids(self.device)[networks.gid(self.address(family))]


def rxe_gids(device: str) -> dict[str, int]:
    """The RoCE v2 GIDs of a device, and their indices."""
    port = Path(f"/sys/class/infiniband/{device}/ports/1")
    found = {}
    for path in port.glob("gids/*"):
        with contextlib.suppress(OSError):  # an empty row has no type
            if (port / "gid_attrs/types" / path.name).read_text().strip() == "RoCE v2":
                found[path.read_text().strip()] = int(path.name)
    return found


@contextlib.contextmanager
def rxe_device(side: Side) -> Iterator[str]:
    """An rxe device on an interface, once it has the GIDs of its addresses."""
    name = f"rxe-{side.interface}"
    networks.run("rdma", "link", "add", name, "type", "rxe", "netdev", side.interface)
    try:
        until = time.monotonic() + DEADLINE
        while not {networks.gid(side.ipv4), networks.gid(side.ipv6)} <= rxe_gids(name).keys():
            assert time.monotonic() < until, f"{name} has no GIDs but {rxe_gids(name)}"
        yield name
    finally:
        networks.run("rdma", "link", "delete", name)


@contextlib.contextmanager
def make_hosts(mtu: int = 1500) -> Iterator[tuple[Host, Host]]:
    """The one with rxe, where the test is, and the one with usroce."""
    with networks.namespace() as space, networks.cable(None, space, mtu=mtu) as sides:
        with rxe_device(sides[0]) as rxe:
            yield Host(rxe, sides[0]), Host("usroce0", sides[1])


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    reason = networks.why_not()
    if reason:
        pytest.skip(reason)
    if shutil.which("rdma") is None:
        pytest.skip("rdma (iproute2) is not installed")
    with make_hosts() as made:
        yield made


both_ways = pytest.mark.parametrize("server", ["rxe", "usroce"])


def in_order(hosts: tuple[Host, Host], server: str) -> tuple[Host, Host]:
    """The server, the client."""
    return hosts if server == "rxe" else (hosts[1], hosts[0])


# --- C with C ------------------------------------------------------------------------------------------------


def start_program(
    processes: Processes, host: Host, family: str, program: str, port: int, *options: str
) -> Process:
    environment = program_environment(host.settings(family)) if host.is_usroce else None
    command = [need(program), "-d", host.device, "-g", str(host.gid_index(family)), "-p", str(port)]
    return processes.start(*command, *options, environment=environment, namespace=host.side.namespace)


def play(processes: Processes, server: Host, client: Host, family: str, program: str, *options: str) -> None:
    port = free_port()
    serving = start_program(processes, server, family, program, port, *options)
    serving.wait_until_listening(port)
    peer = server.address("ipv4")
    playing = start_program(processes, client, family, program, port, *options, peer)
    for output in finish(playing, serving):
        assert " iters in " in output
        assert "invalid data" not in output


@both_ways
@pytest.mark.parametrize("mode", [(), ("-e",)], ids=["polled", "events"])
@pytest.mark.parametrize(("size", "iterations"), [(1, 50), (4096, 50), (65537, 10), (MIB, 5)])
def test_rc_pingpong(
    processes: Processes,
    hosts: tuple[Host, Host],
    size: int,
    iterations: int,
    mode: tuple[str, ...],
    server: str,
) -> None:
    options = ["-s", str(size), "-n", str(iterations), "-c", *mode]
    play(processes, *in_order(hosts, server), "ipv4", "ibv_rc_pingpong", *options)


@both_ways
@pytest.mark.parametrize(
    "program", ["ibv_rc_pingpong", "ibv_srq_pingpong", "ibv_ud_pingpong", "ibv_uc_pingpong"]
)
def test_each_pingpong_over_ipv6(
    processes: Processes, hosts: tuple[Host, Host], program: str, server: str
) -> None:
    play(processes, *in_order(hosts, server), "ipv6", program, "-s", "1024", "-n", "20", "-c")


@both_ways
def test_datagrams(processes: Processes, hosts: tuple[Host, Host], server: str) -> None:
    play(processes, *in_order(hosts, server), "ipv4", "ibv_ud_pingpong", "-s", "1000", "-n", "50", "-c")


# --- aiordma with aiordma ------------------------------------------------------------------------------------


def start_module(processes: Processes, host: Host, family: str, module: str, *arguments: str) -> Process:
    return processes.python(
        f"tests.usroce.{module}",
        *arguments,
        settings=host.settings(family),
        namespace=host.side.namespace,
    )


def every_operation(processes: Processes, server: Host, client: Host, family: str) -> None:
    peer = server.address(family)
    serving = start_module(processes, server, family, "operations", "serve", peer, "--device", server.device)
    port = serving.line().removeprefix("listening ")
    acting = start_module(
        processes, client, family, "operations", "connect", peer, port, "--device", client.device
    )
    for output in finish(acting, serving):
        assert output.splitlines()[-1] == "right"


@pytest.mark.parametrize(
    ("family", "server"), [("ipv4", "rxe"), ("ipv6", "usroce")] + SOAK * [("ipv4", "usroce"), ("ipv6", "rxe")]
)
def test_every_operation(processes: Processes, hosts: tuple[Host, Host], family: str, server: str) -> None:
    """1 B to 16 MiB, from each side to the other."""
    every_operation(processes, *in_order(hosts, server), family)


def test_every_operation_with_the_largest_mtu(processes: Processes) -> None:
    with make_hosts(LARGE_FRAMES) as hosts:
        every_operation(processes, *hosts, "ipv4")


# --- a bad way -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bad_way(hosts: tuple[Host, Host], *what: str) -> Iterator[None]:
    """tc-netem(8) on both ends of the cable."""
    with contextlib.ExitStack() as stack:
        for host in hosts:
            tc = ["tc", *(["-n", host.side.namespace] if host.side.namespace else []), "qdisc"]
            place = ["dev", host.side.interface, "root"]
            networks.run(*tc, "add", *place, "netem", "limit", "10000", *what)
            stack.callback(networks.run, *tc, "delete", *place)
        yield


#: What tc-netem(8) does to each packet. Reordered are those that are not delayed.
BAD = {
    "loss": "loss {rate}%",
    "duplicate": "duplicate {rate}%",
    "corrupt": "corrupt {rate}%",
    "reorder": "delay 1ms reorder {rate}%",
    "all": "delay 1ms reorder {rate}% loss {rate}% duplicate {rate}% corrupt {rate}%",
}

SERVERS = {"loss": "rxe", "duplicate": "usroce", "corrupt": "rxe", "reorder": "usroce", "all": "rxe"}


#: With AIORDMA_SOAK=1: whoever serves, and twenty seeds of all at once.
WAYS = [(what, server, 1) for what in BAD for server in (["rxe", "usroce"] if SOAK else [SERVERS[what]])] + [
    ("all", ["rxe", "usroce"][seed % 2], seed) for seed in range(2, 21) if SOAK
]


@pytest.mark.timeout(LIMIT + 20)
@pytest.mark.parametrize("rate", [1, 5] if SOAK else [2])
@pytest.mark.parametrize(("what", "server", "seed"), WAYS)
def test_mixed_operations(
    processes: Processes, hosts: tuple[Host, Host], what: str, rate: int, server: str, seed: int
) -> None:
    """Ten thousand of them, with AIORDMA_SOAK=1."""
    serving, acting = in_order(hosts, server)
    options = [f"--operations={OPERATIONS}", "--ack-timeout=15", f"--timeout={LIMIT}", f"--seed={seed}"]
    with bad_way(hosts, *BAD[what].format(rate=rate).split()):
        peer = serving.address("ipv4")
        server_process = start_module(
            processes, serving, "ipv4", "mixed", "serve", "--host", peer, "--device", serving.device, *options
        )
        port = server_process.line().removeprefix("listening ")
        client_process = start_module(
            processes, acting, "ipv4", "mixed", "connect", peer, port, "--device", acting.device, *options
        )
        for output in finish(client_process, server_process, deadline=LIMIT):
            report = json.loads(output.splitlines()[-1])
            assert report["operations"] == OPERATIONS
