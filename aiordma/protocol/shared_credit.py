"""One pool of receives for many peers: who may have how many of them.

The pool has ``count`` receives, each of them posted or with a message in it that its user has not taken. Every
peer keeps a share: its control window, a receive for the answer to an offer of ours, and a window of data
credits (protocol/credit.py) between a minimum, which it always has, and a maximum. The rest goes to those who
use it:

- A peer of which a whole window of messages is taken within BUSY_WITHIN seconds gets twice the window. (One that
  only sends, to a user who does not take, has what it has.)
- When nothing is left, the pool is enlarged, up to ``limit`` receives beyond what the minima need; then credits
  are taken back from a peer that has not got through its window for BUSY_WITHIN seconds, the longest idle first,
  down to its minimum. When nobody is idle, a peer that has twice as much as the one that asks gives up half of
  the difference.
- When nobody can give anything, that is taken to be so for LOOK_EVERY seconds.
- Who asks waits its turn; nobody waits to send because of it, for a share is never below the minimum.

Never more granted than posted. ``reserved``, the sum of all shares, never exceeds ``count``. Of a window,
``received - released`` receives have a message in them, and at most the others may still be used by the peer
(credit.py). So what peers may still send is at most ``reserved`` less the receives that have a message in them,
and posted are ``count`` less those: never fewer. Taking from one and giving to another keeps it so, because a
window has shrunk only when the peer was not told, or has given the credits up.

No clock and no queue here: ``now`` (seconds, monotonic) comes in, what is to be done goes out as actions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ..errors import MisuseError
from .credit import CreditLedger

#: Seconds. Who uses up a window in less is busy, who does not for as long is idle.
BUSY_WITHIN = 0.25
#: Seconds. When nobody could give anything, so long nobody is asked again: a thousand that are all busy would each
#: look for more with every window.
LOOK_EVERY = 0.001
#: How many shares are looked at to find a very large one, or a very small one.
_LOOK_AT = 8


class Share:
    """What one peer has of the pool.

    The owner sets ``ledger`` as soon as there is one; its window is the share's then. Its ``mark`` is the count of
    messages taken (``data_released``) at which :meth:`SharedCredits.used` is due.
    """

    __slots__ = ("_ledger", "control", "marked_at", "maximum", "minimum", "offers")

    def __init__(self, minimum: int, maximum: int, control: int, now: float) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.control = control
        self.offers = 1
        self._ledger: CreditLedger | None = None
        self.marked_at = now

    @property
    def ledger(self) -> CreditLedger | None:
        """The books of the connection; None until its handshake is over."""
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: CreditLedger) -> None:
        self._ledger = ledger
        ledger.mark = self.minimum

    @property
    def window(self) -> int:
        """Data credits, those of messages that were not taken yet included."""
        return self._ledger.window if self._ledger is not None else self.minimum

    @property
    def reserved(self) -> int:
        """Receives of the pool that are this peer's."""
        return self.window + self.control + self.offers


@dataclass(frozen=True, slots=True)
class Grown:
    """The peer has a larger window: a credit frame may be due."""

    share: Share


@dataclass(frozen=True, slots=True)
class Recall:
    """Ask the peer to give ``count`` credits back."""

    share: Share
    count: int


@dataclass(frozen=True, slots=True)
class Enlarge:
    """Post some receives more, ``count`` if possible, and say so: :meth:`SharedCredits.enlarged`; 0 if there is no
    memory."""

    count: int


Action = Grown | Recall | Enlarge


