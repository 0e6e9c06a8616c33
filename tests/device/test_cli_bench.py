"""``aiordma bench`` and ``aiordma ping``: in a thread or a process, against a server here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiordma
from aiordma import Config, Connection
from aiordma.cli import bench_server, main
from aiordma.cli.bench_client import OPERATIONS
from aiordma.cli.bench_server import BenchServer
from aiordma.rpc import RpcServer
from tests.conftest import device_under_test
from tests.device.calling import CONFIG
from tests.device.test_bootstrap_hostile import certificate

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

PACKAGE = Path(aiordma.__file__).resolve().parents[1]
COUNT = ("--count", "50")

Run = Callable[..., Awaitable[str]]


@asynccontextmanager
async def listening(handler: Any = None, **options: Any) -> AsyncIterator[str]:
    """The address of a server, by default of bench's."""
    config = options.pop("config", CONFIG)
    handler = handler or BenchServer("asyncio")
    async with aiordma.serve(handler, "127.0.0.1", 0, config=config, **options) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a thread; returns what it printed, or its errors where it must fail."""

    async def run(*line: str, status: int = 0) -> str:
        found = await asyncio.to_thread(main, line)
        out, err = capsys.readouterr()
        assert found == status, err
        return err if status else out

    return run


def heed_interrupts() -> None:
    """A test run in the background of a shell ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@asynccontextmanager
async def program(*line: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiordma", *line),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONUNBUFFERED": "1"},
        preexec_fn=heed_interrupts,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# --- bench ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
async def test_every_operation_has_its_figures(run: Run, operation: str) -> None:
    if operation in ("fetch-add", "compare-swap"):
        with device_under_test().open() as context:
            if not context.attributes().atomics:
                pytest.skip("the device has no atomics")
    async with listening() as server:
        options = ("--connections", "2", "--outstanding", "3", "--size", "64", "--loop", "asyncio", "--json")
        found = json.loads(await run("bench", server, "-o", operation, *COUNT, *options))
    (result,) = found["results"]
    assert found["server"] == server
    assert (result["operation"], result["operations"], result["error"]) == (operation, 50, None)
    latency = result["latency_us"]
    assert 0 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert sum(row["count"] for row in result["histogram_us"]) == 50
    assert result["operations_per_second"] == pytest.approx(50 / result["seconds"])
    assert all(result["cpu_us_per_operation"][end] > 0 for end in ("client", "server"))
    assert all(result["spin_share"][end] >= 0 for end in ("client", "server"))
    assert result["client"]["mode"] == "adaptive"
    assert result["server"]["mode"] == "event"


async def test_several_sizes_make_a_table(run: Run) -> None:
    async with listening(config=Config(mode="event")) as server:
        text = await run("bench", server, "-o", "write", "--size", "64,64KiB", *COUNT, "--mode", "event")
    assert "write, 64 bytes, 1 outstanding on 1 connection: 50 in" in text
    assert "write, 64 KiB, 1 outstanding on 1 connection: 50 in" in text
    assert "GID index" in text
    assert text.isascii()  # no terminal
    heads, small, large = text.splitlines()[-3:]
    assert heads.split() == ["size", "p50", "p99", "rate", "bandwidth"]
    assert (small.split()[:2], large.split()[:2]) == (["64", "bytes"], ["64", "KiB"])


@pytest.mark.parametrize("mode", ["busy", "adaptive"])
async def test_for_some_time(run: Run, mode: str) -> None:
    async with listening() as server:
        found = json.loads(await run("bench", server, "--seconds", "0.05", "--mode", mode, "--json"))
    assert found["results"][0]["seconds"] >= 0.05
    assert found["results"][0]["operations"] > 0


async def test_both_ends_here(run: Run) -> None:
    before = os.sched_getaffinity(0)
    found = json.loads(await run("bench", *COUNT, "--json"))
    (result,) = found["results"]
    assert result["operations"] == 50
    if len(before) > 1:
        assert [len(result[end]["cores"]) for end in ("client", "server")] == [1, 1]
        assert result["client"]["cores"] != result["server"]["cores"]
    assert os.sched_getaffinity(0) == before


async def test_both_ends_here_say_what_the_server_says(run: Run) -> None:
    err = await run("bench", *COUNT, "--device", "none0", status=1)
    assert err.startswith("aiordma: no RDMA device 'none0' on this machine")
    assert "Traceback" not in err


async def test_token_and_tls(run: Run, tmp_path: Path) -> None:
    server_tls, _ = certificate(tmp_path)
    async with listening(ssl=server_tls, token="secret") as server:
        ca = ("--tls-ca", str(tmp_path / "cert.pem"))
        assert "50 in" in await run("bench", server, *COUNT, *ca, "--token", "secret")
        assert "token" in await run("bench", server, *COUNT, *ca, "--token", "other", status=1)
        assert "token" in await run("ping", server, *ca, status=1)
        assert "certificate" in (await run("ping", server, "--tls", "--token", "secret", status=1)).lower()
        missing = await run("ping", server, "--tls-ca", str(tmp_path / "none.pem"), status=1)
        assert missing.startswith("aiordma: --tls-ca")


