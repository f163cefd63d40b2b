"""The contract of a policy that is trained on a recipe's data: what it will expect of a robot, and give."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from openpi import transforms
from openpi.data.dataset import Dataset, Sample
from openpi.data.lerobot.features import Feature, dimension_names
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.contract import Contract
from openpi.policies.images import channel_means
from openpi.policies.robot_spec import find_spec
from openpi.shared.tree import flatten
from openpi.training.config import TrainConfig
from openpi.training.data import recipe_data
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig
from openpi_client.realtime.limits import Limits

logger = logging.getLogger(__name__)

# A dimension that never moved in the recordings has no fastest step; JSON knows no infinity.
_ANY_STEP = 1e9


def contract_of(
    config: TrainConfig, data: RecipeData, clients: Sequence[Sample], raws: Sequence[Sample]
) -> Contract | None:
    """What a policy trained on some data will expect; None where its output transforms do not say what it gives.

    Args:
        clients: samples of the first dataset under client keys.
        raws: the same after the robot's transforms, not normalised.
    Raises:
        ValueError: the recipe's robot has another state, other actions, or their names in another order.
    """
    data_config, dataset = data.members[0]
    returned = _returned_actions(data_config, config, raws[0])
    if returned is None:
        return None
    contract = _described(data_config, dataset, config, clients, returned.shape[-1])
    _check(contract, data_config, clients[0], raws, returned)
    for member, each in data.members:
        _check_names(contract, each, member)
    return _with_recorded_limits(contract, dataset, data_config, clients[0], returned)


def rate_of(dataset: Dataset | Stream) -> float | None:
    """Frames per second."""
    return dataset.control_hz if isinstance(dataset, Stream) else cast(LeRobotDataset, dataset).metadata.fps


def action_names(data_config: DataConfig, dataset: Dataset | Stream, contract: Contract) -> tuple[str, ...]:
    """The dataset's own names where they count as many dimensions as the robot takes."""
    names = dimension_names(_features(dataset).get(data_config.action_sequence_keys[0]) or {})
    return names if len(names) == contract.actions.width else tuple(contract.actions.names)


def _returned_actions(data_config: DataConfig, config: TrainConfig, raw: Sample) -> np.ndarray | None:
    """[h, width]: a sample's actions, as the robot would get them back; None where that cannot be told.

    Output transforms of a user's own may answer in any form, and need what only the robot's machine has.
    """
    actions = np.asarray(raw["actions"])
    padding = max(0, config.model.action_dim - actions.shape[-1])
    padded = np.pad(actions, [(0, 0)] * (actions.ndim - 1) + [(0, padding)])
    try:
        returned = transforms.compose(data_config.data_transforms.outputs)({"state": raw["state"], "actions": padded})
        found = np.asarray(returned["actions"])
        if found.ndim == 2 and found.dtype.kind in "fiub":
            return found
        problem = f"their 'actions' are of shape {list(found.shape)} and dtype {found.dtype}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    logger.warning(
        "the output transforms of recipe '%s' do not give 'actions' of [steps, dimensions] (%s). It trains all the "
        "same, but its checkpoints have no contract, so less of what robots send is checked, and validation has no "
        "errors of actions",
        config.name,
        problem,
    )
    return None


def _described(
    data_config: DataConfig,
    dataset: Dataset | Stream,
    config: TrainConfig,
    clients: Sequence[Sample],
    action_width: int,
) -> Contract:
    features = _features(dataset)
    action_key = data_config.action_sequence_keys[0]
    state_key = next((key for key in ("observation.state", "state") if key in features), "")
    return Contract.build(
        data_config,
        config.model,
        sample=_read_by_robot(clients[0], data_config),
        action_width=action_width,
        control_hz=rate_of(dataset),
        state_names=dimension_names(features.get(state_key) or {}),
        action_names=dimension_names(features.get(action_key) or {}),
        camera_means=channel_means(clients),
    )


def _read_by_robot(client: Sample, data_config: DataConfig) -> Sample:
    """A sample under client keys without what makes no difference to what the model observes: datasets have more than
    robots send. Of transforms with a spec, all of it: that says what they take.
    """
    if find_spec(data_config.data_transforms.inputs) is not None:
        return client
    to_model = transforms.compose(data_config.data_transforms.inputs)
    read, whole = client, flatten(to_model(_without(client, "")))
    for path in flatten(client):
        try:
            made = flatten(to_model(_without(client, path)))
        except Exception:  # the robot has to send it
            continue
        observed = [key for key in {**whole, **made} if key.partition("/")[0] != "actions"]
        if all(key in whole and key in made and np.array_equal(whole[key], made[key]) for key in observed):
            read = _without(read, path)
    return read


def _without(tree: Mapping[str, Any], path: str) -> Sample:
    """New dicts without the leaf at a '/'-joined path; keys may have slashes themselves."""
    return {
        key: _without(value, path.removeprefix(f"{key}/") if path.startswith(f"{key}/") else "")
        if isinstance(value, Mapping)
        else value
        for key, value in tree.items()
        if key != path
    }


def _features(dataset: Dataset | Stream) -> Mapping[str, Feature]:
    """As LeRobot describes them; a stream names none."""
    return dataset.metadata.features if isinstance(dataset, LeRobotDataset) else {}


def _check(
    contract: Contract, data_config: DataConfig, client: Sample, raws: Sequence[Sample], returned: np.ndarray
) -> None:
    """Raises ValueError unless the recipe's robot has the state and the actions of the dataset, and of its outputs.

    Args:
        client: a sample under client keys.
        raws: this one and others after the robot's transforms, not normalised.
        returned: see `_returned_actions`.
    """
    try:
        contract.check_vectors(client)
    except ValueError as error:
        raise ValueError(
            f"the samples of {data_config.dataset_name} are not what the recipe's robot sends: {error}"
        ) from error
    trained = np.concatenate([np.asarray(raw["actions"]).reshape(-1, np.shape(raw["actions"])[-1]) for raw in raws])
    sent = np.asarray(client.get("actions"))  # may be a map of parts, which the robot's transforms put together
    recorded = sent.shape[-1] if sent.ndim else trained.shape[-1]
    # The robot's transforms may train another form of action, leave a recorded dimension out, or pad with zeros.
    used = int(np.max(np.flatnonzero(trained.any(axis=0)), initial=-1)) + 1
    if contract.actions.width != recorded and not used <= contract.actions.width <= trained.shape[-1]:
        if find_spec(data_config.data_transforms.inputs) is not None:
            contract.check_actions(recorded, where=f"the actions of {data_config.dataset_name} have")
        logger.warning(
            "the actions of %s have %d dimensions, and robots are given %d. That is right where the output transforms "
            "make others of them; correct their width if they were copied from another robot's",
            data_config.dataset_name,
            recorded,
            contract.actions.width,
        )
    contract.check_actions(returned.shape[-1], where="the output transforms return")


def _with_recorded_limits(
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


def _check_names(contract: Contract, dataset: object, data_config: DataConfig) -> None:
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
