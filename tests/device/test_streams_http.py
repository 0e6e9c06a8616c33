"""aiohttp over RDMA, its server and its client as they are: what examples/http_over_rdma.py shows, and more."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from aiordma import Config
from tests.conftest import device_under_test
from tests.device.test_bootstrap_hostile import certificate

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

example: Any = importlib.import_module("examples.http_over_rdma")


def body_size() -> int:
    """100 MB, where that is a matter of seconds: soft-RoCE may be in an emulated machine."""
    return 4_000_000 if device_under_test().name.startswith("rxe") else 100_000_000


@asynccontextmanager
async def session(
    app: web.Application | None = None,
    *,
    scheme: str = "http",
    server: dict[str, Any] | None = None,
    client: dict[str, Any] | None = None,
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the application, which runs here."""
    async with example.serving(app or example.application(), "127.0.0.1", 0, **(server or {})) as port:
        connector = example.RdmaConnector(options=client or {})
        base = f"{scheme}://127.0.0.1:{port}"
        timeout = aiohttp.ClientTimeout(total=100)
        async with aiohttp.ClientSession(base, connector=connector, timeout=timeout) as made:
            yield made
            connections = connected(made)
        for connection in connections:
            await connection.wait_closed()


def connected(client: aiohttp.ClientSession) -> list[Any]:
    """The RDMA connections that the client keeps for the next request."""
    assert client.connector is not None
    idle = [entry for entries in client.connector._conns.values() for entry in entries]
    return [entry[0].transport.get_extra_info("rdma_connection") for entry in idle]  # type: ignore[union-attr]


async def test_keep_alive() -> None:
    """Many requests, one queue pair."""
    async with session() as http:
        for _ in range(20):
            async with http.get("/") as response:
                assert response.status == 200
                assert await response.text() == "hello 127.0.0.1\n"
        (connection,) = connected(http)
        assert connection.statistics().state == "open"


async def test_requests_at_the_same_time_have_connections_of_their_own() -> None:
    async with session() as http:

        async def request(i: int) -> bool:
            async with http.post("/digest", data=b"%d" % i * 5000) as response:
                return await response.text() == hashlib.sha256(b"%d" % i * 5000).hexdigest()

        assert all(await asyncio.gather(*map(request, range(8))))
        assert 1 <= len(connected(http)) <= 8


async def test_upload() -> None:
    body = bytes(range(250)) * (body_size() // 250)
    async with session() as http, http.post("/digest", data=io.BytesIO(body)) as response:
        assert await response.text() == hashlib.sha256(body).hexdigest()


async def test_download() -> None:
    async with session() as http, http.get(f"/zeros/{body_size()}") as response:
        got = 0
        async for chunk in response.content.iter_any():
            assert not chunk.strip(b"\0")
            got += len(chunk)
        assert got == body_size()


async def test_chunked_upload_from_a_generator() -> None:
    async def body() -> AsyncIterator[bytes]:
        for i in range(200):
            yield b"%d," % i * (500 if i % 10 else 100_000)

    expected = hashlib.sha256(b"".join([part async for part in body()])).hexdigest()
    async with session() as http, http.post("/digest", data=body()) as response:
        assert await response.text() == expected


async def test_websocket() -> None:
    async with session() as http, http.ws_connect("/echo", max_msg_size=0) as socket:
        for i in range(50):
            await socket.send_str(f"message {i}")
            assert await socket.receive_str() == f"message {i}"
        large = bytes(range(256)) * 10_000
        await socket.send_bytes(large)
        assert await socket.receive_bytes() == large
        await socket.ping()
        await socket.close()
        assert socket.close_code == aiohttp.WSCloseCode.OK


async def test_static_file(tmp_path: Path) -> None:
    """aiohttp sends it with the loop's sendfile(), or what stands for that."""
    content = bytes(range(256)) * 4000
    (tmp_path / "file.bin").write_bytes(content)
    app = web.Application()
    app.router.add_static("/", tmp_path)
    async with session(app) as http:
        async with http.get("/file.bin") as response:
            assert await response.read() == content
        async with http.get("/file.bin", headers={"Range": "bytes=1000-1999"}) as response:
            assert await response.read() == content[1000:2000]


async def test_https_and_a_token(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path)
    options = {"token": "secret", "config": Config(mode="event")}
    async with (
        session(scheme="https", server={"ssl": server_tls, **options}, client=options) as http,
        http.post("/digest", data=bytes(300_000), ssl=client_tls) as response,
    ):
        assert await response.text() == hashlib.sha256(bytes(300_000)).hexdigest()
        assert response.url.scheme == "https"


async def test_errors_are_what_aiohttp_makes_of_them() -> None:
    async with session(server={"token": "right"}, client={"token": "wrong"}) as http:
        with pytest.raises(aiohttp.ClientConnectorError, match="token"):
            await http.get("/")


async def test_a_server_that_hangs_up_in_the_middle() -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    app = web.Application()
    app.router.add_get("/", half)
    async with session(app) as http, http.get("/") as response:
        with pytest.raises(aiohttp.ClientError):
            await response.read()
