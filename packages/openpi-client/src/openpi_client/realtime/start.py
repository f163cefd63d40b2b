"""From where the robot is to where the policy begins, slowly."""

import math

import numpy as np

# Peak speed of the curve below, over its mean speed.
_PEAK = 1.5


class BlendedStart:
    """A cubic with zero speed at both ends: what PCHIP makes of two points."""

    def __init__(self, pose: np.ndarray, target: np.ndarray, num_ticks: int, max_step: np.ndarray) -> None:
        """
        Args:
            pose: float64[width], measured, as a command.
            target: float64[width], the policy's first row.
            num_ticks: how long it takes; longer if `max_step` would be exceeded.
            max_step: float64[width], per tick; infinity for no bound.
        """
        self._pose, self._target = pose, target
        needed = _PEAK * np.abs(target - pose) / max_step
        self.num_ticks = max(1, num_ticks, math.ceil(needed.max()) if len(needed) else 0)
        self._tick = 0

    @property
    def is_over(self) -> bool:
        return self._tick >= self.num_ticks

    def next(self) -> np.ndarray:
        """The next command, [width]; the last one is the target."""
        self._tick = min(self._tick + 1, self.num_ticks)
        share = self._tick / self.num_ticks
        weight = share * share * (3 - 2 * share)
        return (1 - weight) * self._pose + weight * self._target
