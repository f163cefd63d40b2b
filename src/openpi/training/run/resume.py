"""Continuing a run: with the recipe that it was started with, and what to do where that cannot be."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.checkpoints.find import complete_steps
from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.strict_json import Json
from openpi.training import recipe_io
from openpi.training.backend import Backend, State
from openpi.training.config import TrainConfig
from openpi.training.data.training_data import TrainingData
from openpi.training.recipe import overrides
from openpi.training.run import adapters
from openpi.training.run.progress import Window
from openpi.training.run.run_directory import damaged_message
from openpi.weights import checksums

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound="DataclassInstance")

LOOP_STATE_FILE = "loader_state.json"
_CONTENT, _HELD = "content", "held_out"  # of the data, in it
# Which run it is, and what is done with it; never taken from a checkpoint.
_OF_THE_COMMAND = ("exp_name", "resume", "overwrite", "checkpoint_base_dir")
# Flags that change which dataset there is, and which samples.
_OF_THE_DATASET = ("data",)
_OF_THE_DATA = (*_OF_THE_DATASET, "holdout_episodes", "seed")


def with_own_values(recipe: TrainConfig, config: TrainConfig) -> TrainConfig:
    """A recipe with the values that a run was started with, wherever there is a flag for them.

    Functions, transforms and classes are those of the recipe as it is now.

    Args:
        recipe: as it is named.
        config: the same with the flags of the command, which say where the run is.
    """
    steps = complete_steps(config.checkpoint_dir)
    if not steps:
        return recipe
    checkpoint = Checkpoint(config.checkpoint_dir / str(steps[-1]))
    try:
        stored = checkpoint.read(recipe_io.load_recipe)
    except FileNotFoundError:
        return recipe  # of the reference trainer
    except ValueError as error:
        logger.warning("the flags of this run have to be given again: %s", first_line(error))
        return recipe
    own = _merged(recipe, stored, config, "")
    logger.info("continuing with the recipe of the run, from %s; flags change it", checkpoint)
    return own


def _merged(now: Config, before: object, flagged: object, path: str) -> Config:
    """A configuration with the plain values that another of the same class has. They are told, but for those that
    `flagged`, the configuration with the flags of the command, changes once more.
    """
    changes: dict[str, Any] = {}
    for name in overrides.flag_names(now):
        if (not path and name in _OF_THE_COMMAND) or not hasattr(before, name):
            continue
        current, stored = getattr(now, name), getattr(before, name)
        if dataclasses.is_dataclass(current) and not isinstance(current, type):
            # The class itself may have been loaded from the copy of the recipe's file in the checkpoint.
            if type(stored).__qualname__ == type(current).__qualname__:
                changes[name] = _merged(current, stored, getattr(flagged, name), f"{path}{name}.")
        elif stored != current and overrides.is_plain(stored) and (stored := _as_now(stored, current)) is not None:
            flag = f"--{path}{name}".replace("_", "-")
            if getattr(flagged, name, current) == current:
                logger.info("as the run was started: %s=%s (the recipe says %s)", flag, stored, current)
            changes[name] = stored
    return dataclasses.replace(now, **changes)


def _as_now(stored: object, current: object) -> object:
    """A plain value of a checkpoint as the recipe of now has it; None for a choice that it does not have.

    The class of a choice may have been loaded from the copy of the recipe's file in the checkpoint.
    """
    if not isinstance(stored, enum.Enum) or type(stored).__module__.startswith("openpi."):
        return stored
    return type(current).__members__.get(stored.name) if isinstance(current, enum.Enum) else None


def continue_run(
    config: TrainConfig, backend: Backend, checkpoint: Checkpoint, data: TrainingData, window: Window
) -> State:
    """The state of a checkpoint; data order and metrics go on, too.

    Raises:
        ValueError: the checkpoint is damaged, or of another recipe; what has changed is named by its flag, with what
            can be done.
    """
    found = recipe_io.changes_since(checkpoint.folder, config)
    adapters.check_same_scale(found, checkpoint.folder)
    changes = {field: (old, new) for field, old, new in found if field not in _OF_THE_COMMAND}
    for field, (old, new) in changes.items():  # they hold from here on
        logger.warning("changed since the checkpoint: %s was %s, is %s", field, old, new)
    try:
        checksums.check_small_files(checkpoint.folder)
        state = backend.restore_state(checkpoint.folder)
        loop_state = _read_loop_state(checkpoint)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(_cannot_continue(config, checkpoint, changes, error)) from error
    if loop_state is not None:
        _restore_data(config, checkpoint, changes, data, loop_state["loader"], loop_state[_CONTENT])
        if not any(field.split(".")[0] in _OF_THE_DATASET for field in changes):
            _compare_held(data, loop_state[_HELD])
        window.restore(loop_state["window"])
    return state


def write_loop_state(directory: Path, data: TrainingData, where: Mapping[str, object], window: Window) -> None:
    """What `continue_run` reads again, into the folder of a checkpoint.

    Args:
        where: the loader is.
    """
    loop_state = {"loader": where, "window": window.values(), _CONTENT: data.content, _HELD: data.held}
    (directory / LOOP_STATE_FILE).write_text(json.dumps(loop_state))


def _read_loop_state(checkpoint: Checkpoint) -> Json | None:
    """Checkpoints of the reference trainer have none, and the data order starts anew."""
    file = checkpoint.folder / LOOP_STATE_FILE
    if not file.is_file():
        logger.warning("%s has no %s: the data order starts from the seed again", checkpoint, LOOP_STATE_FILE)
        return None
    try:
        loop_state = strict_json.read(file)
        return {
            "loader": dict(loop_state["loader"]),
            "window": list(loop_state["window"]),
            _CONTENT: str(loop_state.get(_CONTENT, "")),
            _HELD: [(int(count), [int(number) for number in held]) for count, held in loop_state.get(_HELD, ())],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {first_line(error)}") from error


def _cannot_continue(config: TrainConfig, checkpoint: Checkpoint, changes: Json, error: Exception) -> str:
    """Why, and how to go on: whoever changed the model or the optimizer knows it by the flag."""
    of_state = ("model.", "optimizer", "ema", "backend", "freeze_filter")
    fitting = {field: value for field, value in changes.items() if field.startswith(of_state)}
    if isinstance(error, FileNotFoundError) and not fitting:
        return str(error)  # the base of adapters is not there, or another trainer wrote it
    if not fitting:
        return damaged_message(checkpoint.folder.parent, int(checkpoint.folder.name), first_line(error))
    flags = ", ".join(f"--{field.replace('_', '-')} was {old}, is {new}" for field, (old, new) in fitting.items())
    return (
        f"{error}\nChanged since the checkpoint: {flags}. Leave these flags out to continue, or start a new run from "
        f"the weights with --exp-name=NEW {weights_flag(config, checkpoint)}"
    )


def _restore_data(
    config: TrainConfig,
    checkpoint: Checkpoint,
    changes: Mapping[str, object],
    data: TrainingData,
    state: Mapping[str, object],
    content: str,
) -> None:
    """The data order goes on; where the data are others, a new one begins, and that is said."""
    different = data.train.changes_since(state)
    if not different:
        data.train.restore(state)
        if content and data.content and content != data.content:
            logger.warning(
                "the numbers of %s are others than when %s was written, in as many frames (units, order of joints, "
                "repaired episodes?). The run goes on with them and with the statistics of the old ones; if that is "
                "not meant, bring the dataset back, or start anew with --exp-name=NEW %s",
                data.config.dataset_name,
                checkpoint,
                weights_flag(config, checkpoint),
            )
        return
    told = ", ".join(f"{key} was {was}, is {now}" for key, (was, now) in different.items())
    was, now = different.get("num_samples", (None, None))  # of a stream there is no number
    is_meant = any(field.split(".")[0] in _OF_THE_DATA for field in changes)
    if was is not None and now is not None and was > now and not is_meant:
        raise ValueError(
            f"the dataset {data.config.dataset_name} has fewer samples than when {checkpoint} was written ({told}), "
            "and no flag says why. Bring the missing episodes back; or, if they are meant to be gone, start a new run "
            f"from the weights with --exp-name=NEW {weights_flag(config, checkpoint)}"
        )
    logger.warning(
        "the data order of the run cannot go on (%s): weights, optimizer and step are kept, and a new order begins. "
        "To start from the weights alone: --exp-name=NEW %s",
        told,
        weights_flag(config, checkpoint),
    )
    data.train.restart_after(state)


def _compare_held(data: TrainingData, before: list[tuple[int, list[int]]]) -> None:
    """Says that episodes are held out that the run has trained on, as where a dataset grew or a flag changed."""
    for member, (_, now), (num_episodes, held) in zip(data.config.members, data.held, before, strict=False):
        trained = [number for number in now if number < num_episodes and number not in held]
        if trained:
            flag = "validation_episodes of that part:" if data.config.mixture else "--data.validation-episodes"
            logger.warning(
                "of %s, held out are now also episodes %s, which the run has trained on, so its validation and its "
                "best checkpoint say less. To keep those of before: --holdout-episodes=0 %s",
                member.dataset_name,
                trained,
                " ".join([flag, *map(str, held)]) if held else "",
            )


def weights_flag(config: TrainConfig, checkpoint: Checkpoint) -> str:
    """What starts a new run of the recipe from a checkpoint's weights."""
    if config.backend == "jax" and hasattr(config.weight_loader, "params_path"):
        return f"--weight-loader.params-path={checkpoint}"
    return f"--pytorch-weight-path={checkpoint}"  # which JAX takes where there is nothing else
