"""A program that works on the key-value store of the examples, with values that tell whether they are whole.

    kv_worker.py fill PORT WRITER     puts every key once
    kv_worker.py put PORT WRITER      puts and deletes until its standard input ends; prints how often
    kv_worker.py get PORT COUNT       gets that often, checks every value, and prints what it found as JSON

A value follows from its key, writer, sequence number and length, all of which it begins with: of two values no
mixture passes. What one writer puts under a key is never found after what it put there later.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import struct
import sys

from kv_store import KvClient

KEYS = [b"key %d" % n for n in range(48)]
HEAD = struct.Struct("<IQI")  # writer, sequence, length
GETS_AT_ONCE = 4
LONGEST = 30_000


def make(key: bytes, writer: int, sequence: int, length: int) -> bytes:
    """The value of ``length`` bytes."""
    head = HEAD.pack(writer, sequence, length)
    digest = hashlib.blake2b(key + head, digest_size=32).digest()
    return (head + digest * (length // len(digest) + 1))[:length]


def sequence_of(key: bytes, value: bytes) -> tuple[int, int]:
    """Writer and sequence number of a value that must be whole."""
    writer, sequence, length = HEAD.unpack_from(value)
    assert value == make(key, writer, sequence, length), f"a torn value of {key!r}"
    return writer, sequence


async def fill(kv: KvClient, writer: int) -> dict[str, int]:
    """What is found before anybody has put anything else."""
    for key in KEYS:
        await kv.put(key, make(key, writer, 1, 100))
    return {"puts": len(KEYS)}


async def put(kv: KvClient, writer: int) -> dict[str, int]:
    """Values that lie in their slots, and longer ones; some are deleted."""
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    choose = random.Random(writer)
    sequence = 0
    while not ended.done():
        sequence += 1
        key = choose.choice(KEYS)
        if sequence % 16 == 0:
            await kv.delete(key)
        else:
            length = choose.randint(16, choose.choice((200, 3000, LONGEST)))
            await kv.put(key, make(key, writer, sequence, length))
    return {"puts": sequence}


async def get(kv: KvClient, count: int) -> dict[str, int]:
    """A few GETs at a time, each in a sequence of its own."""
    found = sum(
        await asyncio.gather(*(get_in_turn(kv, n, count // GETS_AT_ONCE) for n in range(GETS_AT_ONCE)))
    )
    return {"gets": count // GETS_AT_ONCE * GETS_AT_ONCE, "found": found, "torn": kv.torn}


async def get_in_turn(kv: KvClient, seed: int, count: int) -> int:
    choose = random.Random(seed)
    seen: dict[tuple[bytes, int], int] = {}
    found = 0
    for _ in range(count):
        key = choose.choice(KEYS)
        value = await kv.get(key)
        if value is not None:
            writer, sequence = sequence_of(key, value)
            assert sequence >= seen.get((key, writer), 0), f"an older value of {key!r} came back"
            seen[key, writer] = sequence
            found += 1
    return found


WORK = {"fill": fill, "put": put, "get": get}


async def main(what: str, port: str, number: str) -> None:
    async with KvClient.connect("127.0.0.1", int(port)) as kv:
        print(json.dumps(await WORK[what](kv, int(number))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
