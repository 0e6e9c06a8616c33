"""Registered memory: slabs, leases, and the receive ring.

Registering memory costs a system call and pins pages, so it is done in slabs and handed out as leases. A slab
serves one size class at a time; classes lie a quarter of a power of two apart, so a lease wastes at most a
fifth of its memory. A slab whose leases all came back may serve another class, or be given back to the system
when another size needs its room under the limit. What does not fit a slab gets a registration of its own,
counted alike. Waiting for memory is a fair queue. Users' own buffers are registered by registrations.py.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import mmap
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ._native import ffi
from ._native._memory import Memory
from .config import Config
from .errors import DeviceError, MemoryLimitError, MisuseError, RdmaError
from .registrations import Pinned, RegistrationCache, export
from .verbs import Access, MemoryRegion, ProtectionDomain, usroce

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
#: Leases start at multiples of this: an atomic needs 8, a cache line is 64.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Registered memory in bytes; ``waiting`` counts callers of acquire(), ``pinned`` are users' own buffers that
    operations use now, ``cached`` those kept registered for the next use."""

    limit: int
    registered: int
    leased: int
    leases: int
    slabs: int
    huge_slabs: int
    waiting: int
    pinned: int
    cached: int
    cached_registrations: int
    cache_hits: int
    cache_misses: int


