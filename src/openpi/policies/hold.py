"""Standing still, for when a model has written something that is no action chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from openpi import transforms
from openpi.policies.robot_spec import find_spec


@dataclasses.dataclass(frozen=True)
class HoldStill:
    """Sets `actions` to a chunk that keeps the robot where its (unnormalised) `state` says it is.

    Attributes:
        follows_state: per action dimension, true where the action that changes nothing equals the state, false where
            it is zero.
        horizon: steps of the chunk.
    """

    follows_state: tuple[bool, ...]
    horizon: int

    def __call__(self, data: transforms.DataDict) -> transforms.DataDict:
        width = len(self.follows_state)
        step = np.where(self.follows_state, np.asarray(data["state"])[:width], 0.0)
        return {**data, "actions": np.tile(step, (self.horizon, 1))}


def hold_transforms(data_config: Any, horizon: int) -> list[transforms.DataTransformFn]:
    """`{"state"}` as the model has it -> the robot's actions for standing still.

    Raises:
        ValueError: the recipe's robot does not say how it stands still.
    """
    spec = find_spec(data_config.data_transforms.inputs)
    if spec is None or not spec.follows_state:
        robot = "this recipe's robot" if spec is None else f"robot '{spec.robot}'"
        raise ValueError(
            f"{robot} does not say how it stands still, so on_undecodable='hold' is not possible; use 'error', or set "
            "follows_state in its RobotSpec"
        )
    relative = np.zeros(len(spec.follows_state), bool)
    for step in data_config.data_transforms.outputs:
        if isinstance(step, transforms.AbsoluteActions) and step.mask is not None:
            mask = np.asarray(step.mask, bool)[: len(relative)]
            relative[: len(mask)] |= mask
    follows_state = tuple(bool(f and not r) for f, r in zip(spec.follows_state, relative, strict=True))
    state_stats = {key: value for key, value in (data_config.norm_stats or {}).items() if key == "state"}
    return [
        transforms.Unnormalize(state_stats or None, use_quantiles=data_config.use_quantile_norm),
        HoldStill(follows_state, horizon),
        *data_config.data_transforms.outputs,
    ]
