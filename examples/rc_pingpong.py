"""Ping-pong over a reliable connection, on plain verbs: the Python twin of rdma-core's ibv_rc_pingpong.

Either end may be the C program, for both speak the same exchange over TCP. One side serves, one connects:

    python examples/rc_pingpong.py                   ibv_rc_pingpong -g 1
    ibv_rc_pingpong -g 1 localhost          or       python examples/rc_pingpong.py localhost

This shows what lies below aiordma.connect(): open a device, choose a GID, register memory, make a queue pair,
tell the peer where it is, bring it up, post and complete. Programs should use aiordma.connect().
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import secrets
import socket
import sys
import time
from dataclasses import dataclass

from aiordma.errors import RdmaError, completion_error
from aiordma.verbs import (
    Access,
    CompletionChannel,
    CompletionQueue,
    Context,
    Path,
    ProtectionDomain,
    QueuePair,
    SendFlags,
    WorkCompletion,
    WrOpcode,
    open_device,
)
from aiordma.verbs.gid_choice import GidChoice, choose_gid, interface_addresses

SEND, RECV = 1, 2  # work request ids
FILL = 0x7B  # what ibv_rc_pingpong fills its buffer with, so -c can check its messages as well
SPIN_NS = 1_000_000  # polling: so long in C, then one turn of the event loop, which lets Ctrl-C in


@dataclass(frozen=True)
class Endpoint:
    """Where a queue pair is: what the two sides tell each other."""

    lid: int
    qp_num: int
    psn: int
    gid: ipaddress.IPv6Address  # all zero: addressed by LID

    #: lid:qp_num:psn:gid in hexadecimal digits, and a NUL, for C sends its strings with their end.
    WIRE_SIZE = len("0000:000000:000000:") + 32 + 1

    def pack(self) -> bytes:
        return f"{self.lid:04x}:{self.qp_num:06x}:{self.psn:06x}:{self.gid.packed.hex()}\0".encode()

    @classmethod
    def unpack(cls, wire: bytes) -> Endpoint:
        lid, qp_num, psn, gid = wire.rstrip(b"\0").decode().split(":")
        return cls(int(lid, 16), int(qp_num, 16), int(psn, 16), ipaddress.IPv6Address(bytes.fromhex(gid)))

    def __str__(self) -> str:
        gid = socket.inet_ntop(socket.AF_INET6, self.gid.packed)
        return f"LID {self.lid:#06x}, QPN {self.qp_num:#08x}, PSN {self.psn:#08x}, GID {gid}"


class PingPong:
    """One end: a queue pair, a completion queue, and a buffer whose halves are sent and received into."""

    def __init__(self, context: Context, choice: GidChoice, options: argparse.Namespace) -> None:
        self.options = options
        self.choice = choice
        size, depth = options.size, options.rx_depth
        self.buffer = bytearray([FILL]) * size + bytearray(size)
        self.received_data = memoryview(self.buffer)[size:]

        pd = ProtectionDomain(context)
        self.region = pd.register(self.buffer, Access.LOCAL_WRITE)
        self.channel = CompletionChannel(context) if options.events else None
        # Room for all that can complete at a time: every receive and the one send.
        self.cq = CompletionQueue(context, depth + 1, self.channel)
        self.qp = QueuePair(pd, self.cq, max_send_wr=1, max_recv_wr=depth)
        self.qp.to_init(choice.port.port, Access.NONE)

        gid = choice.entry.gid if choice.entry else ipaddress.IPv6Address(0)
        self.local = Endpoint(choice.port.lid, self.qp.qp_num, secrets.randbits(24), gid)
        self.event = asyncio.Event()
        self.posted = 0  # receives the device has
        self.pending: set[int] = set()  # what must complete before the next send
        self.sent = 0
        self.received = 0

    def connect(self, remote: Endpoint) -> None:
        """Brings the queue pair up. Receives come first: from RTR on the peer's messages may arrive."""
        entry = self.choice.entry
        path = Path(
            port=self.choice.port.port,
            lid=remote.lid,
            gid=remote.gid if int(remote.gid) else None,
            gid_index=entry.index if entry else 0,
            service_level=self.options.sl,
        )
        self.post_receives()
        if self.channel:
            self.cq.arm()
        mtu = self.options.mtu
        self.qp.to_rtr(path, qp_num=remote.qp_num, psn=remote.psn, mtu=mtu, responder_depth=1)
        # A receive is always posted before the peer may send, so "receiver not ready" needs no retry.
        self.qp.to_rts(psn=self.local.psn, timeout=14, retry_count=7, rnr_retry=0, initiator_depth=1)

    async def run(self, *, first: bool) -> float:
        """Sends and receives every message; the side that is ``first`` begins. Returns the seconds taken."""
        loop = asyncio.get_running_loop()
        if self.channel:
            loop.add_reader(self.channel.fd, self.on_event)
        self.pending = {RECV}
        start = time.perf_counter()
        if first:
            self.post_send()
        try:
            while self.sent < self.options.iters or self.received < self.options.iters:
                for completion in await self.completions():
                    self.on_completion(completion)
        finally:
            if self.channel:
                loop.remove_reader(self.channel.fd)
        return time.perf_counter() - start

    async def completions(self) -> list[WorkCompletion]:
        """The next completions; an empty list now and then, for an event may tell of one already seen."""
        if self.channel is None:
            found = self.cq.poll(SPIN_NS)
            if not found:
                await asyncio.sleep(0)
            return found
        # Arming tells of what completes after it: having armed, poll again, and sleep only on an empty queue.
        found = self.cq.poll()
        if not found:
            await self.event.wait()
            self.event.clear()
            self.cq.arm()
        return found

    def on_event(self) -> None:
        """The channel is readable: its events must be read, or the event loop would call here for ever."""
        assert self.channel is not None
        self.channel.get_events()
        self.event.set()

    def on_completion(self, completion: WorkCompletion) -> None:
        if completion.status:
            name = "SEND" if completion.wr_id == SEND else "RECV"
            raise completion_error(completion.status, qp_num=completion.qp_num, opcode=name)
        if completion.wr_id == SEND:
            self.sent += 1
        else:
            self.received += 1
            self.posted -= 1
            if self.options.check:
                self.check_message(completion.byte_len)
            if self.posted <= 1:
                self.post_receives()
        self.pending.discard(completion.wr_id)
        if not self.pending and self.sent < self.options.iters:
            self.post_send()

    def check_message(self, length: int) -> None:
        """Compares what came with what the peer sends, and wipes it, to see the next one come."""
        size = self.options.size
        if length != size or self.received_data != bytes([FILL]) * size:
            raise ConnectionError(f"message {self.received} is not what the peer sends")
        self.received_data[:] = bytes(size)

    def post_receives(self) -> None:
        """Fills the receive queue. All use one place in memory: only one message is on its way at a time."""
        size = self.options.size
        missing = self.options.rx_depth - self.posted
        self.qp.post_recv([(RECV, self.region.address + size, size, self.region.lkey)] * missing)
        self.posted += missing

    def post_send(self) -> None:
        region, size = self.region, self.options.size
        error = self.qp.post_send(SEND, WrOpcode.SEND, SendFlags.SIGNALED, region.address, size, region.lkey)
        if error:
            raise OSError(error, "ibv_post_send")
        self.pending = {SEND, RECV}


