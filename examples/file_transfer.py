"""Files to another machine: several one-sided writes in flight, a checksum, and what broke off goes on.

    python examples/file_transfer.py                                this file, to a temporary folder, in one go
    python examples/file_transfer.py server --folder FOLDER
    python examples/file_transfer.py client --port PORT FILE ...

The server shares a window of a few chunks with each client, which reads its file into registered memory chunk by
chunk, writes each to the next place of the window and notifies. The server stores it and says so, and its place is
free again: so a file may be larger than the memory of both. What was stored when a transfer broke off stays, as
.NAME.part, and is not sent again if it is the beginning of the same file. In the end the BLAKE2b checksums of what
was read here and written there are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiordma
import program
from aiordma.errors import ConnectionLostError

CHUNK = 1 << 20  # bytes
WINDOW = 8  # chunks

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class TransferError(Exception):
    """The file did not get there."""


def place(number: int, length: int) -> slice:
    """Where in the window a chunk lies."""
    start = number % WINDOW * CHUNK
    return slice(start, start + length)


def digest_of(path: Path, length: int) -> Any:
    """The running checksum of the first bytes of a file."""
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while length > 0 and (data := file.read(min(length, CHUNK))):
            digest.update(data)
            length -= len(data)
    return digest


def what_is_there(part: Path, size: int) -> tuple[int, Any]:
    """Length and running checksum of what was stored of a file before."""
    part.touch()
    have = min(part.stat().st_size, size)
    return have, digest_of(part, have)


async def say(connection: aiordma.Connection, **what: object) -> None:
    """Sends a message."""
    await connection.send(json.dumps(what).encode())


async def hear(connection: aiordma.Connection) -> dict[str, Any]:
    """The next message. Raises :class:`TransferError` if it is one."""
    message: dict[str, Any] = json.loads(await connection.recv())
    if "error" in message:
        raise TransferError(message["error"])
    return message


class Receiver:
    """The server: stores what clients send."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._busy: set[str] = set()

    async def handler(self, connection: aiordma.Connection) -> None:
        """One client, file after file; the first error is the last thing it hears."""
        async with connection.allocate(WINDOW * CHUNK) as window:
            await connection.share("window", window, "write")
            try:
                async for message in connection:
                    await self._receive(connection, memoryview(window), **json.loads(message))
            except (TransferError, OSError) as error:
                if isinstance(error, ConnectionLostError):
                    return  # the client died; what it sent stays
                await say(connection, error=str(error))
                await connection.wait_closed()

    async def _receive(
        self, connection: aiordma.Connection, window: memoryview, name: str, size: int
    ) -> None:
        if Path(name).name != name or not name or name.startswith("."):
            raise TransferError(f"{name!r} is not a name for a file here")
        if name in self._busy:
            raise TransferError(f"{name!r} is being received from another client")
        self._busy.add(name)
        try:
            part = self._folder / f".{name}.part"
            digest = await self._store(connection, window, part, size)
            if (await hear(connection))["digest"] != digest:
                part.unlink()
                raise TransferError(f"{name!r}: the checksums differ")
            part.replace(self._folder / name)
            await say(connection, stored=size)
        finally:
            self._busy.discard(name)

    async def _store(self, connection: aiordma.Connection, window: memoryview, part: Path, size: int) -> str:
        """Fills the file, from where it ends if the client agrees; returns the checksum."""
        have, digest = await asyncio.to_thread(what_is_there, part, size)
        await say(connection, have=have, digest=digest.hexdigest())
        start = (await hear(connection))["start"]
        if start != have:
            digest = hashlib.blake2b()
        with part.open("r+b", buffering=0) as file:
            file.truncate(start)
            file.seek(start)
            for number, offset in enumerate(range(start, size, CHUNK)):
                await connection.notified()
                data = window[place(number, min(CHUNK, size - offset))]
                await asyncio.to_thread(keep, data, file, digest)
                await say(connection, stored=offset + len(data))
        return str(digest.hexdigest())


def keep(data: memoryview, file: io.FileIO, digest: Any) -> None:
    """Writes a chunk to the disk, in a thread."""
    digest.update(data)
    while data:
        data = data[file.write(data) :]


