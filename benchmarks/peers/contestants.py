"""Who takes part, by name. A plain table: the modules are imported only in the processes that need them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from .interface import Peer, Unavailable

LOOPS = ("asyncio", "uvloop")
MODES = ("busy", "adaptive", "event")


@dataclass(frozen=True)
class Contestant:
    """``peer`` is a module of this package and a class in it, made with ``options``."""

    name: str
    peer: str
    loop: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Peer:
        """In a process that takes part. Raises :class:`Unavailable`."""
        module, _, name = self.peer.partition(":")
        try:
            peer = getattr(importlib.import_module(f".{module}", __package__), name)
            made: Peer = peer(**self.options)
        except ImportError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        return made


#: What all others are measured against.
REFERENCE = Contestant("uvloop streams, TCP", "streams:Streams", "uvloop")


def contestants(device: str) -> list[Contestant]:
    """All but the reference, in the order of a round."""
    found = []
    for loop in LOOPS:
        for mode in MODES:
            options = {"mode": mode, "device": device}
            found.append(Contestant(f"aiordma messages, {mode} ({loop})", "rdma:Messages", loop, options))
    for mode in MODES:
        options = {"package": "aiordma", "mode": mode, "device": device}
        found.append(Contestant(f"aiordma streams, {mode} (uvloop)", "streams:Streams", "uvloop", options))
        options = {"mode": mode, "device": device}
        found.append(Contestant(f"aiordma RPC, {mode} (uvloop)", "rdma:Rpc", "uvloop", options))
    found.append(Contestant("asyncio streams, TCP", "streams:Streams", "asyncio"))
    found.append(Contestant("uvloop Protocol, TCP, one future a request", "protocol:Protocol", "uvloop"))
    for loop in LOOPS:
        found.append(Contestant(f"pyzmq asyncio, DEALER/ROUTER ({loop})", "zmq_sockets:Sockets", loop))
        found.append(Contestant(f"grpc.aio, unary ({loop})", "grpc_aio:Unary", loop))
    for progress in ("polling", "thread"):
        options = {"progress": progress}
        found.append(Contestant(f"ucxx, {progress} (uvloop)", "ucx:ActiveMessages", "uvloop", options))
    return found
