"""Time for a control loop: monotonic or virtual, and ticks at absolute deadlines.

tick      0        1        2        3        4
deadline  t0       t0+dt    t0+2dt   t0+3dt   t0+4dt      never moved: an error of one tick is not passed on
                   |sleep.|spin|
"""

import math
import time
from typing import Callable, Dict, NamedTuple

from typing_extensions import Protocol

from openpi_client import freshness

# Sleeping ends up to this much too late on Linux; the rest of the wait is spun.
_SPIN_S = 1e-3
# A loop that skips more than so many of the ticks of so long moves its robot visibly slower than it was trained for.
_SKIPPED, _WINDOW_S = 0.1, 5.0


class Clock(Protocol):
    """Seconds that never step back; not the time of day, which is set now and then."""

    def now_s(self) -> float: ...

    def sleep_until(self, time_s: float) -> None: ...


class MonotonicClock:
    """The clock of real robots."""

    def now_s(self) -> float:
        return freshness.now_s()

    def sleep_until(self, time_s: float) -> None:
        left_s = time_s - self.now_s() - _SPIN_S
        if left_s > 0:
            time.sleep(left_s)
        while self.now_s() < time_s:
            pass


class VirtualClock:
    """Moves only when somebody sleeps: a loop in a simulator or a test runs as fast as it can, always the same."""

    def __init__(self, start_s: float = 0.0, on_advance: Callable[[float], None] = lambda seconds: None) -> None:
        """
        Args:
            on_advance: called with the seconds that pass, after each move: where a simulator steps its world. Were
                that done in `Robot.apply`, an observation would show what the row of its tick has done, and each chunk
                would be played a row too early.
        """
        self._now_s = start_s
        self._on_advance = on_advance

    def now_s(self) -> float:
        return self._now_s

    def sleep_until(self, time_s: float) -> None:
        seconds = time_s - self._now_s
        if seconds > 0:
            self._now_s = time_s
            self._on_advance(seconds)

    def advance(self, seconds: float) -> None:
        """Time that something takes."""
        self.sleep_until(self._now_s + seconds)


class Tick(NamedTuple):
    """One tick of the loop.

    Attributes:
        number: from 0; ticks that were skipped have theirs.
        late_s: how long after its deadline it began.
        skipped: ticks before this one that never came.
    """

    number: int
    late_s: float
    skipped: int


class Pacer:
    """Waits for the ticks of a fixed rate. What is more than a period late is skipped: no bursts to catch up."""

    def __init__(self, clock: Clock, rate_hz: float) -> None:
        self._clock = clock
        self._period_s = 1 / rate_hz
        self._start_s = clock.now_s()
        self._next = 0

    def wait(self) -> Tick:
        """Returns when the next tick begins."""
        behind = (self._clock.now_s() - self._start_s) / self._period_s - self._next
        skipped = math.ceil(behind) if behind > 1 else 0
        deadline_s = self._start_s + (self._next + skipped) * self._period_s
        self._clock.sleep_until(deadline_s)
        late_s = self._clock.now_s() - deadline_s
        slept_through = int(late_s / self._period_s)  # its process was suspended, say
        skipped += slept_through
        tick = Tick(self._next + skipped, late_s - slept_through * self._period_s, skipped)
        self._next = tick.number + 1
        return tick


class TickBudget:
    """Whether what is done in the ticks fits into them. A row is played per tick that comes, so each that is skipped
    slows the robot down."""

    def __init__(self, rate_hz: float) -> None:
        self._rate_hz = rate_hz
        self._begin()

    def _begin(self) -> None:
        self._num_ticks = self._num_skipped = 0
        self._longest_s: Dict[str, float] = {}

    def took(self, what: str, seconds: float) -> None:
        self._longest_s[what] = max(seconds, self._longest_s.get(what, 0.0))

    def problem(self, tick: Tick) -> str:
        """What to tell when many of the last ticks were skipped; '' = they were not, or it is too early to say."""
        skipped = tick.skipped if tick.skipped < self._rate_hz else 0  # of a loop that stood still it is told otherwise
        self._num_ticks += 1 + skipped
        self._num_skipped += skipped
        if self._num_ticks < _WINDOW_S * self._rate_hz:
            return ""
        found, period_ms = "", 1e3 / self._rate_hz
        if self._num_skipped > _SKIPPED * self._num_ticks:
            parts = ", ".join(f"{what} took up to {1e3 * seconds:.0f} ms" for what, seconds in self._longest_s.items())
            found = (
                f"{self._num_skipped} of {self._num_ticks} ticks were skipped, and the robot moves so much slower: a "
                f"tick has {period_ms:.3g} ms, {parts}. They must not wait; if they do not, the machine is busy "
                "(priority=True)"
            )
        self._begin()
        return found
