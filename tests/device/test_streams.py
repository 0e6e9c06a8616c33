"""Transport and protocol, on asyncio's TCP and on RDMA by the same tests: a protocol must see the same."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from tests.device.stream_ends import RESET, BufferedRecorder, Network, Recorder, on_uvloop

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

BIG = bytes(range(256)) * (1 << 13)  # 2 MiB


# --- the order of things ------------------------------------------------------------------------------


async def test_a_life_in_order(net: Network) -> None:
    client, server = await net.pair()
    client.transport.write(b"request")
    assert await server.received(7) == b"request"
    server.transport.write(b"answer")
    assert await client.received(6) == b"answer"
    assert not client.transport.is_closing()
    client.transport.close()
    assert client.transport.is_closing()
    assert await client.lost() is None
    assert await server.lost() is None
    assert client.calls == ["made", "data", ("lost", None)]
    assert server.calls == ["made", "data", "eof", ("lost", None)]


async def test_close_is_idempotent_and_later_calls_are_harmless(net: Network) -> None:
    client, server = await net.pair()
    client.transport.close()
    client.transport.close()
    client.transport.pause_reading()
    client.transport.resume_reading()
    client.transport.write_eof()
    assert not client.transport.is_reading()
    assert await client.lost() is None
    client.transport.close()
    client.transport.abort()
    for _ in range(3):
        client.transport.write(b"too late")
    assert await server.lost() is None
    assert server.data == b""
    assert client.calls == ["made", ("lost", None)]


class AtOnce(Recorder):
    """Does something as soon as it is connected."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.what == "pause":
            self.transport.pause_reading()
        if self.what in ("write", "write and close"):
            self.transport.write(b"welcome")
        if self.what in ("close", "write and close"):
            self.transport.close()


async def test_writing_in_connection_made(net: Network) -> None:
    client, server = await net.pair(AtOnce("write"), AtOnce("write"))
    assert await client.received(7) == await server.received(7) == b"welcome"


async def test_pausing_in_connection_made(net: Network) -> None:
    if not net.rdma and sys.version_info < (3, 11, 4):
        pytest.skip("asyncio's TCP reads nevertheless before Python 3.11.4 (gh-103607)")
    client, server = await net.pair(server=AtOnce("pause"))
    client.transport.write(b"early")
    await net.quiet()
    assert server.calls == ["made"]
    server.transport.resume_reading()
    assert await server.received(5) == b"early"


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(("what", "data"), [("close", b""), ("write and close", b"welcome")])
async def test_closing_in_connection_made(net: Network, side: str, what: str, data: bytes) -> None:
    ends = await net.pair(**{side: AtOnce(what)})
    closing, other = ends if side == "client" else ends[::-1]
    assert await closing.lost() is None
    assert await other.lost() is None
    assert other.data == data
    assert closing.calls == ["made", ("lost", None)]


async def test_both_close_at_the_same_time(net: Network) -> None:
    client, server = await net.pair()
    client.transport.close()
    server.transport.close()
    assert await client.lost() is None
    assert await server.lost() is None


async def test_close_sends_what_was_written(net: Network) -> None:
    client, server = await net.pair()
    client.transport.write(BIG)
    client.transport.write(b"end")
    client.transport.close()
    assert await client.lost() is None
    assert await server.lost() is None
    assert server.data == BIG + b"end"


