"""Whether what a robot sends has moved away from training little by little: averages over many observations.

Averages of the state are held against those of whole episodes, since a few observations are of one phase of an episode
only; those of colors against all pictures.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping

import numpy as np

from openpi.policies.seen import Seen

_EPISODES, _FEWEST, _MOST = 4, 100, 2000  # how long averages are: in episodes, and in observations
_PICTURES = 100
_LEVELS = 12.0  # of 255, by which an average color may lie outside
_SLACK, _OF_BAND = 0.08, 0.25  # of the range of a value, or of that of colors, by which one may
_STILL = 0.002  # of the range: the robot waits, and what it waits with is no part of an episode
CHANNELS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class Moved:
    """An average.

    Attributes:
        key: of the observation.
        part: number of the dimension, or name of the color.
        mean: of what was received lately.
        low, high: of such averages in training.
        count: observations so far, at most as many as it is an average of.
        is_outside: far enough to be told, and an average of enough.
    """

    key: str
    part: int | str
    mean: float
    low: float
    high: float
    count: int
    is_outside: bool


class Drift:
    """Of one robot, in the order of its observations."""

    def __init__(self, seen: Seen) -> None:
        length = int(min(_MOST, max(_FEWEST, _EPISODES * seen.episode_length)))
        self._state: dict[str, _Average] = {}
        self._still: dict[str, list[float]] = {}
        for key, vector in seen.state.items():
            if vector.mean_low:
                span = np.subtract(vector.high, vector.low)
                self._state[key] = _Average(vector.mean_low, vector.mean_high, _SLACK * span + 1e-3, length)
                self._still[key] = (_STILL * span).tolist()
        self._colors: dict[str, _Average] = {}
        for key, camera in seen.cameras.items():
            if camera.color_low:
                band = np.subtract(camera.color_high, camera.color_low)
                slack = np.maximum(_LEVELS, _OF_BAND * band)
                self._colors[key] = _Average(camera.color_low, camera.color_high, slack, _PICTURES)

    def add(self, state: Mapping[str, list[float]], colors: Mapping[str, list[float]]) -> None:
        """
        Args:
            state: by key.
            colors: mean red, green and blue by camera.
        """
        for key, average in self._state.items():
            if key in state and not average.is_near(state[key], self._still[key]):
                average.add(state[key])
        for key, average in self._colors.items():
            if key in colors:
                average.add(colors[key])

    def averages(self) -> Iterator[Moved]:
        """All of them, for people. Any thread."""
        for key, average in self._state.items():
            yield from average.each(key, range(len(average.low)))
        for key, average in self._colors.items():
            yield from average.each(key, CHANNELS)

    def warnings(self) -> Iterator[str]:
        """What lies outside."""
        for key, average in self._state.items():
            if average.has_left:
                yield from (
                    _of_state(moved) for moved in average.each(key, range(len(average.low))) if moved.is_outside
                )
        for key, average in self._colors.items():
            if average.has_left:
                yield _of_colors(key, list(average.each(key, CHANNELS)))


class _Average:
    """Of the last `length`, by exponential decay; of all while they are fewer.

    In plain numbers: of a dozen values arrays take several times as long, and each request passes here.

    Attributes:
        low, high: of training.
        has_left: any of its values is outside, and it is an average of enough.
    """

    def __init__(self, low: tuple[float, ...], high: tuple[float, ...], slack: np.ndarray, length: int) -> None:
        self.low, self.high = low, high
        self._least: list[float] = (low - slack).tolist()
        self._largest: list[float] = (high + slack).tolist()
        self._length = length
        self._mean, self._count = [0.0] * len(low), 0
        self._last: list[float] | None = None

    def is_near(self, values: list[float], tolerance: list[float]) -> bool:
        """Whether these differ from the last ones by no more; those are kept until then, so that creeping counts."""
        if self._last is not None and all(
            abs(value - last) <= most for value, last, most in zip(values, self._last, tolerance, strict=True)
        ):
            return True
        self._last = values
        return False

    def add(self, values: list[float]) -> None:
        count = self._count = min(self._count + 1, self._length)
        # A new list: others may read.
        self._mean = [mean + (value - mean) / count for mean, value in zip(self._mean, values, strict=True)]

    @property
    def has_left(self) -> bool:
        return self._count == self._length and (
            any(map(operator.lt, self._mean, self._least)) or any(map(operator.gt, self._mean, self._largest))
        )

    def each(self, key: str, parts: range | tuple[str, ...]) -> Iterator[Moved]:
        count, rows = self._count, zip(parts, self._mean, self.low, self.high, self._least, self._largest, strict=True)
        for part, mean, low, high, least, largest in rows:
            is_outside = count == self._length and not least <= mean <= largest
            yield Moved(key, part, mean, low, high, count, is_outside)


def _of_state(moved: Moved) -> str:
    return (
        f"[drift] {moved.key}[{moved.part}]: is {moved.mean:.3g} on average of the last {moved.count} observations, in "
        f"episodes of training {moved.low:.3g} to {moved.high:.3g}; calibrate its sensor, or train on what is done now"
    )


def _of_colors(key: str, colors: list[Moved]) -> str:
    outside = [each for each in colors if each.is_outside]
    sides = {each.mean > each.high for each in outside}
    if len(outside) == len(colors) and len(sides) == 1:
        mean, low, high = (sum(getattr(each, name) for each in colors) / 3 for name in ("mean", "low", "high"))
        found, fix = f"{'brighter' if sides.pop() else 'darker'} ({mean:.0f} of 255", "the lamps, and at its exposure"
    else:
        first = outside[0]
        low, high = first.low, first.high
        more = "more" if first.mean > first.high else "less"
        found, fix = (
            f"of other colors ({more} {first.part}: {first.mean:.0f} of 255",
            "the lamps, and at its white balance",
        )
    return (
        f"[drift] {key}: the last {colors[0].count} pictures are {found} on average, in training {low:.0f} to "
        f"{high:.0f}); look at {fix}"
    )
