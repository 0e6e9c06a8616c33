"""The server of ``aiordma bench`` and ``aiordma ping``: each connection begins with what the client wants of it.

The first message is a JSON object, as is the answer, which tells about the server or why it refuses:

    {"aiordma_bench": 1, "role": ROLE, "size": BYTES, "access": RIGHTS}
    {"aiordma_bench": 1, "device": ..., "route": ..., ...}    or    {"aiordma_bench": 1, "error": TEXT}

Roles: ``echo`` sends every message back, ``sink`` drops them, ``target`` shares a region of that name with these
rights, ``rpc`` answers ``bench/echo``, ``stream`` sends a byte stream back, ``control`` answers each message with
a JSON report of the processor time and the spinning of the server's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConnectionLostError, RdmaError
from ..rpc import RpcServer, Service
from ..stream_transport import RdmaTransport
from ..transport import Connection

VERSION = 1
KEY = "aiordma_bench"
REGION = "target"
METHOD = "bench/echo"

_MAX_SETUP = 4096  # bytes
_MAX_SIZE = 1 << 30
_RIGHTS = ("read", "write", "atomic")
#: Answers under way before the oldest is awaited: a round trip each would be slow where many are outstanding.
_ANSWERS = 32


class NoBenchServerError(RdmaError):
    """The peer is no bench server, or refuses; the text says which."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a client wants of a connection."""

    role: str
    size: int = 1
    access: str = "read"

    def encode(self) -> bytes:
        """The first message."""
        return json.dumps({KEY: VERSION, **asdict(self)}).encode()

    @classmethod
    def decode(cls, message: bytes) -> Setup:
        """Raises ValueError for what is no such message; its text is for the client."""
        try:
            found = json.loads(message) if len(message) <= _MAX_SETUP else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or KEY not in found:
            raise ValueError("this is a server of aiordma bench; the first message says what is wanted")
        if found[KEY] != VERSION:
            raise ValueError(f"version {found[KEY]!r:.20} is not known here, only {VERSION}")
        setup = cls(found.get("role", ""), found.get("size", 1), found.get("access", "read"))
        if setup.role not in tuple(_ROLES):  # of any type: it may not be hashable
            raise ValueError(f"role {setup.role!r:.20}: one of {', '.join(_ROLES)}")
        if type(setup.size) is not int or not 1 <= setup.size <= _MAX_SIZE:
            raise ValueError(f"size {setup.size!r:.20}: 1 to {_MAX_SIZE} bytes")
        if setup.access not in _RIGHTS:
            raise ValueError(f"access {setup.access!r:.20}: one of {', '.join(_RIGHTS)}")
        return setup


def route_text(connection: Connection) -> str:
    """``usroce0, port 1, GID index 0, 127.0.0.1``."""
    return f"{connection.route.adapter.name}, {connection.route.choice.explain().splitlines()[0]}"


def about(connection: Connection, loop: str) -> dict[str, Any]:
    """What one end is: for the other end's report."""
    statistics = connection.statistics()
    return {
        "device": statistics.device,
        "route": route_text(connection),
        "mode": statistics.mode,
        "mtu": statistics.mtu,
        "loop": loop,
        "cores": sorted(os.sched_getaffinity(0)),
    }


def usage(connection: Connection) -> dict[str, float]:
    """Processor time of this process so far, and how much of it was spinning: seconds."""
    reactor = connection.statistics().reactor
    return {"cpu": time.process_time(), "spin": reactor.spin_seconds}


async def set_up(connection: Connection, setup: Setup) -> dict[str, Any]:
    """The client's side: the first message, and what the server says of itself. Raises
    :class:`NoBenchServerError`."""
    await connection.send(setup.encode())
    advice = "start one there: aiordma bench --serve HOST:PORT"
    try:
        found = json.loads(await connection.recv())
    except ConnectionLostError as error:
        raise NoBenchServerError(f"{connection.peer} is no bench server ({error}); {advice}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or KEY not in found or found.get("role"):  # an echo of what we sent
        raise NoBenchServerError(f"{connection.peer} is no bench server: it answers otherwise; {advice}")
    if "error" in found:
        raise NoBenchServerError(f"{connection.peer} refuses: {found['error']}")
    return found


class BenchServer:
    """A handler for :func:`aiordma.serve`."""

    def __init__(self, loop: str) -> None:
        self._loop = loop
        self.connections = 0
        service = Service("bench")
        service.add(echo, name="echo")
        self._rpc = RpcServer(service, max_queued_bytes=_MAX_SIZE)

    async def __call__(self, connection: Connection) -> None:
        """Serves one connection to its end."""
        self.connections += 1
        try:
            setup = Setup.decode(await connection.recv())
            await _ROLES[setup.role](self, connection, setup)
        except ConnectionLostError:
            return
        except (ValueError, RdmaError) as error:
            with contextlib.suppress(RdmaError):
                await connection.send(json.dumps({KEY: VERSION, "error": str(error)}).encode())

    async def _accept(self, connection: Connection) -> None:
        await connection.send(json.dumps({KEY: VERSION, **about(connection, self._loop)}).encode())

    async def _echo(self, connection: Connection, setup: Setup) -> None:
        await self._accept(connection)
        async with _answers() as answers:
            async for message in connection:
                answers.append(connection.send(message))
                if len(answers) == _ANSWERS:
                    await answers.popleft()

    async def _sink(self, connection: Connection, setup: Setup) -> None:
        await self._accept(connection)
        async for _ in connection:
            pass

    async def _target(self, connection: Connection, setup: Setup) -> None:
        async with connection.allocate(max(8, setup.size)) as region:
            await connection.share(REGION, region, access=setup.access)
            await self._accept(connection)
            await connection.wait_closed()

    async def _serve_rpc(self, connection: Connection, setup: Setup) -> None:
        await self._accept(connection)
        await self._rpc(connection)

    async def _stream(self, connection: Connection, setup: Setup) -> None:
        await self._accept(connection)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=max(1 << 16, setup.size), loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, stream_back, loop=loop)
        await asyncio.shield(RdmaTransport(loop, connection, protocol).ended)

    async def _control(self, connection: Connection, setup: Setup) -> None:
        await self._accept(connection)
        async for _ in connection:
            await connection.send(json.dumps(usage(connection)).encode())


_ROLES: dict[str, Callable[[BenchServer, Connection, Setup], Awaitable[None]]] = {
    "echo": BenchServer._echo,
    "sink": BenchServer._sink,
    "target": BenchServer._target,
    "rpc": BenchServer._serve_rpc,
    "stream": BenchServer._stream,
    "control": BenchServer._control,
}


@contextlib.asynccontextmanager
async def _answers() -> AsyncIterator[deque[asyncio.Future[None]]]:
    """Sends under way. A connection that was lost has failed them all."""
    sending: deque[asyncio.Future[None]] = deque()
    try:
        yield sending
    finally:
        await asyncio.gather(*sending, return_exceptions=True)


async def echo(payload: bytes) -> bytes:
    """The request as it is."""
    return payload


async def stream_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Whatever comes, as it comes."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
    writer.close()
