"""Makes the checkout ready to work: system packages, .venv, the compiled extension.

``python3 tools/setup.py [--for demo|test|bench|lint|docs]`` does what is missing and nothing else, so that the
second time costs a fraction of a second.  Three steps, each of which looks before it acts:

1. *System packages.*  Each is known by a file that it brings.  Only what is missing is installed (apt-get, as
   root or through sudo); without apt-get the missing things are named and the user installs them.
2. *.venv.*  A stamp in it lists the interpreter and the requirements that are in; another interpreter makes
   it anew, a requirement that is not listed is installed.
3. *The extension.*  meson and ninja build it in ``build/``; the modules are copied into aiordma/_native/ when
   they changed, so that the checkout imports in place.

Standard library only.  It must parse on any Python 3, to be able to say that one is too old.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import filecmp
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "aiordma-setup.json"
NATIVE = ROOT / "aiordma" / "_native"

VERSION = "{}.{}".format(*sys.version_info)
OLDEST = (3, 11)
NEWER_PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")

#: The optional dependencies of pyproject.toml that each purpose needs.
EXTRAS: dict[str, tuple[str, ...]] = {
    "demo": ("uvloop",),
    "test": ("test",),
    "bench": ("test", "bench"),
    "lint": ("test", "lint", "docs"),
    "docs": ("docs", "lint"),  # ruff wraps the signatures of the reference
}

#: Programs that the tests need: others' verbs programs run on usroce, ip makes hosts of network namespaces.
PROGRAMS = {
    "ibv_rc_pingpong": "ibverbs-utils",
    "ib_send_lat": "perftest",
    "ip": "iproute2",
    "tshark": "tshark",
}
USES_PROGRAMS = ("test", "lint")

#: For readers without apt-get.
ELSEWHERE = (
    "Fedora, RHEL: dnf install gcc glibc-devel python3-devel rdma-core-devel libibverbs libibverbs-utils "
    "perftest; "
    "Arch: pacman -S base-devel python rdma-core perftest; "
    "SUSE: zypper install gcc python3-devel rdma-core-devel libibverbs-utils perftest"
)


class SetupError(Exception):
    """Something is missing that cannot be had from here; the text names it and the fix."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make the checkout ready: system packages, .venv, extension."
    )
    parser.add_argument("--for", dest="purpose", choices=sorted(EXTRAS), default="test")
    options = parser.parse_args(arguments)
    try:
        set_up(options.purpose)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def set_up(purpose: str) -> None:
    use_new_enough_python()
    with locked():
        install_packages(purpose)
        make_venv(requirements(EXTRAS[purpose]))
        install_modules(build("build"), NATIVE)


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold the checkout against another set-up in it; the kernel lets go if we die."""
    fd = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def call(
    argv: Sequence[str | Path], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program quietly; the caller looks at the return code."""
    return subprocess.run(
        [str(word) for word in argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def call_or_fail(
    argv: Sequence[str | Path], what: str, env: Mapping[str, str] | None = None, hint: str = ""
) -> None:
    result = call(argv, env)
    if result.returncode:
        command = shlex.join(str(word) for word in argv)
        raise SetupError(f"{what} failed: {command}\n{tail(result.stdout)}{hint}")


def tail(text: str, lines: int = 30) -> str:
    return "".join(f"    {line}\n" for line in text.strip().splitlines()[-lines:])


# The interpreter


def use_new_enough_python() -> None:
    """Go on in a newer Python of this machine if this one is too old."""
    if sys.version_info >= OLDEST:
        return
    for name in NEWER_PYTHONS:  # type: ignore[unreachable, unused-ignore]
        path = shutil.which(name)
        if path is not None and call([path, "-c", ""]).returncode == 0:
            os.execv(path, [path, str(Path(__file__).resolve()), *sys.argv[1:]])
    found = ".".join(map(str, sys.version_info[:3]))
    raise SetupError(
        f"Python 3.11 or newer is needed, and python3 is {found} ({sys.executable}). Install one "
        "(Debian 12 and Ubuntu 24.04 have it; elsewhere pyenv, uv, or a python3.12 package) so that it is on "
        "the PATH as python3 or python3.12."
    )


def base_python() -> Path:
    """The real interpreter, behind a pyenv shim, a symlink or an active virtual environment."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


# System packages


def install_packages(purpose: str) -> None:
    packages = missing_packages(purpose)
    if not packages:
        return
    names = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise SetupError(f"missing (Debian's names): {names}. {ELSEWHERE}")
    fix = f"apt-get update && apt-get install {names}"
    prefix = root_prefix(fix)
    say(f"installing {names} (apt-get, once)")
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    install = [*apt, "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "install", *packages]
    result = call(install)
    if result.returncode:  # the package lists may be absent or stale
        call([*apt, "update"])
        result = call(install)
    still = missing_packages(purpose)
    if result.returncode or still:
        raise SetupError(
            f"cannot install {' '.join(still) or names}; try as root: {fix}\n{tail(result.stdout, 15)}"
        )


def missing_packages(purpose: str) -> list[str]:
    """Debian's names of what is not there; a few stat calls."""
    missing = []
    if not compiler_found():
        missing.append("gcc")
    if not Path("/usr/include/stdio.h").exists():
        missing.append("libc6-dev")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(python_package("libpython{}-dev", "the header Python.h"))
    if importlib.util.find_spec("ensurepip") is None:
        missing.append(python_package("python{}-venv", "the module ensurepip"))
    if not Path("/usr/include/infiniband/verbs.h").exists():
        missing.append("libibverbs-dev")
    if not Path("/etc/libibverbs.d/rxe.driver").exists():
        missing.append("ibverbs-providers")
    if purpose in USES_PROGRAMS:
        missing += [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    return missing


def compiler_found() -> bool:
    names = [*shlex.split(os.environ.get("CC", ""))[:1], "cc", "gcc", "clang"]
    return any(shutil.which(name) for name in names)


def python_package(pattern: str, what: str) -> str:
    """Debian's package for its own interpreter; any other one must be whole as it is."""
    if Path(sys.base_prefix) != Path("/usr"):
        raise SetupError(
            f"{base_python()} lacks {what}: install it anew, or put another Python first in PATH"
        )
    return pattern.format(VERSION)


def root_prefix(fix: str) -> list[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        raise SetupError(f"not root, and there is no sudo; run as root: {fix}")
    if sys.stdin is not None and sys.stdin.isatty():
        return ["sudo"]  # it may ask for the password
    if call(["sudo", "-n", "true"]).returncode:
        raise SetupError(f"sudo wants a password and there is no terminal; run as root: {fix}")
    return ["sudo", "-n"]


# The virtual environment


def requirements(extras: Iterable[str]) -> list[str]:
    """What pyproject.toml asks for: to build, to run, and the given extras."""
    import tomllib  # not there before 3.11, where the check of the version must still run

    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    wanted = [*project["build-system"]["requires"], "ninja>=1.10", *project["project"]["dependencies"]]
    for extra in extras:
        wanted += project["project"]["optional-dependencies"][extra]
    return sorted(set(wanted))


def make_venv(wanted: Sequence[str]) -> None:
    interpreter = [str(base_python()), sys.version]
    stamp = read_stamp()
    usable = stamp.get("python") == interpreter and PYTHON.exists()
    installed = set(stamp["requirements"]) if usable else set()
    if installed.issuperset(wanted):
        return
    if not usable:
        say(f"making .venv with Python {VERSION} ({interpreter[0]})")
        STAMP.unlink(missing_ok=True)
        call_or_fail([interpreter[0], "-m", "venv", "--clear", VENV], "making .venv")
        show_checkout_to_venv()
    pip_install(sorted(installed.union(wanted)), new=sorted(set(wanted) - installed))
    contents = {"python": interpreter, "requirements": sorted(installed.union(wanted))}
    STAMP.write_text(json.dumps(contents, indent=1), encoding="utf-8")


def read_stamp() -> dict[str, Any]:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def show_checkout_to_venv() -> None:
    """Let `import aiordma` find this checkout from any directory."""
    (site_packages,) = VENV.glob("lib/python3*/site-packages")
    (site_packages / "aiordma-checkout.pth").write_text(f"{ROOT}\n", encoding="utf-8")


def pip_install(wanted: Sequence[str], new: Sequence[str]) -> None:
    names = " ".join(re.split(r"[^\w.-]", requirement)[0] for requirement in new)
    say(f"installing {names} into .venv (pip, once)")
    hint = "The package index could not be reached, or lacks a version; pip's own PIP_INDEX_URL, PIP_PROXY, "
    hint += "PIP_CERT, PIP_FIND_LINKS are respected."
    call_or_fail(
        [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", *wanted],
        "pip install",
        hint=hint,
    )


# The extension


def build(name: str, *options: str) -> Path:
    """Build the extension in the directory of that name, from nothing if it was configured otherwise."""
    directory = ROOT / name
    stamp = directory / "aiordma-setup.json"
    configuration = json.dumps([str(ROOT), sys.version, *options])
    env = tool_environment()
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != configuration:
        say(f"configuring {name}/ (meson)")
        shutil.rmtree(directory, ignore_errors=True)
        meson = VENV / "bin" / "meson"
        call_or_fail([meson, "setup", directory, *options], "configuring the C extension", env)
        stamp.write_text(configuration, encoding="utf-8")
    call_or_fail([VENV / "bin" / "ninja", "-C", directory], "compiling the C extension", env)
    return directory


def tool_environment() -> dict[str, str]:
    """Programs of .venv come first: meson looks for ninja, custom targets for Python."""
    return {**os.environ, "PATH": f"{VENV / 'bin'}:{os.environ.get('PATH', os.defpath)}"}


def built_modules(directory: Path) -> list[Path]:
    """What belongs into aiordma/_native/: the extension modules, and the device in user space."""
    return sorted([*directory.glob("_*.so"), *directory.glob("libusroce.so")])


def install_modules(source: Path, destination: Path) -> None:
    """Copy the built modules that differ; by rename, since a process may have the old ones mapped."""
    for module in built_modules(source):
        target = destination / module.name
        if target.exists() and filecmp.cmp(module, target, shallow=False):
            continue
        scratch = target.with_suffix(".partial")
        shutil.copy2(module, scratch)
        scratch.replace(target)
        say(f"built {target.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
