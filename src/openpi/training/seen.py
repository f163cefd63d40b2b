"""What a recipe's dataset shows of its robot, for the contract: a few frames of many episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi import transforms
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.seen import Column, Seen
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig
from openpi.training.moments import Moments, spread

_EPISODES, _FRAMES = 40, 3


def trained_on(config: TrainConfig, data_config: DataConfig) -> list[int]:
    """Numbers of the episodes that the recipe neither excludes nor holds out."""
    metadata = data_loader.open_metadata(data_config)
    if data_loader.holds_out(config, data_config.members[0]):
        return data_loader.holdout_split(config, metadata, data_config)[0]
    kept = data_loader.kept_episodes(data_config, metadata)
    return [episode.index for episode in metadata.episodes] if kept is None else kept


def look(config: TrainConfig, data_config: DataConfig, numbers: Sequence[int]) -> Seen:
    """Decodes at most 120 frames of each camera.

    Args:
        numbers: of the episodes to look at.
    Raises:
        ValueError: no dataset in LeRobot form.
    """
    chosen = spread(numbers, _EPISODES)
    moments = Moments(config, data_config, chosen)
    samples = [
        (number, step == 0, moments.at(number, step).observation)
        for number in chosen
        for step in spread(range(moments.lengths[number]), _FRAMES)
    ]
    prompts = moments.tasks if data_config.prompt_from_task else ()
    columns, length = _columns(data_config, samples[0][2])
    return Seen.of(samples, prompts, columns, length)


def _columns(data_config: DataConfig, observation: Mapping[str, Any]) -> tuple[dict[str, Column], float]:
    """Vectors that the recipe takes from a column as they are, in all frames, which costs no picture; and how long
    episodes are.
    """
    metadata = data_loader.open_metadata(data_config)
    repacks = [step for step in data_config.repack_transforms.inputs if isinstance(step, transforms.RepackTransform)]
    sources = transforms.flatten_dict(repacks[-1].structure) if repacks else {key: key for key in metadata.features}
    taken = {
        key: source
        for key, value in transforms.flatten_dict(observation).items()
        if np.ndim(value) == 1 and (source := sources.get(key)) in metadata.column_keys
    }
    dataset = LeRobotDataset(metadata.root, columns=sorted(set(taken.values())), metadata=metadata)
    bounds = dataset.episode_bounds
    found = {}
    for key, source in taken.items():
        values = dataset.column(source).astype(np.float64)
        means = np.array([values[begin:end].mean(axis=0) for begin, end in bounds])
        is_whole = np.isfinite(means).all(axis=1)
        if is_whole.any():
            found[key] = Column(np.nanmin(values, axis=0), np.nanmax(values, axis=0), means[is_whole])
    return found, float(np.diff(bounds, axis=1).mean())
