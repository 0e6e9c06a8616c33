"""For tests of code that uses aiordma: connected pairs, faulty links and captures, on usroce and in one process.

Nothing here needs pytest; aiordma.pytest_plugin makes fixtures of it. The device is usroce, whatever else the
machine has, so that tests are alike everywhere:

    async with connected_pair() as (client, server):
        with FaultyLink(drop=0.05, seed=1), Capture("lossy.pcap"):
            await client.send(b"gets there all the same")
            assert await server.recv() == b"gets there all the same"

Faults and captures are those of this process's devices. A program that a test starts takes them from
``AIORDMA_USROCE_FAULT`` and ``AIORDMA_USROCE_PCAP`` in its environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .config import Config
from .connect import Server, connect, serve
from .errors import MisuseError
from .mr_pool import Lease
from .regions import RemoteRegion
from .transport import Connection
from .verbs import Context, usroce
from .verbs.usroce import Fault, UsroceCounters

__all__ = ["Acceptor", "Capture", "Fault", "FaultyLink", "Pair", "UsroceCounters", "connected_pair"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Both ends of a connection, and the server it was made by. ``client, server = pair`` works."""

    client: Connection
    server: Connection
    listener: Server

    def __iter__(self) -> Iterator[Connection]:
        return iter((self.client, self.server))

    async def region(self, nbytes: int, access: str = "read|write|atomic") -> tuple[Lease, RemoteRegion]:
        """Memory of the server, shared with the client: the lease, and what the client sees of it."""
        lease = await self.server.allocate(nbytes)
        name = f"region {lease.address:#x}"
        await self.server.share(name, lease, access)
        return lease, await self.client.remote(name)


class Acceptor:
    """A handler for :func:`aiordma.serve` that hands its connections to the test, in ``accepted``.

    It keeps each until it closes; with ``hold`` until :meth:`finish` is called, for what was not received by then
    is dropped when a handler ends.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self.accepted: asyncio.Queue[Connection] = asyncio.Queue()
        self._hold = hold
        self._finished = asyncio.Event()

    async def __call__(self, connection: Connection) -> None:
        self.accepted.put_nowait(connection)
        await connection.wait_closed()
        if self._hold:
            await self._finished.wait()

    def finish(self) -> None:
        """Lets the handlers end."""
        self._finished.set()


@contextlib.asynccontextmanager
async def connected_pair(
    config: Config | None = None,
    *,
    server_config: Config | None = None,
    device: str | None = None,
    host: str = "127.0.0.1",
    **options: Any,
) -> AsyncIterator[Pair]:
    """A connection of this event loop with itself; both ends close at the end of the block.

    ``config`` is that of both ends unless ``server_config`` is given; ``options`` (``ssl``, ``token``) go to
    both. ``device`` None means usroce. Raises what :func:`aiordma.connect` does.
    """
    device = device or usroce.usroce_device().name
    acceptor = Acceptor(hold=True)
    async with contextlib.AsyncExitStack() as stack:
        server = serve(acceptor, host, 0, device=device, config=server_config or config, **options)
        await stack.enter_async_context(server)
        stack.callback(acceptor.finish)
        connecting = connect(host, server.port, device=device, config=config, **options)
        client = await stack.enter_async_context(connecting)
        accepted = await stack.enter_async_context(await acceptor.accepted.get())
        yield Pair(client, accepted, server)


class FaultyLink:
    """Faults for every usroce device of this process, those opened later included, until the end of the block.

    ``FaultyLink(drop=0.01, seed=1)`` takes what :class:`Fault` takes; calling it changes the faults, and without
    any ends them. The same seed and traffic give the same faults.
    """

    def __init__(self, fault: Fault | None = None, **faults: Any) -> None:
        self.fault = _one_fault(fault, faults)
        self._stack = contextlib.ExitStack()

    def __call__(self, fault: Fault | None = None, **faults: Any) -> None:
        """Other faults from now on, or none."""
        self.fault = _one_fault(fault, faults)
        for context in usroce.contexts():
            self._apply(context)

    def clear(self) -> None:
        """No faults from now on."""
        self(None)

    def counters(self) -> list[UsroceCounters]:
        """What the devices that are open have counted: ``faults_dropped`` and so on."""
        return [usroce.counters(context) for context in usroce.contexts()]

    def _apply(self, context: Context) -> None:
        usroce.set_fault(context, self.fault)

    def __enter__(self) -> Self:
        self._stack.enter_context(usroce.watched(self._apply))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.fault = usroce.default_fault()
        for context in usroce.contexts():
            self._apply(context)


def _one_fault(fault: Fault | None, faults: dict[str, Any]) -> Fault | None:
    if fault is not None and faults:
        raise MisuseError("either a Fault or its values, not both")
    return Fault(**faults) if faults else fault


class Capture:
    """A pcap file of what the usroce devices of this process send and receive, until the end of the block.

    ``path`` is complete after :meth:`stop`, which the end of the block calls as well; Wireshark reads it. Should
    the test open more than one device, each further one has a file of its own: ``paths``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.paths: list[Path] = []
        self._contexts: list[Context] = []
        self._stack = contextlib.ExitStack()

    def __fspath__(self) -> str:
        return str(self.path)

    def _start(self, context: Context) -> None:
        number = len(self.paths)
        path = self.path.with_stem(f"{self.path.stem}-{number + 1}") if number else self.path
        usroce.capture(context, path)
        self.paths.append(path)
        self._contexts.append(context)

    def __enter__(self) -> Self:
        self._stack.enter_context(usroce.watched(self._start))
        return self

    def stop(self) -> Path:
        """Ends the capture; returns ``path``. Idempotent."""
        self._stack.close()
        while self._contexts:
            context = self._contexts.pop()
            if not context.closed:
                usroce.capture(context, None)
        return self.path

    def __exit__(self, *_: object) -> None:
        self.stop()
