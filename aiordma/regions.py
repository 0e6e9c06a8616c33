"""Memory shared between peers: what we let the peer into, and what the peer lets us into.

A region is shared with one connection, with the rights asked for and no more. Where the device has type-2
memory windows, the key is that of a window bound to the connection's queue pair: it opens nothing on any other
connection, and one work request revokes it. The window lies over a registration of exactly the shared bytes,
not over the pool's slab: kernel rxe checks a remote access against the bounds of the registration below a
window, not against those of the window (rxe_resp.c, check_rkey), and a neighbour's lease must not be reachable
on any device. Without windows the registration itself carries the rights; its key is then valid on every
connection of the protection domain, so it is unpredictable only as far as the device makes it so.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import MisuseError, RemoteBoundsError
from .verbs import Access, MemoryRegion, MemoryWindow

if TYPE_CHECKING:
    from .mr_pool import Lease
    from .transport import Connection

ACCESS_WORDS = {
    "read": Access.REMOTE_READ,
    "write": Access.REMOTE_WRITE,
    "atomic": Access.REMOTE_ATOMIC,
}


def parse_access(words: str) -> Access:
    """``"read|write|atomic"`` (any of them, in any order) as flags. Raises :class:`MisuseError`."""
    access = Access.NONE
    for word in words.split("|"):
        flag = ACCESS_WORDS.get(word.strip())
        if flag is None:
            raise MisuseError(f"access {words!r}: any of {', '.join(ACCESS_WORDS)}, joined by |")
        access |= flag
    return access


def access_words(access: Access) -> list[str]:
    """The flags as words."""
    return [word for word, flag in ACCESS_WORDS.items() if access & flag]


class SharedRegion:
    """A region of ours that the peer of one connection may use; ended by :meth:`revoke`."""

    __slots__ = (
        "access",
        "announced",
        "bound",
        "connection",
        "ended",
        "ending",
        "lease",
        "name",
        "region",
        "window",
    )

    def __init__(
        self, connection: Connection, name: str, access: Access, region: MemoryRegion, lease: Lease
    ) -> None:
        self.connection = connection
        self.name = name
        self.access = access
        self.region = region
        self.window: MemoryWindow | None = None
        self.lease = lease
        self.bound = False  # the window's binding was posted
        self.announced = False  # the peer was told
        self.ended = False  # unshare() was called
        self.ending: asyncio.Future[None] | None = None  # the revocation of the window's key

    @property
    def rkey(self) -> int:
        """The key the peer uses."""
        return self.window.rkey if self.window else self.region.rkey

    async def revoke(self) -> None:
        """Ends the peer's access; when it returns, the device refuses the key."""
        await self.connection.unshare(self.name)

    def close(self) -> None:
        """Gives back window and registration; the window is not bound any more, or its queue pair is dead."""
        try:
            if self.window is not None:
                self.window.close()
        finally:
            self.region.close()
            self.lease.remove_user(self)


@dataclass(slots=True)
class Grant:
    """What the peer announced under a name."""

    connection: Any
    name: str
    address: int
    length: int
    rkey: int
    rights: int  # REMOTE_* flags of Access
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A range of the peer's memory: ``len()``, and slices, which are bounds-checked ranges of it.

    Unlike a sequence's, a slice beyond the end is an error (:class:`RemoteBoundsError`), not a shorter range:
    what is written there must not be cut off in silence.
    """

    grant: Grant = field(repr=False)
    offset: int
    length: int

    @property
    def name(self) -> str:
        """The name the peer shared it under."""
        return self.grant.name

    @property
    def address(self) -> int:
        """Virtual address of the first byte, on the peer."""
        return self.grant.address + self.offset

    @property
    def access(self) -> str:
        """The rights the peer gave, as share() takes them."""
        return "|".join(access_words(Access(self.grant.rights)))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> RemoteRegion:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise MisuseError("a remote region is sliced with [start:stop], without a step")
        start = self._bound(part.start, 0)
        stop = self._bound(part.stop, self.length)
        if start > stop:
            raise RemoteBoundsError(
                f"slice [{start}:{stop}] of remote region {self.name!r} ends before it starts"
            )
        return RemoteRegion(self.grant, self.offset + start, stop - start)

    def _bound(self, value: int | None, default: int) -> int:
        if value is None:
            return default
        index = value + self.length if value < 0 else value
        if not 0 <= index <= self.length:
            raise RemoteBoundsError(
                f"index {value} lies outside remote region {self.name!r} of {self.length} bytes"
            )
        return index

    def check(self, connection: Any, nbytes: int, right: int, what: str) -> None:
        """Raises :class:`MisuseError` when ``what`` cannot be done here: found before anything is sent.

        ``right`` is one of the REMOTE_* flags of :class:`Access`, as an integer: flag arithmetic on enumerations
        costs as much as posting does.
        """
        grant = self.grant
        if (
            grant.connection is connection
            and nbytes <= self.length
            and grant.rights & right
            and not grant.revoked
        ):
            return
        if grant.connection is not connection:
            raise MisuseError(f"{what}: remote region {self.name!r} belongs to another connection")
        if nbytes > self.length:
            raise RemoteBoundsError(
                f"{what} of {nbytes} bytes does not fit remote region {self.name!r} of {self.length} bytes"
            )
        if grant.revoked:
            raise MisuseError(f"{what}: the peer has revoked {self.name!r}")
        raise MisuseError(
            f"{what}: the peer shared {self.name!r} for {self.access or 'nothing'}, not for "
            f"{'|'.join(access_words(Access(right)))}"
        )
