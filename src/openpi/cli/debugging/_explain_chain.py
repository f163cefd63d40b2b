"""The chains that `openpi explain` walks: those of the data loader and of the policy, cut into steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.data.dataset import Sample
from openpi.data.lerobot.features import dimension_names as recorded_names
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies import policy_config
from openpi.policies.contract import Contract
from openpi.policies.guards import ContractGuard, RangeGuard
from openpi.policies.policy_config import Pipeline
from openpi.policies.robot_spec import find_spec
from openpi.training.config import TrainConfig
from openpi.training.data import recipe_data
from openpi.training.data.sample_trace import Step
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig

if TYPE_CHECKING:
    from openpi.transforms import DataTransformFn


@dataclasses.dataclass(frozen=True)
class Recording:
    """One frame of a dataset, as it is read.

    Attributes:
        names: of the dimensions of vector features.
        episode_length: frames; None when the dataset does not say.
        unread_cameras: of the dataset, that the recipe does not read.
    """

    sample: Sample
    about: str
    steps: tuple[Step, ...]
    names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    episode_length: int | None = None
    unread_cameras: tuple[str, ...] = ()


def pipeline(config: TrainConfig, checkpoint: Checkpoint | None) -> Pipeline:
    """What a policy does around its model; a recipe alone takes its own statistics."""
    if checkpoint is None:
        return policy_config.make_pipeline(config.data.create(config.assets_dirs, config.model))
    return policy_config.load_pipeline(config, checkpoint)


def recording(config: TrainConfig, data_config: DataConfig, index: int) -> Recording:
    """Frame `index` of the recipe's dataset, and the steps that training runs on it.

    Raises:
        FileNotFoundError, ValueError, KeyError: the dataset is not there, or does not fit the recipe.
        IndexError: no such frame.
    """
    from openpi.training import data_loader

    if data_config.dataset_name is None:
        raise ValueError(f"recipe '{config.name}' has no dataset; name one with --dataset, or pass --observation")
    dataset = recipe_data.create_dataset(data_config, config.model)
    no_stats = data_config.norm_stats is None  # a finding, not a reason to show nothing
    steps = steps_of(data_loader.input_transforms(data_config, dataset, skip_norm_stats=no_stats), data_config)
    if isinstance(dataset, Stream):
        return Recording(dataset[index], f"frame {index} of {data_config.dataset_name}", steps)
    if not -len(dataset) <= index < len(dataset):
        raise IndexError(f"frame {index} of a dataset of {len(dataset)} frames")
    about = f"frame {index} of {data_config.repo_id} ({len(dataset)} frames)"
    if not isinstance(dataset, LeRobotDataset):
        return Recording(dataset[index], about, steps)
    bounds = dataset.episode_bounds
    episode = int(np.searchsorted(bounds[:, 1], index % len(dataset), side="right"))
    length = int(bounds[episode, 1] - bounds[episode, 0])
    about += f", step {index % len(dataset) - int(bounds[episode, 0])} of {length} of episode {episode}"
    sample = dataset[index]
    unread = tuple(key for key in dataset.metadata.camera_keys if key not in sample)
    return Recording(sample, about, steps, _feature_names(dataset), length, unread)


def steps_of(chain: Iterable[DataTransformFn], data_config: DataConfig) -> tuple[Step, ...]:
    """The transforms of a chain, each with the part of the recipe it belongs to."""
    groups = {
        "repack": data_config.repack_transforms,
        "robot": data_config.data_transforms,
        "model": data_config.model_transforms,
    }
    part_of = {id(t): part for part, group in groups.items() for t in (*group.inputs, *group.outputs)}
    return tuple(Step(part_of.get(id(transform), _part(transform)), transform) for transform in chain)


def dimension_names(
    data_config: DataConfig, contract: Contract | None, features: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Names of the dimensions of `state` and `actions`: the robot's, else those of the dataset's features."""
    if contract is not None:
        return {"state": contract.state_names, "actions": contract.actions.names}
    spec = find_spec(data_config.data_transforms.inputs)
    if spec is not None:
        return spec.names
    columns = recipe_data.sources(data_config, ("state", "actions"))
    sources = {key.rsplit("/", 1)[-1]: column for key, column in columns.items()}
    return {key: features[source] for key in ("state", "actions") if (source := sources.get(key)) in features}


def _part(transform: object) -> str:
    match transform:
        case transforms.Normalize() | transforms.Unnormalize():
            return "statistics"
        case ContractGuard() | RangeGuard():
            return "contract"
        case transforms.ChannelsFirst() | transforms.PromptFromLeRobotTask():
            return "dataset"
    return "policy"


def _feature_names(dataset: LeRobotDataset) -> dict[str, tuple[str, ...]]:
    """Of vectors that have a name for each dimension."""
    named = {key: recorded_names(feature) for key, feature in dataset.metadata.features.items()}
    return {key: names for key, names in named.items() if list(dataset.metadata.features[key]["shape"]) == [len(names)]}
