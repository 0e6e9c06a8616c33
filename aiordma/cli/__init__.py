"""The ``aiordma`` command: one module for each subcommand.

A subcommand is a module of this package with ``HELP`` (one line), ``configure(parser)``, which adds its
options, and ``run(args)``, which returns the exit status. Its name goes into ``COMMANDS``, nowhere else.
Modules import what is heavy inside ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import RdmaError

#: The subcommands, in the order of the help text.
COMMANDS = ("devices", "doctor", "ping", "bench", "call", "usroce")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (``sys.argv`` by default) and returns the exit status.

    0: done; 1: it failed, and standard error says why; 130: interrupted. As usual with argparse, ``--help``,
    ``--version`` and a wrong command line (status 2) raise SystemExit.
    """
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
    except (RdmaError, ImportError) as error:
        print(f"aiordma: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has left; give the interpreter somewhere to flush to when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aiordma", description="RDMA for asyncio.")
    parser.add_argument("--version", action="version", version=f"aiordma {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser
