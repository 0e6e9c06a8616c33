"""Processes beside a test: started, read line by line, waited for until they listen, and ended by their pid."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import aiordma

#: Seconds that anything in a test may take; the machine may be emulated.
DEADLINE = 100.0

#: Where the package under test lies, for processes that import it.
PACKAGE = Path(aiordma.__file__).resolve().parents[1]
CHECKOUT = Path(__file__).resolve().parents[2]

_LISTEN = "0A"  # proc(5), /proc/net/tcp: the state of a socket


class Process:
    """A program under way. What it prints and complains of is one stream."""

    def __init__(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.name = " ".join(argv)
        self._popen = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=CHECKOUT,
            bufsize=0,
        )
        assert self._popen.stdout is not None
        self._output = self._popen.stdout.fileno()
        self._printed = b""  # all of it
        self._read = 0  # how much of it line() has returned

    @property
    def pid(self) -> int:
        return self._popen.pid

    def line(self, deadline: float = DEADLINE) -> str:
        """The next line that it prints."""
        until = time.monotonic() + deadline
        while b"\n" not in self._printed[self._read :]:
            assert self._receive(until), f"{self.name} ended:\n{self.printed}"
        text, _, _ = self._printed[self._read :].partition(b"\n")
        self._read += len(text) + 1
        return text.decode()

    def has_printed_more(self) -> bool:
        """Whether there is something that line() has not returned; does not wait."""
        while select.select([self._output], [], [], 0)[0]:
            if not self._receive(time.monotonic()):
                break
        return len(self._printed) > self._read

    def tell(self, text: str) -> None:
        """A line for its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{text}\n".encode())

    def stop(self) -> None:
        """Stops it; returns when none of its threads runs any more."""
        self._popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self._popen.send_signal(signal.SIGCONT)

    def finish(self, deadline: float = DEADLINE) -> str:
        """Waits for its end, which must be a good one; returns everything that it printed."""
        (output,) = finish(self, deadline=deadline)
        return output

    def wait(self, until: float) -> str | None:
        """What went wrong until its end, or None."""
        try:
            while self._receive(until):
                pass
        except AssertionError as silence:
            return str(silence)
        status = self._popen.wait(DEADLINE)
        return f"{self.name} ended with status {status}:\n{self.printed}" if status else None

    def wait_until_listening(self, port: int) -> None:
        """Looks into the kernel's table: a program that serves one connection must not get a trial one."""
        until = time.monotonic() + DEADLINE
        while not self._listens(port):
            assert time.monotonic() < until, f"{self.name} does not listen:\n{self.printed}"
            assert self._receive(time.monotonic() + 0.01, patient=True), f"{self.name} ended:\n{self.printed}"

    @property
    def printed(self) -> str:
        return self._printed.decode(errors="replace")

    def end(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _receive(self, until: float, *, patient: bool = False) -> bool:
        """Some output; False at its end. Nothing in time is a failure unless `patient`."""
        ready, _, _ = select.select([self._output], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            assert patient, f"{self.name} is silent:\n{self.printed}"
            return True
        data = os.read(self._output, 1 << 16)
        self._printed += data
        return bool(data)

    def _listens(self, port: int) -> bool:
        for table in ("tcp", "tcp6"):
            path = Path(f"/proc/{self.pid}/net/{table}")  # of its network namespace
            if not path.exists():
                continue
            for row in path.read_text().splitlines()[1:]:
                _, local, _, state, *_ = row.split()
                if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                    return True
        return False


class Processes:
    """Starts processes, and ends those that are left."""

    def __init__(self) -> None:
        self._started: list[Process] = []

    def start(
        self,
        *argv: str,
        environment: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        namespace: str | None = None,
    ) -> Process:
        """A program in an environment (by default ours) with `settings` for usroce, in a network namespace."""
        variables = dict(os.environ if environment is None else environment)
        variables |= {f"AIORDMA_USROCE_{name}": value for name, value in (settings or {}).items()}
        inside = ("ip", "netns", "exec", namespace) if namespace else ()
        process = Process((*inside, *argv), variables)
        self._started.append(process)
        return process

    def python(
        self,
        module: str,
        *arguments: str,
        settings: Mapping[str, str] | None = None,
        namespace: str | None = None,
    ) -> Process:
        """A module of this checkout, as a program."""
        search = os.environ.get("PYTHONPATH", "").split(":")
        path = ":".join(dict.fromkeys([str(PACKAGE), str(CHECKOUT), *filter(None, search)]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        argv = (sys.executable, "-m", module, *arguments)
        return self.start(*argv, environment=environment, settings=settings, namespace=namespace)

    def end(self) -> None:
        for process in reversed(self._started):
            process.end()


def finish(*processes: Process, deadline: float = DEADLINE) -> list[str]:
    """Waits for the end of all, which must be good ones; returns everything that each printed.

    When one fails, so do those that it talks with: the message has all of them.
    """
    until = time.monotonic() + deadline
    failures = list(filter(None, [process.wait(until) for process in processes]))
    assert not failures, "\n".join(failures)
    return [process.printed for process in processes]


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    made = Processes()
    try:
        yield made
    finally:
        made.end()


def free_port() -> int:
    """A TCP port that nobody has, and that the kernel gives to nobody: below those for outgoing connections."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
            probe.bind(("::", port))
            return port


def free_loopback_address() -> str:
    """One of the 16 million addresses of this machine's loopback, so that UDP port 4791 is free at it."""
    while True:
        numbers = (127, random.randrange(1, 255), random.randrange(1, 255), random.randrange(1, 255))
        address = ".".join(map(str, numbers))
        with socket.socket(type=socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.bind((address, 4791))
            return address
