"""When to ask the policy, what to send, and how long its answers take."""

import itertools
import math
from typing import Callable, NamedTuple, Optional, Sequence

from openpi_client.base_policy import Observation
from openpi_client.realtime.delays import DelayForecast
from openpi_client.realtime.plan import Plan
from openpi_client.realtime.strategies import Strategy

# After a failure, before the next question; twice as long after two, and so on.
_RETRY_S = 0.1
# Of the questions of all episodes: an answer may come when its episode is over.
_numbers = itertools.count(1)


class Question(NamedTuple):
    """One that is on its way.

    Attributes:
        tick, asked_s: when its observation was made.
        start: position in the plan that the first row of its chunk belongs to.
        delay: rows that the chunk is made for, to be played before it comes.
        has_prefix: whether the rows that were still to be played went along.
        prompt: that was asked with.
    """

    number: int
    tick: int
    asked_s: float
    start: float
    delay: int
    has_prefix: bool
    prompt: str


class Questions:
    """One at a time.

    Attributes:
        pending: the one that is on its way.
        number: of the last one.
        last_start: of the newest chunk that was taken; None = there is none to go on from.
    """

    def __init__(
        self,
        strategy: Strategy,
        rate_hz: float,
        rows_per_tick: float,
        max_delay: Optional[int],
        recent_delays: Sequence[int] = (),
    ) -> None:
        """
        Args:
            max_delay: rows, that the server's model was trained for.
            recent_delays: ticks, of answers in the episode before.
        """
        self._strategy, self._rate_hz, self._rows_per_tick = strategy, rate_hz, rows_per_tick
        self._max_delay, self._recent_delays = max_delay, recent_delays
        self.pending: Optional[Question] = None
        self.number = 0
        self.last_start: Optional[float] = None
        self._not_before = 0  # tick
        self._told_prompt: Optional[str] = None  # in the log
        self.use_horizon(1)

    def use_horizon(self, horizon: int) -> None:
        """How many rows a chunk has."""
        self._horizon = horizon
        cap = None if self._max_delay is None else max(1, int(self._max_delay / self._rows_per_tick))
        initial = max(1, math.ceil(horizon / 4 / self._rows_per_tick)) if cap is None else cap
        self.forecast = DelayForecast(initial, cap=cap, delays=self._recent_delays)

    def is_due(self, plan: Plan, start: float, tick: int, *, fresh_s: float) -> bool:
        """Whether it is time to ask.

        Args:
            start: position that the first row of the new chunk would belong to.
            fresh_s: for how long rows of the newest chunk may still be played.
        """
        if self.pending is not None or tick < self._not_before:
            return False
        since = None if self.last_start is None else start - self.last_start
        left = min(plan.num_from(start), self._num_fresh(fresh_s))
        return self._strategy.is_due(num_left=left, since=since, horizon=self._horizon, delay=self._delay)

    def _num_fresh(self, fresh_s: float) -> int:
        """How many rows of a chunk can be played in this time, the present one included."""
        if fresh_s == -math.inf:
            return 0
        return max(0, math.floor(fresh_s * self._rate_hz * self._rows_per_tick + 1e-6) + 1)

    @property
    def _delay(self) -> int:
        """Rows that will be played before an answer comes."""
        return math.ceil(self.forecast.ticks * self._rows_per_tick - 1e-9)

    def ask(
        self,
        plan: Plan,
        start: float,
        tick: int,
        now_s: float,
        *,
        oldest_s: float,
        prompt: str,
        is_new_prompt: bool,
        record: Callable[..., None],
    ) -> Observation:
        """A question that begins at a position; what goes to the server beside the observation.

        Args:
            oldest_s: rows that were observed before are not sent; nor are those that will be too old when they are due.
            is_new_prompt: of what was planned for another prompt only those rows are sent that will be played anyway.
        """
        left = plan.left(start, oldest_s)[: self._num_fresh(plan.newest_s - oldest_s)]
        left = left[: self._delay] if is_new_prompt else left
        keys = self._strategy.keys(left, horizon=self._horizon, delay=self._delay)
        self.number = next(_numbers)
        delay = keys.get("inference_delay", self._delay)
        self.pending = Question(self.number, tick, now_s, start, delay, bool(keys), prompt)
        shown = {key: value for key, value in keys.items() if key != "prev_action_chunk"}
        if prompt not in (self._told_prompt, "None"):  # which is the server's own
            shown["prompt"] = self._told_prompt = prompt
        record("ask", chunk=self.number, left=len(left), **shown)
        return keys

    def answered(self) -> Question:
        """The question that was on its way, which now is not."""
        question, self.pending = self.pending, None
        assert question is not None
        return question

    def pause(self, tick: int, times: int = 1) -> None:
        """The next question comes later."""
        self._not_before = tick + math.ceil(_RETRY_S * times * self._rate_hz)
