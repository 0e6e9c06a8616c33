"""Command line: python3 -m tools.rxe run|setup|shell (see the package's docstring)."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.rxe import guest, host
from tools.rxe.common import STATUS_FAILED, SYSTEM_PATH, RxeError, say
from tools.rxe.supervisor import Job

KEPT_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|COLORTERM|TZ|LANG|LANGUAGE|LC_\w+|CI|VIRTUAL_ENV|NO_COLOR|FORCE_COLOR"
    r"|COLUMNS|AIORDMA_\w+|PYTEST_\w+|PYTHON\w+|COVERAGE_\w+|RDMAV_\w+|IBV_\w+|LD_LIBRARY_PATH|LD_PRELOAD|\w+SAN_OPTIONS"
)
DEFAULT_DEADLINE = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    open_standard_streams()
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    try:
        if options.action == "setup":
            kernel = guest.set_up()
            say(f"ready: Linux {kernel.release} in {kernel.image.parent}")
            return 0
        return run(options)
    except RxeError as error:
        say(str(error))
        return STATUS_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def open_standard_streams() -> None:
    """Give a closed standard stream to the null device, lest the next file opened takes its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python3 -m tools.rxe", description="Run a command on a kernel with an active soft-RoCE device."
    )
    actions = result.add_subparsers(dest="action", required=True)
    actions.add_parser("setup", help="install and fetch what the virtual machine needs, without booting it")
    size = guest.default_size()
    for name, about in (("run", "run a command"), ("shell", "start a shell")):
        action = actions.add_parser(name, help=about)
        action.add_argument("--deadline", type=float, default=DEFAULT_DEADLINE, metavar="SECONDS")
        action.add_argument("--memory", type=int, default=size.memory, metavar="MiB", help="of the guest")
        action.add_argument("--cpus", type=int, default=size.cpus, metavar="N", help="of the guest")
        action.add_argument(
            "--keep-env", action="append", default=[], metavar="NAME", help="pass this variable as well"
        )
        action.add_argument("--guest", action="store_true", help="use a virtual machine in any case")
        if name == "run":
            action.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ARGS")
    return result


def run(options: argparse.Namespace) -> int:
    shell = options.action == "shell"
    # without the user's start-up files: written for native speed, they can take minutes under emulation
    argv = ["/bin/bash", "--norc", "-i"] if shell else options.command
    if argv[:1] == ["--"]:
        argv = argv[1:]
    if not argv:
        raise RxeError("no command given: python3 -m tools.rxe run -- COMMAND ARGS")
    job = Job(
        argv=argv,
        environment=guest_environment(options.keep_env),
        directory=Path.cwd(),
        deadline=time.monotonic() + options.deadline,
        terminal=shell and os.isatty(0),
    )
    if not options.guest:
        with host.device() as device:
            if device is not None:
                say(f"using {device} of this machine")
                return host.run(job)
    return guest.run(job, guest.Size(options.memory, options.cpus))


def guest_environment(extra: Sequence[str]) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if KEPT_ENVIRONMENT.fullmatch(name) or name in extra
    }
    path = [*kept.get("PATH", "").split(":"), *SYSTEM_PATH.split(":")]
    kept["PATH"] = ":".join(dict.fromkeys(filter(None, path)))
    kept["AIORDMA_RXE_GUEST"] = "1"
    return kept


if __name__ == "__main__":
    sys.exit(main())
