"""Whatever arrives at the port: packets of strangers and of a hostile peer, at queue pairs that are at work.

What an attacker can do depends on what he can send and what he knows.

- A connection whose peer published its UDP port (every usroce does) takes packets from that address and port only.
  Nobody else on the peer's host can send those, short of a raw socket, which is for root.
- Where the peer published none (a hardware device, or one that says nothing), any port of its address will do.
  Then it takes the number of the queue pair (24 bits) and a packet number that it accepts (24 bits; for answers
  about a thousand are accepted, for a request one), for there is no other secret in RoCE. What has the wrong ones
  changes nothing.
- Who has both, the peer above all, can end the connection, and write where he was allowed to write. He must not be
  able to do more: no crash, no byte beyond a registered region or its rights, and no harm to other connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiordma.errors import WcStatus
from aiordma.testing import Capture, Pair, connected_pair
from aiordma.verbs import (
    Access,
    CompletionQueue,
    Context,
    MemoryRegion,
    ProtectionDomain,
    QpState,
    QueuePair,
    SendFlags,
    WrOpcode,
    usroce,
)
from aiordma.verbs import Path as Route
from tests.usroce.frames import (
    LARGEST,
    PSN_MASK,
    WITH_AETH,
    WITH_ATOMIC,
    WITH_IMM,
    WITH_INV,
    WITH_RETH,
    Endpoint,
    Opcode,
    Packet,
    aeth,
    atomic,
    bth,
    padded,
    read_capture,
    reth,
    seal,
)

pytestmark = [pytest.mark.device, pytest.mark.usroce]

STANDARD_PORT = 4791
MTU = 1024
ALL_RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
PATIENCE = 20.0  # seconds
UDP_SEGMENT = 103  # linux/udp.h

seeds = pytest.mark.parametrize("seed", [1, 2, 3])


# --- who attacks ---------------------------------------------------------------------------------------------


class Attacker:
    """A socket of its own, at an address of this machine, aimed at a device's port."""

    def __init__(self, address: str, target: Endpoint) -> None:
        self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.socket.setblocking(False)
        self.here = Endpoint.of(*self.socket.getsockname())
        self.target = target

    def send(self, data: bytes) -> None:
        """As it is."""
        self.socket.sendto(data, (str(self.target.address), self.target.port))

    def send_sealed(self, frame: bytes) -> None:
        self.send(seal(frame, self.here, self.target))

    def send_row(self, data: bytes, size: int) -> None:
        """One message that the kernel cuts into segments, and on loopback hands over in one piece."""
        option = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))
        self.socket.sendmsg([data], [option], 0, (str(self.target.address), self.target.port))

    def answers(self) -> Iterator[Packet]:
        """What came back since; the headers are made up."""
        while True:
            try:
                frame = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            yield Packet(bytes(28), frame)

    def close(self) -> None:
        self.socket.close()


# --- who is attacked -----------------------------------------------------------------------------------------


