"""Publish and subscribe: topics, any number of subscribers, and slow ones that slow nobody down.

    python examples/pubsub.py                                       broker, publisher and subscribers in one go
    python examples/pubsub.py server
    python examples/pubsub.py client --port PORT --subscribe 'weather/*' --subscribe news
    python examples/pubsub.py client --port PORT --publish news 'all is well'

A connection never sends what its peer has no room for; it waits. So the broker keeps a queue and a task for each
subscriber, and the queue is bounded. When it is full, the oldest message is dropped, and the next one delivered
says how many were; or, with --when-full disconnect, the subscriber is disconnected. Messages are of any size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

import aiordma
import program
from aiordma.errors import ConnectionClosedError, ConnectionLostError, RdmaError

#: Kind, length of the topic, how many messages were dropped before this one; then come topic and payload.
HEAD = struct.Struct("<BHQ")
SUBSCRIBE, SUBSCRIBED, PUBLISH, MESSAGE = range(4)


@dataclass(frozen=True, slots=True)
class Message:
    """What a subscriber gets. ``dropped``: how many before it were not delivered, for it was too slow."""

    topic: str
    payload: bytes
    dropped: int = 0

    def parts(self, kind: int) -> list[bytes]:
        """As it is sent; the payload is not copied for it."""
        topic = self.topic.encode()
        return [HEAD.pack(kind, len(topic), self.dropped) + topic, self.payload]

    @classmethod
    def parse(cls, data: bytes) -> tuple[int, Message]:
        """The kind, and the rest."""
        kind, length, dropped = HEAD.unpack_from(data)
        end = HEAD.size + length
        return kind, cls(data[HEAD.size : end].decode(), data[end:], dropped)


class Subscriber:
    """A connection of the broker's: what it wants, and what waits for it."""

    def __init__(self, connection: aiordma.Connection, limit: int, *, disconnect: bool) -> None:
        self.patterns: set[str] = set()
        self._connection = connection
        self._limit = limit
        self._disconnect = disconnect
        self._queue: deque[Message] = deque()
        self._dropped = 0
        self._filled = asyncio.Event()

    def offer(self, message: Message) -> None:
        """Queues a message that it wants, and never waits."""
        if not any(fnmatch.fnmatchcase(message.topic, pattern) for pattern in self.patterns):
            return
        if len(self._queue) == self._limit:
            if self._disconnect:
                self._connection.fail(RdmaError(f"too slow: {self._limit} messages wait"))
                return
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(message)
        self._filled.set()

    async def deliver(self) -> None:
        """Sends what is queued, at the pace of the subscriber, until the connection ends."""
        with contextlib.suppress(ConnectionLostError):
            while True:
                await self._filled.wait()
                while self._queue:
                    message = self._queue.popleft()
                    dropped, self._dropped = self._dropped, 0
                    await self._connection.send(
                        Message(message.topic, message.payload, dropped).parts(MESSAGE)
                    )
                self._filled.clear()


class Broker:
    """Takes what is published, and gives it to those who want it. ``limit``: messages that may wait for each."""

    def __init__(self, limit: int = 1000, *, disconnect: bool = False) -> None:
        self._limit = limit
        self._disconnect = disconnect
        self._subscribers: set[Subscriber] = set()

    async def handler(self, connection: aiordma.Connection) -> None:
        """One client, publisher or subscriber or both."""
        subscriber = Subscriber(connection, self._limit, disconnect=self._disconnect)
        delivery = asyncio.create_task(subscriber.deliver())
        self._subscribers.add(subscriber)
        try:
            async for data in connection:
                kind, message = Message.parse(data)
                if kind == PUBLISH:
                    for other in self._subscribers:
                        other.offer(message)
                elif kind == SUBSCRIBE:
                    subscriber.patterns.add(message.topic)
                    await connection.send(message.parts(SUBSCRIBED))
        except ConnectionLostError:
            pass  # it died, or was too slow
        finally:
            self._subscribers.discard(subscriber)
            delivery.cancel()


