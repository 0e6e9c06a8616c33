"""Which port and which GID a connection uses, and why: a pure function over tables that were read before.

Nothing here asks a device. Each row of the GID table gets a verdict: a rank, or the reason why it fails.
The lowest rank wins, then the lowest port and index. The rules:

- Only ports in state ACTIVE.
- InfiniBand: local identifiers (LIDs) where the subnet manager has given them, else the port's first GID.
- Ethernet: RoCE v2 only. The GID that is the bootstrap socket's local address; else one of the same address
  family on the interface (bond, VLAN, bridge) that has that address, for packets that leave there reach the
  peer the way the bootstrap did. Link-local GIDs are ambiguous between interfaces: only when asked for.
- Over loopback every GID reaches this host. The order then depends only on what both ends know alike, so both
  choose the same row.

In a container the table also has rows of other network namespaces. Their interface is unknown, or, the kernel
reporting a bare index, called by the wrong name; an interface counts only where it really has the address.

Sources: ibv_query_gid_table(3); Linux drivers/infiniband/core/roce_gid_mgmt.c (which addresses become GIDs);
InfiniBand Architecture Specification vol. 1, 4.1.1 (GIDs) and annex A17 (RoCE v2).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import DeviceError
from .device import GidEntry, PortAttributes
from .enums import GidType, LinkLayer, PortState

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_TYPE_NAMES = {GidType.IB: "InfiniBand", GidType.ROCE_V1: "RoCE v1", GidType.ROCE_V2: "RoCE v2"}


@dataclass(frozen=True, slots=True)
class GidCandidate:
    """One row of the GID table, whether it was chosen, and why or why not."""

    entry: GidEntry
    accepted: bool
    reason: str

    def __str__(self) -> str:
        e = self.entry
        kind = f"{_TYPE_NAMES[e.type]}, {e.interface or 'no interface'}"
        verdict = f"{'chosen, ' if self.accepted else ''}{self.reason}"
        return f"port {e.port} GID {e.index} {e.address} ({kind}): {verdict}"


@dataclass(frozen=True, slots=True)
class GidChoice:
    """The outcome of :func:`choose_gid`.

    ``entry`` is None for LID addressing (InfiniBand only). ``port_gid`` is the GID to name to the peer:
    ``entry``, or with LID addressing the port's first GID (None where the table has none).
    """

    entry: GidEntry | None
    port: PortAttributes
    candidates: tuple[GidCandidate, ...]
    port_gid: GidEntry | None = None

    def explain(self) -> str:
        """Several lines: what was chosen, then every row of the table with its reason."""
        if self.entry is None:
            head = f"port {self.port.port}, LID {self.port.lid:#x} (LID addressing)"
        else:
            head = f"port {self.entry.port}, GID index {self.entry.index}, {self.entry.address}"
        return "\n".join([head, *(f"  {candidate}" for candidate in self.candidates)])


def choose_gid(
    ports: Sequence[PortAttributes],
    gids: Sequence[GidEntry],
    *,
    local: Address | None,
    remote: Address | None,
    interfaces: Mapping[str, Sequence[Address]],
    port: int | None = None,
    gid_index: int | None = None,
) -> GidChoice:
    """Chooses port and GID for a connection with these addresses of its bootstrap socket.

    IPv4-mapped addresses count as IPv4. Without ``local`` (a UNIX socket, or no connection yet) any row will
    do, as over loopback. ``interfaces`` is what :func:`interface_addresses` returns. ``port`` (from 1) and
    ``gid_index`` (from 0) force the choice; they must exist, be active and, on Ethernet, be RoCE v2. A forced
    GID on InfiniBand means global addressing. iWARP devices have no GIDs in this sense: refuse them before.

    Raises :class:`~aiordma.errors.DeviceError` whose text lists every port and row and why it will not do.
    """
    wanted = _Wanted.make(local, remote, interfaces, port, gid_index)
    usable = {p.port: p for p in ports if _port_problem(p, wanted) is None}
    by_number = {p.port: p for p in ports}
    verdicts = [(entry, _judge(entry, by_number.get(entry.port), wanted)) for entry in gids]
    ranked = [(v.rank, e.port, e.index, e) for e, v in verdicts if v.rank is not None]
    best = min(ranked, key=lambda row: row[:3])[3] if ranked else None

    if gid_index is None and (best is None or not _is_ethernet(usable[best.port])):
        by_lid = next((p for _, p in sorted(usable.items()) if not _is_ethernet(p) and p.lid), None)
        if by_lid is not None:
            first = min((e for e in gids if e.port == by_lid.port), key=lambda e: e.index, default=None)
            return GidChoice(None, by_lid, _candidates(verdicts, None), first)
    if best is None:
        raise DeviceError(_refusal(ports, verdicts, wanted))
    return GidChoice(best, usable[best.port], _candidates(verdicts, best), best)


# --- what is wanted -----------------------------------------------------------------------------------


class _Wanted(NamedTuple):
    """The question, in normal form: no IPv4-mapped addresses, no IPv6 scopes, no alias labels."""

    local: Address | None
    ends: frozenset[Address]
    loopback: bool
    homes: frozenset[str]  # the interfaces that have the local address
    interfaces: Mapping[str, frozenset[Address]]
    port: int | None
    gid_index: int | None

    @classmethod
    def make(
        cls,
        local: Address | None,
        remote: Address | None,
        interfaces: Mapping[str, Sequence[Address]],
        port: int | None,
        gid_index: int | None,
    ) -> _Wanted:
        scope = local.scope_id if isinstance(local, ipaddress.IPv6Address) else None
        local, remote = _plain(local), _plain(remote)
        table: dict[str, frozenset[Address]] = {}
        for label, addresses in interfaces.items():
            name = label.partition(":")[0]  # eth0:1 is an alias of eth0, and an address of it
            table[name] = table.get(name, frozenset()) | {a for a in map(_plain, addresses) if a is not None}
        homes = frozenset(name for name, addresses in table.items() if local in addresses)
        return cls(
            local=local,
            ends=frozenset(a for a in (local, remote) if a is not None),
            loopback=_over_loopback(local, remote, table),
            homes=homes & {scope} if scope in homes else homes,
            interfaces=table,
            port=port,
            gid_index=gid_index,
        )


def _plain(address: Address | None) -> Address | None:
    """IPv4 where the address is IPv4-mapped, and without its scope."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or ipaddress.IPv6Address(address.packed)
    return address