def round_up(nbytes: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-nbytes // step) * step


def size_class(nbytes: int) -> int:
    """The class that serves ``nbytes``: the next of 1, 1.25, 1.5, 1.75 times a power of two, at least 64."""
    if nbytes <= ALIGNMENT:
        return ALIGNMENT
    step = max(ALIGNMENT, 1 << ((nbytes - 1).bit_length() - 3))
    return round_up(nbytes, step)


class _AnonymousMemory:
    """Memory of this process."""

    __slots__ = ("address", "huge", "map", "view")

    def __init__(self, nbytes: int, huge_pages: str) -> None:
        self.map, self.huge = _anonymous_map(nbytes, huge_pages)
        self.view: Any = ffi.from_buffer(self.map, require_writable=True)
        self.address = int(ffi.cast("uintptr_t", self.view))

    def unshare(self) -> None:
        pass

    def close(self) -> None:
        ffi.release(self.view)
        self.map.close()


def _memory_of_slab(
    pd: ProtectionDomain, nbytes: int, huge_pages: str, shared: bool
) -> _AnonymousMemory | usroce.SharedMemory:
    """Where the device is usroce and may, memory that its peers on this host can map."""
    if shared and pd.context.is_usroce and huge_pages != "require":
        with contextlib.suppress(MemoryError):
            return usroce.SharedMemory(pd.context, nbytes)
    return _AnonymousMemory(nbytes, huge_pages)


class Slab:
    """One registration, cut into equal chunks of a size class."""

    __slots__ = ("chunk", "free", "huge", "memory", "nbytes", "region", "total")

    def __init__(self, pd: ProtectionDomain, nbytes: int, huge_pages: str, shared: bool) -> None:
        self.memory = _memory_of_slab(pd, nbytes, huge_pages, shared)
        self.huge = isinstance(self.memory, _AnonymousMemory) and self.memory.huge
        self.nbytes = nbytes
        self.chunk = 0
        self.total = 0
        self.free: list[int] = []
        try:
            self.region = MemoryRegion(pd, self.memory.address, nbytes, Access.LOCAL_WRITE, keep=self.memory)
        except Exception:
            self.memory.close()
            raise

    def cut(self, chunk: int) -> None:
        """Makes this slab, of which nothing is leased, serve chunks of another size."""
        self.chunk = chunk
        self.total = self.nbytes // chunk
        base = self.region.address
        self.free = [base + i * chunk for i in range(self.total - 1, -1, -1)]

    @property
    def idle(self) -> bool:
        """True when nothing of it is leased."""
        return len(self.free) == self.total

    def retire(self) -> None:
        """Deregisters; leases own the mapping, it goes with the last of them."""
        self.region.close()
        self.memory.unshare()

    def close(self) -> None:
        """Deregisters and unmaps."""
        try:
            self.region.close()
        finally:
            self.memory.close()


def _anonymous_map(nbytes: int, huge_pages: str) -> tuple[mmap.mmap, bool]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if huge_pages != "never" and nbytes % HUGE_PAGE == 0:
        try:
            # MAP_HUGETLB (0x40000) is not in the mmap module; its value is the same on every Linux that has
            # InfiniBand drivers (asm-generic/mman-common.h). MAP_POPULATE turns "none free" into an error here
            # instead of a SIGBUS at first touch.
            return mmap.mmap(-1, nbytes, flags=flags | 0x40000 | mmap.MAP_POPULATE), True
        except OSError:
            pass
    if huge_pages == "require":
        raise MemoryLimitError(
            f"no huge pages for a slab of {nbytes} bytes: reserve some (sysctl vm.nr_hugepages=...), make "
            f"Config(slab_size=...) a multiple of {HUGE_PAGE}, or use Config(huge_pages='auto')",
            needed=nbytes,
        )
    return mmap.mmap(-1, nbytes, flags=flags), False


class Revocable(Protocol):
    """Something that lets others into a lease's memory and must end before the memory is used again."""

    async def revoke(self) -> None: ...


class Lease(Memory):
    """Registered memory, leased from a pool: a writable buffer (``memoryview(lease)``, numpy, slices of both).

    Use it as an async context manager, or call :meth:`release`. The contents are whatever was there before
    unless the lease was asked for with zeros. While a view of it is alive after the release, its memory is not
    handed out again.
    """

    __slots__ = ("_dedicated", "_pool", "_released", "_slab", "_users")

    def __init__(self, pool: MemoryPool, slab: Slab, address: int, nbytes: int, *, dedicated: bool) -> None:
        super().__init__(address, nbytes, slab)
        self._pool = pool
        self._slab = slab
        self._dedicated = dedicated
        self._released = False
        self._users: list[Revocable] = []

    def _last_view_gone(self) -> None:
        """Called by the buffer type, in whatever thread, when no view of a released lease is left."""
        # None when the garbage collector has cleared the lease before its view. The pool is closed then, for an
        # open one holds the lease.
        pool: MemoryPool | None = getattr(self, "_pool", None)
        if pool is not None and not pool._closed and pool._waiters:
            try:
                pool._loop.call_soon_threadsafe(pool.serve_waiters)
            except RuntimeError:
                pass  # the loop is closed: nobody waits any more

    @property
    def lkey(self) -> int:
        """Local key of the registration it lies in."""
        return self._slab.region.lkey

    @property
    def released(self) -> bool:
        """True after :meth:`release`."""
        return self._released

    def zero(self) -> Lease:
        """Fills the memory with zeros."""
        ffi.memmove(ffi.cast("char *", self.address), b"\0" * self.nbytes, self.nbytes)
        return self

    def add_user(self, user: Revocable) -> None:
        """``user`` is revoked before the memory goes back."""
        self._users.append(user)

    def remove_user(self, user: Revocable) -> None:
        """``user`` has ended by itself."""
        if user in self._users:
            self._users.remove(user)

    async def release(self) -> None:
        """Revokes whatever was shared of it, then gives the memory back. Idempotent.

        Cancelled while revoking: the memory stays out of use until its users have ended; call again.
        """
        while self._users:
            user = self._users[-1]
            await user.revoke()
            self.remove_user(user)
        self.release_nowait()

    def release_nowait(self) -> None:
        """Gives the memory back at once. Raises :class:`MisuseError` while it is shared."""
        if self._released:
            return
        if self._users:
            raise MisuseError("the lease is shared: use `await lease.release()`, or unshare it first")
        self._released = True
        self._close_memory()
        self._pool._give_back(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    def __repr__(self) -> str:
        return f"<Lease {self.nbytes} bytes at {self.address:#x}{' released' if self._released else ''}>"


class MemoryPool:
    """Registered memory of one protection domain, bounded by ``Config.pool_limit`` bytes.

    Belongs to one event loop; not thread-safe.
    """

    def __init__(self, pd: ProtectionDomain, config: Config | None = None) -> None:
        config = config or Config()
        self._loop = asyncio.get_running_loop()
        self._pd = pd
        self._limit = config.pool_limit
        self._slab_size = config.slab_size
        self._huge_pages = config.huge_pages
        self._shared_memory = config.usroce_shared_memory is not False
        self._registered = 0
        self._slabs: list[Slab] = []
        self._partial: dict[int, list[Slab]] = {}  # by chunk size: slabs with something free
        self._by_address: list[tuple[int, Slab]] = []  # sorted: which slab does an address lie in?
        self._leased = 0
        self._leases = 0
        self._zombies: list[Lease] = []  # released, but views of them are alive
        self._waiters: deque[tuple[asyncio.Future[Lease], int]] = deque()
        self._cache = RegistrationCache(pd, config.registration_cache)
        self._closed = False

    @property
    def limit(self) -> int:
        """The most bytes it registers."""
        return self._limit

    # --- leases --------------------------------------------------------------------------------------

    def acquire_nowait(self, nbytes: int) -> Lease:
        """A lease of ``nbytes`` (at least 1), or :class:`MemoryLimitError` when the pool has no room now."""
        if self._closed:
            raise MisuseError("the memory pool is closed")
        if nbytes < 1:
            raise MisuseError(f"a lease has at least 1 byte, not {nbytes}")
        self._reap_zombies()
        chunk = size_class(nbytes)
        if chunk > self._slab_size:
            return self._dedicated(nbytes)
        partial = self._partial.get(chunk)
        slab = partial[-1] if partial else self._slab_for(chunk)
        address = slab.free.pop()
        if not slab.free:
            self._partial[chunk].remove(slab)
        return self._lease(slab, address, nbytes, dedicated=False)

    async def acquire(self, nbytes: int) -> Lease:
        """A lease, waiting in turn for memory to come back.

        Raises :class:`MemoryLimitError` at once for more than the limit, or when the kernel refuses to pin.
        Cancelled: the place in the queue is given up, and memory that had just arrived goes to the next.
        """
        if not self._waiters:
            try:
                return self.acquire_nowait(nbytes)
            except MemoryLimitError as error:
                if error.limit != self._limit or not self._fits_ever(nbytes):
                    raise
        elif not self._fits_ever(nbytes):
            raise self._full(nbytes)
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiters.append((future, nbytes))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release_nowait()
            self.serve_waiters()  # who stood behind may fit
            raise

    def _fits_ever(self, nbytes: int) -> bool:
        return _pages(nbytes) <= self._limit

    def _lease(self, slab: Slab, address: int, nbytes: int, *, dedicated: bool) -> Lease:
        self._leased += nbytes
        self._leases += 1
        return Lease(self, slab, address, nbytes, dedicated=dedicated)

    def _slab_for(self, chunk: int) -> Slab:
        """A slab with nothing leased, cut into ``chunk``: an idle one of another class, or a new one."""
        slab = next((s for s in self._slabs if s.idle and s.nbytes >= chunk), None)
        if slab is None:
            slab = self._new_slab(self._affordable(chunk))
        elif slab in self._partial.get(slab.chunk, ()):
            self._partial[slab.chunk].remove(slab)
        slab.cut(chunk)
        self._partial.setdefault(chunk, []).append(slab)
        return slab

    def _affordable(self, chunk: int) -> int:
        """The size of the next slab: a smaller one as the last that fits under the limit."""
        idle = sum(slab.nbytes for slab in self._slabs if slab.idle)
        room = (self._limit - self._registered + idle) // PAGE * PAGE
        return max(_pages(chunk), min(self._slab_size, room))

    def _dedicated(self, nbytes: int) -> Lease:
        slab = self._new_slab(_pages(nbytes))
        slab.cut(slab.nbytes)
        return self._lease(slab, slab.free.pop(), nbytes, dedicated=True)

    def _new_slab(self, nbytes: int) -> Slab:
        if self._registered + nbytes > self._limit:
            self._drop_idle(self._registered + nbytes - self._limit)
        if self._registered + nbytes > self._limit:
            raise self._full(nbytes)
        slab = Slab(self._pd, nbytes, self._huge_pages, self._shared_memory)
        self._registered += nbytes
        self._slabs.append(slab)
        bisect.insort(self._by_address, (slab.region.address, slab), key=lambda row: row[0])
        return slab

    def _full(self, nbytes: int) -> MemoryLimitError:
        return MemoryLimitError(
            f"{nbytes} bytes more would exceed the pool's limit of {self._limit} bytes ({self._registered} "
            f"registered, {self._leased} leased); release leases, or raise Config(pool_limit=...)",
            limit=self._limit,
            needed=nbytes,
        )

    def _drop_idle(self, nbytes: int) -> None:
        """Gives idle slabs back to the system until ``nbytes`` are free of them."""
        for slab in [s for s in self._slabs if s.idle]:
            if nbytes <= 0:
                return
            nbytes -= slab.nbytes
            self._drop(slab)

    def _drop(self, slab: Slab) -> None:
        if slab in self._partial.get(slab.chunk, ()):
            self._partial[slab.chunk].remove(slab)
        self._slabs.remove(slab)
        self._by_address.remove((slab.region.address, slab))
        self._registered -= slab.nbytes
        slab.close()

    # --- taking back ---------------------------------------------------------------------------------

    def _give_back(self, lease: Lease) -> None:
        if self._closed:
            return
        if lease.exports:
            self._zombies.append(lease)
        else:
            self._reclaim(lease)
        self.serve_waiters()

    def _reap_zombies(self) -> None:
        if self._zombies:
            dead = [lease for lease in self._zombies if not lease.exports]
            self._zombies = [lease for lease in self._zombies if lease.exports]
            for lease in dead:
                self._reclaim(lease)

    def _reclaim(self, lease: Lease) -> None:
        slab = lease._slab
        self._leased -= lease.nbytes
        self._leases -= 1
        if lease._dedicated:
            slab.free.append(lease.address)
            self._drop(slab)
            return
        if not slab.free:
            self._partial.setdefault(slab.chunk, []).append(slab)
        slab.free.append(lease.address)

    def serve_waiters(self) -> None:
        """Memory may have come back: serves those who wait for it, in turn."""
        while self._waiters and not self._closed:
            future, nbytes = self._waiters[0]
            if not future.done():
                try:
                    lease = self.acquire_nowait(nbytes)
                except (RdmaError, OSError) as error:
                    if isinstance(error, MemoryLimitError) and error.limit == self._limit:
                        return  # in turn: who waits behind for less does not overtake
                    future.set_exception(error)
                else:
                    future.set_result(lease)
            self._waiters.popleft()

    # --- users' own memory ---------------------------------------------------------------------------

    def find(self, address: int, nbytes: int) -> int | None:
        """The local key of pool memory that holds ``nbytes`` at ``address``, or None when it is not ours."""
        at = bisect.bisect_right(self._by_address, address, key=lambda row: row[0]) - 1
        if at < 0:
            return None
        start, slab = self._by_address[at]
        return slab.region.lkey if address + nbytes <= start + slab.nbytes else None

    def pin(self, buffer: object, *, writable: bool) -> Pinned:
        """The address and local key of a user's buffer, registered for as long as the result is not released.

        Raises :class:`MisuseError` for an object that is no contiguous buffer (or is read-only with
        ``writable``), :class:`MemoryLimitError` when it cannot be registered.
        """
        view = export(buffer, writable=writable)
        return self._pin(buffer, view, Access.LOCAL_WRITE if writable else Access.NONE)

    def pin_new_bytes(self, data: bytes) -> Pinned:
        """The same for the device to write into a bytes object of ``new_bytes()``, which nobody else has seen."""
        return self._pin(data, export(data, writable=False), Access.LOCAL_WRITE)

    def _pin(self, buffer: object, view: Any, access: Access) -> Pinned:
        address, nbytes = int(ffi.cast("uintptr_t", view)), len(view)
        lkey = self.find(address, nbytes)
        if lkey is not None:
            return Pinned(address, nbytes, lkey, view, None)
        return self._registered_pin(buffer, view, access)

    def pin_exposed(self, buffer: object, access: Access) -> Pinned:
        """A buffer with a registration of exactly its bytes, for the peer to read: through a window if ``access``
        is MW_BIND, else by the registration's own key. Errors as :meth:`pin`."""
        return self._registered_pin(buffer, export(buffer, writable=False), access)

    def _registered_pin(self, buffer: object, view: Any, access: Access) -> Pinned:
        address, nbytes = int(ffi.cast("uintptr_t", view)), len(view)
        try:
            entry = self._cache.acquire(buffer, address, nbytes, access)
        except BaseException:
            ffi.release(view)
            raise
        return Pinned(address, nbytes, entry.region.lkey, view, entry)

    def register(self, buffer: object) -> Pinned:
        """As :meth:`pin`, for good: registers a writable buffer now and keeps it until ``release()``, so that
        operations on it (or on parts of it) find it registered. It cannot be resized or closed meanwhile."""
        pinned = self.pin(buffer, writable=True)
        if pinned._entry is not None:
            self._cache.explicit.append(pinned._entry)
            pinned._explicit = True
        return pinned

    # --- the end -------------------------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        """A snapshot; sizes in bytes."""
        self._reap_zombies()
        cache = self._cache
        cache.bury()
        return PoolStatistics(
            limit=self._limit,
            registered=self._registered,
            leased=self._leased,
            leases=self._leases,
            slabs=len(self._slabs),
            huge_slabs=sum(slab.huge for slab in self._slabs),
            waiting=sum(not future.done() for future, _ in self._waiters),
            pinned=cache.used_bytes,
            cached=cache.idle_bytes,
            cached_registrations=len(cache),
            cache_hits=cache.hits,
            cache_misses=cache.misses,
        )

    def close(self) -> None:
        """Deregisters everything; whoever waits for memory gets :class:`MisuseError`. Idempotent.

        Memory under a live view stays mapped until the view is gone, but no device can reach it any more.
        """
        if self._closed:
            return
        self._closed = True
        for future, _ in self._waiters:
            if not future.done():
                future.set_exception(MisuseError("the memory pool was closed"))
        self._waiters.clear()
        self._cache.close()
        self._reap_zombies()
        slabs, self._slabs = self._slabs, []
        first: DeviceError | None = None
        for slab in slabs:
            try:
                if slab.idle:
                    slab.close()
                else:
                    slab.retire()
            except DeviceError as error:
                first = first or error
        self._partial.clear()
        self._by_address.clear()
        self._registered = 0
        if first is not None:
            raise first


def _pages(nbytes: int) -> int:
    return round_up(nbytes, PAGE)
