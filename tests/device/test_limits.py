"""Limits of the machine, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import aiordma
from aiordma import Config, Server
from tests.conftest import open_fds
from tests.device.conftest import Acceptor

pytestmark = pytest.mark.device

Listen = Callable[..., Awaitable[tuple[Server, Acceptor]]]

CONNECT_UNDER_A_LIMIT = """
import asyncio, aiordma
async def main():
    async with aiordma.serve(lambda connection: connection.wait_closed(), "127.0.0.1", 0) as server:
        await aiordma.connect("127.0.0.1", server.port, timeout=60)
try:
    asyncio.run(main())
except aiordma.errors.RdmaError as error:
    print(type(error).__name__, error)
"""


def test_memlock_too_low_names_limit_need_and_fix() -> None:
    """Without CAP_IPC_LOCK, as an ordinary user is. usroce pins nothing, but acts like who does when told to."""
    for tool in ("prlimit", "setpriv"):
        assert shutil.which(tool), f"{tool} (util-linux) is needed"
    drop = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"] if os.geteuid() == 0 else []
    done = subprocess.run(
        ["prlimit", "--memlock=65536:65536", *drop, sys.executable, "-c", CONNECT_UNDER_A_LIMIT],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "AIORDMA_USROCE_MEMLOCK": "1"},
        check=False,
    )
    said = done.stdout + done.stderr
    assert "MemoryLimitError" in said, said
    assert "65536 bytes" in said, "the limit"
    assert str(Config().slab_size) in said, "the need"
    assert "ulimit -l" in said, "the fix"


FILES_UNDER_A_LIMIT = """
import asyncio, errno, sys, aiordma
problems = []
async def main():
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context["exception"])))
    async with aiordma.serve(lambda connection: connection.wait_closed(), "127.0.0.1", 0) as server:
        connections = []
        try:
            while True:
                connections.append(await aiordma.connect("127.0.0.1", server.port, timeout=60))
        finally:
            # Those that are there work on: both descriptors of a connection are this process's.
            await connections[0].send(b"still here")
            for connection in connections:
                connection.close()
            await asyncio.gather(*[connection.wait_closed() for connection in connections])
            print(len(connections), problems)
try:
    asyncio.run(main())
except (aiordma.errors.BootstrapError, OSError) as error:
    print(type(error).__name__, error)
"""


def test_too_few_descriptors_name_limit_and_fix() -> None:
    done = subprocess.run(
        ["prlimit", "--nofile=80:90", sys.executable, "-c", FILES_UNDER_A_LIMIT],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    said = done.stdout + done.stderr
    assert "no file descriptors left" in said, said
    assert "may have 80 (hard limit 90)" in said, "the limit, in the server's log"
    assert "LimitNOFILE" in said, "the fix"
    assert said.count("no more") == 1, "said once"


# On one loop only, because it is long.
@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.timeout(900)
async def test_a_thousand_connections_leave_nothing(listen: Listen) -> None:
    server, acceptor = await listen()

    async def come_and_go() -> None:
        async with aiordma.connect("127.0.0.1", server.port, timeout=60) as client:
            await client.send(b"hello")
            assert await (await acceptor.accepted.get()).recv() == b"hello"

    for _ in range(3):
        await come_and_go()
    while server.connections:
        await asyncio.sleep(0)
    adapter = server._route.adapter  # type: ignore[union-attr]
    pool, fds, tasks = adapter.pool.statistics(), len(open_fds()), len(asyncio.all_tasks())
    threads = len(os.listdir("/proc/self/task"))
    posted = adapter.reactor.statistics().pending  # receives that the server's connections share
    objects = kernel_objects()
    for _ in range(1000):
        await come_and_go()
    while server.connections:
        await asyncio.sleep(0)
    assert adapter.pool.statistics() == pool
    assert len(open_fds()) == fds
    assert len(asyncio.all_tasks()) == tasks
    assert len(os.listdir("/proc/self/task")) == threads
    assert kernel_objects() == objects
    assert adapter.reactor.statistics().pending == posted


def kernel_objects() -> str:
    """Queue pairs, completion queues, regions and domains the kernel holds for all of us (rdma-resource(8))."""
    if shutil.which("rdma") is None or not Path("/sys/class/infiniband").is_dir():
        return ""
    return subprocess.run(
        ["rdma", "resource", "show"], capture_output=True, text=True, check=True, timeout=30
    ).stdout


async def test_used_in_another_loop_or_after_fork(listen: Listen) -> None:
    server, acceptor = await listen()
    async with aiordma.connect("127.0.0.1", server.port) as client:
        await acceptor.accepted.get()

        def in_another_thread() -> str:
            async def use() -> None:
                await client.send(b"from another loop")

            try:
                asyncio.run(use())
            except aiordma.errors.WrongLoopError as error:
                return str(error)
            return "no error"

        said = await asyncio.get_running_loop().run_in_executor(None, in_another_thread)
        assert "event loop" in said
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                client._qp.check_open()
                said = "no error"
            except aiordma.errors.WrongLoopError as error:
                said = str(error)
            os.write(write_end, said.encode())
            os._exit(0)
        os.close(write_end)
        os.waitpid(child, 0)
        assert b"fork" in os.read(read_end, 1000)
        os.close(read_end)
        await client.send(b"the parent is as before")
    await asyncio.get_running_loop().shutdown_default_executor()
