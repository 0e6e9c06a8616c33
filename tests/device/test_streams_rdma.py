"""What the streams' comparison with TCP cannot show: their messages, their memory, the refusal of other peers, and
ends that TCP would take for good ones."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiordma
from aiordma import Config
from aiordma.errors import (
    ConnectionLostError,
    DeviceError,
    DeviceGoneError,
    IncompatibleError,
    MemoryLimitError,
    RdmaError,
    WcStatus,
    completion_error,
)
from aiordma.mr_pool import MemoryPool
from aiordma.stream_transport import RdmaTransport, stream_error
from aiordma.verbs import QueuePair
from tests.device.conftest import MakePair
from tests.device.stream_ends import HOST, Network, Recorder, network, reports

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]


@pytest.fixture
async def net(no_leaked_tasks: None) -> AsyncIterator[Network]:
    async with network("rdma") as made:
        yield made


def connection(end: Recorder) -> aiordma.Connection:
    found = end.transport.get_extra_info("rdma_connection")
    assert isinstance(found, aiordma.Connection)
    return found


# --- who may talk to whom ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_client_for_messages_is_refused_by_a_stream_server(net: Network, token: str | None) -> None:
    _, port = await net.create_server(Recorder, token=token)
    with pytest.raises(IncompatibleError, match="this side speaks stream, and the client does not"):
        await aiordma.connect(HOST, port, token=token)


@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_stream_client_refuses_a_server_for_messages(listen: Any, token: str | None) -> None:
    server, acceptor = await listen(token=token)
    with pytest.raises(IncompatibleError, match="this side speaks stream, and the server does not"):
        await aiordma.open_connection(HOST, server.port, token=token)
    assert acceptor.accepted.empty()


async def test_the_connection_of_a_transport(net: Network) -> None:
    client, server = await net.pair(config=Config(mode="event"))
    assert client.transport.get_extra_info("qp_num") == connection(client).qp_num
    assert connection(client).statistics().state == "open"
    assert isinstance(client.transport, RdmaTransport)
    assert "open" in repr(client.transport)
    client.transport.close()
    await client.lost()
    assert "closed" in repr(client.transport)
    assert connection(client).statistics().state == "closed"
    await server.lost()


# --- messages ---------------------------------------------------------------------------------------------


async def messages(client: Recorder, server: Recorder, nbytes: int) -> int:
    await server.received(nbytes)
    return connection(server).statistics().messages_received


async def test_the_first_write_of_a_turn_leaves_at_once_and_the_rest_together(net: Network) -> None:
    client, server = await net.pair()
    for _ in range(100):
        client.transport.write(b"x" * 10)
    assert client.transport.get_write_buffer_size() == 990
    assert await messages(client, server, 1000) == 2


async def test_writelines_leave_together(net: Network) -> None:
    client, server = await net.pair()
    client.transport.writelines([b"x" * 10] * 100)
    assert await messages(client, server, 1000) == 1


class EndsWhenWritable(Recorder):
    """What was written fits again, and that is the end."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end

    def resume_writing(self) -> None:
        super().resume_writing()
        getattr(self.transport, self.end)()


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_a_protocol_that_ends_in_resume_writing_is_told_once(net: Network, end: str) -> None:
    client, server = await net.pair(EndsWhenWritable(end))
    client.transport.set_write_buffer_limits(high=0)
    client.transport.write(b"at once")
    client.transport.write(b"in the buffer")
    assert not client.writable
    await client.lost()
    await server.lost()
    await net.quiet()  # a second callback would have come by now
    assert await client.lost() is None
    assert client.calls == ["made", "pause", "resume", ("lost", None)]
    assert bytes(server.data) in (b"at oncein the buffer", *([b"", b"at once"] if end == "abort" else []))


async def test_a_large_write_travels_in_large_messages(net: Network) -> None:
    client, server = await net.pair()
    client.transport.write(b"header")
    client.transport.write(bytes(3_000_000))
    assert await messages(client, server, 3_000_006) == 1 + 3


