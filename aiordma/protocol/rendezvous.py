"""Rendezvous: how a message that is larger than a receive buffer gets across.

The sender offers it: an OFFER frame, which has a place among the other messages and uses a data credit, says
where the message lies. The receiver, when its user takes the message, reads it straight into where it is wanted
(RDMA READ) and answers DONE. Only then may the sender's memory be used for something else.

    sender                                      receiver
    pin, bind a window     OFFER ->             in the inbox, in its order
                                                taken: READs, several at a time
    revoke, unpin          <- DONE (read)       the message is there; its credit is owed

A sender that changes its mind before DONE withdraws the offer, over the bootstrap's TCP connection since that
is rare and needs no credit; it still has to wait for DONE, for the receiver may be reading. A receiver that is
reading goes on and delivers. The receiver's DONE says "withdrawn" once it has no read in flight that it started
before. So every offer ends with exactly one DONE, or with the connection.

DONE needs no credit either: for each offer under way its sender keeps one receive posted, which is why the number
of offers under way is limited (``rendezvous_depth``, the smaller of both sides).

Small parts of a message travel in the offer itself. Layout of an OFFER's payload, network byte order::

    0      transfer   u32   number of the offer, growing (modulo 2**32), gaps allowed
    4      segments   u16   1 or more
    6      reserved   u16   0
    8      total      u64   length of the message
    16     segments times 24 bytes:
           rkey       u32   0 for an inline segment
           inline     u32   1: the bytes are in this frame; 0: in the sender's memory
           address    u64   0 for an inline segment
           length     u64   1 or more
    then   the bytes of the inline segments, one after the other

and of a DONE's: transfer u32, status u32 (0 read, 1 withdrawn).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import MisuseError, ProtocolError

_OFFER = struct.Struct("!IHHQ")
_SEGMENT = struct.Struct("!IIQQ")
_DONE = struct.Struct("!II")
_WRAP = 1 << 32
_U64 = 1 << 64

#: Payload of a DONE frame, in bytes.
DONE_SIZE = _DONE.size
#: The smallest payload of an OFFER frame.
MIN_OFFER_SIZE = _OFFER.size + _SEGMENT.size
#: A part up to this length travels in the offer when there is room: reading it would cost a round trip.
INLINE_PART = 1024


class Answer(enum.IntEnum):
    """What DONE says."""

    READ = 0
    WITHDRAWN = 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of an offered message: in the sender's memory, or with ``data`` in the offer."""

    length: int
    address: int = 0
    rkey: int = 0
    data: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A message that waits to be read."""

    transfer: int
    nbytes: int
    segments: tuple[Segment, ...]


# --- frames -------------------------------------------------------------------------------------------


def plan(lengths: Sequence[int], room: int) -> list[bool]:
    """Which parts of a message go inline, for an offer of at most ``room`` bytes: the first small ones that fit.

    Raises :class:`MisuseError` when there are more parts than an offer can name.
    """
    left = room - _OFFER.size - len(lengths) * _SEGMENT.size
    if left < 0:
        raise MisuseError(
            f"a message of {len(lengths)} parts: when it is larger than eager_size, at most "
            f"{(room - _OFFER.size) // _SEGMENT.size} (join small ones, or raise Config(eager_size=...))"
        )
    inline = []
    for length in lengths:
        fits = length <= min(left, INLINE_PART)
        left -= length if fits else 0
        inline.append(fits)
    return inline


def encode_offer(transfer: int, segments: Sequence[Segment]) -> bytes:
    """The payload of an OFFER frame."""
    total = sum(segment.length for segment in segments)
    table = [_OFFER.pack(transfer, len(segments), 0, total)]
    for segment in segments:
        table.append(_SEGMENT.pack(segment.rkey, segment.data is not None, segment.address, segment.length))
    return b"".join([*table, *(segment.data for segment in segments if segment.data is not None)])


def decode_offer(payload: bytes, max_message: int) -> Offer:
    """The offer in a frame of the peer. Raises :class:`ProtocolError` for one that cannot be."""
    if len(payload) < MIN_OFFER_SIZE:
        raise ProtocolError(f"offer of {len(payload)} bytes, at least {MIN_OFFER_SIZE} are due")
    transfer, count, reserved, total = _OFFER.unpack_from(payload)
    at = _OFFER.size + count * _SEGMENT.size
    if reserved or not count or at > len(payload):
        raise ProtocolError(f"offer of {count} segments in {len(payload)} bytes")
    segments = []
    for index in range(count):
        rkey, inline, address, length = _SEGMENT.unpack_from(payload, _OFFER.size + index * _SEGMENT.size)
        if inline > 1 or not length or address + length > _U64 or (inline and (rkey or address)):
            raise ProtocolError(f"offer with an impossible segment: {length} bytes at {address:#x}")
        data = payload[at : at + length] if inline else None
        if data is not None and len(data) < length:
            raise ProtocolError("offer that ends before its inline bytes do")
        at += length if inline else 0
        segments.append(Segment(length, address, rkey, data))
    if at != len(payload) or total != sum(segment.length for segment in segments):
        raise ProtocolError(f"offer of {total} bytes whose segments say otherwise")
    if total > max_message:
        raise ProtocolError(f"the peer offers a message of {total} bytes, the limit is {max_message}")
    return Offer(transfer, total, tuple(segments))


def encode_done(transfer: int, answer: Answer) -> bytes:
    """The payload of a DONE frame."""
    return _DONE.pack(transfer, answer)


def decode_done(payload: bytes | memoryview) -> tuple[int, Answer]:
    """Transfer and answer of a DONE frame. Raises :class:`ProtocolError`."""
    transfer, answer = _DONE.unpack(payload)
    if answer not in (Answer.READ, Answer.WITHDRAWN):
        raise ProtocolError(f"done frame with unknown answer {answer}")
    return transfer, Answer(answer)


# --- the sender's side --------------------------------------------------------------------------------


class SendState(enum.Enum):
    """How far an offer of ours has come."""

    WAITING = "waiting"  # for credit, slot and binding: the peer knows nothing
    OFFERED = "offered"
    WITHDRAWN = "withdrawn"  # the peer was told, and has not answered
    REVOKING = "revoking"  # the peer may not read any more; the device is being told
    ENDED = "ended"


class SendEvent(enum.Enum):
    """What happens to it."""

    POSTED = "posted"  # the offer went to the device
    ABANDONED = "abandoned"  # cancelled, or it cannot be posted
    ANSWERED = "answered"  # DONE
    REVOKED = "revoked"


_S, _E = SendState, SendEvent
SEND_TABLE: dict[tuple[SendState, SendEvent], SendState] = {
    (_S.WAITING, _E.POSTED): _S.OFFERED,
    (_S.WAITING, _E.ABANDONED): _S.REVOKING,
    (_S.OFFERED, _E.ABANDONED): _S.WITHDRAWN,
    (_S.OFFERED, _E.ANSWERED): _S.REVOKING,
    (_S.WITHDRAWN, _E.ABANDONED): _S.WITHDRAWN,
    (_S.WITHDRAWN, _E.ANSWERED): _S.REVOKING,
    (_S.REVOKING, _E.ABANDONED): _S.REVOKING,
    (_S.REVOKING, _E.REVOKED): _S.ENDED,
    (_S.ENDED, _E.ABANDONED): _S.ENDED,
}


def next_send_state(state: SendState, event: SendEvent) -> SendState:
    """The row of the table; :class:`ProtocolError` when there is none (the peer answers what it was not asked)."""
    try:
        return SEND_TABLE[state, event]
    except KeyError:
        raise ProtocolError(f"rendezvous: {event.value} while {state.value}") from None


# --- the receiver's side ------------------------------------------------------------------------------


class Taking:
    """One offer of the peer: who reads it, and whether the peer still wants it read."""

    __slots__ = ("offer", "reads", "taken", "withdrawn")

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.taken = False  # a receive is reading it
        self.reads = 0  # in flight, those of an abandoned receive included
        self.withdrawn = False


class TakerLedger:
    """The peer's offers that were not answered yet. Each method says what it makes due."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._open: dict[int, Taking] = {}
        self._early: set[int] = set()  # withdrawn before the offer was seen: TCP may be faster
        self._last: int | None = None

    def __len__(self) -> int:
        return len(self._open)

    def arrived(self, offer: Offer) -> Taking | None:
        """An offer; None when it was withdrawn already: answer it and forget it.

        Raises :class:`ProtocolError` for one too many, or a number that does not grow.
        """
        if len(self._open) >= self._depth:
            raise ProtocolError(f"more than {self._depth} offers under way")
        if not self._is_new(offer.transfer):
            raise ProtocolError(f"offer {offer.transfer} after offer {self._last}")
        self._last = offer.transfer
        if offer.transfer in self._early:
            self._early.remove(offer.transfer)
            return None
        taking = self._open[offer.transfer] = Taking(offer)
        return taking

    def _is_new(self, transfer: int) -> bool:
        return self._last is None or 0 < (transfer - self._last) % _WRAP < _WRAP // 2

    def withdraw(self, transfer: int) -> Taking | None:
        """The peer takes its offer back; the offer, when it is in the inbox and should leave it.

        When it has no reads in flight then, the answer is due: :meth:`answer_due`.
        """
        taking = self._open.get(transfer)
        if taking is None:
            if self._is_new(transfer):
                if len(self._early) >= self._depth:
                    raise ProtocolError(f"more than {self._depth} offers withdrawn before they came")
                self._early.add(transfer)
            return None
        taking.withdrawn = True
        return None if taking.taken else taking

    def put_back(self, taking: Taking) -> bool:
        """The receive was abandoned: True when the offer goes back to the head of the inbox; else it was withdrawn
        in the meantime, and ends when its reads have."""
        taking.taken = False
        return not taking.withdrawn

    def answer_due(self, taking: Taking) -> bool:
        """True when a withdrawn offer, which nobody takes, can be answered: nothing reads it any more."""
        return taking.withdrawn and not taking.taken and not taking.reads

    def answered(self, taking: Taking) -> None:
        """DONE goes out."""
        del self._open[taking.offer.transfer]
