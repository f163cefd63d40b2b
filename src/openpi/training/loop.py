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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openpi import transforms
from openpi.data.batch_loader import merged_state
from openpi.models.tokenizer import load_sentencepiece
from openpi.policies.policy_config import ACTION_TOKENIZER_DIR, TOKENIZER_FILE
from openpi.shared import normalize
from openpi.training import adapters, preflight, processes, recipe_io, run_directory
from openpi.training.backend import Backend, PlacedBatch, State, open_backend
from openpi.training.checkpoints import Checkpoints
from openpi.training.config import TrainConfig
from openpi.training.first_batch import contact_sheet
from openpi.training.interrupts import Interrupts
from openpi.training.prefetch import Prefetcher
from openpi.training.progress import Progress, Stopwatch, Window
from openpi.training.tracking import open_observers
from openpi.training.validation import Validation
from openpi.weights import checksums
from openpi.weights.adapter_base import AdapterBase

logger = logging.getLogger("openpi")

LOOP_STATE_FILE = "loader_state.json"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        checkpoint: the last one written.
        step: loop index of the last step done.
        metrics: reported last.
        signum: the signal that ended the run early, or None.
    """

    checkpoint: Path
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
    processes.check_same("the recipes differ", recipe_io.recipe_values(config))
    checkpoints, last_step = run_directory.open_run(config)
    with checkpoints, Interrupts() as interrupts:
        if last_step is None:
            processes.on_first("fetching the weights", lambda: preflight.check_weights(config, backend))
        data = preflight.open_data(config, num_devices=backend.num_devices)
        needed = backend.required_bytes(adapters.left_out(config))
        processes.on_first("checking the disk", lambda: preflight.check_disk_space(config, needed))
        window = Window(backend.wait)
        if last_step is None:
            state = backend.create_state()
        else:
            state = _continue(config, backend, checkpoints.path(last_step), data, window)
        _log_size(config, backend)
        base = adapters.base_of(config, backend, state, None if last_step is None else checkpoints.path(last_step))
        run = _Run(config, backend, data, checkpoints, base, window)
        result = run.steps(state, 0 if last_step is None else last_step + 1, lambda: interrupts.signum or 0)
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

    def steps(self, state: State, start: int, signum_here: Callable[[], int]) -> TrainResult:
        """From step `start` to the last one, or until a process has a signal; the last checkpoint is being written."""
        config, backend = self.config, self.backend
        step, signum = start - 1, 0
        with self._opened(start):
            for step in range(start, config.num_train_steps):
                batch = next(self.batches)
                if step == start:
                    self._show(step, batch)
                state, metrics = backend.train_step(state, batch)
                self.window.add(metrics)
                self.progress.step_done()
                is_last = step == config.num_train_steps - 1
                if is_last or step % config.log_interval == 0:
                    self._report_means(step, metrics)
                evaluated = {}
                if _is_due(step, config.eval_interval or config.save_interval, is_last):
                    evaluated = self._evaluate(step, state)
                signum = backend.vote(signum_here())
                if _is_due(step, config.save_interval, is_last) or signum:
                    self._save(step, state, metrics, evaluated)
                if signum:
                    break
        return TrainResult(self.checkpoints.path(step), step, self.reported, signum or None)

    @contextlib.contextmanager
    def _opened(self, start: int) -> Iterator[None]:
        """What lives as long as the steps do. Of several processes the first reports."""
        config, data, is_first = self.config, self.data, processes.is_first()
        self.reported: dict[str, float] = {}
        with contextlib.ExitStack() as closing:
            closing.callback(data.train.close)
            self.validate = None if data.holdout is None else Validation(config, data, self.backend)
            directory = self.checkpoints.directory
            self.observers = open_observers(config, directory, resume_step=start or None) if is_first else []
            for observer in self.observers:
                closing.callback(observer.close)
            self.batches = Prefetcher(data.train, self.backend.place, first=start)
            closing.callback(self.batches.close)
            self.stopwatch = Stopwatch()
            self.progress = Progress(num_steps=config.num_train_steps, start=start, is_shown=is_first)
            closing.enter_context(self.progress)
            yield

    def _show(self, step: int, batch: PlacedBatch) -> None:
        sheet = contact_sheet(self.backend.local_rows(batch))
        for observer in self.observers:
            observer.image(step, "first_batch", sheet)

    def _report_means(self, step: int, metrics: Mapping[str, Any]) -> None:
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
        self.reported |= evaluated
        self._report(step, evaluated)
        return evaluated

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.report(step, metrics)
        for observer in self.observers:
            observer.log(step, metrics)

    def _save(self, step: int, state: State, metrics: Mapping[str, Any], evaluated: dict[str, float]) -> None:
        self._check_finite(step, metrics)
        left_out = adapters.left_out(self.config)
        extras = _Extras(self.config, self.data, loader_state(self.batches.state), self.window, self.base)
        self.checkpoints.save(
            step,
            lambda directory: self.backend.begin_write(directory, state, left_out),
            required_bytes=self.backend.required_bytes(left_out),
            write_extras=extras.write,
            metrics=evaluated,
        )

    def _check_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Raises RuntimeError when the loss is no number: nothing is learnt any more; good checkpoints must not go."""
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            steps = self.checkpoints.steps()
            good = (
                f"the checkpoint of step {steps[-1]} is from before" if steps else "there is no checkpoint from before"
            )
            raise RuntimeError(
                f"the loss of step {step} is {loss}; {good}. Look for NaN and outliers in the data (`openpi stats`, "
                "`openpi explain`), or lower the learning rate"
            )


