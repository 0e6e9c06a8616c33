"""A handler's first step runs in a task that was there before: it must not be able to tell. No device."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from aiordma.rpc.handler_tasks import HandlerTask

SET = contextvars.ContextVar[Any]("SET", default="unset")
NAME = "the handler"


class Tasks:
    """What runs coroutines as a server does: in the task that is ready, and in another when that is taken."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.context = contextvars.copy_context()
        self.made: list[HandlerTask] = []
        self.make()

    def make(self) -> None:
        self.made.append(HandlerTask(self.loop, self.context))

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Starts a coroutine from a callback; what comes of it."""
        ready = self.made[-1]
        while not ready.waiting:
            await asyncio.sleep(0)
        outcome = self.loop.create_future()

        def start() -> None:
            try:
                result = ready.start(coroutine, NAME)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(result if result is not None else ready.task)

        self.loop.call_soon(start)
        result = await outcome
        if not ready.waiting:
            self.make()
        return result

    async def goes_on(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """The task of a coroutine that is not done with its first step."""
        task = await self.run(coroutine)
        assert isinstance(task, asyncio.Task)
        return task

    async def close(self) -> None:
        self.made[-1].close()
        await asyncio.wait([made.task for made in self.made])


@pytest.fixture
async def tasks(no_leaked_tasks: None) -> AsyncIterator[Tasks]:
    made = Tasks()
    yield made
    await made.close()


async def returns(value: Any) -> Any:
    return value


# --- done in the first step ---------------------------------------------------------------------------


async def test_what_is_done_at_once_is_handed_out_and_needs_no_task_of_its_own(tasks: Tasks) -> None:
    for i in range(1, 5):
        assert await tasks.run(returns(i)) == i
    assert len(tasks.made) == 1


async def test_what_is_raised_at_once_is_raised(tasks: Tasks) -> None:
    async def raises(error: BaseException) -> None:
        raise error

    for error in (ValueError("no"), asyncio.CancelledError("here"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            await tasks.run(raises(error))
    assert await tasks.run(returns("fine")) == "fine"


async def test_it_runs_in_a_task_of_its_name(tasks: Tasks) -> None:
    async def look() -> str:
        task = asyncio.current_task()
        assert task is not None
        assert task in asyncio.all_tasks()
        assert task.cancelling() == 0
        return task.get_name()

    assert await tasks.run(look()) == NAME


async def test_it_may_use_what_needs_a_task(tasks: Tasks) -> None:
    async def use() -> str:
        async with asyncio.timeout(10), asyncio.TaskGroup():
            return "used"

    for _ in range(3):
        assert await tasks.run(use()) == "used"


async def test_a_variable_that_it_sets_is_not_seen_by_the_next(tasks: Tasks) -> None:
    async def set_it(value: object) -> object:
        before = SET.get()
        SET.set(value)
        return before

    assert await tasks.run(set_it(1)) == "unset"
    assert await tasks.run(set_it(Incomparable())) == "unset"
    assert await tasks.run(set_it(2)) == "unset"
    assert SET.get() == "unset"


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("cannot be compared")

    __hash__ = None  # type: ignore[assignment]


def _keep() -> object:
    return asyncio.current_task()


def _keep_weakly() -> object:
    task = asyncio.current_task()
    assert task is not None
    return weakref.ref(task)


def _rename() -> object:
    task = asyncio.current_task()
    assert task is not None
    task.set_name("mine")
    return "renamed"


@pytest.mark.parametrize("notice", [_keep, _keep_weakly], ids=["kept", "kept weakly"])
async def test_a_task_that_was_kept_is_not_used_again(tasks: Tasks, notice: Callable[[], object]) -> None:
    async def handler() -> object:
        return notice()

    first, second = await tasks.run(handler()), await tasks.run(handler())
    assert len(tasks.made) == 3
    ends = [task() if isinstance(task, weakref.ref) else task for task in (first, second)]
    assert ends[0] is not ends[1]
    await asyncio.wait([task for task in ends if task is not None])  # they end as the handler has


async def test_a_name_that_it_gave_does_not_stay(tasks: Tasks) -> None:
    async def handler() -> object:
        return _rename()

    async def look() -> str:
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    await tasks.run(handler())
    assert await tasks.run(look()) == NAME


async def test_a_callback_of_its_task_is_called_when_it_is_done(tasks: Tasks) -> None:
    called = asyncio.Event()

    async def handler() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: called.set())
        return "done"

    assert await tasks.run(handler()) == "done"
    await called.wait()
    assert await tasks.run(returns("next")) == "next"


async def test_one_that_cancels_itself_and_returns_does_not_cancel_the_next(tasks: Tasks) -> None:
    async def handler() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "done all the same"

    assert await tasks.run(handler()) == "done all the same"
    assert await tasks.run(returns("next")) == "next"


# --- not done in the first step -----------------------------------------------------------------------


async def test_one_that_waits_goes_on_in_the_task_in_which_it_began(tasks: Tasks) -> None:
    gate = asyncio.Event()

    async def handler() -> Any:
        began = asyncio.current_task()
        SET.set("here")
        await gate.wait()
        await asyncio.sleep(0)
        assert SET.get() == "here"
        return began is asyncio.current_task()

    task = await tasks.goes_on(handler())
    assert task.get_name() == NAME
    assert not task.done()
    gate.set()
    assert await task is True


async def test_what_it_raises_later_is_the_exception_of_the_task(tasks: Tasks) -> None:
    async def handler() -> None:
        await asyncio.sleep(0)
        raise ValueError("later")

    task = await tasks.goes_on(handler())
    with pytest.raises(ValueError, match="later"):
        await task


async def test_many_may_wait_for_the_same_future(tasks: Tasks) -> None:
    shared = asyncio.get_running_loop().create_future()
    waiting = [await tasks.goes_on(asyncio.wait_for(shared, 10))]

    async def handler() -> Any:
        return await shared

    waiting += [await tasks.goes_on(handler()) for _ in range(3)]
    waiting.append(asyncio.create_task(handler()))
    await asyncio.sleep(0)
    shared.set_result("all")
    assert await asyncio.gather(*waiting) == ["all"] * 5


async def test_what_it_waits_for_may_be_there_before_the_task_is(tasks: Tasks) -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    async def handler() -> Any:
        loop.call_soon(future.set_result, "quick")
        return await future

    assert await (await tasks.goes_on(handler())) == "quick"


class Waiter:
    """A handler that waits, and what it sees of a cancellation."""

    def __init__(self, waits_for: Callable[[], Any], stays: bool) -> None:
        self._waits_for = waits_for
        self._stays = stays
        self.seen: list[str] = []

    async def __call__(self) -> Any:
        try:
            await self._waits_for()
        except asyncio.CancelledError as error:
            self.seen.append(str(error))
            if not self._stays:
                raise
            await asyncio.sleep(0)
        finally:
            self.seen.append("finally")
        return "stayed"


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()


WAITS: dict[str, Callable[[], Any]] = {
    "future": lambda: asyncio.get_running_loop().create_future(),
    "task": lambda: asyncio.create_task(_forever()),
    "sleep": lambda: asyncio.sleep(3600),
    "turn": lambda: asyncio.sleep(0),
}


@pytest.mark.parametrize("stays", [False, True], ids=["ends", "stays"])
@pytest.mark.parametrize(
    ("what", "turns"), [(what, turns) for what in WAITS for turns in range(3) if what != "turn" or not turns]
)
async def test_a_cancellation_reaches_it_wherever_it_is(
    tasks: Tasks, what: str, turns: int, stays: bool
) -> None:
    handler = Waiter(WAITS[what], stays)
    loop, ready = asyncio.get_running_loop(), tasks.made[-1]
    while not ready.waiting:
        await asyncio.sleep(0)
    cancelled = loop.create_future()

    def cancel(left: int) -> None:
        if left:
            loop.call_soon(cancel, left - 1)
        else:
            cancelled.set_result(ready.task.cancel("enough"))

    def start() -> None:
        assert ready.start(handler(), NAME) is None
        cancel(turns)

    loop.call_soon(start)
    assert await cancelled is True
    tasks.make()
    if stays:
        assert await ready.task == "stayed"
    else:
        with pytest.raises(asyncio.CancelledError):
            await ready.task
    assert handler.seen == ["enough", "finally"]
    assert ready.task.cancelling() == 1


async def test_a_cancellation_while_it_begins_reaches_it_where_it_waits(tasks: Tasks) -> None:
    seen: list[str] = []

    async def handler() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("by itself")
        seen.append("goes on")
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("finally")

    task = await tasks.goes_on(handler())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["goes on", "finally"]


async def test_a_time_limit_that_began_in_the_first_step_holds(tasks: Tasks) -> None:
    async def handler() -> str:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.sleep(3600)
        except TimeoutError:
            return "in time"
        return "late"

    assert await (await tasks.goes_on(handler())) == "in time"


# --- the end ------------------------------------------------------------------------------------------


async def test_a_task_that_is_cancelled_while_it_waits_for_a_handler_ends(tasks: Tasks) -> None:
    await tasks.run(returns("x"))
    ready = tasks.made[-1]
    ready.task.cancel()
    await asyncio.wait([ready.task])
    assert ready.task.cancelled()
    assert not ready.waiting
    tasks.make()
    assert await tasks.run(returns("next")) == "next"


async def test_nothing_is_kept_of_a_handler(tasks: Tasks) -> None:
    class Result:
        pass

    result = Result()
    gone = weakref.ref(result)

    async def handler(held: Result) -> Result:
        return held

    returned = await tasks.run(handler(result))
    assert returned is result
    del returned, result
    await asyncio.sleep(0)  # until then the loop has what woke this task
    gc.collect()
    assert gone() is None
    assert len(tasks.made) == 1
