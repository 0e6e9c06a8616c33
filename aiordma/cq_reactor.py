"""Completion queues in the event loop: how a completion on the card wakes an awaiting task.

One reactor serves all connections of one event loop on one device. It owns the completion channel and the
completion queues behind it, reads the device's asynchronous events, and keeps the pending table.

The pending table. Every posted work request has a slot; its work-request id is slot number plus generation,
so a completion that comes too late for its slot is seen and dropped. The entry in the slot owns the memory
of the request until the completion (or flush) arrives: cancelling the await changes nothing about that.

No lost wakeup. A completion channel reports only completions that arrive after the queue was armed, and an event
is reported once. So sleeping is always: read the events, drain the queue, arm it, drain it again, and only
then return to the loop. A completion between drain and arm is found by the second drain; one after the arm
raises an event. Stray wakeups (the second drain took what an event announces) are normal. There is no timer
that would hide a mistake here.

Three modes, the strongest of those attached:

- event: sleeps on the channel as described.
- busy: polls on every turn of the loop. The loop never sleeps, which costs a core.
- adaptive: sleeps like event, but polls while that pays. First inside the awaiting call (`spin`): in C,
  without the GIL, for a bounded time, so that a fast completion needs no turn of the loop. Then on turns of the
  loop. Then it arms. How long, and whether at all, follows from measured completion times: SpinGovernor.

In every mode, awaiting an operation polls once before it goes to the loop: an operation may well have completed
by then, and one poll costs less than a turn.

Other tasks are not starved: inline spins share a budget per turn of the loop, only so many awaits in a row
complete without a turn, and an await that finds the loop with other work ready goes through the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .config import Mode
from .errors import DeviceError, DeviceGoneError, MisuseError
from .verbs import AsyncEvent, CompletionChannel, CompletionQueue, Context, EventType

_now_ns = time.perf_counter_ns

#: Completions handled in one turn before other callbacks of the loop get theirs.
_TURN_LIMIT = 256
#: Inline spinning and polling without a turn of the loop in between, altogether, in nanoseconds.
_TURN_BUDGET_NS = 500_000
#: Awaits that may complete without a turn of the loop in between.
_TURN_AWAITS = 16
#: Entries of the first completion queue. When they are all reserved, another is made, twice as large as the
#: largest so far: few queues to poll, however many connections.
_CQ_ENTRIES = 4096

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1


class Pending(Protocol):
    """What waits in the pending table."""

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """The completion arrived; the slot is free again. Must not raise."""


class Waitable(Protocol):
    """What an inline spin waits for."""

    def done(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ReactorStatistics:
    """Counters since the start. Times in seconds; ``spin_share`` is spinning as a part of all time since."""

    mode: Mode
    users: int
    pending: int
    completions: int
    stale_completions: int
    polls: int
    empty_polls: int
    events: int
    wakeups: int
    arms: int
    turns: int
    inline_polls: int
    inline_hits: int
    spin_seconds: float
    spin_share: float
    learned_completion_us: float


class SpinGovernor:
    """Decides how long an adaptive await may spin, from what earlier ones found.

    Keeps a moving average of the time completions take. Spinning inline is worth it up to ``cap_ns``: when
    operations usually take longer, it is tried only once in PROBE times, to notice when that changes. Across
    turns of the loop the limit is four times the average, under its own cap. A run of misses stops both.
    """

    PROBE = 64
    __slots__ = ("_attempts", "_cap_ns", "_turn_cap_ns", "average_ns", "hit_rate")

    def __init__(self, cap_ns: int, turn_cap_ns: int) -> None:
        self._cap_ns = cap_ns
        self._turn_cap_ns = turn_cap_ns
        self.average_ns = cap_ns // 4
        self.hit_rate = 1.0
        self._attempts = 0

    def learn(self, elapsed_ns: int) -> None:
        """An operation took this long from posting to completion (as seen here)."""
        # An outlier (a retransmission, a descheduled process) should not end spinning for long.
        elapsed_ns = min(elapsed_ns, 8 * max(self._turn_cap_ns, self._cap_ns))
        self.average_ns += (elapsed_ns - self.average_ns) // 8

    def hit(self, found: bool) -> None:
        """An inline spin found its completion, or not."""
        self.hit_rate += ((1.0 if found else 0.0) - self.hit_rate) / 16

    def inline_ns(self) -> int:
        """How long the next inline spin may last; 0 for not at all."""
        if self.average_ns <= self._cap_ns and self.hit_rate > 0.25:
            return min(self._cap_ns, 2 * self.average_ns + 1000)
        self._attempts += 1
        return self._cap_ns if self._attempts % self.PROBE == 0 else 0

    def turns_ns(self) -> int:
        """How long after the last completion polling on turns of the loop may go on."""
        if self.average_ns > self._turn_cap_ns:
            return 0
        return min(self._turn_cap_ns, 4 * self.average_ns)


class CqReactor:
    """Completions and asynchronous events of one opened device, in one event loop.

    Made inside the loop. ``close()`` removes the readers and closes queues and channel; whoever attached must
    have detached before.
    """

    def __init__(
        self, context: Context, *, inline_spin_us: float = 50.0, turn_spin_us: float = 200.0
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: Any = getattr(self._loop, "_ready", None)  # asyncio's run queue; uvloop hides its own
        self._context = context
        self._channel = CompletionChannel(context)
        self._queues: list[CompletionQueue] = []
        self._reserved: dict[CompletionQueue, int] = {}
        self._armed: set[CompletionQueue] = set()
        self._users: dict[Mode, int] = {"event": 0, "adaptive": 0, "busy": 0}
        self.mode: Mode = "event"
        self._entries: list[Pending | None] = []
        self._generations: list[int] = []
        self._free: list[int] = []
        self._waiting = 0  # operations of our own (not posted receives) in the table
        self._listeners: dict[int, Callable[[AsyncEvent], None]] = {}
        self.governor = SpinGovernor(int(inline_spin_us * 1000), int(turn_spin_us * 1000))
        self.arrivals = SpinGovernor(int(inline_spin_us * 1000), int(turn_spin_us * 1000))
        self._inline_cap_ns = int(inline_spin_us * 1000)
        self._polling = False
        self._last_hit_ns = 0
        self._turn_spent_ns = 0
        self._turn_marked = False
        self._gone = False
        self._stays = 0
        self._spinning = False
        self.dispatching = False  # completions that were polled are being handed out
        self.closed = False
        self._started_ns = _now_ns()
        self._completions = self._stale = self._polls = self._empty_polls = 0
        self._events = self._wakeups = self._arms = self._turns = 0
        self._inline_polls = self._inline_hits = self._spin_ns = 0
        self._loop.add_reader(self._channel.fd, self._on_channel)
        self._loop.add_reader(context.async_fd, self._on_async_events)

    # --- who is here ---------------------------------------------------------------------------------

    def attach(self, mode: Mode, entries: int) -> CompletionQueue:
        """A completion queue with room for ``entries`` more work requests; starts busy polling when asked."""
        queue = self.reserve(entries)
        self._users[mode] += 1
        self._set_mode()
        return queue

    def detach(self, mode: Mode, queue: CompletionQueue, entries: int) -> None:
        """Gives the room back. The last one to leave busy mode ends the polling."""
        self.unreserve(queue, entries)
        self._users[mode] -= 1
        self._set_mode()

    def reserve(self, entries: int) -> CompletionQueue:
        """A completion queue with room for ``entries`` more, for work requests of no connection in particular."""
        queue = self._queue_with_room(entries)
        self._reserved[queue] += entries
        return queue

    def unreserve(self, queue: CompletionQueue, entries: int) -> None:
        """Gives the room back."""
        self._reserved[queue] -= entries

    def _set_mode(self) -> None:
        users = self._users
        self.mode = "busy" if users["busy"] else "adaptive" if users["adaptive"] else "event"
        if self.mode == "busy":
            self._start_polling()

    def _queue_with_room(self, entries: int) -> CompletionQueue:
        for queue in self._queues:
            if self._reserved[queue] + entries <= queue.size:
                return queue
        size = max(_CQ_ENTRIES, 2 * entries, *(2 * queue.size for queue in self._queues))
        size = max(entries, min(size, self._context.attributes().max_cqe))
        vector = len(self._queues) % max(1, self._context.completion_vectors)
        queue = CompletionQueue(self._context, size, self._channel, vector=vector)
        self._queues.append(queue)
        self._reserved[queue] = 0
        self._arm(queue)
        return queue

    # --- the pending table ---------------------------------------------------------------------------

    def add(self, entry: Pending) -> int:
        """Puts ``entry`` in a slot; returns the work-request id to post with."""
        if self._free:
            slot = self._free.pop()
            self._entries[slot] = entry
        else:
            slot = len(self._entries)
            self._entries.append(entry)
            self._generations.append(0)
        return self._generations[slot] << _SLOT_BITS | slot

    def remove(self, wr_id: int, entry: Pending) -> bool:
        """Takes ``entry`` out, whose completion will not come: it was not posted, or its queue pair is gone.

        False when it is not there (any more).
        """
        slot = wr_id & _SLOT_MASK
        if slot >= len(self._entries) or self._entries[slot] is not entry:
            return False
        self._vacate(slot)
        return True

    def _vacate(self, slot: int) -> None:
        self._entries[slot] = None
        self._generations[slot] = (self._generations[slot] + 1) & _SLOT_MASK
        self._free.append(slot)

    def posted(self) -> None:
        """An operation somebody will wait for was posted: polling may pay."""
        self._waiting += 1
        if self._waiting > 1 and self.mode == "adaptive":
            self._keep_polling()  # a single one is polled for by its await

    def finished(self) -> None:
        """An operation counted by :meth:`posted` is out of the table."""
        self._waiting -= 1

    def _dispatch(self, queue: CompletionQueue, spin_ns: int = 0) -> int:
        """Polls once and hands out what is there; returns how many completions there were."""
        completions = queue.poll_raw(spin_ns)
        self._polls += 1
        if not completions:
            self._empty_polls += 1
            return 0
        entries, generations = self._entries, self._generations
        self.dispatching = True
        for wr_id, status, opcode, byte_len, imm, qp_num, vendor_err, _flags in completions:
            slot = wr_id & _SLOT_MASK
            entry = entries[slot] if slot < len(entries) else None
            if entry is None or generations[slot] != wr_id >> _SLOT_BITS:
                self._stale += 1  # its queue pair was destroyed before this was polled
                continue
            self._vacate(slot)
            try:
                entry.completed(status, opcode, byte_len, imm, vendor_err, qp_num)
            except Exception as error:
                self._loop.call_exception_handler(
                    {"message": "completion handler failed (please report this)", "exception": error}
                )
        self.dispatching = False
        self._completions += len(completions)
        self._last_hit_ns = _now_ns()
        return len(completions)

    def poll_now(self) -> int:
        """Hands out everything that has completed by now, on every queue; returns how many.

        Not while ``dispatching``: what was polled before would come after what is polled now.
        """
        total = 0
        for queue in self._queues:
            while count := self._dispatch(queue):
                total += count
                if count < queue.batch:
                    break
        return total

    # --- sleeping ------------------------------------------------------------------------------------

    def _arm(self, queue: CompletionQueue) -> None:
        if queue not in self._armed:
            queue.arm()
            self._armed.add(queue)
            self._arms += 1

    def _on_channel(self) -> None:
        """The channel is readable: read every event, then drain and arm (or leave it to the polling)."""
        self._wakeups += 1
        try:
            for queue in self._channel.get_events():
                self._events += 1
                self._armed.discard(queue)
            if not self._polling:
                self._drain_and_arm()
        except DeviceError as error:
            self._device_gone(error)

    def _drain_and_arm(self) -> None:
        """Drain, arm, drain again; goes on next turn when there was more than one turn's share."""
        budget = _TURN_LIMIT
        for queue in self._queues:
            while (count := self._dispatch(queue)) or queue not in self._armed:
                budget -= count
                if count < queue.batch:  # for all we know it is drained, and the next look is due anyway
                    self._arm(queue)
                    if not (count := self._dispatch(queue)):
                        break
                    budget -= count
                if budget <= 0:
                    self._queues.append(self._queues.pop(0))  # the next in line starts
                    self._loop.call_soon(self._resume)
                    return
        if self.mode == "adaptive" and budget < _TURN_LIMIT and self.governor.turns_ns():
            self._start_polling()

    def _resume(self) -> None:
        if not self.closed and not self._polling:
            try:
                self._drain_and_arm()
            except DeviceError as error:
                self._device_gone(error)

    # --- polling on turns of the loop ----------------------------------------------------------------

    def _keep_polling(self) -> None:
        """Adaptive: polls on turns of the loop from now on, while that is likely to find something."""
        if not self._polling and self.governor.turns_ns():
            self._last_hit_ns = _now_ns()
            self._start_polling()

    def _start_polling(self) -> None:
        if not self._polling and not self.closed:
            self._polling = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """One turn of the loop in busy or adaptive mode."""
        if self.closed:
            self._polling = False
            return
        try:
            self._poll_turn()
        except DeviceError as error:
            self._polling = False
            self._device_gone(error)

    def _poll_turn(self) -> None:
        self._turns += 1
        before = _now_ns()
        budget = _TURN_LIMIT
        for queue in self._queues:
            while budget > 0 and (count := self._dispatch(queue)):
                budget -= count
                if count < queue.batch:
                    break
        if budget <= 0:
            self._queues.append(self._queues.pop(0))  # the next in line starts
        now = _now_ns()
        self._spin_ns += now - before
        if self.mode == "busy" or (
            self.mode == "adaptive" and now - self._last_hit_ns < self.governor.turns_ns()
        ):
            self._loop.call_soon(self._turn)
            return
        self._polling = False
        self._drain_and_arm()

    # --- spinning inside the awaiting call -----------------------------------------------------------

    def spin(
        self,
        waitable: Waitable,
        queue: CompletionQueue,
        governor: SpinGovernor | None,
        *,
        once: bool = False,
    ) -> None:
        """Polls ``queue`` inside an await: once, and then until ``waitable`` is done or the time is up.

        The first poll costs less than the turn of the loop it may save, so it is made in every mode. After it,
        ``governor`` sets the time and learns from the outcome (adaptive), None is the cap (busy), ``once`` ends
        there (event). Not reentrant: an await inside a completion callback does not poll.
        """
        if self._spinning or self.dispatching or self.closed or not self._may_stay():
            return
        self._spinning = True
        try:
            self._dispatch(queue)
            if not waitable.done() and not once:
                self._spin_on(waitable, queue, governor)
        except DeviceError as error:
            self._device_gone(error)
        finally:
            self._spinning = False
        self._inline_polls += 1
        self._inline_hits += waitable.done()
        if governor is not None and not waitable.done() and self.mode == "adaptive":
            self._keep_polling()

    def _spin_on(self, waitable: Waitable, queue: CompletionQueue, governor: SpinGovernor | None) -> None:
        """The part of :meth:`spin` that takes time."""
        budget = self._inline_cap_ns
        if governor is not None:
            # With several operations under way, the loop resolves them in batches: cheaper than one by one.
            budget = governor.inline_ns() if self._waiting <= 1 else 0
        if not budget or self._turn_spent_ns >= _TURN_BUDGET_NS:
            return
        start = now = _now_ns()
        while not waitable.done() and now - start < budget:
            self._dispatch(queue, budget - (now - start))
            now = _now_ns()
        if governor is not None:
            governor.hit(waitable.done())
        self._turn_spent_ns += now - start
        self._spin_ns += now - start

    def _may_stay(self) -> bool:
        """True when this await may complete without a turn of the loop: not when others are waiting for one, and
        only so many times in a row. (Whether others wait is known for asyncio's loop only.)"""
        if not self._turn_marked:
            self._turn_marked = True
            self._loop.call_soon(self._renew_turn)
            self._stays = 0
        self._stays += 1
        return self._stays <= _TURN_AWAITS and not self._others_ready()

    def _others_ready(self) -> bool:
        """True when the loop has other callbacks to run than our own (known for asyncio's loop only)."""
        return self._ready is not None and len(self._ready) > self._polling + self._turn_marked

    def _renew_turn(self) -> None:
        self._turn_marked = False
        self._turn_spent_ns = 0

    # --- asynchronous events -------------------------------------------------------------------------

    def listen(self, qp_num: int, callback: Callable[[AsyncEvent], None]) -> None:
        """``callback`` gets the events of a queue pair, and those of its port, its queue and the device."""
        self._listeners[qp_num] = callback

    def unlisten(self, qp_num: int) -> None:
        """No events any more."""
        self._listeners.pop(qp_num, None)

    def _on_async_events(self) -> None:
        while not self.closed:
            try:
                event = self._context.get_async_event()
            except DeviceError as error:
                self._device_gone(error)
                return
            if event is None:
                return
            if event.type == EventType.DEVICE_FATAL:
                self._loop.remove_reader(self._context.async_fd)
            if event.qp_num:
                listeners = [self._listeners[event.qp_num]] if event.qp_num in self._listeners else []
            else:
                listeners = list(self._listeners.values())
            for callback in listeners:
                callback(event)

    def _device_gone(self, error: DeviceError) -> None:
        """A call that cannot fail on a working device failed: it was pulled out. Everyone is told, once."""
        if self._gone:
            return
        self._gone = True
        self._loop.remove_reader(self._context.async_fd)
        self._loop.remove_reader(self._channel.fd)
        self._loop.call_exception_handler(
            {
                "message": f"device {self._context.name} is gone",
                "exception": DeviceGoneError(f"device {self._context.name} is gone: {error}"),
            }
        )
        gone = AsyncEvent(type=EventType.DEVICE_FATAL, qp_num=0, port=0, cookie=0)
        for callback in list(self._listeners.values()):
            callback(gone)

    # --- the end -------------------------------------------------------------------------------------

    def statistics(self) -> ReactorStatistics:
        """A snapshot."""
        elapsed = max(1, _now_ns() - self._started_ns)
        return ReactorStatistics(
            mode=self.mode,
            users=sum(self._users.values()),
            pending=len(self._entries) - len(self._free),
            completions=self._completions,
            stale_completions=self._stale,
            polls=self._polls,
            empty_polls=self._empty_polls,
            events=self._events,
            wakeups=self._wakeups,
            arms=self._arms,
            turns=self._turns,
            inline_polls=self._inline_polls,
            inline_hits=self._inline_hits,
            spin_seconds=self._spin_ns / 1e9,
            spin_share=self._spin_ns / elapsed,
            learned_completion_us=self.governor.average_ns / 1000,
        )

    def close(self) -> None:
        """Takes the descriptors out of the loop and closes queues and channel. Idempotent."""
        if self.closed:
            return
        if any(self._users.values()):
            raise MisuseError("the reactor is still in use")
        self.closed = True
        self._loop.remove_reader(self._channel.fd)
        self._loop.remove_reader(self._context.async_fd)
        for queue in self._queues:
            queue.close()
        self._channel.close()
