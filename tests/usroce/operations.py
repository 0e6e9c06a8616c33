"""Every operation at every size between two processes, on whatever devices they are told to use.

    python -m tests.usroce.operations serve HOST [--device NAME]            prints "listening PORT"
    python -m tests.usroce.operations connect HOST PORT [--device NAME]

First the client is the one that acts, then the server. Each prints "right" at its end, or a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random

import aiordma
from aiordma import Config, Connection, RemoteRegion
from aiordma.errors import ConnectionClosedError

MIB = 1 << 20
SIZES = (1, 63, 1024, 1025, 4096, 4097, 65536, MIB, 16 * MIB)
EAGER = 64 << 10
CONFIG = Config(eager_size=EAGER, receive_credits=8, send_depth=16, ack_timeout=20, mtu=4096)
TIMEOUT = 100.0  # seconds
#: The period is a prime number: a page or packet in the wrong place has the wrong bytes.
BLOCK = random.Random(1).randbytes(65537) * 257


def content(size: int, turn: int = 0) -> bytes:
    """Other bytes for each size and turn."""
    start = 2 * SIZES.index(size) + turn
    return BLOCK[start : start + size]


async def act(connection: Connection) -> None:
    """Does everything to the peer's region, and talks with it."""
    region = await connection.remote("region")
    for size in SIZES:
        await write_and_read(connection, region, size)
    await atomics(connection, region[:8])
    await messages(connection)
    with contextlib.suppress(ConnectionClosedError):  # the peer has it, but its acknowledgement was lost
        await connection.send(b"over")


async def write_and_read(connection: Connection, region: RemoteRegion, size: int) -> None:
    first, second = content(size), content(size, 1)
    await connection.write(first, region[:size])
    assert await connection.read(region[:size]) == first, f"read {size}"
    await connection.write(second, region[:size], notify=size)
    assert await connection.recv() == b"seen"
    buffer = bytearray(size + 1)
    assert await connection.read_into(region[:size], buffer) == size
    assert buffer.startswith(second), f"read_into {size}"
    assert buffer[size] == 0


async def atomics(connection: Connection, word: RemoteRegion) -> None:
    await connection.write(bytes(8), word)
    for number in range(20):
        assert await connection.fetch_add(word, number) == sum(range(number))
    assert await connection.compare_swap(word, 190, 7) == 190
    assert await connection.compare_swap(word, 190, 8) == 7
    async with connection.batch() as batch:
        olds = [batch.fetch_add(word, 1) for _ in range(10)]
    assert [old.result() for old in olds] == list(range(7, 17))


async def messages(connection: Connection) -> None:
    """The peer returns each one, the other way round."""
    for size in SIZES:
        if size <= EAGER:
            await connection.send(content(size))
            assert await connection.recv() == content(size)[::-1], f"message of {size}"
    sends = [connection.send(number.to_bytes(4, "little")) for number in range(50)]
    for number in range(50):
        assert await connection.recv() == number.to_bytes(4, "little")[::-1]
    await asyncio.gather(*sends)


async def suffer(connection: Connection) -> None:
    """The other side of act()."""
    async with connection.allocate(16 * MIB) as lease:
        await connection.share("region", lease)
        with memoryview(lease) as memory:
            for size in SIZES:
                assert await connection.notified() == size
                assert memory[:size] == content(size, 1), f"written {size}"
                await connection.send(b"seen")
        while (message := await connection.recv()) != b"over":
            await connection.send(message[::-1])
        await connection.unshare("region")


async def serve(host: str, device: str | None) -> None:
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handler(connection: Connection) -> None:
        try:
            await suffer(connection)
            await act(connection)
            await connection.wait_closed()
        except BaseException as error:
            over.set_exception(error)
        else:
            over.set_result(None)

    async with aiordma.serve(handler, host, 0, device=device, config=CONFIG) as server:
        print(f"listening {server.port}", flush=True)
        await over


async def connect(host: str, port: int, device: str | None) -> None:
    async with aiordma.connect(host, port, device=device, config=CONFIG) as connection:
        await act(connection)
        await suffer(connection)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.usroce.operations")
    parser.add_argument("role", choices=["serve", "connect"])
    parser.add_argument("host")
    parser.add_argument("port", type=int, nargs="?")
    parser.add_argument("--device")
    options = parser.parse_args()
    async with asyncio.timeout(TIMEOUT):
        if options.role == "serve":
            await serve(options.host, options.device)
        else:
            await connect(options.host, options.port, options.device)
    print("right")


if __name__ == "__main__":
    asyncio.run(main())