async def test_nobody_listens(run: Run) -> None:
    async with listening() as server:
        pass
    for command in ("bench", "ping"):
        err = await run(command, server, status=1)
        assert f"cannot connect to {server}: Connection refused" in err
        assert f"aiordma bench --serve {server}" in err


async def echo(connection: Connection) -> None:
    async for message in connection:
        await connection.send(message)


async def refuse(connection: Connection) -> None:
    await connection.recv()


@pytest.mark.parametrize("handler", [echo, refuse, RpcServer()], ids=["echo", "close", "rpc"])
async def test_another_server(run: Run, handler: Any) -> None:
    async with listening(handler) as server:
        err = await run("ping", server, status=1)
        assert f"{server} is no bench server" in err
        assert "aiordma bench --serve" in err


async def test_too_large_for_the_server(run: Run) -> None:
    small = Config(mode="event", pool_limit=1 << 20, slab_size=1 << 16)
    async with listening(config=small) as server:
        err = await run("bench", server, "-o", "write", "--size", "64M", *COUNT, status=1)
    assert f"{server} refuses: " in err
    assert "pool_limit" in err


# --- the end of it --------------------------------------------------------------------------------------


class Midway:
    """Knows when a measurement of calls is under way: after the first report, and a few calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self._calls = -1
        usage = bench_server.usage

        def reported(connection: Connection) -> dict[str, float]:
            self._calls = max(self._calls, 0)
            return usage(connection)

        async def echo(payload: bytes) -> bytes:
            if self._calls >= 0:
                self._calls += 1
            if self._calls == 20:
                self.reached.set()
            return payload

        monkeypatch.setattr(bench_server, "usage", reported)
        monkeypatch.setattr(bench_server, "echo", echo)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_interrupted(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    midway = Midway(monkeypatch)
    async with listening() as server:
        line = ("bench", server, "-o", "rpc", "--seconds", "80", "--loop", loop, "--json")
        async with program(*line) as process:
            await midway.reached.wait()
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")
    (result,) = json.loads(out)["results"]
    assert result["interrupted"]
    assert result["operations"] >= 10
    assert result["cpu_us_per_operation"]["server"] > 0


async def test_the_server_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    midway = Midway(monkeypatch)
    async with aiordma.serve(BenchServer("asyncio"), "127.0.0.1", 0, config=CONFIG) as server:
        line = ("bench", f"127.0.0.1:{server.port}", "-o", "rpc", "--seconds", "80")
        async with program(*line) as process:
            await midway.reached.wait()
            server.close()
            out, err = await process.communicate()
    assert process.returncode == 1
    assert b"(broken off)" in out
    assert err.startswith(b"aiordma: ")
    assert b"Traceback" not in err


async def test_a_server_as_a_program(run: Run) -> None:
    async with program("bench", "--serve", "127.0.0.1:0", "--json") as process:
        assert process.stdout is not None
        port = json.loads(await process.stdout.readline())["listening"]["port"]
        assert "50 in" in await run("bench", f"127.0.0.1:{port}", *COUNT)
        err = await run("bench", "--serve", f"127.0.0.1:{port}", status=1)
        assert f"cannot listen at 127.0.0.1:{port}" in err
        process.send_signal(signal.SIGINT)
        assert (await process.communicate(), process.returncode) == ((b"", b""), 0)


# --- ping -----------------------------------------------------------------------------------------------


async def test_ping(run: Run) -> None:
    async with listening() as server:
        lines = (await run("ping", server, "-c", "3", "-i", "0", "-s", "100")).splitlines()
    assert lines[0].startswith(f"PING {server} over {device_under_test().name}, port 1")
    assert "adaptive, 100 bytes" in lines[0]
    assert lines[1].startswith("bootstrap ")
    assert [line.rpartition(" time=")[0] for line in lines[2:5]] == [
        f"100 bytes from {server}: seq={number}" for number in (1, 2, 3)
    ]
    assert lines[-2] == "3 sent, 3 received"
    assert lines[-1].startswith("round trip min/p50/avg/max/mdev = ")


async def test_ping_json(run: Run) -> None:
    async with listening() as server:
        found = json.loads(await run("ping", server, "-c", "4", "-i", "0", "--mode", "event", "--json"))
    assert (found["sent"], found["received"], len(found["round_trips_us"])) == (4, 4, 4)
    assert found["bootstrap_ms"] > 0
    assert found["client"]["mode"] == "event"
    assert found["client"]["device"] == found["server"]["device"] == device_under_test().name


async def test_ping_until_it_is_interrupted() -> None:
    async with listening() as server, program("ping", server, "-i", "0.01") as process:
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(4)]
        assert b"seq=2 " in lines[3]
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b" received\nround trip " in out


async def test_ping_says_when_the_answers_stop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def mute(connection: Connection) -> None:
        await connection.recv()
        await connection.send(json.dumps({bench_server.KEY: 1, "route": "?"}).encode())
        await connection.wait_closed()

    async with listening(mute) as server:
        err = await run("ping", server, "-W", "0.1", status=1)
    assert f"{server} did not answer message 1 within 0.1 s" in err
