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
from collections.abc import Callable
from typing import Any, Protocol

from ._native._datapath import Grant, Region
from .adapter import Adapter
from .errors import ConnectionLostError, DeviceError, MisuseError, RemoteBoundsError
from .mr_pool import Lease
from .verbs import Access, MemoryRegion, MemoryWindow, QueuePair

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


class Announcer(Protocol):
    """The part of the session that tells the peer about regions."""

    def send_share(self, name: str, address: int, length: int, rkey: int, access: list[str]) -> None:
        """Announces a region."""

    def send_unshare(self, name: str) -> None:
        """Takes the announcement back."""


class Host(Protocol):
    """What a connection offers to the regions it shares."""

    @property
    def session(self) -> Announcer | None: ...

    @property
    def queue_pair(self) -> QueuePair: ...

    def special(self, kind: str, post: Callable[[int], None]) -> asyncio.Future[Any]: ...

    async def wait_closed(self) -> None: ...


class SharedRegion:
    """A region of ours that the peer of one connection may use; ended by :meth:`revoke`."""

    __slots__ = (
        "access",
        "announced",
        "bound",
        "ended",
        "ending",
        "lease",
        "name",
        "region",
        "shares",
        "window",
    )

    def __init__(self, shares: Shares, name: str, access: Access, region: MemoryRegion, lease: Lease) -> None:
        self.shares = shares
        self.name = name
        self.access = access
        self.region = region
        self.window: MemoryWindow | None = None
        self.lease = lease
        self.bound = False  # the window's binding was posted
        self.announced = False  # the peer was told
        self.ended = False  # its end has begun
        self.ending: asyncio.Future[Any] | None = None  # the revocation of the window's key

    @property
    def rkey(self) -> int:
        """The key the peer uses."""
        return self.window.rkey if self.window else self.region.rkey

    async def revoke(self) -> None:
        """Ends the peer's access; when it returns, the device refuses the key."""
        await self.shares.end(self)

    def close(self) -> None:
        """Gives back window and registration; the window is not bound any more, or its queue pair is dead."""
        try:
            if self.window is not None:
                self.window.close()
        finally:
            self.region.close()
            self.lease.remove_user(self)


