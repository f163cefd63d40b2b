"""The training loop. `train` reads in time order; what it calls is in the files named after it.

Source: the training specification, section 10. Differences: metrics of every step reach `metrics.jsonl`, the data order
continues on resume, and a signal ends the run with a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openpi import transforms
from openpi.checkpoints.checkpoint import ACTION_TOKENIZER_DIR, TOKENIZER_FILE, Checkpoint
from openpi.data.batch_order import merged_state
from openpi.models.tokenizer import load_sentencepiece
from openpi.shared import normalize
from openpi.shared.errors import first_line
from openpi.training import recipe_io
from openpi.training.backend import Backend, Metric, PlacedBatch, State, open_backend
from openpi.training.checkpoints import Checkpoints
from openpi.training.config import TrainConfig
from openpi.training.data import holdout, recipe_data
from openpi.training.data.first_batch import contact_sheet
from openpi.training.data.prefetch import GaveUpError, Prefetcher
from openpi.training.data.recipe_data import RecipeData
from openpi.training.distributed import processes
from openpi.training.run import adapters, preflight, resume, run_directory, tracking, validation_picture
from openpi.training.run.interrupts import Interrupts, StoppedError
from openpi.training.run.progress import Progress, Stopwatch, Window
from openpi.training.run.validation import Validation
from openpi.weights.adapter_base import AdapterBase

logger = logging.getLogger(__name__)

# One of several processes, stuck in its data: the others can neither step nor save.
_PATIENCE_AFTER_SIGNAL_S = 30


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        checkpoint: the last one written; None = there is none.
        step: loop index of the last step done; -1 = none.
        metrics: reported last.
        signum: the signal that ended the run early, or None.
    """

    checkpoint: Path | None
    step: int
    metrics: Mapping[str, float]
    signum: int | None = None


def train(config: TrainConfig) -> TrainResult:
    """Runs a recipe from its first step, or from its latest checkpoint, to its last.

    Raises:
        ImportError: the recipe's backend is not installed.
        ValueError, FileNotFoundError, FileExistsError: the recipe, the data or the run's folder do not fit; raised
            before anything long starts.
        OSError: a checkpoint could not be written; those before it are intact.
    """
    with processes.together("checking the recipe"):
        backend = open_backend(config)
        preflight.check_recipe(config, backend)
    if not run_directory.will_continue(config):
        with processes.together("fetching the weights"):
            preflight.check_weights(config, backend)
    with processes.together("opening the data"):
        data_config = recipe_data.expanded(config)
        holdout.check_holdout(config, data_config)
        data = recipe_data.open_recipe(config, data_config)
        config = holdout.decided(config, data, backend.num_devices)
    processes.check_same("the recipes differ", recipe_io.recipe_values(config))
    if config.save_interval == 0:
        logger.info("save_interval=0: the only checkpoint is that of the end, or of a signal")
    checkpoints, last_step = run_directory.open_run(config)
    with checkpoints, Interrupts(may_leave_at_once=processes.count() == 1) as interrupts:
        try:
            return _train(config, data, backend, checkpoints, last_step, interrupts)
        except StoppedError as stopped:
            checkpoint = None if last_step is None else checkpoints.path(last_step)
            return TrainResult(checkpoint, -1 if last_step is None else last_step, {}, stopped.signum)


def _train(
    config: TrainConfig,
    opened: RecipeData,
    backend: Backend,
    checkpoints: Checkpoints,
    last_step: int | None,
    interrupts: Interrupts,
) -> TrainResult:
    """In the run's folder, after `last_step`."""
    checkpoint = None if last_step is None else Checkpoint(checkpoints.path(last_step))
    data = preflight.prepare(config, opened, num_devices=backend.num_devices, checkpoint=checkpoint)
    needed = backend.required_bytes(adapters.left_out(config))
    processes.on_first("checking the disk", lambda: preflight.check_disk_space(config, needed))
    window = Window(backend.wait)
    if checkpoint is None:
        state = backend.create_state()
    else:
        state = resume.continue_run(config, backend, checkpoint, data, window)
    _log_size(config, backend)
    base = adapters.base_of(config, backend, state, checkpoint)
    if config.overwrite:  # Not before: a run that cannot start costs nothing.
        processes.on_first("replacing the run", lambda: run_directory.replace(config.checkpoint_dir))
    run = _Run(config, backend, data, checkpoints, base, window, interrupts)
    result = run.steps(state, 0 if last_step is None else last_step + 1)
    checkpoints.wait()
    return result


