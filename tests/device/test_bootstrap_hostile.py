"""What arrives on the bootstrap port is hostile until shown otherwise, and costs the server next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import aiordma
from aiordma import Config, Server
from aiordma.errors import (
    AuthenticationError,
    BootstrapError,
    BootstrapTimeoutError,
    MalformedHandshakeError,
    TlsError,
    VersionMismatchError,
)
from tests.device.conftest import Acceptor

pytestmark = pytest.mark.device

Listen = Callable[..., Awaitable[tuple[Server, Acceptor]]]
#: Long enough for an honest client in an emulated machine.
PATIENT = Config(handshake_timeout=5.0)


@contextlib.asynccontextmanager
async def raw(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("!I", await reader.readexactly(4))
    return await reader.readexactly(length)


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """What the server still says before it hangs up, which it does well before the test's own limit."""
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionResetError:
        return b""


async def serves(server: Server, acceptor: Acceptor, **kwargs: object) -> None:
    """A good client gets in and is served."""
    async with aiordma.connect("127.0.0.1", server.port, **kwargs) as client:  # type: ignore[arg-type]
        accepted = await acceptor.accepted.get()
        await client.send(b"good")
        assert await accepted.recv() == b"good"


@pytest.mark.parametrize(
    "nonsense",
    [
        secrets.token_bytes(4096),
        b"\xff\xff\xff\xff" + bytes(100),
        struct.pack("!I", 1 << 20),
        struct.pack("!I", 5) + b"{nope",
        struct.pack("!I", 2) + b"{}",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        struct.pack("!I", 8000) + b"[" * 8000,
    ],
    ids=["random", "huge", "oversized", "json", "empty", "http", "tls", "nested"],
)
async def test_nonsense_is_refused_at_once(listen: Listen, nonsense: bytes) -> None:
    server, acceptor = await listen()
    async with raw(server) as (reader, writer):
        await read_frame(reader)
        writer.write(nonsense)
        assert b'"refused"' in await until_closed(reader)
    assert server.refused == 1
    await serves(server, acceptor)


async def test_two_hundred_half_open_and_slow_clients(listen: Listen) -> None:
    server, acceptor = await listen(PATIENT)
    await serves(server, acceptor)
    registered = server._route.adapter.pool.statistics().registered  # type: ignore[union-attr]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(server)) for _ in range(200)]
        for i, (_, writer) in enumerate(clients):
            if i % 2:
                writer.write(struct.pack("!I", 1000) + b'{"type": "hello"')  # the rest never comes
        for _ in range(3):
            await serves(server, acceptor)
        ends = await asyncio.gather(*[until_closed(reader) for reader, _ in clients])
    assert all(b'"timeout"' in end for end in ends)
    assert not server._pending
    assert server._route.adapter.pool.statistics().registered == registered  # type: ignore[union-attr]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 32 * 1024, f"{grown} KiB for 200 clients that never spoke"
    await serves(server, acceptor)


async def test_more_half_open_clients_than_places(listen: Listen) -> None:
    server, acceptor = await listen(Config(max_handshakes=8, handshake_timeout=60))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(40):
            await stack.enter_async_context(raw(server))
        await serves(server, acceptor)
        assert len(server._pending) <= 8


async def test_a_slow_drip_does_not_outlive_the_deadline(listen: Listen) -> None:
    server, acceptor = await listen(Config(handshake_timeout=1.0))

    async def drip(writer: asyncio.StreamWriter) -> None:
        for byte in struct.pack("!I", 10_000) + bytes(10_000):
            writer.write(bytes([byte]))
            # No divisor of the deadline: a byte that the server has not read when it closes resets the connection.
            await asyncio.sleep(0.4)

    async with raw(server) as (reader, writer):
        dripping = asyncio.ensure_future(drip(writer))
        assert b'"timeout"' in await until_closed(reader)
        dripping.cancel()
        await asyncio.wait([dripping])


