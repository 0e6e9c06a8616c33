"""The memory of kv_store.py: a hash table that one process writes and any number read, without a lock.

The table is an array of slots, with open addressing: a key is in one of the slots from its hash on, before the
first empty one. A value too long for its slot is in the second region, and never overwritten there while the slot
points to it. A remote read is atomic for no more than 8 bytes, so what was read may be torn: half old, half new.
A version before and after each slot, odd while it is written, shows most of that, but relies on the order in which
two machines touch memory; the checksums rely on nothing.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

SLOT = 256  # bytes: head, key, value if it fits, version again
PROBE = 4  # slots of one read
MAX_KEY = 64
#: Version, checksum, kind, length of the key; length, checksum and offset of the value.
HEAD = struct.Struct("<QIBBxxIIQ")
CHECKED = 12  # where the bytes begin that the checksum covers
TAIL = struct.Struct("<Q")  # version
ROOM = SLOT - HEAD.size - TAIL.size  # for the key and a value beside it
EMPTY, DELETED, INLINE, STORED = range(4)


class KvError(Exception):
    """A request that cannot be done: a key out of bounds, a full store."""


def check_key(key: bytes) -> None:
    """Raises :class:`KvError`."""
    if not 1 <= len(key) <= MAX_KEY:
        raise KvError(f"a key has 1 to {MAX_KEY} bytes, not {len(key)}")


class Torn(Exception):
    """It was written while it was read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a slot holds. An INLINE value lies in the slot, a STORED one at ``offset`` among the values."""

    kind: int = EMPTY
    key: bytes = b""
    value: bytes = b""  # INLINE
    length: int = 0
    checksum: int = 0  # STORED: of the value
    offset: int = 0

    def pack(self, version: int) -> bytes:
        """The bytes of the slot."""
        head = HEAD.pack(version, 0, self.kind, len(self.key), self.length, self.checksum, self.offset)
        body = head[CHECKED:] + (self.key + self.value).ljust(ROOM, b"\0")
        checksum = zlib.crc32(body, version & 0xFFFFFFFF)
        return head[:8] + checksum.to_bytes(4, "little") + body + TAIL.pack(version)

    @classmethod
    def unpack(cls, raw: memoryview) -> Entry:
        """The entry in a slot. Raises :class:`Torn`."""
        version, checksum, kind, key_length, length, value_checksum, offset = HEAD.unpack_from(raw)
        if version == 0:
            return UNUSED
        if version % 2 or TAIL.unpack_from(raw, SLOT - TAIL.size)[0] != version:
            raise Torn
        if zlib.crc32(raw[CHECKED : -TAIL.size], version & 0xFFFFFFFF) != checksum:
            raise Torn
        end = HEAD.size + key_length
        value = bytes(raw[end : end + length]) if kind == INLINE else b""
        return cls(kind, bytes(raw[HEAD.size : end]), value, length, value_checksum, offset)


UNUSED = Entry()


def probes(key: bytes, slots: int) -> Iterator[tuple[int, int]]:
    """Where a key may be, in order: runs of slots (first, count), from its hash on and around."""
    home = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % slots
    for first, end in ((home, slots), (0, home)):
        for start in range(first, end, PROBE):
            yield start, min(PROBE, end - start)


class Heap:
    """Offsets of blocks in the value region, in sizes of powers of two. A block is split when no smaller one is
    left, and never merged. What is freed is used again as late as can be, so that few readers find it changed."""

    SMALLEST = 8  # 2**8 bytes

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._used = 0  # never handed out from here on
        self._free: list[deque[int]] = [deque() for _ in range(nbytes.bit_length())]

    def allocate(self, nbytes: int) -> int:
        """Raises :class:`KvError` when there is no room."""
        order = self._order(nbytes)
        for larger in range(order, len(self._free)):
            if self._free[larger]:
                offset = self._free[larger].popleft()
                for half in range(order, larger):
                    self._free[half].append(offset + (1 << half))
                return offset
        if self._used + (1 << order) > self._nbytes:
            raise KvError(f"the store has no room for a value of {nbytes} bytes")
        self._used += 1 << order
        return self._used - (1 << order)

    def free(self, offset: int, nbytes: int) -> None:
        """Takes back what allocate() gave for ``nbytes``."""
        self._free[self._order(nbytes)].append(offset)

    def _order(self, nbytes: int) -> int:
        return max((nbytes - 1).bit_length(), self.SMALLEST)


class Store:
    """The table in memory that others read at any moment; only this object writes it."""

    def __init__(self, index: memoryview, values: memoryview) -> None:
        self.slots = len(index) // SLOT
        self.index = index
        self.values = values
        self._heap = Heap(len(values))

    def put(self, key: bytes, value: bytes) -> None:
        """Sets a value. Raises :class:`KvError`."""
        slot, old = self._find(key)
        if slot is None:
            raise KvError(f"the table is full: {self.slots} keys")
        if len(key) + len(value) <= ROOM:
            self._write(slot, Entry(INLINE, key, value, len(value)))
        else:  # the old value stays until the slot points to the new one
            offset = self._heap.allocate(len(value))
            self.values[offset : offset + len(value)] = value
            self._write(slot, Entry(STORED, key, b"", len(value), zlib.crc32(value), offset))
        self._discard(old)

    def delete(self, key: bytes) -> None:
        """Removes a value, if there is one. A search must go on beyond its slot; where there is nothing beyond,
        the slot is empty again, and so are deleted ones before it."""
        slot, old = self._find(key)
        if slot is None or old is UNUSED:
            return
        self._write(slot, Entry(DELETED))
        self._discard(old)
        while self._read(slot).kind == DELETED and self._read((slot + 1) % self.slots).kind == EMPTY:
            self._write(slot, UNUSED)
            slot = (slot - 1) % self.slots

    def _discard(self, old: Entry) -> None:
        if old.kind == STORED:
            self._heap.free(old.offset, old.length)

    def _find(self, key: bytes) -> tuple[int | None, Entry]:
        """The slot of a key and what is there; else UNUSED, and the slot to put it in if there is one."""
        check_key(key)
        unused: int | None = None
        for start, count in probes(key, self.slots):
            for slot in range(start, start + count):
                entry = self._read(slot)
                if entry.key == key:
                    return slot, entry
                if unused is None and entry.kind in (EMPTY, DELETED):
                    unused = slot
                if entry.kind == EMPTY:
                    return unused, UNUSED
        return unused, UNUSED

    def _read(self, slot: int) -> Entry:
        return Entry.unpack(self.index[slot * SLOT : (slot + 1) * SLOT])

    def _write(self, slot: int, entry: Entry) -> None:
        view = self.index[slot * SLOT : (slot + 1) * SLOT]
        version = TAIL.unpack_from(view)[0]
        raw = entry.pack(version + 2)
        view[:8] = TAIL.pack(version + 1)
        view[8:] = raw[8:]
        view[:8] = raw[:8]
