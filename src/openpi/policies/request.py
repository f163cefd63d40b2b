"""What a request may say beside its observation: the chunk that its robot is playing, the noise to start from, and
whether its stages are to be told.

    prev_action_chunk    float[n, w], n at most the horizon: the actions that are still to be played, in the robot's
                         units; row 0 is due when the observation was made
    inference_delay      int: so many of them will have been played when the answer comes
    execution_horizon    int, optional: ticks from one request to the next; the answer is free after that part of the
                         chunk before which will be played still
    noise | seed         float[ah, ad] | int: what the chunk is made from
    trace                bool: the answer has the sample's stages, too, as of `openpi.policies.stages`

None stands for absent, so that a client may send the same keys always. They are no part of the observation: recordings
keep them, transforms do not see them. Source: spec, "RTC on the wire".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi.policies.guards import ObservationError
from openpi.policies.observation_checks import first_not_finite

CHUNK, DELAY, PERIOD, NOISE, SEED = "prev_action_chunk", "inference_delay", "execution_horizon", "noise", "seed"
TRACE = "trace"
KEYS = (CHUNK, DELAY, PERIOD, NOISE, SEED, TRACE)
# What a policy is asked for; a frame of a dataset that is sent as it is has them, and a model would be told the answer.
ACTIONS = "actions"


@dataclasses.dataclass(frozen=True)
class LeftOver:
    """Actions that a robot still has.

    Attributes:
        rows: float[n w], n at least 1, in the robot's units.
        delay: rows that will have been played when the answer comes.
        period: ticks from one request to the next; None = unknown.
    """

    rows: np.ndarray
    delay: int
    period: int | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A request taken apart.

    Attributes:
        left_over: None = the chunk begins anew.
        noise: as it was sent.
        is_traced: its stages are asked for.
    """

    observation: dict[str, Any]
    left_over: LeftOver | None = None
    noise: np.ndarray | None = None
    seed: int | None = None
    is_traced: bool = False

    @classmethod
    def parse(cls, sent: Mapping[str, object]) -> Request:
        """
        Raises:
            ObservationError: a value is none of its kind; key, found and expected are named.
        """
        given = {key: sent[key] for key in KEYS if sent.get(key) is not None}
        observation = {key: value for key, value in sent.items() if key not in (*KEYS, ACTIONS)}
        if not given:
            return cls(observation)
        if NOISE in given and SEED in given:
            raise ObservationError("'noise' and 'seed' are both given; the seed is what noise is drawn from. Send one")
        noise = _numbers(given, NOISE) if NOISE in given else None
        left_over = _left_over(given)
        is_traced = _flag(given, TRACE)
        if is_traced and left_over is not None:
            raise ObservationError(
                f"'{TRACE}' is given with '{CHUNK}'; the stages of a chunk that begins anew are told"
            )
        return cls(observation, left_over, noise, _whole_number(given, SEED, least=0), is_traced)

    def noise_of(self, horizon: int, width: int) -> np.ndarray | None:
        """f32[horizon width] to start from, the same for a seed on every backend; None = the model draws it.

        Raises:
            ObservationError: the noise that was sent has another shape.
        """
        if self.seed is not None:
            return np.random.default_rng(self.seed).standard_normal((horizon, width), np.float32)
        if self.noise is None:
            return None
        if self.noise.shape not in ((horizon, width), (1, horizon, width)):
            raise ObservationError(f"'noise' has shape {self.noise.shape}; expected {(horizon, width)}")
        return self.noise.reshape(horizon, width).astype(np.float32)


def _left_over(given: Mapping[str, object]) -> LeftOver | None:
    delay, period = _whole_number(given, DELAY, least=0), _whole_number(given, PERIOD, least=1)
    if CHUNK not in given:
        return None
    rows = _numbers(given, CHUNK)
    if rows.ndim != 2:
        raise ObservationError(
            f"'{CHUNK}' has shape {rows.shape}; expected [n, action width]: the actions still to be played, one a row"
        )
    if len(rows) == 0:
        return None
    if delay is None:
        raise ObservationError(
            f"'{CHUNK}' is given without '{DELAY}'; send how many of its rows will be played before the answer comes"
        )
    return LeftOver(rows, delay, period)


def _numbers(given: Mapping[str, object], key: str) -> np.ndarray:
    values = _array(given[key])
    if values.dtype.kind not in "fiu":
        raise ObservationError(f"'{key}' has dtype {values.dtype}; expected an array of numbers, such as float32")
    if (where := first_not_finite(values)) is not None:
        raise ObservationError(f"'{key}' has NaN or infinity (as float32), first at {where}; expected finite numbers")
    return values


def _array(value: object) -> np.ndarray:
    """One object for lists of different lengths."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(None)


def _whole_number(given: Mapping[str, object], key: str, *, least: int) -> int | None:
    if key not in given:
        return None
    value = given[key]
    array = _array(value)
    if array.size != 1 or array.dtype.kind not in "iu" or array.item() < least:
        raise ObservationError(f"'{key}' is {_shown(value)}; expected a whole number of at least {least}")
    return int(array.item())


def _flag(given: Mapping[str, object], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, (bool, np.bool_)):
        raise ObservationError(f"'{key}' is {_shown(value)}; expected true or false")
    return bool(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
