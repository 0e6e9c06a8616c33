"""Mixed operations between two processes on any device, with every byte checked: the work of the loss tests.

    python -m tests.usroce.mixed serve [options]                prints "listening PORT"
    python -m tests.usroce.mixed connect HOST PORT [options]

Both ends do `--operations` each, at the same time, `--outstanding` of them in flight. What each does is a plan
drawn from the seed, so both know what is to come: messages and notifications must arrive whole, once and in
order; reads, fetch_adds and compare_swaps must return what the plan says; and at the end the memory must be what
the peer's model of it is. Each end prints one JSON line and exits 0, or a traceback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import aiordma
from aiordma import Config, Connection, RemoteRegion
from aiordma.errors import ConnectionClosedError
from aiordma.verbs import usroce

OPERATIONS = 5000
OUTSTANDING = 32
MAX_SIZE = 64 << 10

SLOTS = 64  # for writes and reads; more than are outstanding
MAIL = 32  # for writes with a notification, each until the peer has looked

# A notification says: look at this mail slot (its size, and the low bits of the step's number), or: I have.
ACK = 1 << 31
SIZE_BITS = 17
NUMBER_BITS = 9
assert MAIL << (SIZE_BITS + NUMBER_BITS) <= ACK

STRIDE = 0x9E3779B97F4A7C15  # of the values that compare_swap puts, one after the other
U64 = 1 << 64


class Mismatch(AssertionError):
    """Something was lost, doubled, out of order or changed."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Mismatch(what)


class Step(NamedTuple):
    kind: str
    size: int  # bytes
    value: int  # what fetch_add adds; 0: a compare_swap that expects something else


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one end does, and the bytes it does it with."""

    steps: Sequence[Step]
    block: bytes

    @classmethod
    def draw(cls, seed: int, operations: int, max_size: int) -> Plan:
        rng = random.Random(seed)
        kinds = ("write", "read", "send", "notify", "fetch_add", "compare_swap")
        steps = [
            # Sizes of every magnitude are as frequent.
            Step(rng.choice(kinds), int(max_size ** rng.random()), rng.randrange(4))
            for _ in range(operations)
        ]
        return cls(steps, rng.randbytes(4 * max_size))

    def data(self, number: int) -> bytes:
        """The content of a step."""
        size = self.steps[number].size
        start = number * 40503 % (len(self.block) - size)
        return self.block[start : start + size]

    def numbers(self, kind: str) -> list[int]:
        return [number for number, step in enumerate(self.steps) if step.kind == kind]


class Memory:
    """A model of the memory of one end, which the other end alone writes to: two words, slots, mail."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.counter = 0  # the word that fetch_add is for
        self.word = 0  # ... compare_swap
        self.contents = [b""] * (SLOTS + MAIL)

    def nbytes(self) -> int:
        return self.start(SLOTS + MAIL)

    def start(self, slot: int) -> int:
        return 16 + slot * self.max_size

    def digest(self) -> str:
        words = self.counter.to_bytes(8, "little") + self.word.to_bytes(8, "little")
        return hashlib.sha256(b"".join([words, *self.contents])).hexdigest()

    def digest_of(self, memory: memoryview, extents: Sequence[int]) -> str:
        """Of the real memory, where the model has contents of these sizes."""
        found = hashlib.sha256(memory[:16])
        for slot, extent in enumerate(extents):
            found.update(memory[self.start(slot) : self.start(slot) + extent])
        return found.hexdigest()


