"""The lock and sequencer example: one holder at a time, in order, also when holders die."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import locks
from aiordma import Config
from aiordma.errors import ConnectionLostError
from locks import LockClient, LockLostError

from .programs import HERE, finish, output, python_and_device, running, served, serving

pytestmark = pytest.mark.device

WORKERS, TIMES = 3, 20


@pytest.mark.parametrize("both", [True, False])
def test_program(both: bool) -> None:
    text = output("locks.py") if both else served(["locks.py", "server"], ["locks.py", "client"])
    assert "3 clients drew 156 numbers, all different: True" in text
    turns = text.split("under the lock: ")[1].strip().split(", ")
    owners = [turn.split()[0] for turn in turns[::2]]
    assert sorted(owners) == ["1", "1", "2", "2", "3", "3"]
    lines = [(f"{owner} in with {token}", f"{owner} out") for token, owner in enumerate(owners, 1)]
    assert turns == [turn for line in lines for turn in line]


def test_processes_count_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0 0")
    options = str(path), str(TIMES)
    with serving("locks.py", "server") as (_, port), contextlib.ExitStack() as stack:
        worker = [
            running("lock_worker.py", "count", str(port), *options, folder=HERE) for _ in range(WORKERS)
        ]
        processes = [stack.enter_context(process) for process in worker]
        numbers = [json.loads(finish(process)) for process in processes]
    assert path.read_text().split() == [str(WORKERS * TIMES)] * 2
    assert sorted(itertools.chain(*numbers)) == list(range(WORKERS * TIMES))


async def test_a_killed_holder_loses_the_lock(no_leaked_tasks: None) -> None:
    with (
        serving("locks.py", "server") as (_, port),
        running("lock_worker.py", "hold", str(port), folder=HERE) as holder,
    ):
        assert holder.stdout is not None
        token = int(holder.stdout.readline())
        async with LockClient.connect("127.0.0.1", port) as client:
            waiting = asyncio.create_task(client.acquire(2))
            async with client.hold(3):
                pass
            assert not waiting.done()
            holder.kill()
            assert await waiting == token + 1


async def test_a_free_lock_does_not_wake_the_server(no_leaked_tasks: None) -> None:
    with serving("locks.py", "server", "--mode=event") as (process, port):
        async with LockClient.connect("127.0.0.1", port, Config(mode="event")) as client:
            async with client.hold(0):
                before = python_and_device(process.pid)[0]
            for _ in range(200):
                async with client.hold(0):
                    await client.draw()
            after = python_and_device(process.pid)[0]
    assert after.sleeps - before.sleeps <= 5


# --- in one event loop --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def clients(count: int) -> AsyncIterator[list[LockClient]]:
    async with contextlib.AsyncExitStack() as stack:
        args = Namespace(host="127.0.0.1", port=0)
        port = await stack.enter_async_context(locks.serving(args, Config()))
        connect = [LockClient.connect("127.0.0.1", port) for _ in range(count)]
        yield [await stack.enter_async_context(client) for client in connect]


async def test_in_the_order_of_arrival(no_leaked_tasks: None) -> None:
    async with clients(5) as (first, *others):
        order: list[int] = []

        async def take(n: int, client: LockClient) -> None:
            async with client.hold(0) as token:
                order.append(n)
                assert token == n + 2

        async with first.hold(0):
            tasks = []
            for n, client in enumerate(others):
                tasks.append(asyncio.create_task(take(n, client)))
                while not client.waiting(0):
                    await asyncio.sleep(0)
                await client.draw()  # its message has arrived, too
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]


async def test_tasks_of_one_client(no_leaked_tasks: None) -> None:
    async with clients(1) as (client,):
        inside = 0

        async def take() -> None:
            nonlocal inside
            async with client.hold(0):
                inside += 1
                await client.draw()
                assert inside == 1
                inside -= 1

        await asyncio.gather(*(take() for _ in range(10)))


async def test_cancelled_while_waiting(no_leaked_tasks: None) -> None:
    """It gets the lock all the same, and gives it back."""
    async with clients(3) as (first, second, third):
        async with first.hold(0):
            waiting = asyncio.create_task(second.acquire(0))
            while not second.waiting(0):
                await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with third.hold(0) as token:
            assert token == 3


async def test_cancelled_at_every_step(no_leaked_tasks: None) -> None:
    """Wherever an acquire or release is cut off, the lock is free in the end."""
    async with clients(2) as (first, second):

        async def take() -> None:
            async with first.hold(0):
                pass

        for steps in range(12):
            task = asyncio.create_task(take())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            async with asyncio.timeout(20), second.hold(0):
                pass


async def test_given_back_twice(no_leaked_tasks: None) -> None:
    async with clients(1) as (client,):
        token = await client.acquire(5)
        await client.release(5, token)
        with pytest.raises(LockLostError, match="lock 5, token 1"):
            await client.release(5, token)


async def test_the_server_dies(no_leaked_tasks: None) -> None:
    """Who waits is told."""
    with serving("locks.py", "server") as (process, port):
        async with (
            LockClient.connect("127.0.0.1", port) as first,
            LockClient.connect("127.0.0.1", port) as second,
        ):
            await first.acquire(0)
            waiting = asyncio.create_task(second.acquire(0))
            while not second.waiting(0):
                await asyncio.sleep(0)
            process.kill()
            with pytest.raises(ConnectionLostError):
                await waiting
