"""What users hand in as data: anything with the buffer protocol, or DLPack, as a flat view of its bytes."""

from __future__ import annotations

from typing import Any

from .errors import MisuseError

_EMPTY = memoryview(b"")
_EMPTY_WRITABLE = memoryview(bytearray())
_DLPACK_CPU = 1  # kDLCPU, dlpack.h


def bytes_view(data: Any, *, writable: bool = False) -> memoryview:
    """The object's memory as a flat view of bytes, without a copy. Raises :class:`MisuseError`.

    Arrays of other libraries that have no buffer protocol (or none for their element type) come through DLPack,
    which takes numpy; they must be in the memory of this machine.
    """
    if data.__class__ is bytes and not writable:
        return memoryview(data)  # the most frequent kind, and never anything but flat and contiguous
    try:
        view = _flat(memoryview(data), writable)
    except (TypeError, ValueError, BufferError) as error:
        view = _array_view(data, error, writable)
    if writable and view.readonly:
        raise MisuseError(f"a writable buffer is needed, not a read-only {type(data).__name__}")
    return view


def _flat(view: memoryview, writable: bool) -> memoryview:
    if not view.contiguous:
        raise ValueError("the buffer is not contiguous")
    if view.format == "B" and view.ndim == 1:
        return view
    if not view.nbytes:  # an array with a zero in its shape cannot be cast
        return _EMPTY_WRITABLE if writable else _EMPTY
    return view.cast("B")


def _array_view(data: Any, error: Exception, writable: bool) -> memoryview:
    """An array whose memory the buffer protocol does not show."""
    try:
        if hasattr(data, "__dlpack__"):
            return _through_numpy(data, writable)
    except ImportError:
        raise MisuseError(f"{type(data).__name__} comes through DLPack, which needs numpy") from None
    except (TypeError, ValueError, BufferError, RuntimeError) as problem:
        error = problem
    raise MisuseError(
        "a contiguous buffer object (bytes, bytearray, memoryview, numpy array, lease, ...) or an array with "
        f"DLPack is needed, not {type(data).__name__}: {error}"
    ) from None


def _through_numpy(data: Any, writable: bool) -> memoryview:
    import numpy

    if not isinstance(data, numpy.ndarray):
        kind, _ = data.__dlpack_device__()
        if kind != _DLPACK_CPU:
            raise BufferError(f"it is on a device (DLPack type {int(kind)}): copy it to the host first")
        data = numpy.from_dlpack(data)
    if not data.flags.c_contiguous:
        raise BufferError("the array is not C-contiguous")
    return _flat(memoryview(data.reshape(-1).view(numpy.uint8)), writable)
