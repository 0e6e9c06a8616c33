"""ucxx, the Python binding of UCX, over TCP: active messages, the kind that carries a message of any size."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import ucxx

from .clients import Channel, client_of
from .interface import HOST, Bytes, Client, Desk, Peer


def channel_of(endpoint: Any) -> Channel:
    """What arrives is a numpy array."""

    async def receive() -> Bytes:
        return memoryview(await endpoint.am_recv())

    return Channel(endpoint.am_send, receive)


class ActiveMessages(Peer):
    """``progress`` is ucxx's progress mode: polling, thread (its default), ..."""

    def __init__(self, progress: str) -> None:
        self._progress = progress
        self._started = False

    def _start(self) -> None:
        """Once in a process, and in the event loop. Whatever the environment says: TCP."""
        if not self._started:
            ucxx.init(options={"TLS": "tcp"}, progress_mode=self._progress)
            self._started = True

    @contextlib.asynccontextmanager
    async def serve(self, desk: Desk) -> AsyncIterator[int]:
        async def on_client(endpoint: Any) -> None:
            channel = channel_of(endpoint)
            with contextlib.suppress(ucxx.exceptions.UCXCanceledError):  # the client has closed
                while True:
                    answer = desk.answer(await channel.receive())
                    if answer is not None:
                        await channel.send(answer)

        self._start()
        listener = ucxx.create_listener(on_client)
        yield listener.port

    @contextlib.asynccontextmanager
    async def connect(self, port: int, outstanding: int) -> AsyncIterator[Client]:
        self._start()
        endpoint = await ucxx.create_endpoint(HOST, port)
        async with client_of(channel_of(endpoint), outstanding) as client:
            yield client
        await endpoint.close()

    def versions(self) -> dict[str, str]:
        return {"ucxx": ucxx.__version__, "UCX": ".".join(map(str, ucxx.get_ucx_version()))}
