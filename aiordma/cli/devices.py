"""``aiordma devices``: every RDMA device with its ports, GIDs and limits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

from ..errors import RdmaError
from ..verbs import (
    Device,
    DeviceAttributes,
    GidEntry,
    GidType,
    PortAttributes,
    Provider,
    Transport,
    devices,
    provider,
)
from ..verbs.gid_choice import Address
from .output import add_common_options, pairs, print_json, size, table

HELP = "list the RDMA devices of this machine: ports, GIDs, limits"

#: Attributes shown elsewhere than among the limits.
_IDENTITY = ("firmware", "vendor_id", "vendor_part_id", "node_guid", "ports")

_TRANSPORTS = {Transport.IB: "InfiniBand (also RoCE)", Transport.IWARP: "iWARP"}


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceReport:
    """What could be read of one device; ``error`` says why nothing could, and the rest is empty then."""

    name: str
    transport: Transport
    error: str | None = None
    attributes: DeviceAttributes | None = None
    ports: tuple[PortAttributes, ...] = ()
    gids: tuple[GidEntry, ...] = ()
    usroce: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    add_common_options(parser)


def run(args: argparse.Namespace) -> int:
    """Status 0 when there is a device, 1 when there is none or the library cannot be used."""
    try:
        reports, error = survey(provider(args.library) if args.library else None), None
    except RdmaError as failure:
        reports, error = [], str(failure)
    if args.json:
        print_json({"error": error, "devices": [_as_json(report) for report in reports]})
    else:
        print("\n\n".join("\n".join(_as_text(report)) for report in reports), end="\n" if reports else "")
        if not reports:
            print(f"{error or 'no RDMA device'}; see: aiordma doctor", file=sys.stderr)
    return 0 if reports else 1


def survey(source: Provider | None) -> list[DeviceReport]:
    """Opens each device of a library (None: of all) and reads its tables. Raises
    :class:`~aiordma.errors.DeviceError` only when the devices cannot even be listed."""
    return [_inspect(device) for device in devices(source)]


def _inspect(device: Device) -> DeviceReport:
    try:
        with device.open() as context:
            return DeviceReport(
                name=device.name,
                transport=device.transport,
                attributes=context.attributes(),
                ports=tuple(context.ports()),
                gids=tuple(context.gids()),
                usroce=device.is_usroce,
            )
    except (RdmaError, ValueError) as error:  # ValueError: an enumeration value newer than the headers
        return DeviceReport(device.name, device.transport, error=str(error), usroce=device.is_usroce)


def _limits(attributes: DeviceAttributes) -> dict[str, object]:
    every = dataclasses.asdict(attributes)
    return {name: value for name, value in every.items() if name not in _IDENTITY}


def _as_json(report: DeviceReport) -> dict[str, object]:
    attributes = report.attributes
    return {
        "name": report.name,
        "transport": report.transport,
        "usroce": report.usroce,
        "error": report.error,
        **{name: getattr(attributes, name, None) for name in _IDENTITY if name != "ports"},
        "ports": report.ports,
        "gids": [
            {
                "port": entry.port,
                "index": entry.index,
                "gid": entry.gid,
                "address": _ip_address(entry),
                "type": entry.type,
                "interface": entry.interface,
            }
            for entry in report.gids
        ],
        "limits": _limits(attributes) if attributes else {},
    }


def _as_text(report: DeviceReport) -> Iterator[str]:
    yield report.name
    if report.attributes is None:
        yield f"  cannot be opened: {report.error}"
        return
    a = report.attributes
    yield pairs(
        [
            ("transport", _transport(report)),
            ("firmware", a.firmware),
            ("vendor, part", f"{a.vendor_id:#06x}, {a.vendor_part_id:#06x}"),
            ("node GUID", a.node_guid),
        ],
        indent="  ",
    )
    yield ""
    yield table(
        ("port", "state", "link layer", "MTU", "max MTU", "LID", "max message"),
        [
            (
                p.port,
                p.state.name,
                p.link_layer.name,
                p.active_mtu,
                p.max_mtu,
                f"UDP port {p.lid}" if report.usroce else f"{p.lid:#x}",
                size(p.max_message),
            )
            for p in report.ports
        ],
        indent="  ",
    )
    yield ""
    yield table(
        ("port", "index", "GID", "address", "type", "interface"),
        [
            (e.port, e.index, e.gid.exploded, _ip_address(e) or "-", e.type.name, e.interface or "-")
            for e in report.gids
        ],
        indent="  ",
    )
    yield ""
    yield "  limits"
    yield pairs(_limits(a).items(), indent="    ")


def _transport(report: DeviceReport) -> str:
    if report.usroce:
        return "RoCE v2 in user space"
    return _TRANSPORTS.get(report.transport, report.transport.name)


def _ip_address(entry: GidEntry) -> Address | None:
    """RoCE GIDs stand for an IP address, InfiniBand ones do not."""
    return None if entry.type == GidType.IB else entry.address
