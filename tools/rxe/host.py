"""Running the command on this machine itself: with an rxe device that is there, or one made for the purpose.

Instances that use the device made here hold a shared lock; the one that can have it exclusively at
its end is the last and removes the device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tools.rxe import packages
from tools.rxe.common import (
    STATUS_DEADLINE,
    RxeError,
    cache_dir,
    call,
    call_or_fail,
    find_program,
    locked,
    say,
)
from tools.rxe.supervisor import GRACE_SECONDS, PASSED_SIGNALS, Job

DEVICES = Path("/sys/class/infiniband")
DEVICE = "rxe0"
INTERFACE = "aiordma0"
ADDRESSES = (("10.71.0.1/24",), ("fd71::1/64", "nodad"))
MODULES = ("dummy", "rdma_rxe", "ib_uverbs", "rdma_ucm")
READY_SECONDS = 30.0


def active_rxe() -> str | None:
    """The name of an rxe device with an active port (of the drivers only rxe has a `parent` attribute)."""
    for device in sorted(DEVICES.glob("*")):
        if (device / "parent").exists() and is_active(device.name):
            return device.name
    return None


def is_active(device: str) -> bool:
    with contextlib.suppress(OSError):
        return any("ACTIVE" in path.read_text() for path in (DEVICES / device).glob("ports/*/state"))
    return False


@contextlib.contextmanager
def device() -> Iterator[str | None]:
    """An active rxe device of this machine for the time of the block, or None."""
    change = cache_dir() / "host-device.change"
    with open(cache_dir() / "host-device.users", "a", encoding="utf-8") as users:
        with locked(change):
            name = active_rxe() or make_device()
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield name
        finally:
            with locked(change), contextlib.suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_device()


def make_device() -> str | None:
    """A device of our own, or None where this kernel or our rights do not allow it."""
    if os.geteuid() != 0 or not kernel_has_rxe():
        return None
    packages.install_missing(machine=False)
    modprobe, ip, rdma = (find_program(name) or name for name in ("modprobe", "ip", "rdma"))
    if any(call([modprobe, module]).returncode for module in MODULES):
        return None
    try:
        call_or_fail([ip, "link", "add", INTERFACE, "type", "dummy"], "making an interface")
        marker().touch()
        for address in ADDRESSES:
            call_or_fail([ip, "address", "add", *address, "dev", INTERFACE], "giving it an address")
        call_or_fail([ip, "link", "set", INTERFACE, "up"], "starting it")
        call_or_fail([rdma, "link", "add", DEVICE, "type", "rxe", "netdev", INTERFACE], "making a device")
        wait_until_active()
    except RxeError as error:
        say(f"this kernel has rdma_rxe, but: {error}")
        remove_device()
        return None
    say(f"made soft-RoCE device {DEVICE} on interface {INTERFACE}")
    return DEVICE


def kernel_has_rxe() -> bool:
    """Whether modprobe would find the module, said without needing modprobe (it may be yet to install)."""
    index = Path("/lib/modules", os.uname().release, "modules.dep")
    return index.exists() and "/rdma_rxe.ko" in index.read_text(encoding="utf-8")


def wait_until_active() -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not (is_active(DEVICE) and any(Path("/dev/infiniband").glob("uverbs*"))):
        if time.monotonic() > deadline:
            raise RxeError(f"{DEVICE} was made but is not active after {READY_SECONDS:.0f} s")
        time.sleep(0.02)


def marker() -> Path:
    """Says that the interface is ours to remove."""
    return cache_dir() / "host-device.made"


def remove_device() -> None:
    if marker().exists():
        # the device goes with its interface
        call([find_program("ip") or "ip", "link", "delete", INTERFACE])
        marker().unlink(missing_ok=True)


def run(job: Job) -> int:
    """Execute the job here, with signals passed on and nothing of it left behind."""
    try:
        child = subprocess.Popen(job.argv, cwd=job.directory, start_new_session=True)
    except OSError as error:
        say(f"{job.argv[0]}: {error.strerror} (in {job.directory})")
        return 127 if isinstance(error, FileNotFoundError) else 126
    previous = {number: signal.signal(number, lambda n, _: end(child, n)) for number in PASSED_SIGNALS}
    try:
        return wait(child, job.deadline)
    finally:
        end(child, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait(child: subprocess.Popen[bytes], deadline: float) -> int:
    try:
        code = child.wait(max(0.0, deadline - time.monotonic()))
        return code if code >= 0 else 128 - code
    except subprocess.TimeoutExpired:
        say("the deadline passed: ending the command")
    end(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    return STATUS_DEADLINE


def end(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)
