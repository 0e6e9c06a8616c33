"""The event loop of a subcommand: uvloop's where it is installed, and Ctrl-C that lets it end in order."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from ..errors import RdmaError

T = TypeVar("T")
LoopName = Literal["asyncio", "uvloop"]


def default_loop() -> LoopName:
    """uvloop where there is one."""
    return "uvloop" if importlib.util.find_spec("uvloop") is not None else "asyncio"


def run(job: Coroutine[Any, Any, T], loop: str) -> T:
    """Runs it in a new event loop. The first Ctrl-C cancels it; KeyboardInterrupt is raised only when it does not
    catch that. Raises :class:`~aiordma.errors.RdmaError` where uvloop is wanted and not installed."""
    factory = None
    if loop == "uvloop":
        try:
            import uvloop
        except ImportError:
            job.close()
            raise RdmaError("uvloop is not installed: pip install uvloop, or --loop asyncio") from None
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(job)
