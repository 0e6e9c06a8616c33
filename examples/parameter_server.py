"""A parameter server: workers learn one model together, and numpy arrays move without a copy.

    python examples/parameter_server.py             server and workers in one go
    python examples/parameter_server.py server
    python examples/parameter_server.py client --port PORT --worker 1       and more of these

The model is a linear regression, learned by stochastic gradient descent (numpy is needed). A worker pulls the
weights by one-sided reads into an array of its own, writes its gradient into memory that the server shares with it
alone, and notifies; the server takes a step and answers with the new version. Workers do not wait for each other.

The server keeps the last few versions, each in a place of its own, and says which is the latest. A worker looks at
that before and after it reads one: when too many have come meanwhile, the place may have been written again, and
the worker pulls again. So no worker computes with half of one version and half of another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import aiordma
import program
from aiordma.errors import ConnectionLostError

Array: TypeAlias = NDArray[np.float64]

HEADER = 64  # bytes; the first 8 are the number of the latest version
VERSIONS = 4  # kept
WORD = np.dtype("<u8")
FLOAT = np.dtype("<f8")
BATCH = 32  # samples of one step


class ParameterServer:
    """The weights, and one step for each gradient that comes."""

    def __init__(self, dimension: int, rate: float) -> None:
        self.stalest = 0  # versions between a pull and the step that came of it, at most
        self._dimension = dimension
        self._rate = rate
        self._lease: aiordma.Lease | None = None
        self._opening = asyncio.Lock()

    async def handler(self, connection: aiordma.Connection) -> None:
        """One worker, until it leaves."""
        nbytes = self._dimension * FLOAT.itemsize
        async with self._opening:
            if self._lease is None:
                self._lease = await connection.allocate(HEADER + VERSIONS * nbytes)
        await connection.share("weights", self._lease, "read")
        async with connection.allocate(nbytes) as inbox:
            await connection.share("gradient", inbox, "write")
            with contextlib.suppress(ConnectionLostError):  # a worker that dies takes nobody along
                while True:
                    pulled = await connection.notified()
                    version = self._step(self._lease, np.frombuffer(memoryview(inbox), FLOAT))
                    self.stalest = max(self.stalest, (version - 1 - pulled) % (1 << 32))
                    await connection.send(version.to_bytes(8, "little"))

    def _step(self, lease: aiordma.Lease, gradient: Array) -> int:
        """The next version, in the place of the oldest; announced when it is complete."""
        latest = np.frombuffer(memoryview(lease), WORD, 1)
        weights = np.frombuffer(memoryview(lease), FLOAT, offset=HEADER).reshape(VERSIONS, self._dimension)
        version = int(latest[0]) + 1
        new = weights[version % VERSIONS]
        np.multiply(gradient, -self._rate, out=new)
        new += weights[(version - 1) % VERSIONS]
        latest[0] = version
        return version

    async def close(self) -> None:
        """Gives the memory back; before the server closes."""
        if self._lease is not None:
            await self._lease.release()


class ParameterClient:
    """``async with ParameterClient.connect(host, port) as parameters``. ``again`` counts repeated pulls."""

    def __init__(
        self, connection: aiordma.Connection, weights: aiordma.RemoteRegion, gradient: aiordma.RemoteRegion
    ) -> None:
        self.again = 0
        self.dimension = len(gradient) // FLOAT.itemsize
        self._connection = connection
        self._weights = weights
        self._gradient = gradient

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, host: str, port: int, config: aiordma.Config | None = None
    ) -> AsyncIterator[ParameterClient]:
        """A connection to a :class:`ParameterServer`, for the block."""
        async with aiordma.connect(host, port, config=config) as connection:
            weights = await connection.remote("weights")
            yield cls(connection, weights, await connection.remote("gradient"))

    async def pull(self, into: Array) -> int:
        """Reads the latest weights into an array; returns their version."""
        nbytes = len(self._gradient)
        while True:
            version = await self._latest()
            start = HEADER + version % VERSIONS * nbytes
            await self._connection.read_into(self._weights[start : start + nbytes], into)
            # The place is written again for version + VERSIONS, after the one before that was announced.
            if await self._latest() < version + VERSIONS - 1:
                return version
            self.again += 1

    async def _latest(self) -> int:
        return int.from_bytes(await self._connection.read(self._weights[: WORD.itemsize]), "little")

    async def push(self, gradient: Array, version: int) -> int:
        """Has the server take a step, computed from weights of ``version``; returns the version it makes."""
        await self._connection.write(gradient, self._gradient, notify=version % (1 << 32))
        return int.from_bytes(await self._connection.recv(), "little")


def true_weights(dimension: int) -> Array:
    """What there is to be learned."""
    return np.random.default_rng(0).standard_normal(dimension)


class Samples:
    """A worker's own data."""

    def __init__(self, worker: int, dimension: int, count: int = 1024) -> None:
        self._random = np.random.default_rng(worker)
        self._inputs = self._random.standard_normal((count, dimension))
        noise = 0.01 * self._random.standard_normal(count)
        self._outputs = self._inputs @ true_weights(dimension) + noise

    def gradient(self, weights: Array) -> Array:
        """Of the squared error of a few samples, taken at random."""
        chosen = self._random.integers(len(self._inputs), size=BATCH)
        inputs, outputs = self._inputs[chosen], self._outputs[chosen]
        gradient: Array = inputs.T @ (inputs @ weights - outputs) * (2 / BATCH)
        return gradient


async def work(args: argparse.Namespace, config: aiordma.Config, worker: int) -> None:
    """One worker: its steps, and how far from the truth the model is after them."""
    async with ParameterClient.connect(args.host, args.port, config) as parameters:
        samples = Samples(worker, parameters.dimension)
        weights = np.empty(parameters.dimension, FLOAT)
        truth = true_weights(parameters.dimension)
        for _ in range(args.steps):
            version = await parameters.pull(weights)
            version = await parameters.push(samples.gradient(weights), version)
        await parameters.pull(weights)
        error = np.linalg.norm(weights - truth) / np.linalg.norm(truth)
        print(
            f"worker {worker}: {args.steps} steps, the last made version {version}; error {error:.4f}",
            flush=True,
        )


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """The worker that was asked for, or three."""
    workers = [args.worker] if args.worker else [1, 2, 3]
    await asyncio.gather(*(work(args, config, worker) for worker in workers))


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, config: aiordma.Config) -> AsyncIterator[int]:
    """A server for the block; its port."""
    parameters = ParameterServer(args.dimension, args.rate)
    async with aiordma.serve(parameters.handler, args.host, args.port, config=config) as listening:
        try:
            yield listening.port
        finally:
            await parameters.close()
    print(f"the stalest gradient was {parameters.stalest} versions old")


def main() -> None:
    """The command line."""
    parser = program.arguments(__doc__)
    parser.add_argument("--dimension", type=int, default=32, help="server: number of weights")
    parser.add_argument("--rate", type=float, default=0.05, help="server: learning rate")
    parser.add_argument(
        "--worker", type=int, help="client: which worker this is, from 1 (default: three of them)"
    )
    parser.add_argument("--steps", type=int, default=200, help="client: steps of each worker")
    program.run(parser.parse_args(), serving, client)


if __name__ == "__main__":
    main()
