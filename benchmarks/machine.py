"""What a benchmark ran on: a figure means nothing without it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def is_emulated() -> bool:
    """The processor itself is emulated: QEMU without virtualization."""
    return "TCG" in _cpuinfo().get("model name", "")


def kind_of_machine() -> str:
    """Bare metal, virtual, or emulated."""
    fields = _cpuinfo()
    if is_emulated():
        kind = "virtual machine with an EMULATED processor (QEMU TCG): compare within this run only"
    elif "hypervisor" in fields.get("flags", ""):
        kind = "virtual machine"
    else:
        kind = "no hypervisor seen"
    return kind + (", started by tools.rxe" if os.environ.get("AIORDMA_RXE_GUEST") else "")


def _python() -> str:
    """Which one, and whether a profile has told its build what matters."""
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return name if optimized else f"{name}, built without --enable-optimizations"


def describe() -> dict[str, str]:
    """Processor, cores, kernel, kind, interpreter."""
    return {
        "processor": _cpuinfo().get("model name", platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": kind_of_machine(),
        "interpreter": _python(),
    }


def _busy_and_all() -> tuple[int, int]:
    """Clock ticks of all cores since the machine started; stolen ones count as busy."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    ticks = [int(word) for word in first.split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


class Bystanders:
    """How much of the cores others use from here on: what is busy beside the children that end meanwhile."""

    def __init__(self) -> None:
        self._busy, self._all = _busy_and_all()
        self._ours = self._children()

    @staticmethod
    def _children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (usage.ru_utime + usage.ru_stime) * os.sysconf("SC_CLK_TCK")

    def share(self) -> float:
        """Of all cores, 0 to 1; a few hundredths are noise."""
        busy, total = _busy_and_all()
        others = busy - self._busy - (self._children() - self._ours)
        return max(0.0, others / max(1, total - self._all))


def raise_file_limit() -> None:
    """As many file descriptors as this process and its children may have: a connection has one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def wait_for_rest(share: float, timeout: float) -> float:
    """Until others use less than this share of the cores, or the timeout is over. Returns the seconds it took."""
    started = now = time.monotonic()
    while now - started < timeout:
        bystanders = Bystanders()
        time.sleep(0.2)
        now = time.monotonic()
        if bystanders.share() <= share:
            break
    return now - started


def libibverbs_version() -> str:
    """The file behind libibverbs.so.1, whose name ends in rdma-core's version."""
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listing = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    paths = [
        line.split("=>")[-1].strip() for line in listing.stdout.splitlines() if "libibverbs.so.1 " in line
    ]
    return Path(paths[0]).resolve().name if paths else "unknown"


def devices() -> list[str]:
    """The RDMA devices that the kernel shows."""
    folder = Path("/sys/class/infiniband")
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def choose_gid(device: str) -> tuple[int, str]:
    """Index and address of port 1's first IPv4 GID, RoCE v2 before v1.

    Raises LookupError when there is none. (An InfiniBand port needs IPoIB's address given by hand.)
    """
    port = Path("/sys/class/infiniband", device, "ports/1")
    found: list[tuple[bool, int, str]] = []
    for entry in (port / "gids").iterdir() if port.is_dir() else ():
        try:
            gid = entry.read_text().strip()
            kind = (port / "gid_attrs/types" / entry.name).read_text().strip()
        except OSError:
            continue  # an empty row of the table
        if gid.startswith("0000:0000:0000:0000:0000:ffff:"):
            octets = bytes.fromhex(gid[-9:].replace(":", ""))
            found.append((kind != "RoCE v2", int(entry.name), ".".join(map(str, octets))))
    if not found:
        raise LookupError(f"port 1 of {device} has no GID with an IPv4 address")
    _, index, address = min(found)
    return index, address
