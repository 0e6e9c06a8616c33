"""Completion queues in the event loop: how a completion on the card wakes an awaiting task.

One reactor serves all connections of one event loop on one device. It owns the completion channel and the
completion queues behind it, reads the device's asynchronous events, and keeps the pending table.

The pending table (native/datapath/table.c). Every posted work request has a slot; its work-request id is slot
number plus generation, so a completion that comes too late for its slot is seen and dropped. The entry in the slot
owns the memory of the request until the completion (or flush) arrives: cancelling the await changes nothing about
that. The table also polls, and hands the completions out.

No lost wakeup. A completion channel reports only completions that arrive after the queue was armed, and an event
is reported once. So sleeping is always: read the events, drain the queue, arm it, drain it again, and only
then return to the loop. A completion between drain and arm is found by the second drain; one after the arm
raises an event. Stray wakeups (the second drain took what an event announces) are normal. There is no timer
that would hide a mistake here.

Three modes, the strongest of those attached:

- event: sleeps on the channel as described.
- busy: polls on every turn of the loop. The loop never sleeps, which costs a core.
- adaptive: sleeps like event, but polls while that pays. First inside the awaiting call (`spin`): in C, soon
  without the GIL, for a bounded time, so that a fast completion needs no turn of the loop. Then on turns of the
  loop. Then it arms. How long, and whether at all, follows from measured completion times: Governor.

In every mode, awaiting an operation polls once before it goes to the loop: an operation may well have completed
by then, and one poll costs less than a turn.

The spinning itself, what it learns, and how others are kept from starving, is in native/datapath/spin.c; polling
on turns of the loop in native/datapath/turn.c.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ._native._datapath import POLL_BATCH, TURN_LIMIT, Governor, Table
from .config import Mode
from .errors import DeviceError, DeviceGoneError, MisuseError, call_failed
from .verbs import AsyncEvent, CompletionChannel, CompletionQueue, Context, EventType

now_ns = time.perf_counter_ns

#: Entries of the first completion queue. When they are all reserved, another is made, twice as large as the
#: largest so far: few queues to poll, however many connections.
_CQ_ENTRIES = 4096


class Pending(Protocol):
    """What waits in the pending table."""

    def completed(
        self, status: int, opcode: int, byte_len: int, imm: int, vendor_err: int, qp_num: int
    ) -> None:
        """The completion arrived; the slot is free again. Must not raise."""


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


class CqReactor(Table):
    """Completions and asynchronous events of one opened device, in one event loop. It is the pending table, too.

    Made inside the loop. ``close()`` removes the readers and closes queues and channel; whoever attached must
    have detached before.
    """

    def __init__(
        self, context: Context, *, inline_spin_us: float = 50.0, turn_spin_us: float = 200.0
    ) -> None:
        self._loop = asyncio.get_running_loop()
        inline_ns, turn_ns = int(inline_spin_us * 1000), int(turn_spin_us * 1000)
        super().__init__(
            self._loop,
            self._report,
            getattr(self._loop, "_ready", None),  # asyncio's run queue; uvloop hides its own
            inline_ns,
            Governor(inline_ns, turn_ns),
            Governor(inline_ns, turn_ns),
        )
        self._context = context
        self._channel = CompletionChannel(context)
        self._queues: list[CompletionQueue] = []
        self._reserved: dict[CompletionQueue, int] = {}
        self._armed: set[CompletionQueue] = set()
        self._users: dict[Mode, int] = {"event": 0, "adaptive": 0, "busy": 0}
        self.mode: Mode = "event"
        self._listeners: dict[int, Callable[[AsyncEvent], None]] = {}
        self._gone = False
        self._started_ns = now_ns()
        self._events = self._wakeups = self._arms = 0
        self._channel_fd = self._channel.watch()
        self._watches = self._channel_fd != self._channel.fd  # readable for packets, too
        self._loop.add_reader(self._channel_fd, self._on_channel)
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
        self.adaptive = self.mode == "adaptive"
        self.busy = self.mode == "busy"
        if self.busy:
            self.poll_on_turns()

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
        self.add_queue(queue.pointer)
        self._arm(queue)
        return queue

    # --- polling -------------------------------------------------------------------------------------

    def posted(self) -> None:
        """An operation somebody will wait for was posted: polling may pay."""
        self.waiting += 1
        if self.waiting > 1 and self.adaptive and not self.polling:
            self.poll_on_turns()  # a single one is polled for by its await

    def finished(self) -> None:
        """An operation counted by :meth:`posted` is out of the table."""
        self.waiting -= 1

    def _report(self, error: BaseException) -> None:
        if isinstance(error, SystemExit | KeyboardInterrupt):  # of a callback of the user's: for the loop
            self._loop.call_soon(_raise, error)
            return
        self._loop.call_exception_handler(
            {"message": "completion handler failed (please report this)", "exception": error}
        )

    def failed(self, number: int) -> None:
        """A queue cannot be polled any more."""
        self._device_gone(call_failed(number, "ibv_poll_cq"))

    def poll_now(self) -> int:
        """Hands out everything that has completed by now, on every queue; returns how many.

        Not while ``dispatching``: what was polled before would come after what is polled now.
        """
        total = 0
        for queue in self._queues:
            while count := self.poll(queue.pointer):
                total += count
                if count < POLL_BATCH:
                    break
        return total

    # --- sleeping ------------------------------------------------------------------------------------

    def _arm(self, queue: CompletionQueue) -> None:
        if queue not in self._armed:
            queue.arm()
            self._armed.add(queue)
            self._arms += 1

    def _on_channel(self) -> None:
        """The channel is readable: read every event, then drain and arm (or leave it to the polling).

        A channel that is readable for packets is polled first: what is found so raises no event, and queues stay
        armed. Should there be an event all the same, the channel stays readable, and it is read in the next turn.
        """
        self._wakeups += 1
        try:
            if self._watches and not self.polling and self._poll_once():
                return
            for queue in self._channel.get_events():
                self._events += 1
                self._armed.discard(queue)
            if not self.polling:
                self._drain_and_arm()
        except DeviceError as error:
            self._device_gone(error)

    def _poll_once(self) -> int:
        """Polls every queue once; returns how many completions there were."""
        last_hit = self.last_hit_ns
        found = 0
        for queue in self._queues:
            found += self.serve(queue.pointer)
        self.learn_gap(last_hit)
        if found:
            self.poll_on_turns()
        return found

    def _drain_and_arm(self) -> None:
        """Drain, arm, drain again; goes on next turn when there was more than one turn's share."""
        budget, last_hit = TURN_LIMIT, self.last_hit_ns
        for queue in self._queues:
            while (count := self.serve(queue.pointer)) or queue not in self._armed:
                budget -= count
                if count < POLL_BATCH:  # for all we know it is drained, and the next look is due anyway
                    self._arm(queue)
                    if not (count := self.serve(queue.pointer)):
                        break
                    budget -= count
                if budget <= 0:
                    self._queues.append(self._queues.pop(0))  # the next in line starts
                    self._loop.call_soon(self.sleep)
                    return
        self.learn_gap(last_hit)
        if budget < TURN_LIMIT:
            self.poll_on_turns()

    def sleep(self) -> None:
        """Polling is over, or draining goes on: events wake us from now on."""
        if not self.closed and not self.polling:
            try:
                self._drain_and_arm()
            except DeviceError as error:
                self._device_gone(error)

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
        self._loop.remove_reader(self._channel_fd)
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
        elapsed = max(1, now_ns() - self._started_ns)
        return ReactorStatistics(
            mode=self.mode,
            users=sum(self._users.values()),
            pending=len(self),
            completions=self.completions,
            stale_completions=self.stale,
            polls=self.polls,
            empty_polls=self.empty_polls,
            events=self._events,
            wakeups=self._wakeups,
            arms=self._arms,
            turns=self.turns,
            inline_polls=self.inline_polls,
            inline_hits=self.inline_hits,
            spin_seconds=self.spin_ns / 1e9,
            spin_share=self.spin_ns / elapsed,
            learned_completion_us=self.governor.average_ns / 1000,
        )

    def close(self) -> None:
        """Takes the descriptors out of the loop and closes queues and channel. Idempotent."""
        if self.closed:
            return
        if any(self._users.values()):
            raise MisuseError("the reactor is still in use")
        self.closed = True
        self._loop.remove_reader(self._channel_fd)
        self._loop.remove_reader(self._context.async_fd)
        for queue in self._queues:
            queue.close()
        self._channel.close()


def _raise(error: BaseException) -> None:
    raise error
