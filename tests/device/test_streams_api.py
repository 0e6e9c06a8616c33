"""open_connection, start_server, the server object, TLS and sendfile: on asyncio's TCP and on RDMA alike."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path

import pytest

from tests.device.stream_ends import HOST, RESET, Network, Recorder, on_uvloop, reports
from tests.device.test_bootstrap_hostile import certificate

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

BIG = bytes(range(256)) * (1 << 13)  # 2 MiB


# --- StreamReader and StreamWriter ---------------------------------------------------------------------


async def test_lines_to_and_fro(net: Network) -> None:
    (reader, writer), (their_reader, their_writer) = await net.streams()
    for i in range(100):
        writer.write(b"line %d\n" % i)
        await writer.drain()
        assert await their_reader.readline() == b"line %d\n" % i
        their_writer.write(b"%d;" % i)
        assert await reader.readuntil(b";") == b"%d;" % i
    writer.write_eof()
    assert await their_reader.read() == b""
    assert their_reader.at_eof()
    their_writer.writelines([b"good", b"bye"])
    their_writer.close()
    assert await reader.read() == b"goodbye"
    writer.close()
    await writer.wait_closed()
    await their_writer.wait_closed()


async def test_limit_of_a_reader(net: Network) -> None:
    (reader, _), (_, their_writer) = await net.streams(limit=100)
    their_writer.write(b"x" * 150 + b"\n" + b"y" * 50 + b"\n")
    with pytest.raises(ValueError, match="limit"):
        await reader.readline()
    assert await reader.readline() == b"y" * 50 + b"\n"
    their_writer.write(b"z" * 300)
    with pytest.raises(asyncio.LimitOverrunError):
        await reader.readuntil(b"\n")
    assert await reader.readexactly(300) == b"z" * 300
    their_writer.close()
    with pytest.raises(asyncio.IncompleteReadError):
        await reader.readexactly(1)


async def test_a_slow_reader_holds_back_drain(net: Network) -> None:
    (reader, writer), (their_reader, _) = await net.streams(limit=1000)
    writing = asyncio.create_task(write_all(writer, 20 * len(BIG)))
    await their_reader.readexactly(10)
    await net.quiet()
    assert not writing.done()
    assert len(their_reader._buffer) <= 2 * 1000 + (256 << 10)  # type: ignore[attr-defined]
    rest = 20 * len(BIG) - 10
    while rest:
        rest -= len(await their_reader.read(1 << 20))
    await writing


async def write_all(writer: asyncio.StreamWriter, nbytes: int) -> None:
    chunk = bytes(64 << 10)
    for _ in range(nbytes // len(chunk)):
        writer.write(chunk)
        await writer.drain()


async def test_drain_fails_when_the_peer_is_gone(net: Network) -> None:
    (_, writer), (_, their_writer) = await net.streams(limit=1000)
    writing = asyncio.create_task(write_all(writer, 200 * len(BIG)))
    await net.quiet()
    their_writer.close()
    with pytest.raises(RESET):
        await writing
    with pytest.raises(RESET):
        await writer.wait_closed()


async def test_both_directions_at_once(net: Network) -> None:
    (reader, writer), (their_reader, their_writer) = await net.streams()

    async def read_all(reader: asyncio.StreamReader) -> bytes:
        return await reader.read()

    async def send(writer: asyncio.StreamWriter) -> None:
        for i in range(0, len(BIG), 50_000):
            writer.write(BIG[i : i + 50_000])
            await writer.drain()
        writer.write_eof()

    ours, theirs, _, _ = await asyncio.gather(
        read_all(reader), read_all(their_reader), send(writer), send(their_writer)
    )
    assert ours == theirs == BIG


# --- the server -----------------------------------------------------------------------------------------


async def test_closing_a_server_leaves_its_clients(net: Network) -> None:
    server_end, client = net.keep(Recorder()), net.keep(Recorder())
    server, port = await net.create_server(lambda: server_end)
    assert server.is_serving()
    assert server.get_loop() is asyncio.get_running_loop()
    await net.create_connection(lambda: client, port)
    await server_end.until(lambda: server_end.calls)
    server.close()
    server.close()
    assert not server.is_serving()
    assert not server.sockets
    client.transport.write(b"still here")
    assert await server_end.received(10) == b"still here"
    with pytest.raises(ConnectionError):
        await net.create_connection(Recorder, port)
    client.transport.close()
    assert await server_end.lost() is None
    assert await client.lost() is None
    await server.wait_closed()


async def test_a_server_that_starts_later(net: Network) -> None:
    ends = asyncio.Queue[Recorder]()

    def factory() -> Recorder:
        ends.put_nowait(net.keep(Recorder()))
        return net._ends[-1]

    server, port = await net.create_server(factory, start_serving=False)
    assert not server.is_serving()
    async with server:
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        client = net.keep(Recorder())
        await net.create_connection(lambda: client, port)
        await ends.get()
        client.transport.close()
        await client.lost()
    assert not server.is_serving()


async def test_serve_forever(net: Network) -> None:
    server, _ = await net.create_server(Recorder)
    forever = asyncio.create_task(server.serve_forever())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError):
        await server.serve_forever()
    forever.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forever
    assert not server.is_serving()
    with pytest.raises(RuntimeError):
        await server.serve_forever()


async def test_close_ends_serve_forever(net: Network) -> None:
    server, _ = await net.create_server(Recorder)
    forever = asyncio.create_task(server.serve_forever())
    await asyncio.sleep(0)
    server.close()
    with pytest.raises(asyncio.CancelledError):
        await forever


async def test_a_handler_that_raises_harms_only_its_client(net: Network) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line == b"raise\n":
            writer.close()
            raise KeyError("a bug")
        writer.write(line)
        writer.close()

    server = await net.module.start_server(handler, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    with reports() as seen:
        for line, answer in ((b"raise\n", b""), (b"echo\n", b"echo\n")):
            reader, writer = await net.module.open_connection(HOST, port)
            writer.write(line)
            assert await reader.read() == answer
            writer.close()
            await writer.wait_closed()
    if sys.version_info >= (3, 12):
        assert [type(context["exception"]) for context in seen] == [KeyError]
    server.close()
    await server.wait_closed()


# --- TLS in the stream, sendfile -------------------------------------------------------------------------


async def test_tls_in_the_stream(net: Network, tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path)
    server, client = net.keep(Recorder()), net.keep(Recorder())
    listening, port = await net.create_server(lambda: server, ssl=server_tls)
    transport = await net.tls_connection(lambda: client, port, ssl=client_tls, server_hostname=HOST)
    await server.until(lambda: server.calls)
    for end in (transport, server.transport):
        assert end.get_extra_info("ssl_object").version().startswith("TLS")
        assert end.get_extra_info("sslcontext") is not None
        assert end.get_extra_info("peername")[0] == HOST
    transport.write(BIG)
    assert await server.received(len(BIG)) == BIG
    server.transport.write(BIG)
    assert await client.received(len(BIG)) == BIG
    transport.close()
    assert await client.lost() is None
    await server.lost()
    assert server.calls[:3] == ["made", "data", "eof"]


async def test_tls_with_a_server_that_is_not_trusted(net: Network, tmp_path: Path) -> None:
    server_tls, _ = certificate(tmp_path)
    _, port = await net.create_server(Recorder, ssl=server_tls)
    with reports(), pytest.raises(ssl.SSLCertVerificationError):
        await net.tls_connection(Recorder, port, ssl=ssl.create_default_context(), server_hostname=HOST)
    await net.quiet()


async def test_start_tls_in_the_middle(net: Network, tmp_path: Path) -> None:
    """As SMTP and IMAP do. uvloop does it for its own transports only, whatever they carry."""
    server_tls, client_tls = certificate(tmp_path)
    (reader, writer), (their_reader, their_writer) = await net.streams()
    writer.write(b"STARTTLS\n")
    assert await their_reader.readline() == b"STARTTLS\n"
    if on_uvloop():
        with pytest.raises(TypeError):
            await writer.start_tls(client_tls, server_hostname=HOST)
        return
    await asyncio.gather(
        their_writer.start_tls(server_tls), writer.start_tls(client_tls, server_hostname=HOST)
    )
    assert writer.get_extra_info("ssl_object").version().startswith("TLS")
    writer.write(b"secret\n")
    assert await their_reader.readline() == b"secret\n"
    their_writer.write(BIG)
    assert await reader.readexactly(len(BIG)) == BIG


async def test_sendfile(net: Network, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BIG)
    client, server = await net.pair()
    with path.open("rb") as file:
        if on_uvloop():  # which has no sendfile at all
            with pytest.raises(NotImplementedError):
                await loop().sendfile(client.transport, file)
            return
        client.transport.write(b"header ")
        assert await loop().sendfile(client.transport, file, 100, 1_000_000) == 1_000_000
    client.transport.write(b" end")
    client.transport.close()
    assert await server.lost() is None
    assert server.data == b"header " + BIG[100:1_000_100] + b" end"


def loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()
