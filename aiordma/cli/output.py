"""What the subcommands print: aligned text for people, JSON with stable keys for programs."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import ipaddress
import json
from collections.abc import Iterable, Sequence
from typing import Any


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, and ``--library`` for another verbs library than the system's."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--library",
        metavar="PATH",
        help="use only this verbs library, not the system's libibverbs and usroce",
    )


def print_json(value: object) -> None:
    """Prints dataclasses, enumerations (by name) and IP addresses as JSON."""
    print(json.dumps(plain(value), indent=2))


def plain(value: Any) -> Any:
    """``value`` in the types that JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "") -> str:
    """Columns as wide as their widest cell, two spaces between them."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in cells
    )


def pairs(rows: Iterable[tuple[str, object]], indent: str = "") -> str:
    """Names and values in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{indent}{name.ljust(width)}  {value}" for name, value in rows)


def size(nbytes: int) -> str:
    """``8 MiB``: a number of bytes in the largest unit that divides it."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while nbytes and nbytes % 1024 == 0 and step + 1 < len(units):
        nbytes //= 1024
        step += 1
    return f"{nbytes} {units[step]}"
