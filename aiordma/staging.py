"""Staging buffers: registered memory that small data passes through, shared by all connections of a device.

A work request takes a buffer when it is posted and gives it back at its completion, so an idle connection holds
none. Buffers are of one size (a pool for each size that connections use) and come in chunks leased from the memory
pool, up to a quarter of it. When there is none and no room for another chunk, the send queue that asks joins a
line; each buffer that comes back goes to the first in line. That line always moves: the pool keeps at least one
chunk, and a buffer that is out is with the device, which hands it back, or goes down with its queue pair.

Data that travels inline is read by the device while it is being posted, so it needs no registered memory: it is
put together in the scratch, one place for each work request of a doorbell.
"""

from __future__ import annotations

import mmap
from collections import Counter
from typing import Any, Protocol

from ._native import ffi
from .errors import DeviceError, MemoryLimitError
from .mr_pool import ALIGNMENT, Lease, MemoryPool, round_up

#: Bytes leased at a time.
_CHUNK = 64 << 10
#: Bytes kept when nobody uses them: what is beyond goes back to the memory pool.
_KEEP = 512 << 10
#: The part of the memory pool's limit that staging buffers of one size may take.
_SHARE = 4
#: Places in the scratch: work requests posted with one call.
SCRATCH_PLACES = 64


class StagingUser(Protocol):
    """Who waits for a buffer."""

    def staging_ready(self) -> None:
        """It is your turn to take one."""


class Place:
    """Memory that a work request is put together in."""

    __slots__ = ("address", "lkey", "view")

    def __init__(self, address: int, lkey: int, view: memoryview) -> None:
        self.address = address
        self.lkey = lkey
        self.view = view


class StagingBuffer(Place):
    """A place in registered memory."""

    __slots__ = ("chunk",)

    def __init__(self, chunk: _Chunk, address: int, lkey: int, view: memoryview) -> None:
        super().__init__(address, lkey, view)
        self.chunk = chunk


class _Chunk:
    """A lease, cut into buffers."""

    __slots__ = ("buffers", "lease", "view")

    def __init__(self, lease: Lease, size: int, stride: int) -> None:
        self.lease = lease
        self.view = memoryview(lease)
        self.buffers = [
            StagingBuffer(self, lease.address + at, lease.lkey, self.view[at : at + size])
            for at in range(0, lease.nbytes, stride)
        ]

    def close(self) -> None:
        """Gives the lease back."""
        for buffer in self.buffers:
            buffer.view.release()
        self.view.release()
        self.lease.release_nowait()


class StagingPool:
    """Buffers of ``size`` bytes for every send queue that asks for this size. Belongs to one event loop.

    With :attr:`free`, :attr:`line` and :attr:`keep` the datapath does by itself what most calls of :meth:`take`
    and :meth:`give` come to (native/datapath/send.c): the last one out of the list, or to its end.
    """

    def __init__(self, memory: MemoryPool, size: int) -> None:
        self.size = size
        self._memory = memory
        self._stride = round_up(size, ALIGNMENT)
        self._count = max(1, _CHUNK // self._stride)  # buffers in a chunk
        self._chunk = self._count * self._stride  # its bytes
        self._chunks: list[_Chunk] = []
        self.keep = max(self._count, _KEEP // self._stride)  # free ones, whatever happens
        self.free: list[StagingBuffer] = []
        self.line: dict[StagingUser, None] = {}  # who waits, in order of arrival
        self._turn: StagingUser | None = None
        self._given = 0  # since the last look for chunks that are too many
        self._users = 0

    @property
    def registered(self) -> int:
        """Bytes of registered memory it holds."""
        return sum(chunk.lease.nbytes for chunk in self._chunks)

    @property
    def waiting(self) -> int:
        """How many send queues wait for a buffer."""
        return len(self.line)

    # --- who is here ---------------------------------------------------------------------------------

    async def join(self) -> None:
        """One user more; waits until there is a chunk. Raises :class:`MemoryLimitError`."""
        if not self._chunks:
            self._add(await self._memory.acquire(self._chunk))
        self._users += 1

    def leave(self) -> None:
        """One user less, who has given back all it took. The last one takes the memory along."""
        self._users -= 1
        if self._users == 0:
            chunks, self._chunks = self._chunks, []
            self.free.clear()
            for chunk in chunks:
                chunk.close()

    # --- buffers -------------------------------------------------------------------------------------

    def take(self, user: StagingUser) -> StagingBuffer | None:
        """A buffer; or None, and ``user`` stands in line from now on (if it did not before)."""
        if (self.line and self._turn is not user) or not (self.free or self._grow()):
            self.line[user] = None
            return None
        return self.free.pop()

    def give(self, buffer: StagingBuffer) -> None:
        """The buffer is no longer used; the first in line gets its turn."""
        self.free.append(buffer)
        if self.line:
            self._serve()
            return
        self._given += 1
        if self._given >= self._count and len(self.free) > self.keep:
            self._given = 0
            self._shrink()

    def _serve(self) -> None:
        while self.free and self.line:
            user = next(iter(self.line))
            del self.line[user]
            self._turn = user
            try:
                user.staging_ready()
            finally:
                self._turn = None

    def forget(self, user: StagingUser) -> None:
        """``user`` wants no buffer any more."""
        self.line.pop(user, None)

    def _grow(self) -> bool:
        if (len(self._chunks) + 1) * self._chunk > self._memory.limit // _SHARE:
            return False
        try:
            self._add(self._memory.acquire_nowait(self._chunk))
        except (MemoryLimitError, DeviceError):
            return False
        return True

    def _add(self, lease: Lease) -> None:
        chunk = _Chunk(lease, self.size, self._stride)
        self._chunks.append(chunk)
        self.free.extend(chunk.buffers)

    def _shrink(self) -> None:
        """Gives back the chunks of which nothing is used, but for those that are kept."""
        free = Counter(buffer.chunk for buffer in self.free)
        for chunk, count in free.items():
            if count == len(chunk.buffers) and len(self.free) - count >= self.keep:
                self._chunks.remove(chunk)
                self.free[:] = [buffer for buffer in self.free if buffer.chunk is not chunk]
                chunk.close()


class Scratch:
    """Unregistered memory for inline data: ``SCRATCH_PLACES`` places of ``size`` bytes.

    What is written there is the device's business only until the call that posts it returns.
    """

    __slots__ = ("_map", "_view", "places")

    def __init__(self, size: int) -> None:
        stride = max(ALIGNMENT, round_up(size, ALIGNMENT))
        self._map = mmap.mmap(-1, SCRATCH_PLACES * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view: Any = ffi.from_buffer(self._map, require_writable=True)
        base = int(ffi.cast("uintptr_t", self._view))
        view = memoryview(self._map)
        self.places = [
            Place(base + at, 0, view[at : at + stride]) for at in range(0, SCRATCH_PLACES * stride, stride)
        ]


__all__ = ["SCRATCH_PLACES", "Place", "Scratch", "StagingBuffer", "StagingPool", "StagingUser"]
