"""The provider seam: a verbs library opened at run time, as one function table.

Everything above calls through a Provider and never asks which library is behind it. A missing library is an
error when a device is wanted, not when the package is imported.
"""

from __future__ import annotations

import functools
from typing import Any

from .._native import ffi, lib
from ..errors import DeviceError, LibraryError, errno_text

#: The soname of rdma-core's libibverbs; the ABI has kept it since 2005.
DEFAULT_LIBRARY = "libibverbs.so.1"


class Provider:
    """One opened verbs library. Made by :func:`provider`; lives as long as the process."""

    __slots__ = ("path", "table")

    def __init__(self, path: str) -> None:
        self.path = path
        self.table: Any = ffi.new("struct glue_provider *")
        text = ffi.new("char[]", 512)
        rc = lib.glue_provider_open(path.encode(), self.table, text, len(text))
        if rc:
            detail = ffi.string(text).decode(errors="replace")
            raise LibraryError(
                f"the verbs library {path} cannot be used: {detail}; install it (Debian, Ubuntu: "
                "apt install libibverbs1 ibverbs-providers; Fedora: dnf install libibverbs)",
                errno=rc,
                call="dlopen",
            )

    def fork_status(self) -> str:
        """``unneeded``, ``enabled`` or ``disabled`` (ibv_is_fork_initialized(3)), ``unknown`` before v35."""
        if self.table.is_fork_initialized == ffi.NULL:
            return "unknown"
        names = {
            lib.IBV_FORK_UNNEEDED: "unneeded",
            lib.IBV_FORK_ENABLED: "enabled",
            lib.IBV_FORK_DISABLED: "disabled",
        }
        return names.get(self.table.is_fork_initialized(), "unknown")


@functools.cache
def provider(path: str = DEFAULT_LIBRARY) -> Provider:
    """The verbs library at ``path``, opened once. Raises :class:`LibraryError`."""
    return Provider(path)


def check(rc: int, call: str, hint: str = "") -> None:
    """Turns a positive errno from the native layer into a :class:`DeviceError` that names the call."""
    if rc:
        raise DeviceError(
            f"{call} failed: {errno_text(rc)}{'; ' + hint if hint else ''}", errno=rc, call=call
        )
