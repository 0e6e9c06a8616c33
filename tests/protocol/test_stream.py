"""How a stream is cut into messages, and what may follow what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiordma.errors import MisuseError, ProtocolError
from aiordma.protocol.stream import StreamReaderState, StreamWriterState

chunks = st.lists(st.binary(min_size=1, max_size=120), max_size=20)


def writer(small: int = 10, large: int = 30, piece: int = 50) -> StreamWriterState:
    return StreamWriterState(small=small, large=large, piece=piece)


def taken(state: StreamWriterState) -> list[bytes]:
    """All messages there are now."""
    messages = []
    while (parts := state.take()) is not None:
        messages.append(b"".join(parts))
    return messages


def test_small_chunks_are_gathered() -> None:
    state = writer()
    for chunk in (b"12", b"345", b"6789abcdef", b"g"):
        state.add(chunk)
    assert state.nbytes == 16
    assert taken(state) == [b"123456789a", b"bcdefg"]
    assert state.nbytes == 0


def test_large_chunks_go_alone_and_in_place() -> None:
    state = writer()
    large = bytes(range(120))
    state.add(b"before")
    state.add(large)
    state.add(b"behind")
    assert taken(state)[:3] == [b"before", large[:50], large[50:100]]
    state.add(large)
    parts = state.take()
    assert parts is not None
    assert parts[0].obj is large


def test_what_is_left_of_a_large_chunk_is_small() -> None:
    state = writer()
    state.add(bytes(60))
    state.add(b"x")
    assert [len(message) for message in taken(state)] == [50, 10, 1]


@given(chunks)
def test_nothing_is_lost_or_turned_around(data: list[bytes]) -> None:
    state = writer()
    messages = []
    for index, chunk in enumerate(data):
        state.add(chunk)
        if index % 3 == 0 and (parts := state.take()):
            messages.append(b"".join(parts))
    messages += taken(state)
    assert b"".join(messages) == b"".join(data)
    assert all(1 <= len(message) <= 50 for message in messages)
    assert state.idle


@given(chunks)
def test_a_large_message_that_cannot_be_is_sent_in_small_ones(data: list[bytes]) -> None:
    state = writer()
    for chunk in data:
        state.add(chunk)
    messages: list[bytes] = []
    while (parts := state.take()) is not None:
        if sum(map(len, parts)) > 10:
            state.only_small(parts)
        else:
            messages.append(b"".join(parts))
    assert b"".join(messages) == b"".join(data)


def test_the_end_comes_once_and_last() -> None:
    state = writer()
    assert state.take() is None
    state.add(b"data")
    state.eof = True
    assert not state.idle
    with pytest.raises(MisuseError):
        state.add(b"more")
    assert taken(state) == [b"data", b""]
    assert state.idle


def test_clear_forgets_the_data_only() -> None:
    state = writer()
    state.add(bytes(100))
    state.eof = True
    state.clear()
    assert state.nbytes == 0
    assert taken(state) == [b""]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (10, 9, 20), (10, 20, 19)])
def test_sizes_that_make_no_sense(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(MisuseError):
        writer(*sizes)


@pytest.mark.parametrize("nbytes", [0, 5])
def test_nothing_follows_the_end(nbytes: int) -> None:
    state = StreamReaderState()
    state.receive(7)
    assert not state.eof
    state.receive(0)
    assert state.eof
    with pytest.raises(ProtocolError):
        state.receive(nbytes)
