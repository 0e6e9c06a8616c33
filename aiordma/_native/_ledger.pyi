class Ledger:
    """The counters of credits that move with each frame; see aiordma.protocol.credit."""

    window: int
    asked: int
    control: int
    peer_control: int
    peer_window_max: int
    data_limit: int
    data_sent: int
    control_limit: int
    control_sent: int
    data_received: int
    data_released: int
    control_received: int
    data_told: int
    control_told: int
    mark: int

    def __init__(self) -> None: ...
    @property
    def data_credits(self) -> int: ...
    @property
    def control_credits(self) -> int: ...
    def send_data(self) -> None: ...
    def stamp(self) -> tuple[int, int]: ...
    def receive_data(self) -> None: ...
    def learn(self, data: int, control: int, /) -> bool: ...
    def release(self) -> None: ...
    def update_due(self) -> bool: ...
