"""The training loop. `train` reads in time order; what it calls is in the files named after it.

Source: the training specification, section 10. Differences: metrics of every step reach `metrics.jsonl`, the data order
continues on resume, and a signal ends the run with a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from openpi import transforms
from openpi.checkpoints.checkpoint import ACTION_TOKENIZER_DIR, TOKENIZER_FILE, Checkpoint
from openpi.data.batch_order import merged_state
from openpi.models.tokenizer import load_sentencepiece
from openpi.shared import normalize
from openpi.shared.errors import first_line
from openpi.training import recipe_io
from openpi.training.backend import STEPS_IN_FLIGHT, Backend, Metric, PlacedBatch, State, open_backend
from openpi.training.checkpoints import Checkpoints
from openpi.training.config import TrainConfig
from openpi.training.data import holdout, recipe_data, training_data
from openpi.training.data.prefetch import Prefetcher
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data.training_data import TrainingData
from openpi.training.distributed import processes
from openpi.training.run import adapters, pictures, preflight, resume, run_directory, tracking
from openpi.training.run.interrupts import Interrupts, StoppedError
from openpi.training.run.progress import Progress, Stopwatch, Window
from openpi.training.run.validation import Validation
from openpi.weights.adapter_base import AdapterBase
from openpi.weights.blocks import Weights

logger = logging.getLogger(__name__)

# A reason to stop beside the numbers of signals: a batch cannot be made.
_NO_BATCH = 255


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
    weights = None
    if not run_directory.will_continue(config):
        with processes.together("fetching the weights"):
            weights = preflight.open_weights(config, backend)
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
            return _train(config, data, backend, weights, checkpoints, last_step, interrupts)
        except StoppedError as stopped:
            checkpoint = None if last_step is None else checkpoints.path(last_step)
            return TrainResult(checkpoint, -1 if last_step is None else last_step, {}, stopped.signum)


def _train(
    config: TrainConfig,
    opened: RecipeData,
    backend: Backend,
    weights: Weights | None,
    checkpoints: Checkpoints,
    last_step: int | None,
    interrupts: Interrupts,
) -> TrainResult:
    """In the run's folder, after `last_step`."""
    needed = backend.required_bytes(adapters.left_out(config))
    processes.on_first("checking the disk", lambda: run_directory.check_disk_space(config, needed))
    checkpoint = None if last_step is None else Checkpoint(checkpoints.path(last_step))
    data = training_data.prepare(config, opened, num_devices=backend.num_devices, checkpoint=checkpoint)
    window = Window(backend.wait)
    if checkpoint is None:
        state = backend.create_state(weights)
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
    data: TrainingData
    checkpoints: Checkpoints
    base: AdapterBase | None
    window: Window
    interrupts: Interrupts
    reported: dict[str, float] = dataclasses.field(default_factory=dict)
    saved_step: int | None = None

    def steps(self, state: State, start: int) -> TrainResult:
        """From step `start` to the last one, or until a process has a signal, or no batch; the last checkpoint is being
        written.
        """
        config, backend = self.config, self.backend
        done, metrics, evaluated = start - 1, None, {}
        with self._opened(start):
            stop = max(processes.exchange("whether the first batches are there", self._reason_to_stop(start)))
            self.interrupts.expect_steps()
            for step in range(start, 0 if stop else config.num_train_steps):
                batch = next(self.batches)
                if step == start:
                    self._show(step, batch)
                state, metrics = backend.train_step(state, batch)
                done, evaluated = step, {}
                self.window.add(metrics)
                self.progress.step_done()
                is_last = step == config.num_train_steps - 1
                if is_last or step % config.log_interval == 0:
                    self._report_means(step, metrics)
                if _is_due(step, _eval_interval(config), is_last):
                    with self._kept_if_it_fails(step, state, metrics):
                        evaluated = self._evaluate(step, state)
                if _is_due(step, config.save_interval, is_last):
                    self._save(step, state, metrics, evaluated)
                stop = backend.vote(self._reason_to_stop(step + 1))
                if stop:
                    break
            with self._kept_if_it_fails(done, state, metrics):
                if stop == _NO_BATCH:
                    with processes.together("reading the data"):
                        self.batches.raise_error()
            if stop:
                self._save_if_new(done, state, metrics, evaluated)
        return TrainResult(None if done < 0 else self.checkpoints.path(done), done, self.reported, stop or None)

    def _reason_to_stop(self, step: int) -> int:
        """Of this process, before a step: a signal, or that it has no batch for one of those that follow; 0 = none.

        Waits for the batches of all steps that are done before everybody has heard of it: who has none any more, or
        waits for one in vain when the signal comes, can still take part in them. So all stop after one step, and save.
        """
        steps = min(_steps_until_heard(), self.config.num_train_steps - step)
        are_there = self.batches.wait_for(steps, may_give_up=lambda: self.interrupts.signum is not None)
        return self.interrupts.signum or (0 if are_there else _NO_BATCH)

    @contextlib.contextmanager
    def _kept_if_it_fails(self, done: int, state: State, metrics: Mapping[str, Metric] | None) -> Iterator[None]:
        """Data that cannot be read, or a validation that fails, cost no step that is done: it is saved first.

        Not where one of several processes fails alone: the others wait for it, and cannot save.
        """
        try:
            yield
        except Exception as error:
            if processes.all_raise(error):
                logger.error("after step %d: %s", done, first_line(error))
                try:
                    self._save_if_new(done, state, metrics, {})
                except Exception as another:
                    logger.error("%s", another)
                else:
                    with processes.together("ending the run"):
                        raise
            raise

    def _save_if_new(
        self, done: int, state: State, metrics: Mapping[str, Metric] | None, evaluated: dict[str, float]
    ) -> None:
        if metrics is not None and self.saved_step != done:
            self._save(done, state, metrics, evaluated)

    @contextlib.contextmanager
    def _opened(self, start: int) -> Iterator[None]:
        """What lives as long as the steps do. Of several processes the first reports."""
        config, data, is_first = self.config, self.data, processes.is_first()
        with contextlib.ExitStack() as closing:
            self.validate = None
            if data.holdout is not None:
                self.validate = Validation(config, data, self.backend, lambda: self.interrupts.signum is not None)
            directory = self.checkpoints.directory
            self.observers = tracking.Observers(())
            with processes.together("opening the trackers"):
                if is_first:
                    self.observers = tracking.open_observers(config, directory, start=start)
            closing.callback(self.observers.close)
            ahead = _steps_until_heard()
            self.batches = Prefetcher(data.train, self.backend.place, first=start, depth=1 + ahead)
            closing.callback(self.batches.close)
            closing.callback(data.train.close)  # before: its thread may be waiting for a worker that never comes back
            self.stopwatch = Stopwatch()
            self.progress = Progress(num_steps=config.num_train_steps, start=start, is_shown=is_first)
            closing.enter_context(self.progress)
            yield

    def _show(self, step: int, batch: PlacedBatch) -> None:
        sheet = pictures.contact_sheet(self.backend.local_rows(batch))
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
            picture = pictures.compared(*self.validate.shown, self.validate.names)
            self.observers.image(step, run_directory.VALIDATION, picture)
        return evaluated

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.report(step, metrics)
        self.observers.log(step, metrics)

    def _save(self, step: int, state: State, metrics: Mapping[str, Metric], evaluated: dict[str, float]) -> None:
        self._check_finite(step, metrics)
        self.saved_step = step
        left_out = adapters.left_out(self.config)
        self.checkpoints.save(
            step,
            lambda directory: self.backend.begin_write(directory, state, left_out),
            required_bytes=self.backend.required_bytes(left_out),
            write_extras=functools.partial(self._write_extras, loader_state(self.batches.state)),
            metrics=evaluated,
        )

    def _write_extras(self, where: Mapping[str, object], directory: Path) -> None:
        """The small files of a checkpoint: what serving it, and continuing it, needs besides the arrays."""
        recipe_io.save_recipe(directory, self.config)
        if self.base is not None:
            self.base.save(directory)
        if self.data.contract is not None:
            self.data.contract.save(directory)
        resume.write_loop_state(directory, self.data, where, self.window)
        assets = directory / "assets"
        assets.mkdir()
        for member in self.data.config.members:
            if member.norm_stats is not None and member.asset_id is not None:
                normalize.save(assets / member.asset_id, member.norm_stats)
        tokenizer_path = getattr(self.config.model, "tokenizer_path", None)
        if tokenizer_path is not None:
            model_bytes = load_sentencepiece(tokenizer_path).serialized_model_proto()
            (directory / TOKENIZER_FILE).write_bytes(model_bytes)
        codec = transforms.action_codec(self.data.config.model_transforms.outputs)
        if codec is not None:
            codec.save(directory / ACTION_TOKENIZER_DIR)

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


def _steps_until_heard() -> int:
    """How many steps all have taken when a vote is read that was given before the first of them, and one more."""
    return 1 if processes.count() == 1 else 1 + STEPS_IN_FLIGHT


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
