"""A server whose process a test stops: prints its port, shares `inbox` with whoever comes, receives nothing."""

from __future__ import annotations

import asyncio

import aiordma
from aiordma import Connection


async def handler(connection: Connection) -> None:
    async with connection.allocate(1 << 16) as region:
        await connection.share("inbox", region)
        await connection.wait_closed()


async def main() -> None:
    async with aiordma.serve(handler, "127.0.0.1", 0, device="usroce0") as server:
        print(server.port, flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main())
