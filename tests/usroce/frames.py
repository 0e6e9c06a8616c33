"""RoCE v2 frames as somebody else makes and reads them: from the specifications, and without the device's code.

A frame is what UDP carries: base transport header, further headers, payload, pad, and the invariant CRC
(InfiniBand Architecture Specification, volume 1, chapter 9 and Annex A17).
"""

from __future__ import annotations

import enum
import ipaddress
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PSN_MASK = 0xFFFFFF
BTH = 12
ICRC = 4
LARGEST = 65507  # bytes of a UDP datagram over IPv4


class Opcode(enum.IntEnum):
    """Those of the reliable connected service, and of datagrams."""

    SEND_FIRST = 0x00
    SEND_MIDDLE = 0x01
    SEND_LAST = 0x02
    SEND_LAST_IMM = 0x03
    SEND_ONLY = 0x04
    SEND_ONLY_IMM = 0x05
    WRITE_FIRST = 0x06
    WRITE_MIDDLE = 0x07
    WRITE_LAST = 0x08
    WRITE_LAST_IMM = 0x09
    WRITE_ONLY = 0x0A
    WRITE_ONLY_IMM = 0x0B
    READ_REQUEST = 0x0C
    READ_FIRST = 0x0D
    READ_MIDDLE = 0x0E
    READ_LAST = 0x0F
    READ_ONLY = 0x10
    ACKNOWLEDGE = 0x11
    ATOMIC_ACKNOWLEDGE = 0x12
    COMPARE_SWAP = 0x13
    FETCH_ADD = 0x14
    SEND_LAST_INV = 0x16
    SEND_ONLY_INV = 0x17
    DATAGRAM = 0x64
    DATAGRAM_IMM = 0x65


WITH_RETH = {Opcode.WRITE_FIRST, Opcode.WRITE_ONLY, Opcode.WRITE_ONLY_IMM, Opcode.READ_REQUEST}
WITH_AETH = {
    Opcode.READ_FIRST,
    Opcode.READ_LAST,
    Opcode.READ_ONLY,
    Opcode.ACKNOWLEDGE,
    Opcode.ATOMIC_ACKNOWLEDGE,
}
WITH_ATOMIC = {Opcode.COMPARE_SWAP, Opcode.FETCH_ADD}
WITH_IMM = {Opcode.SEND_LAST_IMM, Opcode.SEND_ONLY_IMM, Opcode.WRITE_LAST_IMM, Opcode.WRITE_ONLY_IMM}
WITH_INV = {Opcode.SEND_LAST_INV, Opcode.SEND_ONLY_INV}


class Endpoint(NamedTuple):
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @classmethod
    def of(cls, address: str, port: int) -> Endpoint:
        return cls(ipaddress.ip_address(address), port)


# --- making them -------------------------------------------------------------------------------------------


def bth(
    opcode: int, qp_num: int, psn: int, *, ask: bool = True, solicited: bool = False, pad: int = 0
) -> bytes:
    flags = solicited << 7 | 1 << 6 | pad << 4
    return struct.pack("!BBHII", opcode, flags, 0xFFFF, qp_num, ask << 31 | psn & PSN_MASK)


def reth(address: int, rkey: int, length: int) -> bytes:
    return struct.pack("!QII", address, rkey, length)


def atomic(address: int, rkey: int, swap_add: int, compare: int = 0) -> bytes:
    return struct.pack("!QIQQ", address, rkey, swap_add, compare)


def aeth(syndrome: int, msn: int = 0) -> bytes:
    return struct.pack("!I", syndrome << 24 | msn)


def padded(payload: bytes) -> tuple[bytes, int]:
    """With what makes it a multiple of four bytes, and how much that is."""
    pad = -len(payload) % 4
    return payload + bytes(pad), pad


def seal(frame: bytes, source: Endpoint, destination: Endpoint) -> bytes:
    """With the ICRC that it has in a packet with the identification 0."""
    return frame + icrc(pseudo_headers(source, destination, len(frame) + ICRC), frame)


def pseudo_headers(source: Endpoint, destination: Endpoint, size: int) -> bytes:
    """IP and UDP header of a packet with a frame of `size` bytes, as the sender makes them."""
    udp = struct.pack("!HHHH", source.port, destination.port, 8 + size, 0)
    addresses = source.address.packed + destination.address.packed
    if source.address.version == 4:
        return struct.pack("!BBHHHBBH", 0x45, 0, 28 + size, 0, 0x4000, 64, 17, 0) + addresses + udp
    return struct.pack("!IHBB", 6 << 28, 8 + size, 17, 64) + addresses + udp


def icrc(headers: bytes, frame: bytes) -> bytes:
    """The invariant CRC over IP and UDP header and a frame without its own: CRC-32 with what routers change as
    ones, eight bytes of ones in front for the LRH that is not there (A17.3.3)."""
    masked = bytearray(headers + frame)
    if headers[0] >> 4 == 4:
        masked[1] = masked[8] = 0xFF  # type of service, time to live
        masked[10:12] = masked[26:28] = b"\xff\xff"  # the checksums
        start = 28
    else:
        masked[0] |= 0x0F  # traffic class and flow label
        masked[1:4] = b"\xff\xff\xff"
        masked[7] = 0xFF  # hop limit
        masked[46:48] = b"\xff\xff"
        start = 48
    masked[start + 4] = 0xFF  # resv8a of the BTH
    return struct.pack("<I", zlib.crc32(b"\xff" * 8 + masked))


# --- reading them ------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """What was on the wire: IP and UDP header, and the frame."""

    headers: bytes
    frame: bytes

    @property
    def source(self) -> Endpoint:
        return self._endpoint(0)

    @property
    def destination(self) -> Endpoint:
        return self._endpoint(1)

    def _endpoint(self, which: int) -> Endpoint:
        start, size = (12, 4) if self.headers[0] >> 4 == 4 else (8, 16)
        start += which * size
        (port,) = struct.unpack_from("!H", self.headers, len(self.headers) - 8 + 2 * which)
        return Endpoint(ipaddress.ip_address(self.headers[start : start + size]), port)

    @property
    def opcode(self) -> int:
        return self.frame[0]

    @property
    def qp_num(self) -> int:
        return int.from_bytes(self.frame[5:8], "big")

    @property
    def psn(self) -> int:
        return int.from_bytes(self.frame[9:12], "big")

    @property
    def has_right_icrc(self) -> bool:
        return icrc(self.headers, self.frame[:-ICRC]) == self.frame[-ICRC:]


def read_capture(path: Path) -> Iterator[Packet]:
    """The packets of a capture file (pcap, nanoseconds, LINKTYPE_RAW)."""
    data = path.read_bytes()
    magic, major, minor, _, _, _, link_type = struct.unpack_from("=IHHiIII", data)
    assert (magic, major, minor, link_type) == (0xA1B23C4D, 2, 4, 101)
    at = 24
    while at < len(data):
        _, _, captured, length = struct.unpack_from("=IIII", data, at)
        assert captured == length
        at += 16
        packet = data[at : at + captured]
        assert len(packet) == captured, "the file ends within a record"
        at += captured
        size = 28 if packet[0] >> 4 == 4 else 48
        yield Packet(packet[:size], packet[size:])
