"""Everything in flight fails at once, with an error that says what and who; others go on."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiordma
from aiordma import Config, Connection, Server
from aiordma.errors import (
    ConnectionClosedError,
    ConnectionLostError,
    FlushedError,
    RdmaError,
    RetryExceededError,
)
from aiordma.testing import FaultyLink
from aiordma.verbs import QpState
from tests.conftest import device_under_test
from tests.device.conftest import Acceptor, MakePair

pytestmark = pytest.mark.device

#: What the issue allows in an emulated machine, in seconds.
DEADLINE = 10.0

Listen = Callable[..., Awaitable[tuple[Server, Acceptor]]]


@contextlib.asynccontextmanager
async def process_peer(server: Server) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in another process, connected and with its region announced."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.device.peer", "127.0.0.1", str(server.port), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 90) == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


def nothing() -> None: ...


async def in_flight(
    connection: Connection, name: str, cut: Callable[[], None] = nothing
) -> list[asyncio.Future[object]]:
    """100 operations and waits: messages without credit, large writes and reads, and waits for the peer.

    ``cut`` is called when nothing is under way yet.
    """
    remote = await connection.remote(name)
    credits = connection.statistics().send_credits
    window = [connection.send(b"fills the peer's window") for _ in range(credits)]
    await asyncio.gather(*window)
    await connection.flush()  # what is under way later is what fails
    data = bytes(1 << 20)
    cut()
    operations: list[asyncio.Future[Any]] = [connection.send(b"waits for a credit") for _ in range(58)]
    operations += [connection.write(data, remote) for _ in range(20)]
    operations += [connection.read(remote) for _ in range(20)]
    operations += [asyncio.ensure_future(connection.recv()), asyncio.ensure_future(connection.notified())]
    assert len(operations) == 100
    return operations


async def failures(operations: list[asyncio.Future[object]]) -> list[RdmaError]:
    """Every operation ends within the deadline; those that failed, with their errors."""
    done, pending = await asyncio.wait(operations, timeout=DEADLINE)
    assert not pending, f"{len(pending)} operations hang"
    errors = [error for future in done if (error := future.exception()) is not None]
    for error in errors:
        assert isinstance(error, ConnectionLostError), repr(error)
        assert error.peer
        assert error.qp_num
        assert error.opcode in ("send", "write", "read", "recv", "notified")
        assert error.peer in str(error)
        assert error.opcode in str(error)
    return errors  # type: ignore[return-value]


@pytest.mark.timeout(240)
async def test_kill_9_of_the_peer(listen: Listen) -> None:
    server, acceptor = await listen()
    async with process_peer(server) as process:
        victim = await acceptor.accepted.get()
        client = await aiordma.connect("127.0.0.1", server.port)
        other = await acceptor.accepted.get()
        operations = await in_flight(victim, "inbox")
        process.kill()
        errors = await failures(operations)
        assert len(errors) >= 60
        await victim.wait_closed()
        with pytest.raises(ConnectionLostError):
            await victim.send(b"too late")
        await client.send(b"still here")
        assert await other.recv() == b"still here"
        client.close()
        await client.wait_closed()
    async with aiordma.connect("127.0.0.1", server.port) as another:
        await another.send(b"and open for more")
        assert await (await acceptor.accepted.get()).recv() == b"and open for more"


async def test_queue_pair_moved_to_error(pair: MakePair) -> None:
    both = await pair()
    lease = await both.server.allocate(1 << 20)
    await both.server.share("inbox", lease)
    operations = await in_flight(both.client, "inbox")
    both.client._qp.to_error()
    errors = await failures(operations)
    assert any(isinstance(error, FlushedError) for error in errors)
    await both.server.wait_closed()
    with pytest.raises(ConnectionLostError):
        while True:
            await both.server.recv()


async def test_closed_here_and_closed_there(pair: MakePair) -> None:
    for closer in ("client", "server"):
        both = await pair()
        lease = await both.server.allocate(1 << 20)
        await both.server.share("inbox", lease)
        operations = await in_flight(both.client, "inbox")
        getattr(both, closer).close()
        errors = await failures(operations)
        assert len(errors) >= 60
        assert all(isinstance(error, ConnectionClosedError) for error in errors)
        await both.client.wait_closed()
        await both.server.wait_closed()
        assert both.client.statistics().state == "closed"
        both.client.close()  # idempotent
        for call in (both.client.send, both.client.allocate):
            with pytest.raises(ConnectionClosedError):
                await call(b"x" if call == both.client.send else 1)  # type: ignore[arg-type]


async def test_a_peer_whose_queue_pair_vanished_does_not_answer(pair: MakePair) -> None:
    """The peer process lives and its TCP connection too, but its device does not answer: retries run out."""
    both = await pair(Config(ack_timeout=14, retry_count=2))
    _, remote = await both.region(64)
    from aiordma._native import ffi, lib

    attr = ffi.new("struct ibv_qp_attr *")
    attr.qp_state = int(QpState.RESET)
    qp = both.server._qp
    assert lib.glue_modify_qp(qp.context.provider.table, qp._handle, attr, lib.IBV_QP_STATE) == 0
    with pytest.raises(RetryExceededError) as caught:
        await asyncio.wait_for(both.client.write(b"hello?", remote[:6]), DEADLINE)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.opcode == "write"


@pytest.mark.rxe
async def test_link_down(pair: MakePair) -> None:
    interface = _rxe_interface()
    # Otherwise the kernel forgets the IPv6 addresses, and tests that come later miss them.
    Path(f"/proc/sys/net/ipv6/conf/{interface}/keep_addr_on_down").write_text("1")
    both = await pair()
    lease = await both.server.allocate(1 << 20)
    await both.server.share("inbox", lease)
    operations = await in_flight(both.client, "inbox")
    subprocess.run(["ip", "link", "set", interface, "down"], check=True)
    try:
        errors = await failures(operations)
        assert len(errors) >= 60
        await both.client.wait_closed()
        await both.server.wait_closed()
    finally:
        subprocess.run(["ip", "link", "set", interface, "up"], check=True)
        await _port_active()
    again = await pair()
    await again.client.send(b"up again")
    assert await again.server.recv() == b"up again"


@pytest.mark.usroce
async def test_a_link_that_lets_nothing_through(pair: MakePair, aiordma_faulty_link: FaultyLink) -> None:
    """As the link down of rxe: everything fails within the configured time, and afterwards all is well."""
    both = await pair(Config(ack_timeout=14, retry_count=3))
    lease = await both.server.allocate(1 << 20)
    await both.server.share("inbox", lease)
    operations = await in_flight(both.client, "inbox", cut=lambda: aiordma_faulty_link(drop=1.0))
    errors = await failures(operations)
    assert len(errors) >= 60
    assert any(isinstance(error, RetryExceededError) for error in errors)
    await both.client.wait_closed()
    await both.server.wait_closed()
    aiordma_faulty_link.clear()
    again = await pair()
    await again.client.send(b"up again")
    assert await again.server.recv() == b"up again"


def _rxe_interface() -> str:
    device = device_under_test()
    parent = Path(f"/sys/class/infiniband/{device.name}/parent")
    if not parent.exists():
        pytest.skip(f"{device.name} is no rxe device: its link is not ours to take down")
    return parent.read_text().strip()


async def _port_active() -> None:
    device = device_under_test()
    state = Path(f"/sys/class/infiniband/{device.name}/ports/1/state")
    while "ACTIVE" not in state.read_text():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("shared", "count"), [(0, 20), (None, Config().min_credits)])
async def test_what_had_arrived_is_still_received(pair: MakePair, shared: int | None, count: int) -> None:
    both = await pair(Config(shared_receives=shared))
    for i in range(count):
        await both.client.send(b"%d" % i)
    both.client.close()
    await both.server.wait_closed()
    for i in range(count):
        assert await both.server.recv() == b"%d" % i
    with pytest.raises(ConnectionClosedError):
        await both.server.recv()


async def test_a_handler_that_raises_harms_only_its_connection() -> None:
    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))

    async def handler(connection: Connection) -> None:
        if await connection.recv() == b"raise":
            raise ZeroDivisionError("on purpose")
        await connection.send(b"fine")
        await connection.wait_closed()

    async with aiordma.serve(handler, "127.0.0.1", 0) as server:
        async with aiordma.connect("127.0.0.1", server.port) as good:
            async with aiordma.connect("127.0.0.1", server.port) as bad:
                await bad.send(b"raise")
                with pytest.raises(ConnectionClosedError):
                    await bad.recv()
            await good.send(b"work")
            assert await good.recv() == b"fine"
    assert [str(problem["exception"]) for problem in problems] == ["on purpose"]
