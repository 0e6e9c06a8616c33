"""An RDMA device in an event loop: what all connections of one loop on one device share.

Context, protection domain, reactor and memory pool are opened by the first user and closed when the last one
has left, so a program that has no connection holds no device. A usroce device that was given other addresses or
other rules (``Config.usroce_address``, ``Config.usroce_shared_memory``) is another device here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import weakref
from dataclasses import dataclass

from .config import Config
from .cq_reactor import CqReactor
from .errors import DeviceError
from .mr_pool import MemoryPool
from .shared_receives import SharedReceives
from .staging import Scratch, StagingPool
from .verbs import Context, Device, ProtectionDomain, Transport, devices, usroce
from .verbs.gid_choice import Address, GidChoice, choose_gid, interface_addresses
from .verbs.provider import usroce_is_off

#: What tells adapters of one loop apart: the device, and for usroce the settings it was given.
_Key = tuple[str, tuple[tuple[str, str], ...]]

#: Receives of one shared queue, at most: some 1,800 connections that are idle. Beyond that, another queue is made.
_SHARED_CAPACITY = 16_384
#: A device that takes fewer is not worth it.
_MIN_SHARED = 1024

_adapters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, Adapter]] = (
    weakref.WeakKeyDictionary()
)


class Adapter:
    """One opened device of the running loop; :func:`acquire_adapter` makes and shares it.

    The pool's limits come from the ``config`` of the first user.
    """

    def __init__(self, context: Context, config: Config, key: _Key) -> None:
        self.loop = asyncio.get_running_loop()
        self.context = context
        self._key = key
        self.name = context.name
        self.users = 0
        try:
            self.attributes = context.attributes()
            self.pd = ProtectionDomain(context)
            self.reactor = CqReactor(
                context, inline_spin_us=config.inline_spin_us, turn_spin_us=config.turn_spin_us
            )
            self.pool = MemoryPool(self.pd, config)
            self._staging: dict[int, StagingPool] = {}
            self._scratch: dict[int, Scratch] = {}
            self._shared: dict[tuple[int, int], list[SharedReceives]] = {}
        except Exception:
            context.close()
            raise

    def use(self) -> Adapter:
        """One user more; each must :meth:`release` once."""
        self.users += 1
        return self

    def staging(self, size: int) -> StagingPool:
        """The staging buffers of ``size`` bytes."""
        pool = self._staging.get(size)
        if pool is None:
            pool = self._staging[size] = StagingPool(self.pool, size)
        return pool

    def scratch(self, size: int) -> Scratch:
        """Where inline data of up to ``size`` bytes is put together."""
        scratch = self._scratch.get(size)
        if scratch is None:
            scratch = self._scratch[size] = Scratch(size)
        return scratch

    @property
    def can_share_receives(self) -> bool:
        """True when the device has shared receive queues."""
        return self.attributes.max_srq > 0 and self.attributes.max_srq_wr >= _MIN_SHARED

    def shared_receives(self, size: int, limit: int, minimum: int, control: int) -> SharedReceives:
        """A shared receive queue with buffers of ``size`` bytes, and room for one connection more. Raises
        :class:`DeviceError` when the device gives no other."""
        queues = self._shared.setdefault((size, limit), [])
        for queue in queues:
            if queue.has_room(minimum, control):
                return queue
        attributes = self.attributes
        queue = SharedReceives(
            pd=self.pd,
            reactor=self.reactor,
            memory=self.pool,
            size=size,
            limit=limit,
            capacity=min(_SHARED_CAPACITY, attributes.max_srq_wr, attributes.max_cqe // 2),
        )
        queues.append(queue)
        return queue

    def release(self) -> None:
        """One user less; the last one closes the device."""
        self.users -= 1
        if self.users == 0:
            _adapters.get(self.loop, {}).pop(self._key, None)
            steps = [queue.close for queues in self._shared.values() for queue in queues]
            with contextlib.ExitStack() as stack:  # from the last to the first, whatever fails
                stack.callback(self.context.close)
                stack.callback(self.reactor.close)
                stack.callback(self.pool.close)
                for step in steps:
                    stack.callback(step)


@dataclass(frozen=True, slots=True)
class Route:
    """Which device, port and GID a connection uses."""

    adapter: Adapter
    choice: GidChoice


def open_route(device: str | None, local: Address | None, remote: Address | None, config: Config) -> Route:
    """The device and GID for a connection between these addresses; the adapter is in use once more.

    ``device`` None means ``AIORDMA_DEVICE``, else the first device with an active port that reaches the peer,
    usroce after the real ones. Raises :class:`DeviceError` that says, for each device, why not.
    """
    wanted = device or os.environ.get("AIORDMA_DEVICE") or None
    found = devices()
    candidates = [d for d in found if wanted in (None, d.name)]
    if not candidates:
        raise DeviceError(_no_device(wanted, found))
    try:
        interfaces = interface_addresses()
    except OSError:
        interfaces = {}  # netlink is forbidden in some sandboxes; exact addresses still match
    reasons: list[str] = []
    for candidate in candidates:
        try:
            return _route_on(candidate, local, remote, config, interfaces)
        except DeviceError as error:
            if len(candidates) == 1:
                raise
            reasons.append(f"{candidate.name}: {error}")
    raise DeviceError("no device reaches the peer:\n" + "\n".join(reasons))


def _no_device(wanted: str | None, found: list[Device]) -> str:
    if wanted:
        have = ", ".join(device.name for device in found) or "none"
        return f"no RDMA device {wanted!r} on this machine (there are: {have})"
    switched_off = " and usroce is switched off (AIORDMA_USROCE=0)" if usroce_is_off() else ""
    return f"no RDMA device on this machine{switched_off}; `python -m aiordma doctor` says how to get one"


def _route_on(
    device: Device,
    local: Address | None,
    remote: Address | None,
    config: Config,
    interfaces: dict[str, list[Address]],
) -> Route:
    if device.transport is Transport.IWARP:
        raise DeviceError(f"{device.name} speaks iWARP, whose queue pairs only rdma_cm can connect")
    adapter = acquire_adapter(device, config)
    try:
        choice = choose_gid(
            adapter.context.ports(),
            adapter.context.gids(),
            local=local,
            remote=remote,
            interfaces=interfaces,
            port=config.port,
            gid_index=config.gid_index,
        )
    except DeviceError as error:
        adapter.release()
        if device.is_usroce and local is not None:
            raise DeviceError(f"{error}\n{_usroce_fix(adapter.context.name, local)}") from None
        raise
    except Exception:
        adapter.release()
        raise
    return Route(adapter, choice)


def _usroce_fix(name: str, local: Address) -> str:
    return (
        f"{name} has the addresses it was given only, by default those of loopback. So that other machines "
        f"reach it: AIORDMA_USROCE_ADDRESS={local} or Config(usroce_address={str(local)!r})"
    )


def acquire_adapter(device: Device, config: Config) -> Adapter:
    """The running loop's adapter for ``device``, opened if need be, in use once more."""
    adapters = _adapters.setdefault(asyncio.get_running_loop(), {})
    options = _usroce_options(config) if device.is_usroce else {}
    key = (device.name, tuple(options.items()))
    adapter = adapters.get(key)
    if adapter is None:
        if options:
            with usroce.options(**options):
                context = device.open()
        else:
            context = device.open()
        adapter = adapters[key] = Adapter(context, config, key)
    return adapter.use()


def _usroce_options(config: Config) -> dict[str, str]:
    """What the configuration says of the usroce device; equal for equal ones."""
    options = {}
    if config.usroce_address:
        options["address"] = _plain(config.usroce_address)
    if config.usroce_shared_memory is not None:
        options["shm"] = "1" if config.usroce_shared_memory else "0"
    return options


def _plain(addresses: str) -> str:
    """Equal for equal lists of addresses, however written."""
    return ",".join(str(ipaddress.ip_address(word.strip())) for word in addresses.split(","))