async def test_wrong_version(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    server, acceptor = await listen()
    from aiordma.connect import _ClientChannel

    original = _ClientChannel.__init__

    def newer(self: _ClientChannel, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self.handshake._versions = (2, 3)

    monkeypatch.setattr(_ClientChannel, "__init__", newer)
    with pytest.raises(VersionMismatchError, match="version"):
        await aiordma.connect("127.0.0.1", server.port)
    monkeypatch.undo()
    await serves(server, acceptor)


async def test_tokens(listen: Listen) -> None:
    server, acceptor = await listen(token="open sesame")
    for wrong in ("close sesame", None, b"\x00"):
        with pytest.raises(AuthenticationError):
            await aiordma.connect("127.0.0.1", server.port, token=wrong)
    await serves(server, acceptor, token="open sesame")
    await serves(server, acceptor, token=b"open sesame")
    open_server, _ = await listen()
    with pytest.raises(AuthenticationError):
        await aiordma.connect("127.0.0.1", open_server.port, token="the server asks for none")


class Recorder:
    """A TCP relay that keeps what the client said."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.said = b""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
            while data := await source.read(4096):
                if keep:
                    self.said += data
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, up_writer, True), pump(up_reader, writer, False))


@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_replayed_hello(listen: Listen, token: str | None) -> None:
    server, acceptor = await listen(token=token)
    recorder = Recorder(server.port)
    relay = await asyncio.start_server(recorder, "127.0.0.1", 0)
    async with relay:
        port = relay.sockets[0].getsockname()[1]
        async with aiordma.connect("127.0.0.1", port, token=token) as client:
            accepted = await acceptor.accepted.get()
            await client.send(b"through the relay")
            assert await accepted.recv() == b"through the relay"
        await accepted.wait_closed()
    async with raw(server) as (reader, writer):
        await read_frame(reader)
        writer.write(recorder.said)
        assert b'"refused"' in await until_closed(reader)
    assert server.refused == 1
    assert acceptor.accepted.empty()
    await serves(server, acceptor, token=token)


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A self-signed certificate for 127.0.0.1: the server's context and the client's."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=aiordma test"]
        + ["-addext", "subjectAltName=IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert))


async def test_tls(listen: Listen, tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path)
    server, acceptor = await listen(Config(handshake_timeout=3.0), ssl=server_tls, token="and a token")
    await serves(server, acceptor, ssl=client_tls, token="and a token")
    with pytest.raises(TlsError, match=r"(?i)certificate"):
        await aiordma.connect("127.0.0.1", server.port, ssl=ssl.create_default_context(), token="and a token")
    # Plain text to a TLS server: nobody speaks first, so the server's deadline ends it.
    with pytest.raises(BootstrapError):
        await aiordma.connect("127.0.0.1", server.port, token="and a token")
    async with raw(server) as (reader, writer):
        writer.write(struct.pack("!I", 100) + bytes(100))
        await until_closed(reader)
    await serves(server, acceptor, ssl=client_tls, token="and a token")
    plain, _ = await listen()
    with pytest.raises(TlsError):
        await aiordma.connect("127.0.0.1", plain.port, ssl=client_tls)


async def _fake_server(answer: bytes) -> asyncio.Server:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    return await asyncio.start_server(talk, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "answer", [os.urandom(500), b"SSH-2.0-OpenSSH_9.2\r\n", struct.pack("!I", 3) + b"{}}"]
)
async def test_a_client_meets_something_else(answer: bytes, no_leaked_tasks: None) -> None:
    fake = await _fake_server(answer)
    async with fake:
        with pytest.raises(MalformedHandshakeError):
            await aiordma.connect("127.0.0.1", fake.sockets[0].getsockname()[1])


async def test_a_client_meets_silence_and_nobody(no_leaked_tasks: None) -> None:
    fake = await _fake_server(b"")
    async with fake:
        port = fake.sockets[0].getsockname()[1]
        with pytest.raises(BootstrapTimeoutError, match="greeting"):
            await aiordma.connect("127.0.0.1", port, timeout=0.2)
    with pytest.raises(ConnectionRefusedError):
        await aiordma.connect("127.0.0.1", port)


async def test_cancelled_while_connecting(listen: Listen) -> None:
    server, acceptor = await listen()
    for turns in range(12):
        task = asyncio.ensure_future(_connect(server))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(result, BaseException):
            result.close()
            await result.wait_closed()
    while server.connections or server._pending:
        await asyncio.sleep(0)
    while not acceptor.accepted.empty():
        acceptor.accepted.get_nowait()
    await serves(server, acceptor)


async def test_a_full_server_says_so(listen: Listen) -> None:
    server, acceptor = await listen(Config(max_connections=1))
    async with aiordma.connect("127.0.0.1", server.port):
        await acceptor.accepted.get()
        with pytest.raises(BootstrapError, match="full"):
            await aiordma.connect("127.0.0.1", server.port)


async def _connect(server: Server) -> aiordma.Connection:
    return await aiordma.connect("127.0.0.1", server.port)
