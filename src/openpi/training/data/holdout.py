"""Which episodes are kept out of training, for validation.

Where a recipe does not say how many, that is decided once, when a run starts, and saved with it.

A recipe that leaves `holdout_episodes` open gets a few episodes held out, so that every run has a validation and a best
checkpoint. A run that goes on keeps what it began with: one of before this has nothing held out.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from openpi.checkpoints.find import complete_steps
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data_config import DataConfig

logger = logging.getLogger(__name__)

_SHARE, _MOST = 0.05, 20
_FEWEST = 3  # episodes of a dataset that can spare one


def split_episodes(total: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to train on, and of those held out, both ascending.

    Args:
        holdout: how many to hold out, or below 1 the fraction (at least one episode, if above 0).
        seed: chooses which; a larger hold-out of the same seed contains the smaller one.
    Raises:
        ValueError: nothing would be left to train on.
    """
    num_held = int(holdout) if holdout >= 1 else int(np.ceil(holdout * total))
    if not 0 <= num_held < total:
        raise ValueError(
            f"holdout_episodes={holdout:g} of {total} episodes leaves {total - num_held} to train on; hold out fewer"
        )
    order = _drawn(total, seed)
    return sorted(order[num_held:]), sorted(order[:num_held])


def _drawn(total: int, seed: int) -> list[int]:
    """In which order episodes are held out.

    Each draws a number of its own, whatever their count: one that a run has trained on is passed over again when the
    dataset has grown, so that as many are held out of old ones that were held out, and of new ones.
    """
    return np.argsort(np.random.default_rng(seed).random(total), kind="stable").tolist()


def holds_out(config: TrainConfig, data_config: DataConfig) -> bool:
    """Whether a recipe keeps episodes for validation, by number or by name, in any of its datasets."""
    return bool(config.holdout_episodes or any(member.validation_episodes for member in data_config.members))