class Target:
    """A device, and two connected queue pairs on it that say nothing of their ports."""

    def __init__(self, context: Context, address: str) -> None:
        self.context = context
        self.endpoint = Endpoint.of(address, STANDARD_PORT)
        self.gid = ipaddress.IPv6Address(f"::ffff:{address}")
        self.pd = ProtectionDomain(context)
        self.cq = CompletionQueue(context, 1024)
        self.memory = bytearray(64 << 10)
        self.region = self.pd.register(self.memory, ALL_RIGHTS)
        self.one, self.other = self.queue_pair(), self.queue_pair()
        self.connect(self.one, self.other.qp_num)
        self.connect(self.other, self.one.qp_num)
        self.psn = 7  # of the next packet of each
        self.round = 0

    def queue_pair(self, pd: ProtectionDomain | None = None) -> QueuePair:
        return QueuePair(pd or self.pd, self.cq, max_send_wr=32, max_recv_wr=32)

    def connect(self, qp: QueuePair, peer: int, *, port: int = 0, psn: int = 7, timeout: int = 14) -> None:
        qp.to_init(1)
        path = Route(1, port, self.gid, 0)
        qp.to_rtr(path, qp_num=peer, psn=psn, mtu=MTU, responder_depth=4)
        qp.to_rts(psn=psn, timeout=timeout, retry_count=7, rnr_retry=7, initiator_depth=4)

    def counters(self) -> usroce.UsroceCounters:
        return usroce.counters(self.context)

    def completions(self, qp_nums: set[int], count: int) -> None:
        """So many, of these queue pairs and good; those of others are left out."""
        deadline = time.monotonic() + PATIENCE
        while count:
            assert time.monotonic() < deadline, f"{count} completions are missing"
            for wc in self.cq.poll(10_000_000):
                if wc.qp_num in qp_nums:
                    assert wc.status == WcStatus.SUCCESS
                    count -= 1

    def work(self) -> None:
        """A message, a write, a read and an atomic between the two, with all bytes checked."""
        base, lkey, rkey = self.region.address, self.region.lkey, self.region.rkey
        self.round += 1
        text = b"%04d" % (self.round % 10_000) * 750  # three packets
        size, memory = len(text), self.memory
        memory[:size] = text
        self.other.post_recv_one(1, base + 8192, size, lkey)
        counter = int.from_bytes(memory[40_000:40_008], "little")
        requests = [
            (WrOpcode.SEND, 0, 0),
            (WrOpcode.RDMA_WRITE, 0, 16384),
            (WrOpcode.RDMA_READ, 24576, 16384),
        ]
        for opcode, local, remote in requests:
            rc = self.one.post_send(
                2, opcode, SendFlags.SIGNALED, base + local, size, lkey, base + remote, rkey
            )
            assert rc == 0
        add = WrOpcode.ATOMIC_FETCH_AND_ADD
        assert self.one.post_atomic(3, add, base + 48_000, lkey, base + 40_000, rkey, 5) == 0
        self.completions({self.one.qp_num, self.other.qp_num}, 5)
        for start in (8192, 16384, 24576):
            assert memory[start : start + size] == text
        assert int.from_bytes(memory[48_000:48_008], "little") == counter
        assert int.from_bytes(memory[40_000:40_008], "little") == counter + 5
        self.psn += 3 + 3 + 3 + 1

    def wait_for(self, name: str, least: int) -> usroce.UsroceCounters:
        """Until a counter has come so far."""
        deadline = time.monotonic() + PATIENCE
        while getattr(counters := self.counters(), name) < least:
            assert time.monotonic() < deadline, f"{name}: {counters} instead of {least}"
            self.cq.poll(1_000_000)
        return counters


@pytest.fixture
def target(address: str) -> Iterator[Target]:
    # What is hostile here comes over UDP, one packet a poll; tests/native/test_link_shm.c is about the memory.
    with usroce.options(address=address, shm="0"):
        context = usroce.usroce_device().open()
    with context:
        yield Target(context, address)


@pytest.fixture
def attackers(target: Target) -> Iterator[Callable[[str], Attacker]]:
    made: list[Attacker] = []

    def make(address: str) -> Attacker:
        made.append(Attacker(address, target.endpoint))
        return made[-1]

    yield make
    for attacker in made:
        attacker.close()


# --- strangers -----------------------------------------------------------------------------------------------


async def exchange(pair: Pair, rounds: int) -> int:
    """Traffic in which a packet too many or too few would show. Returns the final count of the shared word."""
    client, server = pair
    lease, region = await pair.region(16 << 10)
    for number in range(rounds):
        text = b"%06d" % number * 1500
        await client.write(text, region[8 : 8 + len(text)], notify=number)
        assert await server.notified() == number
        assert bytes(memoryview(lease)[8 : 8 + len(text)]) == text
        assert bytes(await client.read(region[8 : 8 + len(text)])) == text
        assert await client.fetch_add(region[:8], 3) == 3 * number
        await client.send(text[:4000])
        assert await server.recv() == text[:4000]
    return int.from_bytes(memoryview(lease)[:8], "little")


async def listen_in(pair: Pair, capture: Capture) -> list[Packet]:
    """All that the attacker could wish to know."""
    await exchange(pair, 2)
    return list(read_capture(capture.stop()))


