"""A server for many peers in a process of its own, and what a test asks it.

``python -m tests.device.crowd CONFIG`` (the keyword arguments of Config as JSON) prints its port. Each connection
is read until it closes; a message that is a command is obeyed, all others are dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop

import aiordma
from aiordma import Config, Connection, Server
from aiordma.verbs import usroce

REPORT = b"report"
#: The processor time of the server so far, in seconds; a report of a thousand connections takes some itself.
CPU = b"cpu"
#: The server does not read this connection any more, until it gets a GO by another.
STOP = b"stop"
GO = b"go"


def rss() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def allow_files(count: int) -> None:
    """As many open files as that, if the hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


class Crowd:
    """The handler of the server."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.server: Server | None = None

    async def __call__(self, connection: Connection) -> None:
        async for message in connection:
            if message == REPORT:
                await connection.send(json.dumps(self.report(connection)).encode())
            elif message == CPU:
                await connection.send(json.dumps(time.process_time()).encode())
            elif message == STOP:
                await self.go.wait()
            elif message == GO:
                self.go.set()

    def report(self, asking: Connection) -> dict[str, Any]:
        assert self.server is not None
        statistics = asking.statistics()
        shared = statistics.shared_receives
        assert shared is not None
        return {
            "rss": rss(),
            "registered": statistics.pool.registered,
            "leased": statistics.pool.leased,
            "connections": len(self.server.connections),
            "receives": shared.receives,
            "posted": shared.posted,
            "reserved": shared.reserved,
            "shared_bytes": shared.registered,
            "recalls": shared.recalls,
            "sharing": shared.connections,
            "windows": sorted(c.statistics().receive_credits for c in self.server.connections)[-20:],
            "window": statistics.receive_credits,
            "polls": statistics.reactor.polls,
            "queues": len(asking._adapter.reactor._queues),
            "rnr_naks": sum(usroce.counters(context).rnr_naks_sent for context in usroce.contexts()),
        }


async def serve(config: Config) -> None:
    crowd = Crowd()
    async with aiordma.serve(crowd, "127.0.0.1", 0, config=config) as server:
        crowd.server = server
        print(server.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the test ends


@contextlib.asynccontextmanager
async def crowd_server(**config: Any) -> AsyncIterator[int]:
    """The server's port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.device.crowd",
        json.dumps(config),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), 90))
    finally:
        process.stdin.close()
        try:
            assert await asyncio.wait_for(process.wait(), 60) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process._transport.close()  # type: ignore[attr-defined]


async def report(connection: Connection) -> dict[str, Any]:
    """What the server says of itself."""
    await connection.send(REPORT)
    found: dict[str, Any] = json.loads(await connection.recv())
    return found


async def cpu(connection: Connection) -> float:
    """Seconds of processor time that the server has used."""
    await connection.send(CPU)
    return float(json.loads(await connection.recv()))


async def flood(connection: Connection, count: int, size: int = 64) -> None:
    """Sends so many messages, as fast as credits allow."""
    data = bytes(size)
    for first in range(0, count, 64):
        await asyncio.gather(*[connection.send(data) for _ in range(min(64, count - first))])


if __name__ == "__main__":
    allow_files(5000)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Config(**json.loads(sys.argv[1]))))
