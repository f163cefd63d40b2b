"""The folder of one run: when it may be used, and what of it survives."""

from __future__ import annotations

import logging
import shutil
import socket
import time
import uuid
from pathlib import Path

from openpi.checkpoints.find import complete_steps, damaged_steps
from openpi.training.checkpoints import LOCK_FILE, Checkpoints
from openpi.training.config import TrainConfig
from openpi.training.distributed import processes
from openpi.weights.adapter_base import KEEP_FILE

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
FIRST_BATCH, VALIDATION = "first_batch", "validation"  # pictures: one of a run, and one of each validation
# At least one of them, or a checkpoint, is in the folder of a run, of another trainer's, too.
_SIGNS_OF_A_RUN = (METRICS_FILE, f"{FIRST_BATCH}.png", "wandb_id.txt")
# Network file systems may show a new file late.
_SHARED_WITHIN_S = 10


def will_continue(config: TrainConfig) -> bool:
    """Whether `open_run` is going to find a step to continue after. All processes call it; nothing is changed.

    Raises:
        FileExistsError, ValueError: as of `open_run`, which is called when what takes long is done. Or overwriting
            would delete the weights that the run starts from.
    """
    continues = False
    with processes.together("looking at the run's folder"):
        if processes.is_first():
            _check(config.checkpoint_dir, overwrite=config.overwrite, resume=config.resume)
            if config.overwrite:
                _check_starts_elsewhere(config)
            continues = config.resume and bool(complete_steps(config.checkpoint_dir))
    return bool(processes.exchange("whether the run is continued", continues)[0])


def open_run(config: TrainConfig) -> tuple[Checkpoints, int | None]:
    """The run's checkpoints, and the step to continue after; None = a fresh start.

    Process 0 decides and cleans up; the others follow.

    Raises:
        FileExistsError: the folder exists, and neither `overwrite` nor `resume` is set.
        RuntimeError: another process is training in it; or this one does not see what process 0 writes there.
        ValueError: no experiment name; or the newest checkpoint is to be continued and is damaged.
    """
    checkpoints, last_step = None, None
    with processes.together("opening the run's folder"):
        if processes.is_first():
            checkpoints, last_step = _open(config)
    if processes.count() > 1:
        last_step = processes.exchange("the step to continue after", last_step)[0]
        _check_shared(config.checkpoint_dir)
    if checkpoints is None:
        checkpoints = Checkpoints(config.checkpoint_dir, keep_period=config.keep_period, keep_best=config.keep_best)
    return checkpoints, last_step


def _open(config: TrainConfig) -> tuple[Checkpoints, int | None]:
    directory = config.checkpoint_dir
    checkpoints, last_step = open_directory(
        directory,
        keep_period=config.keep_period,
        keep_best=config.keep_best,
        overwrite=config.overwrite,
        resume=config.resume,
    )
    if last_step is not None and last_step >= config.num_train_steps - 1:
        logger.warning("%s is complete: nothing is left to do. Raise --num-train-steps to train on", directory)
    elif last_step is not None:
        logger.info("resuming after step %d of %s", last_step, directory)
    return checkpoints, last_step


def open_directory(
    directory: Path, *, keep_period: int | None, keep_best: bool = False, overwrite: bool, resume: bool
) -> tuple[Checkpoints, int | None]:
    """A folder's checkpoints, and the step to continue after; None = a fresh start.

    Args:
        overwrite: a run may be there. The caller deletes it, by `replace`, when nothing can stop the new one.
    Raises:
        FileExistsError: the folder holds a run, and neither `overwrite` nor `resume` is set; or it is to be overwritten
            and holds something else than one run, or weights that adapters elsewhere are read with.
        RuntimeError: another process is training in it.
    """
    _check(directory, overwrite=overwrite, resume=resume)
    checkpoints = Checkpoints(directory, keep_period=keep_period, keep_best=keep_best)
    if not resume:
        return checkpoints, None
    steps = complete_steps(directory)
    if not steps:
        others = sorted(run.name for run in directory.parent.iterdir() if complete_steps(run))
        known = f"; runs with checkpoints: {', '.join(others)}" if others else ""
        logger.warning("nothing to resume in %s, so it starts anew%s", directory, known)
        return checkpoints, None
    return checkpoints, steps[-1]


def check_disk_space(config: TrainConfig, needed: int) -> None:
    """Two checkpoints have to fit for a moment: the new one is complete before the old one goes.

    Args:
        needed: bytes of one.
    Raises:
        OSError: they do not.
    """
    free = shutil.disk_usage(config.checkpoint_dir).free
    if config.overwrite:  # The old run goes when this one begins.
        free += _size(config.checkpoint_dir)
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