def _over_loopback(
    local: Address | None, remote: Address | None, interfaces: Mapping[str, frozenset[Address]]
) -> bool:
    """Whether both ends are this host; unknown ends count as such.

    A link-local remote address may equal one of ours on another link: only local == remote tells there.
    """
    if local is None or local == remote or local.is_loopback:
        return True
    if remote is None or remote.is_link_local:
        return False
    return remote.is_loopback or any(remote in addresses for addresses in interfaces.values())


# --- verdicts -----------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """``rank`` orders what will do (lowest first); None: will not do."""

    rank: tuple[int, ...] | None
    reason: str


_BY_ADDRESS, _BY_INTERFACE, _BY_LOOPBACK, _INFINIBAND = range(4)


def _is_ethernet(port: PortAttributes) -> bool:
    """The link layer is only reported as unspecified where it is InfiniBand (ibv_query_port(3))."""
    return port.link_layer == LinkLayer.ETHERNET


def _port_problem(port: PortAttributes, wanted: _Wanted) -> str | None:
    if wanted.port is not None and port.port != wanted.port:
        return f"port {wanted.port} was asked for"
    if port.state != PortState.ACTIVE:
        return f"port {port.port} is {port.state.name}, not ACTIVE"
    return None


def _judge(entry: GidEntry, port: PortAttributes | None, wanted: _Wanted) -> _Verdict:
    if port is None:
        return _Verdict(None, "its port does not exist")
    problem = _port_problem(port, wanted)
    if problem is not None:
        return _Verdict(None, problem)
    if wanted.gid_index is not None and entry.index != wanted.gid_index:
        return _Verdict(None, f"GID index {wanted.gid_index} was asked for")
    if not _is_ethernet(port):
        forced = wanted.gid_index is not None
        if port.lid and not forced:
            return _Verdict((_INFINIBAND,), f"LID addressing needs no GID (LID {port.lid:#x})")
        return _Verdict((_INFINIBAND,), "asked for" if forced else "the port has no LID, so its first GID")
    if entry.type != GidType.ROCE_V2:
        return _Verdict(None, f"{_TYPE_NAMES[entry.type]}: only RoCE v2, which can be routed, is used")
    if wanted.gid_index is not None:
        return _Verdict((_BY_ADDRESS,), "asked for")
    return _judge_loopback(entry, wanted) if wanted.loopback else _judge_route(entry, wanted)


def _judge_route(entry: GidEntry, wanted: _Wanted) -> _Verdict:
    """RoCE v2 towards another host."""
    local, address, interface = wanted.local, entry.address, entry.interface
    assert local is not None
    if address == local:
        if local.is_link_local and interface and wanted.homes and interface not in wanted.homes:
            return _Verdict(None, f"the same link-local address, but not on {_names(wanted.homes)}")
        known = interface in wanted.homes
        return _Verdict((_BY_ADDRESS, not known), "it is the local address of the connection")
    if address.is_link_local:
        return _Verdict(None, "link-local, and not the local address of the connection")
    if not wanted.homes:
        return _Verdict(None, f"not the local address {local}, which is on none of the interfaces here")
    if interface not in wanted.homes:
        return _Verdict(None, f"not on {_names(wanted.homes)}, which has the local address {local}")
    if address.version != local.version:
        return _Verdict(
            None, f"on {interface}, but IPv{address.version} and the connection is IPv{local.version}"
        )
    if address not in wanted.interfaces[interface]:
        return _Verdict(None, f"{interface} does not have this address: a row of another network namespace?")
    return _Verdict((_BY_INTERFACE,), f"on {interface}, which has the local address {local}")


