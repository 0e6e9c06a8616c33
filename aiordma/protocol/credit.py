"""Credits: why a send never meets a peer without a posted receive.

Each side posts ``window`` receives for data frames (messages and notifications) and ``control`` more for credit
frames, all alike, in one receive queue. It tells the peer two ever-growing limits: how many data frames and how
many control frames the peer may have sent since the start. A sender counts what it sent and stops at the limit,
so what is in flight never exceeds what is posted; rnr_retry=0 turns a mistake here into a dead queue pair.

- The data limit grows when the *user* takes a message (its buffer is posted again): a slow receiver slows its
  sender. The control limit grows when a credit frame was handled, which needs no user.
- Both limits ride on every frame. A notification carries none: its 32 bits belong to the user.
- When nothing else goes out, a credit frame is due as soon as half the window is owed, or the peer is known to
  have used up all it was told (so anything helps), or half of the control window is owed.

No deadlock. A credit frame needs a control credit, and those come back only with frames of the peer. Let all K
credit frames of A be unacknowledged for ever. Each told B of at least one more data frame, and the second and
later ones were due only after B had used earlier grants, that is, after B had handled earlier credit frames; B
then owes at least K/2 control credits and has a credit frame due itself, which it can only fail to send when
all of its K are unacknowledged too. For that, each side's last credit frame must have been sent before the
other's first was handled, though the later ones of each were caused by handling earlier ones: a contradiction
as soon as K exceeds the credit frames that one window can cause without an answer, window/(window/2) + 1 = 3.
tests/protocol/test_credit.py checks it, by search over every order of events for small windows.

Counters are plain integers here and modulo 2**32 on the wire.
"""

from __future__ import annotations

from ..errors import MisuseError, ProtocolError

#: Receives reserved for credit frames; the proof above needs more than 3.
CONTROL_WINDOW = 4

#: With 2, one credit frame would make the next one due, for ever.
MIN_CONTROL_WINDOW = 3

_WRAP = 1 << 32


class CreditLedger:
    """The books of one side of a connection. Every method is called in the order things happen there.

    ``peer_window`` and ``peer_control`` are the receives the peer has posted for us, ``window`` and ``control``
    those posted here, all counted in frames.
    """

    __slots__ = (
        "_control",
        "_window",
        "control_limit",
        "control_received",
        "control_sent",
        "control_told",
        "data_limit",
        "data_received",
        "data_released",
        "data_sent",
        "data_told",
        "peer_control",
        "peer_window",
    )

    def __init__(
        self,
        *,
        window: int,
        peer_window: int,
        control: int = CONTROL_WINDOW,
        peer_control: int = CONTROL_WINDOW,
    ) -> None:
        if min(window, peer_window, control, peer_control) < 1:
            raise MisuseError("every window is at least 1 frame")
        if min(control, peer_control) < MIN_CONTROL_WINDOW:
            raise MisuseError(f"a control window has at least {MIN_CONTROL_WINDOW} frames")
        self._window = window
        self._control = control
        self.peer_window = peer_window
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

    @property
    def data_credits(self) -> int:
        """How many data frames may be sent now."""
        return self.data_limit - self.data_sent

    @property
    def control_credits(self) -> int:
        """How many credit frames may be sent now."""
        return self.control_limit - self.control_sent

    def send_data(self) -> None:
        """Takes a data credit; the caller has seen that there is one."""
        if self.data_sent >= self.data_limit:
            raise MisuseError("no data credit")
        self.data_sent += 1

    def send_control(self) -> None:
        """Takes a control credit; the caller has seen that there is one."""
        if self.control_sent >= self.control_limit:
            raise MisuseError("no control credit")
        self.control_sent += 1

    def stamp(self) -> tuple[int, int]:
        """The two limits for the header of the frame that goes out now, modulo 2**32."""
        self.data_told = self._window + self.data_released
        self.control_told = self._control + self.control_received
        return self.data_told % _WRAP, self.control_told % _WRAP

    # --- receiving -----------------------------------------------------------------------------------

    def receive_data(self) -> None:
        """A data frame arrived. Raises :class:`ProtocolError` when the peer had no credit for it."""
        self.data_received += 1
        if self.data_received > self.data_told:
            raise ProtocolError(f"peer sent data frame {self.data_received} with credit for {self.data_told}")

    def receive_control(self) -> None:
        """A credit frame arrived, and its receive was posted again. Errors as :meth:`receive_data`."""
        self.control_received += 1
        if self.control_received > self.control_told:
            raise ProtocolError(
                f"peer sent credit frame {self.control_received} with credit for {self.control_told}"
            )

    def learn(self, data: int, control: int) -> bool:
        """Takes in the limits of a received header; True when the data limit rose.

        Raises :class:`ProtocolError` for limits that the peer cannot have: they never fall, and never exceed
        what was sent plus the peer's window.
        """
        data_rise = (data - self.data_limit) % _WRAP
        control_rise = (control - self.control_limit) % _WRAP
        if self.data_limit + data_rise > self.data_sent + self.peer_window:
            raise ProtocolError(
                f"peer grants {data_rise} data credits more, {self.data_credits} are left of {self.peer_window}"
            )
        if self.control_limit + control_rise > self.control_sent + self.peer_control:
            raise ProtocolError(
                f"peer grants {control_rise} control credits more, {self.control_credits} are left of "
                f"{self.peer_control}"
            )
        self.data_limit += data_rise
        self.control_limit += control_rise
        return data_rise > 0

    def release(self) -> None:
        """The user took a message or notification, and its receive was posted again."""
        if self.data_released >= self.data_received:
            raise MisuseError("more released than received")
        self.data_released += 1

    # --- when nothing else goes out ------------------------------------------------------------------

    def update_due(self) -> bool:
        """True when a credit frame should go out now (and may)."""
        if self.control_sent >= self.control_limit:
            return False
        owed = self._window + self.data_released - self.data_told
        if owed > 0 and (owed >= (self._window + 1) // 2 or self.data_received == self.data_told):
            return True
        return self._control + self.control_received - self.control_told >= (self._control + 1) // 2
