"""Ownership of verbs objects: who holds whom, and the order in which they die.

A verbs object may only be destroyed after everything made from it: queue pairs before completion queues before
their channel, memory windows before their region, everything before the protection domain, that before the
context. Each Python owner registers with its parents, holds them alive, and closes its children first, latest
first. close() is idempotent and finishes what it can: when the device refuses to destroy a child, the others
are still closed and the first error is raised at the end. The finalizer only warns, because the order in which
the garbage collector finds objects is not the order in which they may die.
"""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from types import TracebackType
from typing import Self

from ..errors import DeviceError, WrongLoopError

_serial = itertools.count()


class Owner:
    """Base of every object that owns something of the verbs library."""

    __slots__ = ("__weakref__", "_children", "_closed", "_parents", "_pid", "_serial")

    def __init__(self, *parents: Owner) -> None:
        self._closed = True  # until the subclass has its handle: nothing to give back before that
        self._parents = parents
        self._children: weakref.WeakSet[Owner] | None = None  # most have none, and live for one operation
        self._serial = next(_serial)
        self._pid = os.getpid()
        for parent in parents:
            parent.check_open()

    def _opened(self) -> None:
        """The handle is there: from now on close() destroys it."""
        self._closed = False
        for parent in self._parents:
            if parent._children is None:
                parent._children = weakref.WeakSet()
            parent._children.add(self)

    def _destroy(self) -> None:
        """Gives the handle back to the library; called once, after every child is closed."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """True once close() was called (or before the object was fully made)."""
        return self._closed

    def check_open(self) -> None:
        """Raises :class:`DeviceError` when closed, :class:`WrongLoopError` in a forked child.

        After fork() the child shares the parent's queues through mapped device memory; using them from both
        corrupts both (ibv_fork_init(3)).
        """
        if self._pid != os.getpid():
            raise WrongLoopError(
                f"{type(self).__name__} was opened in process {self._pid} and cannot be used after fork() in "
                f"{os.getpid()}; open the device anew in the child"
            )
        if self._closed:
            raise DeviceError(f"{type(self).__name__} is closed")

    def close(self) -> None:
        """Closes the children, then this object. Idempotent; raises the first error after trying all."""
        if self._closed:
            return
        if self._pid != os.getpid():
            self._closed = True  # the parent process still uses what the handle stands for
            return
        first: Exception | None = None
        for child in sorted(self._children or (), key=lambda c: c._serial, reverse=True):
            try:
                child.close()
            except DeviceError as error:
                first = first or error
        try:
            self._destroy()
        except DeviceError as error:
            first = first or error
        self._closed = True
        for parent in self._parents:
            if parent._children is not None:
                parent._children.discard(self)
        if first is not None:
            raise first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pid == os.getpid():
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} {state}>"
