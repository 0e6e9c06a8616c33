"""One-sided operations: the client works in the server's memory, without the server's program.

    python examples/one_sided.py server
    python examples/one_sided.py client --port PORT

Each client has an inbox of its own at the server. Two words are shared by all: a counter and a lock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import aiordma

INBOX = 1 << 20
UNLOCKED = 0


class Memory:
    """The server's memory: words for everyone, and an inbox for each connection."""

    def __init__(self) -> None:
        self.words: aiordma.Lease | None = None
        self.allocating = asyncio.Lock()

    async def handler(self, connection: aiordma.Connection) -> None:
        """Shares memory with one client, and tells when it writes with a notification."""
        async with self.allocating:
            if self.words is None:
                self.words = await connection.allocate(16)
        await connection.share("words", self.words, "read|atomic")
        async with connection.allocate(INBOX) as inbox:
            await connection.share("inbox", inbox)
            with contextlib.suppress(aiordma.errors.ConnectionClosedError):
                while True:
                    length = await connection.notified()
                    print(f"{connection.peer} wrote {bytes(memoryview(inbox)[:length])!r}", flush=True)


async def server(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Serves until interrupted."""
    memory = Memory()
    handler = memory.handler
    async with aiordma.serve(handler, args.host, args.port, config=config, token=args.token) as listening:
        print(listening.port, flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            if memory.words is not None:
                await memory.words.release()


async def add(connection: aiordma.Connection, times: int) -> None:
    """Counts, together with all the others who do."""
    words = await connection.remote("words")
    for _ in range(times):
        await connection.fetch_add(words[0:8], 1)


async def locked(connection: aiordma.Connection, name: int, log: list[str]) -> None:
    """Takes the lock (a word that holds its owner's name), works, and gives it back."""
    lock = (await connection.remote("words"))[8:16]
    while await connection.compare_swap(lock, UNLOCKED, name) != UNLOCKED:
        pass  # somebody else has it
    log.append(f"{name} in")
    await connection.read(lock)  # something that takes its time
    log.append(f"{name} out")
    if await connection.compare_swap(lock, name, UNLOCKED) != name:
        raise SystemExit("the lock was not ours")


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Writes, reads, notifies; then several connections count and lock at the same time."""
    async with contextlib.AsyncExitStack() as stack:
        connect = [
            aiordma.connect(args.host, args.port, config=config, token=args.token)
            for _ in range(args.clients)
        ]
        connections = [await stack.enter_async_context(connection) for connection in connect]
        first = connections[0]
        inbox = await first.remote("inbox")
        text = b"hello, memory"
        await first.write(text, inbox[: len(text)], notify=len(text))
        print(f"written and notified; read back: {await first.read(inbox[: len(text)])!r}")
        counter = (await first.remote("words"))[0:8]
        before = await first.fetch_add(counter, 0)
        await asyncio.gather(*(add(connection, 50) for connection in connections))
        print(f"{args.clients} connections counted to {await first.fetch_add(counter, 0) - before}")
        log: list[str] = []
        await asyncio.gather(*(locked(connection, n + 1, log) for n, connection in enumerate(connections)))
        print(f"under the lock: {', '.join(log)}")


def main() -> None:
    """Runs one side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("role", choices=["server", "client"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on, or to connect to")
    parser.add_argument("--port", type=int, default=0, help="TCP port; server: 0 is a free one")
    parser.add_argument("--mode", default="adaptive", choices=["event", "adaptive", "busy"])
    parser.add_argument("--token", help="a secret both sides know")
    parser.add_argument("--clients", type=int, default=3, help="client: number of connections")
    args = parser.parse_args()
    role = server if args.role == "server" else client
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(role(args, aiordma.Config(mode=args.mode)))


if __name__ == "__main__":
    main()