async def test_who_is_not_at_the_port_of_the_peer_changes_nothing(address: str, tmp_path: Path) -> None:
    """Not even with the numbers of all packets: replays, and what comes next, from other ports and addresses."""
    rng = random.Random(1)
    with usroce.options(address=address), Capture(tmp_path / "capture.pcap") as capture:
        async with connected_pair(host=address) as pair:
            packets = await listen_in(pair, capture)
            (context,) = usroce.contexts()
            ends = {packet.qp_num: packet for packet in packets}  # the last one to each
            here = packets[0].destination
            attackers = [Attacker(address, here), Attacker("127.0.0.1", here)]
            traffic = asyncio.create_task(exchange(pair, 150))
            count = 0
            while not traffic.done():
                for packet in rng.sample(packets, 10):
                    rng.choice(attackers).send_sealed(packet.frame[:-4])
                last = rng.choice(list(ends.values()))
                for ahead in range(20):
                    frame = bth(Opcode.SEND_ONLY, last.qp_num, last.psn + rng.randrange(2000)) + bytes(ahead)
                    rng.choice(attackers).send_sealed(frame + bytes(-ahead % 4))
                count += 30
                await asyncio.sleep(0.001)
            assert await traffic == 3 * 150
            counters = usroce.counters(context)
            for attacker in attackers:
                assert list(attacker.answers()) == []
                attacker.close()
    assert 0 < counters.unknown_qp <= count
    assert counters.naks_sent == counters.bad_icrc == 0


class Stranger:
    """Knows the address of the peer, perhaps the number of a queue pair, and nothing else."""

    def __init__(self, attacker: Attacker, target: Target, seed: int) -> None:
        self.rng = random.Random(seed)
        self.attacker = attacker
        self.target = target
        self.expected = dict.fromkeys(("malformed", "bad_icrc", "unknown_qp"), 0)
        self.sent = 0

    def burst(self, count: int) -> None:
        kinds = (self.junk, self.damaged, self.nobody, self.far_off, self.row)
        for _ in range(count):
            self.rng.choice(kinds)()

    def qp_num(self) -> int:
        return self.rng.choice([self.target.one, self.target.other]).qp_num

    def far_psn(self) -> int:
        """Not near what is expected: neither the next ones, nor the last ones."""
        return self.target.psn + self.rng.randrange(1 << 16, (1 << 24) - (1 << 16)) & PSN_MASK

    def frame(self, qp_num: int, psn: int) -> bytes:
        opcode = self.rng.choice([Opcode.SEND_ONLY, Opcode.WRITE_ONLY, Opcode.READ_REQUEST, Opcode.FETCH_ADD,
                                  Opcode.ACKNOWLEDGE, Opcode.READ_ONLY, Opcode.ATOMIC_ACKNOWLEDGE])  # fmt: skip
        return random_packet(self.rng, opcode, qp_num, psn, self.target.region)

    def junk(self) -> None:
        """Of any size; an opcode that does not exist, so that it is nothing else by accident."""
        size = self.rng.choice([0, 1, 11, 15, 16, 100, 4096, self.rng.randrange(LARGEST), LARGEST])
        self.attacker.send((b"\xff" + self.rng.randbytes(size))[:size])
        self.count("malformed")

    def damaged(self) -> None:
        """One byte is another one, behind the numbers."""
        data = bytearray(
            seal(self.frame(self.qp_num(), self.far_psn()), self.attacker.here, self.attacker.target)
        )
        data[self.rng.randrange(12, len(data))] ^= self.rng.randrange(1, 256)
        self.attacker.send(bytes(data))
        self.count("bad_icrc")

    def nobody(self) -> None:
        """To a queue pair that there is not."""
        own = {self.target.one.qp_num, self.target.other.qp_num}
        qp_num = next(n for n in iter(lambda: self.rng.randrange(1 << 24), None) if n not in own)
        self.attacker.send_sealed(self.frame(qp_num, self.far_psn()))
        self.count("unknown_qp")

    def far_off(self) -> None:
        """Everything is right but the packet number."""
        self.attacker.send_sealed(self.frame(self.qp_num(), self.far_psn()))
        self.sent += 1

    def row(self) -> None:
        """Many of these in one message, as the kernel makes it of a large send."""
        number = self.rng.randrange(2, 60)
        frame = seal(bth(Opcode.SEND_ONLY, 0, 0) + bytes(400), self.attacker.here, self.attacker.target)
        self.attacker.send_row(frame * number, len(frame))
        self.count("unknown_qp", number)

    def count(self, name: str, number: int = 1) -> None:
        self.expected[name] += number
        self.sent += number


