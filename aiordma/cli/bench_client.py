"""The client of ``aiordma bench``: opens the connections, keeps operations under way on them, and counts.

Each task awaits one operation after the other, as a program would; so many of them as are outstanding on each
connection. The time of an operation is from the end of the one before it in its task. A connection of its own,
idle meanwhile, asks the server for its processor time before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import Config
from ..connect import connect
from ..errors import RdmaError
from ..stream_transport import RdmaTransport
from ..transport import Connection
from .bench_server import METHOD, REGION, Setup, about, set_up, usage
from .histogram import Histogram, digits
from .options import address_text

T = TypeVar("T")
#: One operation, from its start to its result.
Call = Callable[[], Awaitable[Any]]

#: What can be measured, the role of the server for it, and the rights that it needs there.
OPERATIONS = {
    "echo": ("echo", "read"),
    "send": ("sink", "read"),
    "write": ("target", "write"),
    "read": ("target", "read"),
    "fetch-add": ("target", "atomic"),
    "compare-swap": ("target", "atomic"),
    "rpc": ("rpc", "read"),
    "stream": ("stream", "read"),
}
ATOMICS = ("fetch-add", "compare-swap")
#: Bytes of the word that atomics work on (IBA vol. 1, 9.4.5).
WORD = 8

_now_ns = time.perf_counter_ns
#: Seconds at the start that do not count, at most; and of operations, a part.
_WARM_UP = 0.2
_PROGRESS = 0.5
_ANSWER = 10.0


@dataclass(frozen=True, slots=True)
class Where:
    """The server, and how to come in. ``timeout`` (seconds) is for connecting."""

    host: str
    port: int
    device: str | None
    config: Config
    ssl: Any
    token: str | None
    timeout: float = 10.0

    def __str__(self) -> str:
        return address_text(self.host, self.port)

    @contextlib.asynccontextmanager
    async def connection(self, setup: Setup) -> AsyncIterator[tuple[Connection, dict[str, Any]]]:
        """A connection in that role, and what the server says of itself. Raises
        :class:`~aiordma.errors.RdmaError` that says what to do."""
        connecting = connect(
            self.host,
            self.port,
            device=self.device,
            config=self.config,
            ssl=self.ssl,
            token=self.token,
            timeout=self.timeout,
        )
        try:
            connection = await connecting
        except OSError as error:
            if isinstance(error, RdmaError):
                raise
            raise RdmaError(
                f"cannot connect to {self}: {error.strerror or error}; is there an aiordma bench --serve {self}?"
            ) from error
        async with connection:
            what = (
                f"{self} did not say within {_ANSWER:g} s that it is a bench server (aiordma bench --serve)"
            )
            yield connection, await in_time(set_up(connection, setup), _ANSWER, what)


async def in_time(waiting: Awaitable[T], timeout: float, what: str) -> T:
    """Waits; raises :class:`~aiordma.errors.RdmaError` with that text when it takes longer (seconds)."""
    try:
        async with asyncio.timeout(timeout):
            return await waiting
    except TimeoutError as error:
        if isinstance(error, RdmaError):
            raise
        raise RdmaError(what) from None


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured: ``size`` in bytes; ``seconds``, or ``count`` operations, whichever ends first."""

    operation: str
    size: int
    outstanding: int = 1
    connections: int = 1
    seconds: float | None = None
    count: int | None = None

    @property
    def tasks(self) -> int:
        """Operations under way at a time."""
        return self.outstanding * self.connections


