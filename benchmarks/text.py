"""What the benchmarks say alike: progress, numbers, where the processes run."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def number(value: float) -> str:
    """To three digits, or whole."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def placement(pin: tuple[int | None, int | None]) -> str:
    """Of the server and the client."""
    server, client = pin
    return "no" if server is None else f"server to core {server}, client to core {client}"
