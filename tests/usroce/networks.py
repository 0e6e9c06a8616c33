"""Network namespaces that a test makes, joined by virtual Ethernet: two hosts alike, or this one and another.

Needs root and iproute2. Everything is gone after the `with` block.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_serial = itertools.count()


@dataclass(frozen=True)
class Side:
    """One end of the cable. `namespace` None is where the test itself is."""

    namespace: str | None
    interface: str
    ipv4: str
    ipv6: str


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (ip)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with namespace():
            return None
    except RuntimeError as error:
        return str(error)


def ip(*arguments: str, namespace: str | None = None) -> None:
    """Runs ip(8). Raises RuntimeError with what it says."""
    run("ip", *(["-n", namespace] if namespace else []), *arguments)


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespace() -> Iterator[str]:
    name = f"aiordma-{os.getpid()}-{next(_serial)}"
    ip("netns", "add", name)
    try:
        ip("link", "set", "lo", "up", namespace=name)
        yield name
    finally:
        ip("netns", "delete", name)


@contextlib.contextmanager
def cable(first: str | None, second: str | None, *, mtu: int = 1500) -> Iterator[tuple[Side, Side]]:
    """Joins two namespaces; None is the present one."""
    number = next(_serial)
    names = [f"ar{os.getpid() % 1_000_000}-{number}{end}" for end in "ab"]
    net = f"10.72.{number % 256}", f"fd72:{number:x}:"
    spaces = (first, second)
    sides = [
        Side(space, name, f"{net[0]}.{end}", f"{net[1]}:{end}")
        for end, (space, name) in enumerate(zip(spaces, names, strict=True), start=1)
    ]
    ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    try:
        for side in sides:
            plug(side, mtu)
        yield sides[0], sides[1]
    finally:
        ip("link", "delete", names[0], namespace=first)


def plug(side: Side, mtu: int) -> None:
    """Puts an end where it belongs, with its addresses, and starts it."""
    if side.namespace:
        ip("link", "set", side.interface, "netns", side.namespace)
    inside = side.namespace
    ip("link", "set", side.interface, "mtu", str(mtu), namespace=inside)
    ip("address", "add", f"{side.ipv4}/24", "dev", side.interface, namespace=inside)
    ip("address", "add", f"{side.ipv6}/64", "dev", side.interface, "nodad", namespace=inside)
    ip("link", "set", side.interface, "up", namespace=inside)


def gid(address: str) -> str:
    """The GID of an address, as sysfs prints it."""
    number = ipaddress.ip_address(address)
    text = f"::ffff:{number}" if number.version == 4 else address
    return ipaddress.IPv6Address(text).exploded
