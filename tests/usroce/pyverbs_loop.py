"""Run by test_programs.py in the system's Python: two queue pairs of one process, through rdma-core's pyverbs.

Prints "right" when every operation did what it should.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pyverbs.enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context, get_device_list
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPEx, QPInitAttr, QPInitAttrEx
from pyverbs.wr import SGE, RecvWR, SendWR

ACCESS = (
    e.IBV_ACCESS_LOCAL_WRITE
    | e.IBV_ACCESS_REMOTE_READ
    | e.IBV_ACCESS_REMOTE_WRITE
    | e.IBV_ACCESS_REMOTE_ATOMIC
)
SIZE = 8192


def main() -> None:
    names = [device.name.decode() for device in get_device_list()]
    assert names == ["usroce0"], names
    with Context(name="usroce0") as context:
        port = context.query_port(1)
        assert port.state == e.IBV_PORT_ACTIVE
        pd = PD(context)
        channel = CompChannel(context)
        cq = CQ(context, 100, None, channel, 0)
        a, b = (make_queue_pair(pd, cq) for _ in range(2))
        connect(context, port.lid, a, b)
        connect(context, port.lid, b, a)
        source, target = MR(pd, SIZE, ACCESS), MR(pd, SIZE, ACCESS)
        for check in (write, read, atomics, send):
            check(a, b, cq, source, target)
        events(a, b, cq, channel, source, target)
        granted(pd, cq, target)
        refused(context, pd, cq)
    print("right")


def make_queue_pair(pd: PD, cq: CQ) -> QP:
    cap = QPCap(max_send_wr=16, max_recv_wr=16, max_send_sge=2, max_recv_sge=2)
    return QP(pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=cap))


def connect(context: Context, lid: int, qp: QP, peer: QP) -> None:
    attributes = QPAttr(port_num=1)
    attributes.qp_access_flags = ACCESS & ~e.IBV_ACCESS_LOCAL_WRITE
    attributes.dest_qp_num = peer.qp_num
    attributes.path_mtu = e.IBV_MTU_1024
    attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 4
    attributes.min_rnr_timer = 12
    attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 14, 7, 7
    route = GlobalRoute(dgid=context.query_gid(1, 0), sgid_index=0)
    attributes.ah_attr = AHAttr(port_num=1, is_global=1, gr=route, dlid=lid)
    qp.to_rts(attributes)


def complete(cq: CQ, count: int = 1) -> list[int]:
    """The opcodes of so many completions, all of which must be good."""
    found: list[int] = []
    while len(found) < count:
        _, completions = cq.poll(1)
        for completion in completions:
            assert completion.status == e.IBV_WC_SUCCESS, completion
            found.append(completion.opcode)
    return found


def request(opcode: int, source: MR, length: int, target: MR | None = None, offset: int = 0) -> SendWR:
    result = SendWR(
        opcode=opcode, num_sge=1, sg=[SGE(source.buf, length, source.lkey)], send_flags=e.IBV_SEND_SIGNALED
    )
    if target is not None:
        result.set_wr_rdma(target.rkey, target.buf + offset)
    return result


def write(a: QP, b: QP, cq: CQ, source: MR, target: MR) -> None:
    source.write("w" * SIZE, SIZE)
    a.post_send(request(e.IBV_WR_RDMA_WRITE, source, SIZE, target))
    assert complete(cq) == [e.IBV_WC_RDMA_WRITE]
    assert target.read(SIZE, 0) == b"w" * SIZE


def read(a: QP, b: QP, cq: CQ, source: MR, target: MR) -> None:
    target.write("r" * SIZE, SIZE)
    a.post_send(request(e.IBV_WR_RDMA_READ, source, SIZE, target))
    assert complete(cq) == [e.IBV_WC_RDMA_READ]
    assert source.read(SIZE, 0) == b"r" * SIZE


def atomics(a: QP, b: QP, cq: CQ, source: MR, target: MR) -> None:
    target.write("\0" * 8, 8)
    for add in range(1, 4):
        work = request(e.IBV_WR_ATOMIC_FETCH_AND_ADD, source, 8)
        work.set_wr_atomic(target.rkey, target.buf, add, 0)
        a.post_send(work)
        assert complete(cq) == [e.IBV_WC_FETCH_ADD]
    work = request(e.IBV_WR_ATOMIC_CMP_AND_SWP, source, 8)
    work.set_wr_atomic(target.rkey, target.buf, 6, 1000)
    a.post_send(work)
    assert complete(cq) == [e.IBV_WC_COMP_SWAP]
    assert int.from_bytes(source.read(8, 0), "little") == 6
    assert int.from_bytes(target.read(8, 0), "little") == 1000


def send(a: QP, b: QP, cq: CQ, source: MR, target: MR) -> None:
    """Into two pieces, as the receive says."""
    pieces = [SGE(target.buf, 10, target.lkey), SGE(target.buf + 4096, 4000, target.lkey)]
    b.post_recv(RecvWR(num_sge=2, sg=pieces))
    source.write("s" * 3000, 3000)
    a.post_send(request(e.IBV_WR_SEND, source, 3000))
    assert sorted(complete(cq, 2)) == sorted([e.IBV_WC_SEND, e.IBV_WC_RECV])
    assert target.read(10, 0) == b"s" * 10
    assert target.read(2990, 4096) == b"s" * 2990


def events(a: QP, b: QP, cq: CQ, channel: CompChannel, source: MR, target: MR) -> None:
    cq.req_notify()
    a.post_send(request(e.IBV_WR_RDMA_WRITE, source, 8, target))
    channel.get_cq_event(cq)
    cq.ack_events(1)
    assert complete(cq) == [e.IBV_WC_RDMA_WRITE]


def granted(pd: PD, cq: CQ, target: MR) -> None:
    """As many receives as the queue pair says it has room for, and no more."""
    cap = QPCap(max_send_wr=5, max_recv_wr=5, max_send_sge=1, max_recv_sge=1)
    qp = QP(pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=cap))
    qp.to_init(QPAttr(port_num=1))
    room = qp.query(e.IBV_QP_CAP)[0].cap.max_recv_wr
    assert room >= 5
    receive = RecvWR(num_sge=1, sg=[SGE(target.buf, 8, target.lkey)])
    for _ in range(room):
        qp.post_recv(receive)
    assert refusal(qp.post_recv, receive) == errno.ENOMEM
    qp.close()


def refused(context: Context, pd: PD, cq: CQ) -> None:
    """What the device cannot send is said when the queue pair is made."""
    cap = QPCap(max_send_wr=5, max_recv_wr=5)
    attributes = QPInitAttrEx(
        qp_type=e.IBV_QPT_RC,
        scq=cq,
        rcq=cq,
        cap=cap,
        pd=pd,
        comp_mask=e.IBV_QP_INIT_ATTR_PD | e.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        send_ops_flags=e.IBV_QP_EX_WITH_TSO,
    )
    assert refusal(QPEx, context, attributes) == errno.EOPNOTSUPP


def refusal(call: Callable[..., object], *arguments: object) -> int:
    """The errno that a call fails with."""
    try:
        call(*arguments)
    except PyverbsRDMAError as error:
        return int(error.error_code)
    raise AssertionError("it was not refused")


if __name__ == "__main__":
    main()
