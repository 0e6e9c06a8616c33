"""The examples as a newcomer runs them: real processes, a server that prints its port, and a client."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiordma

pytestmark = pytest.mark.device

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PACKAGE = Path(aiordma.__file__).resolve().parents[1]
DEADLINE = 60.0  # seconds; the machine may be emulated
TOKEN = "--token=correct horse"


def start(name: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )


@contextlib.contextmanager
def running(name: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed after the deadline, and at the end of the block."""
    with start(name, *options) as process:
        timer = threading.Timer(DEADLINE, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def output(name: str, *options: str) -> str:
    """What a program prints that must succeed."""
    with running(name, *options) as process:
        text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def served(server: list[str], client: list[str]) -> str:
    """What a client prints against a server."""
    with running(*server, TOKEN) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), port + process.stdout.read()
        return output(*client, TOKEN, "--port", port)


def test_echo() -> None:
    text = served(["echo.py", "server"], ["echo.py", "client", "--count=50", "--mode=event"])
    assert "50 echoes of 64 bytes, median round trip" in text


def test_one_sided() -> None:
    text = served(["one_sided.py", "server"], ["one_sided.py", "client"])
    assert "read back: b'hello, memory'" in text
    assert "3 connections counted to 150" in text
    turns = text.split("under the lock: ")[1].strip().split(", ")
    owners = [turn.split()[0] for turn in turns[::2]]
    assert sorted(owners) == ["1", "2", "3"]
    assert turns == [f"{owner} {way}" for owner in owners for way in ("in", "out")]


def test_rpc() -> None:
    text = served(["rpc_server.py"], ["rpc_client.py"])
    assert "the server is SERVING" in text
    assert "stored 100 entries" in text
    assert "100 calls at the same time, all replies right" in text
    assert "scan found value 0, value 1, value 2, ..." in text
    assert "all hashes right" in text
    assert "failed with NOT_FOUND: there is no key 'nowhere'" in text
    assert "failed with INVALID_ARGUMENT: the request is not valid: key: String should have" in text
    assert "call of 'kv/sleep': DEADLINE_EXCEEDED" in text


def test_the_rpc_server_ends_in_order() -> None:
    with running("rpc_server.py") as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip().isdigit()
        process.terminate()
        text, _ = process.communicate()
    assert (process.returncode, text) == (0, "")


def test_demo() -> None:
    text = output("demo.py")
    assert text.count("equal") == 2
    assert text.endswith("everything checked\n")
