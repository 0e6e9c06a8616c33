"""What RDMA from asyncio looks like: a file to another process and back, calls, a counter of two processes.

    python examples/demo.py             on the first RDMA device, else on usroce; AIORDMA_DEVICE names one

This process is the client; it starts a second one, the server. A real file (this repository's packed history,
or its sources) goes over by RDMA WRITE, is checked and stored, and comes back by RDMA READ; RPC calls and
atomic operations follow. The exit status is 0 only when everything checked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("aiordma") is None:  # not installed: the checkout this file lies in
    sys.path.insert(0, str(ROOT))

import aiordma  # noqa: E402
from aiordma.rpc import RpcClient, RpcError, RpcServer, Service, StatusCode  # noqa: E402

PACKAGE = Path(aiordma.__file__).resolve().parent
DEADLINE = 90.0  # seconds for all of it; the machine may be emulated
PIECE = 64 * 1024  # bytes of one write
CALLS = 100
ADDS = 200  # by each side
OUR_STEP, THEIR_STEP = 1, 1000


# --- the server process -------------------------------------------------------------------------------


class DemoServer:
    """Stores files that clients write into its memory, and counts."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.counter: asyncio.Future[aiordma.Lease] = asyncio.get_running_loop().create_future()

    async def handler(self, connection: aiordma.Connection) -> None:
        """One connection: the counter at once, and files when they are offered."""
        await connection.share("counter", await self.counter, "atomic")
        async for message in connection:
            await self.receive_file(connection, json.loads(message))

    async def receive_file(self, connection: aiordma.Connection, offer: dict[str, Any]) -> None:
        """Shares memory for the file; each notification is the end of one more piece in it."""
        async with connection.allocate(offer["size"]) as region:
            await connection.share("file", region)
            received = 0
            while received < offer["size"]:
                received = max(received, await connection.notified())
            stored = await asyncio.to_thread(self.keep, memoryview(region))
            digest = sha256(stored)
            region.zero()  # what is read back comes from the stored file
            if digest == offer["sha256"]:
                memoryview(region)[:] = stored
            await connection.send(json.dumps({"sha256": digest, "pid": os.getpid()}).encode())
            await connection.recv()  # the client is done with the region

    def keep(self, data: memoryview) -> bytes:
        """Writes the file and reads it from the disk again."""
        path = self.store / "received"
        path.write_bytes(data)
        return path.read_bytes()