class Sender:
    """The client: ``async with Sender.connect(host, port) as sender``."""

    def __init__(
        self, connection: aiordma.Connection, window: aiordma.RemoteRegion, buffer: memoryview
    ) -> None:
        self._connection = connection
        self._window = window
        self._buffer = buffer

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, host: str, port: int, config: aiordma.Config | None = None
    ) -> AsyncIterator[Sender]:
        """A connection to a :class:`Receiver`, for the block."""
        async with (
            aiordma.connect(host, port, config=config) as connection,
            connection.allocate(WINDOW * CHUNK) as buffer,
        ):
            yield cls(connection, await connection.remote("window"), memoryview(buffer))

    async def send(self, path: Path, progress: Progress) -> str:
        """Sends a file; returns its checksum. Raises :class:`TransferError`, ConnectionLostError, and OSError
        for a file that cannot be read; after an error, connect again."""
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            await say(self._connection, name=path.name, size=size)
            start, digest = await self._begin(path, await hear(self._connection))
            await say(self._connection, start=start)
            file.seek(start)
            progress(start, size)
            await self._send_from(file, start, size, digest, progress)
        await say(self._connection, digest=digest.hexdigest())
        await hear(self._connection)
        return str(digest.hexdigest())

    @staticmethod
    async def _begin(path: Path, there: dict[str, Any]) -> tuple[int, Any]:
        """Where to begin: behind what the server has, if it is the beginning of this file."""
        digest = await asyncio.to_thread(digest_of, path, there["have"])
        if digest.hexdigest() == there["digest"]:
            return there["have"], digest
        return 0, hashlib.blake2b()

    async def _send_from(
        self, file: io.BufferedReader, start: int, size: int, digest: Any, progress: Progress
    ) -> None:
        """Up to WINDOW chunks are on their way; each that is stored makes room for one."""
        writes: deque[Any] = deque()
        for number, offset in enumerate(range(start, size, CHUNK)):
            if len(writes) == WINDOW:
                await self._stored(writes, size, progress)
            chunk = self._buffer[place(number, min(CHUNK, size - offset))]
            await asyncio.to_thread(fill, chunk, file, digest)
            remote = self._window[place(number, len(chunk))]
            writes.append(self._connection.write(chunk, remote, notify=number % (1 << 32)))
        while writes:
            await self._stored(writes, size, progress)

    async def _stored(self, writes: deque[Any], size: int, progress: Progress) -> None:
        stored = (await hear(self._connection))["stored"]
        await writes.popleft()
        progress(stored, size)


def fill(chunk: memoryview, file: io.BufferedReader, digest: Any) -> None:
    """Reads a chunk from the disk, in a thread."""
    if file.readinto(chunk) != len(chunk):
        raise TransferError("the file has become shorter while it was sent")
    digest.update(chunk)


class ProgressBar:
    """On a terminal, a line that grows; elsewhere nothing until the end."""

    WIDTH = 30

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._started = clock()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Draws it."""
        if self._first is None:
            self._first = done
        if sys.stderr.isatty():
            print(
                "\r" + self.line(done, total), end="\n" if done == total else "", file=sys.stderr, flush=True
            )

    def line(self, done: int, total: int) -> str:
        """What is drawn. The rate, in 10**6 bytes, is of what was sent and stored since the beginning."""
        part = done / total if total else 1.0
        rate = (done - (self._first or 0)) / max(self._clock() - self._started, 1e-9)
        bar = "#" * int(part * self.WIDTH)
        return f"{self._name} [{bar:{self.WIDTH}}] {part:4.0%} of {total} bytes, {rate / 1e6:.1f} MB/s"


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Sends the files."""
    async with Sender.connect(args.host, args.port, config) as sender:
        for path in args.files or [Path(__file__)]:
            digest = await sender.send(path, ProgressBar(path.name))
            print(f"{path.name}: {path.stat().st_size} bytes, stored, BLAKE2b {digest[:16]}... on both sides")


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, config: aiordma.Config) -> AsyncIterator[int]:
    """A server for the block; its port."""
    with tempfile.TemporaryDirectory() as temporary:
        receiver = Receiver(args.folder or Path(temporary))
        async with aiordma.serve(receiver.handler, args.host, args.port, config=config) as listening:
            yield listening.port


def main() -> None:
    """The command line."""
    parser = program.arguments(__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="client: what to send")
    parser.add_argument("--folder", type=Path, help="server: where to store it (default: a temporary folder)")
    try:
        program.run(parser.parse_intermixed_args(), serving, client)
    except (TransferError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
