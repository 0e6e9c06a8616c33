"""Nobody reaches more than was shared, with whom it was shared, as long as it is shared.

What the Python side refuses by itself is tested in test_operations.py. Here the requester cheats: its grants are
forged, so that the refusal must come from the peer's device, at the caller, with nothing written.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aiordma import Connection, Lease, RemoteRegion
from aiordma._native._datapath import Grant
from aiordma.errors import ConnectionLostError, RdmaError, RemoteAccessError, RemoteInvalidRequestError
from aiordma.send_queue import FETCH_ADD
from tests.device.conftest import MakePair, Pair

pytestmark = pytest.mark.device


def forge(remote: RemoteRegion, connection: Connection, **changes: Any) -> RemoteRegion:
    fields = {name: getattr(remote.grant, name) for name in ("name", "address", "length", "rkey", "rights")}
    grant = Grant(connection, **{**fields, **changes})
    return RemoteRegion(grant, 0, grant.length)


async def refused(both: Pair, remote: RemoteRegion, lease: Lease, operation: str = "write") -> None:
    """The operation is refused by the peer's device, and nothing was written."""
    before = bytes(lease)
    with pytest.raises((RemoteAccessError, RemoteInvalidRequestError)) as caught:
        if operation == "write":
            await both.client.write(b"intruder", remote[: min(8, len(remote))])
        elif operation == "read":
            await both.client.read(remote)
        else:
            await both.client.fetch_add(remote[:8], 1)
    assert caught.value.opcode == operation
    assert caught.value.peer == both.client.peer
    if isinstance(caught.value, RemoteAccessError):
        assert isinstance(caught.value, PermissionError)
    assert bytes(lease) == before
    with pytest.raises(ConnectionLostError):
        await both.server.recv()


async def alive(pair: MakePair, both: Pair) -> Pair:
    """Another connection of the same peer."""
    return await pair()


@pytest.mark.parametrize("operation", ["write", "read", "atomic"])
@pytest.mark.parametrize("where", ["behind", "before", "across"])
async def test_out_of_bounds(pair: MakePair, operation: str, where: str) -> None:
    both, other = await pair(), await pair()
    neighbour = await both.server.allocate(4096)
    lease, remote = await both.region(4096)
    behind = await both.server.allocate(4096)
    shift = {"behind": 4096, "before": -8, "across": 4092}[where]
    if operation == "atomic" and where == "across":
        shift = 4096 - 8 + 8
    length = 8
    forged = forge(remote, both.client, address=remote.address + shift, length=length)
    memory = (bytes(neighbour), bytes(behind))
    await refused(both, forged, lease, {"atomic": "fetch_add"}.get(operation, operation))
    assert (bytes(neighbour), bytes(behind)) == memory
    await other.client.send(b"lives on")
    assert await other.server.recv() == b"lives on"


@pytest.mark.parametrize(
    ("given", "operation"),
    [
        ("read", "write"),
        ("read", "fetch_add"),
        ("write", "read"),
        ("write", "fetch_add"),
        ("atomic", "read"),
        ("atomic", "write"),
    ],
)
async def test_beyond_the_rights_given(pair: MakePair, given: str, operation: str) -> None:
    both, other = await pair(), await pair()
    lease, remote = await both.region(64, access=given)
    full = (await other.region(8))[1].grant.rights
    await refused(both, forge(remote, both.client, rights=full), lease, operation)
    await other.client.send(b"lives on")
    assert await other.server.recv() == b"lives on"


@pytest.mark.parametrize("how", ["unshare", "release"])
async def test_revoked(pair: MakePair, how: str) -> None:
    both = await pair()
    lease, remote = await both.region(64)
    await both.client.write(b"welcome", remote[:7])
    if how == "unshare":
        await both.server.unshare(remote.name)
        watched = lease
    else:
        await lease.release()
        watched = await both.server.allocate(64)  # the same memory, now for somebody else
        assert watched.address == lease.address
    await refused(both, forge(remote, both.client), watched)


async def test_a_key_opens_nothing_on_another_connection(pair: MakePair) -> None:
    both, other = await pair(), await pair()
    if not both.server._adapter.attributes.memory_windows:
        pytest.skip("the device has no type-2 memory windows: keys are valid in the whole protection domain")
    lease, remote = await both.region(64)
    await refused(other, forge(remote, other.client), lease)
    await both.client.write(b"mine still", remote[:10])
    assert bytes(lease)[:10] == b"mine still"


async def test_sharing_again_and_again_gives_new_keys(pair: MakePair) -> None:
    both = await pair()
    lease = await both.server.allocate(64)
    keys = set()
    for i in range(20):
        await both.server.share(f"round {i}", lease, "read|write")
        remote = await both.client.remote(f"round {i}")
        keys.add(remote.grant.rkey)
        await both.client.write(b"%02d" % i, remote[:2])
        await both.server.unshare(f"round {i}")
    assert len(keys) == 20
    assert bytes(lease)[:2] == b"19"
    stats = both.server.statistics()
    assert stats.shared == 0
    await lease.release()


async def test_a_lease_shared_on_two_connections_is_revoked_on_both(pair: MakePair) -> None:
    both, other = await pair(), await pair()
    lease = await both.server.allocate(64)
    for each in (both, other):
        await each.server.share("common", lease)
        await each.client.write(b"hello", (await each.client.remote("common"))[:5])
    await lease.release()
    for each in (both, other):
        assert each.server.statistics().shared == 0


async def test_a_misaligned_atomic_that_slipped_through_is_refused_below(pair: MakePair) -> None:
    """fetch_add() refuses it first; libibverbs or the peer's device refuse it too, and nobody hangs."""
    both = await pair()
    lease, remote = await both.region(64)
    operation = both.client._operation("fetch_add", FETCH_ADD, 8)
    both.client._aim(operation, remote[4:12])
    operation.compare_add = 1
    with pytest.raises(RdmaError):
        async with asyncio.timeout(20):
            await both.client._sends.submit(operation)
    assert bytes(lease) == bytes(64)
    await both.client.wait_closed()
