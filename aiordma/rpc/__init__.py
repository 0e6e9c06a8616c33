"""Remote procedure calls over a connection: one request or a stream, one reply or a stream, bytes or typed.

The habits are those of grpc.aio: deadlines that travel with the call, cancellation that reaches the handler,
status codes and details, metadata, interceptors, health, reflection.

Server::

    kv = Service("kv")

    @kv.unary
    async def get(request: GetRequest, context: ServerContext) -> GetReply:
        if request.key not in store:
            context.abort(StatusCode.NOT_FOUND, f"no key {request.key!r}")
        return GetReply(value=store[request.key])

    async with aiordma.serve(RpcServer(kv), host, port):
        ...

Client::

    async with aiordma.connect(host, port) as connection, RpcClient(connection) as client:
        reply = await client.unary("kv/get", GetRequest(key="a"), reply_type=GetReply, timeout=1.0)

What belongs where: protocol/rpc.py has the frames, protocol/rpc_calls.py who may send what and when,
protocol/rpc_admission.py the limits; none of them knows asyncio. Here, service.py has methods and their types,
codec.py messages as bytes, context.py what a handler sees, serving.py the calls of one connection, server.py all
of them, calls.py and client.py the other side, pacing.py the streams within calls of both.
"""

from ..protocol.rpc import CallKind, Metadata, StatusCode
from .builtin import Health, MethodInfo
from .calls import BidiCall, ClientStreamCall, ServerStreamCall, StreamCall, UnaryCall
from .client import RpcClient, RpcClientStatistics
from .context import EOF, InvalidReplyError, Requests, ServerContext
from .errors import RpcConnectionError, RpcError, RpcTimeoutError
from .interceptors import CallDetails, ClientInterceptor, ServerInterceptor
from .server import RpcServer, RpcServerStatistics
from .service import Method, Service, bidi, client_stream, server_stream, unary

__all__ = [
    "EOF",
    "BidiCall",
    "CallDetails",
    "CallKind",
    "ClientInterceptor",
    "ClientStreamCall",
    "Health",
    "InvalidReplyError",
    "Metadata",
    "Method",
    "MethodInfo",
    "Requests",
    "RpcClient",
    "RpcClientStatistics",
    "RpcConnectionError",
    "RpcError",
    "RpcServer",
    "RpcServerStatistics",
    "RpcTimeoutError",
    "ServerContext",
    "ServerInterceptor",
    "ServerStreamCall",
    "Service",
    "StatusCode",
    "StreamCall",
    "UnaryCall",
    "bidi",
    "client_stream",
    "server_stream",
    "unary",
]