def _judge_loopback(entry: GidEntry, wanted: _Wanted) -> _Verdict:
    """RoCE v2 to this host itself. Both ends must come to the same: local and remote count alike here."""
    address = entry.address
    here = any(address in addresses for addresses in wanted.interfaces.values())
    rank = (
        _BY_ADDRESS if address in wanted.ends else _BY_LOOPBACK,
        address.is_link_local,
        not here,
        address.version,
    )
    if address in wanted.ends:
        return _Verdict(rank, "it is the address that the connection within this host uses")
    return _Verdict(rank, "any GID reaches this host; IPv4, not link-local, lowest port and index first")


def _names(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


# --- the answer ---------------------------------------------------------------------------------------


def _candidates(
    verdicts: Sequence[tuple[GidEntry, _Verdict]], best: GidEntry | None
) -> tuple[GidCandidate, ...]:
    def reason(entry: GidEntry, verdict: _Verdict) -> str:
        if verdict.rank is None or best is None or entry is best:
            return verdict.reason
        return f"would do, but comes after port {best.port} GID {best.index}"

    return tuple(GidCandidate(entry, entry is best, reason(entry, verdict)) for entry, verdict in verdicts)


def _refusal(
    ports: Sequence[PortAttributes], verdicts: Sequence[tuple[GidEntry, _Verdict]], wanted: _Wanted
) -> str:
    what = [f"local address {wanted.local or 'unknown'}"]
    if wanted.port is not None:
        what.append(f"port {wanted.port}")
        if all(p.port != wanted.port for p in ports):
            what.append("which does not exist")
    if wanted.gid_index is not None:
        what.append(f"GID index {wanted.gid_index}")
    lines = [f"no GID fits the connection ({', '.join(what)}):"]
    for port in ports:
        lines.append(
            f"  port {port.port}: {port.state.name}, {port.link_layer.name.lower()}, LID {port.lid:#x}"
        )
    lines += [f"  {candidate}" for candidate in _candidates(verdicts, None)]
    if not verdicts:
        lines.append("  the GID table is empty")
    if any(verdict.rank is None for _, verdict in verdicts) or not verdicts:
        lines.append(
            "give the RDMA device's network interface an address and connect to that, or name one: "
            "Config(port=..., gid_index=...)"
        )
    return "\n".join(lines)


# --- the interfaces of this host ----------------------------------------------------------------------

# rtnetlink(7) and netlink(7): message header, ifaddrmsg, attribute header, and the few numbers needed.
_HEADER = struct.Struct("=IHHII")
_IFADDR = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_NLMSG_ERROR, _NLMSG_DONE, _RTM_NEWADDR, _RTM_GETADDR = 2, 3, 20, 22
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


def interface_addresses() -> dict[str, list[Address]]:
    """The IP addresses of every interface in this network namespace, IPv6 without scope; needs no privilege.

    One rtnetlink(7) dump: microseconds, no waiting. Interfaces without an address are left out. Raises
    OSError where the kernel or a sandbox does not allow netlink sockets.
    """
    found: dict[str, list[Address]] = {}
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as sock:
        body = _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETADDR, flags, 1, 0) + body)
        for payload in _replies(sock):
            index = _IFADDR.unpack_from(payload)[4]
            attributes = dict(_attributes(payload[_IFADDR.size :]))
            # On a point-to-point link IFA_ADDRESS is the other end and IFA_LOCAL this one (rtnetlink(7)).
            raw = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            try:
                name = socket.if_indextoname(index)
            except OSError:
                continue  # removed since the dump
            if raw:
                found.setdefault(name, []).append(ipaddress.ip_address(raw))
    return found


def _replies(sock: socket.socket) -> Iterator[bytes]:
    """The payloads of all RTM_NEWADDR messages up to the end of the dump."""
    while True:
        data = sock.recv(1 << 16)
        for kind, payload in _messages(data):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -struct.unpack_from("=i", payload)[0]
                raise OSError(number, f"RTM_GETADDR: {os.strerror(number)}")
            if kind == _RTM_NEWADDR:
                yield payload


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    """Netlink pads to 4 bytes; a length of 0 would never end, so at least that."""
    return max(4, (length + 3) & ~3)
