"""Actions as the robot has them, back from those of the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openpi import transforms
from openpi.training.data_config import DataConfig


def robot_actions(data_config: DataConfig, *, is_sampled: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(state, actions) as the model has them -> actions of the robot, by the transforms that serving uses.

    Args:
        is_sampled: the actions are what the model returned, which pi0-FAST's output transform decodes first.
    """
    chain = transforms.compose(
        (
            *(data_config.model_transforms.outputs if is_sampled else ()),
            transforms.Unnormalize(data_config.norm_stats, use_quantiles=data_config.use_quantile_norm),
            *data_config.data_transforms.outputs,
        )
    )
    return lambda state, actions: np.asarray(chain({"state": state, "actions": actions})["actions"])
