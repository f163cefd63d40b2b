"""How long the next answer will take, in ticks."""

import math
from collections import deque
from typing import Deque, Iterable, Optional, Tuple

# One slow answer must not count forever. Ten, because the paper's five are beaten by more than the margin once in some
# 55 answers of 200 +- 50 ms at 50 Hz, and a chunk that was made for fewer rows is thrown away.
_WINDOW = 10
_MARGIN = 1  # tick


class DelayForecast:
    """From the last few delays, as in the paper on real-time chunking (arXiv 2506.07339): their maximum, and a margin.

    Delays are counted in ticks of the loop, from the tick of the observation to the tick that got the answer.
    """

    def __init__(self, initial: int, *, cap: Optional[int] = None, delays: Iterable[int] = ()) -> None:
        """
        Args:
            initial: ticks, at least, until the window is full: the maximum of few is no bound.
            cap: ticks at most.
            delays: measured before, oldest first.
        """
        self._initial = initial
        self._cap = math.inf if cap is None else cap
        self._delays: Deque[int] = deque(delays, maxlen=_WINDOW)

    def record(self, ticks: int, *, is_first: bool) -> None:
        """A measured delay; the first on a connection is no measure, since servers compile then."""
        if not is_first:
            self._delays.append(ticks)

    @property
    def delays(self) -> Tuple[int, ...]:
        """Those in the window, oldest first."""
        return tuple(self._delays)

    @property
    def ticks(self) -> int:
        """The forecast, at least 1."""
        forecast = max(self._delays, default=0) + _MARGIN
        if len(self._delays) < _WINDOW:
            forecast = self._initial if not self._delays else max(forecast, self._initial)
        return int(max(1, min(self._cap, forecast)))
