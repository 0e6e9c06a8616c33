"""Whether KVM runs a guest here, found out by running one.

A present and openable /dev/kvm proves little: nested or filtered machines create a virtual CPU and then never
execute an instruction on it.  So boot a 64 KiB firmware of one instruction and a port write that makes QEMU
exit with a status nothing else gives.  The answer holds until this machine reboots and is kept in the cache.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools.rxe.common import write_atomically

PROBE_SECONDS = 5.0
# At the reset vector: mov al, 0x10; out 0xf4, al; hlt.  QEMU then exits with (0x10 << 1) | 1.
RESET_CODE = bytes([0xB0, 0x10, 0xE6, 0xF4, 0xF4])
RESET_OFFSET = 0xFFF0
PROBE_STATUS = 0x21


def kvm_works(qemu: str, cache: Path) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    known = cache / f"kvm-{boot}-{os.geteuid()}"
    if not known.exists():
        write_atomically(known, b"yes" if probe(qemu, cache) else b"no")
    return known.read_bytes() == b"yes"


def probe(qemu: str, cache: Path) -> bool:
    firmware = cache / "kvm-probe.bin"
    write_atomically(firmware, RESET_CODE.rjust(RESET_OFFSET + len(RESET_CODE), b"\0").ljust(0x10000, b"\0"))
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35,accel=kvm", "-cpu", "host", "-m", "64", "-bios", str(firmware)]
    argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    try:
        result = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # run() has killed it
        return False
    return result.returncode == PROBE_STATUS
