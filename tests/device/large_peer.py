"""A peer in a process of its own that sends and receives a large message at once.

Run as ``python -m tests.device.large_peer HOST PORT once|loop NBYTES``; ``once`` prints the digests and the peak
of its memory beyond what it had when it was connected, in bytes; ``loop`` goes on until it is killed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy

import aiordma


def digest(data: Any) -> str:
    return hashlib.blake2b(data).hexdigest()


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


async def once(connection: aiordma.Connection, nbytes: int) -> None:
    before = memory("VmRSS")
    data = numpy.random.default_rng(2).integers(0, 256, nbytes, "u1")
    buffer = bytearray(nbytes)
    received, _ = await asyncio.gather(connection.recv_into(buffer), connection.send(data))
    peak = memory("VmHWM") - before
    assert received == nbytes
    print(json.dumps({"received": digest(buffer), "sent": digest(data), "peak": peak}))


async def loop(connection: aiordma.Connection, nbytes: int) -> None:
    data = bytes(nbytes)
    while True:
        await asyncio.gather(connection.recv(), connection.send(data))


async def main(host: str, port: int, what: str, nbytes: int) -> None:
    async with aiordma.connect(host, port, timeout=60) as connection:
        await {"once": once, "loop": loop}[what](connection, nbytes)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