class Shares:
    """What one connection shares with its peer, by name."""

    def __init__(self, host: Host, adapter: Adapter) -> None:
        self._host = host
        self._adapter = adapter
        self._regions: dict[str, SharedRegion] = {}

    def __len__(self) -> int:
        return len(self._regions)

    async def share(self, name: str, lease: Lease, access: Access) -> None:
        """Registers, binds, announces: see Connection.share."""
        if not isinstance(lease, Lease) or lease.released:
            raise MisuseError("share() takes a lease from allocate() that was not released")
        if not (isinstance(name, str) and 1 <= len(name) <= 128 and name.isprintable()):
            raise MisuseError("the name of a region has 1 to 128 printable characters")
        if name in self._regions:
            raise MisuseError(f"{name!r} is shared on this connection already")
        shared = self._register(name, lease, access)
        try:
            if shared.window is not None:
                await self._bind(shared, shared.window)
        except BaseException:
            await self.end(shared)
            raise
        session = self._host.session
        if session is not None and not shared.ended:
            shared.announced = True
            session.send_share(name, lease.address, lease.nbytes, shared.rkey, access_words(access))

    def _register(self, name: str, lease: Lease, access: Access) -> SharedRegion:
        windows = self._adapter.attributes.memory_windows
        rights = Access.LOCAL_WRITE | (Access.MW_BIND if windows else access)
        region = MemoryRegion(self._adapter.pd, lease.address, lease.nbytes, rights)
        shared = SharedRegion(self, name, access, region, lease)
        try:
            if windows:
                shared.window = MemoryWindow(self._adapter.pd)
        except DeviceError:
            region.close()
            raise
        self._regions[name] = shared
        lease.add_user(shared)
        return shared

    async def _bind(self, shared: SharedRegion, window: MemoryWindow) -> None:
        lease = shared.lease

        def post(wr_id: int) -> None:
            if shared.ended:  # while it waited for a slot
                raise DeviceError(f"{shared.name!r} was unshared before its window was bound")
            self._host.queue_pair.post_bind(
                wr_id, window, shared.region, lease.address, lease.nbytes, shared.access
            )
            shared.bound = True

        # Shielded: a binding that was posted must complete, or its window could not be closed.
        await asyncio.shield(self._host.special("bind", post))

    async def unshare(self, name: str) -> None:
        """Ends the sharing of ``name``, if there is one."""
        shared = self._regions.get(name)
        if shared is not None:
            await self.end(shared)

    async def end(self, shared: SharedRegion) -> None:
        """Revokes the key, then gives back window and registration; any number of callers may wait for it."""
        shared.ended = True
        session = self._host.session
        if session is not None and shared.announced:
            shared.announced = False
            session.send_unshare(shared.name)
        if session is not None and shared.window is not None and shared.bound:
            await self._invalidate(shared, shared.window.rkey)
        if self._regions.get(shared.name) is shared:
            del self._regions[shared.name]
            shared.close()

    async def _invalidate(self, shared: SharedRegion, rkey: int) -> None:
        if shared.ending is None:  # once, however many callers: a second one would break the queue pair
            shared.ending = self._host.special(
                "invalidate", lambda wr_id: self._host.queue_pair.post_invalidate(wr_id, rkey)
            )
        try:
            await asyncio.shield(shared.ending)
        except ConnectionLostError:
            await self._host.wait_closed()  # the queue pair is gone then, and the window's key with it

    def close_windows(self) -> None:
        """A window bound to a queue pair holds it (rxe): the windows go before the queue pair."""
        for shared in self._regions.values():
            if shared.window is not None:
                shared.window.close()

    def close(self) -> None:
        """The queue pair is gone: nothing reaches the memory any more."""
        regions, self._regions = self._regions, {}
        for shared in regions.values():
            shared.close()


class RemoteRegion(Region):
    """A range of the peer's memory: ``len()``, and slices, which are bounds-checked ranges of it.

    Unlike a sequence's, a slice beyond the end is an error (:class:`RemoteBoundsError`), not a shorter range:
    what is written there must not be cut off in silence.
    """

    __slots__ = ()

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteRegion):
            return NotImplemented
        return (self.grant, self.offset, self.length) == (other.grant, other.offset, other.length)

    def __hash__(self) -> int:
        return hash((self.grant, self.offset, self.length))

    def __repr__(self) -> str:
        return f"<RemoteRegion {self.name!r} [{self.offset}:{self.offset + self.length}]>"

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


class Grants:
    """What the peer of one connection shares, by name, and who waits for a name."""

    def __init__(self) -> None:
        self._grants: dict[str, Grant] = {}
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def announce(self, grant: Grant) -> None:
        """The peer shares a region: wakes who waits for its name."""
        self._grants[grant.name] = grant
        for waiter in self._waiters.get(grant.name, ()):
            if not waiter.done():
                waiter.set_result(None)

    def withdraw(self, name: str) -> None:
        """The peer took a region back: operations on it are refused here from now on."""
        grant = self._grants.pop(name, None)
        if grant is not None:
            grant.revoked = True

    async def wait(self, name: str) -> RemoteRegion:
        """The region called ``name``, as soon as there is one."""
        while (grant := self._grants.get(name)) is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiters = self._waiters.setdefault(name, [])
            waiters.append(waiter)
            try:
                await waiter
            finally:
                waiters.remove(waiter)
                if not waiters:
                    self._waiters.pop(name, None)
        return RemoteRegion(grant, 0, grant.length)

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """The connection ended: everyone who waits gets an error of their own."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(make_error())
