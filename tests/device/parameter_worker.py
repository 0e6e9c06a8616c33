"""A program that pushes gradients of ones to the parameter server of the examples: ``parameter_worker.py PORT``.

With a rate of 1, every weight of version n is -n. Ends with its standard input; prints how often it pushed.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from parameter_server import ParameterClient


async def main(port: int) -> None:
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    async with ParameterClient.connect("127.0.0.1", port) as parameters:
        gradient = np.ones(parameters.dimension)
        count = 0
        while not ended.done():
            await parameters.push(gradient, 0)
            count += 1
    print(count, flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
