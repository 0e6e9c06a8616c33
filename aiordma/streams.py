"""asyncio's streams and transports over RDMA: what asyncio's functions of the same names do over TCP.

Protocols (asyncio.Protocol and BufferedProtocol), StreamReader and StreamWriter are asyncio's own; the transport
below them is in stream_transport.py. Here are connecting and listening, and TLS inside the stream.
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, cast

from .config import Config
from .connect import Server, establish
from .errors import MisuseError
from .protocol.stream import FEATURE
from .stream_transport import RdmaTransport
from .transport import Connection

P = TypeVar("P", bound=asyncio.BaseProtocol)

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]

#: Bytes a StreamReader holds before it pauses its transport: half of what it takes, as in asyncio.
_LIMIT = 64 << 10


async def create_connection(
    protocol_factory: Callable[[], P],
    host: str,
    port: int,
    *,
    ssl: ssl_module.SSLContext | bool | None = None,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    bootstrap_ssl: ssl_module.SSLContext | bool | None = None,
    token: str | bytes | None = None,
    device: str | None = None,
    config: Config | None = None,
    timeout: float | None = 10.0,
) -> tuple[asyncio.Transport, P]:
    """As :meth:`asyncio.loop.create_connection`, to a server of :func:`create_server` or :func:`start_server`:
    the transport (:class:`~aiordma.stream_transport.RdmaTransport`) and the protocol that was made for it.

    ``ssl`` is TLS inside the stream, as asyncio's: it encrypts what the protocol writes, with ``server_hostname``
    (``host`` unless given) and the timeouts (seconds) that asyncio has. ``bootstrap_ssl`` is TLS for the TCP
    connection of the handshake alone, the ``ssl`` of :func:`aiordma.connect`; ``device``, ``token``, ``config``
    and ``timeout`` are those of that function too.

    Raises what :func:`aiordma.connect` does (all are OSErrors, but :class:`MemoryLimitError`): among them
    :class:`IncompatibleError` when the server is one for messages; ``ssl.SSLError`` and ConnectionError when TLS
    fails. Cancelled: everything is given back.
    """
    if server_hostname is not None and not ssl:
        raise ValueError("server_hostname is of use with ssl only")
    loop = asyncio.get_running_loop()
    connection = await establish(
        host, port, device, config or Config(), bootstrap_ssl, token, timeout, (FEATURE,)
    )
    waiter: asyncio.Future[None] = loop.create_future()
    try:
        protocol = protocol_factory()
    except BaseException:
        connection.close()
        await connection.wait_closed()
        raise
    transport: asyncio.Transport
    if ssl:
        timeouts = {
            "ssl_handshake_timeout": ssl_handshake_timeout,
            "ssl_shutdown_timeout": ssl_shutdown_timeout,
        }
        transport, raw = _tls_transport(
            connection, protocol, ssl, waiter, server_hostname=server_hostname or host, **timeouts
        )
    else:
        transport = raw = RdmaTransport(loop, connection, protocol, waiter)
    try:
        await waiter
    except BaseException:
        raw.abort()
        await connection.wait_closed()
        raise
    return transport, protocol


def _tls_transport(
    connection: Connection,
    protocol: asyncio.BaseProtocol,
    context: ssl_module.SSLContext | bool,
    waiter: asyncio.Future[None] | None,
    **options: Any,
) -> tuple[asyncio.Transport, RdmaTransport]:
    """asyncio's own TLS between the protocol and the stream: the transport for the protocol, and the one below.

    This is what the event loop does for TCP (``loop.start_tls``), but uvloop's knows its own transports only.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(context, ssl_module.SSLContext):
        context = ssl_module.create_default_context()
    tls = sslproto.SSLProtocol(loop, cast(Any, protocol), context, cast(Any, waiter), **options)
    raw = RdmaTransport(loop, connection, tls)
    return cast(Any, tls)._get_app_transport(), raw


async def create_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    host: str | None,
    port: int,
    *,
    ssl: ssl_module.SSLContext | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    bootstrap_ssl: ssl_module.SSLContext | None = None,
    token: str | bytes | None = None,
    device: str | None = None,
    config: Config | None = None,
    start_serving: bool = True,
) -> StreamServer:
    """As :meth:`asyncio.loop.create_server`: listens, and makes a protocol for each client.

    ``host`` None is every interface, ``port`` 0 a free one (``server.sockets[0].getsockname()[1]``). ``ssl`` is
    TLS inside the stream, ``bootstrap_ssl`` that of the handshake's TCP connection, as in
    :func:`create_connection`; ``device``, ``token`` and ``config`` are those of :func:`aiordma.serve`. A client
    for messages is refused. Raises :class:`DeviceError` when there is no usable device, OSError when the port
    cannot be had.
    """
    if not callable(protocol_factory):
        raise MisuseError("create_server() needs a function that makes protocols")
    tls = {"ssl_handshake_timeout": ssl_handshake_timeout, "ssl_shutdown_timeout": ssl_shutdown_timeout}
    accept = partial(_accept_plain, protocol_factory)
    if ssl is not None:
        accept = partial(_accept_tls, protocol_factory, ssl, tls)
    server = StreamServer(accept, host, port, device, config or Config(), bootstrap_ssl, token)
    await server._listen(start_serving)
    return server


