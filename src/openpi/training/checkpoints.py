"""Checkpoints of a run: complete or absent, in the published layout, written beside the training.

    <run>/<step>/params/  train_state/      what the backend writes: JAX the weights that inference reads, and the rest;
                 model.safetensors  ...     PyTorch its weights, and the rest
                 assets/<asset id>/norm_stats.json
                 recipe.json  contract.json  loader_state.json  ...      small files given by the caller

A step directory is named after the loop index; the stored step counts finished steps, so it is one more. Everything is
written to a hidden sibling, flushed to disk and renamed; a process that dies at any moment leaves whole checkpoints
and hidden left-overs, which the next start removes.

In a run of several processes all of them call the same methods of their own `Checkpoints` on one folder of a shared
file system. Each writes its parts of the arrays; process 0 does the rest, once all have written theirs.
Source: the checkpoint specification, section 1.2.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from openpi.checkpoints.find import complete_steps
from openpi.shared import published, strict_json
from openpi.shared.errors import first_line
from openpi.shared.locks import FileLock, HeldElsewhereError
from openpi.training.distributed import processes
from openpi.weights import checksums
from openpi.weights.adapter_base import KEEP_FILE

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"  # and what begins so
METRICS_FILE = "eval_metrics.json"
_PARTIAL = ".partial-"
_DISCARDED = ".discarded-"

PUBLISHED = ("CheckpointManager", "initialize_checkpoint_dir", "load_norm_stats", "restore_state", "save_state")


def __getattr__(name: str) -> object:
    """`save_state` and the other published functions, which need JAX."""
    return published.attribute(__name__, name, "openpi.training.backends.jax.published_checkpoints", PUBLISHED)


BeginWrite = Callable[[Path], Callable[[], None]]
WriteExtras = Callable[[Path], None]


class Checkpoints:
    """The step directories of one run, owned by the processes of one run at a time.

    Args:
        directory: of the run; created if need be.
        keep_period: keep steps that are multiples of it; None = only the latest.
        keep_best: also keep the step with the lowest `validation_loss`.
    Raises:
        OSError: the directory cannot be made, or written in.
        RuntimeError: another run is training in this directory.
    """

    def __init__(self, directory: Path | str, *, keep_period: int | None = None, keep_best: bool = False) -> None:
        self.directory = Path(directory)
        self._keep_period = keep_period
        self._keep_best = keep_best
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._lock: FileLock | None = None
        if processes.is_first():
            self._take_over()

    def _take_over(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.directory)
        except OSError as error:
            what = f"{error.strerror}: a run cannot be written here; choose another folder (--checkpoint-base-dir)"
            raise OSError(error.errno, what, str(self.directory)) from error
        for leftover in [*self.directory.glob(f"{_PARTIAL}*"), *self.directory.glob(f"{_DISCARDED}*")]:
            logger.info("removing the unfinished checkpoint %s", leftover)
            shutil.rmtree(leftover)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._pending is not None and processes.count() > 1:
            # The others may be gone, and then the framework ends this process while it waits for them.
            logger.error("%s; waiting for the checkpoint that is being written", first_line(error))
        self.close()

    def steps(self) -> list[int]:
        """Names of the complete checkpoints, ascending."""
        return complete_steps(self.directory)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(
        self,
        step: int,
        begin_write: BeginWrite,
        *,
        required_bytes: int,
        write_extras: WriteExtras,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Copies the state to the host, then writes in the background; waits for the save before.

        If that one failed, waits for this one, too: a disk that was full for a while costs no run its newest state.

        Args:
            step: loop index.
            begin_write: as of `Backend`: copies the state; what it returns writes it into the given directory.
            required_bytes: that it may take there.
            write_extras: writes the small files into the given directory; called before this returns, so that
                it sees the loop as it is now.
            metrics: of the validation at this step; `validation_loss` decides which is best.
        Raises:
            OSError: this save did not succeed, or cannot; complete checkpoints are untouched.
        """
        failed = None
        try:
            self.wait()
        except OSError as error:
            failed = error
        partial = self.directory / f"{_PARTIAL}{step}"
        with processes.together(f"preparing the checkpoint of step {step}"):
            if processes.is_first():
                self._check_space(step, partial, required_bytes)
                self._prepare(step, partial, write_extras, metrics)
        self._pending = self._writer.submit(self._write, step, partial, begin_write(partial))
        if failed is not None:
            self.wait()
            logger.warning("%s (that of step %d is written)", failed, step)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            OSError: it failed.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._lock is not None:
                self._lock.release()

    def _prepare(
        self,
        step: int,
        partial: Path,
        write_extras: WriteExtras,
        metrics: dict[str, float] | None,
    ) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            write_extras(partial)
            if metrics:
                (partial / METRICS_FILE).write_text(json.dumps(metrics))
        except OSError as error:
            raise self._failure(step, partial, error) from error

    def _write(self, step: int, partial: Path, write: Callable[[], None]) -> None:
        try:
            with processes.together(f"writing the arrays of the checkpoint of step {step}"):
                write()
            with processes.together(f"completing the checkpoint of step {step}"):
                if processes.is_first():
                    self._complete(step, partial)
        except Exception as error:  # a full disk is reported as one of several types
            failure = self._failure(step, partial, error)
            logger.error("%s", failure)  # now: who waits for this save is told of it again
            raise failure from error
        if processes.is_first():
            logger.info("checkpoint saved: %s", self.path(step))
            try:
                self._prune()
            except (OSError, ValueError) as error:  # the new checkpoint is whole; the next start removes what is left
                logger.warning("older checkpoints could not be removed: %s", error)

    def _complete(self, step: int, partial: Path) -> None:
        checksums.write(partial)
        _flush(partial)
        partial.rename(self.path(step))
        _flush_folder(self.directory)

    def _failure(self, step: int, partial: Path, error: Exception) -> OSError:
        if processes.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        intact = self.steps()
        kept = (
            f"the checkpoints of step {', '.join(map(str, intact))} are intact" if intact else "there is none before it"
        )
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.directory}: "
            f"{first_line(error)[:300]}; {kept}. "
            f"{shutil.disk_usage(self.directory).free / 1e9:.1f} GB are free there; make room, then continue with "
            "--resume"
        )

    def _check_space(self, step: int, partial: Path, needed: int) -> None:
        if needed > shutil.disk_usage(self.directory).free:
            raise self._failure(step, partial, OSError(f"no space left: it takes {needed / 1e9:.2f} GB"))

    def _prune(self) -> None:
        steps = self.steps()
        kept = {steps[-1]}
        if self._keep_period:
            kept |= {step for step in steps if step % self._keep_period == 0}
        if self._keep_best:
            kept |= {best for best in [best_step(self.directory)] if best is not None}
        kept |= {step for step in steps if (self.path(step) / KEEP_FILE).exists()}
        for step in set(steps) - kept:
            # Renamed first: a half-deleted checkpoint must not look like one.
            discarded = self.path(step).rename(self.directory / f"{_DISCARDED}{step}")
            shutil.rmtree(discarded)


def best_step(directory: Path | str) -> int | None:
    """The step with the lowest validation loss among those that have one; NaN is none.

    Raises:
        ValueError: a file with a loss is damaged.
    """
    losses = {}
    for step in complete_steps(directory):
        file = Path(directory) / str(step) / METRICS_FILE
        if not file.is_file():
            continue
        try:
            losses[step] = float(strict_json.read(file).get("validation_loss", math.nan))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({first_line(error)}), so which step is best is not known; delete that file if its "
                "step need not be kept"
            ) from error
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return min(losses, key=lambda step: (losses[step], step), default=None)


def _lock(directory: Path) -> FileLock:
    """Held until the process ends, however it ends."""
    lock = FileLock(directory / LOCK_FILE)
    try:
        lock.acquire(wait=False)
    except HeldElsewhereError as error:
        raise RuntimeError(
            f"another process is training in {directory}; wait for it, or choose another --exp-name ({error.strerror})"
        ) from error
    return lock


def _flush(folder: Path) -> None:
    """To disk: a rename may otherwise survive a power cut that the contents do not."""
    for root, _, files in os.walk(folder):
        for name in files:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
