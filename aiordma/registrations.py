"""Registrations of users' own buffers: pinned while operations use them, cached where that is safe.

A buffer is registered while operations use it, once for any number of them. When the last one is
done, the registration stays in a cache only where that is safe: for numpy arrays, which cannot move as long as
they live and tell when they die. A bytearray or an mmap can be resized or closed behind a registration that
nobody holds, and an RDMA read would then land in pages that belong to somebody else; for those, and for memory
used again and again, MemoryPool.register() pins until it is told otherwise.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict, deque
from typing import Any, Self

from ._native import ffi
from .errors import MemoryLimitError, MisuseError
from .verbs import Access, MemoryRegion, ProtectionDomain

#: For operations of our own. (Comparing is much cheaper than the flags' operators, and happens for every buffer.)
_OWN = (Access.NONE, Access.LOCAL_WRITE)
#: Address, length in bytes, access.
_Key = tuple[int, int, Access]


def export(buffer: object, *, writable: bool) -> Any:
    """The buffer as a cffi view, which keeps it exported until released."""
    try:
        return ffi.from_buffer(buffer, require_writable=writable)
    except (BufferError, ValueError, TypeError) as error:
        need = "writable, contiguous" if writable else "contiguous"
        raise MisuseError(
            f"a {need} buffer (bytes, bytearray, memoryview, numpy array, lease, ...) is needed, not "
            f"{type(buffer).__name__}: {error}"
        ) from None


class Pinned:
    """A user's buffer, held and registered while an operation uses it."""

    __slots__ = ("_entry", "_explicit", "_view", "address", "lkey", "nbytes")

    def __init__(self, address: int, nbytes: int, lkey: int, view: Any, entry: CacheEntry | None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.lkey = lkey
        self._view = view
        self._entry = entry
        self._explicit = False

    def release(self) -> None:
        """The operation is done: the buffer may move again. Idempotent."""
        if self._view is None:
            return
        view, entry = self._view, self._entry
        self._view = self._entry = None
        if entry is not None:
            if self._explicit:
                entry.cache.explicit.remove(entry)
            entry.release()
        ffi.release(view)

    def copy_in(self, offset: int, data: bytes) -> None:
        """Puts ``data`` into the buffer, which is large enough and writable."""
        ffi.memmove(ffi.cast("char *", self.address + offset), data, len(data))

    @property
    def region(self) -> MemoryRegion | None:
        """Its own registration; None when it lies in the pool's."""
        return self._entry.region if self._entry is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class PinnedParts:
    """A pinned buffer that several operations use at once: it is released with the last of them."""

    __slots__ = ("_pinned", "_users")

    def __init__(self, pinned: Pinned) -> None:
        self._pinned = pinned
        self._users = 0

    def part(self, offset: int) -> PinnedPart:
        """The buffer from ``offset`` on, until its ``release()``."""
        self._users += 1
        return PinnedPart(self, self._pinned.address + offset, self._pinned.lkey)

    def released(self) -> None:
        """One user less."""
        self._users -= 1
        if self._users == 0:
            self._pinned.release()


class PinnedPart:
    """What one operation uses of a pinned buffer."""

    __slots__ = ("_whole", "address", "lkey")

    def __init__(self, whole: PinnedParts, address: int, lkey: int) -> None:
        self._whole: PinnedParts | None = whole
        self.address = address
        self.lkey = lkey

    def release(self) -> None:
        """The operation is done. Idempotent."""
        whole, self._whole = self._whole, None
        if whole is not None:
            whole.released()


class CacheEntry:
    """A registration of a user's buffer and how many operations use it."""

    __slots__ = ("cache", "key", "region", "uses", "watch")

    def __init__(self, cache: RegistrationCache, key: _Key, region: MemoryRegion) -> None:
        self.cache = cache
        self.key = key
        self.region = region
        self.uses = 1
        self.watch: weakref.ref[Any] | None = None

    def release(self) -> None:
        """One use less."""
        self.uses -= 1
        if self.uses == 0:
            self.cache._unused(self)


class RegistrationCache:
    """Registrations by address, length and access; idle ones in least-recently-used order, bounded.

    An entry in use is protected by the views of its users. An idle one lives only as long as its owner, an
    object of a kind that cannot move: see the top of this file.
    """

    def __init__(self, pd: ProtectionDomain, limit: int) -> None:
        self._pd = pd
        self._limit = limit
        self._entries: dict[_Key, CacheEntry] = {}
        self._idle: OrderedDict[_Key, CacheEntry] = OrderedDict()
        # Filled by weakref callbacks, which may run in any thread and inside any call; emptied at the next use.
        self._dead: deque[CacheEntry] = deque()
        self.explicit: list[CacheEntry] = []  # what MemoryPool.register() keeps; few
        self.idle_bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def used_bytes(self) -> int:
        """What is registered because something uses it."""
        return sum(entry.key[1] for entry in self._entries.values() if entry.uses)

    def acquire(self, buffer: object, address: int, nbytes: int, access: Access) -> CacheEntry:
        """The entry for a buffer that the caller holds exported, registered if need be, used once more.

        A registration that lets peers in (no device lets them into one that is only for windows) never stays idle.
        """
        self.bury()
        key = (address, nbytes, access)
        entry = self._covering(address, nbytes, access)
        if entry is not None:
            self.hits += 1
            if entry.uses == 0:
                del self._idle[entry.key]
                self.idle_bytes -= nbytes
            entry.uses += 1
            return entry
        self.misses += 1
        entry = CacheEntry(self, key, self._register(address, nbytes, access))
        lets_peers_in = access not in _OWN and access & Access.REMOTE_READ
        owner = None if lets_peers_in else _immovable_owner(buffer)
        if owner is not None:
            dead = self._dead
            entry.watch = weakref.ref(owner, lambda _ref, entry=entry: dead.append(entry))  # type: ignore[misc]
        self._entries[key] = entry
        return entry

    def _covering(self, address: int, nbytes: int, access: Access) -> CacheEntry | None:
        """A registration that will do: what is writable can be read as well; windows need one of exactly the
        bytes they are bound over (regions.py says why)."""
        if access not in _OWN:
            return self._entries.get((address, nbytes, access))
        for entry in self.explicit:
            start, length, _ = entry.key
            if start <= address and address + nbytes <= start + length:
                return entry
        found = self._entries.get((address, nbytes, Access.LOCAL_WRITE))
        return found or self._entries.get((address, nbytes, access))

    def _register(self, address: int, nbytes: int, access: Access) -> MemoryRegion:
        try:
            return MemoryRegion(self._pd, address, nbytes, access)
        except MemoryLimitError:
            if not self._idle:
                raise
            self._shrink(0)  # what is pinned for nothing may be what is missing
            return MemoryRegion(self._pd, address, nbytes, access)

    def _unused(self, entry: CacheEntry) -> None:
        self.bury()
        if self._entries.get(entry.key) is not entry:
            return
        if entry.watch is None or entry.watch() is None or entry.key[1] > self._limit:
            self._forget(entry)
            return
        self._idle[entry.key] = entry
        self.idle_bytes += entry.key[1]
        self._shrink(self._limit)

    def _shrink(self, limit: int) -> None:
        while self.idle_bytes > limit:
            _, entry = self._idle.popitem(last=False)
            self.idle_bytes -= entry.key[1]
            self._forget(entry)

    def bury(self) -> None:
        """Deregisters the idle entries whose owner died."""
        while self._dead:
            entry = self._dead.popleft()
            if self._idle.get(entry.key) is entry:
                del self._idle[entry.key]
                self.idle_bytes -= entry.key[1]
                self._forget(entry)

    def _forget(self, entry: CacheEntry) -> None:
        self._entries.pop(entry.key, None)
        entry.watch = None
        entry.region.close()

    def close(self) -> None:
        """Deregisters everything, in use or not: the queue pairs are gone by now."""
        for entry in list(self._entries.values()):
            self._forget(entry)
        self._idle.clear()
        self._dead.clear()
        self.idle_bytes = 0


def _immovable_owner(buffer: object) -> object | None:
    """The object whose life is the life of the memory, if its memory cannot move before that; else None.

    numpy arrays: ``ndarray.resize`` refuses an array that is referenced, a weak reference included. The memory
    of a view belongs to the end of its chain of bases; only a chain of arrays down to one that owns its data
    qualifies.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    while isinstance(buffer, memoryview):
        buffer = buffer.obj
    while isinstance(buffer, numpy.ndarray) and buffer.base is not None:
        buffer = buffer.base
    return buffer if isinstance(buffer, numpy.ndarray) and buffer.flags.owndata else None
