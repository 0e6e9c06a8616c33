"""A peer in a process of its own, for tests that kill it: connects, shares `inbox`, receives nothing.

Run as ``python -m tests.device.peer HOST PORT``; prints ``ready`` when the region is announced.
"""

from __future__ import annotations

import asyncio
import sys

import aiordma


async def main(host: str, port: int) -> None:
    async with aiordma.connect(host, port, timeout=60) as connection:
        async with connection.allocate(1 << 20) as region:
            await connection.share("inbox", region)
            print("ready", flush=True)
            await connection.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