class PubSubClient:
    """``async with PubSubClient.connect(host, port) as client``; then ``async for message in client``."""

    def __init__(self, connection: aiordma.Connection) -> None:
        self._connection = connection
        self._early: deque[Message] = deque()  # came while a subscription was waited for

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, host: str, port: int, config: aiordma.Config | None = None
    ) -> AsyncIterator[PubSubClient]:
        """A connection to a :class:`Broker`, for the block."""
        async with aiordma.connect(host, port, config=config) as connection:
            yield cls(connection)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Sends a message; when this returns, the broker has it, and its subscribers will."""
        await self._connection.send(Message(topic, payload).parts(PUBLISH))

    async def subscribe(self, pattern: str) -> None:
        """Wants the messages of topics like this, with the wildcards of fnmatch, from now on."""
        await self._connection.send(Message(pattern, b"").parts(SUBSCRIBE))
        while (parsed := Message.parse(await self._connection.recv()))[0] != SUBSCRIBED:
            self._early.append(parsed[1])

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        """The next message. Ends when the broker does; a lost connection raises."""
        if self._early:
            return self._early.popleft()
        try:
            return Message.parse(await self._connection.recv())[1]
        except ConnectionClosedError:
            raise StopAsyncIteration from None


async def subscriber(client: PubSubClient, patterns: list[str], count: int | None) -> None:
    """Prints what comes."""
    for pattern in patterns:
        await client.subscribe(pattern)
    print(f"subscribed to {', '.join(patterns)}", flush=True)
    async for message in client:
        gap = f" ({message.dropped} dropped before)" if message.dropped else ""
        print(f"{message.topic}: {message.payload.decode()}{gap}", flush=True)
        count = count and count - 1
        if count == 0:
            return


async def several(args: argparse.Namespace, config: aiordma.Config) -> None:
    """A publisher, a subscriber that keeps up with it, and one that does not look until the end."""
    connect = [PubSubClient.connect(args.host, args.port, config) for _ in range(3)]
    async with connect[0] as publisher, connect[1] as fast, connect[2] as slow:
        await fast.subscribe("numbers/*")
        await slow.subscribe("numbers/*")
        total, last = 3000, b"2999"
        for n in range(total):
            await publisher.publish("numbers/natural", b"%d" % n)
            assert (await anext(fast)).payload == b"%d" % n
        print(f"the fast subscriber got {total} messages")
        received = dropped = 0
        async for message in slow:
            received, dropped = received + 1, dropped + message.dropped
            if message.payload == last:
                break
        print(f"the slow one then got {received}, and was told of {dropped} that were dropped")


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Publishes, subscribes, or shows both."""
    if not args.publish and not args.subscribe:
        await several(args, config)
        return
    async with PubSubClient.connect(args.host, args.port, config) as connected:
        if args.publish:
            topic, text = args.publish
            await connected.publish(topic, text.encode())
        if args.subscribe:
            await subscriber(connected, args.subscribe, args.count)


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, config: aiordma.Config) -> AsyncIterator[int]:
    """A broker for the block; its port."""
    broker = Broker(args.limit, disconnect=args.when_full == "disconnect")
    async with aiordma.serve(broker.handler, args.host, args.port, config=config) as listening:
        yield listening.port


def main() -> None:
    """The command line."""
    parser = program.arguments(__doc__)
    parser.add_argument(
        "--limit", type=int, default=1000, help="server: messages that may wait for a subscriber"
    )
    parser.add_argument(
        "--when-full", choices=["drop", "disconnect"], default="drop", help="server: what then"
    )
    parser.add_argument("--subscribe", action="append", metavar="PATTERN", help="client: print what comes")
    parser.add_argument("--count", type=int, help="client: end after so many messages")
    parser.add_argument("--publish", nargs=2, metavar=("TOPIC", "TEXT"), help="client: send a message")
    program.run(parser.parse_args(), serving, client)


if __name__ == "__main__":
    main()
