"""``aiordma call``: in a thread with a loop of its own, or a process, against a server here."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import aiordma
from aiordma.cli import main
from aiordma.rpc import RpcServer, ServerContext, Service, StatusCode
from tests.device.calling import CONFIG

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("no_leaked_tasks")]

PACKAGE = Path(aiordma.__file__).resolve().parents[1]


class Get(BaseModel):
    key: str = "default"


class Value(BaseModel):
    value: str


kv = Service("kv")


@kv.unary
async def get(request: Get, context: ServerContext) -> Value:
    """The value of a key."""
    if request.key == "none":
        context.abort(StatusCode.NOT_FOUND, "there is no such key")
    return Value(value=request.key + str(context.metadata.get("mark", "")))


@kv.unary
async def reverse(payload: bytes) -> bytes:
    return payload[::-1]


@kv.server_stream
async def count(request: int) -> AsyncIterator[int]:
    for i in range(request):
        yield i


@kv.client_stream
async def join(requests: AsyncIterator[bytes]) -> bytes:
    return b"+".join([request async for request in requests])


@kv.bidi
async def double(requests: AsyncIterator[int]) -> AsyncIterator[int]:
    async for request in requests:
        yield request * 2


@kv.unary
async def hang(payload: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


class Call:
    """Runs the command; returns what it printed, or its errors where it must fail."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    async def __call__(self, port: int, *arguments: str, stdin: bytes = b"", status: int = 0) -> str:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        found = await asyncio.to_thread(self._run, ["call", f"127.0.0.1:{port}", *arguments])
        out, err = self._capsys.readouterr()
        assert found == status, err
        return err if status else out

    @staticmethod
    def _run(line: list[str]) -> int:
        try:
            return main(line)
        except SystemExit as end:  # argparse
            return end.code if isinstance(end.code, int) else 1


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return Call(capsys, monkeypatch)


async def listening(server: RpcServer, **options: Any) -> aiordma.Server:
    return await aiordma.serve(server, "127.0.0.1", 0, config=CONFIG, **options)


async def test_as_a_program() -> None:
    server = await listening(RpcServer(kv))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiordma", "call", f"127.0.0.1:{server.port}", "kv/double"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )
    out, _ = await process.communicate(b"1\n2\n3\n")
    assert (process.returncode, out) == (0, b"2\n4\n6\n")
    server.close()
    await server.wait_closed()


async def test_calls_of_every_kind(call: Call) -> None:
    server = await listening(RpcServer(kv))
    port = server.port
    assert await call(port, "kv/get", "--json", '{"key": "a"}', "--metadata", "mark=!") == '{"value":"a!"}\n'
    assert await call(port, "kv/get") == '{"value":"default"}\n'
    assert await call(port, "kv/reverse", "--data", "abc") == "cba\n"
    assert await call(port, "kv/reverse", stdin=b"from a pipe") == "epip a morf\n"
    assert await call(port, "kv/count", "--json", "3") == "0\n1\n2\n"
    assert await call(port, "kv/join", "--data", "a", "--data", "b") == "a+b\n"
    assert await call(port, "kv/double", stdin=b"1\n2\n3\n") == "2\n4\n6\n"
    server.close()
    await server.wait_closed()


async def test_lists(call: Call) -> None:
    server = await listening(RpcServer(kv))
    lines = (await call(server.port)).splitlines()
    assert lines[0].split() == ["method", "kind", "request", "reply", "description"]
    assert ["kv/get", "unary", "Get", "Value", "The", "value", "of", "a", "key."] in [
        line.split() for line in lines
    ]
    assert lines == (await call(server.port, "--list")).splitlines()
    shown = json.loads(await call(server.port, "kv/get", "--list"))
    assert shown["request"]["properties"]["key"]["default"] == "default"
    assert "no method 'kv/ge'" in await call(server.port, "kv/ge", "--list", status=1)
    server.close()
    await server.wait_closed()


async def test_failures_say_why(call: Call) -> None:
    server = await listening(RpcServer(kv, reflection=False), token="secret")
    port, token = server.port, "--token=secret"
    error = await call(port, "kv/get", "--json", '{"key": "none"}', token, status=1)
    assert error == "aiordma: call of 'kv/get': NOT_FOUND: there is no such key\n"
    assert "is not valid: key" in await call(port, "kv/get", "--json", '{"key": 1}', token, status=1)
    assert "is SERVER_STREAM" in await call(port, "kv/count", "--json", "3", token, status=1)
    assert await call(port, "kv/count", "--json", "1", "--kind=server_stream", token) == "0\n"
    assert "takes one request, 2" in await call(port, "kv/get", "--data=a", "--data=b", token, status=1)
    assert "within 0.3 s" in await call(port, "kv/hang", "--timeout=0.3", token, status=1)
    assert "token" in await call(port, "kv/get", status=1)
    assert "not JSON" in await call(port, "kv/get", "--json", "{", status=2)
    assert "not KEY=VALUE" in await call(port, "kv/get", "--metadata", "x", status=2)
    server.close()
    await server.wait_closed()
    assert "cannot connect" in await call(port, "kv/get", status=1)
