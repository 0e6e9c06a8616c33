"""A byte stream as messages: what a stream end says, and how it cuts what is to be sent.

Every message but one is a piece of the stream, in order; an empty one is its end, and nothing comes after it.
Both ends offer the feature ``stream`` in their handshakes and accept no peer without it, so that a stream and a
user of messages never talk past each other.

The cutting: neighbouring small chunks are gathered into messages of at most ``small`` bytes; a chunk of ``large``
bytes or more goes alone, in pieces of at most ``piece``, so that it can be moved in place and what a receiver
has to hold at a time stays bounded.
"""

from __future__ import annotations

import sys
from collections import deque

from ..errors import MisuseError, ProtocolError

FEATURE = "stream"


class StreamWriterState:
    """Chunks of the stream that were not sent yet, and whether its end was asked for."""

    def __init__(self, *, small: int, large: int, piece: int) -> None:
        if not 1 <= small <= large <= piece:
            raise MisuseError(f"sizes of messages: 1 <= {small} <= {large} <= {piece} is due")
        self._small = small
        self._large = large
        self._piece = piece
        self._chunks: deque[memoryview] = deque()
        self.nbytes = 0
        self.eof = False  # the end was asked for; nothing may be added any more
        self.eof_taken = False

    def add(self, data: bytes | memoryview) -> None:
        """Adds a chunk, of at least one byte, that must not change. Raises :class:`MisuseError` after the end."""
        if self.eof:
            raise MisuseError("the end of the stream was written already")
        view = memoryview(data)
        self._chunks.append(view)
        self.nbytes += len(view)

    @property
    def idle(self) -> bool:
        """True when there is nothing to take."""
        return not self._chunks and self.eof == self.eof_taken

    def take(self) -> list[memoryview] | None:
        """The parts of the next message; no parts are the end of the stream, None is nothing to send."""
        if self._chunks:
            parts = self._take_large() if len(self._chunks[0]) >= self._large else self._take_small()
            self.nbytes -= sum(map(len, parts))
            return parts
        if self.eof and not self.eof_taken:
            self.eof_taken = True
            return []
        return None

    def _take_large(self) -> list[memoryview]:
        return [self._cut(self._piece)]

    def _take_small(self) -> list[memoryview]:
        parts = []
        room = self._small
        while self._chunks and room and len(self._chunks[0]) < self._large:
            parts.append(self._cut(room))
            room -= len(parts[-1])
        return parts

    def _cut(self, room: int) -> memoryview:
        """The first chunk, or as much of it as there is room for."""
        chunk = self._chunks[0]
        if len(chunk) <= room:
            return self._chunks.popleft()
        self._chunks[0] = chunk[room:]
        return chunk[:room]

    def only_small(self, parts: list[memoryview]) -> None:
        """The message of these parts could not be sent as a large one: they are next again, and there are no large
        messages any more."""
        self._large = sys.maxsize
        self._chunks.extendleft(reversed(parts))
        self.nbytes += sum(map(len, parts))

    def clear(self) -> None:
        """Forgets what was not sent."""
        self._chunks.clear()
        self.nbytes = 0


class StreamReaderState:
    """Whether the peer's stream has ended."""

    def __init__(self) -> None:
        self.eof = False

    def receive(self, nbytes: int) -> None:
        """A message of that length came. Raises :class:`ProtocolError` for one after the end."""
        if self.eof:
            raise ProtocolError("the peer sent more after the end of its stream")
        self.eof = not nbytes
