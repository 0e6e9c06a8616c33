"""One-sided operations: the client works in the server's memory, without the server's program.

    python examples/one_sided.py server
    python examples/one_sided.py client --port PORT

Each client has an inbox of its own at the server, and all of them share a counter. What can be built on such
operations: kv_store.py, locks.py, parameter_server.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import aiordma

INBOX = 1 << 20
PIECES = 8


class Memory:
    """The server's memory: a counter for everyone, and an inbox for each connection."""

    def __init__(self) -> None:
        self.counter: aiordma.Lease | None = None
        self.allocating = asyncio.Lock()

    async def handler(self, connection: aiordma.Connection) -> None:
        """Shares memory with one client, and tells when it writes with a notification."""
        async with self.allocating:
            if self.counter is None:
                self.counter = await connection.allocate(8)
        await connection.share("counter", self.counter, "read|atomic")
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
            if memory.counter is not None:
                await memory.counter.release()


async def add(connection: aiordma.Connection, times: int) -> None:
    """Counts, together with all the others who do."""
    counter = await connection.remote("counter")
    for _ in range(times):
        await connection.fetch_add(counter, 1)


async def write_and_read(connection: aiordma.Connection) -> None:
    """One at a time, then several with one doorbell."""
    inbox = await connection.remote("inbox")
    text = b"hello, memory"
    await connection.write(text, inbox[: len(text)], notify=len(text))
    print(f"written and notified; read back: {await connection.read(inbox[: len(text)])!r}")
    size = INBOX // PIECES
    async with connection.batch() as batch:
        for n in range(PIECES):
            batch.write(bytes([n]) * size, inbox[n * size : (n + 1) * size])
        whole = batch.read(inbox)  # in order: it finds what was written before
    right = await whole == b"".join(bytes([n]) * size for n in range(PIECES))
    print(f"{PIECES} writes and a read of all of it in one batch: {'right' if right else 'wrong'}")


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Writes, reads, notifies; then several connections count at the same time."""
    async with contextlib.AsyncExitStack() as stack:
        connect = [
            aiordma.connect(args.host, args.port, config=config, token=args.token)
            for _ in range(args.clients)
        ]
        connections = [await stack.enter_async_context(connection) for connection in connect]
        first = connections[0]
        await write_and_read(first)
        counter = await first.remote("counter")
        before = await first.fetch_add(counter, 0)
        await asyncio.gather(*(add(connection, 50) for connection in connections))
        print(f"{args.clients} connections counted to {await first.fetch_add(counter, 0) - before}")


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
