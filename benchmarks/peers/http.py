"""aiohttp, server and client as they are: over TCP, or over aiordma's streams as in examples/http_over_rdma.py."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from .interface import HOST, LARGE, Bytes, Client, Desk, Peer

if TYPE_CHECKING:
    from aiordma.config import Mode


class _Client(Client):
    """A request is a POST, which keeps its connection; the reply to a block has no body."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, data: bytes) -> Bytes:
        async with self._session.post("/", data=data) as response:
            return await response.read()

    async def push(self, block: bytes) -> None:
        await self.request(block)


class Aiohttp(Peer):
    """Over TCP, unless there is a ``mode`` of aiordma."""

    def __init__(self, mode: Mode | None = None, device: str | None = None) -> None:
        self._options: dict[str, Any] | None = None
        if mode is not None:
            from aiordma import Config

            self._options = {"config": Config(mode=mode), "device": device}
            self._example: Any = importlib.import_module("examples.http_over_rdma")

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def post(request: web.Request) -> web.Response:
            answer = desk.answer(await request.read())
            return web.Response(body=b"" if answer is None else bytes(answer))

        app = web.Application(client_max_size=2 * LARGE)
        app.add_routes([web.post("/", post)])
        if self._options is not None:
            async with self._example.serving(app, HOST, 0, **self._options) as port:
                yield port
            return
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, 0).start()
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        connector: aiohttp.BaseConnector = aiohttp.TCPConnector()
        if self._options is not None:
            connector = self._example.RdmaConnector(options=self._options)
        async with aiohttp.ClientSession(f"http://{HOST}:{port}", connector=connector) as session:
            yield _Client(session)

    def versions(self) -> dict[str, str]:
        return {"aiohttp": aiohttp.__version__}
