"""choose_gid() over tables as real machines show them: no device, no network."""

from __future__ import annotations

import ipaddress
import itertools
import socket
from collections.abc import Mapping, Sequence

import pytest

from aiordma.errors import DeviceError
from aiordma.verbs.device import GidEntry, PortAttributes
from aiordma.verbs.enums import GidType, LinkLayer, PortState
from aiordma.verbs.gid_choice import Address, GidChoice, choose_gid, interface_addresses

V1, V2, IB = GidType.ROCE_V1, GidType.ROCE_V2, GidType.IB
Interfaces = Mapping[str, Sequence[Address]]


def ip(text: str | None) -> Address | None:
    return None if text is None else ipaddress.ip_address(text)


def gid(
    index: int, address: str, kind: GidType = V2, interface: str | None = "eth0", port: int = 1
) -> GidEntry:
    parsed = ipaddress.ip_address(address)
    text = f"::ffff:{address}" if parsed.version == 4 else address
    return GidEntry(port, index, ipaddress.IPv6Address(text), kind, interface)


def port(
    number: int = 1,
    state: PortState = PortState.ACTIVE,
    layer: LinkLayer = LinkLayer.ETHERNET,
    lid: int = 0,
) -> PortAttributes:
    return PortAttributes(number, state, layer, lid, 1024, 4096, 1 << 30, 256)


def addresses(**table: str) -> Interfaces:
    return {name: [ipaddress.ip_address(a) for a in text.split()] for name, text in table.items()}


LO = {"lo": [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]}

# mlx5 with a VLAN on top: every address twice (v1 at even, v2 at odd index), the link-local one on both
# interfaces, for the VLAN has the card's MAC.
MLX5 = [
    gid(0, "fe80::b859:9fff:fe11:2233", V1),
    gid(1, "fe80::b859:9fff:fe11:2233", V2),
    gid(2, "fe80::b859:9fff:fe11:2233", V1, "eth0.100"),
    gid(3, "fe80::b859:9fff:fe11:2233", V2, "eth0.100"),
    gid(4, "192.168.1.5", V1),
    gid(5, "192.168.1.5", V2),
    gid(6, "10.100.0.5", V1, "eth0.100"),
    gid(7, "10.100.0.5", V2, "eth0.100"),
    gid(8, "2001:db8::5", V1),
    gid(9, "2001:db8::5", V2),
]
MLX5_HOST: Interfaces = LO | dict(
    addresses(
        eth0="192.168.1.5 192.168.1.77 2001:db8::5 2001:db8::77 fe80::b859:9fff:fe11:2233",
        **{"eth0.100": "10.100.0.5 10.100.0.77 fe80::b859:9fff:fe11:2233"},
        mgmt="172.16.0.5",
    )
)
RXE = [gid(0, "fe80::3852:32ff:fea7:67f9"), gid(1, "10.71.0.1"), gid(2, "fd71::1")]
RXE_HOST: Interfaces = LO | dict(addresses(eth0="10.71.0.1 fd71::1"))
# One RoCE card of two ports in different networks; the address of the second moved to a bond's VLAN.
TWO = [
    gid(0, "fe80::1", interface="ens1f0", port=1),
    gid(1, "10.1.0.1", interface="ens1f0", port=1),
    gid(0, "fe80::2", interface="bond0.7", port=2),
    gid(1, "10.2.0.1", interface="bond0.7", port=2),
]
TWO_HOST: Interfaces = LO | dict(addresses(ens1f0="10.1.0.1", **{"bond0.7": "10.2.0.1 10.2.0.99"}))
# In a container: rows of the host too, without interface, or with an index that happens to be eth0's here.
CONTAINER = [
    gid(0, "fe80::aa", interface=None),
    gid(1, "192.168.7.9", interface=None),
    gid(2, "192.168.7.10", interface="eth0"),
    gid(3, "172.17.0.2", interface=None),
]
CONTAINER_HOST: Interfaces = LO | dict(addresses(eth0="172.17.0.2 172.17.0.3"))

