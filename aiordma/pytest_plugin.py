"""Fixtures for pytest, there in every project that has aiordma installed; what they are is in aiordma.testing.

``aiordma_pair``         two ends of a connection on usroce: ``client, server = aiordma_pair``
``aiordma_faulty_link``  call it to drop, double, reorder, damage packets: ``aiordma_faulty_link(drop=0.05)``
``aiordma_capture``      a pcap file of the test, in its ``tmp_path``

pytest loads this early, into test runs that may have nothing to do with RDMA: it imports nothing heavy before a
fixture is used. ``aiordma_pair`` is asynchronous: it needs pytest-asyncio, in either mode.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing import Capture, FaultyLink, Pair


def _asynchronous(function: Callable[..., Any]) -> Any:
    """A fixture that pytest-asyncio drives even in its strict mode."""
    if importlib.util.find_spec("pytest_asyncio") is None:
        return pytest.fixture(function)
    import pytest_asyncio

    return pytest_asyncio.fixture(function)


@_asynchronous
async def aiordma_pair() -> AsyncIterator[Pair]:
    """Both ends of a connection on usroce over loopback, in the event loop of the test."""
    from .testing import connected_pair

    async with connected_pair() as pair:
        yield pair


@pytest.fixture
def aiordma_faulty_link() -> Iterator[FaultyLink]:
    """A link without faults until it is called: ``aiordma_faulty_link(drop=0.05, seed=1)``."""
    from .testing import FaultyLink

    with FaultyLink() as link:
        yield link


@pytest.fixture
def aiordma_capture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Capture]:
    """A capture of the test; complete after ``stop()``, or when the test and its fixtures are over."""
    from .testing import Capture

    name = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    with Capture(tmp_path / f"{name}.pcap") as capture:
        yield capture
