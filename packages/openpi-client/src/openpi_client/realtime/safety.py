"""What the control loop does when something is wrong."""

import dataclasses
import math
from typing import Optional

from openpi_client.deadline import check_seconds
from openpi_client.realtime.limits import Limits


@dataclasses.dataclass(frozen=True)
class Safety:
    """
    Attributes:
        max_age_s: a row is not played when its observation is older; None = as long as a chunk lasts.
        hold_after_ticks: ticks without a row that count as a hold in the log; the robot holds from the first on.
        stop_after_s: of holding, until the robot counts as stopped: `on_stop` is called, and it only moves again
            through a blended start.
        blend_s: how long the way from the measured pose to the first row takes, at least; 0 = none.
        speed: 0.25 plays at a quarter of the recorded speed, for a first run.
        limits: of commands; None = those of the server's contract.
        frozen_after_s: see `CameraWatch`; None = pictures are not compared.
        accept_warnings: start although the server finds the first observation suspicious, such as a joint far outside
            the training data.
        max_failures: answers in a row that are errors of the policy, or of no use, that end the episode; or
            observations in a row that end in a ConnectionError or TimeoutError.
    """

    max_age_s: Optional[float] = None
    hold_after_ticks: int = 2
    stop_after_s: float = 1.0
    blend_s: float = 5.0
    speed: float = 1.0
    limits: Optional[Limits] = None
    frozen_after_s: Optional[float] = 0.5
    accept_warnings: bool = False
    max_failures: int = 5

    def __post_init__(self) -> None:
        for name in ("max_age_s", "stop_after_s", "blend_s", "frozen_after_s"):
            value, may_be_none = getattr(self, name), name in ("max_age_s", "frozen_after_s")
            check_seconds(name, value)
            if (value is None and not may_be_none) or (value is not None and not math.isfinite(value)):
                least = "seconds, or None" if may_be_none else "seconds"
                raise ValueError(f"{name} is {value}; expected {least}")
        if self.max_age_s == 0:
            raise ValueError("max_age_s is 0, so nothing would ever be played; expected more, or None for one chunk")
        if not 0 < self.speed <= 1:
            raise ValueError(f"speed is {self.speed}; expected more than 0, at most 1")
        for name in ("hold_after_ticks", "max_failures"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number, at least 1")

    def ticks(self, seconds: float, rate_hz: float) -> int:
        return math.ceil(seconds * rate_hz - 1e-9)
