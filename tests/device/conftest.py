"""Fixtures of the device suite: connected pairs in one event loop, and peers in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

import aiordma
from aiordma import Config, Server
from aiordma.testing import Acceptor, Pair, connected_pair
from aiordma.verbs import Context, usroce
from tests.conftest import device_under_test
from tests.device.stream_ends import Network, network

__all__ = ["Acceptor", "MakePair", "Pair"]


class MakePair(Protocol):
    def __call__(
        self, config: Config | None = None, server_config: Config | None = None, **kwargs: Any
    ) -> Awaitable[Pair]: ...


@pytest.fixture
async def listen(no_leaked_tasks: None) -> AsyncIterator[Callable[..., Awaitable[tuple[Server, Acceptor]]]]:
    """Starts servers that are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            config: Config | None = None, *, hold: bool = False, **kwargs: Any
        ) -> tuple[Server, Acceptor]:
            acceptor = Acceptor(hold=hold)
            server = aiordma.serve(acceptor, "127.0.0.1", 0, config=config, **kwargs)
            await stack.enter_async_context(server)
            stack.callback(acceptor.finish)
            return server, acceptor

        yield start


@pytest.fixture
async def pair(no_leaked_tasks: None) -> AsyncIterator[MakePair]:
    """Makes connected pairs on the device that is tested; both ends are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            config: Config | None = None, server_config: Config | None = None, **kwargs: Any
        ) -> Pair:
            device = device_under_test().name
            made = connected_pair(config, server_config=server_config, device=device, **kwargs)
            return await stack.enter_async_context(made)

        yield make


@pytest.fixture(params=["tcp", "rdma"])
async def net(request: pytest.FixtureRequest, no_leaked_tasks: None) -> AsyncIterator[Network]:
    """Streams of both kinds: a test that asks for it runs on asyncio's TCP and on RDMA."""
    async with network(request.param) as made:
        yield made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Streams are compared with asyncio's own TCP transport, not with uvloop's, which differs from it."""
    out = [item for item in items if "[uvloop-tcp" in item.name]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


#: What usroce devices that are closed by now had counted.
_closed = {"rnr_naks_sent": 0, "rnr_naks_received": 0}


def rnr_counters() -> dict[str, int]:
    """Receiver-not-ready NAKs that the kernel's rxe devices and this process's usroce devices have seen."""
    found = {}
    for path in Path("/sys/class/infiniband").glob("*/ports/*/hw_counters/*rnr*"):
        found[str(path)] = int(path.read_text())
    for name, closed in _closed.items():
        found[name] = closed + sum(getattr(usroce.counters(c), name) for c in usroce.contexts())
    return found


@pytest.fixture(autouse=True, scope="session")
def counters_outlive_devices() -> Iterator[None]:
    """A device takes its counters with it when it is closed: they are read just before."""
    destroy = Context._destroy

    def count_and_destroy(self: Context) -> None:
        if self.is_usroce:
            last = usroce.counters(self)
            for name in _closed:
                _closed[name] += getattr(last, name)
        destroy(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_destroy", count_and_destroy)
        yield


@pytest.fixture(autouse=True)
def receivers_always_ready() -> Any:
    """No test of ours may make a receiver-not-ready NAK happen."""
    before = rnr_counters()
    yield
    assert rnr_counters() == before
