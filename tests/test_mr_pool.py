"""What of the pool needs no device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordma.mr_pool import ALIGNMENT, size_class


@given(st.integers(1, 1 << 40))
def test_size_classes_fit_and_waste_little(nbytes: int) -> None:
    chunk = size_class(nbytes)
    assert chunk >= nbytes
    assert chunk % ALIGNMENT == 0
    assert size_class(chunk) == chunk
    if nbytes >= 8 * ALIGNMENT:
        assert chunk - nbytes <= chunk // 5 + 1


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_size_classes_grow(a: int, b: int) -> None:
    assert (size_class(a) <= size_class(b)) or a > b


def test_memory_counts_its_views() -> None:
    import ctypes

    from aiordma._native._memory import Memory

    backing = ctypes.create_string_buffer(64)
    memory = Memory(ctypes.addressof(backing), 64, backing)
    view = memoryview(memory)
    part = view[8:16]
    part[:] = b"12345678"
    assert (len(memory), memory.nbytes, memory.exports) == (64, 64, 1)
    assert backing.raw[8:16] == b"12345678"
    memory._close_memory()
    with pytest.raises(BufferError):
        memoryview(memory)
    assert memory.exports == 1
    part.release()
    view.release()
    assert memory.exports == 0
    for arguments in ((0, 8), (1, -1)):
        with pytest.raises(ValueError, match="Memory needs"):
            Memory(*arguments)
