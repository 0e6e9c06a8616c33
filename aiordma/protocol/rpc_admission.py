"""Which calls a server runs, which wait, and which it refuses. No I/O, no clocks.

There are two limits on calls that run, one for the server and one for each connection, and the same two on calls
that wait. A call that can run does; else it waits in the queue of its connection; else it is refused, and the
caller is told which limit it was. Connections that have calls waiting are served in turn, so one that sends many
does not keep others from being served.

What calls hold while they wait is limited in bytes as well, for the whole server.

A call uses its place at the server until its handler has ended, and its place at its connection until the answer
has left as well: a client that does not read its answers holds up itself only, and they do not pile up.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Generic, TypeVar

from ..errors import MisuseError

T = TypeVar("T")


class Verdict(enum.Enum):
    """What becomes of a call that has come."""

    RUN = "run"
    WAIT = "wait"
    REFUSED = "refused"


_RUN = (Verdict.RUN, "")


class Lane(Generic[T]):
    """The calls of one connection."""

    __slots__ = ("unanswered", "waiting")

    def __init__(self) -> None:
        self.unanswered = 0  # handlers that run, and answers that have not left
        self.waiting: deque[tuple[T, int]] = deque()  # with the bytes they hold


class Admission(Generic[T]):
    """The limits, and who is where. ``max_running`` and ``lane_running`` are 1 or more, the others 0 or more."""

    def __init__(
        self,
        *,
        max_running: int,
        max_waiting: int,
        lane_running: int | None,
        lane_waiting: int | None,
        max_bytes: int,
    ) -> None:
        self.max_running = max_running
        self.max_bytes = max_bytes
        self.max_waiting = max_waiting
        self.lane_running = max_running if lane_running is None else lane_running
        self.lane_waiting = max_waiting if lane_waiting is None else lane_waiting
        if min(self.max_running, self.lane_running) < 1 or min(self.max_waiting, self.lane_waiting) < 0:
            raise MisuseError("limits: 1 or more calls that run, 0 or more that wait")
        self.running = 0
        self.waiting = 0
        self.waiting_bytes = 0
        self._turn: deque[Lane[T]] = deque()  # lanes with calls that wait and a place to run, in turn

    def offer(self, lane: Lane[T], call: T, nbytes: int = 0) -> tuple[Verdict, str]:
        """A call has come that holds so many bytes: what becomes of it, and why it is refused."""
        if (
            self.running < self.max_running
            and lane.unanswered < self.lane_running
            and not lane.waiting
            and not self._turn
        ):
            self.running += 1
            lane.unanswered += 1
            return _RUN
        if len(lane.waiting) >= self.lane_waiting:
            return Verdict.REFUSED, self._refusal(lane)
        if self.waiting >= self.max_waiting:
            return Verdict.REFUSED, f"the server runs {self.running} calls, and {self.waiting} wait"
        if self.waiting_bytes + nbytes > self.max_bytes:
            return Verdict.REFUSED, f"those that wait hold {self.waiting_bytes} bytes"
        lane.waiting.append((call, nbytes))
        self.waiting += 1
        self.waiting_bytes += nbytes
        self._enrol(lane)
        return Verdict.WAIT, ""

    def _refusal(self, lane: Lane[T]) -> str:
        return f"{lane.unanswered} calls of this connection are running, and {len(lane.waiting)} wait"

    def _enrol(self, lane: Lane[T]) -> None:
        """A lane with calls that wait gets its turn, if it has a place for one."""
        if lane.unanswered < self.lane_running and lane not in self._turn:
            self._turn.append(lane)

    def handler_ended(self) -> None:
        """A handler has ended: its place at the server is free. Call :meth:`next_call` then."""
        self.running -= 1

    def answer_left(self, lane: Lane[T]) -> None:
        """The handler has ended and the answer has left: its place at the connection is free. Call
        :meth:`next_call` then."""
        lane.unanswered -= 1
        if lane.waiting:
            self._enrol(lane)

    def next_call(self) -> T | None:
        """A call that waited and runs now, or None when there is none or no place for it."""
        while self._turn and self.running < self.max_running:
            lane = self._turn.popleft()
            if lane.unanswered >= self.lane_running:
                continue  # it comes back when an answer of it has left
            call, nbytes = lane.waiting.popleft()
            self.waiting -= 1
            self.waiting_bytes -= nbytes
            self.running += 1
            lane.unanswered += 1
            if lane.waiting:
                self._enrol(lane)
            return call
        return None

    def withdraw(self, lane: Lane[T], call: T) -> bool:
        """A call that waits is not to run any more. False when it does not wait."""
        found = next((entry for entry in lane.waiting if entry[0] is call), None)
        if found is None:
            return False
        lane.waiting.remove(found)
        self.waiting -= 1
        self.waiting_bytes -= found[1]
        if not lane.waiting and lane in self._turn:
            self._turn.remove(lane)
        return True

    def close(self, lane: Lane[T]) -> None:
        """The connection has ended: none of its calls waits any more."""
        self.waiting -= len(lane.waiting)
        self.waiting_bytes -= sum(nbytes for _, nbytes in lane.waiting)
        lane.waiting.clear()
        if lane in self._turn:
            self._turn.remove(lane)