def _size(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(file.lstat().st_size for file in directory.rglob("*") if not file.is_dir())


def replace(directory: Path) -> None:
    """Deletes the run in a folder, of which the lock stays."""
    if _holds_a_run(directory):
        steps = complete_steps(directory)
        logger.info("replacing the run in %s (%s)", directory, f"step {steps[-1]}" if steps else "no checkpoint")
    _wipe(directory)


def _check(directory: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises what `open_directory` does for what is in the folder."""
    if overwrite and _holds_a_run(directory):
        _check_is_one_run(directory)
        _check_is_read_by_none(directory)
    if _holds_a_run(directory) and not (overwrite or resume):
        raise FileExistsError(
            f"{directory} exists already; delete the run in it with --overwrite, continue it with --resume, or "
            "choose another --exp-name"
        )
    if resume:
        _check_newest_is_whole(directory)


def _check_newest_is_whole(directory: Path) -> None:
    """Raises ValueError otherwise: what training would do instead costs the work of many steps, or all of it."""
    damaged, steps = damaged_steps(directory), complete_steps(directory)
    newest = max([*damaged, *steps], default=None)
    if newest in damaged:
        folder = directory / str(newest)
        if (folder / "optimizer.pt").is_file():
            raise ValueError(
                f"{folder} is a checkpoint of the published PyTorch trainer, whose optimizer.pt is not read; start "
                f"another run from its weights: --exp-name=ANOTHER --pytorch-weight-path={folder}, without --resume"
            )
        raise ValueError(damaged_message(directory, newest, f"it lacks {damaged[newest]}"))


def damaged_message(directory: Path, step: int, what: str) -> str:
    """That a checkpoint cannot be continued, and how to go on from the newest that can."""
    damaged = damaged_steps(directory)
    whole = [other for other in complete_steps(directory) if other < step and other not in damaged]
    name = directory / str(step)
    if whole:
        way = f"The newest whole one before it is step {whole[-1]}: to continue from there, move the damaged one away"
    else:
        way = "There is no whole one before it. To start anew, choose another --exp-name, or move it away"
    return f"the checkpoint of step {step} in {directory} is damaged: {what}. {way} (mv {name} {name}.damaged)"


def _check_shared(directory: Path) -> None:
    """Raises RuntimeError in all processes unless all see a file that process 0 has just written."""
    here = f"{socket.gethostname()}:{directory}"
    name, where = processes.exchange("a sign in the run's folder", [f".seen-{uuid.uuid4().hex}", here])[0]
    with processes.together("writing a sign"):
        if processes.is_first():
            (directory / name).touch()
    try:
        with processes.together("looking for the sign"):
            deadline = time.monotonic() + _SHARED_WITHIN_S
            while not (directory / name).exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{here} is not the folder {where} of process 0; all processes write one checkpoint, so set "
                        "--checkpoint-base-dir to a folder that all nodes share, and start all in the same directory"
                    )
                time.sleep(0.1)
    finally:
        if processes.is_first():
            (directory / name).unlink()


def _holds_a_run(directory: Path) -> bool:
    """A start that was refused leaves nothing but its lock."""
    return directory.exists() and (
        not directory.is_dir() or any(not e.name.startswith(LOCK_FILE) for e in directory.iterdir())
    )


def _check_is_one_run(directory: Path) -> None:
    """Raises FileExistsError where overwriting would delete what is no run's, or several runs."""
    entries = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    runs = [entry.name for entry in entries if not entry.name.isdecimal() and entry.is_dir() and complete_steps(entry)]
    if not runs and any(entry.name.isdecimal() or entry.name in _SIGNS_OF_A_RUN for entry in entries):
        return
    held = f"the runs {', '.join(runs[:5])}" if runs else f"no run, but {', '.join(e.name for e in entries[:5])}"
    raise FileExistsError(
        f"{directory} holds {held}, which --overwrite would delete; choose another --exp-name, or move them away"
    )


def _check_starts_elsewhere(config: TrainConfig) -> None:
    """Raises FileExistsError where overwriting would delete the weights that this run starts from."""
    directory = config.checkpoint_dir
    place = getattr(config.start_weights, "params_path", None)
    if place is not None and directory in Path(place).expanduser().resolve().parents:
        raise FileExistsError(
            f"{place} is in {directory}: --overwrite would delete the weights that the run starts from; choose another "
            "--exp-name"
        )


def _check_is_read_by_none(directory: Path) -> None:
    """Raises FileExistsError where adapters elsewhere are read with a step of the run."""
    read = [step for step in complete_steps(directory) if (directory / str(step) / KEEP_FILE).exists()]
    if read:
        raise FileExistsError(
            f"adapters elsewhere are read with step {read[0]} of {directory}, which --overwrite would delete; choose "
            f"another --exp-name. If those adapters are gone, delete {directory / str(read[0]) / KEEP_FILE}"
        )


def _wipe(directory: Path) -> None:
    """Everything but the lock, which this process holds."""
    for entry in directory.iterdir():
        if entry.name.startswith(LOCK_FILE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
