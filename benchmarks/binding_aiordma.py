"""naive.Binding over aiordma.verbs: the plain owners, nothing of the framework above them."""

from __future__ import annotations

import ipaddress
import secrets
from typing import Any

from aiordma.verbs import (
    Access,
    CompletionChannel,
    CompletionQueue,
    Path,
    ProtectionDomain,
    QueuePair,
    SendFlags,
    WrOpcode,
    open_device,
)

from .naive import RECEIVES, RECV_ID

_PORT = 1


class AiordmaBinding:
    """See :class:`naive.Binding`."""

    def __init__(self, device: str, gid_index: int, size: int) -> None:
        context = self._context = open_device(device)
        self._gid_index = gid_index
        self._size = size
        pd = ProtectionDomain(context)
        self._buffer = bytearray(3 * size)  # sent, received, the peer's
        self._region = pd.register(
            self._buffer, Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE
        )
        self._channel = CompletionChannel(context)
        self.fd = self._channel.fd
        self._cq = CompletionQueue(context, 4 * RECEIVES, self._channel)
        self._qp = QueuePair(pd, self._cq, max_send_wr=RECEIVES, max_recv_wr=RECEIVES, max_inline=220)
        self._qp.to_init(_PORT)
        inline = size <= self._qp.max_inline
        self._flags = int(SendFlags.SIGNALED | SendFlags.INLINE if inline else SendFlags.SIGNALED)
        gid = next(e.gid for e in context.gids() if (e.port, e.index) == (_PORT, gid_index))
        self.local: dict[str, Any] = {
            "qpn": self._qp.qp_num,
            "psn": secrets.randbits(24),
            "lid": context.port(_PORT).lid,
            "gid": str(gid),
            "address": self._region.address + 2 * size,
            "rkey": self._region.rkey,
        }

    def connect(self, remote: dict[str, Any]) -> None:
        self._remote, self._rkey = remote["address"], remote["rkey"]
        path = Path(_PORT, remote["lid"], ipaddress.IPv6Address(remote["gid"]), self._gid_index)
        mtu = self._context.port(_PORT).active_mtu
        self._qp.to_rtr(path, qp_num=remote["qpn"], psn=remote["psn"], mtu=mtu, responder_depth=1)
        for _ in range(RECEIVES):
            self.post_recv()
        self._qp.to_rts(psn=self.local["psn"], timeout=16, retry_count=6, rnr_retry=6, initiator_depth=1)

    def post_write(self, wr_id: int) -> None:
        self._post(wr_id, WrOpcode.RDMA_WRITE, self._flags)

    def post_read(self, wr_id: int) -> None:
        self._post(wr_id, WrOpcode.RDMA_READ, SendFlags.SIGNALED)

    def post_send(self, wr_id: int) -> None:
        self._post(wr_id, WrOpcode.SEND, self._flags)

    def _post(self, wr_id: int, opcode: int, flags: int) -> None:
        region = self._region
        rc = self._qp.post_send(
            wr_id, opcode, flags, region.address, self._size, region.lkey, self._remote, self._rkey
        )
        if rc:
            raise OSError(rc, "ibv_post_send")

    def post_recv(self) -> None:
        region = self._region
        self._qp.post_recv([(RECV_ID, region.address + self._size, self._size, region.lkey)])

    def arm(self) -> None:
        self._cq.arm()

    def get_events(self) -> None:
        self._channel.get_events()

    def poll(self) -> list[tuple[int, int]]:
        return [completion[:2] for completion in self._cq.poll()]

    def close(self) -> None:
        self._context.close()