@dataclasses.dataclass
class _Run:
    """The steps, and what is done after some of them."""

    config: TrainConfig
    backend: Backend
    data: preflight.TrainingData
    checkpoints: Checkpoints
    base: AdapterBase | None
    window: Window
    interrupts: Interrupts
    reported: dict[str, float] = dataclasses.field(default_factory=dict)
    saved_step: int | None = None

    def steps(self, state: State, start: int) -> TrainResult:
        """From step `start` to the last one, or until a process has a signal; the last checkpoint is being written."""
        config, backend = self.config, self.backend
        done, signum, metrics = start - 1, 0, None
        with self._opened(start):
            self.interrupts.expect_steps()
            for step in range(start, config.num_train_steps):
                try:
                    with self._kept_if_it_fails(done, state, metrics):
                        batch = next(self.batches)
                except GaveUpError:
                    signum = self._leave_without_batch(done, state, metrics)
                    break
                if step == start:
                    self._show(step, batch)
                state, metrics = backend.train_step(state, batch)
                done = step
                self.window.add(metrics)
                self.progress.step_done()
                is_last = step == config.num_train_steps - 1
                if is_last or step % config.log_interval == 0:
                    self._report_means(step, metrics)
                evaluated = {}
                if _is_due(step, _eval_interval(config), is_last):
                    with self._kept_if_it_fails(step, state, metrics):
                        evaluated = self._evaluate(step, state)
                signum = backend.vote(self.interrupts.signum or 0)
                if _is_due(step, config.save_interval, is_last) or signum:
                    self._save(step, state, metrics, evaluated)
                if signum:
                    break
        return TrainResult(None if done < 0 else self.checkpoints.path(done), done, self.reported, signum or None)

    def _leave_without_batch(self, done: int, state: State, metrics: Mapping[str, Metric] | None) -> int:
        """A signal came while the data did not: saves the last step, if it is not; returns the signal.

        Raises:
            RuntimeError: there are other processes, which wait for this one in a step and cannot save.
        """
        if processes.count() > 1:
            raise RuntimeError(
                f"a signal came, no batch has for {_PATIENCE_AFTER_SIGNAL_S} s, and the others wait for it; the "
                "checkpoints before are intact"
            )
        self._save_if_new(done, state, metrics)
        assert self.interrupts.signum is not None
        return self.interrupts.signum

    @contextlib.contextmanager
    def _kept_if_it_fails(self, done: int, state: State, metrics: Mapping[str, Metric] | None) -> Iterator[None]:
        """A sample that cannot be read, or a validation that fails, costs no step that is done: it is saved first.

        Not of one of several processes: the others wait for it in a step, and cannot save.
        """
        try:
            yield
        except GaveUpError:
            raise
        except Exception as error:
            if processes.count() == 1:
                logger.error("after step %d: %s", done, first_line(error))
                try:
                    self._save_if_new(done, state, metrics)
                except Exception as another:
                    logger.error("%s", another)
            raise

    def _save_if_new(self, done: int, state: State, metrics: Mapping[str, Metric] | None) -> None:
        if metrics is not None and self.saved_step != done:
            self._save(done, state, metrics, {})

    def _may_give_up(self, waited_s: float) -> bool:
        """Whether to wait no longer for a batch: alone at once, one of several when the others have waited long."""
        return self.interrupts.signum is not None and (processes.count() == 1 or waited_s > _PATIENCE_AFTER_SIGNAL_S)

    @contextlib.contextmanager
    def _opened(self, start: int) -> Iterator[None]:
        """What lives as long as the steps do. Of several processes the first reports."""
        config, data, is_first = self.config, self.data, processes.is_first()
        with contextlib.ExitStack() as closing:
            self.validate = None
            if data.holdout is not None:
                self.validate = Validation(config, data, self.backend, lambda: self.interrupts.signum is not None)
            directory = self.checkpoints.directory
            resume_step = start or None
            self.observers = (
                tracking.open_observers(config, directory, resume_step=resume_step)
                if is_first
                else tracking.Observers(())
            )
            closing.callback(self.observers.close)
            self.batches = Prefetcher(data.train, self.backend.place, first=start, may_give_up=self._may_give_up)
            closing.callback(self.batches.close)
            closing.callback(data.train.close)  # before: its thread may be waiting for a worker that never comes back
            self.stopwatch = Stopwatch()
            self.progress = Progress(num_steps=config.num_train_steps, start=start, is_shown=is_first)
            closing.enter_context(self.progress)
            yield

    def _show(self, step: int, batch: PlacedBatch) -> None:
        sheet = contact_sheet(self.backend.local_rows(batch))
        self.observers.image(step, run_directory.FIRST_BATCH, sheet)

    def _report_means(self, step: int, metrics: Mapping[str, Metric]) -> None:
        samples = len(self.window) * self.config.batch_size
        self._check_finite(step, metrics)
        means = self.window.means()  # waits for the device
        self.reported = means | self.stopwatch.read(samples=samples, waited_s=self.batches.waited_s)
        self._report(step, self.reported)

    def _evaluate(self, step: int, state: State) -> dict[str, float]:
        if self.validate is None:
            return {}
        with self.stopwatch.paused():
            evaluated = self.validate(state)
        if not evaluated:
            logger.info("the validation after step %d is left out: the run is to stop", step)
            return {}
        self.reported |= evaluated
        self._report(step, evaluated)
        if self.observers and self.validate.shown is not None:
            picture = validation_picture.draw(*self.validate.shown, self.validate.names)
            self.observers.image(step, run_directory.VALIDATION, picture)
        return evaluated

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.report(step, metrics)
        self.observers.log(step, metrics)

    def _save(self, step: int, state: State, metrics: Mapping[str, Metric], evaluated: dict[str, float]) -> None:
        self._check_finite(step, metrics)
        self.saved_step = step
        left_out = adapters.left_out(self.config)
        extras = _Extras(self.config, self.data, loader_state(self.batches.state), self.window, self.base)
        self.checkpoints.save(
            step,
            lambda directory: self.backend.begin_write(directory, state, left_out),
            required_bytes=self.backend.required_bytes(left_out),
            write_extras=extras.write,
            metrics=evaluated,
        )

    def _check_finite(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Raises RuntimeError when the loss, the gradient or the weights after the step are no numbers.

        Nothing is learnt any more; good checkpoints must not go.
        """
        values = {name: float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")}
        for name in [name for name, value in values.items() if not math.isfinite(value)]:
            steps = self.checkpoints.steps()
            good = (
                f"the checkpoint of step {steps[-1]} is from before" if steps else "there is no checkpoint from before"
            )
            raise RuntimeError(
                f"the {name} of step {step} is {values[name]}; {good}. Look for NaN and outliers in the data "
                "(`openpi stats`, `openpi explain`), or lower the learning rate"
            )


def loader_state(own: Mapping[str, object]) -> dict[str, object]:
    """Where the data are, from what each process knows: of a stream, each reads its own part."""
    return merged_state(processes.exchange("where the data are", own))


def _is_due(step: int, interval: int, is_last: bool) -> bool:
    """Step 0 is no milestone; the last step always is one, and with an interval of 0 the only one."""
    return (step > 0 and interval > 0 and step % interval == 0) or is_last


def _eval_interval(config: TrainConfig) -> int:
    return config.save_interval if config.eval_interval is None else config.eval_interval


def _log_size(config: TrainConfig, backend: Backend) -> None:
    sizes = {path: math.prod(spec.shape) for path, spec in backend.param_specs().items()}
    num_frozen = sum(size for path, size in sizes.items() if config.freeze_filter(path))
    logger.info(
        "%s: %s parameters train, %s are frozen; %d devices (%s) of %d processes",
        config.name,
        f"{sum(sizes.values()) - num_frozen:,}",
        f"{num_frozen:,}",
        backend.num_devices,
        backend.device_kind,
        processes.count(),
    )


@dataclasses.dataclass(frozen=True)
class _Extras:
    """The small files of a checkpoint: what serving it, and continuing it, needs besides the arrays."""

    config: TrainConfig
    data: preflight.TrainingData
    loader_state: Any
    window: Window
    base: AdapterBase | None

    def write(self, directory: Path) -> None:
        recipe_io.save_recipe(directory, self.config)
        if self.base is not None:
            self.base.save(directory)
        if self.data.contract is not None:
            self.data.contract.save(directory)
        loop_state = {
            "loader": self.loader_state,
            "window": self.window.values(),
            resume.CONTENT: self.data.content,
            resume.HELD: list(self.data.held),
            resume.EPISODES: self.data.num_episodes,
        }
        (directory / resume.LOOP_STATE_FILE).write_text(json.dumps(loop_state))
        self._write_assets(directory / "assets")

    def _write_assets(self, assets: Path) -> None:
        assets.mkdir()
        data_config = self.data.config
        for member in data_config.members:
            if member.norm_stats is not None and member.asset_id is not None:
                normalize.save(assets / member.asset_id, member.norm_stats)
        tokenizer_path = getattr(self.config.model, "tokenizer_path", None)
        if tokenizer_path is not None:
            model_bytes = load_sentencepiece(tokenizer_path).serialized_model_proto()
            (assets.parent / TOKENIZER_FILE).write_bytes(model_bytes)
        codec = transforms.action_codec(data_config.model_transforms.outputs)
        if codec is not None:
            codec.save(assets.parent / ACTION_TOKENIZER_DIR)