def make_rpc() -> RpcServer:
    """The methods that the demo calls."""
    numbers = Service("numbers")

    @numbers.unary
    async def square(payload: bytes) -> bytes:
        return b"%d" % int(payload) ** 2

    @numbers.unary
    async def divide(payload: bytes) -> bytes:
        dividend, divisor = map(int, payload.split())
        if divisor == 0:
            raise RpcError(StatusCode.INVALID_ARGUMENT, "division by zero")
        return b"%d" % (dividend // divisor)

    return RpcServer(numbers)


async def count(connection: aiordma.Connection, step: int) -> None:
    """Adds to the counter, a few at a time."""
    counter = await connection.remote("counter")
    for _ in range(ADDS // 10):
        await asyncio.gather(*(connection.fetch_add(counter, step) for _ in range(10)))


async def serve(config: aiordma.Config, store: Path) -> None:
    """Serves until standard input ends, and counts along when told to."""
    stdin = await open_stdin()
    demo = DemoServer(store)
    async with (
        aiordma.serve(demo.handler, "127.0.0.1", 0, config=config) as files,
        aiordma.serve(make_rpc(), "127.0.0.1", 0, config=config) as calls,
        aiordma.connect("127.0.0.1", files.port, config=config) as own,
        own.allocate(8) as counter,
    ):
        demo.counter.set_result(counter)
        print(json.dumps({"files": files.port, "calls": calls.port}), flush=True)
        if await stdin.readline():
            await count(own, THEIR_STEP)
            print("counted", flush=True)
        await stdin.read()


async def open_stdin() -> asyncio.StreamReader:
    """Standard input as a stream."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


# --- the client process -------------------------------------------------------------------------------


class DemoError(Exception):
    """Something did not check."""


def check(condition: bool, what: str) -> None:
    """Raises :class:`DemoError`."""
    if not condition:
        raise DemoError(what)


def sha256(data: Any) -> str:
    """The hash, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def make_file(folder: Path) -> tuple[Path, str]:
    """A real file, and what it is: a git bundle of this repository, else a tar of its sources."""
    bundle = folder / "history.bundle"
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "bundle", "create", "--quiet", str(bundle), "HEAD"]
        if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return bundle, "git bundle of this repository"
    sources = folder / "sources.tar"
    with tarfile.open(sources, "w") as tar:
        tar.add(PACKAGE, PACKAGE.name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
    return sources, "tar of the package's sources"


def describe(connection: aiordma.Connection, config: aiordma.Config) -> str:
    """Prints what carries the data; returns a label for what is measured on it."""
    name = connection.route.adapter.name
    sysfs = Path("/sys/class/infiniband") / name
    if connection.route.adapter.context.is_usroce:
        label = "RoCE v2 in user space"
    elif not sysfs.exists() or "/virtual/" in str(sysfs.resolve()):
        label = "a device in software"
    else:
        label = "a real device"
    print(f"device      {name} ({label}), mode {config.mode}, MTU {connection.statistics().mtu} bytes")
    print(f"GID         {connection.route.choice.explain().splitlines()[0]}")
    print(f"processes   client {os.getpid()}, server at {connection.peer}")
    return f"on {name}, {label}"


async def move_file(connection: aiordma.Connection, folder: Path, label: str) -> None:
    """There by WRITE, checked and stored by the server, and back by READ."""
    path, kind = await asyncio.to_thread(make_file, folder)
    data = await asyncio.to_thread(path.read_bytes)
    digest = sha256(data)
    print(f"file        {kind}, {len(data)} bytes, SHA-256 {digest[:16]}...")
    await connection.send(json.dumps({"size": len(data), "sha256": digest}).encode())
    region = await connection.remote("file")
    ends = [min(start + PIECE, len(data)) for start in range(0, len(data), PIECE)]
    view, started = memoryview(data), time.perf_counter()
    await asyncio.gather(
        *(
            connection.write(view[i * PIECE : end], region[i * PIECE : end], notify=end)
            for i, end in enumerate(ends)
        )
    )
    print(f"RDMA WRITE  {len(ends)} pieces with notification, {rate(len(data), started)} {label}")
    answer = json.loads(await connection.recv())
    check(answer["sha256"] == digest, "the server received something else")
    print(f"stored      by process {answer['pid']}, which computed SHA-256 {answer['sha256'][:16]}...: equal")
    started = time.perf_counter()
    back = await connection.read(region)
    print(f"RDMA READ   the stored file, in one operation, {rate(len(back), started)} {label}")
    check(sha256(back) == digest, "what was read back is something else")
    print(f"read back   {len(back)} bytes, SHA-256 {sha256(back)[:16]}...: equal")
    await connection.send(b"done")


def rate(nbytes: int, started: float) -> str:
    """Megabytes (10**6) per second since ``started``."""
    return f"{nbytes / (time.perf_counter() - started) / 1e6:.1f} MB/s"


async def call_methods(connection: aiordma.Connection) -> None:
    """Calls at the same time, and one that fails without harm to the others."""
    async with RpcClient(connection) as client:
        started = time.perf_counter()
        squares = [client.unary("numbers/square", b"%d" % n, timeout=30) for n in range(CALLS)]
        *replies, failure = await asyncio.gather(
            *squares, client.unary("numbers/divide", b"1 0"), return_exceptions=True
        )
        seconds = time.perf_counter() - started
        check(replies == [b"%d" % n**2 for n in range(CALLS)], "a reply is wrong")
        if not isinstance(failure, RpcError) or failure.code is not StatusCode.INVALID_ARGUMENT:
            raise DemoError(f"unexpected: {failure!r}")
        print(f"RPC         {CALLS} calls at the same time in {seconds * 1e3:.0f} ms, all replies right")
        print(f"RPC         one of them failed, as it should: {failure}")
        check(await client.unary("numbers/divide", b"84 2") == b"42", "84 / 2")


async def count_together(connection: aiordma.Connection, server: asyncio.subprocess.Process) -> None:
    """Both processes add to one word, each over a connection of its own."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(b"count\n")
    await count(connection, OUR_STEP)
    check(await server.stdout.readline() == b"counted\n", "the server did not count")
    total = await connection.fetch_add(await connection.remote("counter"), 0)
    expected = ADDS * (OUR_STEP + THEIR_STEP)
    print(f"atomics     {ADDS} x {OUR_STEP} from here, {ADDS} x {THEIR_STEP} from the server: {total}")
    check(total == expected, f"the counter should be {expected}")


@contextlib.asynccontextmanager
async def server_process(mode: str, store: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The second process; it ends when its standard input does, and at the latest with this block."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--mode",
        mode,
        "--serve",
        str(store),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        check(await process.wait() == 0, "the server process failed")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run(config: aiordma.Config, folder: Path) -> None:
    """The demo; :class:`DemoError` when something does not check."""
    async with server_process(config.mode, folder) as server:
        assert server.stdout is not None
        line = await server.stdout.readline()
        check(bool(line), "the server process did not start")
        ports = json.loads(line)
        async with (
            aiordma.connect("127.0.0.1", ports["files"], config=config) as connection,
            aiordma.connect("127.0.0.1", ports["calls"], config=config) as calls,
        ):
            label = describe(connection, config)
            await move_file(connection, folder, label)
            await call_methods(calls)
            await count_together(connection, server)


async def demo(config: aiordma.Config) -> int:
    """Runs the demo in a folder of its own; the exit status."""
    try:
        with tempfile.TemporaryDirectory(prefix="aiordma-demo-") as folder:
            async with asyncio.timeout(DEADLINE):
                await run(config, Path(folder))
    except (DemoError, aiordma.errors.RdmaError, OSError) as error:
        reason = str(error) or f"not finished after {DEADLINE:.0f} s"
        print(f"FAILED      {type(error).__name__}: {reason}", file=sys.stderr)
        return 1
    print("everything checked")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # what the second process is told
    args = parser.parse_args()
    config = aiordma.Config(mode=args.mode)
    if args.serve:
        try:
            asyncio.run(serve(config, args.serve))
        except aiordma.errors.RdmaError as error:
            print(f"server      {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0
    return asyncio.run(demo(config))


if __name__ == "__main__":
    sys.exit(main())
