"""When to ask for the next chunk, and what becomes of the one that is being played.

    Synchronous          plays, holds while it asks, plays ...
    Receding             asks while it plays; the new chunk replaces the old one when it comes
    TemporalEnsembling   asks often; plays the weighted mean of all chunks that reach the present row
    GuidedRTC            as Receding; the server bends the new chunk onto the rows that are still to be played
    TrainedRTC           as Receding; the model was trained to go on from the rows that will have been played

Source: real-time chunking, arXiv 2506.07339 (guided) and 2512.05964 (trained); ensembling, arXiv 2304.13705.
"""

import dataclasses
import math
from typing import ClassVar, Mapping, Optional, Sequence, Tuple

import numpy as np

from openpi_client.base_policy import Observation

# An m of which the second weight is 0.
_ALONE = 1e3


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What all have in common.

    Attributes:
        execution_horizon: rows between two questions, at least; None = half a chunk.
    """

    execution_horizon: Optional[int] = None

    # What the server must be able to do; None = nothing.
    rtc_mode: ClassVar[Optional[str]] = None
    # Whether the robot holds while the server thinks.
    holds_while_asking: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.execution_horizon is not None and self.execution_horizon < 1:
            raise ValueError(f"execution_horizon is {self.execution_horizon}; expected at least 1 row")

    @property
    def name(self) -> str:
        return type(self).__name__

    def max_chunks(self, horizon: int) -> int:
        """How many chunks are played together."""
        return 1

    def rows_between(self, horizon: int, delay: int) -> int:
        """Rows from one question to the next: `execution_horizon`, in the bounds delay <= s <= horizon - delay of the
        paper. Where these leave nothing, the delay wins: one question at a time.
        """
        wanted = self.default_rows(horizon, delay) if self.execution_horizon is None else self.execution_horizon
        return max(min(wanted, horizon - delay), delay, 1)

    def default_rows(self, horizon: int, delay: int) -> int:
        """The `execution_horizon` where none is given."""
        return math.ceil(horizon / 2)

    def is_due(self, *, num_left: int, since: Optional[float], horizon: int, delay: int) -> bool:
        """Whether it is time to ask.

        Args:
            num_left: rows still to be played.
            since: rows played since the last question that was answered; None = none was.
            horizon: rows of a chunk.
            delay: rows that will be played before the answer comes.
        """
        return since is None or num_left <= delay or since >= self.rows_between(horizon, delay)

    def keys(self, left: np.ndarray, *, horizon: int, delay: int) -> Observation:
        """What goes to the server beside the observation.

        Args:
            left: [n, width], rows still to be played, from the present one on; as the robot takes them.
        """
        return {}

    def combine(self, rows: np.ndarray) -> np.ndarray:
        """[n, width], the rows of all chunks for one position, oldest first -> the action."""
        return rows[-1]


@dataclasses.dataclass(frozen=True)
class Synchronous(Strategy):
    """Plays `execution_horizon` rows (default: all), then holds until the next chunk is there."""

    holds_while_asking: ClassVar[bool] = True

    def rows_between(self, horizon: int, delay: int) -> int:
        return horizon if self.execution_horizon is None else min(self.execution_horizon, horizon)

    def is_due(self, *, num_left: int, since: Optional[float], horizon: int, delay: int) -> bool:
        return since is None or num_left == 0 or since >= self.rows_between(horizon, delay)


@dataclasses.dataclass(frozen=True)
class Receding(Strategy):
    """Asks while it plays, and changes to the new chunk when it comes: never waits, but jumps."""


@dataclasses.dataclass(frozen=True)
class TemporalEnsembling(Strategy):
    """Mean of all chunks that reach the present row, with weights exp(-m i), i = 0 for the oldest.

    Attributes:
        rate_of_inference: rows between two questions (if the answers come so fast).
        m: 0 weighs all alike; the larger, the less a new chunk changes.
    """

    rate_of_inference: int = 1
    m: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execution_horizon is not None:  # as the first argument of other strategies
            raise ValueError(
                f"execution_horizon is {self.execution_horizon}; ensembling asks every rate_of_inference rows: give "
                f"TemporalEnsembling(rate_of_inference={self.execution_horizon})"
            )
        if self.rate_of_inference < 1:
            raise ValueError(f"rate_of_inference is {self.rate_of_inference}; expected at least 1 row")
        if not math.isfinite(self.m):
            raise ValueError(f"m is {self.m}; expected a finite number")

    def max_chunks(self, horizon: int) -> int:
        return horizon + 1  # after late answers it asks sooner than every rate_of_inference rows

    def rows_between(self, horizon: int, delay: int) -> int:
        return self.rate_of_inference

    def combine(self, rows: np.ndarray) -> np.ndarray:
        behind = np.arange(len(rows))  # the chunk with the largest weight
        behind = behind if self.m >= 0 else behind[::-1]
        weights = np.exp(-min(abs(self.m), _ALONE) * behind)  # finite: 1 is among them
        return weights @ rows / weights.sum()


@dataclasses.dataclass(frozen=True)
class GuidedRTC(Strategy):
    """The server's model is guided, while it denoises, by the rows that are still to be played.

    Attributes:
        fallback: for servers that cannot.
    """

    fallback: Strategy = Receding()
    rtc_mode: ClassVar[Optional[str]] = "guided"

    def keys(self, left: np.ndarray, *, horizon: int, delay: int) -> Observation:
        if len(left) == 0:
            return {}
        return {
            "prev_action_chunk": left,
            "inference_delay": min(delay, len(left)),
            "execution_horizon": self.rows_between(horizon, delay),
        }


@dataclasses.dataclass(frozen=True)
class TrainedRTC(GuidedRTC):
    """The model goes on from the rows that will have been played when its answer comes.

    A chunk that came later than it was made for does not fit, and is thrown away.

    Attributes:
        max_discards: chunks thrown away in a row that end the episode.
    """

    max_discards: int = 5
    rtc_mode: ClassVar[Optional[str]] = "trained"

    def default_rows(self, horizon: int, delay: int) -> int:
        """So few that there is time for a second question before the rows are used up, if an answer is thrown away."""
        return min(math.ceil(horizon / 2), horizon - 2 * delay - 1)


def usable(strategy: Strategy, metadata: Mapping[str, object]) -> Tuple[Strategy, str]:
    """The strategy for a server with this metadata, and why it is another one; '' = it is not."""
    modes = _modes(metadata)
    if strategy.rtc_mode is None or strategy.rtc_mode in modes:
        return strategy, ""
    assert isinstance(strategy, GuidedRTC)
    known = {"guided": GuidedRTC, "trained": TrainedRTC}
    offered = [known[mode] for mode in modes if mode in known]
    other = offered[0](strategy.execution_horizon, strategy.fallback) if offered else strategy.fallback
    can = f"offers {', '.join(map(str, modes))}" if modes else "offers no real-time chunking"
    other, why = usable(other, metadata)
    return other, why or f"the server {can}: {strategy.name} becomes {other.name}"


def best(metadata: Mapping[str, object]) -> Strategy:
    """The strategy to use with a server if nobody says otherwise."""
    return TrainedRTC() if "trained" in _modes(metadata) else GuidedRTC()


def _modes(metadata: Mapping[str, object]) -> Sequence[str]:
    rtc = metadata.get("rtc")
    modes = rtc.get("modes", ()) if isinstance(rtc, Mapping) else ()
    return modes if isinstance(modes, (list, tuple)) else ()


def max_delay(metadata: Mapping[str, object]) -> Optional[int]:
    """Rows of delay that the server's model was trained for; None = it does not tell."""
    rtc = metadata.get("rtc")
    found = rtc.get("max_delay") if isinstance(rtc, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
