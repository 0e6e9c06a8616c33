"""Locks and a sequencer for processes on any number of machines, in words of memory that atomic operations change.

    python examples/locks.py                        server and clients in one go
    python examples/locks.py server
    python examples/locks.py client --port PORT

A sequencer is one fetch_add. A lock that is free is taken by one compare_swap, and given back by another: the
server's program sleeps. Who finds it taken sends a message; the server then marks the word as waited for, so that
the holder's compare_swap fails and it, too, sends a message, and the server passes the lock on in the order of
arrival. It also does so for a holder that died. The server changes the words through its own device, over a
connection to itself, for atomic operations are atomic among those of one device, not with a processor's stores.

Each holder gets a token larger than that of every holder before. One whose connection broke may not know yet that
it has lost the lock: what the lock protects should refuse tokens smaller than the largest it has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import aiordma
import program
from aiordma.errors import ConnectionLostError

LOCKS = 64
WORD = 8
MESSAGE = struct.Struct("<BIQ")  # kind, number of the lock, value
WELCOME, WAIT, RELEASE, GRANT = range(4)  # the value: client's identity, none, none, token

#: A lock's word: token, the mark that somebody waits, the holder's identity (0: nobody).
TOKEN_SHIFT, WAITED, HOLDER = 16, 1 << 15, (1 << 15) - 1


class LockLostError(Exception):
    """The lock was no longer ours: the server took us for dead, or it was given back twice."""


def held(word: int, identity: int, *, waited: bool = False) -> int:
    """The word after the next holder has taken the lock."""
    return ((word >> TOKEN_SHIFT) + 1) << TOKEN_SHIFT | (WAITED if waited else 0) | identity


def free(word: int) -> int:
    """The word after the holder has given the lock back."""
    return word >> TOKEN_SHIFT << TOKEN_SHIFT


class LockServer:
    """The words, and who waits for which lock."""

    def __init__(self) -> None:
        self._started: asyncio.Future[aiordma.Lease] = asyncio.get_running_loop().create_future()
        self._members: dict[int, aiordma.Connection] = {}
        self._queues: list[deque[int]] = [deque() for _ in range(LOCKS)]
        self._turns = [asyncio.Lock() for _ in range(LOCKS)]
        self._identities = set(range(1, HOLDER + 1))

    async def start(self, own: aiordma.Connection) -> None:
        """``own``: a connection of this server to itself."""
        self._own = own
        self._words = await own.allocate((1 + LOCKS) * WORD)
        self._started.set_result(self._words)
        self._remote = await own.remote("words")

    async def handler(self, connection: aiordma.Connection) -> None:
        """One client, until its end; then what it held goes to the next."""
        await connection.share("words", await self._started, "read|atomic")
        identity = self._identities.pop()
        self._members[identity] = connection
        try:
            await connection.send(MESSAGE.pack(WELCOME, 0, identity))
            async for message in connection:
                await self._serve(identity, *MESSAGE.unpack(message))
        except ConnectionLostError:
            pass  # it died; that is seen to here
        finally:
            connection.close()
            await connection.wait_closed()  # its device can take no lock any more
            with contextlib.suppress(ConnectionLostError):  # our own, when the server ends
                await self._bury(identity)

    async def _serve(self, identity: int, kind: int, number: int, _: int) -> None:
        if kind == WAIT:
            self._queues[number].append(identity)
        await self._settle(number, identity if kind == RELEASE else None)

    async def _bury(self, identity: int) -> None:
        """Nobody waits in its name any more, and what it held is passed on."""
        del self._members[identity]
        for number, queue in enumerate(self._queues):
            self._queues[number] = deque(other for other in queue if other != identity)
            await self._settle(number, identity)
        self._identities.add(identity)

    async def _settle(self, number: int, leaving: int | None = None) -> None:
        """Makes a lock's word agree with its queue; ``leaving`` is a holder that gives it back."""
        async with self._turns[number]:
            while True:
                word, queue = self._word(number), self._queues[number]
                first = queue[0] if queue else None
                if word & HOLDER not in (0, leaving):
                    first, desired = None, word | WAITED if queue else word
                elif first is not None:
                    desired = held(word, first, waited=len(queue) > 1)
                else:
                    desired = free(word)
                if desired == word or await self._swap(number, word, desired):
                    break
            if first is not None and first in self._queues[number]:  # else it died meanwhile
                self._queues[number].remove(first)
                await self._grant(first, number, desired >> TOKEN_SHIFT)

    async def _grant(self, identity: int, number: int, token: int) -> None:
        with contextlib.suppress(ConnectionLostError):  # then its handler passes the lock on
            await self._members[identity].send(MESSAGE.pack(GRANT, number, token))

    def _word(self, number: int) -> int:
        return int.from_bytes(memoryview(self._words)[(1 + number) * WORD :][:WORD], sys.byteorder)

    async def _swap(self, number: int, expected: int, desired: int) -> bool:
        remote = self._remote[(1 + number) * WORD : (2 + number) * WORD]
        return bool(await self._own.compare_swap(remote, expected, desired) == expected)


