"""One of several processes that are all connected with each other and do mixed operations on every connection.

    python -m tests.usroce.mesh EXPECTED

Prints "listening PORT UDP-PORT", reads the ports of those that it is to connect to (a line of JSON), accepts
EXPECTED connections, and prints "done" when everything was right on all of them.
"""

from __future__ import annotations

import asyncio
import json
import sys

import aiordma
from aiordma import Config, Connection
from aiordma.verbs import usroce
from tests.usroce.mixed import Exchange, Plan

OPERATIONS = 500  # of each end of a connection
MAX_SIZE = 16 << 10
CONFIG = Config(eager_size=MAX_SIZE)
PLANS = [Plan.draw(seed, OPERATIONS, MAX_SIZE) for seed in range(2)]


def exchange(connection: Connection, role: int) -> Exchange:
    mine, theirs = PLANS[role], PLANS[1 - role]
    return Exchange(connection, mine, theirs, outstanding=16, max_size=MAX_SIZE)


async def main(expected: int) -> None:
    results: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def handler(connection: Connection) -> None:
        try:
            await exchange(connection, 0).run()
            await connection.wait_closed()
        except BaseException as error:
            results.put_nowait(error)
        else:
            results.put_nowait(None)

    async with aiordma.serve(handler, "127.0.0.1", 0, device="usroce0", config=CONFIG) as server:
        (context,) = usroce.contexts()
        print(f"listening {server.port} {context.port(1).lid}", flush=True)
        peers = json.loads(await asyncio.to_thread(sys.stdin.readline))
        async with asyncio.TaskGroup() as group:
            for port in peers:
                group.create_task(connect(port))
        for _ in range(expected):
            error = await results.get()
            if error is not None:
                raise error
    print("done", flush=True)


async def connect(port: int) -> None:
    async with aiordma.connect("127.0.0.1", port, device="usroce0", config=CONFIG) as connection:
        await exchange(connection, 1).run()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