def random_packet(rng: random.Random, opcode: int, qp_num: int, psn: int, region: MemoryRegion) -> bytes:
    """With the headers of its opcode, and values that could be right."""
    size = rng.choice([0, 1, 8, rng.randrange(MTU), MTU, MTU, MTU + 1])
    address = region.address + rng.choice(
        [0, 8, rng.randrange(region.length), region.length - rng.randrange(9)]
    )
    rkey = rng.choice([region.rkey, region.rkey, region.rkey ^ 1 << rng.randrange(32)])
    headers = b""
    if opcode in WITH_RETH:
        length = rng.choice([size, size, rng.randrange(1 << 17), 1 << 31, (1 << 32) - 1])
        headers = reth(address, rkey, length)
    elif opcode in WITH_ATOMIC:
        headers = atomic(address & ~rng.choice([0, 7, 7]), rkey, rng.getrandbits(64), rng.getrandbits(64))
    elif opcode in WITH_AETH:
        headers = aeth(rng.choice([0x1F, 0, 0x20, 0x2C, 0x60, 0x61, 0x62, 0x63, rng.randrange(256)]))
    if opcode == Opcode.ATOMIC_ACKNOWLEDGE:
        headers += rng.randbytes(8)
    if opcode in WITH_IMM:
        headers += rng.randbytes(4)
    if opcode in WITH_INV:
        headers += struct.pack("!I", rkey)
    if opcode in WITH_ATOMIC | {Opcode.READ_REQUEST, Opcode.ACKNOWLEDGE, Opcode.ATOMIC_ACKNOWLEDGE}:
        size = 0
    payload, pad = padded(rng.randbytes(size))
    return bth(opcode, qp_num, psn, ask=rng.random() < 0.7, pad=pad) + headers + payload


@seeds
def test_who_does_not_know_the_numbers_changes_nothing(
    target: Target, attackers: Callable[[str], Attacker], seed: int
) -> None:
    stranger = Stranger(attackers(str(target.endpoint.address)), target, seed)
    for _ in range(500):
        stranger.burst(20)
        target.work()
    target.wait_for("malformed", stranger.expected["malformed"])
    target.wait_for("unknown_qp", stranger.expected["unknown_qp"])
    counters = target.wait_for("received", stranger.sent)
    assert counters.malformed == stranger.expected["malformed"]
    assert counters.unknown_qp == stranger.expected["unknown_qp"]
    # One in 65,536 passes, as one with another IP identification (icrc.h): its packet number is still wrong.
    assert stranger.expected["bad_icrc"] - 2 <= counters.bad_icrc <= stranger.expected["bad_icrc"]
    assert target.one.query_state() == target.other.query_state() == QpState.RTS
    assert counters.received >= stranger.sent


def test_a_flood_does_not_stop_the_device(target: Target, attackers: Callable[[str], Attacker]) -> None:
    """More than it can take: the kernel drops some, of the connection too, and that is repaired."""
    attacker = attackers("127.0.0.1")
    frame = seal(bth(Opcode.SEND_ONLY, 0, 0) + bytes(400), attacker.here, attacker.target)
    for _ in range(20):
        for _ in range(100):
            attacker.send_row(frame * 60, len(frame))
        target.work()


# --- a hostile peer ------------------------------------------------------------------------------------------


