"""The provider seam: verbs libraries opened at run time, each as one function table.

Everything above calls through a Provider and never asks which library is behind it. There are two: libibverbs,
where it is installed, drives the kernel's devices; libusroce, which lies beside the compiled modules, is a device
in user space. A library that is missing is an error when a device is wanted and there is no other, not when the
package is imported.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._native import _verbs, ffi, lib
from ..errors import DeviceError, LibraryError, errno_text

if TYPE_CHECKING:
    from .device import Context

#: The soname of rdma-core's libibverbs; the ABI has kept it since 2005.
DEFAULT_LIBRARY = "libibverbs.so.1"

#: The user-space device that comes with the package.
USROCE_LIBRARY = os.path.join(os.path.dirname(_verbs.__file__ or ""), "libusroce.so")

#: Set to 0, the environment variable that leaves usroce out.
USROCE_SWITCH = "AIORDMA_USROCE"

_INSTALL = (
    "install it (Debian, Ubuntu: apt install libibverbs1 ibverbs-providers; Fedora: dnf install libibverbs)"
)
_REPAIR = "it is part of aiordma: install the package anew (in a checkout: make setup)"


class Provider:
    """One opened verbs library. Made by :func:`provider`; lives as long as the process.

    ``is_usroce`` says whether it has the functions of :mod:`aiordma.verbs.usroce`. ``opening`` is held while a
    device is opened: settings for one device must not meet another thread's.
    """

    __slots__ = ("contexts", "handle", "is_usroce", "opening", "options", "path", "table", "watchers")

    def __init__(self, path: str) -> None:
        self.path = path
        self.table: Any = ffi.new("struct glue_provider *")
        text = ffi.new("char[]", 512)
        rc = lib.glue_provider_open(path.encode(), self.table, text, len(text))
        if rc:
            detail = ffi.string(text).decode(errors="replace")
            remedy = _REPAIR if path == USROCE_LIBRARY else _INSTALL
            raise LibraryError(
                f"the verbs library {path} cannot be used: {detail}; {remedy}", errno=rc, call="dlopen"
            )
        #: The same for two names of one library.
        self.handle = int(ffi.cast("uintptr_t", self.table.handle))
        self.is_usroce: bool = self.table.usroce_query_counters != ffi.NULL
        self.opening = threading.RLock()
        self.options: dict[str, str] = {}  # what was set with usroce_set_option()
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.watchers: list[Callable[[Context], object]] = []  # told of each device that was opened

    def opened(self, context: Context) -> None:
        """Told by a device that was opened; ``opening`` is held."""
        self.contexts.add(context)
        for watcher in list(self.watchers):
            watcher(context)

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


def library_paths() -> list[str]:
    """The verbs libraries to look for, in the order of their devices.

    In a program that ``aiordma usroce run`` started (libusroce is preloaded) it is the only one.
    """
    if os.path.basename(USROCE_LIBRARY) in os.environ.get("LD_PRELOAD", ""):
        return [USROCE_LIBRARY]
    return [DEFAULT_LIBRARY] if usroce_is_off() else [DEFAULT_LIBRARY, USROCE_LIBRARY]


def usroce_is_off() -> bool:
    """Whether the environment leaves usroce out (``AIORDMA_USROCE=0``)."""
    return os.environ.get(USROCE_SWITCH) == "0"


def providers() -> list[Provider]:
    """Every verbs library that opens: libibverbs, then usroce. Raises :class:`LibraryError` if none does."""
    found: dict[int, Provider] = {}
    reasons: list[LibraryError] = []
    for path in library_paths():
        try:
            opened = provider(path)
        except LibraryError as error:
            reasons.append(error)
        else:
            found.setdefault(opened.handle, opened)
    if not found:
        text = "\n".join(map(str, reasons))
        raise LibraryError(text, errno=reasons[0].errno, call=reasons[0].call)
    return list(found.values())


def check(rc: int, call: str, hint: str = "") -> None:
    """Turns a positive errno from the native layer into a :class:`DeviceError` that names the call."""
    if rc:
        raise DeviceError(
            f"{call} failed: {errno_text(rc)}{'; ' + hint if hint else ''}", errno=rc, call=call
        )
