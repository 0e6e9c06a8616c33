"""One end of a reliable connection in plain verbs: no event loop, no TCP connection that watches over it.

What the two ends must know of each other is a card of plain values, which tests pass as they like.
"""

from __future__ import annotations

import ipaddress
import secrets
import select
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from aiordma.errors import WcStatus
from aiordma.verbs import (
    Access,
    CompletionChannel,
    CompletionQueue,
    Context,
    Path,
    ProtectionDomain,
    QueuePair,
    SendFlags,
    WorkCompletion,
    WrOpcode,
)
from tests.usroce.processes import DEADLINE

SIGNALED = int(SendFlags.SIGNALED)


@dataclass(frozen=True)
class Card:
    """Where an end is, and the memory it lets the other one into."""

    qp_num: int
    psn: int
    lid: int
    gid: str
    address: int
    rkey: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class End:
    """A queue pair with its completion queue, and `size` bytes of memory of which the peer may do everything."""

    def __init__(self, context: Context, size: int = 1 << 16, *, gid_index: int = 0) -> None:
        self.context = context
        self.gid_index = gid_index
        self.gid = context.gids()[gid_index].gid
        self.pd = ProtectionDomain(context)
        self.channel = CompletionChannel(context)
        self.cq = CompletionQueue(context, 256, self.channel)
        self.qp = QueuePair(self.pd, self.cq, max_send_wr=64, max_recv_wr=64)
        self.memory = bytearray(size)
        rights = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
        self.region = self.pd.register(self.memory, rights)
        self.psn = secrets.randbits(24)
        self.peer: Card
        self.posted = 0

    def card(self) -> Card:
        lid = self.context.port(1).lid
        return Card(self.qp.qp_num, self.psn, lid, str(self.gid), self.region.address, self.region.rkey)

    def connect(self, peer: Card, *, timeout: int = 14, retry_count: int = 7, mtu: int = 1024) -> None:
        self.peer = peer
        path = Path(1, peer.lid, ipaddress.IPv6Address(peer.gid), self.gid_index)
        self.qp.to_init(1)
        self.qp.to_rtr(path, qp_num=peer.qp_num, psn=peer.psn, mtu=mtu, responder_depth=16)
        self.qp.to_rts(
            psn=self.psn, timeout=timeout, retry_count=retry_count, rnr_retry=7, initiator_depth=16
        )

    # --- operations on the peer's memory: posted, and done ---------------------------------------------------

    def post(self, opcode: WrOpcode, length: int, *, local: int = 0, remote: int = 0) -> None:
        self.posted += 1
        rc = self.qp.post_send(
            self.posted,
            opcode,
            SIGNALED,
            self.region.address + local,
            length,
            self.region.lkey,
            self.peer.address + remote,
            self.peer.rkey,
        )
        assert rc == 0, f"post_send: {rc}"

    def write(self, data: bytes, remote: int = 0, *, local: int = 0) -> None:
        """Returns when the data is in the peer's memory."""
        self.memory[local : local + len(data)] = data
        self.post(WrOpcode.RDMA_WRITE, len(data), local=local, remote=remote)
        self.complete()

    def read(self, length: int, remote: int = 0, *, local: int = 0) -> bytes:
        self.post(WrOpcode.RDMA_READ, length, local=local, remote=remote)
        self.complete()
        return bytes(self.memory[local : local + length])

    def fetch_add(self, value: int, remote: int = 0, *, local: int = 0) -> int:
        self.posted += 1
        rc = self.qp.post_atomic(
            self.posted,
            WrOpcode.ATOMIC_FETCH_AND_ADD,
            self.region.address + local,
            self.region.lkey,
            self.peer.address + remote,
            self.peer.rkey,
            value,
        )
        assert rc == 0, f"post_atomic: {rc}"
        self.complete()
        return int.from_bytes(self.memory[local : local + 8], "little")

    def complete(self, count: int = 1) -> None:
        """Waits for completions, all of them good."""
        for completion in self.completions(count):
            assert completion.status == WcStatus.SUCCESS, WcStatus(completion.status)

    def completions(
        self, count: int, wait: Callable[[], list[WorkCompletion]] | None = None
    ) -> list[WorkCompletion]:
        found: list[WorkCompletion] = []
        until = time.monotonic() + DEADLINE
        while len(found) < count:
            assert time.monotonic() < until, f"{len(found)} of {count} completions"
            found += wait() if wait else self.polled()
        return found

    # --- the two ways to wait for completions ----------------------------------------------------------------

    def polled(self) -> list[WorkCompletion]:
        """Polls in C, for a tenth of a second at most."""
        return self.cq.poll(100_000_000)

    def slept(self) -> list[WorkCompletion]:
        """Arms, looks once more, and sleeps on the channel."""
        self.cq.arm()
        found = self.cq.poll()
        if found:
            return found
        select.select([self.channel.fd], [], [], DEADLINE)
        self.channel.get_events()
        return self.cq.poll()
