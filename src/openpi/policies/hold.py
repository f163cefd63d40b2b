"""Standing still, for when a model has written something that is no action chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from openpi import transforms
from openpi.policies.data_half import DataHalf
from openpi.policies.robot_spec import find_spec, relative_dims


@dataclasses.dataclass(frozen=True)
class HoldStill:
    """Sets `actions` to a chunk that keeps the robot where its (unnormalised) `state` says it is.

    Attributes:
        factors: per action dimension, times the state.
        horizon: steps of the chunk.
    """

    factors: tuple[int, ...]
    horizon: int

    def __call__(self, data: transforms.DataDict) -> transforms.DataDict:
        step = self.factors * np.asarray(data["state"], np.float64)[: len(self.factors)]
        return {**data, "actions": np.tile(step, (self.horizon, 1))}


def hold_transforms(data_config: DataHalf, horizon: int) -> list[transforms.DataTransformFn]:
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
    outputs = data_config.data_transforms.outputs
    _check_is_flat(outputs)
    relative = relative_dims(outputs, len(spec.follows_state))
    # What the robot shall get, less what the output transforms will add.
    factors = tuple(int(follows) - int(added) for follows, added in zip(spec.follows_state, relative, strict=True))
    state_stats = {key: value for key, value in (data_config.norm_stats or {}).items() if key == "state"}
    return [
        transforms.Unnormalize(state_stats or None, use_quantiles=data_config.use_quantile_norm),
        HoldStill(factors, horizon),
        *outputs,
    ]


def _check_is_flat(outputs: Iterable[transforms.DataTransformFn]) -> None:
    """Raises ValueError where output transforms are nested, or several add the state: what they do together is not
    known.
    """
    num_adding = sum(isinstance(step, transforms.AbsoluteActions) for step in outputs)
    if num_adding > 1 or any(isinstance(step, transforms.CompositeTransform) for step in outputs):
        raise ValueError("on_undecodable='hold' needs a flat list of output transforms, at most one AbsoluteActions")
