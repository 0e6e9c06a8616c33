"""One end of the Python rows: a process that runs measuring sessions on command, so it is started only once.

Commands and answers are lines of JSON on stdin and stdout. {"role": "server", "kind": ...} starts a session,
answers {"port": ...} and then {"done": true} when its client has gone; {"role": "client", "port": ...}
answers {"samples": {operation: [minimum, median, p99]}} in ns. Between sessions the process sleeps in a read:
a busy loop that is not being measured would disturb those that are. Each session has its own event loop.

Runs under the system's Python as well, for pyverbs: aiordma is imported by the sessions that need it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .naive import Binding, NaiveQueue, busy_write

if TYPE_CHECKING:
    from aiordma import Connection
    from aiordma.config import Config

Command = dict[str, Any]
Samples = dict[str, list[int]]
#: A session: server or client, by the role in the command.
Session = Callable[[Command], Awaitable[Samples]]

SESSION_DEADLINE = 60.0
_now_ns = time.perf_counter_ns


def say(**answer: Any) -> None:
    """One line to the driver."""
    print(json.dumps(answer), flush=True)


def summary(stamps: list[int]) -> list[int]:
    """Minimum, median and p99 of the steps between time stamps."""
    steps = sorted(after - before for before, after in itertools.pairwise(stamps))
    return [steps[0], steps[len(steps) // 2], steps[int(len(steps) * 0.99)]]


async def timed(operation: Callable[[], Awaitable[Any]], command: Command) -> list[int]:
    """Awaits operations one at a time. The call of ``operation`` itself is part of what is measured."""
    for _ in range(command["iterations"] // 10 + 10):
        await operation()
    stamps = [_now_ns()]
    for _ in range(command["iterations"]):
        await operation()
        stamps.append(_now_ns())
    return summary(stamps)


# --- aiordma ------------------------------------------------------------------------------------------


def _config(command: Command) -> Config:
    from aiordma import Config

    return Config(**command["config"])


async def aiordma_server(command: Command) -> Samples:
    """Shares a region and sends every message back."""
    import aiordma

    done = asyncio.Event()

    async def handler(connection: Connection) -> None:
        try:
            async with connection.allocate(max(4096, command["size"])) as region:
                await connection.share("target", region)
                async for message in connection:
                    await connection.send(message)
        finally:
            done.set()

    host, device = command["host"], command["device"]
    async with aiordma.serve(handler, host, 0, device=device, config=_config(command)) as server:
        say(port=server.port)
        await done.wait()
    return {}


async def aiordma_client(command: Command) -> Samples:
    """write, read and echo on one connection."""
    import aiordma

    data = bytes(command["size"])
    host, port, device = command["host"], command["port"], command["device"]
    async with aiordma.connect(host, port, device=device, config=_config(command)) as connection:
        target = (await connection.remote("target"))[: len(data)]
        operations: dict[str, Callable[[], Awaitable[Any]]] = {
            "write": lambda: connection.write(data, target),
            "read": lambda: connection.read(target),
            "echo": lambda: _echo(connection, data),
        }
        return {name: await timed(operations[name], command) for name in command["operations"]}


async def _echo(connection: Connection, data: bytes) -> None:
    await connection.send(data)
    await connection.recv()


# --- naive add_reader, over aiordma.verbs or pyverbs ----------------------------------------------------


def _binding(command: Command) -> Binding:
    arguments = command["device"], command["gid_index"], command["size"]
    if command["binding"] == "pyverbs":
        from .binding_pyverbs import PyverbsBinding

        return PyverbsBinding(*arguments)
    from .binding_aiordma import AiordmaBinding

    return AiordmaBinding(*arguments)


async def naive_server(command: Command) -> Samples:
    """Connects, and answers messages until the client's TCP connection ends."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result((reader, writer))

    with contextlib.closing(_binding(command)) as binding:
        server = await asyncio.start_server(on_client, command["host"], 0)
        say(port=server.sockets[0].getsockname()[1])
        reader, writer = await accepted
        server.close()
        binding.connect(json.loads(await reader.readline()))
        with contextlib.closing(NaiveQueue(binding, keep_reader=True)) as queue:
            answering = asyncio.create_task(_answer(queue))
            writer.write(json.dumps(binding.local).encode() + b"\n")
            await reader.read()
            answering.cancel()
            await asyncio.wait([answering])
        writer.close()
    return {}


