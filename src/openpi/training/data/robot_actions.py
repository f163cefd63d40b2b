"""Actions as the robot has them: back from those of the model, and their limits in what was recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.data.lerobot.features import dimension_names
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.contract import Contract
from openpi.training.data import recipe_data
from openpi.training.data_config import DataConfig
from openpi_client.realtime.limits import Limits

# A dimension that never moved in the recordings has no fastest step; JSON knows no infinity.
_ANY_STEP = 1e9


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


def with_recorded_limits(
    contract: Contract, dataset: object, data_config: DataConfig, client: Sample, returned: np.ndarray
) -> Contract:
    """The contract with the range and the speed of the dataset's actions, and a little more.

    They are left out where recorded actions are not what the robot gets: the recipe's transforms make others of them.

    Args:
        client: a sample under client keys.
        returned: [h, width], its actions as the robot would get them back.
    """
    keys = data_config.action_sequence_keys
    if not isinstance(dataset, LeRobotDataset) or len(keys) != 1:
        return contract
    recorded, sent = dataset.column(keys[0]), np.asarray(client.get("actions", ()))
    are_same = recorded.ndim == 2 and recorded.shape[1] == contract.actions.width and len(recorded) > 1
    if not are_same or sent.shape != returned.shape or not np.allclose(sent, returned, rtol=1e-3, atol=1e-3):
        return contract
    if not _has_row(recorded, sent[0]):
        return contract
    limits = Limits.from_recorded(recorded, dataset.episode_bounds[:, 1].tolist())
    steps = np.minimum(np.asarray(limits.max_step), _ANY_STEP)
    return dataclasses.replace(
        contract,
        action_low=tuple(np.asarray(limits.low).tolist()),
        action_high=tuple(np.asarray(limits.high).tolist()),
        action_max_step=tuple(steps.tolist()),
    )


def check_names(contract: Contract, dataset: object, data_config: DataConfig) -> None:
    """Compares the order of the recipe's names with that of the dataset's; names that are others say nothing.

    Raises:
        ValueError: the recipe's robot has the dataset's names of a vector in another order.
    """
    if not isinstance(dataset, LeRobotDataset):
        return
    features = dataset.metadata.features
    if not all(isinstance(step, transforms.RepackTransform) for step in data_config.repack_transforms.inputs):
        return  # One of them may put the values into another order.
    sources = recipe_data.sources(data_config, features)
    for vector in (*contract.state, contract.actions):
        column = str(sources.get(vector.key))
        recorded = dimension_names(features[column]) if column in features else ()
        if recorded != vector.names and len(set(recorded)) == len(recorded) and set(recorded) == set(vector.names):
            raise ValueError(
                f"'{vector.key}' of the recipe's robot '{contract.robot}' is {', '.join(vector.names)}; column "
                f"'{column}' of {data_config.dataset_name} is {', '.join(recorded)}: the same names in another order, "
                "so one would move for the other. Put the names of the recipe's RobotSpec into the dataset's order"
            )


def _has_row(rows: np.ndarray, row: np.ndarray) -> bool:
    row = np.asarray(row, np.float64)
    return bool((np.abs(rows.astype(np.float64) - row) <= 1e-5 * (1 + np.abs(row))).all(axis=1).any())
