"""Debian packages: what is installed when missing, and what is only downloaded and unpacked.

A package counts as present when the file we need from it is there, so that the usual case costs a few
stat calls and no package manager.  Package lists are refreshed only after an attempt without that failed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tools.rxe.common import RxeError, cache_dir, call, call_or_fail, find_program, locked, say, tail

PROGRAMS = {
    "modprobe": "kmod",
    "ip": "iproute2",
    "rdma": "iproute2",
    "ibv_devinfo": "ibverbs-utils",
    "ib_write_bw": "perftest",
}
FILES = {
    "/etc/libibverbs.d/rxe.driver": "ibverbs-providers",
    "/usr/include/infiniband/verbs.h": "libibverbs-dev",
}
# For booting a virtual machine, beyond what running on this machine takes.
MACHINE_PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "depmod": "kmod"}


def missing_packages(programs: Mapping[str, str]) -> list[str]:
    missing = {package for program, package in programs.items() if find_program(program) is None}
    missing.update(package for path, package in FILES.items() if not Path(path).exists())
    return sorted(missing)


def install_missing(*, machine: bool) -> None:
    """Install the RDMA programs, and those for a virtual machine if wanted, as far as they are missing."""
    programs = PROGRAMS | MACHINE_PROGRAMS if machine else PROGRAMS
    if missing_packages(programs):
        with locked(cache_dir() / "lock"):
            install(programs)


def install(programs: Mapping[str, str]) -> None:
    packages = missing_packages(programs)
    if not packages:  # another process did it while we waited for the lock
        return
    fix = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if find_program("apt-get") is None:
        raise RxeError(f"no apt-get here to install what is missing (Debian's names): {' '.join(packages)}")
    prefix = root_prefix(fix)
    say(f"installing {' '.join(packages)} (once)")
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    options = ["-q", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    argv = [*prefix, *environment, "apt-get", *options, "install", *packages]
    result = call(argv)
    if result.returncode:
        refresh_lists()
        result = call(argv)
    still = missing_packages(programs)
    if result.returncode or still:
        names = " ".join(still or packages)
        raise RxeError(f"cannot install {names}; try as root: {fix}\n{tail(result.stdout)}")


def root_prefix(fix: str) -> list[str]:
    if os.geteuid() == 0:
        return []
    if find_program("sudo") and call(["sudo", "-n", "true"]).returncode == 0:
        return ["sudo", "-n"]
    raise RxeError(f"not root, and no sudo without a password; run as root: {fix}")


def refresh_lists() -> None:
    prefix = root_prefix("apt-get update")
    say("refreshing the package lists")
    # Some lists may be out of reach while the one we need is not: what follows tells.
    call([*prefix, "apt-get", "-q", "update"])


def newest_kernel_package(meta: str) -> str:
    """The package that the meta package (linux-image-amd64) depends on at present."""
    if find_program("apt-cache") is None:
        raise RxeError("no apt-cache here: the kernel for the guest is taken from Debian's packages")
    shown = call(["apt-cache", "show", "--no-all-versions", meta])
    match = re.search(r"^Depends:.*?\b(linux-image-[0-9][\w.+-]*)", shown.stdout, re.MULTILINE)
    if shown.returncode or match is None:
        raise RxeError(f"apt knows no package {meta} yet (or its sources lack Debian's main)")
    return match[1]


def unpack(package: str, into: Path) -> None:
    """Download a package and unpack it below `into`, without installing it."""
    download = into / ".deb"
    download.mkdir()
    # As root apt would drop to a user who may not write here.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    argv = ["apt-get", *sandbox, "-q", "download", package]
    result = call(argv, cwd=download)
    archives = sorted(download.glob("*.deb"))
    if result.returncode or not archives:
        raise RxeError(f"cannot download {package}: {' '.join(argv)}\n{tail(result.stdout)}")
    call_or_fail(["dpkg-deb", "-x", str(archives[0]), str(into)], f"unpacking {package}")
    archives[0].unlink()
    download.rmdir()
