"""Every exception aiordma raises, and the text behind every work-completion status.

Nothing here imports anything of the package. Exceptions carry their data as attributes (peer, qp_num,
opcode, status, vendor_err, ...) so that a program can decide on them; the text is for the person who reads
the log. Misuse on this side, misbehaviour of the peer and loss of the connection are different classes.
Where a built-in kind fits (ConnectionError, TimeoutError, ValueError, PermissionError, MemoryError, OSError),
the class is that kind as well.
"""

from __future__ import annotations

import enum
import os
from typing import NamedTuple


class WcStatus(enum.IntEnum):
    """Work-completion status; the values are those of ``enum ibv_wc_status`` (infiniband/verbs.h)."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_EEC_OP_ERR = 3
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    LOC_RDD_VIOL_ERR = 14
    REM_INV_RD_REQ_ERR = 15
    REM_ABORT_ERR = 16
    INV_EECN_ERR = 17
    INV_EEC_STATE_ERR = 18
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21
    TM_ERR = 22
    TM_RNDV_INCOMPLETE = 23


class StatusText(NamedTuple):
    """What a completion status means, what usually causes it, and where to look."""

    meaning: str
    cause: str
    look_at: str


# Source of the meanings: InfiniBand Architecture Specification vol. 1, section 11.6.2 (completion return
# status), and ibv_poll_cq(3).
STATUS_TEXT: dict[WcStatus, StatusText] = {
    WcStatus.SUCCESS: StatusText("the operation completed", "-", "-"),
    WcStatus.LOC_LEN_ERR: StatusText(
        "a message did not fit the local buffer, or its length is not allowed",
        "the peer sent more than the receive buffer posted for it holds",
        "eager_size on both sides",
    ),
    WcStatus.LOC_QP_OP_ERR: StatusText(
        "the local queue pair could not execute the request",
        "a malformed work request, or no route to the peer any more (interface down or address removed)",
        "the link of the local port, then the work request",
    ),
    WcStatus.LOC_EEC_OP_ERR: StatusText(
        "a local end-to-end context could not execute the request",
        "reliable datagram service, which aiordma does not use",
        "the device's driver",
    ),
    WcStatus.LOC_PROT_ERR: StatusText(
        "the local memory of the request is not registered for what was asked",
        "the region was deregistered, or the buffer lies outside it or lacks local write",
        "the lease or the buffer given to the operation",
    ),
    WcStatus.WR_FLUSH_ERR: StatusText(
        "the request was thrown away because the queue pair left the working states",
        "an earlier request failed, or the connection was closed while this one waited",
        "the first error on the same queue pair: it names the reason",
    ),
    WcStatus.MW_BIND_ERR: StatusText(
        "a memory window could not be bound",
        "the region does not allow binding, or the window is in use",
        "the access words of share() and the device's memory-window support",
    ),
    WcStatus.BAD_RESP_ERR: StatusText(
        "the peer answered with a packet that was not expected",
        "a broken device or driver at the other end",
        "firmware and kernel versions on both sides",
    ),
    WcStatus.LOC_ACCESS_ERR: StatusText(
        "incoming data met local memory that does not allow it",
        "a receive buffer or shared region without local write access",
        "how the memory was registered",
    ),
    WcStatus.REM_INV_REQ_ERR: StatusText(
        "the peer's device refused the request as invalid",
        "an atomic at an address that is not a multiple of 8, a message too long for the peer's receive, "
        "or an operation the peer's queue pair does not allow",
        "alignment, length and the operations enabled on the peer",
    ),
    WcStatus.REM_ACCESS_ERR: StatusText(
        "the peer's device refused access to its memory",
        "outside the shared region, with a revoked or foreign key, or beyond the rights that share() gave",
        "the bounds and the access words of the region on the peer",
    ),
    WcStatus.REM_OP_ERR: StatusText(
        "the peer's device could not complete the operation",
        "the peer's memory or queue pair failed in the middle of it",
        "the peer's log",
    ),
    WcStatus.RETRY_EXC_ERR: StatusText(
        "the peer's device did not answer, however often the packet was sent",
        "the peer process died, the peer's queue pair is gone, or the link between is down or drops packets",
        "the peer process, the cabling, and for RoCE the network's MTU and flow control",
    ),
    WcStatus.RNR_RETRY_EXC_ERR: StatusText(
        "the peer had no receive posted",
        "credits were violated: aiordma never sends without a credit, so this is a bug or a foreign peer",
        "statistics() of both connections; please report it",
    ),
    WcStatus.LOC_RDD_VIOL_ERR: StatusText(
        "the reliable datagram domains of queue pair and context differ",
        "reliable datagram service, which aiordma does not use",
        "the device's driver",
    ),
    WcStatus.REM_INV_RD_REQ_ERR: StatusText(
        "the peer's device refused a reliable-datagram request",
        "reliable datagram service, which aiordma does not use",
        "the device's driver",
    ),
    WcStatus.REM_ABORT_ERR: StatusText(
        "the peer aborted the operation", "the peer's queue pair was reset in the middle", "the peer's log"
    ),
    WcStatus.INV_EECN_ERR: StatusText(
        "an invalid end-to-end context number",
        "reliable datagram service, which aiordma does not use",
        "the device's driver",
    ),
    WcStatus.INV_EEC_STATE_ERR: StatusText(
        "an end-to-end context in the wrong state",
        "reliable datagram service, which aiordma does not use",
        "the device's driver",
    ),
    WcStatus.FATAL_ERR: StatusText(
        "the device failed", "a fatal error of the device or its driver", "dmesg, and the device's firmware"
    ),
    WcStatus.RESP_TIMEOUT_ERR: StatusText(
        "the response did not come in time", "the peer is overloaded or gone", "the peer and the link"
    ),
    WcStatus.GENERAL_ERR: StatusText(
        "the device reports an error without saying which",
        "see vendor_err",
        "the device vendor's table of error syndromes",
    ),
    WcStatus.TM_ERR: StatusText("a tag-matching error", "tag matching, which aiordma does not use", "-"),
    WcStatus.TM_RNDV_INCOMPLETE: StatusText(
        "a tag-matching rendezvous did not finish", "tag matching, which aiordma does not use", "-"
    ),
}


class RdmaError(Exception):
    """The root of everything aiordma raises on purpose."""


# --- misuse on this side ------------------------------------------------------------------------------


class MisuseError(RdmaError, ValueError):
    """The call cannot be carried out as given: a wrong size, alignment, access word, state or value.

    Nothing was posted; the connection is as it was.
    """


class RemoteBoundsError(MisuseError, IndexError):
    """A remote range does not lie inside the shared region; found here, before anything was sent."""


class MessageTooLargeError(MisuseError):
    """A message is larger than the peer takes.

    Attributes: ``nbytes``, ``limit`` (both in bytes).
    """

    def __init__(self, nbytes: int, limit: int) -> None:
        self.nbytes = nbytes
        self.limit = limit
        super().__init__(
            f"message of {nbytes} bytes is larger than the {limit} bytes that the receiver takes; raise "
            "Config(max_message_size=...) there, or share a region and use write()/read(), which take any size"
        )


class WrongLoopError(MisuseError):
    """An object was used outside the event loop, thread or process (after a fork) that it belongs to."""


# --- devices and memory -------------------------------------------------------------------------------


class DeviceError(RdmaError, OSError):
    """No usable device, or a verbs call failed.

    ``errno`` is the call's error number (None when there was no call), ``call`` its name.
    """

    def __init__(self, message: str, *, errno: int | None = None, call: str | None = None) -> None:
        # OSError.__new__ fills errno only from a two-argument form; keep str() to the plain message.
        super().__init__(message)
        self.errno = errno
        self.call = call


class LibraryError(DeviceError):
    """A verbs library cannot be opened or lacks a function."""


class DeviceGoneError(DeviceError, ConnectionError):
    """The device was removed or failed while in use (``ibv_get_async_event(3)``, IBV_EVENT_DEVICE_FATAL)."""


class MemoryLimitError(RdmaError, MemoryError):
    """Registered memory ran into a limit: the pool's own, or ``RLIMIT_MEMLOCK``.

    Attributes: ``limit`` and ``needed`` in bytes (None where the limit is not known).
    """

    def __init__(self, message: str, *, limit: int | None = None, needed: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.needed = needed


# --- the connection -----------------------------------------------------------------------------------


class ConnectionLostError(RdmaError, ConnectionError):
    """The connection is gone: peer died, queue pair failed, or an error elsewhere took it down.

    Attributes: ``peer`` (its address as text), ``qp_num`` (local queue pair), ``opcode`` (the operation that
    failed, None for "the connection as a whole").
    """

    def __init__(
        self, message: str, *, peer: str | None = None, qp_num: int | None = None, opcode: str | None = None
    ) -> None:
        super().__init__(message)
        self.peer = peer
        self.qp_num = qp_num
        self.opcode = opcode


class ConnectionClosedError(ConnectionLostError):
    """The connection was closed in order, here or by the peer, and the operation came too late."""


class ProtocolError(ConnectionLostError):
    """The peer broke the protocol of an established connection: a bad frame, more credits than exist, ..."""


class CompletionError(ConnectionLostError):
    """A work request completed with an error status; on a reliable connection that ends the connection.

    Attributes besides those of :class:`ConnectionLostError`: ``status`` (:class:`WcStatus`), ``vendor_err``.
    """

    def __init__(
        self,
        status: WcStatus,
        *,
        peer: str | None = None,
        qp_num: int | None = None,
        opcode: str | None = None,
        vendor_err: int = 0,
        detail: str = "",
    ) -> None:
        text = STATUS_TEXT[status]
        what = f"{opcode or 'operation'} to {peer or 'peer'} failed with {status.name}: {text.meaning}"
        if detail:
            what += f" ({detail})"
        super().__init__(
            f"{what}; usual cause: {text.cause}; look at: {text.look_at} "
            f"[qp {qp_num if qp_num is None else format(qp_num, '#x')}, vendor_err {vendor_err:#x}]",
            peer=peer,
            qp_num=qp_num,
            opcode=opcode,
        )
        self.status = status
        self.vendor_err = vendor_err


class RemoteAccessError(CompletionError, PermissionError):
    """The peer's device refused access to its memory (bounds, key, rights)."""