async def open_connection(options: argparse.Namespace) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The TCP connection to the peer: to the host that was given, or the first one that comes."""
    if options.host:
        return await asyncio.open_connection(options.host, options.port)
    first: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    first = asyncio.get_running_loop().create_future()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first.done():
            writer.close()
        else:
            first.set_result((reader, writer))

    server = await asyncio.start_server(accepted, port=options.port)
    try:
        return await first
    finally:
        server.close()


async def exchange(
    pingpong: PingPong, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, client: bool
) -> Endpoint:
    """Tells the peer where we are and connects the queue pair.

    The client speaks first and says "done" last. The server's queue pair is up before it answers, so the
    client may send as soon as it has the answer.
    """
    if client:
        writer.write(pingpong.local.pack())
    remote = Endpoint.unpack(await reader.readexactly(Endpoint.WIRE_SIZE))
    pingpong.connect(remote)
    if client:
        writer.write(b"done\0")
        await writer.drain()
    else:
        writer.write(pingpong.local.pack())
        await reader.readexactly(len(b"done\0"))
    return remote


def gid_for(context: Context, writer: asyncio.StreamWriter, options: argparse.Namespace) -> GidChoice:
    """The port and GID that fit the addresses of the TCP connection, or the ones asked for."""
    local, remote = (
        ipaddress.ip_address(writer.get_extra_info(name)[0]) for name in ("sockname", "peername")
    )
    return choose_gid(
        context.ports(),
        context.gids(),
        local=local,
        remote=remote,
        interfaces=interface_addresses(),
        port=options.ib_port,
        gid_index=options.gid_idx,
    )


async def main(options: argparse.Namespace) -> None:
    reader, writer = await open_connection(options)
    # The context closes everything made from it, in the right order.
    with contextlib.closing(writer), open_device(options.ib_dev) as context:
        pingpong = PingPong(context, gid_for(context, writer, options), options)
        print(f"  local address:  {pingpong.local}")
        remote = await exchange(pingpong, reader, writer, client=bool(options.host))
        print(f"  remote address: {remote}")
        seconds = await pingpong.run(first=bool(options.host))
    total = 2 * options.size * options.iters
    print(f"{total} bytes in {seconds:.2f} seconds = {total * 8 / seconds / 1e6:.2f} Mbit/sec")
    per_iteration = seconds * 1e6 / options.iters
    print(f"{options.iters} iters in {seconds:.2f} seconds = {per_iteration:.2f} usec/iter")


def parse_options() -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text, 0)) < 1:
            raise ValueError(text)
        return number

    mtus = (256, 512, 1024, 2048, 4096)
    parser = argparse.ArgumentParser(description="RC ping-pong; without HOST, wait for a client")
    parser.add_argument("host", nargs="?", help="the server (default: be the server)")
    parser.add_argument("-p", "--port", type=positive, default=18515, help="TCP port (default %(default)s)")
    parser.add_argument("-d", "--ib-dev", help="device (default: the first)")
    parser.add_argument("-i", "--ib-port", type=positive, help="port of the device (default: one that fits)")
    parser.add_argument("-s", "--size", type=positive, default=4096, help="bytes (default %(default)s)")
    parser.add_argument("-m", "--mtu", type=int, choices=mtus, default=1024, help="path MTU (default 1024)")
    parser.add_argument("-r", "--rx-depth", type=positive, default=500, help="receives (default 500)")
    parser.add_argument("-n", "--iters", type=positive, default=1000, help="exchanges (default 1000)")
    parser.add_argument("-l", "--sl", type=int, default=0, help="service level (default 0)")
    parser.add_argument("-e", "--events", action="store_true", help="sleep on completion events")
    parser.add_argument("-g", "--gid-idx", type=int, help="GID index (default: by the TCP addresses)")
    parser.add_argument("-c", "--check", action="store_true", help="check the data of every message")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_options()))
    except (RdmaError, OSError, asyncio.IncompleteReadError) as error:
        sys.exit(f"rc_pingpong: {error}")
