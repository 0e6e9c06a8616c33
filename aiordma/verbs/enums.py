"""The names of verbs: enumerations whose values come from the compiled headers, so they cannot drift."""

from __future__ import annotations

import enum

from .._native import lib


class QpState(enum.IntEnum):
    """``enum ibv_qp_state``."""

    RESET = lib.IBV_QPS_RESET
    INIT = lib.IBV_QPS_INIT
    RTR = lib.IBV_QPS_RTR
    RTS = lib.IBV_QPS_RTS
    SQD = lib.IBV_QPS_SQD
    SQE = lib.IBV_QPS_SQE
    ERR = lib.IBV_QPS_ERR


class Access(enum.IntFlag):
    """``enum ibv_access_flags``: what a memory region or window allows."""

    NONE = 0
    LOCAL_WRITE = lib.IBV_ACCESS_LOCAL_WRITE
    REMOTE_WRITE = lib.IBV_ACCESS_REMOTE_WRITE
    REMOTE_READ = lib.IBV_ACCESS_REMOTE_READ
    REMOTE_ATOMIC = lib.IBV_ACCESS_REMOTE_ATOMIC
    MW_BIND = lib.IBV_ACCESS_MW_BIND


class WrOpcode(enum.IntEnum):
    """``enum ibv_wr_opcode``: what a work request does."""

    RDMA_WRITE = lib.IBV_WR_RDMA_WRITE
    RDMA_WRITE_WITH_IMM = lib.IBV_WR_RDMA_WRITE_WITH_IMM
    SEND = lib.IBV_WR_SEND
    SEND_WITH_IMM = lib.IBV_WR_SEND_WITH_IMM
    RDMA_READ = lib.IBV_WR_RDMA_READ
    ATOMIC_CMP_AND_SWP = lib.IBV_WR_ATOMIC_CMP_AND_SWP
    ATOMIC_FETCH_AND_ADD = lib.IBV_WR_ATOMIC_FETCH_AND_ADD


class SendFlags(enum.IntFlag):
    """``enum ibv_send_flags``."""

    NONE = 0
    FENCE = lib.IBV_SEND_FENCE
    SIGNALED = lib.IBV_SEND_SIGNALED
    SOLICITED = lib.IBV_SEND_SOLICITED
    INLINE = lib.IBV_SEND_INLINE


class WcOpcode(enum.IntEnum):
    """``enum ibv_wc_opcode``: what completed."""

    SEND = lib.IBV_WC_SEND
    RDMA_WRITE = lib.IBV_WC_RDMA_WRITE
    RDMA_READ = lib.IBV_WC_RDMA_READ
    COMP_SWAP = lib.IBV_WC_COMP_SWAP
    FETCH_ADD = lib.IBV_WC_FETCH_ADD
    BIND_MW = lib.IBV_WC_BIND_MW
    LOCAL_INV = lib.IBV_WC_LOCAL_INV
    RECV = lib.IBV_WC_RECV
    RECV_RDMA_WITH_IMM = lib.IBV_WC_RECV_RDMA_WITH_IMM


class PortState(enum.IntEnum):
    """``enum ibv_port_state``."""

    NOP = lib.IBV_PORT_NOP
    DOWN = lib.IBV_PORT_DOWN
    INIT = lib.IBV_PORT_INIT
    ARMED = lib.IBV_PORT_ARMED
    ACTIVE = lib.IBV_PORT_ACTIVE
    ACTIVE_DEFER = lib.IBV_PORT_ACTIVE_DEFER


class LinkLayer(enum.IntEnum):
    """What the port speaks below the transport."""

    UNSPECIFIED = lib.IBV_LINK_LAYER_UNSPECIFIED
    INFINIBAND = lib.IBV_LINK_LAYER_INFINIBAND
    ETHERNET = lib.IBV_LINK_LAYER_ETHERNET


class GidType(enum.IntEnum):
    """``enum ibv_gid_type``."""

    IB = lib.IBV_GID_TYPE_IB
    ROCE_V1 = lib.IBV_GID_TYPE_ROCE_V1
    ROCE_V2 = lib.IBV_GID_TYPE_ROCE_V2


class Transport(enum.IntEnum):
    """``enum ibv_transport_type``."""

    UNKNOWN = lib.IBV_TRANSPORT_UNKNOWN
    IB = lib.IBV_TRANSPORT_IB
    IWARP = lib.IBV_TRANSPORT_IWARP
    USNIC = lib.IBV_TRANSPORT_USNIC
    USNIC_UDP = lib.IBV_TRANSPORT_USNIC_UDP
    UNSPECIFIED = lib.IBV_TRANSPORT_UNSPECIFIED


class EventType(enum.IntEnum):
    """``enum ibv_event_type``: asynchronous events, ibv_get_async_event(3)."""

    CQ_ERR = lib.IBV_EVENT_CQ_ERR
    QP_FATAL = lib.IBV_EVENT_QP_FATAL
    QP_REQ_ERR = lib.IBV_EVENT_QP_REQ_ERR
    QP_ACCESS_ERR = lib.IBV_EVENT_QP_ACCESS_ERR
    COMM_EST = lib.IBV_EVENT_COMM_EST
    SQ_DRAINED = lib.IBV_EVENT_SQ_DRAINED
    PATH_MIG = lib.IBV_EVENT_PATH_MIG
    PATH_MIG_ERR = lib.IBV_EVENT_PATH_MIG_ERR
    DEVICE_FATAL = lib.IBV_EVENT_DEVICE_FATAL
    PORT_ACTIVE = lib.IBV_EVENT_PORT_ACTIVE
    PORT_ERR = lib.IBV_EVENT_PORT_ERR
    LID_CHANGE = lib.IBV_EVENT_LID_CHANGE
    PKEY_CHANGE = lib.IBV_EVENT_PKEY_CHANGE
    SM_CHANGE = lib.IBV_EVENT_SM_CHANGE
    SRQ_ERR = lib.IBV_EVENT_SRQ_ERR
    SRQ_LIMIT_REACHED = lib.IBV_EVENT_SRQ_LIMIT_REACHED
    QP_LAST_WQE_REACHED = lib.IBV_EVENT_QP_LAST_WQE_REACHED
    CLIENT_REREGISTER = lib.IBV_EVENT_CLIENT_REREGISTER
    GID_CHANGE = lib.IBV_EVENT_GID_CHANGE


#: ``enum ibv_mtu`` counts 1 for 256 bytes up to 5 for 4096.
MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
MTU_CODE = {nbytes: code for code, nbytes in MTU_BYTES.items()}