async def test_close_in_data_received_is_the_last_callback(net: Network) -> None:
    class Closing(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.close()

    client, server = await net.pair(server=Closing())
    client.transport.write(BIG)
    assert await server.lost() is None
    assert server.calls == ["made", "data", ("lost", None)]
    assert len(server.data) < len(BIG)
    assert isinstance(await client.lost(), RESET)


# --- half close ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_first", ["client", "server"])
async def test_half_close(net: Network, ends_first: str) -> None:
    """One side ends its stream and still gets what the other sends."""
    ends = await net.pair(Recorder(keep_open=True), Recorder(keep_open=True))
    first, second = ends if ends_first == "client" else ends[::-1]
    first.transport.write(b"question")
    first.transport.write_eof()
    first.transport.write_eof()
    await second.until(lambda: "eof" in second.calls)
    assert second.data == b"question"
    second.transport.write(BIG)
    assert await first.received(len(BIG)) == BIG
    assert not second.transport.is_closing()
    second.transport.write(b"more")
    second.transport.write_eof()
    await first.until(lambda: "eof" in first.calls)
    assert first.data == BIG + b"more"
    assert not first.transport.is_closing()
    first.transport.close()
    second.transport.close()
    assert await first.lost() is None
    assert await second.lost() is None
    assert first.calls == ["made", "data", "eof", ("lost", None)]


async def test_write_eof_comes_after_what_was_written(net: Network) -> None:
    client, server = await net.pair(server=Recorder(keep_open=True))
    assert client.transport.can_write_eof()
    client.transport.write(BIG)
    client.transport.write_eof()
    await server.until(lambda: "eof" in server.calls)
    assert server.data == BIG
    with pytest.raises(RuntimeError):
        client.transport.write(b"more")


@pytest.mark.parametrize("answer", [None, False])
async def test_eof_received_closes_unless_it_says_otherwise(net: Network, answer: bool | None) -> None:
    client, server = await net.pair(server=Recorder(keep_open=answer))  # type: ignore[arg-type]
    client.transport.write_eof()
    assert await server.lost() is None
    assert await client.lost() is None
    assert server.calls == ["made", "eof", ("lost", None)]
    assert client.calls == ["made", "eof", ("lost", None)]


async def test_eof_received_may_write_its_answer_before_the_close(net: Network) -> None:
    class Answering(Recorder):
        def eof_received(self) -> None:
            super().eof_received()
            self.transport.write(BIG)

    client, server = await net.pair(server=Answering())
    client.transport.write_eof()
    assert await client.lost() is None
    assert client.data == BIG


async def test_writing_to_one_that_has_closed(net: Network) -> None:
    """It kept its side open after the peer's end, and finds nobody: a reset, not silence."""
    client, server = await net.pair(server=Recorder(keep_open=True))
    client.transport.close()
    assert await client.lost() is None
    await server.until(lambda: "eof" in server.calls)
    await net.quiet()
    assert not server.transport.is_closing()
    while not server.transport.is_closing():
        server.transport.write(b"x" * 1000)
        await asyncio.sleep(0)
    assert isinstance(await server.lost(), RESET)


# --- backpressure -------------------------------------------------------------------------------------


async def test_a_paused_reader_stops_the_writer_and_lets_it_go_on(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.set_write_buffer_limits(high=100_000, low=20_000)
    written = await net.fill(client)
    assert client.transport.get_write_buffer_limits() == (20_000, 100_000)
    assert client.transport.get_write_buffer_size() > 20_000
    assert server.data == b""
    assert client.stops[-1] == "pause"
    stops = len(client.stops)
    server.transport.resume_reading()
    await client.until(lambda: client.writable)
    await server.received(written)
    assert len(server.data) == written
    assert all(100_000 < size <= 100_000 + (64 << 10) for size in client.sizes_when_paused)
    assert all(size <= 20_000 for size in client.sizes_when_resumed)
    assert client.stops[stops:] == ["resume"]
    assert client.stops[::2] == ["pause"] * (len(client.stops) // 2)


async def test_a_writer_is_stopped_again_and_again(net: Network) -> None:
    client, server = await net.pair()
    written = 0
    for _ in range(3):
        server.transport.pause_reading()
        written += await net.fill(client)
        server.transport.resume_reading()
        await client.until(lambda: client.writable)
    client.transport.close()
    assert await server.lost() is None
    assert len(server.data) == written
    assert client.stops == ["pause", "resume"] * (len(client.stops) // 2)
    assert len(client.stops) >= 6


async def test_limits_of_the_write_buffer(net: Network) -> None:
    client, _ = await net.pair()
    transport = client.transport
    assert transport.get_write_buffer_limits() == (16 << 10, 64 << 10)
    transport.set_write_buffer_limits(low=1000)
    assert transport.get_write_buffer_limits() == (1000, 4000)
    transport.set_write_buffer_limits(high=1000)
    assert transport.get_write_buffer_limits() == (250, 1000)
    transport.set_write_buffer_limits(high=0)
    assert transport.get_write_buffer_limits() == (0, 0)
    for wrong in ({"high": 1, "low": 2}, {"high": 1, "low": -1}):
        with pytest.raises(ValueError, match="high"):
            transport.set_write_buffer_limits(**wrong)
    transport.set_write_buffer_limits()
    assert transport.get_write_buffer_limits() == (16 << 10, 64 << 10)
    assert transport.get_write_buffer_size() == 0


async def test_pause_reading_in_data_received(net: Network) -> None:
    """No data after it, whatever has arrived already."""

    class Sipping(Recorder):
        def data_received(self, data: bytes) -> None:
            assert self.transport.is_reading()
            super().data_received(data)
            self.transport.pause_reading()

    client, server = await net.pair(server=Sipping())
    client.transport.write(BIG)
    client.transport.write_eof()
    while len(server.data) < len(BIG):
        await server.until(lambda: not server.transport.is_reading())
        before = len(server.data)
        server.transport.pause_reading()
        await asyncio.sleep(0)
        assert len(server.data) == before
        server.transport.resume_reading()
        assert server.transport.is_reading()
    assert await server.lost() is None
    assert server.data == BIG


class Sip(BufferedRecorder):
    """Takes four bytes, and pauses."""

    def __init__(self) -> None:
        super().__init__(4)

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.pause_reading()
        super().buffer_updated(nbytes)


async def test_no_data_when_reading_is_resumed_and_paused_again_at_once(net: Network) -> None:
    client, server = await net.pair(server=Sip())
    client.transport.write(b"onlyfoureach")
    assert await server.received(4) == b"only"
    for _ in range(3):
        server.transport.resume_reading()
        server.transport.pause_reading()
        await net.quiet()
    assert server.data == b"only"
    server.transport.resume_reading()
    assert await server.received(8) == b"onlyfour"


async def test_the_end_waits_for_a_paused_reader(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.write(b"last words")
    client.transport.close()
    await net.quiet()
    assert server.calls == ["made"]
    assert not server.transport.is_closing()
    server.transport.resume_reading()
    assert await server.lost() is None
    assert server.data == b"last words"
    assert server.calls == ["made", "data", "eof", ("lost", None)]


# --- what is written ----------------------------------------------------------------------------------


async def test_every_kind_of_buffer_and_none_is_looked_at_later(net: Network) -> None:
    if not net.rdma and not on_uvloop() and sys.version_info >= (3, 12):
        pytest.skip("asyncio's TCP sends from where the data is since Python 3.12")
    client, server = await net.pair()
    server.transport.pause_reading()
    written = await net.fill(client)
    changing = bytearray(b"array ")
    client.transport.write(changing)
    client.transport.write(memoryview(changing)[1:3])
    client.transport.write(memoryview(b"a view of bytes")[2:6])
    changing[:] = b"!" * 1000
    client.transport.write(b"")
    server.transport.resume_reading()
    expected = b"array rrview"
    await server.received(written + len(expected))
    assert server.data[written:] == expected


async def test_what_cannot_be_written(net: Network) -> None:
    client, _ = await net.pair()
    for wrong in ("text", 5, None, [b"list"]):
        with pytest.raises(TypeError):
            client.transport.write(wrong)
    assert client.calls == ["made"]


async def test_writelines_in_order_and_mixed(net: Network) -> None:
    client, server = await net.pair()
    parts = [b"%d," % i for i in range(5000)]
    client.transport.write(b"first,")
    client.transport.writelines(parts)
    client.transport.writelines([])
    client.transport.writelines(iter([b"gene", bytearray(b"rator"), memoryview(b",")]))
    client.transport.write(b"last")
    client.transport.close()
    assert await server.lost() is None
    assert server.data == b"first," + b"".join(parts) + b"generator,last"


async def test_many_writes_keep_their_order(net: Network) -> None:
    client, server = await net.pair()
    expected = bytearray()
    for i in range(1, 400):
        chunk = bytes([i % 256]) * (i * 37 % 9000)
        client.transport.write(chunk)
        expected += chunk
        if i % 7 == 0:
            await asyncio.sleep(0)
    client.transport.close()
    assert await server.lost() is None
    assert server.data == expected


# --- ends out of order --------------------------------------------------------------------------------


async def test_abort_ends_at_once(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    await net.fill(client)
    client.transport.abort()
    client.transport.abort()
    assert client.transport.is_closing()
    assert client.transport.get_write_buffer_size() == 0
    assert not client.is_lost  # not from inside the call
    assert await client.lost() is None
    assert client.calls[-2:] == ["pause", ("lost", None)]
    server.transport.resume_reading()
    await server.lost()


async def test_abort_while_close_waits(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    await net.fill(client)
    client.transport.close()
    await net.quiet()
    assert not client.is_lost
    client.transport.abort()
    assert await client.lost() is None
    server.transport.resume_reading()
    await server.lost()


async def test_one_closes_while_the_other_writes(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    await net.fill(client)
    server.transport.close()
    assert await server.lost() is None
    assert isinstance(await client.lost(), RESET)


async def test_names_of_both_ends(net: Network) -> None:
    client, server = await net.pair()
    assert client.transport.get_extra_info("peername") == server.transport.get_extra_info("sockname")
    assert client.transport.get_extra_info("sockname") == server.transport.get_extra_info("peername")
    assert (
        client.transport.get_extra_info("socket").family == server.transport.get_extra_info("socket").family
    )
    assert client.transport.get_extra_info("ssl_object") is None
    assert client.transport.get_extra_info("nonsense") is None
    marker: Any = object()
    assert client.transport.get_extra_info("nonsense", marker) is marker


async def test_closing_with_unread_data_resets_the_peer(net: Network) -> None:
    """It must not believe that all was taken; one that was read to the end is closed in order."""
    client, server = await net.pair(client=Recorder(keep_open=True))
    server.transport.pause_reading()
    client.transport.write(b"never read")
    await net.quiet()
    server.transport.close()
    assert await server.lost() is None
    while not client.transport.is_closing():
        client.transport.write(b"x" * 1000)
        await asyncio.sleep(0)
    assert isinstance(await client.lost(), RESET)


async def test_an_end_that_was_not_read_resets_nobody(net: Network) -> None:
    client, server = await net.pair()
    server.transport.pause_reading()
    client.transport.write_eof()
    await net.quiet()
    server.transport.close()
    assert await server.lost() is None
    assert await client.lost() is None
    assert client.calls == ["made", "eof", ("lost", None)]
