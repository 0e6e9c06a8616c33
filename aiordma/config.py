"""The settings of aiordma: one frozen dataclass, checked when it is made.

Every knob states its unit, range and default. Which settings both sides must agree on is settled in the
handshake (the smaller value wins); the others are each side's own business.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import MisuseError

Mode = Literal["event", "busy", "adaptive"]
HugePages = Literal["auto", "never", "require"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


#: The slabs that a pool has room for, at least: each size of buffers has slabs of its own.
_SLABS = 4


def _knob(default: Any, low: float, high: float, unit: str, *, doc: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "unit": unit, "doc": doc})


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of a connection or a server; immutable, so one may be shared by any number of them.

    Raises :class:`~aiordma.errors.MisuseError` for a value outside its range. ``dataclasses.replace`` makes
    a changed copy. ``Config.knobs()`` lists every knob with unit, range, default and meaning.
    """

    # --- how completions are awaited -----------------------------------------------------------------
    mode: Mode = field(
        default="adaptive",
        metadata={
            "unit": "",
            "doc": "event: sleep on the completion channel, 0 % CPU when idle; busy: poll on every turn of the "
            "event loop, a whole core, the lowest latency; adaptive: poll while it pays, else as event",
        },
    )
    inline_spin_us: float = _knob(
        50.0, 0, 1_000, "us", doc="upper bound of one inline spin inside an awaiting call (busy, adaptive)"
    )
    turn_spin_us: float = _knob(
        2_000.0,
        0,
        100_000,
        "us",
        doc="adaptive: upper bound of polling on turns of the loop after the last completion; what is used is "
        "four times the average completion time",
    )

    # --- messages and windows ------------------------------------------------------------------------
    eager_size: int = _knob(
        4 * KIB,
        64,
        1 * MIB,
        "bytes",
        doc="messages up to this are copied through registered buffers, larger ones are read from the sender's "
        "memory; agreed: the smaller of both sides",
    )
    max_message_size: int = _knob(
        1 * GIB, 64, 1 << 40, "bytes", doc="largest message this side receives; the peer is told"
    )
    rendezvous_depth: int = _knob(
        8, 1, 64, "messages", doc="messages above eager_size under way at a time; agreed: the smaller of both"
    )
    receive_credits: int = _knob(
        64,
        2,
        4096,
        "messages",
        doc="messages and notifications that the peer may have under way, not taken ones included; with a shared "
        "receive queue, the most it may be given",
    )
    shared_receives: int | None = field(
        default=None,
        metadata={
            "unit": "messages",
            "doc": "receives that connections share, beyond the least that each has; 0 to 65536, 0: each has "
            "receive_credits of its own. None: 1024 for the connections of a server, if the device can share, 0 "
            "for a client's",
        },
    )
    min_credits: int = _knob(
        4, 1, 256, "messages", doc="receives that a connection always has, where they are shared"
    )
    send_depth: int = _knob(
        64, 2, 4096, "work requests", doc="operations in the send queue at a time; more wait in order"
    )
    inline_size: int = _knob(
        220, 0, 4096, "bytes", doc="inline data asked of the device; what it grants may differ"
    )
    read_depth: int = _knob(
        16, 1, 128, "operations", doc="reads and atomics in flight; agreed with what the peer's device serves"
    )

    # --- memory --------------------------------------------------------------------------------------
    pool_limit: int = _knob(
        256 * MIB, 1 * MIB, 1 << 46, "bytes", doc="registered memory of the pool, per device and event loop"
    )
    slab_size: int = _knob(
        2 * MIB,
        64 * KIB,
        1 * GIB,
        "bytes",
        doc="memory is registered in pieces of this size (a multiple of 4096, at most a 4th of pool_limit)",
    )
    huge_pages: HugePages = field(
        default="auto",
        metadata={"unit": "", "doc": "slabs on huge pages: auto when there are any, never, or require"},
    )
    registration_cache: int = _knob(
        256 * MIB, 0, 1 << 46, "bytes", doc="idle registrations of users' own buffers kept for the next use"
    )

    # --- the queue pair ------------------------------------------------------------------------------
    mtu: int = _knob(4096, 256, 4096, "bytes", doc="path MTU asked for: 256, 512, 1024, 2048 or 4096")
    ack_timeout: int = _knob(
        16,
        1,
        31,
        "exponent",
        doc="wait for an acknowledgement: 4.096 us * 2**n (14 is 67 ms, 16 268 ms, 18 1 s)",
    )
    retry_count: int = _knob(
        6, 0, 7, "retries", doc="transmissions repeated before the connection is given up"
    )
    port: int | None = field(
        default=None, metadata={"unit": "port number", "doc": "port of the device; None: the first that fits"}
    )
    gid_index: int | None = field(
        default=None,
        metadata={"unit": "index", "doc": "GID of the port; None: chosen by the bootstrap socket's address"},
    )
    usroce_address: str | None = field(
        default=None,
        metadata={
            "unit": "IP addresses",
            "doc": "addresses of this host that the usroce device has, separated by commas; None: the environment "
            "variable AIORDMA_USROCE_ADDRESS, else 127.0.0.1 and ::1, which only this machine reaches",
        },
    )
    usroce_shared_memory: bool | None = field(
        default=None,
        metadata={
            "unit": "",
            "doc": "whether the usroce device uses memory shared with peers of the same user on this host; both "
            "ends must; None: the environment variable AIORDMA_USROCE_SHM, else yes",
        },
    )
    service_level: int = _knob(0, 0, 15, "SL", doc="InfiniBand service level")
    traffic_class: int = _knob(
        0, 0, 255, "", doc="GRH traffic class; RoCE v2: the IP header's DSCP and ECN bits"
    )
    hop_limit: int = _knob(64, 1, 255, "hops", doc="GRH hop limit; RoCE v2: the IP header's TTL")

    # --- bootstrap and lifetime ----------------------------------------------------------------------
    handshake_timeout: float = _knob(
        5.0, 0.01, 600, "s", doc="server: a client that has not finished its handshake by then is dropped"
    )
    max_handshakes: int = _knob(
        256,
        1,
        65_536,
        "connections",
        doc="server: handshakes under way at a time; beyond it the oldest is dropped",
    )
    max_connections: int = _knob(
        4096, 1, 1_000_000, "connections", doc="server: established at a time; further ones are refused"
    )
    keepalive: float = _knob(
        2.0, 0.0, 3600, "s", doc="a silent peer host counts as dead after about 3 times this (0: never)"
    )
    close_timeout: float = _knob(
        2.0, 0.0, 600, "s", doc="how long close() waits for what is in flight, then for TLS to end"
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            self._check(spec, getattr(self, spec.name))
        if self.mode not in get_args(Mode):
            raise MisuseError(f"Config.mode={self.mode!r}: one of {', '.join(get_args(Mode))}")
        if self.huge_pages not in get_args(HugePages):
            raise MisuseError(
                f"Config.huge_pages={self.huge_pages!r}: one of {', '.join(get_args(HugePages))}"
            )
        if self.usroce_address is not None:
            _check_addresses(self.usroce_address)
        if self.usroce_shared_memory not in (None, False, True):
            raise MisuseError(
                f"Config.usroce_shared_memory={self.usroce_shared_memory!r}: None, False or True"
            )
        if self.shared_receives is not None:
            self._check_shared(self.shared_receives)
        if self.mtu & (self.mtu - 1):
            raise MisuseError(f"Config.mtu={self.mtu}: one of 256, 512, 1024, 2048, 4096")
        if self.slab_size % 4096:
            raise MisuseError(f"Config.slab_size={self.slab_size}: a multiple of 4096 bytes")
        if _SLABS * self.slab_size > self.pool_limit:
            raise MisuseError(
                f"Config.slab_size={self.slab_size} is more than a {_SLABS}th of "
                f"Config.pool_limit={self.pool_limit}; staging, receives and leases have slabs of their own"
            )

    @staticmethod
    def _check(spec: dataclasses.Field[Any], value: object) -> None:
        low = spec.metadata.get("low")
        if low is None:
            return
        high = spec.metadata["high"]
        kinds = (int,) if isinstance(spec.default, int) else (int, float)
        ok = isinstance(value, kinds) and not isinstance(value, bool)
        if not ok or not low <= value <= high:
            kind = "a whole number" if kinds == (int,) else "a number"
            unit = f" {spec.metadata['unit']}".rstrip()
            raise MisuseError(f"Config.{spec.name}={value!r}: {kind} from {low} to {high}{unit}")

    @staticmethod
    def _check_shared(value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 65_536:
            raise MisuseError(
                f"Config.shared_receives={value!r}: None, or a whole number from 0 to 65536 messages"
            )

    @classmethod
    def knobs(cls) -> list[dict[str, Any]]:
        """Name, default, unit, range (``low``, ``high``) and meaning (``doc``) of every knob."""
        return [{"name": f.name, "default": f.default, **f.metadata} for f in dataclasses.fields(cls)]


def _check_addresses(text: object) -> None:
    """One or more addresses that a RoCE GID can stand for."""
    words = text.split(",") if isinstance(text, str) else []
    try:
        addresses = [ipaddress.ip_address(word.strip()) for word in words]
    except ValueError:
        addresses = []
    if not addresses or any(a.is_unspecified or a.is_multicast or "%" in str(a) for a in addresses):
        raise MisuseError(
            f"Config.usroce_address={text!r}: IPv4 or IPv6 addresses of this host, separated by commas"
        )
