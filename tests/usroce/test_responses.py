"""What the device answers to a peer that is a socket of the test: things that only other devices would notice."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from aiordma.verbs import Access, usroce
from tests.usroce.ends import Card, End
from tests.usroce.frames import Endpoint, Opcode, Packet, atomic, bth, padded, reth, seal
from tests.usroce.processes import free_loopback_address

pytestmark = [pytest.mark.device, pytest.mark.usroce]

SO_NO_CHECK = 11  # asm-generic/socket.h
UDP_NO_CHECK6_TX = 101  # linux/udp.h
QP_NUM = 0x1234


class Peer:
    """A device of Python's: it sends what it is told and returns what comes."""

    def __init__(self, end: End) -> None:
        gid = end.gid.ipv4_mapped or end.gid
        family = socket.AF_INET if gid.version == 4 else socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.settimeout(20)
        self.socket.bind((str(gid), 0))
        self.here = Endpoint(gid, self.socket.getsockname()[1])
        self.there = Endpoint(gid, end.context.port(1).lid)
        self.psn = 7
        self.end = end
        end.connect(Card(QP_NUM, self.psn, self.here.port, str(end.gid), 0, 0))

    def send(self, opcode: int, psn: int, rest: bytes, *, pad: int = 0) -> None:
        frame = bth(opcode, self.end.qp.qp_num, psn, pad=pad) + rest
        self.socket.sendto(seal(frame, self.here, self.there), (str(self.there.address), self.there.port))

    def write(self, data: bytes, psn: int, at: int) -> None:
        payload, pad = padded(data)
        place = reth(self.end.region.address + at, self.end.region.rkey, len(data))
        self.send(Opcode.WRITE_ONLY, psn, place + payload, pad=pad)

    def fetch_add(self, value: int, psn: int, at: int) -> None:
        self.send(Opcode.FETCH_ADD, psn, atomic(self.end.region.address + at, self.end.region.rkey, value))

    def read(self, length: int, psn: int, at: int) -> None:
        place = reth(self.end.region.address + at, self.end.region.rkey, length)
        self.send(Opcode.READ_REQUEST, psn, place)

    def answers(self, last: tuple[int, int]) -> list[tuple[int, int]]:
        """Opcodes and packet numbers, up to and including `last`."""
        found: list[tuple[int, int]] = []
        while last not in found:
            packet = Packet(bytes(28), self.socket.recv(1 << 16))
            found.append((packet.opcode, packet.psn))
        return found


@pytest.fixture(params=["ipv4", "ipv6"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    address = free_loopback_address() if request.param == "ipv4" else "::1"
    with usroce.options(address=address):
        context = usroce.usroce_device().open()
    with context:
        made = Peer(End(context))
        with made.socket:
            yield made


def test_an_acknowledgement_is_never_of_a_read_or_atomic(peer: Peer) -> None:
    """rxe would take the operation for complete, though the answer with its value was lost."""
    peer.write(b"data", 7, 100)
    peer.fetch_add(5, 8, 0)
    found = peer.answers((Opcode.ATOMIC_ACKNOWLEDGE, 8))
    for _ in range(3):
        peer.write(b"data", 7, 100)  # again, as if nothing had come back
    found += peer.answers((Opcode.ACKNOWLEDGE, 7))
    peer.read(4, 9, 100)
    found += peer.answers((Opcode.READ_ONLY, 9))
    peer.write(b"data", 7, 100)
    peer.fetch_add(5, 8, 0)
    found += peer.answers((Opcode.ATOMIC_ACKNOWLEDGE, 8))
    peer.write(b"more", 10, 200)
    found += peer.answers((Opcode.ACKNOWLEDGE, 10))
    assert {psn for opcode, psn in found if opcode == Opcode.ACKNOWLEDGE} == {7, 10}
    assert int.from_bytes(peer.end.memory[:8], "little") == 5, "added once"
    assert peer.end.memory[200:204] == b"more"


def test_a_read_is_asked_for_again_when_its_region_is_gone(peer: Peer) -> None:
    """The peer had its answer and said so, and its repeated request was still on the way: no offence."""
    peer.read(4096, 7, 0)
    peer.answers((Opcode.READ_LAST, 10))
    memory = bytearray(64)
    with peer.end.pd.register(memory, Access.LOCAL_WRITE | Access.REMOTE_WRITE) as other:
        peer.end.region.close()
        peer.read(4096, 7, 0)
        place = reth(other.address, other.rkey, 4)
        peer.send(Opcode.WRITE_ONLY, 11, place + b"data")
        assert (Opcode.ACKNOWLEDGE, 11) in peer.answers((Opcode.ACKNOWLEDGE, 11))
    assert memory[:4] == b"data"


def test_packets_without_a_udp_checksum(peer: Peer) -> None:
    """So hardware and rxe send them; the kernel keeps them from IPv6 sockets that do not ask for them."""
    if peer.here.address.version == 6:
        peer.socket.setsockopt(socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1)
    else:
        peer.socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
    peer.write(b"unchecked", 7, 100)
    peer.answers((Opcode.ACKNOWLEDGE, 7))
    assert peer.end.memory[100:109] == b"unchecked"