class RemoteInvalidRequestError(CompletionError):
    """The peer's device refused the request as invalid (alignment, length, operation not enabled)."""


class LocalProtectionError(CompletionError):
    """The local memory of the operation is not registered for what was asked."""


class RetryExceededError(CompletionError, TimeoutError):
    """The peer's device stopped answering."""


class ReceiverNotReadyError(CompletionError):
    """The peer had no receive posted. The credit protocol makes this impossible; it is a bug when seen."""


class FlushedError(CompletionError):
    """The work request was thrown away because the queue pair had left the working states."""


_STATUS_CLASS: dict[WcStatus, type[CompletionError]] = {
    WcStatus.REM_ACCESS_ERR: RemoteAccessError,
    WcStatus.REM_INV_REQ_ERR: RemoteInvalidRequestError,
    WcStatus.LOC_PROT_ERR: LocalProtectionError,
    WcStatus.LOC_ACCESS_ERR: LocalProtectionError,
    WcStatus.RETRY_EXC_ERR: RetryExceededError,
    WcStatus.RNR_RETRY_EXC_ERR: ReceiverNotReadyError,
    WcStatus.WR_FLUSH_ERR: FlushedError,
}


def completion_error(
    status: int,
    *,
    peer: str | None = None,
    qp_num: int | None = None,
    opcode: str | None = None,
    vendor_err: int = 0,
    detail: str = "",
) -> CompletionError:
    """The exception for a work-completion status; a status nobody knows counts as GENERAL_ERR."""
    try:
        known = WcStatus(status)
    except ValueError:
        known, detail = WcStatus.GENERAL_ERR, f"unknown status {status}"
    cls = _STATUS_CLASS.get(known, CompletionError)
    return cls(known, peer=peer, qp_num=qp_num, opcode=opcode, vendor_err=vendor_err, detail=detail)


