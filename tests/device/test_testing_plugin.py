"""The fixtures for users, as a project of theirs uses them: a test file of its own, run by a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import aiordma
from aiordma.testing import Capture, FaultyLink, connected_pair
from aiordma.verbs import usroce
from tests.device.pcap import packets

pytestmark = [pytest.mark.device, pytest.mark.usroce]

PACKAGE = Path(aiordma.__file__).resolve().parents[1]

TESTS = """
async def test_pair(aiordma_pair):
    client, server = aiordma_pair
    await client.send(b"ping")
    assert await server.recv() == b"ping"
    lease, remote = await aiordma_pair.region(64)
    await client.write(b"hello", remote[:5])
    assert bytes(lease)[:5] == b"hello"
    assert client.route.adapter.context.is_usroce

async def test_faulty_link(aiordma_faulty_link, aiordma_pair):
    aiordma_faulty_link(drop=0.3, seed=5)
    client, server = aiordma_pair
    for i in range(50):
        await client.send(b"%d" % i)
        assert await server.recv() == b"%d" % i
    (counters,) = aiordma_faulty_link.counters()
    assert counters.faults_dropped > 0
    assert counters.retransmitted > 0

async def test_no_faults_are_left(aiordma_pair):
    from aiordma.verbs import usroce
    client, server = aiordma_pair
    for i in range(50):
        await client.send(b"%d" % i)
        assert await server.recv() == b"%d" % i
    assert usroce.counters(client.route.adapter.context).faults_dropped == 0

async def test_capture(aiordma_capture, aiordma_pair):
    client, server = aiordma_pair
    await client.send(b"seen by Wireshark")
    await server.recv()
    assert aiordma_capture.stop().read_bytes().count(b"seen by Wireshark") >= 1
    assert aiordma_capture.path.name == "NAME.pcap"
"""


def run(pytester: pytest.Pytester, *options: str, tests: str = TESTS) -> pytest.RunResult:
    pytester.makepyfile(tests)
    scope = "asyncio_default_fixture_loop_scope=function"
    return pytester.runpytest_subprocess(
        "-p", "aiordma.pytest_plugin", "-W", "error", "-o", scope, *options, timeout=60
    )


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    present = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(PACKAGE), present])))


def test_fixtures_in_auto_mode(pytester: pytest.Pytester) -> None:
    result = run(pytester, "-o", "asyncio_mode=auto", tests=TESTS.replace("NAME", "test_capture"))
    result.assert_outcomes(passed=4)


def test_fixtures_in_strict_mode(pytester: pytest.Pytester) -> None:
    tests = "import pytest\npytestmark = pytest.mark.asyncio\n" + TESTS.replace("NAME", "test_capture")
    run(pytester, "-o", "asyncio_mode=strict", tests=tests).assert_outcomes(passed=4)


def test_without_the_device_the_error_says_so(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIORDMA_USROCE", "0")
    result = run(pytester, "-o", "asyncio_mode=auto", "-k", "pair", tests=TESTS)
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*usroce is not there; see: aiordma doctor*"])


def test_the_plugin_is_light() -> None:
    """It is loaded into every test run of an environment that has aiordma."""
    heavy = "{'pydantic', 'cffi', 'aiordma.verbs', 'aiordma._native', 'aiordma.testing', 'aiordma.connect'}"
    script = f"import aiordma.pytest_plugin, sys; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE
    )
    assert printed.stdout == "[]\n"


async def test_faults_reach_devices_that_are_opened_later_and_end_with_the_block() -> None:
    with FaultyLink(drop=0.2, seed=9) as link:
        async with connected_pair() as pair:
            for i in range(50):
                await pair.client.send(b"%d" % i)
                assert await pair.server.recv() == b"%d" % i
            (context,) = usroce.contexts()
            assert usroce.counters(context).faults_dropped > 0
            link(duplicate=1.0)
            await pair.client.send(b"twice")
            assert await pair.server.recv() == b"twice"
            assert usroce.counters(context).faults_duplicated > 0
            link.clear()
            before = usroce.counters(context)
            await pair.client.send(b"once")
            assert await pair.server.recv() == b"once"
            assert usroce.counters(context).faults_duplicated == before.faults_duplicated
    async with connected_pair() as pair:
        await pair.client.send(b"whole")
        (context,) = usroce.contexts()
        assert usroce.counters(context).faults_dropped == 0


async def test_a_capture_is_complete_when_it_has_stopped(tmp_path: Path) -> None:
    async with connected_pair() as pair:
        await pair.client.send(b"before")
        await pair.server.recv()
        with Capture(tmp_path / "x.pcap") as capture:
            await pair.client.send(b"meanwhile")
            await pair.server.recv()
            path = capture.stop()
            await pair.client.send(b"after")
            await pair.server.recv()
        (port,) = {pair.client.route.choice.port.lid}
    found = [packet for packet in packets(path) if port in (packet.source, packet.destination)]
    assert len(found) >= 2
    text = path.read_bytes()
    assert b"meanwhile" in text
    assert b"before" not in text
    assert b"after" not in text


async def test_a_capture_of_two_devices_is_two_files(tmp_path: Path) -> None:
    with Capture(tmp_path / "x.pcap") as capture:
        one, other = aiordma.Config(), aiordma.Config(usroce_address="127.0.0.2")
        async with connected_pair(one, server_config=other) as pair:
            await pair.client.send(b"hello")
            assert await pair.server.recv() == b"hello"
    assert [path.name for path in capture.paths] == ["x.pcap", "x-2.pcap"]
    assert all(b"hello" in path.read_bytes() for path in capture.paths)
