"""What a recipe's dataset shows of its robot, for the contract: a few frames of many episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from openpi import transforms
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.seen import Column, Seen
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.training.config import TrainConfig
from openpi.training.data import recipe_data
from openpi.training.data.moments import Moments
from openpi.training.data_config import DataConfig

_EPISODES, _FRAMES = 40, 120  # of few episodes more frames each: a camera on a wrist sees much


def look(config: TrainConfig, data_config: DataConfig, dataset: LeRobotDataset, numbers: Sequence[int]) -> Seen:
    """Decodes at most 120 frames of each camera.

    Args:
        dataset: the recipe's.
        numbers: of the episodes to look at.
    """
    chosen = evenly_spaced(numbers, _EPISODES)
    moments = Moments(config, data_config, chosen, dataset)
    samples = [
        (number, step == 0, moments.at(number, step).observation)
        for number in chosen
        for step in evenly_spaced(range(moments.lengths[number]), _FRAMES // len(chosen))
    ]
    prompts = moments.tasks if data_config.prompt_from_task else ()
    length = float(np.diff(dataset.episode_bounds, axis=1).mean())
    return Seen.of(samples, prompts, _columns(data_config, dataset, samples[0][2]), length)


def _columns(data_config: DataConfig, dataset: LeRobotDataset, observation: Mapping[str, object]) -> dict[str, Column]:
    """Vectors that the recipe takes from a column as they are, in all frames, which costs no picture."""
    features = dataset.metadata.features
    sources = recipe_data.sources(data_config, features)
    taken = {
        key: source
        for key, value in transforms.flatten_dict(observation).items()
        if np.ndim(value) == 1 and (source := sources.get(key)) in dataset.metadata.column_keys
    }
    found = {}
    for key, source in taken.items():
        values = dataset.column(source).astype(np.float64)
        means = np.array([values[begin:end].mean(axis=0) for begin, end in dataset.episode_bounds])
        is_whole = np.isfinite(means).all(axis=1)
        if is_whole.any():
            found[key] = Column(np.nanmin(values, axis=0), np.nanmax(values, axis=0), means[is_whole])
    return found
