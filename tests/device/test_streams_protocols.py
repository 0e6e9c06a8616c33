"""Kinds of protocols, and those that raise, on asyncio's TCP and on RDMA by the same tests."""

from __future__ import annotations

import pytest

from tests.device.stream_ends import BufferedRecorder, Network, Recorder, reports

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

BIG = bytes(range(256)) * (1 << 13)  # 2 MiB


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
async def test_buffered_protocol(net: Network, size: int) -> None:
    data = BIG if size > 1 else BIG[:3000]
    client, server = await net.pair(server=BufferedRecorder(size))
    client.transport.write(data)
    client.transport.close()
    assert await server.lost() is None
    assert server.data == data
    assert server.hints == {-1}
    assert server.calls == ["made", "data", "eof", ("lost", None)]


async def test_buffered_protocol_that_pauses(net: Network) -> None:
    class Sipping(BufferedRecorder):
        def buffer_updated(self, nbytes: int) -> None:
            assert self.transport.is_reading()
            super().buffer_updated(nbytes)
            self.transport.pause_reading()

    client, server = await net.pair(server=Sipping(1000))
    client.transport.write(BIG[:20_500])
    while len(server.data) < 20_500:
        await server.until(lambda: not server.transport.is_reading())
        server.transport.resume_reading()
    assert server.data == BIG[:20_500]


async def test_set_protocol_in_the_middle(net: Network) -> None:
    """The next byte goes to the new one, of whichever kind; no callback announces it."""

    class Switching(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.set_protocol(other)

    other = BufferedRecorder(100)
    other.calls.append("made")
    client, server = await net.pair(server=Switching())
    client.transport.write(b"first")
    await server.received(5)
    assert server.transport.get_protocol() is other
    client.transport.write(BIG)
    await other.received(len(BIG))
    third = Recorder()
    third.calls.append("made")
    server.transport.set_protocol(third)
    client.transport.close()
    assert await third.lost() is None
    assert [bytes(end.data) for end in (server, other, third)] == [b"first", BIG, b""]
    assert server.calls == ["made", "data"]
    assert other.calls == ["made", "data"]
    server.calls.append(("lost", None))  # nobody tells it any more


class Failing(Recorder):
    """Raises in one of its callbacks."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self._where = where
        self._error = error

    def _perhaps(self, here: str) -> None:
        if here == self._where:
            raise self._error

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._perhaps("data_received")

    def eof_received(self) -> bool | None:
        super().eof_received()
        self._perhaps("eof_received")
        return True


class BufferedFailing(BufferedRecorder):
    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self._where = where
        self._error = error

    def get_buffer(self, sizehint: int) -> bytearray:
        if self._where == "get_buffer":
            raise self._error
        return bytearray() if self._where == "empty" else super().get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        raise self._error


@pytest.mark.parametrize("where", ["data_received", "eof_received", "get_buffer", "buffer_updated", "empty"])
async def test_a_protocol_that_raises_loses_its_connection(net: Network, where: str) -> None:
    error = KeyError("a bug")
    cls = Failing if where in ("data_received", "eof_received") else BufferedFailing
    client, server = await net.pair(server=cls(where, error))
    with reports() as seen:
        client.transport.write(b"x")
        client.transport.write_eof()
        lost = await server.lost()
        await client.lost()
    if where == "empty":
        assert isinstance(lost, RuntimeError)
    else:
        assert lost is error
    assert [context["exception"] for context in seen] == [lost]
    assert seen[0]["protocol"] is server
    assert seen[0]["transport"] is server.transport


async def test_an_oserror_of_the_protocol_is_not_reported(net: Network) -> None:
    """asyncio takes it for the connection's."""
    error = ConnectionAbortedError("gone")
    client, server = await net.pair(server=Failing("data_received", error))
    with reports() as seen:
        client.transport.write(b"x")
        assert await server.lost() is error
        await client.lost()
    assert seen == []
