"""RDMA for asyncio: ``await conn.write(data, remote)``, and the network card moves the bytes.

The package imports on a machine without RDMA, and without pydantic until the first connection; what is missing
is said when a device is asked for. See README.md for a first program.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import errors
from ._version import __version__
from .config import Config

if TYPE_CHECKING:
    from .connect import Server, connect, serve
    from .mr_pool import Lease
    from .regions import RemoteRegion
    from .streams import create_connection, create_server, open_connection, start_server
    from .transport import Batch, Connection
    from .verbs import devices

_LAZY = {
    "Batch": ".transport",
    "Connection": ".transport",
    "Lease": ".mr_pool",
    "RemoteRegion": ".regions",
    "Server": ".connect",
    "connect": ".connect",
    "create_connection": ".streams",
    "create_server": ".streams",
    "devices": ".verbs",
    "open_connection": ".streams",
    "serve": ".connect",
    "start_server": ".streams",
}

__all__ = [
    "Batch",
    "Config",
    "Connection",
    "Lease",
    "RemoteRegion",
    "Server",
    "__version__",
    "connect",
    "create_connection",
    "create_server",
    "devices",
    "errors",
    "open_connection",
    "serve",
    "start_server",
]


def __getattr__(name: str) -> Any:
    """Loads the public names when they are first used (PEP 562)."""
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value  # found without this function the next time
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Keeps ``aiordma.connect`` the function: importing the submodule of that name would bind the module."""

    @property
    def connect(self) -> Any:
        return __getattr__("connect")

    @connect.setter
    def connect(self, module: ModuleType) -> None:
        """What the import system does after loading aiordma/connect.py; not wanted."""


sys.modules[__name__].__class__ = _Package
