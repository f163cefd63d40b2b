"""What a run keeps out of training where its recipe does not say: decided once, when it starts, and saved with it.

A recipe that leaves `holdout_episodes` open gets a few episodes held out, so that every run has a validation and a best
checkpoint. A run that goes on keeps what it began with: one of before this has nothing held out.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpi.checkpoints.find import complete_steps
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.training import data_loader, recipe_io
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig

logger = logging.getLogger("openpi")

_SHARE, _MOST = 0.05, 20
_FEWEST = 3  # episodes of a dataset that can spare one


def decided(config: TrainConfig, num_devices: int = 1) -> TrainConfig:
    """The recipe with a number for `holdout_episodes`, and where some are held out that it did not ask for, the best
    checkpoint kept. Data that cannot be read hold none out, which is said where they are opened.

    Args:
        num_devices: that a batch is spread over, and so the fewest frames of one.
    """
    if config.holdout_episodes is not None:
        return config
    if config.resume and (steps := complete_steps(config.checkpoint_dir)):
        return dataclasses.replace(config, **_begun_with(config, config.checkpoint_dir / str(steps[-1])))
    number = _chosen(config, num_devices)
    return dataclasses.replace(config, holdout_episodes=number, keep_best=config.keep_best or number > 0)


def _begun_with(config: TrainConfig, checkpoint: Path) -> dict[str, Any]:
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


def _chosen(config: TrainConfig, num_devices: int) -> int:
    """How many episodes each dataset can spare: 5 % of the smallest, at least one, at most 20, more where these are no
    batch for all devices; none where a dataset is too small, or where the recipe names some.
    """
    try:
        data_config = config.data.create(config.assets_dirs, config.model)
        members = data_config.members
        if data_loader.holds_out(config, data_config) or any(
            member.stream_format is not None or member.repo_id in (None, data_loader.FAKE_REPO_ID) for member in members
        ):
            return 0
        datasets = [(member, data_loader.open_metadata(member)) for member in members]
    except (OSError, ValueError, KeyError):  # raised again where the data are opened
        return 0
    fewest = min(len(metadata.episodes) for _, metadata in datasets)
    number = min(_MOST, max(1, math.ceil(_SHARE * fewest)))
    off = "--holdout-episodes=N holds some out, and validates on them"
    if fewest < _FEWEST:
        logger.info("no episode is held out for validation, as there are only %d; %s", fewest, off)
        return 0
    train, validation = _frames(config, number, datasets)
    while 0 < validation < num_devices and number < fewest - 1:
        number += 1
        train, validation = _frames(config, number, datasets)
    if train < config.batch_size or validation < num_devices:
        logger.info(
            "no episode is held out for validation: too few frames would be left for a batch, or be held out for one "
            "on %d device(s); %s",
            num_devices,
            off,
        )
        return 0
    logger.info(
        "%d of %s episodes are held out for validation, as the recipe does not say; --holdout-episodes=0 trains on all",
        number * len(datasets),
        " + ".join(str(len(metadata.episodes)) for _, metadata in datasets),
    )
    return number


def _frames(
    config: TrainConfig, number: int, datasets: Sequence[tuple[DataConfig, LeRobotMetadata]]
) -> tuple[int, int]:
    """Fewest frames of a dataset to train on, and to validate on, with so many episodes held out; 0 where the recipe
    excludes too many.
    """
    spared = dataclasses.replace(config, holdout_episodes=number)
    fewest = [math.inf, math.inf]
    for data_config, metadata in datasets:
        try:
            split = data_loader.holdout_split(spared, metadata, data_config)
        except ValueError:
            return 0, 0
        lengths = {episode.index: episode.length for episode in metadata.episodes}
        fewest = [min(least, sum(lengths[each] for each in part)) for least, part in zip(fewest, split, strict=True)]
    return int(fewest[0]), int(fewest[1])
