"""The bootstrap over asyncio TCP: from an address to a connected queue pair, and the session that stays.

The protocol itself (frames, models, the handshake of both roles) is in protocol/bootstrap.py and knows no
sockets; here are the sockets, the deadlines and the bringing up of the queue pair:

    client                                  server
    TCP (and TLS) connect                   accept, greeting
    greeting -> route, queue pair, INIT
    hello (and proof of the token)     ->   checked; only then: route, queue pair, INIT, RTR, RTS
    INIT -> RTR -> RTS                 <-   welcome (and proof)
    ready                              ->   the handler runs

A client that is slow, silent or talks nonsense costs the server a socket and at most one handshake frame of
memory until its deadline. When too many handshakes are under way, the oldest is dropped: an honest client needs
milliseconds, so those that wait longest are the least likely to be one.

After the handshake the TCP connection stays: it announces shared regions, and its end is the end of the peer.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import resource
import secrets
import socket
import ssl as ssl_module
from collections.abc import Awaitable, Callable, Collection, Generator
from types import TracebackType
from typing import Any, Self, cast

from . import errors
from ._version import __version__
from .adapter import Route, open_route
from .config import Config
from .errors import (
    BootstrapError,
    BootstrapTimeoutError,
    MisuseError,
    ProtocolError,
    RdmaError,
    TlsError,
)
from .protocol.bootstrap import (
    NONCE_SIZE,
    Agreed,
    ClientHandshake,
    Close,
    Endpoint,
    Established,
    Greeted,
    HelloReceived,
    Recall,
    ServerHandshake,
    SessionDecoder,
    SessionMessage,
    Share,
    Unshare,
    Welcomed,
    Withdraw,
    check_compatible,
    encode,
    printable,
)
from .protocol.credit import CONTROL_WINDOW
from .transport import Connection
from .verbs import LinkLayer
from .verbs.gid_choice import Address

Handler = Callable[[Connection], Awaitable[object]]

#: Bytes of announcements the peer has not read, at which it counts as stuck.
_SESSION_BACKLOG = 1 << 20
_LISTEN_BACKLOG = 1024
#: File descriptors that a server does not give to connections: for its handlers, and to refuse with.
_SPARE_FILES = 16
#: Config.shared_receives of a server that leaves it open.
_SHARED_RECEIVES = 1024


class _Channel(asyncio.Protocol):
    """What both roles share: the socket, the handshake's bytes, and the session afterwards."""

    def __init__(self, config: Config) -> None:
        self.loop = asyncio.get_running_loop()
        self.config = config
        self.transport: asyncio.Transport | None = None
        self.handshake: ClientHandshake | ServerHandshake
        self.connection: Connection | None = None
        self.session: SessionDecoder | None = None
        self.peer = "?"
        self.local: Address | None = None
        self.remote: Address | None = None
        self.said_goodbye = False
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._info: Callable[[str], Any] = lambda name: None

    # --- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio.Transport; they only behave like it.
        self.transport = cast(asyncio.Transport, transport)
        self._info = self.transport.get_extra_info  # for good: names outlive the socket
        sock = self.transport.get_extra_info("socket")
        self.local = _address(self.transport.get_extra_info("sockname"))
        self.remote = _address(self.transport.get_extra_info("peername"))
        self.peer = _peer_text(self.transport.get_extra_info("peername"))
        if sock is not None:
            _tune_socket(sock, self.config.keepalive)
        self.transport.set_write_buffer_limits(high=_SESSION_BACKLOG)

    def data_received(self, data: bytes) -> None:
        if self.session is not None:
            self.session_data(data)
        elif self.transport is not None and not self.transport.is_closing():
            self.handshake_data(data)  # TLS may hand over more after we have hung up

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._gone.set_result(None)
        if self.connection is not None and self.session is not None:
            self.connection.session_lost(exc)
        else:
            self.handshake_lost(exc)

    def pause_writing(self) -> None:
        if self.connection is not None:
            self.connection.fail(ProtocolError("the peer does not read its TCP connection"))

    def handshake_data(self, data: bytes) -> None:
        """Bytes of the peer before the handshake is over."""
        raise NotImplementedError

    def handshake_lost(self, exc: Exception | None) -> None:
        """The TCP connection ended before the handshake was over."""
        raise NotImplementedError

    # --- sending -------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Sends, if there is still somebody to send to."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def drop(self) -> None:
        """Closes the TCP connection after what was written."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Closes the TCP connection at once."""
        if self.transport is not None:
            self.transport.abort()

    # --- the session (transport.Session) -------------------------------------------------------------

    def start_session(self, connection: Connection) -> None:
        """The handshake is over; what came behind it belongs to the session."""
        self.connection = connection
        self.session = SessionDecoder(peer=self.peer)
        connection.open(self)
        rest = self.handshake.take_rest()
        if rest:
            self.session_data(rest)

    def session_data(self, data: bytes) -> None:
        """Messages of the session."""
        assert self.session is not None
        assert self.connection is not None
        try:
            for message in self.session.receive_data(data):
                self._session_message(self.connection, message)
        except ProtocolError as error:
            self.connection.fail(error)

    @staticmethod
    def _session_message(connection: Connection, message: SessionMessage) -> None:
        match message:
            case Share():
                connection.peer_shared(
                    message.name, message.address, message.length, message.rkey, list(message.access)
                )
            case Unshare():
                connection.peer_unshared(message.name)
            case Withdraw():
                connection.peer_withdrew(message.transfer)
            case Recall():
                connection.peer_recalled(message.count)
            case Close():
                connection.peer_closed(message.message, in_order=message.code == "normal")

    def send_share(self, name: str, address: int, length: int, rkey: int, access: list[str]) -> None:
        """transport.Session: announces a region."""
        self.write(
            encode(Share.make(name=name, address=address, length=length, rkey=rkey, access=tuple(access)))
        )

    def send_unshare(self, name: str) -> None:
        """transport.Session: takes an announcement back."""
        self.write(encode(Unshare.make(name=name)))

    def send_withdraw(self, transfer: int) -> None:
        """transport.Session: takes the offer of a large message back."""
        self.write(encode(Withdraw.make(transfer=transfer)))

    def send_recall(self, count: int) -> None:
        """transport.Session: asks for data credits back."""
        self.write(encode(Recall.make(count=count)))

    def send_close(self, error: RdmaError | None) -> None:
        """transport.Session: says goodbye and closes."""
        if error is None:
            message = Close.make()
        else:
            message = Close.make(code="error", message=printable(str(error), 512))
        self.write(encode(message))
        self.drop()

    async def wait_gone(self, timeout: float) -> None:
        """transport.Session: waits until the TCP connection is closed, if need be without the peer."""
        await asyncio.wait([self._gone], timeout=timeout)
        self.abort()
        await asyncio.wait([self._gone])

    def get_extra_info(self, name: str) -> Any:
        """transport.Session: what asyncio knows of the TCP connection, also after its end."""
        return self._info(name)

    # --- endpoints -----------------------------------------------------------------------------------

    def endpoint(self, connection: Connection) -> Endpoint:
        """What we tell the peer about our queue pair."""
        route, config = connection.route, self.config
        port, attributes = route.choice.port, route.adapter.attributes
        return Endpoint.make(
            link_layer=_link_layer(route),
            qp_num=connection.qp_num,
            psn=connection.psn,
            lid=port.lid,
            gid=_gid(route).hex(),
            gid_type=_gid_type(route),
            mtu=min(config.mtu, port.active_mtu or config.mtu),
            initiator_depth=min(config.read_depth, attributes.max_read_depth_initiator, 255),
            responder_depth=min(config.read_depth, attributes.max_read_depth, 255),
            eager_size=config.eager_size,
            receive_credits=connection.receive_credits,
            receive_credits_max=config.receive_credits,
            control_credits=CONTROL_WINDOW,
            rendezvous_depth=config.rendezvous_depth,
            max_message_size=config.max_message_size,
            device=route.adapter.name[:64],
        )


