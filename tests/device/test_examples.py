"""The examples as a newcomer runs them: real processes, a server that prints its port, and a client."""

from __future__ import annotations

import pytest

from .programs import output, served

pytestmark = pytest.mark.device

TOKEN = "--token=correct horse"


def test_echo() -> None:
    text = served(["echo.py", "server"], ["echo.py", "client", "--count=50", "--mode=event"], TOKEN)
    assert "50 echoes of 64 bytes, median round trip" in text


def test_one_sided() -> None:
    text = served(["one_sided.py", "server"], ["one_sided.py", "client"], TOKEN)
    assert "read back: b'hello, memory'" in text
    assert "3 connections counted to 150" in text
    assert "8 writes and a read of all of it in one batch: right" in text


def test_rpc() -> None:
    text = served(["rpc_server.py"], ["rpc_client.py"], TOKEN)
    assert "100 calls at the same time, all hashes right" in text
    assert "divide b'84 2' = 42" in text
    assert "failed with status invalid: division by zero" in text
    assert "call of 'sleep' not answered within 0.2 s" in text


def test_demo() -> None:
    text = output("demo.py")
    assert text.count("equal") == 2
    assert text.endswith("everything checked\n")
