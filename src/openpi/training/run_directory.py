"""The folder of one run: when it may be used, and what of it survives."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from openpi.training.checkpoints import Checkpoints, complete_steps
from openpi.training.config import TrainConfig

logger = logging.getLogger("openpi")


def open_run(config: TrainConfig) -> tuple[Checkpoints, int | None]:
    """The run's checkpoints, and the step to continue after; None = a fresh start.

    Raises:
        FileExistsError: the folder exists, and neither `overwrite` nor `resume` is set.
        RuntimeError: another process is training in it.
        ValueError: no experiment name.
    """
    directory = config.checkpoint_dir
    if _holds_a_run(directory) and not (config.overwrite or config.resume):
        raise FileExistsError(
            f"{directory} exists already; delete the run in it with --overwrite, continue it with --resume, or "
            "choose another --exp-name"
        )
    checkpoints = Checkpoints(directory, keep_period=config.keep_period, keep_best=config.keep_best)
    if config.overwrite:
        _wipe(directory)
    if not config.resume:
        return checkpoints, None
    steps = complete_steps(directory)
    if not steps:
        others = sorted(run.name for run in directory.parent.iterdir() if complete_steps(run))
        known = f"; runs with checkpoints: {', '.join(others)}" if others else ""
        logger.warning("nothing to resume in %s, so it starts anew%s", directory, known)
        return checkpoints, None
    if steps[-1] >= config.num_train_steps - 1:
        logger.warning("%s is complete: nothing is left to do. Raise --num-train-steps to train on", directory)
    else:
        logger.info("resuming after step %d of %s", steps[-1], directory)
    return checkpoints, steps[-1]


def _holds_a_run(directory: Path) -> bool:
    """A start that was refused leaves nothing but its lock."""
    return directory.exists() and (not directory.is_dir() or any(e.name != ".lock" for e in directory.iterdir()))


def _wipe(directory: Path) -> None:
    """Everything but the lock, which this process holds."""
    for entry in directory.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
