"""Reads captures: IPv4 packets with UDP in them, as usroce writes them."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC_NANOSECONDS = 0xA1B23C4D
_RAW = 101  # LINKTYPE_RAW: begins with the IP header


@dataclass(frozen=True)
class Packet:
    """UDP ports, addresses, and what UDP carries: a RoCE v2 packet."""

    time: float
    source_address: ipaddress.IPv4Address
    destination_address: ipaddress.IPv4Address
    source: int
    destination: int
    payload: bytes

    @property
    def opcode(self) -> int:
        """Of the base transport header."""
        return self.payload[0]


def packets(path: Path) -> Iterator[Packet]:
    """Every packet of a file, which must be whole."""
    data = path.read_bytes()
    magic, major, minor, _, _, _, kind = struct.unpack_from("=IHHIIII", data)
    assert (magic, major, minor, kind) == (_MAGIC_NANOSECONDS, 2, 4, _RAW)
    at = 24
    while at < len(data):
        seconds, nanoseconds, captured, length = struct.unpack_from("=IIII", data, at)
        at += 16
        assert captured == length
        assert at + length <= len(data), "the file ends inside a packet"
        yield _packet(seconds + nanoseconds / 1e9, data[at : at + length])
        at += length


def _packet(time: float, frame: bytes) -> Packet:
    assert frame[0] == 0x45
    assert frame[9] == 17
    source, destination, length, _ = struct.unpack_from("!HHHH", frame, 20)
    assert length == len(frame) - 20
    here, there = (ipaddress.IPv4Address(frame[at : at + 4]) for at in (12, 16))
    return Packet(time, here, there, source, destination, frame[28:])
