"""Checkpoints of a training script of one's own, by the published functions, over `openpi.training.checkpoints`.

    manager, resuming = initialize_checkpoint_dir(folder, keep_period=None, overwrite=False, resume=True)
    if resuming: state = restore_state(manager, state, data_loader)
    save_state(manager, state, data_loader, step)
    manager.wait_until_finished()

Programs import these names from `openpi.training.checkpoints`. What they write can be served, and has the tree that the
published trainer restores. Source: the checkpoint specification, section 1.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from openpi.shared import normalize
from openpi.training.backends.jax import state_files
from openpi.training.backends.jax.step import TrainState
from openpi.training.checkpoints import Checkpoints
from openpi.training.run import run_directory


class CheckpointManager:
    """The checkpoints of a folder, under the names that Orbax's manager has for what scripts ask of it."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    @property
    def directory(self) -> Path:
        return self.checkpoints.directory

    def all_steps(self) -> list[int]:
        return self.checkpoints.steps()

    def latest_step(self) -> int | None:
        return max(self.checkpoints.steps(), default=None)

    def wait_until_finished(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            OSError: it failed.
        """
        self.checkpoints.wait()

    def close(self) -> None:
        """As `wait_until_finished`, and lets other processes use the folder."""
        self.checkpoints.close()


def initialize_checkpoint_dir(
    checkpoint_dir: Path | str, *, keep_period: int | None, overwrite: bool, resume: bool
) -> tuple[CheckpointManager, bool]:
    """The checkpoints of a folder, and whether there is one to continue from.

    Raises:
        FileExistsError: the folder holds a run, and neither `overwrite` nor `resume` is set.
        RuntimeError: another process is training in it.
    """
    folder = Path(checkpoint_dir).resolve()
    checkpoints, last_step = run_directory.open_directory(
        folder, keep_period=keep_period, overwrite=overwrite, resume=resume
    )
    if overwrite:
        run_directory.replace(folder)
    return CheckpointManager(checkpoints), last_step is not None


def save_state(checkpoint_manager: CheckpointManager, state: TrainState, data_loader: Any, step: int) -> None:
    """Copies the state to the host, then writes it in the background, with the loader's normalization statistics.

    Raises:
        OSError: this save, or the one before, did not succeed; complete checkpoints are untouched.
    """
    data_config = data_loader.data_config()

    def write_extras(folder: Path) -> None:
        if data_config.norm_stats is not None and data_config.asset_id is not None:
            normalize.save(folder / "assets" / data_config.asset_id, data_config.norm_stats)

    checkpoint_manager.checkpoints.save(
        int(step),
        lambda folder: state_files.begin_write(folder, state),
        required_bytes=state_files.required_bytes(_described(state)),
        write_extras=write_extras,
    )


def restore_state(
    checkpoint_manager: CheckpointManager, state: TrainState, data_loader: object, step: int | None = None
) -> TrainState:
    """The state of a checkpoint.

    Args:
        state: one of the same structure, of arrays or of shapes; where it lies on devices, so does what is read.
        data_loader: not looked at: the order of data begins anew.
        step: None = the latest.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it does not fit the state; the leaves that differ are named.
    """
    del data_loader
    steps = checkpoint_manager.all_steps()
    step = checkpoint_manager.latest_step() if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{checkpoint_manager.directory} has no checkpoint of step {step}; it has {steps}")
    return state_files.restore_state(checkpoint_manager.checkpoints.path(step), _described(state))


def load_norm_stats(assets_dir: Path | str, asset_id: str) -> dict[str, normalize.NormStats]:
    """The statistics in a checkpoint's `assets` folder.

    Raises:
        FileNotFoundError: there are none of this id.
    """
    return normalize.load(Path(assets_dir) / asset_id)


def _described(state: TrainState) -> TrainState:
    """Shapes, dtypes and places of a state, whose leaves may be plain numbers."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=getattr(leaf, "sharding", None))

    return jax.tree.map(describe, state)
