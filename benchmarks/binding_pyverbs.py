"""naive.Binding over pyverbs, rdma-core's own binding (Debian: python3-pyverbs, for the system's Python)."""

from __future__ import annotations

import os
import secrets
from typing import Any

from pyverbs import enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from .naive import RECEIVES, RECV_ID

_PORT = 1
_INLINE = 220


class PyverbsBinding:
    """See :class:`naive.Binding`. Work requests are made once and posted again, as a careful user would."""

    def __init__(self, device: str, gid_index: int, size: int) -> None:
        self._context = Context(name=device)
        self._gid_index = gid_index
        self._size = size
        self._pd = PD(self._context)
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_READ | e.IBV_ACCESS_REMOTE_WRITE
        self._mr = MR(self._pd, 3 * size, access)  # sent, received, the peer's
        before = _event_files()
        self._channel = CompChannel(self._context)
        self.fd = (_event_files() - before).pop()  # pyverbs does not tell it
        self._cq = CQ(self._context, 4 * RECEIVES, None, self._channel, 0)
        self._qp = self._make_qp(access)
        self._port = self._context.query_port(_PORT)
        self._sge = SGE(self._mr.buf, size, self._mr.lkey)
        self._recv = RecvWR(wr_id=RECV_ID, sg=[SGE(self._mr.buf + size, size, self._mr.lkey)], num_sge=1)
        self.local: dict[str, Any] = {
            "qpn": self._qp.qp_num,
            "psn": secrets.randbits(24),
            "lid": self._port.lid,
            "gid": str(self._context.query_gid(_PORT, gid_index)),
            "address": self._mr.buf + 2 * size,
            "rkey": self._mr.rkey,
        }

    def _make_qp(self, access: int) -> Any:
        cap = QPCap(max_send_wr=RECEIVES, max_recv_wr=RECEIVES, max_inline_data=_INLINE)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._cq, rcq=self._cq, cap=cap)
        attr = QPAttr(port_num=_PORT)
        attr.qp_access_flags = access
        return QP(self._pd, init, attr)

    def connect(self, remote: dict[str, Any]) -> None:
        attr = QPAttr(port_num=_PORT)
        attr.path_mtu = self._port.active_mtu
        attr.dest_qp_num, attr.rq_psn, attr.sq_psn = remote["qpn"], remote["psn"], self.local["psn"]
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 1
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 16, 6, 6
        route = GlobalRoute(dgid=GID(remote["gid"]), sgid_index=self._gid_index)
        attr.ah_attr = AHAttr(dlid=remote["lid"], port_num=_PORT, is_global=1, gr=route)
        self._qp.to_rts(attr)
        for _ in range(RECEIVES):
            self.post_recv()
        inline = e.IBV_SEND_SIGNALED | (e.IBV_SEND_INLINE if self._size <= _INLINE else 0)
        self._write = self._request(e.IBV_WR_RDMA_WRITE, inline)
        self._read = self._request(e.IBV_WR_RDMA_READ, e.IBV_SEND_SIGNALED)
        self._send = self._request(e.IBV_WR_SEND, inline)
        for request in (self._write, self._read):
            request.set_wr_rdma(remote["rkey"], remote["address"])

    def _request(self, opcode: int, flags: int) -> Any:
        return SendWR(wr_id=1, sg=[self._sge], num_sge=1, opcode=opcode, send_flags=flags)

    def post_write(self, wr_id: int) -> None:
        self._write.wr_id = wr_id
        self._qp.post_send(self._write)

    def post_read(self, wr_id: int) -> None:
        self._read.wr_id = wr_id
        self._qp.post_send(self._read)

    def post_send(self, wr_id: int) -> None:
        self._send.wr_id = wr_id
        self._qp.post_send(self._send)

    def post_recv(self) -> None:
        self._qp.post_recv(self._recv)

    def arm(self) -> None:
        self._cq.req_notify()

    def get_events(self) -> None:
        self._channel.get_cq_event(self._cq)
        self._cq.ack_events(1)

    def poll(self) -> list[tuple[int, int]]:
        count, completions = self._cq.poll(8)
        return [(c.wr_id, c.status) for c in completions] if count else []

    def close(self) -> None:
        for owner in (self._qp, self._cq, self._channel, self._mr, self._pd, self._context):
            owner.close()


def _event_files() -> set[int]:
    """The descriptors of this process that verbs events come through."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
        except OSError:
            continue  # the descriptor of the listing itself
    return found
