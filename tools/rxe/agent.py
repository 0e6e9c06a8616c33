"""Process 1 of the guest: executes one command for the host and relays its streams, signals and status.

It is copied into the guest and started by guest-init.sh with the host's own interpreter, isolated and without
site (-I -S).  Imports are few on purpose: each costs tens of milliseconds under emulation.  The host imports
this module too, for the frame format: a kind (one byte), a length (four bytes, big endian), the payload.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import pty
import resource
import select
import signal
import struct
import termios
import time

HELLO, START, STDIN, STDIN_TAKEN, STDOUT, STDERR, SIGNAL, RESIZE, EXIT = range(1, 10)
HEADER = struct.Struct("!BI")
WINDOW = struct.Struct("HHHH")
STATUS = struct.Struct("!i")
CHUNK = 32768  # what a virtio port takes at once; also what the host may send of standard input unasked
PORT_NAME = "aiordma.agent"

# Standard input of the command: closed, a pipe fed by the host, or a terminal for all three streams.
NO_INPUT, PIPED_INPUT, TERMINAL = range(3)


def frame(kind: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(payload)) + payload


class Frames:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        self._buffer += data
        found = []
        while len(self._buffer) >= HEADER.size:
            kind, length = HEADER.unpack_from(self._buffer)
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            found.append((kind, bytes(self._buffer[HEADER.size : end])))
            del self._buffer[:end]
        return found


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def exit_status(wait_status: int) -> int:
    """As a shell gives it: 128+n for signal n."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


class Relay:
    """One command and the port.  `run` returns once the exit status has been sent."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.frames = Frames()
        self.poll = select.poll()
        self.outputs: dict[int, int] = {}  # file descriptor: kind of frame
        self.input = -1
        self.pending = b""  # of standard input, not yet taken by the command
        self.terminal = -1
        self.pid = 0
        self.status: int | None = None
        self.flush_files = False

    def send(self, kind: int, payload: bytes = b"") -> None:
        write_all(self.port, frame(kind, payload))

    def run(self) -> None:
        wake, waker = os.pipe()
        for fd in (wake, waker):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.poll.register(wake, select.POLLIN)
        self.poll.register(self.port, select.POLLIN)
        self.send(HELLO)
        while self.status is None:
            for fd, events in self.poll.poll():
                if fd == self.port:
                    self.read_port()
                elif fd == wake:
                    os.read(wake, 4096)
                    self.reap()
                elif fd == self.input and events & (select.POLLOUT | select.POLLERR):
                    self.write_input()
                elif fd in self.outputs:
                    self.read_output(fd)
        self.drain_outputs()
        if self.flush_files:
            os.sync()
        self.send(EXIT, STATUS.pack(self.status))

    def read_port(self) -> None:
        data = os.read(self.port, CHUNK)
        if not data:  # the host end is not open yet
            time.sleep(0.01)
        for kind, payload in self.frames.feed(data):
            if kind == START:
                self.start(payload)
            elif kind == STDIN:
                self.take_input(payload)
            elif kind == SIGNAL:
                self.kill(payload[0])
            elif kind == RESIZE and self.terminal >= 0:
                fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, payload)

    def kill(self, signum: int) -> None:
        try:
            if self.pid:
                os.killpg(self.pid, signum)
        except ProcessLookupError:
            pass

    def reap(self) -> None:
        """Collect the command and, being process 1, every orphan."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = exit_status(wait_status)

    def start(self, payload: bytes) -> None:
        argv, environment, directory, umask, mode, self.flush_files, now = marshal.loads(payload)
        # the clock chip gives whole seconds; files the host wrote just now must not lie in the future
        time.clock_settime(time.CLOCK_REALTIME, now)
        if mode == TERMINAL:
            self.terminal, inner = pty.openpty()
            standard = (inner, inner, inner)
            self.outputs = {self.terminal: STDOUT}
            self.input = self.terminal
        else:
            output, output_inner = os.pipe()
            error, error_inner = os.pipe()
            standard_input = os.open(os.devnull, os.O_RDONLY)
            if mode == PIPED_INPUT:
                standard_input, self.input = os.pipe()
            standard = (standard_input, output_inner, error_inner)
            self.outputs = {output: STDOUT, error: STDERR}
        self.pid = os.fork()
        if self.pid == 0:
            execute(argv, environment, directory, umask, standard)
        for fd in {*standard}:
            os.close(fd)
        for fd in self.outputs:
            os.set_blocking(fd, False)
            self.poll.register(fd, select.POLLIN)
        if mode == PIPED_INPUT:
            os.set_blocking(self.input, False)

    def read_output(self, fd: int) -> bool:
        """Pass on one piece; False when there is nothing at present."""
        try:
            data = os.read(fd, CHUNK - HEADER.size)
        except BlockingIOError:
            return False
        except OSError:  # a terminal nobody has open any more
            data = b""
        if data:
            self.send(self.outputs[fd], data)
            return True
        self.poll.unregister(fd)
        del self.outputs[fd]
        if fd != self.terminal:
            os.close(fd)
        return False

    def drain_outputs(self) -> None:
        """What the command wrote before its end; processes it left behind are not waited for."""
        for fd in list(self.outputs):
            while self.read_output(fd):
                pass

    def take_input(self, data: bytes) -> None:
        if self.input < 0:
            return
        if data:
            self.pending = data  # the host sends more only when told that this is taken
            self.write_input()
        elif self.input != self.terminal:
            self.close_input()

    def write_input(self) -> None:
        try:
            self.pending = self.pending[os.write(self.input, self.pending) :]
        except BlockingIOError:
            pass
        except OSError:  # the command closed its standard input
            self.close_input()
            return
        self.watch_input()
        if not self.pending:
            self.send(STDIN_TAKEN)

    def watch_input(self) -> None:
        """Wait for room while something is pending; a terminal is always read as well."""
        events = select.POLLOUT if self.pending else 0
        if self.input in self.outputs:
            events |= select.POLLIN
        if events:
            self.poll.register(self.input, events)
        else:
            self.forget_input()

    def forget_input(self) -> None:
        try:
            self.poll.unregister(self.input)
        except KeyError:
            pass

    def close_input(self) -> None:
        self.forget_input()
        os.close(self.input)
        self.input = -1


def execute(
    argv: list[str], environment: dict[str, str], directory: str, umask: int, standard: tuple[int, int, int]
) -> None:
    """In the child: become the command.  Never returns."""
    status = 126
    try:
        os.setsid()
        for number, fd in enumerate(standard):
            os.dup2(fd, number)
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        os.umask(umask)
        os.chdir(directory)
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        status = 127 if isinstance(error, FileNotFoundError) else 126
        write_all(2, f"rxe: {argv[0]}: {error.strerror} (in {directory})\n".encode(errors="replace"))
    finally:
        os._exit(status)


def open_port() -> int:
    """The virtio-serial port by its name; there is no udev to make a link."""
    ports = "/sys/class/virtio-ports"
    for device in os.listdir(ports):
        with open(f"{ports}/{device}/name", encoding="ascii") as file:
            if file.read().strip() == PORT_NAME:
                return os.open(f"/dev/{device}", os.O_RDWR)
    raise FileNotFoundError(f"no virtio port {PORT_NAME}")


def raise_limits() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))


if __name__ == "__main__":
    raise_limits()
    Relay(open_port()).run()
    while True:  # process 1 must not end; the host stops the machine
        time.sleep(60)
