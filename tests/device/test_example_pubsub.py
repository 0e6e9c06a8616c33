"""The pub/sub example: everyone gets what they want, and who is slow loses messages, not time of others."""

from __future__ import annotations

import contextlib
import re
import subprocess

import pytest

from aiordma.errors import ConnectionLostError
from pubsub import Message, PubSubClient

from .programs import finish, output, running, served, serving

pytestmark = pytest.mark.device


@pytest.mark.parametrize("both", [True, False])
def test_program(both: bool) -> None:
    text = output("pubsub.py") if both else served(["pubsub.py", "server"], ["pubsub.py", "client"])
    assert "the fast subscriber got 3000 messages" in text
    found = re.search(r"the slow one then got (\d+), and was told of (\d+) that were dropped", text)
    assert found is not None
    received, dropped = map(int, found.groups())
    assert received + dropped == 3000
    assert dropped > 0


def test_processes() -> None:
    """Each subscriber prints what it wants, whoever published it; one is killed, and nobody else notices."""
    with serving("pubsub.py", "server") as (_, port), contextlib.ExitStack() as stack:

        def subscriber(*options: str) -> subprocess.Popen[str]:
            command = "pubsub.py", "client", f"--port={port}", *options
            process = stack.enter_context(running(*command))
            assert process.stdout is not None
            assert process.stdout.readline().startswith("subscribed to ")
            return process

        all_of_it = subscriber("--subscribe=*", "--count=3")
        killed = subscriber("--subscribe=*")
        some = subscriber("--subscribe=weather/*", "--subscribe=traffic", "--count=2")
        killed.kill()
        for topic, text in (("weather/south", "sun"), ("news", "none"), ("weather/north", "fog")):
            output("pubsub.py", "client", f"--port={port}", "--publish", topic, text)
        assert finish(all_of_it) == "weather/south: sun\nnews: none\nweather/north: fog\n"
        assert finish(some) == "weather/south: sun\nweather/north: fog\n"


async def test_a_slow_subscriber_slows_nobody(no_leaked_tasks: None) -> None:
    count = 500
    with serving("pubsub.py", "server", "--limit=20") as (_, port):
        connect = [PubSubClient.connect("127.0.0.1", port) for _ in range(3)]
        async with connect[0] as publisher, connect[1] as fast, connect[2] as slow:
            for subscriber in fast, slow:
                await subscriber.subscribe("numbers")
            for n in range(count):
                await publisher.publish("numbers", b"%d" % n)
                assert await anext(fast) == Message("numbers", b"%d" % n)
            numbers, dropped = [-1], 0
            while numbers[-1] != count - 1:
                message = await anext(slow)
                dropped += message.dropped
                numbers.append(int(message.payload))
                assert numbers[-1] == numbers[-2] + 1 + message.dropped
    assert len(numbers) - 1 + dropped == count
    assert dropped > 0


async def test_a_slow_subscriber_is_disconnected(no_leaked_tasks: None) -> None:
    with serving("pubsub.py", "server", "--limit=5", "--when-full=disconnect") as (_, port):
        connect = [PubSubClient.connect("127.0.0.1", port) for _ in range(3)]
        async with connect[0] as publisher, connect[1] as fast, connect[2] as slow:
            for subscriber in fast, slow:
                await subscriber.subscribe("numbers")
            with pytest.raises(ConnectionLostError, match="too slow: 5 messages wait"):
                for n in range(1000):
                    await publisher.publish("numbers", b"%d" % n)
                    assert await anext(fast) == Message("numbers", b"%d" % n)
                async for _ in slow:
                    pass


async def test_large_messages(no_leaked_tasks: None) -> None:
    """Nobody takes them for a while, and others still get theirs."""
    payload = bytes(range(256)) * 4096
    with serving("pubsub.py", "server") as (_, port):
        connect = [PubSubClient.connect("127.0.0.1", port) for _ in range(3)]
        async with connect[0] as publisher, connect[1] as fast, connect[2] as slow:
            for subscriber in fast, slow:
                await subscriber.subscribe("large")
            for _ in range(5):
                await publisher.publish("large", payload)
                assert (await anext(fast)).payload == payload
            for _ in range(5):
                assert await anext(slow) == Message("large", payload)


async def test_messages_while_subscribing(no_leaked_tasks: None) -> None:
    """What comes before the confirmation of a further subscription is not lost."""
    with serving("pubsub.py", "server") as (_, port):
        async with PubSubClient.connect("127.0.0.1", port) as client:
            await client.subscribe("a")
            for n in range(10):
                await client.publish("a", b"%d" % n)
            await client.subscribe("b")
            await client.publish("b", b"last")
            received = [await anext(client) for _ in range(11)]
    assert received == [Message("a", b"%d" % n) for n in range(10)] + [Message("b", b"last")]


async def test_the_broker_ends(no_leaked_tasks: None) -> None:
    with serving("pubsub.py", "server") as (process, port):
        async with PubSubClient.connect("127.0.0.1", port) as client:
            await client.subscribe("*")
            process.kill()
            with pytest.raises(ConnectionLostError):
                async for _ in client:
                    pass