REACHED = [
    # table, interfaces, local, remote -> port, index
    pytest.param(MLX5, MLX5_HOST, "192.168.1.5", "192.168.1.9", (1, 5), id="mlx5-ipv4-takes-v2"),
    pytest.param(MLX5, MLX5_HOST, "::ffff:192.168.1.5", "::ffff:192.168.1.9", (1, 5), id="mlx5-ipv4-mapped"),
    pytest.param(MLX5, MLX5_HOST, "10.100.0.5", "10.100.0.9", (1, 7), id="mlx5-vlan"),
    pytest.param(MLX5, MLX5_HOST, "2001:db8::5", "2001:db8::9", (1, 9), id="mlx5-ipv6"),
    pytest.param(MLX5, MLX5_HOST, "192.168.1.77", "192.168.1.9", (1, 5), id="mlx5-alias-without-a-gid"),
    pytest.param(MLX5, MLX5_HOST, "10.100.0.77", "10.100.0.9", (1, 7), id="mlx5-vlan-alias"),
    pytest.param(MLX5, MLX5_HOST, "2001:db8::77", "2001:db8::9", (1, 9), id="mlx5-alias-same-family"),
    pytest.param(
        MLX5, MLX5_HOST, "fe80::b859:9fff:fe11:2233%eth0", "fe80::9%eth0", (1, 1), id="mlx5-link-local"
    ),
    pytest.param(
        MLX5, MLX5_HOST, "fe80::b859:9fff:fe11:2233%eth0.100", "fe80::9", (1, 3), id="mlx5-link-local-vlan"
    ),
    pytest.param(MLX5, MLX5_HOST, "127.0.0.1", "127.0.0.1", (1, 5), id="mlx5-loopback"),
    pytest.param(MLX5, MLX5_HOST, "::1", "::1", (1, 5), id="mlx5-loopback-ipv6"),
    pytest.param(MLX5, MLX5_HOST, "172.16.0.5", "172.16.0.5", (1, 5), id="mlx5-own-address-elsewhere"),
    pytest.param(MLX5, MLX5_HOST, "10.100.0.5", "10.100.0.5", (1, 7), id="mlx5-own-address-with-gid"),
    pytest.param(MLX5, MLX5_HOST, None, None, (1, 5), id="mlx5-no-address"),
    pytest.param(RXE, RXE_HOST, "10.71.0.1", "10.71.0.2", (1, 1), id="rxe-ipv4"),
    pytest.param(RXE, RXE_HOST, "fd71::1", "fd71::2", (1, 2), id="rxe-ipv6"),
    pytest.param(RXE, RXE_HOST, "127.0.0.1", "127.0.0.1", (1, 1), id="rxe-loopback"),
    pytest.param(RXE, RXE_HOST, "10.71.0.1", "10.71.0.1", (1, 1), id="rxe-to-itself"),
    pytest.param(RXE, RXE_HOST, "fd71::1", "fd71::1", (1, 2), id="rxe-to-itself-ipv6"),
    pytest.param(RXE[:1], RXE_HOST, "127.0.0.1", "127.0.0.1", (1, 0), id="rxe-loopback-only-link-local"),
    pytest.param(RXE[::2], RXE_HOST, "::1", "::1", (1, 2), id="rxe-loopback-only-ipv6"),
    pytest.param(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", (1, 1), id="two-ports-first"),
    pytest.param(TWO, TWO_HOST, "10.2.0.1", "10.2.0.9", (2, 1), id="two-ports-second"),
    pytest.param(TWO, TWO_HOST, "10.2.0.99", "10.9.0.1", (2, 1), id="two-ports-bond-alias"),
    pytest.param(TWO, TWO_HOST, "127.0.0.1", "127.0.0.1", (1, 1), id="two-ports-loopback"),
    pytest.param(CONTAINER, CONTAINER_HOST, "172.17.0.2", "172.17.0.9", (1, 3), id="container-by-address"),
    pytest.param(CONTAINER, CONTAINER_HOST, "127.0.0.1", "127.0.0.1", (1, 3), id="container-loopback"),
    pytest.param(
        RXE,
        LO | dict(addresses(eth0="10.71.0.1", **{"eth0:1": "10.71.0.8"})),
        "10.71.0.8",
        "10.71.0.2",
        (1, 1),
        id="alias-label",
    ),
]


def choose(
    table: Sequence[GidEntry],
    interfaces: Interfaces,
    local: str | None,
    remote: str | None,
    ports: Sequence[PortAttributes] | None = None,
    *,
    number: int | None = None,
    index: int | None = None,
) -> GidChoice:
    if ports is None:
        ports = [port(n) for n in sorted({entry.port for entry in table} or {1})]
    return choose_gid(
        ports, table, local=ip(local), remote=ip(remote), interfaces=interfaces, port=number, gid_index=index
    )


@pytest.mark.parametrize(("table", "interfaces", "local", "remote", "expected"), REACHED)
def test_the_row_that_reaches_the_peer(
    table: list[GidEntry], interfaces: Interfaces, local: str, remote: str, expected: tuple[int, int]
) -> None:
    choice = choose(table, interfaces, local, remote)
    assert choice.entry is not None
    assert (choice.entry.port, choice.entry.index) == expected
    assert choice.port.port == choice.entry.port
    assert choice.port_gid == choice.entry
    assert [c.entry for c in choice.candidates] == table
    assert [c.entry for c in choice.candidates if c.accepted] == [choice.entry]
    assert all(c.reason for c in choice.candidates)


REFUSED = [
    pytest.param(MLX5, MLX5_HOST, "172.16.0.5", "172.16.0.9", "not on mgmt", id="management-network"),
    pytest.param(MLX5[::2], MLX5_HOST, "192.168.1.5", "192.168.1.9", "RoCE v1: only RoCE v2", id="only-v1"),
    pytest.param(RXE[:1], RXE_HOST, "10.71.0.1", "10.71.0.2", "link-local, and not", id="only-link-local"),
    pytest.param(RXE[:2], RXE_HOST, "fd71::1", "fd71::2", "but IPv4 and the connection is IPv6", id="family"),
    pytest.param(
        CONTAINER, CONTAINER_HOST, "172.17.0.3", "172.17.0.9", "another network namespace", id="foreign-row"
    ),
    pytest.param(
        RXE, RXE_HOST, "10.9.9.9", "10.9.9.8", "on none of the interfaces here", id="unknown-address"
    ),
    pytest.param([], RXE_HOST, "10.71.0.1", "10.71.0.2", "the GID table is empty", id="empty"),
    pytest.param(
        MLX5[:2],
        LO | dict(addresses(mgmt="fe80::b859:9fff:fe11:2233")),
        "fe80::b859:9fff:fe11:2233%mgmt",
        "fe80::9%mgmt",
        "the same link-local address, but not on mgmt",
        id="link-local-of-another-link",
    ),
]


@pytest.mark.parametrize(("table", "interfaces", "local", "remote", "words"), REFUSED)
def test_a_refusal_names_every_row_and_the_reason(
    table: list[GidEntry], interfaces: Interfaces, local: str, remote: str, words: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        choose(table, interfaces, local, remote)
    text = str(caught.value)
    assert words in text
    for entry in table:
        assert f"port {entry.port} GID {entry.index} {entry.address} " in text


@pytest.mark.parametrize("state", [s for s in PortState if s is not PortState.ACTIVE])
def test_only_active_ports(state: PortState) -> None:
    with pytest.raises(DeviceError, match=f"port 1 is {state.name}, not ACTIVE"):
        choose(RXE, RXE_HOST, "10.71.0.1", "10.71.0.2", [port(state=state)])
    with pytest.raises(DeviceError, match=f"port 1 is {state.name}, not ACTIVE"):
        choose(RXE, RXE_HOST, "10.71.0.1", "10.71.0.2", [port(state=state)], number=1, index=1)


def test_loopback_goes_round_a_port_that_is_down() -> None:
    choice = choose(TWO, TWO_HOST, "127.0.0.1", "127.0.0.1", [port(1, PortState.DOWN), port(2)])
    assert choice.port.port == 2


OWN = ["127.0.0.1", "127.0.0.2", "10.1.0.1", "10.2.0.1", "10.2.0.99", "::1"]


@pytest.mark.parametrize(("local", "remote"), [*itertools.product(OWN, OWN)])
def test_both_ends_of_a_connection_within_the_host_choose_the_same(local: str, remote: str) -> None:
    here = choose(TWO, TWO_HOST, local, remote)
    there = choose(list(reversed(TWO)), TWO_HOST, remote, local)
    assert here.entry == there.entry


class TestForced:
    def test_port_and_index(self) -> None:
        choice = choose(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", number=2, index=0)
        assert choice.entry == TWO[2]

    def test_index_alone_is_on_the_first_active_port(self) -> None:
        choice = choose(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", [port(1, PortState.DOWN), port(2)], index=1)
        assert choice.entry == TWO[3]

    def test_port_alone_keeps_the_rules(self) -> None:
        with pytest.raises(DeviceError, match="port 2 was asked for"):
            choose(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", number=2)
        assert choose(TWO, TWO_HOST, "127.0.0.1", "127.0.0.1", number=2).entry == TWO[3]

    def test_what_does_not_exist(self) -> None:
        with pytest.raises(DeviceError, match="port 3, which does not exist"):
            choose(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", number=3)
        with pytest.raises(DeviceError, match="GID index 9 was asked for"):
            choose(TWO, TWO_HOST, "10.1.0.1", "10.1.0.9", index=9)

    def test_roce_v1_stays_refused(self) -> None:
        with pytest.raises(DeviceError, match="only RoCE v2"):
            choose(MLX5, MLX5_HOST, "192.168.1.5", "192.168.1.9", index=4)


class TestInfiniBand:
    GIDS = (gid(0, "fe80::e41d:2d03:0:1", IB, None), gid(1, "fec0::e41d:2d03:0:1", IB, None))
    HOST: Interfaces = LO | dict(addresses(ib0="10.50.0.1"))

    @pytest.mark.parametrize("layer", [LinkLayer.INFINIBAND, LinkLayer.UNSPECIFIED])
    @pytest.mark.parametrize("local", ["10.50.0.1", "127.0.0.1", None])
    def test_lid_addressing(self, layer: LinkLayer, local: str | None) -> None:
        choice = choose(self.GIDS, self.HOST, local, "10.50.0.2", [port(layer=layer, lid=0x11)])
        assert choice.entry is None
        assert choice.port.lid == 0x11
        assert choice.port_gid == self.GIDS[0]
        assert not any(c.accepted for c in choice.candidates)
        assert "LID 0x11" in choice.explain()

    def test_without_lid_the_first_gid(self) -> None:
        choice = choose(self.GIDS, self.HOST, "10.50.0.1", "10.50.0.2", [port(layer=LinkLayer.INFINIBAND)])
        assert choice.entry == self.GIDS[0]

    def test_a_forced_gid_means_global_addressing(self) -> None:
        ports = [port(layer=LinkLayer.INFINIBAND, lid=0x11)]
        assert choose(self.GIDS, self.HOST, "10.50.0.1", "10.50.0.2", ports, index=1).entry == self.GIDS[1]

    def test_the_first_active_port_with_a_lid(self) -> None:
        ports = [
            port(1, PortState.INIT, LinkLayer.INFINIBAND, 0),
            port(2, PortState.ACTIVE, LinkLayer.INFINIBAND, 7),
        ]
        table = [*self.GIDS, gid(0, "fe80::e41d:2d03:0:2", IB, None, port=2)]
        choice = choose(table, self.HOST, "10.50.0.1", "10.50.0.2", ports)
        assert (choice.entry, choice.port, choice.port_gid) == (None, ports[1], table[2])

    def test_an_empty_table_is_no_obstacle(self) -> None:
        choice = choose([], self.HOST, "10.50.0.1", "10.50.0.2", [port(layer=LinkLayer.INFINIBAND, lid=3)])
        assert (choice.entry, choice.port_gid) == (None, None)

    def test_a_card_with_one_port_of_each_kind_follows_the_address(self) -> None:
        ports = [port(1, layer=LinkLayer.INFINIBAND, lid=3), port(2)]
        table = [*self.GIDS, gid(0, "10.2.0.1", interface="ens1", port=2)]
        host = dict(self.HOST) | dict(addresses(ens1="10.2.0.1"))
        assert choose(table, host, "10.2.0.1", "10.2.0.2", ports).entry == table[2]
        assert choose(table, host, "10.50.0.1", "10.50.0.2", ports).port == ports[0]


def test_explain_tells_the_choice_and_every_reason() -> None:
    text = choose(MLX5, MLX5_HOST, "192.168.1.5", "192.168.1.9").explain()
    first, *rows = text.splitlines()
    assert first == "port 1, GID index 5, 192.168.1.5"
    assert len(rows) == len(MLX5)
    assert rows[5] == (
        "  port 1 GID 5 192.168.1.5 (RoCE v2, eth0): chosen, it is the local address of the connection"
    )
    assert "not on eth0, which has the local address" in rows[7]


def test_a_row_that_would_do_names_the_one_before_it() -> None:
    rows = choose(RXE, RXE_HOST, "127.0.0.1", "127.0.0.1").candidates
    assert rows[2].reason == "would do, but comes after port 1 GID 1"


def test_interface_addresses_of_this_host() -> None:
    found = interface_addresses()
    assert set(found) <= {name for _, name in socket.if_nameindex()}
    assert ipaddress.ip_address("127.0.0.1") in found["lo"]
