"""Verbs as thin Python owners: no asyncio, no policy; usable on their own.

What usroce can do beyond verbs is in :mod:`aiordma.verbs.usroce`.

The names are those of ibv_*(3) in words. Objects hold their parents and close in the right order
(:mod:`aiordma.verbs.owner`); the calls that move data take and return plain integers.
"""

from .completion import CompletionChannel, CompletionQueue, WorkCompletion
from .device import (
    AsyncEvent,
    Context,
    Device,
    DeviceAttributes,
    GidEntry,
    PortAttributes,
    devices,
    open_device,
)
from .enums import (
    Access,
    EventType,
    GidType,
    LinkLayer,
    PortState,
    QpState,
    SendFlags,
    Transport,
    WcOpcode,
    WrOpcode,
)
from .memory import MemoryRegion, MemoryWindow, ProtectionDomain
from .owner import Owner
from .provider import Provider, provider, providers
from .queue_pair import RECV_WR_STRUCT, SEND_WR_STRUCT, Path, QueuePair, SharedReceiveQueue

__all__ = [
    "RECV_WR_STRUCT",
    "SEND_WR_STRUCT",
    "Access",
    "AsyncEvent",
    "CompletionChannel",
    "CompletionQueue",
    "Context",
    "Device",
    "DeviceAttributes",
    "EventType",
    "GidEntry",
    "GidType",
    "LinkLayer",
    "MemoryRegion",
    "MemoryWindow",
    "Owner",
    "Path",
    "PortAttributes",
    "PortState",
    "ProtectionDomain",
    "Provider",
    "QpState",
    "QueuePair",
    "SendFlags",
    "SharedReceiveQueue",
    "Transport",
    "WcOpcode",
    "WorkCompletion",
    "WrOpcode",
    "devices",
    "open_device",
    "provider",
    "providers",
]