class SharedCredits:
    """The books of one pool. ``limit``: receives beyond what the minima need, for those who use them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.reserved = 0
        self.recalls = 0  # asked for, since the start
        self.vain = 0  # looks for somebody who could give, since the start, that found nobody
        self._minima = 0
        self._shares: set[Share] = set()
        self._wanting: dict[Share, int] = {}  # in turn: how many more each would like
        self._grown: dict[Share, None] = {}  # above the minimum and without a recall, by marked_at
        self._look_at = -math.inf  # not before

    def __len__(self) -> int:
        return len(self._shares)

    @property
    def spare(self) -> int:
        """Receives that are nobody's."""
        return self.count - self.reserved

    @property
    def waiting(self) -> int:
        """How many peers could use more than there is."""
        return len(self._wanting)

    # --- coming and going ----------------------------------------------------------------------------

    def missing(self, minimum: int, control: int) -> int:
        """How many receives must be posted before another peer can :meth:`join`."""
        return max(0, minimum + control + 1 - self.spare)

    def join(self, minimum: int, maximum: int, control: int, now: float) -> Share:
        """A share for one peer more."""
        if not 1 <= minimum <= maximum:
            raise MisuseError(f"a share of {minimum} to {maximum} credits")
        if self.missing(minimum, control):
            raise MisuseError("not enough receives are posted")
        share = Share(minimum, maximum, control, now)
        self._shares.add(share)
        self._minima += share.reserved
        self.reserved += share.reserved
        return share

    def leave(self, share: Share, kept: int, now: float) -> list[Action]:
        """The peer is gone, its queue pair takes no receive any more. ``kept`` receives stay with messages of it:
        they come back by :meth:`enlarged`."""
        self._shares.remove(share)
        self._wanting.pop(share, None)
        self._grown.pop(share, None)
        self._minima -= share.minimum + share.control + 1
        self.reserved -= share.reserved
        self.count -= kept
        return self._serve(now)

    def enlarged(self, count: int, now: float) -> list[Action]:
        """``count`` receives more are posted; with 0, what :class:`Enlarge` asked for cannot be."""
        self.count += count
        return self._serve(now, may_enlarge=count > 0)

    # --- giving and taking ---------------------------------------------------------------------------

    def used(self, share: Share, now: float) -> list[Action]:
        """The user has taken as many messages of the peer as the ledger's ``mark`` says."""
        ledger = share.ledger
        assert ledger is not None
        window = ledger.window
        busy = now - share.marked_at < BUSY_WITHIN
        ledger.mark = ledger.data_released + window
        share.marked_at = now
        if share in self._grown:
            del self._grown[share]
            self._grown[share] = None
        if not busy or window >= share.maximum:
            return []
        self._wanting.setdefault(share, min(window, share.maximum - window))
        return self._serve(now)

    def returned(self, share: Share, count: int, now: float) -> list[Action]:
        """The peer gave ``count`` credits back; its ledger knows already."""
        self.reserved -= count
        self._file(share)
        return self._serve(now, may_recall=False)

    def more_offers(self, share: Share) -> bool:
        """One receive more for the answer to an offer of ours, if one is spare."""
        if self.spare <= 0:
            return False
        share.offers += 1
        self.reserved += 1
        return True

    def fewer_offers(self, share: Share, now: float) -> list[Action]:
        """One receive less; one is always left."""
        share.offers -= 1
        self.reserved -= 1
        return self._serve(now)

    def _file(self, share: Share) -> None:
        """Among those who can give, or not."""
        assert share.ledger is not None
        if share.window > share.minimum and not share.ledger.asked:
            self._grown.setdefault(share, None)
        else:
            self._grown.pop(share, None)

    def _serve(self, now: float, *, may_enlarge: bool = True, may_recall: bool = True) -> list[Action]:
        """Gives what is spare to those who want more; does something for the first that gets nothing."""
        actions: list[Action] = []
        while self._wanting and self.spare > 0:
            share = self._neediest()
            want = self._wanting.pop(share)
            self._grow(share, min(want, self.spare, share.maximum - share.window))
            actions.append(Grown(share))
        if self._wanting and now >= self._look_at:
            asker = self._neediest()
            want = self._wanting[asker]
            room = self._minima + self.limit - self.count
            if may_enlarge and room > 0:
                actions.append(Enlarge(min(want, room)))
            elif may_recall:
                actions += self._take_back(asker, want, now)
        return actions

    def _neediest(self) -> Share:
        """Of those who have waited longest, the one that has least."""
        return min(itertools.islice(self._wanting, _LOOK_AT), key=lambda share: share.window)

    def _grow(self, share: Share, count: int) -> None:
        assert share.ledger is not None
        share.ledger.grow(count)
        share.ledger.mark = share.ledger.data_released + share.window
        self.reserved += count
        self._file(share)

    def _take_back(self, asker: Share, want: int, now: float) -> list[Action]:
        victim, count = self._victim(asker, want, now)
        if victim is None:
            self._wanting[asker] = self._wanting.pop(asker)  # others are looked at next time
            self._look_at = now + LOOK_EVERY
            self.vain += 1
            return []
        assert victim.ledger is not None
        del self._grown[victim]
        at_once = victim.ledger.shrink(count)
        self.reserved -= at_once
        asked = victim.ledger.recall(count - at_once)
        self._file(victim)  # at the end, should it have nothing to give
        actions: list[Action] = []
        if asked:
            self.recalls += 1
            actions.append(Recall(victim, asked))
        if at_once:
            actions += self._serve(now, may_recall=False)
        return actions

    def _victim(self, asker: Share, want: int, now: float) -> tuple[Share | None, int]:
        """Whom to take from, and how many."""
        largest: Share | None = None
        for number, share in enumerate(self._grown):
            if share is asker:
                continue
            if now - share.marked_at >= BUSY_WITHIN:
                return share, share.window - share.minimum
            if number >= _LOOK_AT:
                break
            if share.window >= 2 * asker.window and (largest is None or share.window > largest.window):
                largest = share
        if largest is None:
            return None, 0
        return largest, min(want, (largest.window - asker.window) // 2, largest.window - largest.minimum)


__all__ = ["BUSY_WITHIN", "LOOK_EVERY", "Action", "Enlarge", "Grown", "Recall", "Share", "SharedCredits"]