class Exchange:
    """One end at work on a connection."""

    def __init__(
        self, connection: Connection, mine: Plan, theirs: Plan, *, outstanding: int, max_size: int
    ) -> None:
        self.connection = connection
        self.mine, self.theirs = mine, theirs
        self.outstanding = outstanding
        self.peer = Memory(max_size)
        self.rng = random.Random(len(mine.steps))
        self.slots = list(range(SLOTS))  # that no operation is under way on
        self.mail = list(range(SLOTS, SLOTS + MAIL))
        self.looked_at: dict[int, asyncio.Future[None]] = {}
        self.remote: RemoteRegion

    async def run(self) -> None:
        """Raises Mismatch, or what the connection does."""
        async with self.connection.allocate(self.peer.nbytes()) as lease:
            await self.connection.share("memory", lease)
            self.remote = await self.connection.remote("memory")
            memory = memoryview(lease)
            try:
                await self._work(memory)
                await self._compare(memory)
            finally:
                memory.release()

    async def _work(self, memory: memoryview) -> None:
        steps = iter(range(len(self.mine.steps)))
        async with asyncio.TaskGroup() as group:
            for _ in range(self.outstanding):
                group.create_task(self._operate(steps))
            group.create_task(self._messages())
            group.create_task(self._notifications(memory))

    # --- what this end does: nothing is awaited between the next step and its posting, so they are in order ----

    async def _operate(self, steps: Iterator[int]) -> None:
        for number in steps:
            await getattr(self, f"_{self.mine.steps[number].kind}")(number)

    def _free_slot(self) -> int:
        return self.slots.pop(self.rng.randrange(len(self.slots)))

    def _place(self, slot: int, size: int) -> RemoteRegion:
        start = self.peer.start(slot)
        return self.remote[start : start + size]

    async def _write(self, number: int) -> None:
        slot, data = self._free_slot(), self.mine.data(number)
        self.peer.contents[slot] = data + self.peer.contents[slot][len(data) :]
        await self.connection.write(data, self._place(slot, len(data)))
        self.slots.append(slot)

    async def _read(self, number: int) -> None:
        slot = self._free_slot()
        expected = self.peer.contents[slot]
        data = await self.connection.read(self._place(slot, len(expected)))
        require(data == expected, f"step {number}: {len(expected)} bytes read are not those written")
        self.slots.append(slot)

    async def _send(self, number: int) -> None:
        await self.connection.send(self.mine.data(number))

    async def _notify(self, number: int) -> None:
        slot, data = self.mail.pop(), self.mine.data(number)
        self.peer.contents[slot] = data + self.peer.contents[slot][len(data) :]
        self.looked_at[slot] = looked = asyncio.get_running_loop().create_future()
        await self.connection.write(
            data, self._place(slot, len(data)), notify=announce(slot, len(data), number)
        )
        await looked
        self.mail.append(slot)

    async def _fetch_add(self, number: int) -> None:
        value = self.mine.steps[number].value
        expected = self.peer.counter
        self.peer.counter += value
        found = await self.connection.fetch_add(self.remote[:8], value)
        require(found == expected, f"step {number}: fetch_add found {found} instead of {expected}")

    async def _compare_swap(self, number: int) -> None:
        current = self.peer.word
        fits = self.mine.steps[number].value > 0
        desired = (current + STRIDE) % U64
        if fits:
            self.peer.word = desired
        found = await self.connection.compare_swap(
            self.remote[8:16], current if fits else current ^ 1, desired
        )
        require(found == current, f"step {number}: compare_swap found {found:#x} instead of {current:#x}")

    # --- what comes from the peer ------------------------------------------------------------------------------

    async def _messages(self) -> None:
        for number in self.theirs.numbers("send"):
            message = await self.connection.recv()
            require(
                message == self.theirs.data(number), f"message of step {number}: {len(message)} other bytes"
            )

    async def _notifications(self, memory: memoryview) -> None:
        announced = iter(self.theirs.numbers("notify"))
        acks = []
        for _ in range(len(self.theirs.numbers("notify")) + len(self.mine.numbers("notify"))):
            value = await self.connection.notified()
            if value & ACK:
                self.looked_at.pop(value ^ ACK).set_result(None)
                continue
            slot = self._look(value, next(announced, -1), memory)
            acks.append(self.connection.write(b"", self.remote[:0], notify=ACK | slot))
            acks[-1].add_done_callback(_retrieved)
        await asyncio.gather(*acks)

    def _look(self, value: int, number: int, memory: memoryview) -> int:
        """Whether the notification is the next one, and its data in place."""
        require(number >= 0, f"notification {value:#x} is one more than the peer sent")
        slot = SLOTS + (value >> (SIZE_BITS + NUMBER_BITS))
        data = self.theirs.data(number)
        require(
            value == announce(slot, len(data), number), f"notification {value:#x} instead of step {number}'s"
        )
        start = self.peer.start(slot)
        require(memory[start : start + len(data)] == data, f"step {number}: not the data it announces")
        return slot

    # --- the end -----------------------------------------------------------------------------------------------

    async def _compare(self, memory: memoryview) -> None:
        """Each tells the other what its memory should be, and hears that it is."""
        extents = [len(content) for content in self.peer.contents]
        await self.connection.send(json.dumps({"digest": self.peer.digest(), "extents": extents}).encode())
        claim = json.loads(await self.connection.recv())
        found = self.peer.digest_of(memory, claim["extents"])
        require(found == claim["digest"], "the memory is not what the peer wrote")
        said = self.connection.send(b"same")
        require(await self.connection.recv() == b"same", "a message too many")
        with contextlib.suppress(
            ConnectionClosedError
        ):  # the peer has it, but its last acknowledgement was lost
            await said


