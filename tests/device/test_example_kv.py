"""The key-value example: whole values under concurrent PUTs, and a server that sleeps through the GETs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator

import pytest

import aiordma
from aiordma import Config
from aiordma.verbs import usroce
from kv_store import KvClient, KvServer
from kv_table import INLINE, SLOT, Entry, KvError, probes
from tests.conftest import device_under_test

from .kv_worker import KEYS, make
from .programs import HERE, finish, output, python_and_device, running, served, serving

pytestmark = pytest.mark.device

SOAK = os.environ.get("AIORDMA_SOAK") == "1"
DEADLINE = 3000.0 if SOAK else 110.0  # seconds; the machine may be emulated


def gets_beside_puts() -> int:
    """How many GETs, by two processes, while two others put."""
    if SOAK:
        return 1_000_000
    return 20_000 if device_under_test().is_usroce else 4_000


def quiet_gets() -> int:
    """How many GETs while nobody puts."""
    if SOAK:
        return 100_000
    return 4_000 if device_under_test().is_usroce else 1_000


def test_program() -> None:
    for text in (output("kv_store.py"), served(["kv_store.py", "server"], ["kv_store.py", "client"])):
        assert "100 values put, of up to 891 bytes; read back equal: True" in text
        assert "deleted; read back: None" in text


@pytest.mark.timeout(DEADLINE + 10)
def test_values_are_whole() -> None:
    """Two processes get while two put and delete; the workers check each value that they get."""
    with serving("kv_store.py", "server", "--mode=event", deadline=DEADLINE) as (_, port):
        total = get_and_put(port, gets_beside_puts())
    print(total)
    assert total["gets"] == gets_beside_puts()
    assert total["found"] > total["gets"] // 2
    assert total["puts"] > 0


def get_and_put(port: int, count: int) -> dict[str, int]:
    """Puts go on until the gets are done; the sum of what the workers report."""
    total: dict[str, int] = {}
    with contextlib.ExitStack() as stack:

        def worker(what: str, number: int) -> subprocess.Popen[str]:
            options = what, str(port), str(number)
            return stack.enter_context(running("kv_worker.py", *options, folder=HERE, deadline=DEADLINE))

        finish(worker("fill", 3))
        writers = [worker("put", n) for n in (1, 2)]
        readers = [worker("get", count // 2) for _ in range(2)]
        for process in readers + writers:  # the end of its standard input, which comes last, ends a writer
            for name, value in json.loads(finish(process)).items():
                total[name] = total.get(name, 0) + value
    return total


# --- a sleeping server --------------------------------------------------------------------------------


@pytest.mark.timeout(DEADLINE + 10)
async def test_gets_do_not_wake_the_server(no_leaked_tasks: None) -> None:
    config = Config(mode="event")
    with serving("kv_store.py", "server", "--mode=event", deadline=DEADLINE) as (process, port):
        async with KvClient.connect("127.0.0.1", port, config) as kv:
            for n, key in enumerate(KEYS):
                await kv.put(key, make(key, 1, n, 64 * n + 16))
            python, device = python_and_device(process.pid)
            for n in range(quiet_gets()):
                assert await kv.get(KEYS[n % len(KEYS)])
            python_after, device_after = python_and_device(process.pid)
            direct = sum(usroce.counters(context).direct for context in usroce.contexts())
    # The end of the last PUT may fall behind the first look; a tick (10 ms) may be charged for it.
    assert python_after.sleeps - python.sleeps <= 5
    assert python_after.ticks - python.ticks <= 2
    if device_under_test().is_usroce:  # its thread serves what the client cannot read by itself
        assert direct >= quiet_gets() or device_after.ticks > device.ticks
    else:
        assert device_after == device


# --- one client ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def store_and_client(
    slots: int = 64, value_bytes: int = 1 << 16
) -> AsyncIterator[tuple[KvServer, KvClient]]:
    """Both in this event loop."""
    server = KvServer(slots, value_bytes)
    async with (
        aiordma.serve(server.handler, "127.0.0.1", 0) as listening,
        KvClient.connect("127.0.0.1", listening.port) as kv,
    ):
        yield server, kv
        await server.close()


async def read_again(kv: KvClient, key: bytes) -> asyncio.Task[bytes | None]:
    """A GET that has found something torn, and goes on."""
    task = asyncio.create_task(kv.get(key))
    while kv.torn == 0:
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_what_is_being_written_is_read_again(no_leaked_tasks: None) -> None:
    async with store_and_client() as (server, kv):
        await kv.put(b"key", b"value")
        assert server.store is not None
        start = next(probes(b"key", server.store.slots))[0] * SLOT
        slot = server.store.index[start : start + SLOT]
        whole = bytes(slot)
        slot[:100] = Entry(INLINE, b"key", b"other", 5).pack(4)[:100]
        task = await read_again(kv, b"key")
        slot[:] = whole
        assert await task == b"value"


async def test_a_value_that_went_elsewhere_is_looked_up_again(no_leaked_tasks: None) -> None:
    """Its block is used for another value, between the two reads of a GET."""
    async with store_and_client() as (server, kv):
        await kv.put(b"key", b"a" * 1000)
        assert server.store is not None
        server.store.values[500:1000] = b"b" * 500
        task = await read_again(kv, b"key")
        await kv.put(b"key", b"c" * 1000)
        assert await task == b"c" * 1000


async def test_put_get_delete(no_leaked_tasks: None) -> None:
    async with store_and_client() as (_, kv):
        assert await kv.get(b"key") is None
        for value in (b"", b"short", b"long" * 700, b"short again"):
            await kv.put(b"key", value)
            assert await kv.get(b"key") == value
        await kv.delete(b"key")
        assert await kv.get(b"key") is None
        await kv.delete(b"key")


async def test_full(no_leaked_tasks: None) -> None:
    """An error that says what is full; what is there stays."""
    async with store_and_client(slots=6, value_bytes=4096) as (_, kv):
        await kv.put(b"large", b"x" * 3000)
        with pytest.raises(KvError, match="the store has no room for a value of 2000 bytes"):
            await kv.put(b"too large", b"y" * 2000)
        for n in range(5):
            await kv.put(b"key %d" % n, b"value %d" % n)
        with pytest.raises(KvError, match="the table is full: 6 keys"):
            await kv.put(b"key 5", b"")
        assert await kv.get(b"key 5") is None
        assert [await kv.get(b"key %d" % n) for n in range(5)] == [b"value %d" % n for n in range(5)]
        assert await kv.get(b"large") == b"x" * 3000


@pytest.mark.parametrize("key", [b"", b"k" * 65])
async def test_bad_key(key: bytes, no_leaked_tasks: None) -> None:
    async with store_and_client() as (_, kv):
        with pytest.raises(KvError, match="a key has 1 to 64 bytes"):
            await kv.put(key, b"value")


async def test_cancelled_put(no_leaked_tasks: None) -> None:
    """Its answer is not taken for that of the next."""
    async with store_and_client(slots=1) as (_, kv):
        await kv.put(b"key", b"value")
        task = asyncio.create_task(kv.put(b"does not fit", b""))
        await asyncio.sleep(0)  # it has sent its request, or will not
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await kv.put(b"key", b"another")
        assert await kv.get(b"key") == b"another"
