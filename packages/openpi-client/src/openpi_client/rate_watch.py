"""Whether a loop keeps its rate, counted from its ticks."""

import time
from typing import Callable, Optional

# A rate is counted over so long at least; single slow steps, such as compiling, are not a rate.
_WINDOW_S = 2.0
# By how much it may differ.
_TOLERANCE = 0.05


class RateWatch:
    """Tells once when the rate is not held, and what it is."""

    def __init__(
        self,
        rate_hz: float,
        *,
        pause_s: Optional[float] = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            pause_s: when nothing happened for so long, somebody paused, and counting starts anew; None = it counts.
        """
        self._rate_hz = rate_hz
        self._pause_s = pause_s
        self._clock_s = clock_s
        self._has_told = False
        self.restart()

    def restart(self) -> None:
        """An episode begins."""
        self._start_s: Optional[float] = None
        self._count = 0
        self._last_s = 0.0

    def tick(self) -> Optional[float]:
        """Call once per tick; returns the rate in Hz, once, if it is not the one that was wanted."""
        now_s = self._clock_s()
        if self._start_s is None or (self._pause_s is not None and now_s - self._last_s > self._pause_s):
            self._start_s, self._count = now_s, 0
        else:
            self._count += 1
        self._last_s = now_s
        elapsed_s = now_s - self._start_s
        if self._has_told or elapsed_s < _WINDOW_S:
            return None
        rate_hz = self._count / elapsed_s
        self._start_s, self._count = now_s, 0
        if abs(rate_hz - self._rate_hz) <= _TOLERANCE * self._rate_hz:
            return None
        self._has_told = True
        return rate_hz

    def rest(self) -> None:
        """What takes long now is no pause of somebody else."""
        self._last_s = self._clock_s()
