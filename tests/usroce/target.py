"""A process that is the target of one-sided operations, and meanwhile does something else.

    python -m tests.usroce.target

Prints its card, reads the peer's, prints "connected"; then does what the lines of its standard input say, until
their end:

    spin          a Python loop, until the peer writes into byte 0 of the memory
    compute       the same, but each turn is a long computation in C that holds the interpreter's lock
    block         reads a line of standard input in C, with the interpreter's lock held
    sleep         the same without the lock
    poll          polls its completion queue for a while, as a program does that waits for a message

It prints "busy" before, and "over" with a digest of its memory after.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import threading

from aiordma.verbs import open_device
from tests.usroce.ends import Card, End


def spin(end: End) -> None:
    while not end.memory[0]:
        pass


def compute(end: End) -> None:
    while not end.memory[0]:
        pow(3, 1 << 21)


def block(end: End) -> None:
    read_line(ctypes.PyDLL(None))


def sleep(end: End) -> None:
    read_line(ctypes.CDLL(None))


def poll(end: End) -> None:
    for _ in range(1000):
        end.cq.poll()


def read_line(libc: ctypes.CDLL) -> None:
    letter = ctypes.create_string_buffer(1)
    while letter.value != b"\n":
        if libc.read(0, letter, 1) != 1:
            os._exit(1)


def main() -> None:
    jobs = {job.__name__: job for job in (spin, compute, block, sleep, poll)}
    with open(0, "rb", buffering=0, closefd=False) as lines, open_device("usroce0") as context:
        end = End(context)
        print(json.dumps(end.card().as_dict()), flush=True)
        end.connect(Card(**json.loads(lines.readline())))
        print("connected", flush=True)
        while line := lines.readline():
            print("busy", flush=True)
            jobs[line.decode().strip()](end)
            print("over", hashlib.sha256(end.memory).hexdigest(), flush=True)
        assert threading.active_count() == 1, "the device's thread is none of Python's"


if __name__ == "__main__":
    main()
