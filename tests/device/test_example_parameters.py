"""The parameter server example: it learns, and nobody computes with a mixture of two versions."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest

from parameter_server import ParameterClient

from .programs import HERE, finish, output, running, serving

pytestmark = pytest.mark.device


def errors(text: str, steps: int) -> list[float]:
    return [float(error) for error in re.findall(rf"worker \d: {steps} steps, .* error (\S+)", text)]


def test_program() -> None:
    text = output("parameter_server.py")
    assert "the stalest gradient was " in text
    found = errors(text, 200)
    assert len(found) == 3
    assert max(found) < 0.02


def test_processes_learn_together() -> None:
    """Each takes 100 steps; that the model is as good as after 300 is the proof that they share it."""
    with serving("parameter_server.py", "server") as (_, port), contextlib.ExitStack() as stack:
        options = "client", f"--port={port}", "--steps=100"
        workers = [running("parameter_server.py", *options, f"--worker={n}") for n in (1, 2, 3)]
        processes = [stack.enter_context(worker) for worker in workers]
        text = "".join(finish(process) for process in processes)
    assert min(errors(text, 100)) < 0.02
    versions = [int(version) for version in re.findall(r"made version (\d+)", text)]
    assert max(versions) == 300


async def test_what_is_pulled_is_one_version(no_leaked_tasks: None) -> None:
    dimension = 100_000
    with serving("parameter_server.py", "server", f"--dimension={dimension}", "--rate=1") as (_, port):
        with contextlib.ExitStack() as stack:
            pushing = [running("parameter_worker.py", str(port), folder=HERE) for _ in range(2)]
            processes = [stack.enter_context(worker) for worker in pushing]
            async with ParameterClient.connect("127.0.0.1", port) as parameters:
                weights = np.empty(dimension)
                versions: list[int] = []
                while len(set(versions)) < 30:
                    versions.append(await parameters.pull(weights))
                    assert np.all(weights == -versions[-1])
                assert versions == sorted(versions)
            pushed = sum(int(finish(process)) for process in processes)
            async with ParameterClient.connect("127.0.0.1", port) as parameters:
                assert await parameters.pull(weights) == pushed


async def test_a_killed_worker_takes_nobody_along(no_leaked_tasks: None) -> None:
    with serving("parameter_server.py", "server", "--dimension=10", "--rate=1") as (_, port):
        async with ParameterClient.connect("127.0.0.1", port) as parameters:
            weights = np.empty(10)
            with running("parameter_worker.py", str(port), folder=HERE) as worker:
                while await parameters.pull(weights) < 5:
                    pass
                worker.kill()
            version = await parameters.push(np.ones(10), 0)
            assert await parameters.pull(weights) >= version