@dataclass
class Outcome:
    """What came out. Times in seconds; ``usage`` is the processor time and the spinning of each end meanwhile."""

    job: Job
    times: Histogram = field(default_factory=Histogram)
    elapsed: float = 0.0
    client: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    interrupted: bool = False
    problem: RdmaError | OSError | None = None

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.times.count / self.elapsed if self.elapsed else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second; of what goes there and back, each way."""
        return 0.0 if self.job.operation in ATOMICS else self.rate * self.job.size

    def cpu_us(self, end: str) -> float | None:
        """Processor time for each operation at ``client`` or ``server``, in microseconds."""
        used = self.usage.get(end)
        return used["cpu"] * 1e6 / self.times.count if used and self.times.count else None

    def spin_share(self, end: str) -> float | None:
        """How much of the time that end was spinning, 0 to 1."""
        used = self.usage.get(end)
        return used["spin"] / self.elapsed if used and self.elapsed else None


# --- operations ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def calls(connection: Connection, job: Job) -> AsyncIterator[Call]:
    """The operation on a connection that is set up for it."""
    data = bytes(job.size)
    name = job.operation
    if name == "send":
        yield lambda: connection.send(data)
    elif name == "echo":
        async with _pipeline(connection.send, connection.recv, data, job.outstanding) as call:
            yield call
    elif name == "rpc":
        from ..rpc import RpcClient

        async with RpcClient(connection) as client:
            yield lambda: client.unary(METHOD, data)
    elif name == "stream":
        async with (
            _stream(connection, job.size) as (send, receive),
            _pipeline(send, receive, data, job.outstanding) as call,
        ):
            yield call
    else:
        region = (await connection.remote(REGION))[: WORD if name in ATOMICS else job.size]
        if name == "write":
            source = bytearray(data)
            # Registered once, as perftest does it; small data passes through other memory anyway.
            with (
                connection.register(source) if job.size > connection.eager_size else contextlib.nullcontext()
            ):
                yield lambda: connection.write(source, region)
            return
        one_sided: dict[str, Call] = {
            "read": lambda: connection.read(region),
            "fetch-add": lambda: connection.fetch_add(region, 1),
            "compare-swap": lambda: connection.compare_swap(region, 0, 0),
        }
        yield one_sided[name]


@contextlib.asynccontextmanager
async def _stream(
    connection: Connection, size: int
) -> AsyncIterator[tuple[Callable[[bytes], Awaitable[Any]], Call]]:
    """A byte stream over the connection: how to send, and how to receive ``size`` bytes."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=max(1 << 16, size), loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    made: asyncio.Future[None] = loop.create_future()
    transport = RdmaTransport(loop, connection, protocol, made)
    await made
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    try:
        yield send, lambda: reader.readexactly(size)
    finally:
        transport.abort()
        await asyncio.wait([transport.ended])


@contextlib.asynccontextmanager
async def _pipeline(
    send: Callable[[bytes], Awaitable[Any]], receive: Call, data: bytes, outstanding: int
) -> AsyncIterator[Call]:
    """There and back, in order. Of many, each task waits for a future that a task which receives completes."""

    async def alone() -> None:
        await send(data)
        await receive()

    if outstanding == 1:
        yield alone
        return
    loop = asyncio.get_running_loop()
    waiting: deque[asyncio.Future[None]] = deque()
    ended: list[Exception] = []

    async def one_of_many() -> None:
        if ended:
            raise ended[0]
        answered: asyncio.Future[None] = loop.create_future()
        waiting.append(answered)
        await send(data)
        await answered

    async def hand_out() -> None:
        try:
            while True:
                await receive()
                answered = waiting.popleft()
                if not answered.done():  # its task was cancelled
                    answered.set_result(None)
        except (RdmaError, OSError, EOFError) as error:
            ended.append(error)
            for answered in waiting:
                if not answered.done():
                    answered.set_exception(error)

    receiving = asyncio.create_task(hand_out())
    try:
        yield one_of_many
    finally:
        receiving.cancel()
        await asyncio.wait([receiving])
        for answered in waiting:
            if answered.done() and not answered.cancelled():
                answered.exception()  # whose task ended before it


# --- measuring ----------------------------------------------------------------------------------------


