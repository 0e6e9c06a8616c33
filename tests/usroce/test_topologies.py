"""Several devices at one address, and devices on hosts of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest

from aiordma.cli.usroce import program_environment
from aiordma.verbs import Context, usroce
from tests.usroce import networks
from tests.usroce.ends import End
from tests.usroce.networks import Side
from tests.usroce.processes import Process, Processes, finish, free_loopback_address, free_port
from tests.usroce.test_programs import need

pytestmark = [pytest.mark.device, pytest.mark.usroce]

ROCE_PORT = 4791
LID = f"LID {ROCE_PORT:#06x}"

# --- one address ---------------------------------------------------------------------------------------------


def test_four_processes_all_connected(processes: Processes, address: str) -> None:
    count = 4
    nodes = []
    ports: list[int] = []
    udp_ports = []
    for index in range(count):
        node = processes.python("tests.usroce.mesh", str(count - 1 - index), settings={"ADDRESS": address})
        word, port, udp_port = node.line().split()
        assert word == "listening"
        nodes.append(node)
        ports.append(int(port))
        udp_ports.append(int(udp_port))
    assert udp_ports[0] == ROCE_PORT
    assert len(set(udp_ports)) == count
    for index, node in enumerate(nodes):
        node.tell(json.dumps(ports[:index]))
    for output in finish(*nodes):
        assert output.splitlines()[-1] == "done"


def open_device(address: str) -> Context:
    with usroce.options(address=address):
        return usroce.usroce_device().open()


def test_the_first_device_has_the_port_of_roce(address: str) -> None:
    with open_device(address) as first, open_device(address) as second, open_device(address) as third:
        lids = [context.port(1).lid for context in (first, second, third)]
        assert lids[0] == ROCE_PORT
        assert len(set(lids)) == 3
        assert all(lids)
        first.close()
        with open_device(address) as again:
            assert again.port(1).lid == ROCE_PORT


def test_each_address_has_the_port_of_roce(address: str) -> None:
    """One port for all addresses of a device: where one is taken, all are at another one."""
    other = free_loopback_address()
    with (
        open_device(address) as first,
        open_device(f"{other},{address}") as second,
        open_device(other) as third,
    ):
        assert first.port(1).lid == third.port(1).lid == ROCE_PORT
        assert second.port(1).lid != ROCE_PORT
        assert [str(gid.address) for gid in second.gids()] == [other, address]


def test_a_peer_that_says_nothing_is_at_the_port_of_roce(address: str) -> None:
    """LID 0 is what other RoCE devices have, rxe for one."""
    with open_device(address) as first, open_device(address) as second:
        server, client = End(first), End(second)
        assert server.card().lid == ROCE_PORT
        client.connect(dataclasses.replace(server.card(), lid=0))
        server.connect(client.card())
        client.write(b"hello", 10)
        assert server.memory[10:15] == b"hello"
        assert client.read(5, 10, local=100) == b"hello"
        server.write(b"back", 20)
        assert client.memory[20:24] == b"back"


# --- two hosts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Side, Side]]:
    """Two namespaces with a cable between them."""
    reason = networks.why_not()
    if reason:
        pytest.skip(reason)
    with networks.namespace() as one, networks.namespace() as two, networks.cable(one, two) as sides:
        yield sides


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_two_hosts(processes: Processes, hosts: tuple[Side, Side], family: str) -> None:
    """Each has the standard port; and both have damaged packets, so that every checksum counts."""
    addresses = [getattr(side, family) for side in hosts]
    settings = [{"ADDRESS": address, "FAULT": "corrupt=0.01,drop=0.01,seed=1"} for address in addresses]
    options = ("--operations", "1000")
    server = processes.python(
        "tests.usroce.mixed",
        *("serve", "--host", addresses[0], *options),
        settings=settings[0],
        namespace=hosts[0].namespace,
    )
    port = server.line().removeprefix("listening ")
    client = processes.python(
        "tests.usroce.mixed",
        *("connect", addresses[0], port, *options),
        settings=settings[1],
        namespace=hosts[1].namespace,
    )
    for output in finish(client, server):
        report = json.loads(output.splitlines()[-1])
        assert report["operations"] == 1000
        assert report["counters"]["bad_icrc"] > 0


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_every_operation(processes: Processes, hosts: tuple[Side, Side], family: str) -> None:
    """1 B to 16 MiB, from each host to the other."""
    addresses = [getattr(side, family) for side in hosts]

    def start(which: int, *arguments: str) -> Process:
        return processes.python(
            "tests.usroce.operations",
            *arguments,
            *("--device", "usroce0"),
            settings={"ADDRESS": addresses[which]},
            namespace=hosts[which].namespace,
        )

    server = start(0, "serve", addresses[0])
    client = start(1, "connect", addresses[0], server.line().removeprefix("listening "))
    for output in finish(client, server):
        assert output.splitlines()[-1] == "right"


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
@pytest.mark.parametrize("program", ["ibv_rc_pingpong", "ibv_srq_pingpong", "ibv_ud_pingpong"])
def test_c_programs_on_two_hosts(
    processes: Processes, hosts: tuple[Side, Side], program: str, family: str
) -> None:
    port = free_port()
    command = [need(program), "-d", "usroce0", "-g", "0", "-p", str(port), "-n", "200", "-s", "1024", "-c"]
    environments = [program_environment({"ADDRESS": getattr(side, family)}) for side in hosts]
    server = processes.start(*command, environment=environments[0], namespace=hosts[0].namespace)
    server.wait_until_listening(port)
    client = processes.start(
        *command, hosts[0].ipv4, environment=environments[1], namespace=hosts[1].namespace
    )
    for output in finish(client, server):
        assert "200 iters in " in output
        assert "invalid data" not in output
        assert LID in output
        for side in hosts:
            assert f"GID {'::ffff:' if family == 'ipv4' else ''}{getattr(side, family)}" in output


def test_jumbo_frames(processes: Processes) -> None:
    """An interface with an MTU of 9000 bytes carries RoCE's largest, one of 1500 carries 1024."""
    reason = networks.why_not()
    if reason:
        pytest.skip(reason)
    with networks.namespace() as one, networks.namespace() as two:
        for mtu, expected in ((9000, "4096 (5)"), (1500, "1024 (3)")):
            with networks.cable(one, two, mtu=mtu) as sides:
                environment = program_environment({"ADDRESS": sides[0].ipv4})
                shown = processes.start(need("ibv_devinfo"), environment=environment, namespace=one).finish()
                assert f"active_mtu:\t\t{expected}" in shown