def _accept_plain(factory: Callable[[], asyncio.BaseProtocol], connection: Connection) -> RdmaTransport:
    return RdmaTransport(asyncio.get_running_loop(), connection, factory())


def _accept_tls(
    factory: Callable[[], asyncio.BaseProtocol],
    context: ssl_module.SSLContext,
    timeouts: dict[str, float | None],
    connection: Connection,
) -> RdmaTransport:
    return _tls_transport(connection, factory(), context, None, server_side=True, **timeouts)[1]


class StreamServer(asyncio.AbstractServer):
    """A listening server, as :class:`asyncio.Server`. Made by :func:`create_server` and :func:`start_server`.

    :meth:`close` stops listening; clients that are there stay, as with asyncio, until they or their protocols
    close, or :meth:`close_clients` is called.
    """

    def __init__(
        self,
        accept: Callable[[Connection], RdmaTransport],
        host: str | None,
        port: int,
        device: str | None,
        config: Config,
        bootstrap_ssl: ssl_module.SSLContext | None,
        token: str | bytes | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._accept = accept
        self._server = Server(
            self._serve,
            host,
            port,
            device=device,
            config=config,
            ssl=bootstrap_ssl,
            token=token,
            requires=(FEATURE,),
        )
        self._transports: set[RdmaTransport] = set()
        self._serving = False
        self._closed = False
        self._forever: asyncio.Future[None] | None = None

    async def _listen(self, start: bool) -> None:
        await self._server.start(accept=start)
        self._serving = start

    async def _serve(self, connection: Connection) -> None:
        """The handler of one connection: until its protocol was told of the end."""
        transport = self._accept(connection)
        self._transports.add(transport)
        try:
            await asyncio.shield(transport.ended)
        finally:
            self._transports.discard(transport)

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The TCP sockets of the bootstrap; none after :meth:`close`."""
        return () if self._closed else self._server.sockets

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop it belongs to."""
        return self._loop

    def is_serving(self) -> bool:
        """True while it accepts clients."""
        return self._serving

    async def start_serving(self) -> None:
        """Listens, when :func:`create_server` was told not to. Idempotent; RuntimeError when closed."""
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")
        if not self._serving:
            await self._server.start_accepting()
            self._serving = True

    async def serve_forever(self) -> None:
        """Listens until cancelled, or :meth:`close` is called; both close it and raise CancelledError."""
        if self._forever is not None:
            raise RuntimeError(f"{self!r} serves forever already")
        await self.start_serving()
        self._forever = self._loop.create_future()
        try:
            await self._forever
        except asyncio.CancelledError:
            self.close()
            await self.wait_closed()
            raise
        finally:
            self._forever = None

    def close(self) -> None:
        """Stops listening. Clients that are there stay. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._serving = False
        self._server.stop_listening()
        if self._forever is not None and not self._forever.done():
            self._forever.cancel()

    def close_clients(self) -> None:
        """Calls ``close()`` of every client's transport (asyncio has this since 3.13)."""
        for transport in list(self._transports):
            transport.close()

    def abort_clients(self) -> None:
        """Calls ``abort()`` of every client's transport (asyncio has this since 3.13)."""
        for transport in list(self._transports):
            transport.abort()

    async def wait_closed(self) -> None:
        """Waits until :meth:`close` was called and the last client is gone (as asyncio's since 3.12)."""
        await self._server.wait_idle()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "serving" if self._serving else "not serving"
        return f"<StreamServer {state} on port {self._server.port}, {len(self._transports)} clients>"


async def open_connection(
    host: str, port: int, *, limit: int = _LIMIT, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As :func:`asyncio.open_connection`: a reader and a writer. ``options`` are those of
    :func:`create_connection`, and so are the errors; ``limit`` (bytes) is the reader's."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(lambda: protocol, host, port, **options)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_server(
    client_connected_cb: ClientConnected,
    host: str | None,
    port: int,
    *,
    limit: int = _LIMIT,
    **options: Any,
) -> StreamServer:
    """As :func:`asyncio.start_server`: ``client_connected_cb(reader, writer)``, a function or coroutine function,
    for each client. ``options`` are those of :func:`create_server`; ``limit`` (bytes) is the readers'."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(factory, host, port, **options)


__all__ = ["StreamServer", "create_connection", "create_server", "open_connection", "start_server"]
