"""The file transfer example: files of every size arrive, what broke off goes on, and what goes wrong is said."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import aiordma
from aiordma.errors import ConnectionLostError
from file_transfer import CHUNK, WINDOW, ProgressBar, Receiver, Sender, TransferError, hear, say

from .programs import output, running, served, serving

pytestmark = pytest.mark.device

LARGE = WINDOW * CHUNK + CHUNK // 2 + 1


class Interrupted(Exception):
    """The sender gives up."""


def make_file(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the server stores."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@contextlib.asynccontextmanager
async def receiver(folder: Path) -> AsyncIterator[int]:
    """A server in this event loop; its port."""
    async with aiordma.serve(Receiver(folder).handler, "127.0.0.1", 0) as server:
        yield server.port


def nothing(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def after(count: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    """Progress that does something after that many chunks."""

    def progress(done: int, total: int) -> None:
        if done >= count * CHUNK:
            act()

    return progress


def interrupt() -> None:
    raise Interrupted


def test_program() -> None:
    assert "bytes, stored, BLAKE2b " in output("file_transfer.py")


def test_files_of_every_size(tmp_path: Path, store: Path) -> None:
    sizes = [0, 1, CHUNK - 1, CHUNK, LARGE]
    paths = [make_file(tmp_path / f"file {size}", size, size) for size in sizes]
    server = ["file_transfer.py", "server", f"--folder={store}"]
    text = served(server, ["file_transfer.py", "client", *map(str, paths)])
    for path, line in zip(paths, text.splitlines(), strict=True):
        data = path.read_bytes()
        assert (store / path.name).read_bytes() == data
        digest = hashlib.blake2b(data).hexdigest()[:16]
        assert line == f"{path.name}: {len(data)} bytes, stored, BLAKE2b {digest}... on both sides"
    assert sorted(path.name for path in store.iterdir()) == sorted(path.name for path in paths)


async def test_a_transfer_that_broke_off_goes_on(tmp_path: Path, store: Path, no_leaked_tasks: None) -> None:
    path = make_file(tmp_path / "large", LARGE)
    with serving("file_transfer.py", "server", f"--folder={store}") as (_, port):
        with pytest.raises(Interrupted):
            async with Sender.connect("127.0.0.1", port) as sender:
                await sender.send(path, after(3, interrupt))
        assert not (store / "large").exists()
        done: list[int] = []
        async with Sender.connect("127.0.0.1", port) as sender:
            await sender.send(path, lambda now, total: done.append(now))
    assert done[0] >= 3 * CHUNK
    assert done[-1] == LARGE
    assert (store / "large").read_bytes() == path.read_bytes()
    assert not (store / ".large.part").exists()


async def test_the_server_dies_and_comes_back(tmp_path: Path, store: Path, no_leaked_tasks: None) -> None:
    path = make_file(tmp_path / "large", LARGE)
    with serving("file_transfer.py", "server", f"--folder={store}") as (process, port):
        with pytest.raises(ConnectionLostError):
            async with Sender.connect("127.0.0.1", port) as sender:
                await sender.send(path, after(2, process.kill))
    with serving("file_transfer.py", "server", f"--folder={store}") as (_, port):
        done: list[int] = []
        async with Sender.connect("127.0.0.1", port) as sender:
            await sender.send(path, lambda now, total: done.append(now))
    assert done[0] >= 2 * CHUNK
    assert (store / "large").read_bytes() == path.read_bytes()


async def test_the_beginning_of_another_file_is_not_kept(
    tmp_path: Path, store: Path, no_leaked_tasks: None
) -> None:
    make_file(store / ".file.part", 3 * CHUNK, seed=1)
    path = make_file(tmp_path / "file", 2 * CHUNK + 5)
    async with receiver(store) as port, Sender.connect("127.0.0.1", port) as sender:
        done: list[int] = []
        await sender.send(path, lambda now, total: done.append(now))
    assert done == [0, CHUNK, 2 * CHUNK, 2 * CHUNK + 5]
    assert (store / "file").read_bytes() == path.read_bytes()


async def test_a_file_that_shrinks(tmp_path: Path, store: Path, no_leaked_tasks: None) -> None:
    path = make_file(tmp_path / "large", LARGE)
    async with receiver(store) as port, Sender.connect("127.0.0.1", port) as sender:
        with pytest.raises(TransferError, match="has become shorter"):
            await sender.send(path, after(1, lambda: path.write_bytes(b"")))


async def test_a_checksum_that_differs(store: Path, no_leaked_tasks: None) -> None:
    async with receiver(store) as port, aiordma.connect("127.0.0.1", port) as connection:
        await say(connection, name="file", size=0)
        await hear(connection)
        await say(connection, start=0)
        await say(connection, digest="0" * 128)
        with pytest.raises(TransferError, match="'file': the checksums differ"):
            await hear(connection)
    assert list(store.iterdir()) == []


async def test_two_clients_with_one_name(tmp_path: Path, store: Path, no_leaked_tasks: None) -> None:
    path = make_file(tmp_path / "file", 5)
    async with receiver(store) as port:
        async with aiordma.connect("127.0.0.1", port) as connection:
            await say(connection, name="file", size=5)
            await hear(connection)
            async with Sender.connect("127.0.0.1", port) as sender:
                with pytest.raises(TransferError, match="'file' is being received from another client"):
                    await sender.send(path, nothing)


@pytest.mark.parametrize("name", ["../file", "/etc/file", ".hidden", "", ".."])
async def test_names_that_are_refused(name: str, store: Path, no_leaked_tasks: None) -> None:
    async with receiver(store) as port, aiordma.connect("127.0.0.1", port) as connection:
        await say(connection, name=name, size=1)
        with pytest.raises(TransferError, match="is not a name for a file here"):
            await hear(connection)
    assert list(store.iterdir()) == []


def test_errors_end_the_program(tmp_path: Path) -> None:
    """A folder that is not there, at the server; a file that is not, at the client."""
    path = make_file(tmp_path / "file", 5)
    with serving("file_transfer.py", "server", f"--folder={tmp_path / 'nowhere'}") as (_, port):
        for name, error in ((path, "TransferError: [Errno 2]"), (tmp_path / "missing", "FileNotFoundError")):
            with running("file_transfer.py", "client", f"--port={port}", str(name)) as client:
                text, _ = client.communicate()
            assert client.returncode == 1
            assert text.startswith(error)


def test_progress_bar() -> None:
    bar = ProgressBar("file", iter((10.0, 12.0, 14.0)).__next__)
    bar(1_000_000, 4_000_000)
    assert bar.line(2_000_000, 4_000_000) == f"file [{'#' * 15}{' ' * 15}]  50% of 4000000 bytes, 0.5 MB/s"
    assert bar.line(4_000_000, 4_000_000) == f"file [{'#' * 30}] 100% of 4000000 bytes, 0.8 MB/s"


def test_progress_bar_of_an_empty_file() -> None:
    assert ProgressBar("file").line(0, 0).startswith(f"file [{'#' * 30}] 100% of 0 bytes")
