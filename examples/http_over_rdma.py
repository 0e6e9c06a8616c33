"""HTTP over RDMA: an aiohttp server and client that know nothing of it, but for where connections come from.

    python examples/http_over_rdma.py server
    python examples/http_over_rdma.py client --port PORT

Needs aiohttp (``pip install aiohttp``). The server's part is the line with ``aiordma.create_server``; a client
session takes the ``RdmaConnector`` below. The server prints its port, so that it can take a free one (--port 0,
the default).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.client_proto import ResponseHandler

import aiordma


class RdmaConnector(aiohttp.BaseConnector):
    """Connections over RDMA for an ``aiohttp.ClientSession``; ``https`` is TLS inside the stream.

    ``options`` are those of :func:`aiordma.create_connection` (``token``, ``device``, ``config``, ...); the other
    arguments are those of ``aiohttp.BaseConnector`` (``limit``, ``keepalive_timeout``, ...).
    """

    def __init__(self, *, options: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._options = options or {}

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: Any, timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        """What aiohttp calls for a connection that its pool does not have."""
        host, port = req.url.raw_host or "", req.url.port or 80
        try:
            _, protocol = await aiordma.create_connection(
                self._factory,
                host,
                port,
                ssl=_tls(req),
                timeout=timeout.sock_connect or timeout.connect or timeout.total,
                **self._options,
            )
        except OSError as error:
            # aiohttp shows an error's strerror, which only those of the system have.
            shown = error if error.strerror else OSError(error.errno, str(error))
            raise aiohttp.ClientConnectorError(req.connection_key, shown) from error
        return protocol


def _tls(req: aiohttp.ClientRequest) -> ssl.SSLContext | bool | None:
    if not req.is_ssl():
        return None
    if req.ssl is True or isinstance(req.ssl, ssl.SSLContext):
        return req.ssl
    raise ValueError("RdmaConnector: ssl=False and fingerprints are not supported, use an SSLContext")


async def hello(request: web.Request) -> web.Response:
    """GET /"""
    return web.Response(text=f"hello {request.remote}\n")


async def digest(request: web.Request) -> web.Response:
    """POST /digest: the SHA-256 of the body, which is never in memory as a whole."""
    sha = hashlib.sha256()
    async for chunk in request.content.iter_any():
        sha.update(chunk)
    return web.Response(text=sha.hexdigest())


async def download(request: web.Request) -> web.StreamResponse:
    """GET /zeros/N: N bytes."""
    left = int(request.match_info["nbytes"])
    response = web.StreamResponse(headers={"Content-Length": str(left)})
    await response.prepare(request)
    piece = bytes(1 << 20)
    while left:
        await response.write(piece[:left])
        left -= min(left, len(piece))
    await response.write_eof()
    return response


async def echo(request: web.Request) -> web.WebSocketResponse:
    """GET /echo: a websocket that sends back what it gets."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


def application() -> web.Application:
    """The web application; nothing in it knows of RDMA."""
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(
        [
            web.get("/", hello),
            web.post("/digest", digest),
            web.get(r"/zeros/{nbytes:\d+}", download),
            web.get("/echo", echo),
        ]
    )
    return app


@contextlib.asynccontextmanager
async def serving(app: web.Application, host: str, port: int, **options: Any) -> AsyncIterator[int]:
    """Runs an aiohttp application on RDMA; yields the port."""
    runner = web.AppRunner(app, shutdown_timeout=10.0)
    await runner.setup()
    try:
        assert runner.server is not None
        server = await aiordma.create_server(runner.server, host, port, **options)
    except BaseException:
        await runner.cleanup()
        raise
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await runner.cleanup()  # ends the connections
        await server.wait_closed()


async def run_server(args: argparse.Namespace) -> None:
    """Serves until interrupted."""
    async with serving(application(), args.host, args.port, token=args.token) as port:
        print(port, flush=True)
        await asyncio.Event().wait()


async def run_client(args: argparse.Namespace) -> None:
    """A request, an upload, a download and a websocket."""
    base = f"http://{args.host}:{args.port}"
    connector = RdmaConnector(options={"token": args.token})
    async with aiohttp.ClientSession(base, connector=connector) as session:
        async with session.get("/") as response:
            print((await response.text()).strip())
        body = bytes(args.size)
        async with session.post("/digest", data=io.BytesIO(body)) as response:
            right = await response.text() == hashlib.sha256(body).hexdigest()
            print(f"uploaded {len(body)} bytes, digest {'right' if right else 'WRONG'}")
        async with session.get(f"/zeros/{args.size}") as response:
            print(f"downloaded {len(await response.read())} bytes")
        async with session.ws_connect("/echo") as socket:
            await socket.send_str("over RDMA")
            print(f"websocket echo: {await socket.receive_str()}")


def main() -> None:
    """Runs one side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or to connect to")
    parser.add_argument("--port", type=int, default=0, help="TCP port; server: 0 is a free one")
    parser.add_argument("--token", help="a secret both sides know")
    parser.add_argument("--size", type=int, default=1 << 20, help="client: bytes up and down")
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_server(args) if args.role == "server" else run_client(args))


if __name__ == "__main__":
    main()
