"""What a run keeps out of training where its recipe does not say: decided once, when it starts, and saved with it.

A recipe that leaves `holdout_episodes` open gets a few episodes held out, so that every run has a validation and a best
checkpoint. A run that goes on keeps what it began with: one of before this has nothing held out.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from openpi.checkpoints.find import complete_steps
from openpi.training import data_loader, recipe_io
from openpi.training.config import TrainConfig

logger = logging.getLogger("openpi")

_SHARE, _MOST = 0.05, 20
_FEWEST = 3  # episodes of a dataset that can spare one


def decided(config: TrainConfig) -> TrainConfig:
    """The recipe with a number for `holdout_episodes`, and where some are held out that it did not ask for, the best
    checkpoint kept. Data that cannot be read hold none out, which is said where they are opened.
    """
    if config.holdout_episodes is not None:
        return config
    if config.resume and (steps := complete_steps(config.checkpoint_dir)):
        return dataclasses.replace(config, **_begun_with(config, config.checkpoint_dir / str(steps[-1])))
    number = _chosen(config)
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


def _chosen(config: TrainConfig) -> int:
    """How many episodes can be spared: 5 %, at least one, at most 20, none of a dataset that is too small."""
    try:
        data_config = config.data.create(config.assets_dirs, config.model)
        if data_config.stream_format is not None or data_config.repo_id in (None, data_loader.FAKE_REPO_ID):
            return 0
        metadata = data_loader.open_metadata(data_config)
    except (OSError, ValueError, KeyError):  # raised again where the data are opened
        return 0
    lengths = {episode.index: episode.length for episode in metadata.episodes}
    number = min(_MOST, max(1, math.ceil(_SHARE * len(lengths))))
    off = "--holdout-episodes=N holds some out, and validates on them"
    if len(lengths) < _FEWEST:
        logger.info("no episode is held out for validation, as there are only %d; %s", len(lengths), off)
        return 0
    try:
        train, held = data_loader.holdout_split(
            dataclasses.replace(config, holdout_episodes=number), metadata, data_config
        )
    except ValueError:  # of the episodes that are not excluded
        train, held = [], []
    if sum(lengths[episode] for episode in train) < config.batch_size:
        logger.info("no episode is held out for validation: too few frames would be left for a batch; %s", off)
        return 0
    logger.info(
        "%d of %d episodes are held out for validation, as the recipe does not say; --holdout-episodes=0 trains on all",
        len(held),
        len(lengths),
    )
    return number
