"""Credits: why a send never meets a peer without a posted receive.

Each side keeps ``window`` receives for data frames (messages, offers, notifications, returns) and ``control`` more
for credit frames, all alike, in a receive queue of the connection's own or in one that many connections share
(protocol/shared_credit.py). It tells the peer two ever-growing limits: how many data frames and how many control
frames the peer may have sent since the start. A sender counts what it sent and stops at the limit, so what is in
flight never exceeds what is posted; rnr_retry=0 turns a mistake here into a dead queue pair.

- The data limit grows when the *user* takes a message (its buffer is posted again): a slow receiver slows its
  sender. The control limit grows when a credit frame was handled, which needs no user.
- Both limits ride on every frame. A notification carries none: its 32 bits belong to the user.
- When nothing else goes out, a credit frame is due when (a) half the window is owed, or (b) the peer is known to
  have used up all it was told (so anything helps), or (c) half of the control window is owed. The last control
  credit is not spent on (a).

The window may change, up to the most that the handshake announced; the limits never fall.

- It grows whenever its owner likes; what that adds to the limit is owed, and told, like any other credit.
- It shrinks by what was not told yet, which the peer never notices, and by what the peer gives back. A *recall*
  asks for credits. It is a mere wish and may take any way (the bootstrap's TCP connection). The answer is a
  RETURN frame on the queue pair: a data frame like any other (so it needs a credit, one of those it returns)
  that says how many more credits its sender gives up. The sender counts itself as having *sent* that many
  frames, the receiver as having received and released them, and takes as many off its window. So the limit,
  window + released, stays where it is, every stamp in flight is as valid as before, and because the frame has
  its place in the order of the queue pair, both sides count the same frames at the same point of it. A recall on
  its way or never answered changes nothing.
- What the receiver must expect is ``data_told - data_received``. At most ``window - (received - released)``, since
  told <= window + released; a return lowers it by what was given up, and one more, its own frame.
- A stamp from before the window grew is lower than what follows, and so valid. The highest that can be true is
  what was sent plus the announced maximum: released <= received <= sent.

No deadlock. Let everything be delivered and taken, and A's users be unable to send for want of credit, while B
has no control credit to tell A of more (else (b) makes B do so). B's last K credit frames b1..bK are without
acknowledgement as far as B knows, so A handled them after A's last frame with a stamp; A owes B K control
credits, and can only fail to send a credit frame by (c) when its own last K, a1..aK, are without acknowledgement
too. Thus A sent a1..aK without having handled any of b1..bK, nor any credit frame before them (B could send
b1..bK only after A's stamps before a1 had acknowledged those), and B likewise. So no a2..aK was due by (c), and
aK, which took the last control credit, was due by (b): B had sent all the data frames that A had told it of up
to there, with those that a2 told of, when A sent aK (K is 3 at least; each but a1 told of some). But B sent them
after handling a2, that is after bK, and frames arrive in order: A would have handled b1..bK before aK, a
contradiction. How the windows grew and shrank meanwhile plays no part. tests/protocol/test_credit.py searches
every order of events for small windows.

Counters are plain integers here and modulo 2**32 on the wire.
"""

from __future__ import annotations

from .._native._ledger import Ledger
from ..errors import MisuseError, ProtocolError

#: Receives reserved for credit frames.
CONTROL_WINDOW = 4

#: What the proof above needs. With 2, one credit frame would also make the next one due, for ever.
MIN_CONTROL_WINDOW = 3


class CreditLedger(Ledger):
    """The books of one side of a connection. Every method is called in the order things happen there.

    ``peer_window`` and ``peer_control`` are the receives the peer has for us at first, ``window`` and ``control``
    those here, all counted in frames. ``peer_window_max`` is what the peer's window may grow to, by default as
    large as it is.

    What moves with each frame is in native/datapath/ledger.c; here is the rest.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        window: int,
        peer_window: int,
        peer_window_max: int = 0,
        control: int = CONTROL_WINDOW,
        peer_control: int = CONTROL_WINDOW,
    ) -> None:
        if min(window, peer_window, control, peer_control) < 1:
            raise MisuseError("every window is at least 1 frame")
        if min(control, peer_control) < MIN_CONTROL_WINDOW:
            raise MisuseError(f"a control window has at least {MIN_CONTROL_WINDOW} frames")
        super().__init__()
        self.window = window
        self.asked = 0  # credits that we recalled and that are not answered for
        self.control = control
        self.peer_window_max = max(peer_window, peer_window_max)
        self.peer_control = peer_control
        # What we may send, and did.
        self.data_limit = peer_window
        self.data_sent = 0
        self.control_limit = peer_control
        self.control_sent = 0
        # What the peer sent, what the user took, and the limits the peer was last told.
        self.data_received = 0
        self.data_released = 0
        self.control_received = 0
        self.data_told = window
        self.control_told = control

    # --- sending -------------------------------------------------------------------------------------

    def send_control(self) -> None:
        """Takes a control credit; the caller has seen that there is one."""
        if self.control_sent >= self.control_limit:
            raise MisuseError("no control credit")
        self.control_sent += 1

    # --- receiving -----------------------------------------------------------------------------------

    def receive_control(self) -> None:
        """A credit frame arrived, and its receive was posted again. Raises :class:`ProtocolError`
        when the peer had no credit for it."""
        self.control_received += 1
        if self.control_received > self.control_told:
            raise ProtocolError(
                f"peer sent credit frame {self.control_received} with credit for {self.control_told}"
            )

    # --- another window ------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """``count`` receives more are kept for the peer. Look at :meth:`update_due` then."""
        self.window += count

    def shrink(self, count: int) -> int:
        """Up to ``count`` receives less, of what the peer was not told; returns how many. At least 1 is left."""
        untold = self.window + self.data_released - self.data_told
        count = max(0, min(count, untold, self.window - 1 - self.asked))
        self.window -= count
        return count

    def recall(self, count: int) -> int:
        """Asks the peer for up to ``count`` credits that it does not use; returns how many to ask for.

        0 when it has none as far as is known, when the window would be less than 1, or while an earlier recall has
        no answer.
        """
        if self.asked:
            return 0
        self.asked = max(0, min(count, self.data_told - self.data_received, self.window - 1))
        return self.asked

    def receive_return(self, count: int) -> None:
        """A RETURN frame arrived, and its receive was posted again: the peer gives up ``count`` credits.

        Raises :class:`ProtocolError` for more than were recalled, or than it had. Look at :meth:`update_due` then.
        """
        if not self.asked or count > self.asked:
            raise ProtocolError(f"peer returns {count} credits, {self.asked} were asked for")
        self.asked = 0
        if self.data_received + 1 + count > self.data_told:
            raise ProtocolError(
                f"peer returns {count} credits, it has {self.data_told - self.data_received} with the frame's own"
            )
        self.data_received += 1 + count
        self.data_released += 1 + count
        self.window -= count

    def give_back(self, count: int, reserved: int) -> int:
        """We send a RETURN frame; returns how many credits it gives up: at most ``count``, none that is
        ``reserved``. The caller has seen that there is one for the frame itself."""
        self.send_data()
        count = max(0, min(count, self.data_credits - reserved))
        self.data_sent += count
        return count
