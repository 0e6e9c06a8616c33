"""Fixtures of the tests that look at usroce from outside: with other programs and processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from aiordma.verbs import usroce
from tests.usroce import processes as processes_module
from tests.usroce.ends import Card, End
from tests.usroce.processes import Process, Processes, free_loopback_address


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Starts processes; those that are left are ended after the test."""
    with processes_module.processes() as made:
        yield made


@pytest.fixture
def address() -> str:
    """A loopback address for the test alone: nobody else's device is at it."""
    return free_loopback_address()


class Target:
    """A process with an end of its own (target.py), and this process's end of the connection to it."""

    def __init__(self, process: Process, end: End) -> None:
        self.process = process
        self.end = end

    def connect(self, **settings: Any) -> None:
        peer = Card(**json.loads(self.process.line()))
        self.process.tell(json.dumps(self.end.card().as_dict()))
        self.end.connect(peer, **settings)
        assert self.process.line() == "connected"

    def begin(self, job: str) -> None:
        """The target does something else from now on."""
        self.process.tell(job)
        assert self.process.line() == "busy"

    def is_over(self) -> bool:
        """Whether it has come back, without waiting."""
        return self.process.has_printed_more()

    def digest(self) -> str:
        """Waits until it has come back: the digest of its memory then."""
        word, _, digest = self.process.line().partition(" ")
        assert word == "over"
        return digest


@pytest.fixture
def end(address: str) -> Iterator[End]:
    """This process's end, on a device of its own."""
    with usroce.options(address=address):
        context = usroce.usroce_device().open()
    with context:
        yield End(context)


@pytest.fixture
def target(processes: Processes, address: str, end: End) -> Target:
    """Not yet connected: the test has its own settings for that."""
    return Target(processes.python("tests.usroce.target", settings={"ADDRESS": address}), end)
