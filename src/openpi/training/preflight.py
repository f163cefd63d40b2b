"""Checks before anything long starts: the recipe, the dataset, its statistics, one sample all the way, the disk.

Every refusal names what was found, what was expected and what to do. Source: the training specification, section 14.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from typing import Any

import jax

from openpi.policies.contract import Contract
from openpi.shared.tree import flatten
from openpi.training import data_loader, norm_stats
from openpi.training.checkpoints import required_bytes
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig
from openpi.training.step_jax import TrainState

logger = logging.getLogger("openpi")

FAKE_REPO_ID = "fake"
_PLACEHOLDERS = ("<path_to", "your_hf_username", "/path/to/your")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What the loop reads.

    Attributes:
        config: with statistics.
        train: endless batches of the training episodes, resumable.
        holdout: batches of the episodes kept out; None when there are none.
        contract: what a policy trained on this data expects and gives; None for random data.
        action_names: of the robot's action dimensions; empty when unknown.
    """

    config: DataConfig
    train: Any
    holdout: Any | None
    contract: Contract | None
    action_names: tuple[str, ...] = ()


def check_recipe(config: TrainConfig) -> None:
    """Refuses recipes that cannot train, and warns of those that waste.

    Raises:
        ValueError: the reason and the fix.
    """
    config.checkpoint_dir  # noqa: B018  # raises without an experiment name
    _check_dataset_name(config)
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of the {jax.device_count()} devices of this machine; "
            "every device takes an equal share"
        )
    config.lr_schedule.create()
    paths = flatten(config.model.abstract_params())
    frozen = [path for path in paths if config.freeze_filter(path)]
    if len(frozen) == len(paths):
        raise ValueError("freeze_filter freezes every parameter; nothing would be trained")
    has_adapters = any("lora" in path for path in paths)
    if has_adapters and not frozen:
        logger.warning(
            "the model has adapters (LoRA) but nothing is frozen: set freeze_filter=model.get_freeze_filter()"
        )
    if frozen and config.ema_decay is not None:
        logger.warning(
            "ema_decay=%s keeps a second copy of all weights, also of the %d frozen ones; None saves that memory",
            config.ema_decay,
            len(frozen),
        )


def _check_dataset_name(config: TrainConfig) -> None:
    repo_id = config.data.repo_id
    if repo_id is None:
        raise ValueError(
            f"recipe '{config.name}' has no dataset: it serves a released checkpoint. Name one with --data.repo-id, or "
            "train another recipe"
        )
    values = {"data.repo_id": repo_id, "data.rlds_data_dir": getattr(config.data, "rlds_data_dir", None)}
    for field, value in values.items():
        if value is not None and any(placeholder in str(value) for placeholder in _PLACEHOLDERS):
            flag = field.replace("_", "-")
            raise ValueError(
                f"{field}={value!r} is a placeholder of recipe '{config.name}'; set it with --{flag}"
            )


def open_data(config: TrainConfig) -> TrainingData:
    """Opens the dataset, computes the statistics if there are none, and runs one sample through everything.

    Raises:
        FileNotFoundError, ValueError, KeyError: the dataset is not there, or does not fit the recipe.
    """
    if config.data.repo_id == FAKE_REPO_ID:
        data_config = config.data.create(config.assets_dirs, config.model)
        return TrainingData(data_config, data_loader.create_data_loader(config, split="train"), None, None)
    ensure_norm_stats(config)
    data_config = config.data.create(config.assets_dirs, config.model)
    train = data_loader.create_data_loader(config, split="train")
    holdout = data_loader.create_data_loader(config, split="val") if config.holdout_episodes else None
    return TrainingData(data_config, train, holdout, None)


def ensure_norm_stats(config: TrainConfig) -> None:
    """Computes and writes the statistics of the dataset where the recipe reads them, unless they are there."""
    if config.data.create(config.assets_dirs, config.model).norm_stats is not None:
        return
    where = config.data.stats_dir(config.assets_dirs)
    logger.info("no normalisation statistics yet; computing them from the dataset's columns")
    norm_stats.compute(config)
    logger.info("statistics written to %s", where)


def check_disk_space(config: TrainConfig, spec: TrainState) -> None:
    """Two checkpoints have to fit for a moment: the new one is complete before the old one goes.

    Raises:
        OSError: they do not.
    """
    needed, free = required_bytes(spec), shutil.disk_usage(config.checkpoint_dir).free
    if needed > free:
        raise OSError(
            f"a checkpoint takes up to {needed / 1e9:.1f} GB, and only {free / 1e9:.1f} GB are free in "
            f"{config.checkpoint_dir}; make room or choose another --checkpoint-base-dir"
        )
    if 2 * needed > free:
        logger.warning(
            "%.1f GB are free; two checkpoints may take %.1f GB while one replaces the other",
            free / 1e9,
            2 * needed / 1e9,
        )
