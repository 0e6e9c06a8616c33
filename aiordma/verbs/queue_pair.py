"""Queue pairs (RC), shared receive queues, and the queue-pair state machine as a table."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .._native import ffi, lib
from ..errors import DeviceError, MisuseError, errno_text
from .completion import CompletionQueue
from .device import Context
from .enums import MTU_CODE, Access, QpState, SendFlags, WrOpcode
from .memory import MemoryRegion, MemoryWindow, ProtectionDomain
from .owner import Owner
from .provider import check

#: Packed work requests: the layouts of struct glue_send_wr and struct glue_recv_wr.
SEND_WR_STRUCT = struct.Struct("=QQQQQIIIIII")
RECV_WR_STRUCT = struct.Struct("=QQII")
assert SEND_WR_STRUCT.size == ffi.sizeof("struct glue_send_wr")
assert RECV_WR_STRUCT.size == ffi.sizeof("struct glue_recv_wr")

# From state to state, the attributes that a reliable connection must give (ibv_modify_qp(3), table for RC).
_INIT = lib.IBV_QP_STATE | lib.IBV_QP_PKEY_INDEX | lib.IBV_QP_PORT | lib.IBV_QP_ACCESS_FLAGS
_RTR = (
    lib.IBV_QP_STATE
    | lib.IBV_QP_AV
    | lib.IBV_QP_PATH_MTU
    | lib.IBV_QP_DEST_QPN
    | lib.IBV_QP_RQ_PSN
    | lib.IBV_QP_MAX_DEST_RD_ATOMIC
    | lib.IBV_QP_MIN_RNR_TIMER
)
_RTS = (
    lib.IBV_QP_STATE
    | lib.IBV_QP_SQ_PSN
    | lib.IBV_QP_TIMEOUT
    | lib.IBV_QP_RETRY_CNT
    | lib.IBV_QP_RNR_RETRY
    | lib.IBV_QP_MAX_QP_RD_ATOMIC
)
TRANSITIONS: dict[tuple[QpState, QpState], int] = {
    (QpState.RESET, QpState.INIT): _INIT,
    (QpState.INIT, QpState.RTR): _RTR,
    (QpState.RTR, QpState.RTS): _RTS,
    **{(state, QpState.ERR): lib.IBV_QP_STATE for state in QpState if state is not QpState.RESET},
    **{(state, QpState.RESET): lib.IBV_QP_STATE for state in QpState},
}


@dataclass(frozen=True, slots=True)
class Path:
    """How packets reach the remote queue pair. ``gid`` None means LID addressing (InfiniBand only)."""

    port: int
    lid: int
    gid: ipaddress.IPv6Address | None
    gid_index: int
    service_level: int = 0
    traffic_class: int = 0
    hop_limit: int = 64


class SharedReceiveQueue(Owner):
    """``struct ibv_srq``: one receive queue for many queue pairs."""

    __slots__ = ("_handle", "max_wr", "pd", "pointer")

    def __init__(self, pd: ProtectionDomain, max_wr: int, max_sge: int = 1) -> None:
        super().__init__(pd)
        self.pd = pd
        handle = ffi.new("struct ibv_srq **")
        granted = ffi.new("uint32_t *")
        check(
            lib.glue_create_srq(pd.context.provider.table, pd._handle, max_wr, max_sge, handle, granted),
            "ibv_create_srq",
            f"{max_wr} receives",
        )
        self._handle = handle[0]
        self.pointer = int(ffi.cast("uintptr_t", self._handle))
        self.max_wr: int = granted[0]
        self._opened()

    def arm(self, limit: int) -> None:
        """One SRQ_LIMIT_REACHED event when fewer than ``limit`` receives are left (ibv_modify_srq(3))."""
        check(lib.glue_arm_srq(self.pd.context.provider.table, self._handle, limit), "ibv_modify_srq")

    def newest_first(self) -> None:
        """As :meth:`QueuePair.newest_first`."""
        _newest_first(self.pd.context, ffi.NULL, self._handle)

    def post_recv(self, requests: Iterable[tuple[int, int, int, int]]) -> None:
        """Posts receives given as ``(wr_id, address, length, lkey)``; all or an error that says how many."""
        self.check_open()
        _post_recv(lib.glue_post_srq_recv_many, self._handle, requests, "ibv_post_srq_recv")

    def _destroy(self) -> None:
        check(lib.glue_destroy_srq(self.pd.context.provider.table, self._handle), "ibv_destroy_srq")


class QueuePair(Owner):
    """``struct ibv_qp`` of the reliable connected service.

    A new one is in RESET. :meth:`to_init`, :meth:`to_rtr`, :meth:`to_rts`, :meth:`to_error` follow
    ``TRANSITIONS``; ``state`` is what this object last set, :meth:`query_state` asks the device.
    """

    __slots__ = (
        "_handle",
        "context",
        "max_inline",
        "max_recv_wr",
        "max_send_wr",
        "pd",
        "pointer",
        "qp_num",
        "recv_cq",
        "send_cq",
        "srq",
        "state",
    )

    def __init__(
        self,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue | None = None,
        *,
        max_send_wr: int,
        max_recv_wr: int,
        max_inline: int = 0,
        srq: SharedReceiveQueue | None = None,
    ) -> None:
        recv_cq = recv_cq or send_cq
        super().__init__(pd, send_cq, recv_cq, *([srq] if srq else []))
        self.pd = pd
        self.context: Context = pd.context
        self.send_cq = send_cq
        self.recv_cq = recv_cq
        self.srq = srq
        attr = ffi.new("struct ibv_qp_init_attr *")
        attr.send_cq = send_cq._handle
        attr.recv_cq = recv_cq._handle
        attr.srq = srq._handle if srq else ffi.NULL
        attr.qp_type = lib.IBV_QPT_RC
        attr.cap.max_send_wr = max_send_wr
        attr.cap.max_recv_wr = max_recv_wr
        attr.cap.max_send_sge = 1
        attr.cap.max_recv_sge = 1
        self._handle = self._create(attr, max_inline)
        self.pointer = int(ffi.cast("uintptr_t", self._handle))
        # The device rounds up; what it granted stands in cap afterwards (ibv_create_qp(3)).
        self.max_inline: int = attr.cap.max_inline_data
        self.max_send_wr: int = attr.cap.max_send_wr
        self.max_recv_wr: int = attr.cap.max_recv_wr
        self.qp_num: int = self._handle.qp_num
        self.state = QpState.RESET
        self._opened()

    def _create(self, attr: Any, max_inline: int) -> Any:
        """Creates with less and less inline data: devices refuse what they cannot do instead of lowering it."""
        handle = ffi.new("struct ibv_qp **")
        while True:
            attr.cap.max_inline_data = max_inline
            rc = lib.glue_create_qp(self.context.provider.table, self.pd._handle, attr, handle)
            if rc == 0:
                return handle[0]
            if max_inline == 0:
                check(
                    rc,
                    "ibv_create_qp",
                    f"{attr.cap.max_send_wr} send and {attr.cap.max_recv_wr} receive work requests",
                )
            max_inline //= 2

    def newest_first(self) -> None:
        """From now on a message takes the receive that was posted last, if the device can do that (usroce); else
        the oldest, as verbs have it. For whom all receives are alike: the last one is in the cache."""
        _newest_first(self.context, self._handle, ffi.NULL)

    # --- states --------------------------------------------------------------------------------------

    def _modify(self, target: QpState, attr: Any) -> None:
        self.check_open()
        mask = TRANSITIONS.get((self.state, target))
        if mask is None:
            raise MisuseError(f"a queue pair cannot go from {self.state.name} to {target.name}")
        attr.qp_state = int(target)
        check(
            lib.glue_modify_qp(self.context.provider.table, self._handle, attr, mask),
            f"ibv_modify_qp({self.state.name} to {target.name})",
            "no route to the peer's GID?" if target is QpState.RTR else "",
        )
        self.state = target

    def to_init(
        self, port: int, access: Access = Access.REMOTE_READ | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC
    ) -> None:
        """RESET to INIT: receives may be posted from now on. ``access`` is what remote operations the queue
        pair lets in at all; which memory they reach is up to the regions and windows."""
        attr = ffi.new("struct ibv_qp_attr *")
        attr.pkey_index = 0
        attr.port_num = port
        attr.qp_access_flags = int(access)
        self._modify(QpState.INIT, attr)

    def to_rtr(
        self,
        path: Path,
        *,
        qp_num: int,
        psn: int,
        mtu: int,
        responder_depth: int,
        min_rnr_timer: int = 12,
    ) -> None:
        """INIT to RTR (ready to receive): the peer's queue pair, its first PSN, the path MTU in bytes, and how
        many of its reads and atomics are served at a time. ``min_rnr_timer`` 12 is 0.64 ms (0 would be 655)."""
        attr = ffi.new("struct ibv_qp_attr *")
        attr.path_mtu = MTU_CODE[mtu]
        attr.dest_qp_num = qp_num
        attr.rq_psn = psn
        attr.max_dest_rd_atomic = responder_depth
        attr.min_rnr_timer = min_rnr_timer
        address = attr.ah_attr
        address.port_num = path.port
        address.dlid = path.lid
        address.sl = path.service_level
        if path.gid is not None:
            address.is_global = 1
            address.grh.dgid.raw = path.gid.packed
            address.grh.sgid_index = path.gid_index
            address.grh.hop_limit = path.hop_limit
            address.grh.traffic_class = path.traffic_class
        self._modify(QpState.RTR, attr)

    def to_rts(
        self, *, psn: int, timeout: int, retry_count: int, rnr_retry: int, initiator_depth: int
    ) -> None:
        """RTR to RTS (ready to send): own first PSN, acknowledgement timeout (4.096 us * 2**timeout), retries,
        and how many own reads and atomics may be in flight."""
        attr = ffi.new("struct ibv_qp_attr *")
        attr.sq_psn = psn
        attr.timeout = timeout
        attr.retry_cnt = retry_count
        attr.rnr_retry = rnr_retry
        attr.max_rd_atomic = initiator_depth
        self._modify(QpState.RTS, attr)

    def to_error(self) -> None:
        """To ERR: every posted work request completes with WR_FLUSH_ERR. Nothing to do in RESET and ERR."""
        if self.state not in (QpState.RESET, QpState.ERR):
            self._modify(QpState.ERR, ffi.new("struct ibv_qp_attr *"))

    def query_state(self) -> QpState:
        """The state the device reports (it goes to ERR by itself on a fatal completion)."""
        self.check_open()
        attr = ffi.new("struct ibv_qp_attr *")
        init = ffi.new("struct ibv_qp_init_attr *")
        check(
            lib.glue_query_qp(self.context.provider.table, self._handle, attr, lib.IBV_QP_STATE, init),
            "ibv_query_qp",
        )
        return QpState(attr.qp_state)

    # --- posting: the caller keeps the memory until the completion -----------------------------------

    def post_send(
        self,
        wr_id: int,
        opcode: int,
        flags: int,
        address: int,
        length: int,
        lkey: int,
        remote_address: int = 0,
        rkey: int = 0,
        imm: int = 0,
    ) -> int:
        """Posts one send, write or read from scalars. Returns 0 or an errno (ENOMEM: queue full): the hot path
        does not pay for an exception."""
        rc: int = lib.glue_post_send(
            self._handle, wr_id, opcode, flags, address, length, lkey, remote_address, rkey, imm
        )
        return rc

    def post_atomic(
        self,
        wr_id: int,
        opcode: WrOpcode,
        address: int,
        lkey: int,
        remote_address: int,
        rkey: int,
        compare_add: int,
        swap: int = 0,
        flags: int = SendFlags.SIGNALED,
    ) -> int:
        """Posts one atomic; the old 8 bytes land at ``address`` in host order. Returns 0 or an errno."""
        rc: int = lib.glue_post_atomic(
            self._handle, wr_id, opcode, flags, address, lkey, remote_address, rkey, compare_add, swap
        )
        return rc

    def post_send_many(self, packed: bytes | bytearray | memoryview, count: int) -> tuple[int, int]:
        """Posts ``count`` requests packed with ``SEND_WR_STRUCT``, in order, one doorbell for each run of up to
        64. Returns (how many the device took, errno or 0)."""
        posted = ffi.new("int *")
        array = ffi.from_buffer("struct glue_send_wr[]", packed)
        rc = lib.glue_post_send_many(self._handle, array, count, posted)
        return posted[0], rc

    def post_bind(
        self,
        wr_id: int,
        window: MemoryWindow,
        region: MemoryRegion,
        address: int,
        length: int,
        access: Access,
    ) -> int:
        """Posts the binding of a free type-2 window over part of ``region``; returns the window's new key,
        which is valid from the completion on. Raises :class:`DeviceError`."""
        window.check_open()
        region.check_open()
        new_rkey = window.next_rkey()
        rc = lib.glue_post_bind_mw(
            self._handle, wr_id, window._handle, new_rkey, region._handle, address, length, int(access)
        )
        check(rc, "ibv_post_send(BIND_MW)")
        window.rebound(new_rkey)
        return new_rkey

    def post_invalidate(self, wr_id: int, rkey: int) -> None:
        """Posts the revocation of a bound window's key. Raises :class:`DeviceError`."""
        check(lib.glue_post_local_inv(self._handle, wr_id, rkey), "ibv_post_send(LOCAL_INV)")

    def post_recv(self, requests: Iterable[tuple[int, int, int, int]]) -> None:
        """Posts receives given as ``(wr_id, address, length, lkey)``; all or an error that says how many."""
        self.check_open()
        _post_recv(lib.glue_post_recv_many, self._handle, requests, "ibv_post_recv")

    def post_recv_one(self, wr_id: int, address: int, length: int, lkey: int) -> None:
        """Posts one receive from scalars (the hot path). Raises :class:`DeviceError`."""
        rc = lib.glue_post_recv(self._handle, wr_id, address, length, lkey)
        if rc:
            check(rc, "ibv_post_recv")

    def _destroy(self) -> None:
        check(lib.glue_destroy_qp(self.context.provider.table, self._handle), "ibv_destroy_qp")

    def __repr__(self) -> str:
        return f"<QueuePair {self.qp_num:#x} {'closed' if self.closed else self.state.name}>"


def _newest_first(context: Context, qp: Any, srq: Any) -> None:
    check(lib.glue_newest_first(context.provider.table, qp, srq), "usroce_newest_first")


def _post_recv(post: Any, handle: Any, requests: Iterable[tuple[int, int, int, int]], call: str) -> None:
    packed = b"".join([RECV_WR_STRUCT.pack(*request) for request in requests])
    count = len(packed) // RECV_WR_STRUCT.size
    posted = ffi.new("int *")
    rc = post(handle, ffi.from_buffer("struct glue_recv_wr[]", packed), count, posted)
    if rc:
        raise DeviceError(f"{call} took {posted[0]} of {count}: {errno_text(rc)}", errno=rc, call=call)
