"""grpc.aio: unary calls whose request and reply are bytes, without protobuf."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from .interface import HOST, Bytes, Client, Desk, Peer

SERVICE = "aiordma.Benchmark"
METHOD = "Call"
#: The default limit of 4 MiB would do; without one, there is no question.
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class _Client(Client):
    """A block is a call with an empty reply."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.unary_unary(f"/{SERVICE}/{METHOD}")

    async def request(self, data: bytes) -> Bytes:
        answer: bytes = await self._call(data)
        return answer

    async def push(self, block: bytes) -> None:
        await self._call(block)


class Unary(Peer):
    """One channel, one connection."""

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def call(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            answer = desk.answer(request)
            return b"" if answer is None else bytes(answer)

        methods = {METHOD: grpc.unary_unary_rpc_method_handler(call)}
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(None)

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        async with grpc.aio.insecure_channel(f"{HOST}:{port}", options=OPTIONS) as channel:
            yield _Client(channel)

    def versions(self) -> dict[str, str]:
        return {"grpcio": grpc.__version__}
