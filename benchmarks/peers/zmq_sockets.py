"""pyzmq's asyncio sockets: a DEALER asks, a ROUTER answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import zmq
import zmq.asyncio

from .clients import Channel, client_of
from .interface import HOST, SMALL, Bytes, Client, Desk, Peer

#: Messages that a socket queues in either direction: blocks queued without limit are memory, not speed.
QUEUED = 128


class Sockets(Peer):
    """One context each, with its one I/O thread, as is the default."""

    @contextlib.contextmanager
    def _socket(self, kind: int) -> Iterator[zmq.asyncio.Socket]:
        with zmq.asyncio.Context() as context, context.socket(kind) as socket:
            socket.set_hwm(QUEUED)
            socket.linger = 0
            yield socket

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def answer_all(socket: zmq.asyncio.Socket) -> None:
            while True:
                identity, message = await socket.recv_multipart(copy=False)
                answer = desk.answer(message.buffer)
                if answer is not None:
                    await socket.send_multipart([identity, answer])

        with self._socket(zmq.ROUTER) as socket:
            port = socket.bind_to_random_port(f"tcp://{HOST}")
            answering = asyncio.create_task(answer_all(socket))
            try:
                yield port
            finally:
                answering.cancel()
                await asyncio.wait([answering])

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        with self._socket(zmq.DEALER) as socket:
            socket.connect(f"tcp://{HOST}:{port}")

            def send(message: Bytes) -> Awaitable[Any]:
                """The I/O thread sends a block from where it is."""
                sending: Awaitable[Any] = socket.send(message, copy=len(message) <= SMALL)
                return sending

            async with client_of(Channel(send, socket.recv), outstanding) as client:
                yield client

    def versions(self) -> dict[str, str]:
        return {"pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
