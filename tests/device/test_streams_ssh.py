"""asyncssh over RDMA, as it is: anything with create_connection() and create_server() can be its tunnel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh
import pytest

import aiordma

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


class RdmaTunnel:
    """What asyncssh takes as ``tunnel=``."""

    def __init__(self) -> None:
        self.connections: list[aiordma.Connection] = []

    async def create_connection(self, factory: Callable[..., Any], host: str, port: int) -> tuple[Any, Any]:
        transport, protocol = await aiordma.create_connection(factory, host, port)
        self.connections.append(transport.get_extra_info("rdma_connection"))
        return transport, protocol

    async def create_server(self, factory: Callable[..., Any], host: str, port: int) -> Any:
        return await aiordma.create_server(lambda: factory(host, port), host, port)


class Server(asyncssh.SSHServer):
    """Lets everybody in, and forwards connections."""

    def begin_auth(self, username: str) -> bool:
        return False

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        return True


async def process(process: asyncssh.SSHServerProcess[bytes]) -> None:
    """``size`` counts its input, everything else echoes it."""
    if process.command == "size":
        got = 0
        while data := await process.stdin.read(65536):
            got += len(data)
        process.stdout.write(b"%d" % got)
        process.exit(7)
        return
    async for line in process.stdin:
        process.stdout.write(line)
    process.stderr.write(b"end")
    process.exit(0)


@asynccontextmanager
async def connected(folder: Path) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """A client of a server that runs here."""
    tunnel = RdmaTunnel()
    listening = await asyncssh.listen(
        "127.0.0.1",
        0,
        tunnel=tunnel,
        server_factory=Server,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=process,
        encoding=None,
        sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=bytes(folder)),
    )
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        async with asyncssh.connect(
            "127.0.0.1", port, tunnel=tunnel, known_hosts=None, username="anybody", config=None
        ) as client:
            yield client
    for connection in tunnel.connections:
        await connection.wait_closed()


async def test_commands(tmp_path: Path) -> None:
    async with connected(tmp_path) as ssh:
        result = await ssh.run("echo", input=b"one\ntwo\n", encoding=None)
        assert (result.stdout, result.stderr, result.exit_status) == (b"one\ntwo\n", b"end", 0)
        result = await ssh.run("size", input=bytes(500_000), encoding=None)
        assert (result.stdout, result.exit_status) == (b"500000", 7)


async def test_several_channels_at_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as ssh:
        results = await asyncio.gather(
            *(ssh.run("size", input=bytes(10_000 * i), encoding=None) for i in range(1, 6))
        )
        assert [result.stdout for result in results] == [b"%d" % (10_000 * i) for i in range(1, 6)]


async def test_sftp(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2000
    (tmp_path / "there").mkdir()
    async with connected(tmp_path / "there") as ssh, ssh.start_sftp_client() as sftp:
        async with sftp.open("file", "wb") as file:
            await file.write(content)
        assert (tmp_path / "there" / "file").read_bytes() == content
        await sftp.get("file", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content
        assert await sftp.listdir() == [".", "..", "file"]


async def test_a_connection_through_the_connection(tmp_path: Path) -> None:
    """Port forwarding: asyncssh's own streams, within SSH, within RDMA."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    target = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with target, connected(tmp_path) as ssh:
        reader, writer = await ssh.open_connection("127.0.0.1", target.sockets[0].getsockname()[1])
        writer.write(b"through")
        writer.write_eof()
        assert await reader.read() == b"through"