async def test_large_data_that_cannot_be_registered_goes_in_small_messages(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLIMIT_MEMLOCK, mostly."""
    client, server = await net.pair()

    def refuse(self: MemoryPool, *_: Any) -> Any:
        raise MemoryLimitError("no more memory can be locked")

    monkeypatch.setattr(MemoryPool, "pin_exposed", refuse)
    data = os.urandom(500_000)
    client.transport.write(b"header")
    client.transport.write(data)
    client.transport.write(b"end")
    client.transport.close()
    assert await server.lost() is None
    assert server.data == b"header" + data + b"end"
    assert await client.lost() is None


# --- memory -----------------------------------------------------------------------------------------------


async def test_a_reader_that_never_reads_costs_bounded_memory(net: Network) -> None:
    """Neither side keeps more than its windows and the writer's own limit."""
    client, server = await net.pair()
    server.transport.pause_reading()
    assert await net.fill(client) < 5_000_000
    assert connection(client).statistics().pool.pinned <= 4 << 20
    statistics = connection(server).statistics()
    assert statistics.messages_queued <= Config().receive_credits
    assert server.data == b""
    # Large ones are not even moved before they are wanted.
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.write(bytes(20_000_000))
    await net.quiet()
    assert client.transport.get_write_buffer_size() >= 15_000_000
    assert connection(client).statistics().pool.pinned <= 5 << 20
    assert connection(server).statistics().pool.leased <= 4_000_000


async def test_writes_to_a_lost_connection_are_dropped_and_logged_in_the_end(
    net: Network, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = await net.pair()
    client.transport.abort()
    for _ in range(4):
        client.transport.write(b"nobody hears")
    assert not caplog.records
    client.transport.write(b"nobody hears")
    assert "lost or closing" in caplog.records[0].getMessage()
    await server.lost()


async def test_two_that_both_write_before_they_read_go_on(net: Network) -> None:
    client, server = await net.pair()
    for end in (client, server):
        end.transport.pause_reading()
    written = [await net.fill(end) for end in (client, server)]
    for end in (client, server):
        end.transport.resume_reading()
    assert len(await server.received(written[0])) == written[0]
    assert len(await client.received(written[1])) == written[1]


@pytest.mark.parametrize("limit", [{}, {"max_message_size": 64}], ids=["large", "no large"])
async def test_smallest_windows(net: Network, limit: dict[str, Any]) -> None:
    config = Config(receive_credits=2, send_depth=2, eager_size=64, rendezvous_depth=1, **limit)
    client, server = await net.pair(config=config)
    data = os.urandom(300_000)
    client.transport.write(data[:20_000])
    client.transport.write(data[20_000:])
    assert await server.received(300_000) == data
    server.transport.write(data)
    server.transport.close()
    await server.lost()
    assert await client.lost() is None
    assert client.data == data


async def test_a_large_message_that_cannot_be_offered_ends_the_stream(
    net: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There would be a gap. The connection itself would go on."""
    client, server = await net.pair()

    def refuse(self: QueuePair, *_: Any) -> None:
        raise DeviceError("the device refuses to bind")

    monkeypatch.setattr(QueuePair, "post_bind", refuse)
    if not connection(client).route.adapter.attributes.memory_windows:
        return
    client.transport.write(b"before")
    client.transport.write(bytes(100_000))
    assert isinstance(await client.lost(), ConnectionAbortedError)
    assert isinstance(await server.lost(), ConnectionResetError)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionLostError("gone"), ConnectionResetError),
        (completion_error(int(WcStatus.RETRY_EXC_ERR)), TimeoutError),
        (DeviceGoneError("removed"), ConnectionAbortedError),
        (MemoryLimitError("no memory"), ConnectionResetError),
    ],
)
def test_errors_are_of_the_kinds_that_libraries_know(error: RdmaError, kind: type[OSError]) -> None:
    outer = ConnectionLostError("recv failed")
    outer.__cause__ = ConnectionLostError("connection")
    outer.__cause__.__cause__ = error
    for given in (error, outer):
        translated = stream_error(given)
        assert isinstance(translated, kind)
        assert translated.errno is not None
        assert translated.__cause__ is given


# --- ends that TCP takes for good ones ----------------------------------------------------------------------


async def test_the_peer_of_an_abort_gets_a_reset(net: Network) -> None:
    client, server = await net.pair()
    client.transport.abort()
    error = await server.lost()
    assert isinstance(error, ConnectionResetError)
    assert error.errno == errno.ECONNRESET
    assert "aborted" in str(error)
    assert server.calls == ["made", ("lost", error)]


async def test_what_arrived_before_a_reset_is_delivered(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.write(b"before")
    await net.quiet()
    client.transport.abort()
    server.transport.resume_reading()
    assert isinstance(await server.lost(), ConnectionResetError)
    assert server.data == b"before"


async def test_unread_data_resets_the_peer_without_a_write(net: Network) -> None:
    client, server = await net.pair(client=Recorder(keep_open=True))
    server.transport.pause_reading()
    client.transport.write(b"x")
    await net.quiet()
    server.transport.close()
    assert await server.lost() is None
    assert isinstance(await client.lost(), ConnectionResetError)


async def test_more_after_the_end_is_a_breach(net: Network) -> None:
    client, server = await net.pair(server=Recorder(keep_open=True))
    client.transport.write_eof()
    await server.until(lambda: "eof" in server.calls)
    await connection(client).send(b"more")
    error = await server.lost()
    assert isinstance(error, ConnectionResetError)
    assert server.data == b""
    assert "after the end" in str(await client.lost())


async def test_a_server_that_cannot_make_a_protocol_goes_on(net: Network) -> None:
    made: list[None] = []

    def factory() -> Recorder:
        if not made:
            made.append(None)
            raise KeyError("a bug")
        return net.keep(Recorder())

    _, port = await net.create_server(factory)
    with reports() as seen:
        first, second = net.keep(Recorder()), net.keep(Recorder())
        await net.create_connection(lambda: first, port)
        await first.lost()
        await net.create_connection(lambda: second, port)
    assert [type(context["exception"]) for context in seen] == [KeyError]


async def test_a_client_whose_protocol_cannot_be_made(net: Network) -> None:
    _, port = await net.create_server(lambda: net.keep(Recorder()))

    def factory() -> Recorder:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        await aiordma.create_connection(factory, HOST, port)


async def test_a_cancelled_connect_gives_everything_back(net: Network) -> None:
    _, port = await net.create_server(lambda: net.keep(Recorder()))
    for turns in range(30):
        task = asyncio.ensure_future(aiordma.create_connection(lambda: net.keep(Recorder()), HOST, port))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])


CHILD = """
import asyncio, sys, aiordma

async def main():
    reader, writer = await aiordma.open_connection(sys.argv[1], int(sys.argv[2]), timeout=60)
    writer.write(b"half a sentence")
    await writer.drain()
    print("written", flush=True)
    await reader.read()

asyncio.run(main())
"""


async def test_a_killed_peer_is_a_reset_and_not_the_end_of_the_stream(net: Network) -> None:
    """With TCP its kernel says goodbye as if all had been sent."""
    server = net.keep(Recorder(keep_open=True))
    _, port = await net.create_server(lambda: server)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", CHILD, HOST, str(port)], env=environment) as child:
        await server.until(lambda: len(server.data) >= 15)
        child.kill()
        error = await server.lost()
    assert isinstance(error, ConnectionResetError)
    assert server.data == b"half a sentence"
    assert "eof" not in server.calls


async def test_a_stream_whose_connection_breaks(pair: MakePair, net: Network) -> None:
    """drain() and read() of both sides say so."""
    (reader, writer), (their_reader, their_writer) = await net.streams()
    reading = asyncio.ensure_future(their_reader.read())
    writer.get_extra_info("rdma_connection").fail(aiordma.errors.ProtocolError("a bug"))
    with pytest.raises(ConnectionResetError):
        await reading
    with pytest.raises(ConnectionResetError):
        await reader.read()
    for w in (writer, their_writer):
        w.write(b"too late")
        with pytest.raises(ConnectionResetError):
            await w.drain()
