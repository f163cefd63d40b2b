"""Checks before anything long starts: the recipe, the dataset, its statistics, one sample all the way, the disk.

Every refusal names what was found, what was expected and what to do. Source: the training specification, section 14.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from openpi.models.model_config import freeze_nothing
from openpi.shared.tree import unflatten
from openpi.training import recipe_io, weight_loaders
from openpi.training.backend import Backend
from openpi.training.config import TrainConfig
from openpi.training.data_config import LeRobotLiberoDataConfig
from openpi.training.distributed import processes
from openpi.training.run import adapters, tracking
from openpi.weights import published_tree
from openpi.weights.blocks import Weights

logger = logging.getLogger(__name__)

_NUM_SAMPLES_CHECKED = 8
_PLACEHOLDERS = ("<path_to", "your_hf_username", "/path/to/your")


def check_recipe(config: TrainConfig, backend: Backend) -> None:
    """Refuses recipes that cannot train, and warns of those that waste.

    Raises:
        ValueError: the reason and the fix.
    """
    config.checkpoint_dir  # noqa: B018  # raises without an experiment name
    if processes.is_first():
        tracking.check_installed(config)
    _check_dataset_name(config)
    _warn_of_deltas_of_deltas(config)
    recipe_io.recipe_values(config)  # raises what saving it would
    adapters.check_recipe(config, backend)
    backend.check()
    paths = backend.param_specs()
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
    _warn_of_memory(config, backend)


def _warn_of_memory(config: TrainConfig, backend: Backend) -> None:
    """Before weights are fetched and read: a machine without room ends the process without a word."""
    needed = backend.required_bytes(freeze_nothing) / config.fsdp_devices  # a checkpoint is the state
    there = backend.device_bytes or _host_bytes()
    if needed > there:
        logger.warning(
            "weights, moments and average take about %.1f GB on each device, which has %.1f GB, before gradients and "
            "activations: this run will probably end for lack of memory. `openpi train %s --plan` says what takes less",
            needed / 1e9,
            there / 1e9,
            config.name,
        )


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_dataset_name(config: TrainConfig) -> None:
    for data in config.data.members:
        rlds_data_dir = getattr(data, "rlds_data_dir", None)
        if data.repo_id is None and rlds_data_dir is None:
            raise ValueError(
                f"recipe '{config.name}' has no dataset: it serves a released checkpoint. Name one with "
                "--data.repo-id, or train another recipe"
            )
        for field, value in {"data.repo_id": data.repo_id, "data.rlds_data_dir": rlds_data_dir}.items():
            if value is not None and any(placeholder in str(value) for placeholder in _PLACEHOLDERS):
                flag = field.replace("_", "-")
                raise ValueError(f"{field}={value!r} is a placeholder of recipe '{config.name}'; set it with --{flag}")


def _warn_of_deltas_of_deltas(config: TrainConfig) -> None:
    # Other data configurations have a field of this name, for actions that are absolute.
    if isinstance(config.data, LeRobotLiberoDataConfig) and config.data.extra_delta_transform:
        logger.warning(
            "recipe '%s' subtracts the state from actions that are relative already, if they are LIBERO's, as released "
            "checkpoints were trained; new runs on them succeed more often without: add "
            "--data.no-extra-delta-transform and compute the statistics again, or train "
            "pi0_fast_libero_no_delta_transform",
            config.name,
        )


def open_weights(config: TrainConfig, backend: Backend) -> Weights | None:
    """Fetches the weights that a fresh run starts from, and compares their shapes with the model's.

    Every process of a run does: on a node without them, it would fetch them while the others wait in a collective.

    Returns:
        them; None of a loader of a user's own that can only read all of them, which waits until all else is checked.
    Raises:
        ValueError: they do not fit, or are damaged.
        FileNotFoundError, ConnectionError: they are not there.
    """
    loader, reference = config.start_weights, unflatten(dict(backend.param_specs()))
    weights = weight_loaders.open_weights(loader, reference) if weight_loaders.opens(loader) else None
    check: Any = getattr(loader, "check", lambda params: None)  # loaders of users need not have it
    report = check(reference) if weights is None else published_tree.by_path(weights)
    adapters.check_base(config, backend, report)
    adapters.check_scale(config)
    return weights