# --- the bootstrap ------------------------------------------------------------------------------------


class BootstrapError(RdmaError, ConnectionError):
    """Setting up a connection was refused or failed. Attribute: ``peer`` (its address as text)."""

    def __init__(self, message: str, *, peer: str | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class VersionMismatchError(BootstrapError):
    """The two sides have no protocol version in common."""


class AuthenticationError(BootstrapError, PermissionError):
    """The token is missing or wrong, or the handshake was replayed or altered on its way."""


class TlsError(BootstrapError):
    """TLS could not be established: a certificate was refused, or the peer does not speak TLS."""


class BootstrapTimeoutError(BootstrapError, TimeoutError):
    """The peer did not finish the handshake in time."""


class MalformedHandshakeError(BootstrapError):
    """What arrived is not a valid handshake: not JSON, too long, a field missing or out of range."""


class IncompatibleError(BootstrapError):
    """The two sides' devices cannot be connected (link layers, address families, transport differ)."""


def errno_text(number: int) -> str:
    """``EACCES: Permission denied``: name and text of an error number."""
    import errno as _errno

    return f"{_errno.errorcode.get(number, number)}: {os.strerror(number)}"


def call_failed(number: int, call: str) -> DeviceError:
    """The error for a verbs call that returned this error number."""
    return DeviceError(f"{call} failed: {errno_text(number)}", errno=number, call=call)