def _retrieved(operation: asyncio.Future[None]) -> None:
    """When the connection ends, whoever waits for something says so; this one need not."""
    if not operation.cancelled():
        operation.exception()


def announce(slot: int, size: int, number: int) -> int:
    """The value of a notification."""
    low = number % (1 << NUMBER_BITS)
    return (slot - SLOTS) << (SIZE_BITS + NUMBER_BITS) | size << NUMBER_BITS | low


# --- the program ---------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m tests.usroce.mixed")
    roles = result.add_subparsers(dest="role", required=True)
    serve = roles.add_parser("serve")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at")
    connect = roles.add_parser("connect")
    connect.add_argument("host")
    connect.add_argument("port", type=int)
    for role in (serve, connect):
        role.add_argument("--device")
        role.add_argument("--operations", type=int, default=OPERATIONS, help="of each end")
        role.add_argument("--seed", type=int, default=1)
        role.add_argument("--outstanding", type=int, default=OUTSTANDING)
        role.add_argument("--max-size", type=int, default=MAX_SIZE, help="bytes of one operation")
        role.add_argument("--mode", default="adaptive", choices=["event", "busy", "adaptive"])
        role.add_argument(
            "--ack-timeout", type=int, default=18, help="exponent; rxe waits that long to repeat"
        )
        role.add_argument("--timeout", type=float, default=100, help="seconds for all of it")
    return result


async def main(options: argparse.Namespace) -> None:
    config = Config(
        mode=options.mode,
        eager_size=options.max_size,
        ack_timeout=options.ack_timeout,
        retry_count=7,
        keepalive=0,  # on a bad way two of its probes may well be lost in a row
    )
    plans = [Plan.draw(2 * options.seed + end, options.operations, options.max_size) for end in range(2)]
    async with asyncio.timeout(options.timeout):
        if options.role == "serve":
            await serve(options, config, plans[0], plans[1])
        else:
            connecting = aiordma.connect(options.host, options.port, device=options.device, config=config)
            async with connecting as connection:
                await report(exchange(connection, options, plans[1], plans[0]), connection)


async def serve(options: argparse.Namespace, config: Config, mine: Plan, theirs: Plan) -> None:
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handler(connection: Connection) -> None:
        try:
            await report(exchange(connection, options, mine, theirs), connection)
            await connection.wait_closed()
        except BaseException as error:
            over.set_exception(error)
        else:
            over.set_result(None)

    async with aiordma.serve(handler, options.host, 0, device=options.device, config=config) as server:
        print(f"listening {server.port}", flush=True)
        await over


def exchange(connection: Connection, options: argparse.Namespace, mine: Plan, theirs: Plan) -> Exchange:
    return Exchange(connection, mine, theirs, outstanding=options.outstanding, max_size=options.max_size)


async def report(work: Exchange, connection: Connection) -> None:
    started = time.monotonic()
    await work.run()
    seconds = time.monotonic() - started
    counters: dict[str, Any] = {}
    for context in usroce.contexts():
        counters = dataclasses.asdict(usroce.counters(context))
    print(
        json.dumps(
            {
                "operations": len(work.mine.steps),
                "device": connection.statistics().device,
                "seconds": round(seconds, 3),
                "counters": counters,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    asyncio.run(main(parser().parse_args()))
