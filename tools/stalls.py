"""Runs a command on a machine that stalls, as shared ones do: to find tests that need it not to.

    sudo .venv/bin/python -m tools.stalls .venv/bin/python -m pytest tests/usroce/test_progress.py
    sudo .venv/bin/python -m tools.stalls make sanitize

On each processor a real-time process sleeps for up to 60 ms and takes the processor for up to 25 ms, over and
over; one time in fifty for up to 150 ms.  That is a third of the time.  Needs CAP_SYS_NICE.

Standard library only.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence

SLEEP, STALL, LONG_STALL = 0.06, 0.025, 0.15  # seconds at most
LONG_STALLS = 0.02  # share


def main(command: Sequence[str]) -> int:
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    processors = os.sched_getaffinity(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # may we?
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        print("stalls: real-time processes need CAP_SYS_NICE: run as root", file=sys.stderr)
        return 1
    forking = multiprocessing.get_context("fork")
    for processor in processors:
        forking.Process(target=stall, args=(processor, os.getpid()), daemon=True).start()
    return subprocess.run(command, check=False).returncode


def stall(processor: int, parent: int) -> None:
    """Until the parent is gone, however it ended."""
    os.sched_setaffinity(0, {processor})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while os.getppid() == parent:
        time.sleep(random.uniform(0, SLEEP))
        longest = LONG_STALL if random.random() < LONG_STALLS else STALL
        until = time.perf_counter() + random.uniform(0, longest)
        while time.perf_counter() < until:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
