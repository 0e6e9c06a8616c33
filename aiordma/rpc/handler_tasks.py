"""The tasks that handlers run in.

Making a task, and having the event loop step it and report its end, costs as much as the rest of a short call,
and most handlers are done with their first step. So that step runs in a task that is there already and waits for
a handler. One that is not done then keeps the task; of one that is, the task waits for the next. A task that a
handler has taken notice of (keeps it, gave it a callback, cancelled it) or whose context it has changed is not
used again: a handler sees its task and its context as if they had been made for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
import weakref
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Coroutine, Generator
from sys import getrefcount
from typing import Any, TypeVar

T = TypeVar("T")


class HandlerTask:
    """A task that waits for a handler. ``context`` is what handlers find, each a copy of its own."""

    __slots__ = (
        "_cancelled",
        "_context",
        "_coroutine",
        "_gate",
        "_loop",
        "_own",
        "_waits_for",
        "_weak",
        "task",
        "waiting",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self._loop = loop
        self._context = context
        self._own = context.copy()
        self._gate = loop.create_future()
        self._coroutine: Coroutine[Any, Any, Any] | None = None  # goes on in the task
        self._waits_for: Any = None
        self._cancelled: BaseException | None = None
        self.waiting = False
        """It is free, and has come to where it waits: before that, a handler would be left undone if the task was
        cancelled."""
        self.task: asyncio.Task[Any] = loop.create_task(
            self._run(), name="aiordma RPC, next handler", context=self._own
        )
        self._weak = weakref.getweakrefcount(self.task)

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> T | None:
        """Runs the first step of a coroutine that returns anything but None, in this task, under that name: what
        it returns or raises, or None when it goes on in the task. Afterwards ``waiting`` says whether the task is
        free.

        Not for calls from inside a task.
        """
        task, own = self.task, self._own
        if task.get_name() != name:
            task.set_name(name)
        references = getrefcount(self.task)
        _enter_task(self._loop, task)
        try:
            self._waits_for = own.run(coroutine.send, None)
        except StopIteration as end:
            result: T = end.value
            return result
        else:
            self._coroutine = coroutine
            return None
        finally:
            _leave_task(self._loop, task)
            if self._coroutine is not None or not self._is_as_new(references):
                self.close()

    def _is_as_new(self, references: int) -> bool:
        return (
            getrefcount(self.task) == references
            and weakref.getweakrefcount(self.task) == self._weak
            and not self._gate.done()  # it is when the task was cancelled
            and not self.task._callbacks
            and _same(self._own, self._context)
        )

    def close(self) -> None:
        """No handler comes any more: the task goes on with what it has, or ends."""
        self.waiting = False
        if not self._gate.done():
            self._gate.set_result(None)

    async def _run(self) -> Any:
        self.waiting = not self._gate.done()
        try:
            await self._gate
        except asyncio.CancelledError as error:
            self.waiting = False
            if self._coroutine is None:
                raise
            self._cancelled = error
        if self._coroutine is None:
            return None
        rest = self._rest()
        # The task may end with an exception that knows this frame: it must not lead back to the task.
        del self
        return await rest

    @types.coroutine
    def _rest(self) -> Generator[Any, None, Any]:
        """The rest of the coroutine, as if the task had run it from the beginning, and was cancelled since if it
        was. What an exception knows by its frames must not lead back to it, so none is kept here."""
        coroutine, waits_for, error = self._coroutine, self._waits_for, self._cancelled
        self._coroutine = self._waits_for = self._cancelled = None
        del self
        assert coroutine is not None
        if error is not None and asyncio.isfuture(waits_for) and waits_for.cancel(*error.args):
            error = None  # which is how the coroutine hears of it
        while True:
            if error is None:
                if asyncio.isfuture(waits_for):
                    waits_for._asyncio_future_blocking = True  # another task may have waited for it meanwhile
                try:
                    yield waits_for
                    break
                except BaseException as raised:
                    error = raised
            try:
                waits_for = coroutine.throw(error)
            except StopIteration as end:
                return end.value
            finally:
                error = None
        return (yield from coroutine.__await__())


def _same(one: contextvars.Context, other: contextvars.Context) -> bool:
    """Quick where nobody has set a variable; values that are different need not be comparable."""
    try:
        return one == other
    except Exception:
        return False
