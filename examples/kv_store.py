"""A key-value store whose GETs are one-sided reads: the server's program sleeps through them.

    python examples/kv_store.py                     server and client in one go
    python examples/kv_store.py server
    python examples/kv_store.py client --port PORT

The server shares, read-only, the table and the values of kv_table.py. PUT and DELETE are messages, and the server
alone writes. GET reads a few slots at once; a small value is among them, a larger one takes a second read. What
does not check, because it was written meanwhile, is read again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import struct
import zlib
from collections.abc import AsyncIterator

import aiordma
import program
from aiordma.errors import ConnectionLostError
from kv_table import EMPTY, INLINE, SLOT, STORED, UNUSED, Entry, KvError, Store, Torn, check_key, probes

REQUEST = struct.Struct("<IBB")  # number, what, length of the key; then key and value
REPLY = struct.Struct("<I")  # number; then what went wrong, if anything
PUT, DELETE = range(2)
ATTEMPTS = 1000  # reads of one GET, before a value that is always being written is given up


class KvServer:
    """Serves one store to all its connections; the memory comes with the first."""

    def __init__(self, slots: int, value_bytes: int) -> None:
        self.store: Store | None = None
        self._sizes = slots * SLOT, value_bytes
        self._leases: list[aiordma.Lease] = []
        self._opening = asyncio.Lock()

    async def handler(self, connection: aiordma.Connection) -> None:
        """One client: shares the memory, then does what the messages ask for."""
        async with self._opening:
            if self.store is None:
                self._leases = [await connection.allocate(nbytes) for nbytes in self._sizes]
                self.store = Store(memoryview(self._leases[0]), memoryview(self._leases[1]))
        for name, lease in zip(("index", "values"), self._leases, strict=True):
            await connection.share(name, lease, "read")
        with contextlib.suppress(ConnectionLostError):  # a client that dies is gone, and that is all
            async for request in connection:
                await connection.send(self._answer(self.store, request))

    @staticmethod
    def _answer(store: Store, request: bytes) -> bytes:
        number, what, length = REQUEST.unpack_from(request)
        key, value = request[REQUEST.size :][:length], request[REQUEST.size + length :]
        try:
            store.put(key, value) if what == PUT else store.delete(key)
        except KvError as error:
            return REPLY.pack(number) + str(error).encode()
        return REPLY.pack(number)

    async def close(self) -> None:
        """Gives the memory back; before the server closes."""
        for lease in self._leases:
            await lease.release()


class KvClient:
    """``async with KvClient.connect(host, port) as kv``. ``torn`` counts what did not check and was read again."""

    def __init__(
        self, connection: aiordma.Connection, index: aiordma.RemoteRegion, values: aiordma.RemoteRegion
    ) -> None:
        self.torn = 0
        self._connection = connection
        self._index = index
        self._values = values
        self._turn = asyncio.Lock()
        self._number = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(
        cls, host: str, port: int, config: aiordma.Config | None = None
    ) -> AsyncIterator[KvClient]:
        """A connection to a :class:`KvServer`, for the block."""
        async with aiordma.connect(host, port, config=config) as connection:
            yield cls(connection, await connection.remote("index"), await connection.remote("values"))

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None when there is none. Raises :class:`KvError` for one that is never at rest."""
        for _ in range(ATTEMPTS):
            try:
                return await self._value(await self._find(key))
            except Torn:
                self.torn += 1
        raise KvError(f"{key!r} was torn {ATTEMPTS} times in a row")

    async def _find(self, key: bytes) -> Entry:
        for start, count in probes(key, len(self._index) // SLOT):
            raw = memoryview(await self._connection.read(self._index[start * SLOT : (start + count) * SLOT]))
            for at in range(0, len(raw), SLOT):
                entry = Entry.unpack(raw[at : at + SLOT])
                if entry.key == key or entry.kind == EMPTY:
                    return entry
        return UNUSED

    async def _value(self, entry: Entry) -> bytes | None:
        if entry.kind != STORED:
            return entry.value if entry.kind == INLINE else None
        value: bytes = await self._connection.read(self._values[entry.offset : entry.offset + entry.length])
        if zlib.crc32(value) != entry.checksum:
            raise Torn
        return value

    async def put(self, key: bytes, value: bytes) -> None:
        """Sets the value; when this returns, every GET finds it. Raises :class:`KvError`."""
        await self._request(PUT, key, value)

    async def delete(self, key: bytes) -> None:
        """Removes the value, if there is one."""
        await self._request(DELETE, key, b"")

    async def _request(self, what: int, key: bytes, value: bytes) -> None:
        check_key(key)
        async with self._turn:
            number = self._number = (self._number + 1) % (1 << 32)
            await self._connection.send([REQUEST.pack(number, what, len(key)) + key, value])
            reply = await self._connection.recv()
            while REPLY.unpack_from(reply)[0] != number:  # of a request whose caller was cancelled
                reply = await self._connection.recv()
        if len(reply) > REPLY.size:
            raise KvError(reply[REPLY.size :].decode())


@contextlib.asynccontextmanager
async def serving(args: argparse.Namespace, config: aiordma.Config) -> AsyncIterator[int]:
    """A server for the block; its port."""
    kv = KvServer(args.slots, args.value_bytes)
    async with aiordma.serve(kv.handler, args.host, args.port, config=config) as listening:
        try:
            yield listening.port
        finally:
            await kv.close()


async def client(args: argparse.Namespace, config: aiordma.Config) -> None:
    """Puts, gets and deletes."""
    async with KvClient.connect(args.host, args.port, config) as kv:
        pairs = {b"key %d" % n: b"value %d " % n * n for n in range(100)}
        for key, value in pairs.items():
            await kv.put(key, value)
        values = await asyncio.gather(*(kv.get(key) for key in pairs))
        equal = values == list(pairs.values())
        print(f"{len(pairs)} values put, of up to {len(values[-1] or b'')} bytes; read back equal: {equal}")
        await kv.delete(b"key 0")
        print(f"deleted; read back: {await kv.get(b'key 0')!r}")


def main() -> None:
    """The command line."""
    parser = program.arguments(__doc__)
    parser.add_argument("--slots", type=int, default=1 << 14, help="server: keys that the table has room for")
    parser.add_argument("--value-bytes", type=int, default=1 << 25, help="server: memory for large values")
    program.run(parser.parse_args(), serving, client)


if __name__ == "__main__":
    main()
