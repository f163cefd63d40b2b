"""New chunks that go on from what a robot is still playing (real-time chunking), around a model.

The robot's actions go the way that actions go in training, through the recipe's transforms: relative ones are expressed
against the state of now, and normalized as the model has them. See `openpi.models.rtc_config` for what is made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from openpi import transforms as _transforms
from openpi.models.rtc_config import RtcConfig, prefix_weights
from openpi.policies.contract import Contract
from openpi.policies.guards import ObservationError
from openpi.policies.request import CHUNK, DELAY, LeftOver
from openpi.policies.robot_spec import find_spec

if TYPE_CHECKING:
    from openpi.models.model_config import BaseModelConfig


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a policy continues chunks.

    Attributes:
        config: with its mode.
        max_delay: largest delay that is taken.
        horizon, width: of the model's chunks, padding included.
        action_width: of the robot; None = not known here.
        rate_hz: of the robot's control loop, which ticks are counted in; None = unknown.
        is_asked_for: whether a mode was named, and not chosen here.
    """

    config: RtcConfig
    max_delay: int
    horizon: int
    width: int
    action_width: int | None = None
    rate_hz: float | None = None
    is_asked_for: bool = False

    @classmethod
    def create(
        cls,
        config: RtcConfig,
        model_config: BaseModelConfig,
        transforms: Sequence[_transforms.DataTransformFn],
        contract: Contract | None,
    ) -> Continuation:
        """That of a flow model.

        Args:
            transforms: observation -> model inputs.
        Raises:
            ValueError: the mode is `trained`, and the model was not trained with delays.
        """
        trained = getattr(model_config, "rtc_max_delay", 0) if contract is None else contract.rtc_max_delay
        is_asked_for = config.mode is not None
        config = dataclasses.replace(config, mode=config.mode or ("trained" if trained else "guided"))
        if config.is_trained and not trained:
            raise ValueError(
                "real-time chunking of the mode 'trained' needs a checkpoint that was trained with delays, and this "
                "one was not (rtc_max_delay is 0); use 'guided', or train with --model.rtc-max-delay"
            )
        spec = find_spec(transforms)
        vector = spec.actions if contract is None and spec is not None else getattr(contract, "actions", None)
        return cls(
            config,
            max_delay=trained if config.is_trained else model_config.action_horizon - 1,
            horizon=model_config.action_horizon,
            width=model_config.action_dim,
            action_width=None if vector is None else vector.width,
            rate_hz=None if contract is None else contract.control_hz,
            is_asked_for=is_asked_for,
        )

    def as_metadata(self) -> dict[str, object]:
        """What a robot's program needs to know, as plain data for the handshake of a server."""
        return {
            "modes": [self.config.mode],
            "max_delay": self.max_delay,
            "horizon": self.horizon,
            "rate": self.rate_hz,
        }

    def prepare(
        self, steps: Iterable[_transforms.DataTransformFn], observation: Mapping[str, object], left_over: LeftOver
    ) -> tuple[_transforms.DataDict, dict[str, np.ndarray] | None]:
        """Model inputs of an observation, and what its chunk goes on from.

        Args:
            steps: observation -> model inputs.
        Returns:
            the inputs, and `actions` f32[h d], `weights` f32[h d] and `delay` int32, or None where nothing binds it.
        Raises:
            ObservationError: the actions are not the robot's, too many, or the delay is too long.
            ValueError: the recipe's transforms do not pass actions through.
        """
        self._check(left_over)
        inputs, width = _through(steps, {**observation, "actions": left_over.rows})
        actions = np.asarray(inputs.pop("actions", ()))
        count = len(left_over.rows)
        if actions.shape != (count, self.width):
            raise ValueError(
                f"the transforms of this policy make an array of shape {actions.shape} of {count} actions, expected "
                f"{(count, self.width)}: they must pass `actions` through as in training. Without that '{CHUNK}' "
                "cannot be continued; leave it out"
            )
        delay = min(left_over.delay, count)
        # What will not be played is not asked for; nor is what was made up to fill the chunk.
        end = count if left_over.period is None else min(count, max(self.horizon - left_over.period, delay))
        weights = np.zeros((self.horizon, self.width), np.float32)
        if not self.config.is_trained:
            weights[:, :width] = prefix_weights(delay, end, self.horizon, self.config.schedule)[:, None]
        if not (delay if self.config.is_trained else weights.any()):
            return inputs, None
        # The last one is held: zeros would pull to the mean of the dataset.
        filled = np.concatenate([actions, np.repeat(actions[-1:], self.horizon - count, axis=0)])
        return inputs, {"actions": filled.astype(np.float32), "weights": weights, "delay": np.asarray(delay, np.int32)}

    def nothing(self) -> dict[str, np.ndarray]:
        """That of an observation whose chunk begins anew, beside others that go on."""
        zeros = np.zeros((self.horizon, self.width), np.float32)
        return {"actions": zeros, "weights": zeros, "delay": np.zeros((), np.int32)}

    def _check(self, left_over: LeftOver) -> None:
        count, width = left_over.rows.shape
        if self.action_width is not None and width != self.action_width:
            raise ObservationError(
                f"'{CHUNK}' has {width} values a row; this robot's actions have {self.action_width}. Send the rows of "
                "the last answer's 'actions' that are still to be played"
            )
        if count > self.horizon:
            raise ObservationError(
                f"'{CHUNK}' has {count} rows; a chunk has {self.horizon}. Send those that are still to be played"
            )
        if left_over.delay > self.max_delay:
            raise ObservationError(
                f"'{DELAY}' is {left_over.delay}; this policy takes at most {self.max_delay} ({self.config.mode}). Ask "
                "earlier, or without the chunk before"
            )


def _through(steps: Iterable[_transforms.DataTransformFn], data: _transforms.DataDict) -> tuple[dict[str, object], int]:
    """What the steps make of a sample, and how many dimensions its actions have without padding."""
    width = np.shape(data["actions"])[-1]
    for step in _flat(steps):
        if isinstance(step, _transforms.PadStatesAndActions) and "actions" in data:
            width = np.shape(data["actions"])[-1]
        data = step(data)
    return dict(data), width


def _flat(steps: Iterable[_transforms.DataTransformFn]) -> Iterator[_transforms.DataTransformFn]:
    for step in steps:
        if isinstance(step, _transforms.CompositeTransform):
            yield from _flat(step.transforms)
        else:
            yield step
