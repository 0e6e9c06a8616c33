"""A program that uses the locks of the examples.

lock_worker.py count PORT FILE TIMES   counts in a file under lock 1, and prints the numbers it drew as JSON
lock_worker.py hold PORT               takes lock 2, prints the token, and keeps the lock until it is killed
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from locks import LockClient


async def count(locks: LockClient, path: Path, times: int) -> None:
    """Reads and writes the file in two steps, with others in between were it not for the lock."""
    numbers = []
    for _ in range(times):
        async with locks.hold(1) as token:
            value, last = map(int, path.read_text().split())
            assert token > last, f"token {token} after {last}"
            numbers.append(await locks.draw())
            path.write_text(f"{value + 1} {token}")
    print(json.dumps(numbers), flush=True)


async def main(what: str, port: str, *options: str) -> None:
    async with LockClient.connect("127.0.0.1", int(port)) as locks:
        if what == "count":
            await count(locks, Path(options[0]), int(options[1]))
        else:
            print(await locks.acquire(2), flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