class _Run:
    """Operations until a time or a number of them; :meth:`work` runs as many tasks of it as are outstanding."""

    def __init__(self, seconds: float | None, count: int | None) -> None:
        self.times = Histogram()
        self.started = _now_ns()
        self._end = self.started + int((seconds or 1e6) * 1e9)
        self._left = sys.maxsize if count is None else count

    async def work(self, call: Call) -> None:
        """One task."""
        record, end = self.times.record, self._end
        before = _now_ns()
        while before < end and self._left > 0:
            self._left -= 1
            await call()
            after = _now_ns()
            record(after - before)
            before = after

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return (_now_ns() - self.started) / 1e9


async def measure(where: Where, job: Job, loop: str, *, progress: bool) -> Outcome:
    """One measurement. Interrupted (the task is cancelled once), or failed on the way, it is as long as it lasted.

    Raises :class:`~aiordma.errors.RdmaError` when it does not come to measuring.
    """
    outcome = Outcome(job)
    role, access = OPERATIONS[job.operation]
    async with contextlib.AsyncExitStack() as stack:
        control, outcome.server = await stack.enter_async_context(where.connection(Setup("control")))
        outcome.client = about(control, loop)
        ready = []
        for _ in range(job.connections):
            made = await stack.enter_async_context(where.connection(Setup(role, job.size, access)))
            ready.append(await stack.enter_async_context(calls(made[0], job)))
        work = [call for call in ready for _ in range(job.outstanding)]
        warm_up = _Run(
            min(_WARM_UP, 0.2 * (job.seconds or 10)), job.count and job.tasks + min(job.count // 10, 1000)
        )
        await _together(warm_up, work, outcome)
        if not outcome.problem and not outcome.interrupted:
            await _timed(outcome, control, work, progress)
    return outcome


async def _timed(outcome: Outcome, control: Connection, work: list[Call], progress: bool) -> None:
    before = {"client": usage(control), "server": await server_usage(control)}
    run = _Run(outcome.job.seconds, outcome.job.count)
    outcome.times = run.times
    showing = asyncio.create_task(_show_progress(run, outcome.job)) if progress else None
    try:
        await _together(run, work, outcome)
    finally:
        outcome.elapsed = run.elapsed
        if showing is not None:
            showing.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    client = usage(control)
    outcome.usage["client"] = _since(before["client"], client)
    with contextlib.suppress(RdmaError):  # the server has gone: its part is unknown
        outcome.usage["server"] = _since(before["server"], await server_usage(control))


def _since(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after}


async def server_usage(control: Connection) -> dict[str, float]:
    """Processor time and spinning of the server's process so far, in seconds, as it says."""

    async def ask() -> dict[str, float]:
        await control.send(b"report")
        found: dict[str, float] = json.loads(await control.recv())
        return found

    return await in_time(ask(), _ANSWER, f"{control.peer} does not report within {_ANSWER:g} s")


async def _together(run: _Run, work: Iterable[Call], outcome: Outcome) -> None:
    """All tasks, to the end of the last one, the first failure, or an interruption."""
    tasks = [asyncio.create_task(run.work(call)) for call in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        outcome.interrupted = True
        current = asyncio.current_task()
        assert current is not None
        current.uncancel()
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, EOFError):
            result = ConnectionResetError(f"the peer ended the stream: {result}")
        if isinstance(result, RdmaError | OSError):
            outcome.problem = outcome.problem or result
        elif isinstance(result, Exception):
            raise result


async def _show_progress(run: _Run, job: Job) -> None:
    """One line on the terminal, written anew."""
    of = f" of {job.seconds:g} s" if job.seconds else f", {job.count} operations wanted"
    while True:
        await asyncio.sleep(_PROGRESS)
        elapsed = run.elapsed
        rate = digits(run.times.count / elapsed)
        print(f"\r\x1b[K{elapsed:.0f} s{of}, {rate} /s", end="", file=sys.stderr, flush=True)
