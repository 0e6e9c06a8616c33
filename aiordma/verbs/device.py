"""Devices, and the opened device: attributes, ports, the GID table, asynchronous events."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any

from .._native import ffi, lib
from ..errors import DeviceError
from .enums import MTU_BYTES, EventType, GidType, LinkLayer, PortState, Transport
from .owner import Owner
from .provider import Provider, check, providers


@dataclass(frozen=True, slots=True)
class GidEntry:
    """One row of a port's GID table."""

    port: int
    index: int
    gid: ipaddress.IPv6Address
    type: GidType
    interface: str | None

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The IP address of a RoCE GID: IPv4 where the GID is an IPv4-mapped address."""
        return self.gid.ipv4_mapped or self.gid


@dataclass(frozen=True, slots=True)
class PortAttributes:
    """What ``ibv_query_port(3)`` says of a port. MTUs and message size in bytes."""

    port: int
    state: PortState
    link_layer: LinkLayer
    lid: int
    active_mtu: int
    max_mtu: int
    max_message: int
    gid_table_length: int


@dataclass(frozen=True, slots=True)
class DeviceAttributes:
    """What ``ibv_query_device(3)`` says of a device: the limits aiordma respects."""

    firmware: str
    vendor_id: int
    vendor_part_id: int
    node_guid: str
    ports: int
    max_qp: int
    max_qp_wr: int
    max_sge: int
    max_cq: int
    max_cqe: int
    max_mr: int
    max_mr_size: int
    max_pd: int
    max_mw: int
    max_srq: int
    max_srq_wr: int
    max_read_depth: int
    max_read_depth_initiator: int
    atomics: bool
    memory_windows: bool  # type 2, the kind that is bound to one queue pair


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """An asynchronous event of the device; the fields that do not apply are 0."""

    type: EventType | int
    qp_num: int
    port: int
    cookie: int


class Device:
    """A device that can be opened. Listed by :func:`devices`."""

    __slots__ = ("_pointer", "_provider", "name", "transport")

    def __init__(self, source: Provider, pointer: Any) -> None:
        self._provider = source
        self._pointer = pointer
        self.name: str = ffi.string(pointer.name).decode()
        self.transport = _transport(pointer.transport_type)

    @property
    def is_usroce(self) -> bool:
        """Whether this is the user-space device that comes with the package."""
        return self._provider.is_usroce

    def open(self) -> Context:
        """Opens the device. Raises :class:`DeviceError` (EACCES: no permission on /dev/infiniband)."""
        return Context(self)

    def __repr__(self) -> str:
        return f"<Device {self.name}>"


def devices(source: Provider | None = None) -> list[Device]:
    """The devices of a verbs library; by default of every one there is, usroce's last. Empty where there are none.

    Raises :class:`~aiordma.errors.LibraryError` when no library can be opened, :class:`DeviceError` when the
    devices cannot be listed and no other library has any.
    """
    if source is not None:
        return _devices_of(source)
    found: list[Device] = []
    failure: DeviceError | None = None
    for each in providers():
        try:
            found += _devices_of(each)
        except DeviceError as error:
            failure = failure or error
    if failure is not None and not found:
        raise failure
    return found


def _devices_of(source: Provider) -> list[Device]:
    array = ffi.new("struct ibv_device ***")
    count = ffi.new("int *")
    hint = "one of the variables AIORDMA_USROCE_* has a wrong value" if source.is_usroce else ""
    check(lib.glue_get_device_list(source.table, array, count), "ibv_get_device_list", hint)
    if array[0] == ffi.NULL:
        return []

    # A device stays valid only as long as its list or a context made from it (ibv_get_device_list(3)), so the
    # Device objects share the list and the last one gives it back.
    free = source.table.free_device_list
    owner = ffi.gc(array[0], lambda pointer: free(pointer))
    return [Device(source, _keep(owner, array[0][i])) for i in range(count[0])]


def open_device(name: str | None = None) -> Context:
    """Opens the device called ``name``, or the first one. Raises :class:`DeviceError` naming what exists."""
    found = devices()
    for device in found:
        if name is None or device.name == name:
            return device.open()
    have = ", ".join(d.name for d in found) or "none"
    raise DeviceError(
        f"no RDMA device {name or 'at all'} on this machine (there are: {have}); see: aiordma doctor"
    )


def _keep(owner: Any, pointer: Any) -> Any:
    """A view of ``pointer`` that keeps ``owner`` alive."""
    return ffi.gc(pointer, lambda _pointer, _owner=owner: None)


def _transport(value: int) -> Transport:
    try:
        return Transport(value)
    except ValueError:
        return Transport.UNKNOWN


class Context(Owner):
    """An opened device (``struct ibv_context``); the root of every other owner.

    ``async_fd`` is non-blocking and readable when :meth:`get_async_event` has something to say.
    """

    __slots__ = ("_attributes", "_device", "_event", "_handle", "async_fd", "name", "provider")

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.provider = device._provider
        self._device = device
        self.name = device.name
        handle = ffi.new("struct ibv_context **")
        with self.provider.opening:
            rc = lib.glue_open_device(self.provider.table, device._pointer, handle)
            check(rc, f"ibv_open_device({device.name})", _opening_hint(device))
            self._handle = handle[0]
            self._opened()
            self.async_fd: int = self._handle.async_fd
            self._event = ffi.new("struct glue_async_event *")
            self._attributes: DeviceAttributes | None = None
            try:
                check(lib.glue_set_nonblocking(self.async_fd), "fcntl(async_fd)")
                self.provider.opened(self)
            except Exception:
                self.close()
                raise

    @property
    def transport(self) -> Transport:
        """InfiniBand (RoCE as well) or iWARP."""
        return self._device.transport

    @property
    def is_usroce(self) -> bool:
        """Whether this is the user-space device that comes with the package (:mod:`aiordma.verbs.usroce`)."""
        return self.provider.is_usroce

    @property
    def completion_vectors(self) -> int:
        """How many completion vectors (interrupts) the device offers."""
        return int(self._handle.num_comp_vectors)

    def attributes(self) -> DeviceAttributes:
        """The device's limits; asked once."""
        self.check_open()
        if self._attributes is None:
            raw = ffi.new("struct ibv_device_attr *")
            check(lib.glue_query_device(self.provider.table, self._handle, raw), "ibv_query_device")
            self._attributes = _device_attributes(raw)
        return self._attributes

    def port(self, number: int) -> PortAttributes:
        """The present state of a port (numbered from 1)."""
        self.check_open()
        raw = ffi.new("struct ibv_port_attr *")
        check(
            lib.glue_query_port(self.provider.table, self._handle, number, raw), f"ibv_query_port({number})"
        )
        return PortAttributes(
            port=number,
            state=PortState(raw.state),
            link_layer=LinkLayer(raw.link_layer),
            lid=raw.lid,
            active_mtu=MTU_BYTES.get(raw.active_mtu, 0),
            max_mtu=MTU_BYTES.get(raw.max_mtu, 0),
            max_message=raw.max_msg_sz,
            gid_table_length=raw.gid_tbl_len,
        )

    def ports(self) -> list[PortAttributes]:
        """Every port of the device."""
        return [self.port(number) for number in range(1, self.attributes().ports + 1)]

    def gids(self) -> list[GidEntry]:
        """The valid rows of the GID tables of all ports (``ibv_query_gid_table(3)``)."""
        self.check_open()
        room = sum(port.gid_table_length for port in self.ports())
        if not room:
            return []
        rows = ffi.new("struct ibv_gid_entry[]", room)
        count = ffi.new("size_t *")
        check(
            lib.glue_query_gid_table(self.provider.table, self._handle, rows, room, count),
            "ibv_query_gid_table",
        )
        return [_gid_entry(rows[i]) for i in range(count[0])]

    def get_async_event(self) -> AsyncEvent | None:
        """The next asynchronous event, already acknowledged, or None. Never blocks."""
        self.check_open()
        rc = lib.glue_get_async_event(self.provider.table, self._handle, self._event)
        if rc in (errno.EAGAIN, errno.EINTR):
            return None
        check(rc, "ibv_get_async_event")
        raw = self._event
        kind: EventType | int = raw.type
        try:
            kind = EventType(raw.type)
        except ValueError:
            pass
        return AsyncEvent(type=kind, qp_num=raw.qp_num, port=raw.port, cookie=raw.cookie)

    def _destroy(self) -> None:
        check(lib.glue_close_device(self.provider.table, self._handle), "ibv_close_device")

    def __repr__(self) -> str:
        return f"<Context {self.name} {'closed' if self.closed else 'open'}>"


