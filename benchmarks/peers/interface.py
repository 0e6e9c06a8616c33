"""What a contestant of benchmarks.messaging provides, and what its server does with a message.

A contestant only carries messages. What is asked, how it is timed and how it is checked is the same for all:
worker.py asks, Desk answers.
"""

from __future__ import annotations

import gc
import random
import struct
import time
from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

Bytes = bytes | bytearray | memoryview

HOST = "127.0.0.1"
#: Bytes of a request and of its answer; of a message that goes one way.
SMALL = 64
LARGE = 1 << 20
#: Requests under way in the scenario of many; blocks that are being sent at a time.
OUTSTANDING = 64
PUSHERS = 8

#: One of so many blocks is compared with what was sent, byte by byte: a thousandth of the time.
_WHOLE = 64
#: The first byte of a request that asks for a report; those that are echoed begin with their number. And the
#: second of one before which garbage is collected: what the set-up has left is not for the timed part.
_REPORT, _TIDY = 0xFF, 0x01
_FIELDS = struct.Struct("<BQQQ")


class Unavailable(Exception):
    """The contestant cannot take part here; the text says why."""


def small_message(number: int) -> bytes:
    """A request that no other task makes; ``number`` is 0 to 254."""
    return bytes([number]) * SMALL


def large_message() -> bytes:
    """The block that is sent one way: the same in both processes, not compressible, no zeros."""
    return random.Random(1).randbytes(LARGE)


@dataclass(frozen=True)
class Report:
    """What the server has seen until now: blocks, how many of them were damaged, processor time of its process."""

    blocks: int
    damaged: int
    cpu_ns: int

    REQUEST = bytes([_REPORT]) * SMALL
    FIRST_REQUEST = bytes([_REPORT, _TIDY]).ljust(SMALL, b"\0")

    def encode(self) -> bytes:
        """An answer of the usual size."""
        return _FIELDS.pack(_REPORT, self.blocks, self.damaged, self.cpu_ns).ljust(SMALL, b"\0")

    @classmethod
    def decode(cls, answer: Bytes) -> Report:
        """The counterpart of :meth:`encode`."""
        _, blocks, damaged, cpu_ns = _FIELDS.unpack_from(answer)
        return cls(blocks, damaged, cpu_ns)


class Desk:
    """The server's work: small messages go back, blocks are counted, looked at and dropped."""

    def __init__(self) -> None:
        self._block = large_message()
        self._head, self._tail = self._block[:8], self._block[-8:]
        self._blocks = 0
        self._damaged = 0

    def answer(self, message: Bytes) -> Bytes | None:
        """What goes back, or None."""
        if len(message) > SMALL:
            self._take(message)
            return None
        if message[0] != _REPORT:
            return message
        if message[1] == _TIDY:
            gc.collect()
        return self._report()

    def _take(self, block: Bytes) -> None:
        """Looks at both ends of every block, and at all of the first one and of a few more. None is kept."""
        good = len(block) == LARGE and block[:8] == self._head and block[-8:] == self._tail
        if self._blocks % _WHOLE == 0:
            good = good and bytes(block) == self._block
        self._blocks += 1
        self._damaged += not good

    def _report(self) -> bytes:
        return Report(self._blocks, self._damaged, time.process_time_ns()).encode()


class Client(ABC):
    """One connection to the server."""

    @abstractmethod
    async def request(self, data: bytes) -> Bytes:
        """Sends a small message and returns its answer. As many tasks at a time as it was made for."""

    @abstractmethod
    async def push(self, block: bytes) -> None:
        """Sends a block. Returns when the next one may be sent: the transport's own limit of what is under way."""


class Peer(ABC):
    """A contestant, in the server's process or in the client's. Raises :class:`Unavailable` when it is made."""

    @abstractmethod
    def serve(self, desk: Desk) -> AbstractAsyncContextManager[int]:
        """Lets ``desk`` answer every message of any number of connections. The value is the port."""

    @abstractmethod
    def connect(self, port: int, outstanding: int) -> AbstractAsyncContextManager[Client]:
        """A client for at most ``outstanding`` requests at a time."""

    def versions(self) -> dict[str, str]:
        """Of what it is made of, by name."""
        return {}
