"""``aiordma usroce run -- PROGRAM ARGS``: any verbs program, C or Python, on the device in user space.

The program is executed with libusroce.so preloaded, so that its verbs calls end there; libibverbs itself may be
loaded behind it, by perftest for its drivers' private functions. Where libibverbs is not installed, the dynamic
linker finds libusroce.so under its name.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import LibraryError, MisuseError, RdmaError

HELP = "run any verbs program on the user-space RoCE v2 device"

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell says it

_SANITIZERS = ("libasan.so", "liblsan.so", "libtsan.so", "libclang_rt.")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this subcommand."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    run_parser = actions.add_parser(
        "run",
        help="run a program on usroce",
        description="Run a program on usroce: its verbs calls end in the user-space device.",
        epilog="example: aiordma usroce run -- ibv_rc_pingpong -d usroce0 -g 0",
    )
    run_parser.add_argument(
        "--address",
        metavar="ADDR[,ADDR]",
        type=_addresses,
        help="addresses of this host that the device has (default: 127.0.0.1 and ::1)",
    )
    run_parser.add_argument("--pcap", metavar="FILE", help="capture every packet for Wireshark")
    run_parser.add_argument(
        "--fault",
        metavar="SPEC",
        type=_fault,
        help="what happens to packets on their way out, like drop=0.01,reorder=0.05,seed=1",
    )
    run_parser.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS")


def _addresses(text: str) -> str:
    try:
        return ",".join(str(ipaddress.ip_address(word.strip())) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _fault(text: str) -> str:
    from ..verbs.usroce import Fault

    try:
        return str(Fault.parse(text))
    except MisuseError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Becomes the program; returns only when that fails: status 127 when it is not there, 126 when it is no
    program."""
    argv = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not argv:
        raise RdmaError("no program given: aiordma usroce run -- PROGRAM ARGS")
    settings = {"ADDRESS": args.address, "PCAP": args.pcap, "FAULT": args.fault}
    environment = program_environment({name: value for name, value in settings.items() if value})
    sys.stdout.flush()
    return _execute(argv, environment)


def _execute(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    if shutil.which(argv[0]) is None and not os.path.exists(argv[0]):
        print(f"aiordma: there is no program {argv[0]}", file=sys.stderr)
        return NOT_FOUND
    try:
        os.execvpe(argv[0], list(argv), dict(environment))
    except OSError as error:
        print(f"aiordma: {argv[0]} cannot be executed: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def program_environment(
    settings: Mapping[str, str] | None = None, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment in which a program's verbs calls end in usroce.

    ``settings`` are those of ``AIORDMA_USROCE_*``, without the prefix. Raises
    :class:`~aiordma.errors.LibraryError` when libusroce.so is not there.
    """
    from ..verbs.provider import USROCE_LIBRARY, provider

    library = provider(USROCE_LIBRARY).path
    if set(" :") & set(library):  # they part the entries of LD_PRELOAD
        library = str(stand_in(library, "libusroce.so"))
    environment = {**base, "LD_PRELOAD": preload(library, base.get("LD_PRELOAD", ""))}
    environment |= {f"AIORDMA_USROCE_{name}": value for name, value in (settings or {}).items()}
    if not libibverbs_is_installed():
        folder = os.path.dirname(stand_in(library, "libibverbs.so.1"))
        environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [folder, base.get("LD_LIBRARY_PATH", "")]))
    return environment


def preload(library: str, present: str) -> str:
    """``LD_PRELOAD`` with ``library`` before all but the sanitizers, which must be first to work."""
    words = [word for word in present.replace(":", " ").split() if word != library]
    first = [word for word in words if os.path.basename(word).startswith(_SANITIZERS)]
    return " ".join([*first, library, *(word for word in words if word not in first)])


def libibverbs_is_installed() -> bool:
    """Whether the dynamic linker finds one."""
    from ..verbs.provider import DEFAULT_LIBRARY, provider

    try:
        provider(DEFAULT_LIBRARY)
    except LibraryError as error:
        return "cannot open shared object file" not in str(error)
    return True


def stand_in(library: str, name: str) -> str:
    """A link called ``name`` to ``library``, in a folder of its own; the same one each time.

    In the user's cache, else in the directory for temporary files, where it must be the user's own: what lies in
    it is loaded into programs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    shared = Path(tempfile.gettempdir(), f"aiordma-{os.geteuid()}")
    for parent in [cache / "aiordma"] * cache.is_absolute() + [shared]:
        folder = parent / "usroce"
        with contextlib.suppress(OSError):
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(parent) and _is_ours(folder):
                _point(folder / name, library)
                return str(folder / name)
    raise RdmaError(
        f"there is no place to put a link to libusroce.so called {name}: neither {cache} nor {shared} can be "
        "written; set XDG_CACHE_HOME, or install libibverbs"
    )


def _is_ours(folder: Path) -> bool:
    status = folder.lstat()
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not others


def _point(link: Path, target: str) -> None:
    """Makes or changes a symbolic link, by rename: another process may be looking at it."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    scratch = link.with_name(f"{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    scratch.replace(link)