def _opening_hint(device: Device) -> str:
    if device.is_usroce:
        return "are its addresses (Config.usroce_address, AIORDMA_USROCE_ADDRESS) those of this host?"
    return "permission on /dev/infiniband/uverbs* is needed" if device.transport == Transport.IB else ""


def _device_attributes(raw: Any) -> DeviceAttributes:
    flags = raw.device_cap_flags
    guid = int(raw.node_guid).to_bytes(8, "little").hex()  # stored in network byte order
    return DeviceAttributes(
        firmware=ffi.string(raw.fw_ver).decode(errors="replace"),
        vendor_id=raw.vendor_id,
        vendor_part_id=raw.vendor_part_id,
        node_guid=":".join(guid[i : i + 4] for i in range(0, 16, 4)),
        ports=raw.phys_port_cnt,
        max_qp=raw.max_qp,
        max_qp_wr=raw.max_qp_wr,
        max_sge=raw.max_sge,
        max_cq=raw.max_cq,
        max_cqe=raw.max_cqe,
        max_mr=raw.max_mr,
        max_mr_size=raw.max_mr_size,
        max_pd=raw.max_pd,
        max_mw=raw.max_mw,
        max_srq=raw.max_srq,
        max_srq_wr=raw.max_srq_wr,
        max_read_depth=raw.max_qp_rd_atom,
        max_read_depth_initiator=raw.max_qp_init_rd_atom,
        atomics=raw.atomic_cap != lib.IBV_ATOMIC_NONE,
        memory_windows=bool(flags & (lib.IBV_DEVICE_MEM_WINDOW_TYPE_2A | lib.IBV_DEVICE_MEM_WINDOW_TYPE_2B)),
    )


def _gid_entry(raw: Any) -> GidEntry:
    interface = None
    if raw.ndev_ifindex:
        try:
            interface = socket.if_indextoname(raw.ndev_ifindex)
        except OSError:
            interface = None  # the interface lives in another network namespace
    return GidEntry(
        port=raw.port_num,
        index=raw.gid_index,
        gid=ipaddress.IPv6Address(bytes(raw.gid.raw)),
        type=GidType(raw.gid_type),
        interface=interface,
    )
