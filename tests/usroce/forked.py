"""A process that forks with an open device; test_lifecycle.py reads what it prints.

The child tries everything on what it inherited, which must be refused and harm nothing, and then opens the device
anew; the parent goes on meanwhile and afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import pytest

from aiordma._native import ffi
from aiordma.errors import DeviceError, WrongLoopError
from aiordma.verbs import (
    CompletionQueue,
    Context,
    ProtectionDomain,
    SendFlags,
    WrOpcode,
    open_device,
    usroce,
)
from aiordma.verbs.provider import USROCE_LIBRARY
from tests.usroce.ends import End

#: Functions that take a device and give an object, and their further arguments.
MAKERS: dict[str, tuple[int | None, ...]] = {
    "ibv_alloc_pd": (),
    "ibv_create_comp_channel": (),
    "ibv_create_cq": (10, None, None, 0),
}


def main() -> None:
    with open_device("usroce0") as context:
        end = End(context)
        end.connect(end.card())
        end.write(b"before", 100)
        child = os.fork()
        if child == 0:
            try:
                in_child(context, end)
            except BaseException as error:
                print(f"child: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        end.write(b"meanwhile", 200)
        _, status = os.waitpid(child, 0)
        end.write(b"after", 300)
        assert (
            bytes(end.memory[100:106] + end.memory[200:209] + end.memory[300:305]) == b"beforemeanwhileafter"
        )
        assert end.read(5, 300, local=400) == b"after"
    assert status == 0, status
    print("right")


def in_child(context: Context, end: End) -> None:
    refused_in_python(context, end)
    refused_by_the_device(end)
    refused_in_c(int(ffi.cast("uintptr_t", context._handle)))
    end.context.close()  # forgets the handle, and does not touch the parent's device
    with open_device("usroce0") as own:
        again = End(own)
        again.connect(again.card())
        again.write(b"anew", 10)
        assert again.memory[10:14] == b"anew"


def refused_in_python(context: Context, end: End) -> None:
    """With a text that says why, and what to do."""
    attempts: list[Callable[[], object]] = [
        context.ports,
        lambda: ProtectionDomain(context),
        lambda: CompletionQueue(context, 10),
        end.qp.query_state,
        lambda: end.qp.post_recv([(1, end.region.address, 8, end.region.lkey)]),
        lambda: usroce.counters(context),
    ]
    for attempt in attempts:
        with pytest.raises(WrongLoopError, match=r"after fork\(\) .*; open the device anew"):
            attempt()


def refused_by_the_device(end: End) -> None:
    """The hot path does not look at the process: the device does."""
    base, lkey, rkey = end.region.address, end.region.lkey, end.region.rkey
    rc = end.qp.post_send(1, WrOpcode.RDMA_WRITE, SendFlags.SIGNALED, base, 8, lkey, base + 64, rkey)
    assert rc == errno.ENODEV, rc
    attempts: list[Callable[[], None]] = [end.cq.arm, lambda: end.qp.post_recv_one(1, base, 8, lkey)]
    for attempt in attempts:
        with pytest.raises(DeviceError) as caught:
            attempt()
        assert caught.value.errno == errno.ENODEV
    with pytest.raises(DeviceError):  # ibv_poll_cq(3) says no more than that it failed
        end.cq.poll()


def refused_in_c(context: int) -> None:
    """As a C program would see it."""
    library = ctypes.CDLL(USROCE_LIBRARY, use_errno=True)
    handle = ctypes.c_void_p(context)
    room = ctypes.create_string_buffer(4096)
    assert library.ibv_query_device(handle, room) == errno.ENODEV
    assert library.ibv_close_device(handle) == errno.ENODEV
    for name, *arguments in (
        ("ibv_alloc_pd",),
        ("ibv_create_comp_channel",),
        ("ibv_create_cq", 10, None, None, 0),
    ):
        make = getattr(library, name)
        make.restype = ctypes.c_void_p
        ctypes.set_errno(0)
        assert make(handle, *arguments) is None, name
        assert ctypes.get_errno() == errno.ENODEV, name
    assert library.ibv_get_async_event(handle, room) == -1
    assert ctypes.get_errno() == errno.ENODEV


if __name__ == "__main__":
    main()
