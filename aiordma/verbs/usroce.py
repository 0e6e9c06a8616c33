"""What usroce, the device in user space, can do beyond verbs: faults, captures, counters, settings.

A fault link below the device drops, doubles, reorders, delays and damages what it sends; a capture writes what it
sends and receives into a file that Wireshark reads. Both are for tests, and for people who want to look inside.
Functions that take a context raise :class:`~aiordma.errors.MisuseError` for any other device.

Settings are of the process, for devices that are opened from then on; they come before the environment
variables ``AIORDMA_USROCE_ADDRESS``, ``_PCAP``, ``_FAULT``, ``_SOCKET_BUFFER``, ``_GSO``, ``_SHM``,
``_DIRECT`` and ``_MEMLOCK``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .._native import ffi, lib
from ..errors import DeviceError, LibraryError, MisuseError
from .device import Context, Device, devices
from .provider import Provider, check, providers

_NOT_THERE = "usroce is not there; see: aiordma doctor"
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the frames a device sends. The same seed and traffic give the same faults.

    ``drop``, ``duplicate``, ``reorder``, ``corrupt`` (one bit, anywhere in the frame) and ``delay`` are
    probabilities from 0 to 1, independent of each other. A delayed frame waits ``delay_us`` microseconds; a
    reordered one until ``reorder_gap`` later frames have passed (0: 3), or 10 ms. Raises
    :class:`~aiordma.errors.MisuseError` for a value outside its range.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0
    delay_us: int = 0
    reorder_gap: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "duplicate", "reorder", "corrupt", "delay"):
            value = getattr(self, name)
            if not _is_number(value, int, float) or not 0 <= value <= 1:
                raise MisuseError(f"Fault.{name}={value!r}: a probability from 0 to 1")
        for name, high in (("delay_us", _U32), ("reorder_gap", _U32), ("seed", _U64)):
            value = getattr(self, name)
            if not _is_number(value, int) or not 0 <= value <= high:
                raise MisuseError(f"Fault.{name}={value!r}: a whole number from 0 to {high}")
        if self.delay and not self.delay_us:
            raise MisuseError(f"Fault.delay={self.delay!r} without delay_us, how long in microseconds")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From the form of ``AIORDMA_USROCE_FAULT``: ``drop=0.01,reorder=0.05,seed=1``."""
        values: dict[str, float] = {}
        kinds = {spec.name: float if spec.type == "float" else int for spec in dataclasses.fields(cls)}
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = word.partition("=")
            if name not in kinds:
                raise MisuseError(f"fault {word!r}: NAME=VALUE with a name of {', '.join(kinds)}")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                raise MisuseError(f"fault {word!r}: {value!r} is not a number for {name}") from None
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The form that :meth:`parse` reads; what is 0 is left out."""
        values = dataclasses.asdict(self)
        return ",".join(f"{name}={value}" for name, value in values.items() if value)


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class UsroceCounters:
    """Packets since the device was opened, unless the name says otherwise.

    ``send_errors`` are frames that the kernel refused; ``malformed``, ``bad_icrc`` and ``unknown_qp`` were
    received and dropped; ``retransmitted`` were sent again, after a gap was reported or one of the
    ``timeouts``. ``rnr_naks_*`` say that a receiver was not ready. ``polls`` and ``thread_wakeups`` tell who
    drove the device: the program that polls, or the device's own thread. ``shm_sent`` and ``shm_received``
    are the part of ``sent`` and ``received`` that went through memory shared with a peer on this host,
    ``shm_peers`` how many such peers it sends to now, and ``shm_refused`` counts those on this host that stay
    with UDP because they belong to another user. ``direct`` counts the one-sided operations that were carried
    out in such a peer's memory without a packet, and ``direct_bytes`` what they moved.
    """

    sent: int
    received: int
    sent_bytes: int
    received_bytes: int
    send_calls: int
    receive_calls: int
    send_errors: int
    malformed: int
    bad_icrc: int
    unknown_qp: int
    duplicates: int
    out_of_sequence: int
    retransmitted: int
    timeouts: int
    naks_sent: int
    naks_received: int
    rnr_naks_sent: int
    rnr_naks_received: int
    polls: int
    thread_wakeups: int
    faults_dropped: int
    faults_duplicated: int
    faults_reordered: int
    faults_corrupted: int
    faults_delayed: int
    shm_sent: int
    shm_received: int
    shm_peers: int
    shm_refused: int
    direct: int
    direct_bytes: int


# --- a device -----------------------------------------------------------------------------------------


def is_usroce(device: Context | Device) -> bool:
    """Whether a device is usroce, and so can do what is here."""
    return device.is_usroce


def usroce_device() -> Device:
    """The device, yet to be opened. Raises :class:`~aiordma.errors.DeviceError` when it is not there."""
    for device in devices():
        if device.is_usroce:
            return device
    raise DeviceError(_NOT_THERE)


def set_fault(context: Context, fault: Fault | None) -> None:
    """What happens from now on to what the device sends; None ends all faults."""
    _check(context, "inject faults")
    raw = ffi.NULL
    if fault is not None:
        raw = ffi.new("struct usroce_fault *", dataclasses.asdict(fault))
    check(
        lib.glue_usroce_set_fault(context.provider.table, context._handle, raw),
        f"usroce_set_fault({context.name})",
    )


def capture(context: Context, path: str | os.PathLike[str] | None) -> None:
    """Writes everything sent and received from now on into a pcap file, anew; None ends the capture.

    The file is complete when the capture has ended or the device is closed.
    """
    _check(context, "capture")
    raw = ffi.NULL if path is None else os.fsencode(os.path.abspath(path))
    check(
        lib.glue_usroce_capture(context.provider.table, context._handle, raw),
        f"usroce_capture({context.name}, {path})",
    )


def counters(context: Context) -> UsroceCounters:
    """What the device has counted since it was opened."""
    _check(context, "tell its counters")
    raw = ffi.new("struct usroce_counters *")
    check(
        lib.glue_usroce_query_counters(context.provider.table, context._handle, raw),
        f"usroce_query_counters({context.name})",
    )
    return UsroceCounters(
        **{spec.name: getattr(raw, spec.name) for spec in dataclasses.fields(UsroceCounters)}
    )


class SharedMemory:
    """``nbytes`` of memory, zeroed, that peers of the same user on this host can map.

    Regions in it they write and read by themselves, where they may. Raises :class:`MemoryError` when it cannot
    be had. No region may be left in it when it is closed. After fork() it is one memory, of parent and child.
    """

    __slots__ = ("_provider", "address", "nbytes")

    def __init__(self, context: Context, nbytes: int) -> None:
        self.address = 0
        self.nbytes = nbytes
        self._provider = context.provider
        memory = ffi.new("void **")
        rc = lib.glue_usroce_alloc(self._provider.table, nbytes, memory)
        if rc:
            raise MemoryError(f"usroce_alloc({nbytes}): {os.strerror(rc)}")
        self.address = int(ffi.cast("uintptr_t", memory[0]))

    def unshare(self) -> None:
        """No peer can map it from now on: it is ordinary memory. No region may be left in it."""
        if self.address:
            lib.glue_usroce_unshare(self._provider.table, ffi.cast("void *", self.address))

    def close(self) -> None:
        """Gives it back. Idempotent."""
        address, self.address = self.address, 0
        if address:
            lib.glue_usroce_free(self._provider.table, ffi.cast("void *", address))

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.close()


def _check(context: Context, what: str) -> None:
    context.check_open()
    if not context.is_usroce:
        raise MisuseError(f"{context.name} is no usroce device: only usroce can {what}")


def contexts() -> list[Context]:
    """The usroce devices that are open in this process."""
    source = _provider()
    if source is None:
        return []
    with source.opening:
        pid = os.getpid()  # those of a parent process are closed to us
        return [context for context in source.contexts if not context.closed and context._pid == pid]


@contextlib.contextmanager
def watched(opened: Callable[[Context], object]) -> Iterator[None]:
    """Calls ``opened`` with each usroce device that is open, and with each that is opened in the block."""
    source = _required_provider()
    with source.opening:
        for context in contexts():
            opened(context)
        source.watchers.append(opened)
    try:
        yield
    finally:
        with source.opening:
            source.watchers.remove(opened)


# --- settings of the process --------------------------------------------------------------------------


def set_option(name: str, value: str | None) -> None:
    """Sets what the environment variable ``AIORDMA_USROCE_<NAME>`` would, for devices opened from now on.

    ``name`` in lower case; None lets the environment count again. Raises
    :class:`~aiordma.errors.MisuseError` for an unknown name or a value that usroce does not take.
    """
    source = _required_provider()
    with source.opening:
        raw = ffi.NULL if value is None else value.encode()
        rc = lib.glue_usroce_set_option(source.table, name.encode(), raw)
        if rc:
            raise MisuseError(f"usroce takes no setting {name}={value!r}")
        source.options.pop(name, None)
        if value is not None:
            source.options[name] = value


@contextlib.contextmanager
def options(**settings: str | None) -> Iterator[None]:
    """Settings for what this thread opens in the block: ``with options(address="192.0.2.1"): device.open()``.

    Other threads wait with opening usroce devices meanwhile, so that they do not get them.
    """
    source = _required_provider()
    with source.opening:
        before = {name: source.options.get(name) for name in settings}
        try:
            for name, value in settings.items():
                set_option(name, value)
            yield
        finally:
            for name, value in before.items():
                set_option(name, value)


def default_fault() -> Fault | None:
    """The faults that a device has when it is opened now: those of the settings or the environment."""
    source = _provider()
    text = source.options.get("fault") if source is not None else None
    text = text or os.environ.get("AIORDMA_USROCE_FAULT")
    return Fault.parse(text) if text else None


def _required_provider() -> Provider:
    source = _provider()
    if source is None:
        raise DeviceError(_NOT_THERE)
    return source


def _provider() -> Provider | None:
    try:
        return next((source for source in providers() if source.is_usroce), None)
    except LibraryError:
        return None