def _link_layer(route: Route) -> Any:
    return "ethernet" if route.choice.port.link_layer is LinkLayer.ETHERNET else "infiniband"


def _gid_type(route: Route) -> Any:
    return "roce_v2" if route.choice.port.link_layer is LinkLayer.ETHERNET else "ib"


def _gid(route: Route) -> bytes:
    entry = route.choice.port_gid
    return entry.gid.packed if entry is not None else bytes(16)


def _address(name: Any) -> Address | None:
    """The IP address of a socket name; None for a UNIX socket."""
    if not isinstance(name, tuple):
        return None
    return ipaddress.ip_address(name[0].split("%")[0])


def _peer_text(name: Any) -> str:
    if not isinstance(name, tuple):
        return str(name or "?")
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{host}:{name[1]}"


def _tune_socket(sock: socket.socket, keepalive: float) -> None:
    """No delay, and a silent host counts as dead after about three times ``keepalive`` seconds (tcp(7))."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive > 0:
        seconds = max(1, round(keepalive))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1000, round(3000 * keepalive)))


# --- the client ---------------------------------------------------------------------------------------


class _ClientChannel(_Channel):
    """The connecting side: :meth:`run` drives the handshake."""

    def __init__(self, config: Config, token: str | bytes | None, requires: Collection[str]) -> None:
        super().__init__(config)
        self.handshake: ClientHandshake = ClientHandshake(
            nonce=secrets.token_bytes(NONCE_SIZE),
            token=token,
            requires=requires,
            software=f"aiordma {__version__}",
        )
        self._greeted: asyncio.Future[None] = self.loop.create_future()
        self._welcomed: asyncio.Future[Agreed] = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.handshake._peer = self.peer

    def handshake_data(self, data: bytes) -> None:
        try:
            for event in self.handshake.receive_data(data):
                if isinstance(event, Greeted):
                    _resolve(self._greeted, None)
                elif isinstance(event, Welcomed):
                    _resolve(self._welcomed, event.agreed)
        except BootstrapError as error:
            self._give_up(error)

    def handshake_lost(self, exc: Exception | None) -> None:
        try:
            self.handshake.receive_eof()
        except BootstrapError as error:
            if isinstance(exc, ssl_module.SSLError):
                self._give_up(TlsError(f"TLS with {self.peer} failed: {exc}", peer=self.peer))
            else:
                error.add_note("does the server expect TLS (ssl=...), or is it no aiordma server?")
                self._give_up(error)

    def _give_up(self, error: BootstrapError) -> None:
        self.abort()
        for future in (self._greeted, self._welcomed):
            if not future.done():
                future.set_exception(error)
                future.exception()  # run() may be waiting for the other one only

    async def run(self, device: str | None) -> Connection:
        """The whole handshake; on any failure (cancellation included) everything is given back."""
        connection: Connection | None = None
        try:
            await self._greeted
            route = open_route(device, self.local, self.remote, self.config)
            connection = Connection(route, self.config, self.peer)
            await connection.prepare()
            self.write(self.handshake.hello(self.endpoint(connection)))
            agreed = await self._welcomed
            connection.ready_to_receive(agreed)
            connection.ready_to_send()
            self.write(self.handshake.ready())
            self.start_session(connection)
        except BaseException:
            if connection is not None:
                connection.abort()
            self.abort()
            raise
        return connection


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


class _Connecting:
    """What :func:`connect` returns: a connection once awaited or entered."""

    __slots__ = ("_arguments", "_connection")

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._connection: Connection | None = None

    def __await__(self) -> Generator[Any, None, Connection]:
        return establish(*self._arguments).__await__()

    async def __aenter__(self) -> Connection:
        self._connection = await establish(*self._arguments)
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._connection is not None
        await self._connection.__aexit__(kind, value, trace)


def connect(
    host: str,
    port: int,
    *,
    device: str | None = None,
    config: Config | None = None,
    ssl: ssl_module.SSLContext | bool | None = None,
    token: str | bytes | None = None,
    timeout: float | None = 10.0,
) -> _Connecting:
    """Connects to an aiordma server: ``conn = await connect(...)`` or ``async with connect(...) as conn``.

    ``host`` and ``port`` are those of the server's TCP bootstrap; which RDMA device and GID carry the data
    follows from the address that TCP uses (``conn.route.choice.explain()`` tells). ``device`` None means
    ``AIORDMA_DEVICE``, else an active port that reaches the peer, usroce's last. ``ssl`` and ``token`` protect
    the bootstrap; what RDMA itself moves is not encrypted. ``timeout`` in seconds covers everything, None is for
    ever.

    Raises OSError as asyncio does when TCP cannot connect, :class:`BootstrapError` (version, token, TLS,
    timeout, malformed, incompatible) when the handshake fails, :class:`DeviceError` when there is no device for
    the route, :class:`MemoryLimitError`. Cancelled: everything is given back.
    """
    return _Connecting(host, port, device, config or Config(), ssl, token, timeout)


async def establish(
    host: str,
    port: int,
    device: str | None,
    config: Config,
    ssl: ssl_module.SSLContext | bool | None,
    token: str | bytes | None,
    timeout: float | None,
    requires: Collection[str] = (),
) -> Connection:
    """What :func:`connect` does; ``requires`` are features that the server must have too."""
    channel: _ClientChannel | None = None
    try:
        async with asyncio.timeout(timeout):
            _, channel = await asyncio.get_running_loop().create_connection(
                lambda: _ClientChannel(config, token, requires), host, port, ssl=ssl or None
            )
            return await channel.run(device)
    except TimeoutError as error:
        if isinstance(error, RdmaError):
            raise
        during = channel.handshake.state.value if channel else "connecting"
        raise BootstrapTimeoutError(
            f"connecting to {host}:{port} took longer than {timeout} s (while {during})",
            peer=f"{host}:{port}",
        ) from None
    except ssl_module.SSLError as error:
        raise TlsError(f"TLS with {host}:{port} failed: {error}", peer=f"{host}:{port}") from error
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise _too_many_files(f"cannot connect to {host}:{port}") from error
        raise


def _too_many_files(what: str) -> OSError:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OSError(
        errno.EMFILE,
        f"{what}: a connection has a file descriptor (TCP), and this process may have {soft} (hard limit {hard}); "
        "raise it: ulimit -n (shell), LimitNOFILE= (systemd), --ulimit nofile= (container)",
    )


# --- the server ---------------------------------------------------------------------------------------


class _ServerChannel(_Channel):
    """One accepted TCP connection."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.config)
        self.server = server
        self.handshake: ServerHandshake = ServerHandshake(
            nonce=secrets.token_bytes(NONCE_SIZE),
            token=server.token,
            requires=server.requires,
            software=f"aiordma {__version__}",
        )
        self._deadline: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._prepared: Connection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.handshake._peer = self.peer
        self._deadline = self.loop.call_later(self.config.handshake_timeout, self._timed_out)
        self.server._handshake_started(self)
        self.write(self.handshake.greeting())

    def handshake_data(self, data: bytes) -> None:
        try:
            for event in self.handshake.receive_data(data):
                if isinstance(event, HelloReceived):
                    # Nothing of the device was touched before this line: the hello is valid and authentic.
                    self._task = self.loop.create_task(self._accept(event.hello.endpoint))
                elif isinstance(event, Established):
                    self._established()
        except BootstrapError as error:
            self.refuse(error)

    def handshake_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _timed_out(self) -> None:
        self.refuse(
            BootstrapTimeoutError(
                f"handshake not finished in {self.config.handshake_timeout} s: {self.handshake.state.value}"
            )
        )

    def refuse(self, error: Exception) -> None:
        """Tells the client why, if it can still hear, and forgets it."""
        if self.session is not None:
            return
        self.server.refused += 1
        try:
            self.write(self.handshake.refuse_error(error))
        except MisuseError:
            pass
        self._finish()
        self.drop()

    def _finish(self) -> None:
        """The handshake is over, well or not."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.server._handshake_ended(self)
        if self._task is not None and not self._task.done():
            self._task.cancel()
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            prepared.abort()

    async def _accept(self, remote: Endpoint) -> None:
        """Makes a queue pair for a valid hello and answers it."""
        connection: Connection | None = None
        try:
            self.server._check_room(self.transport)
            route = open_route(self.server.device, self.local, self.remote, self.config)
            connection = Connection(route, self.config, self.peer, shared_receives=_SHARED_RECEIVES)
            try:
                check_compatible(
                    remote,
                    link_layer=_link_layer(route),
                    gid_type=_gid_type(route),
                    gid=_gid(route),
                    lid=route.choice.port.lid,
                )
            except BootstrapError:
                route.adapter.release()
                raise
            await connection.prepare()
            self._prepared = connection
            welcome = self.handshake.welcome(self.endpoint(connection))
            connection.ready_to_receive(self.handshake.agreed)
            # RTS before the client can send its first message, for that may already earn it a credit frame.
            connection.ready_to_send()
            self.write(welcome)
        except asyncio.CancelledError:
            raise
        except BootstrapError as error:
            self.refuse(error)
        except (RdmaError, OSError) as error:
            self.loop.call_exception_handler(
                {"message": f"cannot serve {self.peer}: {error}", "exception": error}
            )
            self.refuse(error)

    def _established(self) -> None:
        connection, self._prepared = self._prepared, None
        assert connection is not None
        self._finish()
        self.start_session(connection)
        self.server._serve(connection)


class Server:
    """A listening server. Made by :func:`serve`; await it or enter it to start listening.

    ``port`` is the TCP port in use (of interest when 0 was asked for). ``connections`` are those established
    now; ``refused`` counts handshakes that failed.
    """

    def __init__(
        self,
        handler: Handler,
        host: str | None,
        port: int,
        *,
        device: str | None,
        config: Config,
        ssl: ssl_module.SSLContext | None,
        token: str | bytes | None,
        requires: Collection[str] = (),
    ) -> None:
        self.handler = handler
        self.host = host
        self.port = port
        self.device = device
        self.config = config
        self.ssl = ssl
        self.token = token
        self.requires = requires  # features that a client must have
        self.refused = 0
        self.connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[_ServerChannel, None] = {}  # in order of arrival
        self._server: asyncio.Server | None = None
        self._route: Route | None = None
        self._closing = False
        self._short_of_files = False  # and has said so
        self._stopped = asyncio.Event()
        self._close_called = asyncio.Event()

    async def start(self, *, accept: bool = True) -> Self:
        """What awaiting the server does. Without ``accept`` the port is taken, and :meth:`start_accepting` begins
        to listen."""
        if self._server is not None:
            raise MisuseError("the server was started already")
        loop = asyncio.get_running_loop()
        # Opened now, so that a machine without a device is told so here and not by its first client; kept, so
        # that a server between connections does not open and close it again and again.
        self._route = open_route(self.device, None, None, self.config)
        try:
            self._server = await loop.create_server(
                lambda: _ServerChannel(self),
                self.host,
                self.port,
                ssl=self.ssl,
                ssl_handshake_timeout=self.config.handshake_timeout if self.ssl else None,
                backlog=_LISTEN_BACKLOG,
                start_serving=accept,
            )
        except BaseException:
            self._route.adapter.release()
            raise
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.start().__await__()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    async def start_accepting(self) -> None:
        """Listens, when :meth:`start` did not."""
        assert self._server is not None
        await self._server.start_serving()

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The TCP sockets that listen; none before the start and after the end."""
        return tuple(self._server.sockets) if self._server is not None else ()

    # --- handshakes ----------------------------------------------------------------------------------

    def _handshake_started(self, channel: _ServerChannel) -> None:
        self._pending[channel] = None
        if len(self._pending) > self.config.max_handshakes:
            oldest = next(iter(self._pending))
            oldest.refuse(BootstrapTimeoutError("too many handshakes under way; the oldest goes first"))

    def _handshake_ended(self, channel: _ServerChannel) -> None:
        self._pending.pop(channel, None)

    def _check_room(self, transport: asyncio.Transport | None) -> None:
        if self._closing or len(self.connections) >= self.config.max_connections:
            raise BootstrapError("the server is full, or closing")
        # The kernel gives the lowest free descriptor. Beyond the limit nobody could be refused any more.
        sock = transport.get_extra_info("socket") if transport is not None else None
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if sock is not None and limit - _SPARE_FILES <= sock.fileno() < limit:
            if not self._short_of_files:
                self._short_of_files = True
                error = _too_many_files(f"{len(self.connections)} connections, and no more")
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "the server refuses connections", "exception": error}
                )
            raise BootstrapError("the server is full: it has no file descriptors left")
        self._short_of_files = False

    # --- connections ---------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        self.connections.add(connection)
        task = asyncio.get_running_loop().create_task(
            self._run_handler(connection), name=f"aiordma handler for {connection.peer}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_handler(self, connection: Connection) -> None:
        """The handler owns the connection; when it returns or raises, the connection closes."""
        try:
            await self.handler(connection)
        except errors.ConnectionLostError as error:
            # The end of its own connection is no news; another's that it did not see to is, and so is a breach.
            if error.peer != connection.peer or isinstance(error, ProtocolError):
                self._report(connection, error)
        except Exception as error:
            self._report(connection, error)
        finally:
            connection.close()
            self.connections.discard(connection)
            await connection.wait_closed()

    def _report(self, connection: Connection, error: Exception) -> None:
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"handler for {connection.peer} failed", "exception": error}
        )

    # --- the end -------------------------------------------------------------------------------------

    def stop_listening(self) -> None:
        """Stops listening and refuses handshakes under way; established connections go on. Idempotent."""
        if self._closing or self._server is None:
            return
        self._closing = True
        self._stopped.set()
        self._server.close()
        for channel in list(self._pending):
            channel.refuse(BootstrapError("the server is closing"))
        if self._route is not None:  # connections hold the device themselves
            route, self._route = self._route, None
            route.adapter.release()

    def close(self) -> None:
        """Stops listening, refuses handshakes under way and closes every connection. Idempotent."""
        if self._server is None:
            return
        self.stop_listening()
        self._close_called.set()
        for connection in list(self.connections):
            connection.close()

    async def wait_closed(self) -> None:
        """Waits until :meth:`close` was called, every connection has closed and its handler has ended.

        A handler that goes on for ``Config.close_timeout`` seconds after its connection closed is cancelled.
        """
        if self._server is None:
            return
        await self._close_called.wait()
        await self._end_handlers()
        await self._server.wait_closed()

    async def wait_idle(self) -> None:
        """Waits until the server stopped listening, and all handlers have ended by themselves."""
        await self._stopped.wait()
        while tasks := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(tasks)
        if self._server is not None:
            await self._server.wait_closed()

    async def _end_handlers(self) -> None:
        tasks = {task for task in self._tasks if task is not asyncio.current_task()}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self.config.close_timeout)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "listening" if self._server else "not started"
        return f"<Server {state} on port {self.port}, {len(self.connections)} connections>"


def serve(
    handler: Handler,
    host: str | None,
    port: int,
    *,
    device: str | None = None,
    config: Config | None = None,
    ssl: ssl_module.SSLContext | None = None,
    token: str | bytes | None = None,
) -> Server:
    """Listens for connections: ``async with serve(handler, host, port) as server`` or ``await serve(...)``.

    ``handler(connection)`` is a coroutine function, run as a task for each connection; when it ends, the
    connection closes. What it raises goes to the loop's exception handler, and harms no other connection.
    ``host`` None listens on every interface, ``port`` 0 takes a free one (``server.port``). ``token`` and
    ``ssl`` (an ``SSLContext``) say who may come in; a client that is refused costs nothing else.

    Raises :class:`DeviceError` when there is no usable device, OSError when the port cannot be had.
    """
    if not callable(handler):
        raise MisuseError("serve() needs a coroutine function that takes a connection")
    return Server(handler, host, port, device=device, config=config or Config(), ssl=ssl, token=token)