class LockClient:
    """``async with LockClient.connect(host, port) as locks``; then ``async with locks.hold(3) as token``."""

    def __init__(self, connection: aiordma.Connection, words: aiordma.RemoteRegion, identity: int) -> None:
        self._connection = connection
        self._words = words
        self._identity = identity
        self._guesses = [0] * LOCKS  # what the word of a free lock was, last time
        self._waiters: list[deque[asyncio.Future[int]]] = [deque() for _ in range(LOCKS)]
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, host: str, port: int, config: aiordma.Config | None = None
    ) -> AsyncIterator[LockClient]:
        """A connection to a :class:`LockServer`, for the block; at its end, the server passes on what was held."""
        async with aiordma.connect(host, port, config=config) as connection:
            words = await connection.remote("words")
            client = cls(connection, words, MESSAGE.unpack(await connection.recv())[2])
            client._start(client._listen())
            try:
                yield client
            finally:
                connection.close()
                await asyncio.gather(*client._tasks)

    def waiting(self, number: int) -> int:
        """How many of this client wait for a lock that another had."""
        return len(self._waiters[number])

    async def draw(self, count: int = 1) -> int:
        """The first of ``count`` numbers that nobody else gets."""
        number: int = await self._connection.fetch_add(self._words[:WORD], count)
        return number

    @contextlib.asynccontextmanager
    async def hold(self, number: int) -> AsyncIterator[int]:
        """Holds a lock for the block; gives its token."""
        token = await self.acquire(number)
        try:
            yield token
        finally:
            await self.release(number, token)

    async def acquire(self, number: int) -> int:
        """Waits for a lock; returns the token. Cancelled: given back as soon as it is ours."""
        taking = asyncio.ensure_future(self._take(number))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._start(self._give_back(number, taking))
            raise

    async def _take(self, number: int) -> int:
        guess = self._guesses[number]
        while (word := await self._swap(number, guess, held(guess, self._identity))) != guess:
            if word & HOLDER:
                return await self._wait(number)
            guess = word
        return held(guess, 0) >> TOKEN_SHIFT

    async def _wait(self, number: int) -> int:
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters[number].append(granted)
        await self._connection.send(MESSAGE.pack(WAIT, number, 0))
        return await granted

    async def release(self, number: int, token: int) -> None:
        """Gives a lock back. Raises :class:`LockLostError`. Cancelled: it is given back all the same."""
        await asyncio.shield(self._start(self._release(number, token)))

    async def _release(self, number: int, token: int) -> None:
        ours = token << TOKEN_SHIFT | self._identity
        word = await self._swap(number, ours, free(ours))
        self._guesses[number] = free(word)
        if word == ours | WAITED:
            await self._connection.send(MESSAGE.pack(RELEASE, number, 0))
        elif word != ours:
            raise LockLostError(f"lock {number}, token {token}: the word is {word:#x}")

    async def _give_back(self, number: int, taking: asyncio.Future[int]) -> None:
        with contextlib.suppress(ConnectionLostError):
            await self._release(number, await taking)

    def _swap(self, number: int, expected: int, desired: int) -> Any:
        remote = self._words[(1 + number) * WORD : (2 + number) * WORD]
        return self._connection.compare_swap(remote, expected, desired)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _listen(self) -> None:
        """Hands grants to who waits; at the end of the connection, its error."""
        try:
            while True:
                _, number, token = MESSAGE.unpack(await self._connection.recv())
                self._waiters[number].popleft().set_result(token)
        except ConnectionLostError as error:
            for waiter in (waiter for waiters in self._waiters for waiter in waiters):
                if not waiter.done():
                    waiter.set_exception(ConnectionLostError(f"waiting for a lock: {error}"))


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, config: aiordma.Config) -> AsyncIterator[int]:
    """A server for the block; its port."""
    locks = LockServer()
    async with (
        aiordma.serve(locks.handler, args.host, args.port, config=config) as listening,
        aiordma.connect(args.host, listening.port, config=config) as own,
    ):
        await locks.start(own)
        yield listening.port


async def work(args: argparse.Namespace, config: aiordma.Config, name: int, log: list[str]) -> list[int]:
    """One client: draws numbers, and goes where only one may be."""
    async with LockClient.connect(args.host, args.port, config) as locks:
        numbers = [await locks.draw() for _ in range(50)]
        for _ in range(args.turns):
            async with locks.hold(0) as token:
                log.append(f"{name} in with {token}")
                numbers.append(await locks.draw())
                log.append(f"{name} out")
        return numbers


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Several at the same time."""
    log: list[str] = []
    drawn = await asyncio.gather(*(work(args, config, n + 1, log) for n in range(args.clients)))
    numbers = sorted(number for numbers in drawn for number in numbers)
    different = len(set(numbers)) == len(numbers)
    print(f"{args.clients} clients drew {len(numbers)} numbers, all different: {different}")
    print(f"under the lock: {', '.join(log)}")


def main() -> None:
    """The command line."""
    parser = program.arguments(__doc__)
    parser.add_argument("--clients", type=int, default=3, help="client: number of connections")
    parser.add_argument("--turns", type=int, default=2, help="client: how often each takes the lock")
    program.run(parser.parse_args(), serving, client)


if __name__ == "__main__":
    main()
