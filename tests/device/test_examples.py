"""The examples as a newcomer runs them: real processes, a server that prints its port, and a client."""

from __future__ import annotations

import pytest

from .programs import output, running, served

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


def test_http() -> None:
    text = served(["http_over_rdma.py", "server"], ["http_over_rdma.py", "client", "--size=3000000"], TOKEN)
    assert "hello 127.0.0.1" in text
    assert "uploaded 3000000 bytes, digest right" in text
    assert "downloaded 3000000 bytes" in text
    assert "websocket echo: over RDMA" in text


def test_demo() -> None:
    text = output("demo.py")
    assert text.count("equal") == 2
    assert text.endswith("everything checked\n")
