"""Completion channel and completion queue."""

from __future__ import annotations

import itertools
import struct
import weakref
from typing import NamedTuple

from .._native import ffi, lib
from ..errors import DeviceError, MisuseError
from .device import Context
from .owner import Owner
from .provider import check


class WorkCompletion(NamedTuple):
    """One completion, fields in the order of ``struct glue_wc``.

    ``status`` is a :class:`~aiordma.errors.WcStatus` value, ``opcode`` a :class:`~aiordma.verbs.WcOpcode`
    value, both as plain integers. On an error only ``wr_id``, ``status``, ``qp_num`` and ``vendor_err`` mean
    anything. ``byte_len`` (bytes) is set for receives, reads and atomics; ``imm`` (host order) when ``flags``
    has ``IBV_WC_WITH_IMM``.
    """

    wr_id: int
    status: int
    opcode: int
    byte_len: int
    imm: int
    qp_num: int
    vendor_err: int
    flags: int


#: How a packed completion is read: the fields of WorkCompletion, then 4 bytes of padding.
WC_STRUCT = struct.Struct("=QIIIIIII4x")
assert WC_STRUCT.size == ffi.sizeof("struct glue_wc")


_cookies = itertools.count(1)


class CompletionChannel(Owner):
    """``struct ibv_comp_channel``: a file descriptor, non-blocking here, readable when an armed queue fills."""

    __slots__ = ("_cookies", "_count", "_handle", "_queues", "context", "fd")

    #: Events read in one crossing.
    BATCH = 64

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.context = context
        handle = ffi.new("struct ibv_comp_channel **")
        check(
            lib.glue_create_comp_channel(context.provider.table, context._handle, handle),
            "ibv_create_comp_channel",
        )
        self._handle = handle[0]
        self._opened()
        self.fd: int = self._handle.fd
        self._queues: weakref.WeakValueDictionary[int, CompletionQueue] = weakref.WeakValueDictionary()
        self._cookies = ffi.new("uint64_t[]", self.BATCH)
        self._count = ffi.new("int *")
        try:
            check(lib.glue_set_nonblocking(self.fd), "fcntl(comp_channel)")
        except DeviceError:
            self.close()
            raise

    def watch(self) -> int:
        """The descriptor for an event loop that always is ready for a wake-up without an event.

        It is ``fd``, or, on a device that has better (usroce), one that also is readable when a packet has come,
        which ``get_events`` then sees to: so no other thread wakes first. From then on a completion that was found
        by polling an armed queue raises no event there; the queue stays armed.
        """
        fd = ffi.new("int *")
        check(lib.glue_watch_channel(self.context.provider.table, self._handle, fd), "usroce_watch_channel")
        return int(fd[0])

    def get_events(self) -> list[CompletionQueue]:
        """Reads every event that is there; returns its queue for each, no longer armed. Never blocks.

        The events are counted at their queues, which acknowledge them in batches and before they are closed.
        """
        found: list[CompletionQueue] = []
        while True:
            rc = lib.glue_drain_channel(
                self.context.provider.table, self._handle, self._cookies, self.BATCH, self._count
            )
            count = self._count[0]
            for cookie in self._cookies[0:count]:
                queue = self._queues[cookie]
                queue._count_event()
                found.append(queue)
            # After counting: each event that was read is owed an acknowledgement.
            check(rc, "ibv_get_cq_event")
            if count < self.BATCH:
                return found

    def _destroy(self) -> None:
        check(
            lib.glue_destroy_comp_channel(self.context.provider.table, self._handle),
            "ibv_destroy_comp_channel",
        )


class CompletionQueue(Owner):
    """``struct ibv_cq``. Must have room for every work request that can complete into it at one time.

    ``size`` is what the device granted, at least what was asked for; ``pointer`` is the address of the ``ibv_cq``.
    """

    __slots__ = (
        "_batch",
        "_bytes",
        "_handle",
        "_unacked",
        "_wcs",
        "channel",
        "context",
        "cookie",
        "pointer",
        "size",
    )

    #: Events counted before they are acknowledged together: the acknowledgement takes a mutex.
    ACK_BATCH = 64

    def __init__(
        self,
        context: Context,
        size: int,
        channel: CompletionChannel | None = None,
        *,
        vector: int = 0,
        batch: int = 64,
    ) -> None:
        super().__init__(context, *([channel] if channel else []))
        self.context = context
        self.channel = channel
        self.cookie = next(_cookies)
        limit = context.attributes().max_cqe
        if not 1 <= size <= limit:
            raise MisuseError(f"completion queue of {size} entries: {context.name} allows 1 to {limit}")
        handle = ffi.new("struct ibv_cq **")
        check(
            lib.glue_create_cq(
                context.provider.table,
                context._handle,
                size,
                self.cookie,
                channel._handle if channel else ffi.NULL,
                vector,
                handle,
            ),
            "ibv_create_cq",
            f"{size} entries",
        )
        self._handle = handle[0]
        self.pointer = int(ffi.cast("uintptr_t", self._handle))
        self.size: int = self._handle.cqe
        self._unacked = 0
        self._batch = batch
        self._wcs = ffi.new("struct glue_wc[]", batch)
        self._bytes = memoryview(ffi.buffer(self._wcs)).cast("B")
        self._opened()
        if channel is not None:
            channel._queues[self.cookie] = self

    def poll(self, spin_ns: int = 0) -> list[WorkCompletion]:
        """Takes up to ``batch`` completions. With ``spin_ns`` (nanoseconds) polls that long for the first one,
        in C, without the GIL. Returns an empty list when there are none."""
        return [WorkCompletion._make(fields) for fields in self.poll_raw(spin_ns)]

    def poll_raw(self, spin_ns: int = 0) -> list[tuple[int, ...]]:
        """As :meth:`poll`, as plain tuples in the order of :class:`WorkCompletion` (the fast path)."""
        if spin_ns:
            count = lib.glue_poll_spin(self._handle, self._wcs, self._batch, spin_ns)
        else:
            count = lib.glue_poll(self._handle, self._wcs, self._batch)
        if count <= 0:
            if count < 0:
                check(-count, "ibv_poll_cq")
            return []
        if count == 1:
            return [WC_STRUCT.unpack_from(self._bytes)]
        return list(WC_STRUCT.iter_unpack(self._bytes[: count * WC_STRUCT.size]))

    @property
    def batch(self) -> int:
        """The most completions one :meth:`poll` returns; a full batch means that there may be more."""
        return self._batch

    def arm(self, *, solicited_only: bool = False) -> None:
        """Asks for one event at the next completion. What completed before raises none: poll once more."""
        check(lib.glue_arm(self._handle, int(solicited_only)), "ibv_req_notify_cq")

    def _count_event(self) -> None:
        self._unacked += 1
        if self._unacked >= self.ACK_BATCH:
            self._acknowledge()

    def _acknowledge(self) -> None:
        lib.glue_ack_cq_events(self.context.provider.table, self._handle, self._unacked)
        self._unacked = 0

    def _destroy(self) -> None:
        # ibv_destroy_cq(3) waits until the events acknowledged equal those delivered. The kernel counts what
        # was read from the channel, so what still lies in the channel for this queue goes with it.
        if self._unacked:
            self._acknowledge()
        check(lib.glue_destroy_cq(self.context.provider.table, self._handle), "ibv_destroy_cq")
