"""Protection domain, memory regions, memory windows."""

from __future__ import annotations

import errno
import resource
from typing import Any

from .._native import ffi, lib
from ..errors import DeviceError, MemoryLimitError, MisuseError
from .device import Context
from .enums import Access
from .owner import Owner
from .provider import check


class ProtectionDomain(Owner):
    """``struct ibv_pd``: queue pairs may only touch regions and windows of their own domain."""

    __slots__ = ("_handle", "context")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.context = context
        handle = ffi.new("struct ibv_pd **")
        check(lib.glue_alloc_pd(context.provider.table, context._handle, handle), "ibv_alloc_pd")
        self._handle = handle[0]
        self._opened()

    def register(self, buffer: Any, access: Access = Access.LOCAL_WRITE) -> MemoryRegion:
        """Registers a contiguous buffer object; the region keeps it exported, so it cannot move or shrink.

        Raises :class:`MisuseError` for an empty, not contiguous or (with any write access) read-only buffer,
        :class:`MemoryLimitError` when the kernel refuses to pin that much.
        """
        writable = bool(access & (Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_ATOMIC))
        try:
            view = ffi.from_buffer(buffer, require_writable=writable)
        except (BufferError, ValueError, TypeError) as error:
            need = "writable, contiguous" if writable else "contiguous"
            raise MisuseError(
                f"cannot register {type(buffer).__name__}: a {need} buffer is needed ({error})"
            ) from None
        if not len(view):
            raise MisuseError("cannot register an empty buffer")
        return MemoryRegion(self, int(ffi.cast("uintptr_t", view)), len(view), access, keep=view)

    def _destroy(self) -> None:
        check(lib.glue_dealloc_pd(self.context.provider.table, self._handle), "ibv_dealloc_pd")


class MemoryRegion(Owner):
    """``struct ibv_mr``: memory the device may reach. Addresses are virtual, lengths in bytes.

    ``keep`` is held as long as the region lives; it must own the memory.
    """

    __slots__ = ("_handle", "_keep", "access", "address", "length", "lkey", "pd", "rkey")

    def __init__(
        self, pd: ProtectionDomain, address: int, length: int, access: Access, *, keep: object = None
    ) -> None:
        super().__init__(pd)
        self.pd = pd
        self.address = address
        self.length = length
        self.access = access
        self._keep = keep
        handle = ffi.new("struct ibv_mr **")
        rc = lib.glue_reg_mr(pd.context.provider.table, pd._handle, address, length, int(access), handle)
        if rc in (errno.ENOMEM, errno.EAGAIN):
            raise _pinning_error(length, rc)
        if rc:
            check(rc, "ibv_reg_mr", f"{length} bytes, access {access!r}")
        self._handle = handle[0]
        self.lkey: int = self._handle.lkey
        self.rkey: int = self._handle.rkey
        self._opened()

    def _destroy(self) -> None:
        try:
            check(lib.glue_dereg_mr(self.pd.context.provider.table, self._handle), "ibv_dereg_mr")
        finally:
            self._keep = None


class MemoryWindow(Owner):
    """``struct ibv_mw``, type 2: a key over part of a region, valid on the one queue pair that bound it.

    Binding and revoking are work requests of that queue pair (:meth:`QueuePair.post_bind`,
    :meth:`QueuePair.post_invalidate`).
    """

    __slots__ = ("_handle", "pd", "rkey")

    def __init__(self, pd: ProtectionDomain) -> None:
        super().__init__(pd)
        self.pd = pd
        handle = ffi.new("struct ibv_mw **")
        check(lib.glue_alloc_mw(pd._handle, lib.IBV_MW_TYPE_2, handle), "ibv_alloc_mw")
        self._handle = handle[0]
        self.rkey: int = self._handle.rkey
        self._opened()

    def next_rkey(self) -> int:
        """The key for the next binding: the low byte, which belongs to the consumer, moves on by one.

        Source: ibv_inc_rkey(3).
        """
        return (self.rkey & ~0xFF) | ((self.rkey + 1) & 0xFF)

    def rebound(self, rkey: int) -> None:
        """A binding with this key was posted. The library's structure is told as well: rxe names the key before
        the new one in the next binding from there, and its kernel refuses a wrong one."""
        self.rkey = rkey
        self._handle.rkey = rkey

    def _destroy(self) -> None:
        check(lib.glue_dealloc_mw(self._handle), "ibv_dealloc_mw")


def _pinning_error(needed: int, number: int) -> DeviceError | MemoryLimitError:
    """ibv_reg_mr fails with ENOMEM when RLIMIT_MEMLOCK is too low (ibv_reg_mr(3)): say the numbers."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return MemoryLimitError(
            f"registering {needed} bytes failed for lack of memory (errno {number}); RLIMIT_MEMLOCK is unlimited, "
            "so the machine or the device itself is out of room",
            needed=needed,
        )
    return MemoryLimitError(
        f"registering {needed} bytes of memory exceeds RLIMIT_MEMLOCK, which is {soft} bytes for the pinned "
        f"memory of this process altogether; raise it: `ulimit -l unlimited` in the shell, "
        "`LimitMEMLOCK=infinity` in a systemd unit, `memlock` in /etc/security/limits.conf, "
        "`--ulimit memlock=-1` for a container; or lower Config(slab_size=..., pool_limit=...)",
        limit=soft,
        needed=needed,
    )
