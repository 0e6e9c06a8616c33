"""A measurement of one contestant: two processes of worker.py, from their start to their end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

from ..processes import Child, answer
from .contestants import Contestant
from .interface import Unavailable
from .worker import encode

START_DEADLINE = 60.0
SESSION_DEADLINE = 60.0


def measure(
    contestant: Contestant,
    scenario: str,
    seconds: float,
    pin: tuple[int | None, int | None],
    env: Mapping[str, str] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Figures and versions. Raises :class:`Unavailable` for who cannot take part here,
    :class:`~benchmarks.processes.BenchmarkError` for what broke off."""
    command = encode(contestant, scenario, seconds)
    module = [sys.executable, "-m", "benchmarks.peers.worker"]
    server_core, client_core = pin
    with contextlib.ExitStack() as stack:
        server = Child([*module, "server", command], server_core, env)
        stack.callback(server.end)
        client = Child([*module, "client", command], client_core, env)
        stack.callback(client.end)
        return _session(server, client, seconds)


def _session(server: Child, client: Child, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    said = answer(server, START_DEADLINE)
    if "unavailable" in said:
        raise Unavailable(said["unavailable"])
    client.write(str(said["port"]))
    said = answer(client, SESSION_DEADLINE + 2 * seconds)
    if "unavailable" in said:
        raise Unavailable(said["unavailable"])
    client.read_rest(SESSION_DEADLINE)
    server.write("over")
    server.read_rest(SESSION_DEADLINE)
    return said["figures"], said["versions"]
