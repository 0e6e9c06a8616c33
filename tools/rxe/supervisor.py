"""The host's side of one guest run: waits for the agent, feeds it, copies its output, answers signals.

One loop over the channel to the agent, standard input and a wakeup pipe for signals, with two clocks: the
deadline of the whole run, and while the guest boots, how long it has shown no sign of life.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import select
import signal
import socket
import stat
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.rxe import agent
from tools.rxe.common import STATUS_DEADLINE, RxeError, say

BOOT_STALL_SECONDS = 60.0
GRACE_SECONDS = 20.0  # between passing a signal on and ending the machine
PASSED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class BootError(RxeError):
    """The guest did not get as far as the agent; another try, in another way, may."""


@dataclass(frozen=True)
class Job:
    """What to execute, and how."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    deadline: float  # time.monotonic()
    terminal: bool = False


@contextmanager
def signals_to(fd: int) -> Iterator[None]:
    """Have signals write their number to `fd` instead of interrupting us."""
    previous = {number: signal.signal(number, lambda *_: None) for number in PASSED_SIGNALS}
    previous_fd = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def raw_terminal() -> Iterator[None]:
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def input_fd(terminal: bool) -> int | None:
    """Standard input if there is any to pass on: not closed, not /dev/null, not another job's terminal."""
    try:
        kind = os.fstat(0)
        if terminal:
            return 0
        if stat.S_ISCHR(kind.st_mode) and not os.isatty(0):
            return None
        return None if os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp() else 0
    except OSError:
        return None


class Supervisor:
    """One run; `status` ends up as the exit status."""

    def __init__(self, channel: socket.socket, console: Path, job: Job, flush_files: bool) -> None:
        self.channel = channel
        self.console = console
        self.job = job
        self.flush_files = flush_files
        self.frames = agent.Frames()
        self.poll = select.poll()
        self.input = input_fd(job.terminal)
        self.running = False
        self.status: int | None = None
        self.signal = 0  # the first one passed on
        self.give_up_at = job.deadline
        self.console_size = 0
        self.began = self.console_time = time.monotonic()

    def run(self) -> int:
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with signals_to(waker):
                self.poll.register(wake, select.POLLIN)
                self.poll.register(self.channel, select.POLLIN)
                while self.status is None:
                    self.check_clocks()
                    for fd, _ in self.poll.poll(500):
                        self.handle(fd, wake)
        finally:
            os.close(wake)
            os.close(waker)
        return self.status

    def handle(self, fd: int, wake: int) -> None:
        if fd == wake:
            for number in os.read(wake, 64):
                self.pass_signal(number)
        elif fd == self.channel.fileno():
            self.read_channel()
        else:
            self.read_input()

    def check_clocks(self) -> None:
        now = time.monotonic()
        if now >= self.give_up_at:
            self.expire(now)
        if self.running or self.status is not None:
            return
        size = self.console.stat().st_size
        if size != self.console_size:
            self.console_size, self.console_time = size, now
        elif now - self.console_time > BOOT_STALL_SECONDS:
            raise BootError(f"the guest showed no sign of life for {BOOT_STALL_SECONDS:.0f} s")

    def expire(self, now: float) -> None:
        """The deadline: ask the command to end, and end the machine when it does not."""
        if self.signal or not self.running:
            if not self.signal:
                say("the deadline passed before the guest was ready")
            self.status = 128 + self.signal if self.signal > 0 else STATUS_DEADLINE
            return
        say("the deadline passed: ending the command")
        self.send(agent.SIGNAL, bytes([signal.SIGTERM]))
        self.signal = -1
        self.give_up_at = now + GRACE_SECONDS

    def pass_signal(self, number: int) -> None:
        if not self.running:
            self.status = 128 + number
            return
        if self.signal > 0:  # the second time: no more patience
            self.status = 128 + self.signal
            return
        self.send(agent.SIGNAL, bytes([number]))
        if self.signal == 0:
            self.signal = number
            self.give_up_at = min(self.give_up_at, time.monotonic() + GRACE_SECONDS)

    def send(self, kind: int, payload: bytes = b"") -> None:
        try:
            self.channel.sendall(agent.frame(kind, payload))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the guest is gone; reading says so

    def read_channel(self) -> None:
        try:
            data = self.channel.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            if self.running:
                raise RxeError("the guest died while the command ran")
            raise BootError("the guest ended before it was ready")
        for kind, payload in self.frames.feed(data):
            self.take(kind, payload)

    def take(self, kind: int, payload: bytes) -> None:
        if kind == agent.HELLO:
            self.start()
        elif kind in (agent.STDOUT, agent.STDERR):
            self.copy(1 if kind == agent.STDOUT else 2, payload)
        elif kind == agent.STDIN_TAKEN and self.input is not None:
            self.poll.register(self.input, select.POLLIN)
        elif kind == agent.EXIT:
            (status,) = agent.STATUS.unpack(payload)
            self.status = STATUS_DEADLINE if self.signal < 0 else status

    def copy(self, fd: int, data: bytes) -> None:
        try:
            agent.write_all(fd, data)
        except BrokenPipeError:  # our reader left: so would the command's have
            self.pass_signal(signal.SIGPIPE)
        except OSError:
            pass  # closed: nobody wants it

    def start(self) -> None:
        say(f"guest ready after {time.monotonic() - self.began:.1f} s")
        job = self.job
        mode = agent.TERMINAL if job.terminal else agent.NO_INPUT if self.input is None else agent.PIPED_INPUT
        umask = os.umask(0o22)
        os.umask(umask)
        details = (list(job.argv), dict(job.environment), str(job.directory), umask, mode, self.flush_files)
        # marshal: both ends are the same interpreter, and the guest spares the import of json
        self.send(agent.START, marshal.dumps((*details, time.time())))
        if job.terminal:
            self.send(agent.RESIZE, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(agent.WINDOW.size)))
        self.running = True
        if self.input is not None:
            self.poll.register(self.input, select.POLLIN)

    def read_input(self) -> None:
        """Send one piece and pause until the command has taken it."""
        assert self.input is not None
        self.poll.unregister(self.input)
        try:
            data = os.read(self.input, agent.CHUNK)
        except OSError:
            data = b""
        self.send(agent.STDIN, data)
        if not data:
            self.input = None