async def _answer(queue: NaiveQueue) -> None:
    while True:
        await queue.recv()
        await queue.send()


async def naive_client(command: Command) -> Samples:
    """``wait``: kept or each (the reader stays, or comes and goes with each operation), busy (no asyncio)."""
    with contextlib.closing(_binding(command)) as binding:
        reader, writer = await asyncio.open_connection(command["host"], command["port"])
        writer.write(json.dumps(binding.local).encode() + b"\n")
        binding.connect(json.loads(await reader.readline()))
        if command["wait"] == "busy":
            samples = {"write": _timed_busy(binding, command["iterations"])}
        else:
            with contextlib.closing(NaiveQueue(binding, keep_reader=command["wait"] == "kept")) as queue:
                samples = await _naive_operations(queue, command)
        writer.close()
    return samples


async def _naive_operations(queue: NaiveQueue, command: Command) -> Samples:
    async def echo() -> None:
        await queue.send()
        await queue.recv()

    operations = {"write": queue.write, "read": queue.read, "echo": echo}
    return {name: await timed(operations[name], command) for name in command["operations"]}


def _timed_busy(binding: Binding, iterations: int) -> list[int]:
    for _ in range(iterations // 10 + 10):
        busy_write(binding)
    stamps = [_now_ns()]
    for _ in range(iterations):
        busy_write(binding)
        stamps.append(_now_ns())
    return summary(stamps)


# --- TCP ------------------------------------------------------------------------------------------------


async def tcp_server(command: Command) -> Samples:
    """Echoes over asyncio streams."""
    done = asyncio.Event()
    size = command["size"]

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            done.set()

    server = await asyncio.start_server(on_client, command["host"], 0)
    say(port=server.sockets[0].getsockname()[1])
    await done.wait()
    server.close()
    return {}


async def tcp_client(command: Command) -> Samples:
    """The echo; both event loops set TCP_NODELAY."""
    data = bytes(command["size"])
    reader, writer = await asyncio.open_connection(command["host"], command["port"])

    async def echo() -> None:
        writer.write(data)
        await reader.readexactly(len(data))

    samples = {"echo": await timed(echo, command)}
    writer.close()
    return samples


# --- the process ------------------------------------------------------------------------------------------

SESSIONS: dict[tuple[str, str], Session] = {
    ("aiordma", "server"): aiordma_server,
    ("aiordma", "client"): aiordma_client,
    ("naive", "server"): naive_server,
    ("naive", "client"): naive_client,
    ("tcp", "server"): tcp_server,
    ("tcp", "client"): tcp_client,
}


async def session(command: Command) -> Samples:
    """One command, within a deadline."""
    async with asyncio.timeout(SESSION_DEADLINE):
        return await SESSIONS[command["kind"], command["role"]](command)


def run_session(command: Command, loop: str) -> Samples:
    """A session in an event loop of its own."""
    if loop == "uvloop":
        import uvloop

        result: Samples = uvloop.run(session(command))
        return result
    return asyncio.run(session(command))


def prepare(loop: str, binding: str) -> dict[str, str]:
    """Imports what the sessions will need; returns versions. Raises ImportError."""
    import importlib
    import platform

    versions = {"python": platform.python_version()}
    if binding == "pyverbs":
        importlib.import_module("benchmarks.binding_pyverbs")
        versions = {"pyverbs's python": platform.python_version()}
    else:
        versions["aiordma"] = importlib.import_module("aiordma").__version__
    if loop == "uvloop":
        versions["uvloop"] = importlib.import_module("uvloop").__version__
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description="started by benchmarks.core")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--binding", choices=("aiordma", "pyverbs"), default="aiordma")
    options = parser.parse_args()
    try:
        say(ready=prepare(options.loop, options.binding))
    except ImportError as error:
        say(error=f"{type(error).__name__}: {error}")
        return
    for line in sys.stdin:
        command = json.loads(line)
        try:
            say(done=True, samples=run_session(command, options.loop))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
