"""Checkpoints without the frozen weights (`save_frozen_params=False`): what is left out, and where it is read again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.shared import download
from openpi.training import recipe_io
from openpi.training.backend import Backend, State
from openpi.training.config import TrainConfig
from openpi.training.freeze import Filter, freeze_nothing
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import layout, names, opening
from openpi.weights.adapter_base import AdapterBase, Frozen
from openpi.weights.compare import LoadReport


def left_out(config: TrainConfig) -> Filter:
    """Which parameters a checkpoint of this recipe does not hold."""
    return freeze_nothing if config.save_frozen_params else config.freeze_filter


def check_recipe(config: TrainConfig, backend: Backend) -> None:
    """Raises ValueError for a recipe whose frozen weights could not be read again."""
    if config.save_frozen_params:
        return
    _loader(config)
    if not _frozen_paths(config, backend):
        raise ValueError(
            "save_frozen_params=False, but freeze_filter freezes nothing: checkpoints would hold all weights anyway. "
            "Leave it out, or set freeze_filter=model.get_freeze_filter()"
        )


def check_base(config: TrainConfig, backend: Backend, report: LoadReport) -> None:
    """Raises ValueError unless the base, of which `report` tells, has what checkpoints leave out."""
    if config.save_frozen_params:
        return
    there = set(report.loaded)
    missing = [path for path in _frozen_paths(config, backend) if path not in there]
    if missing:
        raise ValueError(
            f"save_frozen_params=False, but {len(missing)} frozen parameters are not in {_loader(config).params_path} "
            f"and start at random, such as {missing[0]}: they would be lost. Leave save_frozen_params=True, or do not "
            "freeze them"
        )


def check_scale(config: TrainConfig) -> None:
    """Raises ValueError where a run would start from adapters that were trained with another scale: in this model they
    would make another policy. The weights have been fetched; those that say nothing of their recipe are taken as they
    are.
    """
    loader = config.start_weights
    if not isinstance(loader, CheckpointWeightLoader):
        return
    step = layout.step_of(download.maybe_download(loader.params_path))
    try:
        changes = recipe_io.changes_since(step, config)  # as data; nothing of that folder is run
    except ValueError:  # of another version
        return
    check_same_scale(changes, loader.params_path)


def check_same_scale(changes: Sequence[tuple[str, object, object]], place: Path | str) -> None:
    """As `check_scale`, from what has changed in the recipe since the checkpoint in `place`: field, before, now."""
    for field, before, now in changes:
        if field.endswith(("_lora.alpha", "_lora.rslora")):
            raise ValueError(
                f"{field} is {now}, and the adapters in {place} were trained with {before}: they would make another "
                "policy. Use theirs, or merge them first (`openpi export`)"
            )


def base_of(config: TrainConfig, backend: Backend, state: State, resumed_from: Checkpoint | None) -> AdapterBase | None:
    """What checkpoints have to say about the frozen weights that they leave out; None when they hold all.

    Raises:
        ValueError: the run continues with weights that are not those of the recipe's `weight_loader`; or it has trained
            some that are frozen, and would be left out, now.
    """
    if config.save_frozen_params:
        return None
    paths = _frozen_paths(config, backend)
    before = None if resumed_from is None else resumed_from.read(AdapterBase.load)
    if before is not None:
        trained = [path for path in paths if path not in before.frozen]
        if trained:
            raise ValueError(
                f"freeze_filter freezes {len(trained)} parameters that {resumed_from} has trained, such as "
                f"{trained[0]}: without frozen weights (save_frozen_params=False) the next checkpoint would lose them. "
                "Add --save-frozen-params, or freeze what the run began with"
            )
        return before  # whatever the recipe says now: this is where they were read
    shapes = {path: tuple(spec.shape) for path, spec in backend.param_specs().items()}
    digests = backend.digests(state, paths)
    frozen = {path: Frozen(shapes[path], digest) for path, digest in digests.items()}
    base = AdapterBase.of(_loader(config).params_path, frozen)
    if resumed_from is not None:
        opening.check_base(names.rows_of(shapes), base)
    return base


def _frozen_paths(config: TrainConfig, backend: Backend) -> list[str]:
    return [path for path in backend.param_specs() if config.freeze_filter(path)]


def _loader(config: TrainConfig) -> CheckpointWeightLoader:
    if not isinstance(config.start_weights, CheckpointWeightLoader):
        raise ValueError(
            f"save_frozen_params=False needs frozen weights that lie in a checkpoint; weight_loader is a "
            f"{type(config.start_weights).__name__}. Use CheckpointWeightLoader, or leave save_frozen_params=True"
        )
    return config.start_weights
