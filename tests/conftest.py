"""What every test gets: both event loops, a device or a reason, and a check that nothing leaks.

Tests marked `device` run on the device that AIORDMA_DEVICE names, else on the first real one, else on usroce.
Those marked `rxe` are deselected on usroce, those marked `usroce` on any other device. Without a device they are
skipped with that reason, unless AIORDMA_REQUIRE asks for one ("usroce", or "rxe" for a real one): then its absence
is a failure.

With AIORDMA_LOOPS=either, an asynchronous test runs on one of the two loops, by its name: where a test takes long
(an emulated machine, sanitizers), and both loops have had it elsewhere. With AIORDMA_SAMPLE=4, of the tests of
what uses a device through connections only (ABOVE) every fourth runs, by its name.
"""

from __future__ import annotations

import asyncio
import gc
import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import uvloop

if TYPE_CHECKING:
    from aiordma.verbs import Device

#: Our own fixtures for users; the checkout is not installed, so pytest does not find them by itself.
pytest_plugins = ["aiordma.pytest_plugin", "pytester"]


LOOPS = ("asyncio", "uvloop")
#: Files of tests of the layers above connections.
ABOVE = ("test_rpc", "test_streams", "test_example", "test_cli", "test_docs", "test_testing_plugin")


def debug_loop() -> asyncio.AbstractEventLoop:
    """asyncio's own loop, in debug mode: wrong threads and forgotten awaits are reported."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 30.0  # an emulated machine is slow; that is no finding
    return loop


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test runs on both loops."""
    return {"asyncio": debug_loop, "uvloop": uvloop.new_event_loop}


# libuv opens a pipe for signals at the first loop of a process and keeps it: not a leak of the first test.
uvloop.new_event_loop().close()


def device_under_test() -> Device:
    """The device that the tests run on."""
    from aiordma import devices

    wanted = os.environ.get("AIORDMA_DEVICE")
    return next(device for device in devices() if wanted in (None, "", device.name))


def missing_device() -> str | None:
    """Why there is no device here, or not the one required, or None when all is there."""
    from aiordma import devices
    from aiordma.errors import DeviceError

    try:
        found = devices()
    except DeviceError as error:
        return str(error)
    names = [device.name for device in found]
    wanted = os.environ.get("AIORDMA_DEVICE")
    if wanted and wanted not in names:
        return f"AIORDMA_DEVICE={wanted} is not among {names}"
    for required in required_devices():
        if not any(device.is_usroce == (required == "usroce") for device in found):
            return f"{required} is required and not among {names}"
    return None if names else "no RDMA device on this machine"


def required_devices() -> list[str]:
    return [name for name in os.environ.get("AIORDMA_REQUIRE", "").split(",") if name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("AIORDMA_LOOPS") == "either":
        keep(config, items, [item for item in items if has_its_loop(item)])
    sample = int(os.environ.get("AIORDMA_SAMPLE", "1"))
    keep(config, items, [item for item in items if not is_above(item) or number_of(item) % sample == 0])
    if not any(item.get_closest_marker("device") for item in items):
        return
    reason = missing_device()
    if reason is None:
        device = device_under_test()
        os.environ["AIORDMA_DEVICE"] = (
            device.name
        )  # for the programs that tests start, and against second choices
        deselect(config, items, "rxe" if device.is_usroce else "usroce")
        return
    if os.environ.get("AIORDMA_USROCE") == "0":
        deselect(config, items, "usroce")
    if not required_devices():
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if item.get_closest_marker("device"):
                item.add_marker(skip)


def deselect(config: pytest.Config, items: list[pytest.Item], marker: str) -> None:
    """Leaves out the tests of the other kind of device; what needs both, rxe and usroce, runs where rxe is."""
    out = {
        item
        for item in items
        if item.get_closest_marker(marker) and (marker == "rxe" or not item.get_closest_marker("rxe"))
    }
    keep(config, items, [item for item in items if item not in out])


def keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    """Deselects all but ``kept``, in place."""
    out = set(items) - set(kept)
    config.hook.pytest_deselected(items=list(out))
    items[:] = kept


def has_its_loop(item: pytest.Item) -> bool:
    """True for one of the two runs of an asynchronous test."""
    loops = [loop for loop in LOOPS if f"[{loop}" in item.nodeid]
    return not loops or loops[0] == LOOPS[number_of(item) % 2]


def is_above(item: pytest.Item) -> bool:
    return item.path.name.startswith(ABOVE)


def number_of(item: pytest.Item) -> int:
    """Of a test, whichever loop it runs on."""
    name = item.nodeid.split("::", 1)[1]
    for loop in LOOPS:
        name = name.replace(f"[{loop}", "[", 1)
    return zlib.crc32(name.encode()) >> 8


@pytest.fixture(autouse=True)
def device_or_failure(request: pytest.FixtureRequest) -> None:
    """A required device that is missing fails every test that needs it."""
    if request.node.get_closest_marker("device") and required_devices():
        reason = missing_device()
        if reason is not None:
            pytest.fail(f"a device is required (AIORDMA_REQUIRE): {reason}")


def open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    """Device contexts, channels and sockets are descriptors; a closed context has given back all it owned."""
    before = open_fds()
    yield
    gc.collect()
    leaked = {fd: target for fd, target in open_fds().items() if fd not in before}
    assert not leaked, f"descriptors left open: {leaked}"


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Asked for by the device suite: a test ends with the tasks it began with, and holds no device."""
    from aiordma.adapter import _adapters

    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left, f"tasks left running: {left}"
    assert not _adapters.get(asyncio.get_running_loop()), "a device was left open"
