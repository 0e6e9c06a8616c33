"""The table of the key-value example, without a device: what readers find, and must not take for a value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_table import (
    DELETED,
    EMPTY,
    INLINE,
    MAX_KEY,
    PROBE,
    ROOM,
    SLOT,
    Entry,
    Heap,
    KvError,
    Store,
    Torn,
    probes,
)

SLOTS = 11


def store(slots: int = SLOTS, value_bytes: int = 1 << 14) -> tuple[Store, bytearray, bytearray]:
    index, values = bytearray(slots * SLOT), bytearray(value_bytes)
    return Store(memoryview(index), memoryview(values)), index, values


def find(index: bytearray, values: bytearray, key: bytes) -> bytes | None:
    """As a client does it: from the memory alone."""
    for start, count in probes(key, len(index) // SLOT):
        for slot in range(start, start + count):
            entry = Entry.unpack(memoryview(index)[slot * SLOT : (slot + 1) * SLOT])
            if entry.kind == EMPTY:
                return None
            if entry.key == key:
                stored = bytes(values[entry.offset : entry.offset + entry.length])
                return entry.value if entry.kind == INLINE else stored
    return None


keys = st.integers(0, SLOTS + 2).map(lambda n: b"key %d" % n)
lengths = st.sampled_from([0, 1, ROOM - 5, ROOM - 4, 300, 1000])


@given(st.lists(st.tuples(keys, st.none() | lengths), max_size=60))
def test_is_a_dictionary(steps: list[tuple[bytes, int | None]]) -> None:
    table, index, values = store(value_bytes=1 << 16)
    model: dict[bytes, bytes] = {}
    for number, (key, length) in enumerate(steps):
        if length is None:
            table.delete(key)
            model.pop(key, None)
        elif key in model or len(model) < SLOTS:
            model[key] = (b"%d " % number * length)[:length]
            table.put(key, model[key])
        else:
            with pytest.raises(KvError, match="the table is full: 11 keys"):
                table.put(key, b"")
        assert {key: find(index, values, key) for key in model} == model
    assert find(index, values, b"never there") is None


@given(st.binary(min_size=1, max_size=MAX_KEY), st.integers(1, 40))
def test_probes_see_every_slot_once(key: bytes, slots: int) -> None:
    runs = list(probes(key, slots))
    assert sorted(slot for start, count in runs for slot in range(start, start + count)) == list(range(slots))
    assert all(1 <= count <= PROBE for _, count in runs)


def test_deleted_slots_at_the_end_of_a_run_are_empty_again() -> None:
    table, index, _ = store()
    for n in range(SLOTS - 1):
        table.put(b"key %d" % n, b"")
    for n in range(SLOTS - 1):
        table.delete(b"key %d" % n)
    kinds = [Entry.unpack(memoryview(index)[slot * SLOT :][:SLOT]).kind for slot in range(SLOTS)]
    assert kinds == [EMPTY] * SLOTS


def mixtures(old: bytes, new: bytes) -> list[bytes]:
    """What a reader may see while ``old`` becomes ``new``: either end first."""
    cuts = range(8, SLOT, 8)
    return [new[:cut] + old[cut:] for cut in cuts] + [old[:cut] + new[cut:] for cut in cuts]


@pytest.mark.parametrize(
    "new", [Entry(INLINE, b"key", b"new value" * 20, 180), Entry(INLINE, b"other", b"", 0), Entry(DELETED)]
)
def test_no_mixture_of_two_versions_passes(new: Entry) -> None:
    before, after = Entry(INLINE, b"key", b"old value" * 20, 180).pack(2), new.pack(4)
    mixed = [raw for raw in mixtures(before, after) if raw not in (before, after)]
    assert len(mixed) > SLOT // 8
    for raw in mixed:
        with pytest.raises(Torn):
            Entry.unpack(memoryview(raw))


def test_no_mixture_passes_where_the_versions_agree() -> None:
    """The bytes between the versions may come in any order: the checksum alone must find it."""
    before, after = Entry(INLINE, b"key", b"old", 3).pack(2), Entry(INLINE, b"key", b"new", 3).pack(4)
    with pytest.raises(Torn):
        Entry.unpack(memoryview(after[:12] + before[12:-8] + after[-8:]))


def test_a_slot_that_is_written_is_torn() -> None:
    raw = bytearray(Entry(INLINE, b"key", b"value", 5).pack(2))
    raw[0] = 3
    with pytest.raises(Torn):
        Entry.unpack(memoryview(raw))


@pytest.mark.parametrize("key", [b"", b"k" * (MAX_KEY + 1)])
def test_keys_are_bounded(key: bytes) -> None:
    table, _, _ = store()
    with pytest.raises(KvError, match="a key has 1 to 64 bytes"):
        table.put(key, b"value")


def test_values_have_room_or_an_error() -> None:
    table, index, values = store(value_bytes=4096)
    table.put(b"a", b"a" * 2048)
    table.put(b"b", b"b" * 2048)
    with pytest.raises(KvError, match="no room for a value of 300 bytes"):
        table.put(b"c", b"c" * 300)
    with pytest.raises(KvError, match="no room for a value of 5000 bytes"):
        table.put(b"c", b"c" * 5000)
    assert find(index, values, b"a") == b"a" * 2048
    table.delete(b"a")
    table.put(b"c", b"c" * 300)
    assert find(index, values, b"c") == b"c" * 300
    assert find(index, values, b"b") == b"b" * 2048


@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=60))
def test_blocks_do_not_overlap(steps: list[tuple[int, bool]]) -> None:
    heap = Heap(1 << 15)
    used: dict[int, int] = {}
    for nbytes, free in steps:
        if free and used:
            offset = next(iter(used))
            heap.free(offset, used.pop(offset))
            continue
        try:
            offset = heap.allocate(nbytes)
        except KvError:
            continue
        assert offset + nbytes <= 1 << 15
        assert all(offset + nbytes <= other or other + size <= offset for other, size in used.items())
        used[offset] = nbytes
