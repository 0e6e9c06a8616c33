"""Child processes of the benchmark: started on a core of their own, heard with deadlines, always ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class BenchmarkError(Exception):
    """A row cannot be measured; the text says why."""


class Child:
    """A process whose stdout is read by lines. Ended by :meth:`end` whatever state it is in."""

    def __init__(
        self, argv: Sequence[str], core: int | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self._lines = b""
        with pinned(core):
            self._process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self._stderr = b""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ, "out")
        self._selector.register(self._process.stderr, selectors.EVENT_READ, "err")

    def write(self, line: str) -> None:
        """A line to its stdin."""
        assert self._process.stdin
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise BenchmarkError(self._why(f"does not listen ({error})")) from None

    def read_line(self, timeout: float) -> str:
        """The next line. Raises :class:`BenchmarkError` at the deadline and when the process has ended."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._lines:
            if not self._read(deadline):
                raise BenchmarkError(self._why("ended"))
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    def read_rest(self, timeout: float) -> str:
        """All it says until it ends, which must be with status 0."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        if self._process.wait(max(0.1, deadline - time.monotonic())):
            raise BenchmarkError(self._why(f"ended with status {self._process.returncode}"))
        return self._lines.decode()

    def _read(self, deadline: float) -> bool:
        """Takes what there is; False when both pipes are at their end."""
        events = self._selector.select(max(0.0, deadline - time.monotonic()))
        if not events and self._selector.get_map():
            raise BenchmarkError(self._why("did not answer in time"))
        for key, _ in events:
            data = os.read(key.fd, 1 << 16)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.data == "out":
                self._lines += data
            else:
                self._stderr = (self._stderr + data)[-2000:]
        return bool(self._selector.get_map())

    def _why(self, what: str) -> str:
        name = " ".join(Path(word).name for word in map(str, list(self._process.args)[:3]))  # type: ignore[arg-type]
        said = self._stderr.decode(errors="replace").strip().splitlines()
        return f"{name} {what}" + (f": {said[-1]}" if said else "")

    def end(self) -> None:
        """Kills it if it still runs, and closes the pipes."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


@contextlib.contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """What is started meanwhile runs on one core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores(pin: bool) -> tuple[int | None, int | None]:
    """A core for the server and one for the client; None where there is only one or pinning is off."""
    available = sorted(os.sched_getaffinity(0))
    return (available[0], available[1]) if pin and len(available) > 1 else (None, None)


class WorkerPair:
    """A server and a client process of benchmarks.worker, for any number of sessions."""

    def __init__(self, argv: Sequence[str], pin: tuple[int | None, int | None]) -> None:
        self._argv, self._pin = argv, pin
        self._children: list[Child] = []
        self.versions: dict[str, str] = {}
        self.problem = ""

    def start(self) -> None:
        """Starts both, and does not wait for them."""
        self.end()
        self._children = [Child(self._argv, core) for core in self._pin]

    def wait_ready(self, timeout: float) -> None:
        """What cannot be imported is kept as the reason why its rows are missing."""
        for child in self._children:
            try:
                self.versions = answer(child, timeout)["ready"]
            except BenchmarkError as error:
                self.problem = str(error)

    def run(self, command: dict[str, Any], timeout: float) -> dict[str, list[int]]:
        """One session; returns [minimum, median, p99] ns by operation. After a failure both start anew."""
        if self.problem:
            raise BenchmarkError(self.problem)
        try:
            server, client = self._children
            server.write(json.dumps({**command, "role": "server"}))
            port = answer(server, timeout)["port"]
            client.write(json.dumps({**command, "role": "client", "port": port}))
            samples: dict[str, list[int]] = answer(client, timeout)["samples"]
            answer(server, timeout)
            return samples
        except BenchmarkError:
            self.start()
            self.wait_ready(timeout)
            raise

    def end(self) -> None:
        """Kills both."""
        for child in self._children:
            child.end()
        self._children = []


def answer(child: Child, timeout: float) -> dict[str, Any]:
    """The next line, of JSON. Raises :class:`BenchmarkError` for an error that the child reports."""
    said: dict[str, Any] = json.loads(child.read_line(timeout))
    if "error" in said:
        raise BenchmarkError(said["error"])
    return said