class Victim:
    """Queue pairs whose peer is the attacker, with memory that has borders, rights, and contents to be kept."""

    PAGE = 4096
    KEPT = 0xA5

    def __init__(self, target: Target, attacker: Attacker, seed: int) -> None:
        self.target, self.attacker = target, attacker
        self.rng = random.Random(seed)
        page = self.PAGE
        self.memory = bytearray([self.KEPT]) * (5 * page)
        self.foreign = bytearray([self.KEPT]) * page
        self.region = target.pd.register(memoryview(self.memory)[page : 2 * page], ALL_RIGHTS)
        readable = memoryview(self.memory)[3 * page : 4 * page]
        self.other_pd = ProtectionDomain(target.context)
        self.regions = [
            self.region,
            target.pd.register(readable, Access.REMOTE_READ),
            self.other_pd.register(self.foreign, ALL_RIGHTS),
        ]
        self.psn = self.theirs = 0
        self.qp = self.fresh()
        self.used_up = 0

    def fresh(self) -> QueuePair:
        """One more, with work on both queues."""
        self.psn, self.theirs = self.rng.randrange(1 << 24), self.rng.randrange(1 << 24)
        qp = self.target.queue_pair()
        qp.to_init(1)
        here, base, lkey = self.attacker.here, self.region.address, self.region.lkey
        path = Route(1, here.port, self.target.gid, 0)
        qp.to_rtr(path, qp_num=0x123456, psn=self.psn, mtu=MTU, responder_depth=self.rng.choice([1, 4]))
        qp.to_rts(
            psn=self.theirs, timeout=self.rng.choice([8, 14]), retry_count=7, rnr_retry=7, initiator_depth=4
        )
        for number in range(self.rng.randrange(8)):
            qp.post_recv_one(number, base + 512, self.rng.choice([0, 100, 3584]), lkey)
        for number in range(self.rng.randrange(8)):
            opcode = self.rng.choice([WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ])
            length = self.rng.randrange(self.PAGE)
            assert qp.post_send(number, opcode, SendFlags.SIGNALED, base, length, lkey, base, 1) == 0
        return qp

    def attack(self, count: int) -> None:
        for _ in range(count):
            self.attacker.send_sealed(self.next_frame())
            self.target.cq.poll()
            for packet in self.attacker.answers():
                if packet.opcode == Opcode.ACKNOWLEDGE and packet.frame[12] & 0x60:
                    self.psn = packet.psn  # a NAK says what is expected
            if self.qp.query_state() == QpState.ERR:
                self.qp.close()
                self.qp = self.fresh()
                self.used_up += 1

    def next_frame(self) -> bytes:
        opcode = self.rng.choice(list(Opcode)[:23])
        psn = self.psn if self.rng.random() < 0.8 else self.psn + self.rng.randrange(-3, 4)
        if opcode in WITH_AETH or opcode == Opcode.READ_MIDDLE:
            psn = self.theirs + self.rng.randrange(4)
        self.psn += psn == self.psn
        region = self.rng.choice([self.region, *self.regions])
        return self.spoil(random_packet(self.rng, opcode, self.qp.qp_num, psn, region))

    def spoil(self, frame: bytes) -> bytes:
        """Now and then cut short, with too much behind, or with another bit."""
        choice = self.rng.randrange(30)
        if choice == 0:
            return frame[: self.rng.randrange(12, len(frame) + 1)]
        if choice == 1:
            return frame + self.rng.randbytes(self.rng.choice([1, 4, 5000]))
        if choice == 2:
            at = self.rng.choice([0, 1, *range(12, len(frame))])
            return frame[:at] + bytes([frame[at] ^ 1 << self.rng.randrange(8)]) + frame[at + 1 :]
        return frame

    def close(self) -> None:
        for owner in (self.qp, *self.regions, self.other_pd):
            owner.close()

    def check(self) -> None:
        page, kept = self.PAGE, bytes([self.KEPT])
        assert self.memory[:page] == kept * page
        assert self.memory[2 * page :] == kept * (3 * page)
        assert self.foreign == kept * page


@seeds
def test_a_hostile_peer_harms_its_own_connection_only(
    target: Target, attackers: Callable[[str], Attacker], seed: int
) -> None:
    with contextlib.closing(Victim(target, attackers(str(target.endpoint.address)), seed)) as victim:
        for _ in range(500):
            victim.attack(20)
            target.work()
        victim.check()
        assert victim.used_up > 100
        assert victim.memory[victim.PAGE : 2 * victim.PAGE] != bytes([victim.KEPT]) * victim.PAGE
        assert target.one.query_state() == target.other.query_state() == QpState.RTS