def holdout_split(
    config: TrainConfig, metadata: LeRobotMetadata, data_config: DataConfig, kept: Collection[int] | None = None
) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to train on, and of those held out, none where the recipe holds out none.

    Which are held out does not depend on which are excluded: who leaves out a spoilt one keeps the others' roles.

    Args:
        kept: numbers of those that are not excluded, where that is known.
    Raises:
        ValueError: nothing is left to train on, or of those held out.
    """
    numbers = [episode.index for episode in metadata.episodes]
    excluded = data_config.selection.excluded(metadata) if kept is None else set(numbers) - set(kept)
    held = _held_out(config, numbers, data_config, metadata.root)
    train = [number for number in numbers if number not in held and number not in excluded]
    validation = [number for number in numbers if number in held and number not in excluded]
    if not train or (held and not validation):
        raise ValueError(
            f"{data_config.selection or 'holding out'} leaves {len(train)} episodes to train on and {len(validation)} "
            f"of those held out ({len(held)} of {len(numbers)}); exclude fewer, or hold out others"
        )
    return train, validation


def _held_out(config: TrainConfig, numbers: Sequence[int], data_config: DataConfig, root: Path) -> set[int]:
    """Numbers of the episodes held out, those that are excluded too among them."""
    if not data_config.validation_episodes:
        return {numbers[i] for i in split_episodes(len(numbers), config.holdout_episodes or 0, config.seed)[1]}
    if unknown := sorted(set(data_config.validation_episodes) - set(numbers)):
        raise ValueError(
            f"validation_episodes has {unknown}, and {root} has no such episodes; expected some of its {len(numbers)} "
            f"numbers, {min(numbers)} to {max(numbers)}"
        )
    return set(data_config.validation_episodes)


def check_holdout(config: TrainConfig, data_config: DataConfig) -> None:
    """Raises ValueError where episodes cannot be held out, or are in two ways."""
    if config.holdout_episodes and any(member.validation_episodes for member in data_config.members):
        raise ValueError(
            f"holdout_episodes={config.holdout_episodes:g} draws episodes to hold out, and data.validation_episodes "
            "names some; set one of the two"
        )
    if holds_out(config, data_config) and data_config.rlds_data_dir is not None:
        names = list(data_config.validation_episodes)
        field = f"data.validation_episodes={names}" if names else f"holdout_episodes={config.holdout_episodes:g}"
        raise ValueError(
            f"{field}, but data in RLDS form are a stream without a list of episodes to choose from; leave it out"
        )


def split_dataset(config: TrainConfig, data_config: DataConfig, dataset: LeRobotDataset) -> tuple[list[int], list[int]]:
    """`holdout_split` of a dataset that is open; its episodes are those that are not excluded."""
    kept = [episode.index for episode in dataset.episodes]
    return holdout_split(config, dataset.metadata, data_config, kept)


def decided(config: TrainConfig, data: RecipeData, num_devices: int = 1) -> TrainConfig:
    """The recipe with a number for `holdout_episodes`, and where some are held out that it did not ask for, the best
    checkpoint kept.

    Args:
        num_devices: that a batch is spread over, and so the fewest frames of one.
    """
    if config.holdout_episodes is not None:
        return config
    if config.resume and (steps := complete_steps(config.checkpoint_dir)):
        return dataclasses.replace(config, **_begun_with(config, config.checkpoint_dir / str(steps[-1])))
    number = _chosen(config, data, num_devices)
    return dataclasses.replace(config, holdout_episodes=number, keep_best=config.keep_best or number > 0)


def _begun_with(config: TrainConfig, checkpoint: Path) -> dict[str, object]:
    """What a run of before has for the two; none held out where it does not say."""
    try:
        changes = recipe_io.changes_since(checkpoint, config)
    except ValueError:  # told when the run is continued
        changes = []
    before = {field: old for field, old, _ in changes}
    return {
        "holdout_episodes": before.get("holdout_episodes") or 0,
        "keep_best": before.get("keep_best", config.keep_best),
    }


def _chosen(config: TrainConfig, data: RecipeData, num_devices: int) -> int:
    """How many episodes each dataset can spare: 5 % of the smallest, at least one, at most 20, more where these are no
    batch for all devices; none where a dataset is too small, or where the recipe names some.
    """
    datasets = [dataset for _, dataset in data.members if isinstance(dataset, LeRobotDataset)]
    if holds_out(config, data.config) or len(datasets) < len(data.datasets):  # a stream, or random data
        return 0
    totals = [len(dataset.metadata.episodes) for dataset in datasets]
    number = min(_MOST, max(1, math.ceil(_SHARE * min(totals))))
    off = "--holdout-episodes=N holds some out, and validates on them"
    if min(totals) < _FEWEST:
        logger.info("no episode is held out for validation, as there are only %d; %s", min(totals), off)
        return 0
    held = np.stack([_frames_held(dataset, config.seed)[: min(totals)] for dataset in datasets])
    frames = np.array([sum(episode.length for episode in dataset.episodes) for dataset in datasets])
    validation, train = held.min(axis=0), (frames[:, None] - held).min(axis=0)
    while 0 < validation[number] < num_devices and number < min(totals) - 1:
        number += 1
    if train[number] < config.batch_size or validation[number] < num_devices:
        logger.info(
            "no episode is held out for validation: too few frames would be left for a batch, or be held out for one "
            "on %d device(s); %s",
            num_devices,
            off,
        )
        return 0
    logger.info(
        "%d of %s episodes are held out for validation, as the recipe does not say; --holdout-episodes=0 trains on all",
        number * len(totals),
        " + ".join(map(str, totals)),
    )
    return number


def _frames_held(dataset: LeRobotDataset, seed: int) -> np.ndarray:
    """int[n + 1], frames to validate on with 0 to all n of the episodes held out; those that are excluded have none."""
    lengths = {episode.index: episode.length for episode in dataset.episodes}
    numbers = [episode.index for episode in dataset.metadata.episodes]
    return np.cumsum([0, *(lengths.get(numbers[i], 0) for i in _drawn(len(numbers), seed))])


def num_frames(dataset: LeRobotDataset, episodes: Sequence[int]) -> int:
    """Of these episodes, by number."""
    wanted = set(episodes)
    return sum(episode.length for episode in dataset.episodes if episode.index in wanted)