def loader_state(own: Mapping[str, Any]) -> dict[str, Any]:
    """Where the data are, from what each process knows: of a stream, each reads its own part."""
    return merged_state(processes.exchange("where the data are", own))


def _is_due(step: int, interval: int, is_last: bool) -> bool:
    """Step 0 is no milestone; the last step always is one."""
    return (step > 0 and step % interval == 0) or is_last


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
        loop_state = {"loader": self.loader_state, "window": self.window.values()}
        (directory / LOOP_STATE_FILE).write_text(json.dumps(loop_state))
        self._write_assets(directory / "assets")

    def _write_assets(self, assets: Path) -> None:
        assets.mkdir()
        data_config = self.data.config
        if data_config.norm_stats is not None and data_config.asset_id is not None:
            normalize.save(assets / data_config.asset_id, data_config.norm_stats)
        tokenizer_path = getattr(self.config.model, "tokenizer_path", None)
        if tokenizer_path is not None:
            model_bytes = load_sentencepiece(tokenizer_path).serialized_model_proto()
            (assets.parent / TOKENIZER_FILE).write_bytes(model_bytes)
        codec = transforms.action_codec(data_config.model_transforms.outputs)
        if codec is not None:
            codec.save(assets.parent / ACTION_TOKENIZER_DIR)


def _continue(
    config: TrainConfig, backend: Backend, checkpoint: Path, data: preflight.TrainingData, window: Window
) -> State:
    """The state of a checkpoint; data order and metrics go on, too."""
    _log_changes(checkpoint, config)
    checksums.check_small_files(checkpoint)
    state = backend.restore_state(checkpoint)
    _restore_loop(checkpoint, data, window)
    return state


def _log_changes(checkpoint: Path, config: TrainConfig) -> None:
    """A resumed run may have other flags than before; they hold from here on."""
    for field, old, new in recipe_io.changes_since(checkpoint, config):
        if field not in ("resume", "overwrite"):
            logger.warning("changed since the checkpoint: %s was %s, is %s", field, old, new)


def _restore_loop(checkpoint: Path, data: preflight.TrainingData, window: Window) -> None:
    """Continues the data order; checkpoints of the reference trainer do not have it and start it anew."""
    file = checkpoint / LOOP_STATE_FILE
    if not file.is_file():
        logger.warning("%s has no %s: the data order starts from the seed again", checkpoint, LOOP_STATE_FILE)
        return
    loop_state = json.loads(file.read_text())
    data.train.restore(loop_state["loader"])
    window.restore(loop_state["window"])
