"""Frames on the queue pair: what stands in front of every message sent with SEND.

Little is needed, because the queue pair itself keeps order and length: the kind of frame, and the two credit
limits that ride on every frame. Layout, network byte order, 16 bytes::

    0      kind       u8    1 message, 2 credit, 3 offer, 4 done, 5 return
    1      flags      u8    0; a receiver refuses what it does not know
    2      reserved   u16   0
    4      length     u32   bytes that follow the header
    8      data       u32   data limit, modulo 2**32   (see protocol/credit.py)
    12     control    u32   control limit, modulo 2**32

Offers and their answers are in protocol/rendezvous.py. The payload of a return is one u32, the number of credits
that its sender gives up, its own not counted. A notification (RDMA WRITE WITH IMMEDIATE) has no frame: its 32 bits
are the user's.
"""

from __future__ import annotations

import enum
import struct

from ..errors import ProtocolError
from .rendezvous import DONE_SIZE

HEADER = struct.Struct("!BBHIII")
HEADER_SIZE = HEADER.size
RETURN = struct.Struct("!I")


class FrameKind(enum.IntEnum):
    """What a frame is."""

    MESSAGE = 1  # one message of the user; uses a data credit
    CREDIT = 2  # nothing but the limits in its header; uses a control credit
    OFFER = 3  # a message to be read from its sender's memory; uses a data credit
    DONE = 4  # the answer to an offer; its receive was kept for it
    RETURN = 5  # the answer to a recall: gives data credits up; uses a data credit


def check_header(kind: int, flags: int, reserved: int, length: int, received: int) -> None:
    """Raises :class:`ProtocolError` for a header that does not fit its frame of ``received`` bytes."""
    if flags or reserved:
        raise ProtocolError(f"frame with unknown flags {flags:#x}/{reserved:#x}")
    if length != received - HEADER_SIZE:
        raise ProtocolError(f"frame says {length} bytes, {received - HEADER_SIZE} arrived")
    if kind == FrameKind.CREDIT and length:
        raise ProtocolError(f"credit frame with {length} bytes of payload")
    if kind == FrameKind.DONE and length != DONE_SIZE:
        raise ProtocolError(f"done frame with {length} bytes of payload")
    if kind == FrameKind.RETURN and length != RETURN.size:
        raise ProtocolError(f"return frame with {length} bytes of payload")
    if not FrameKind.MESSAGE <= kind <= FrameKind.RETURN:
        raise ProtocolError(f"unknown frame kind {kind}")
