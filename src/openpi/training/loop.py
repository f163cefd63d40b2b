"""The training loop. `train` reads in time order; what it calls is in the files named after it.

Source: the training specification, section 10. Differences: metrics of every step reach `metrics.jsonl`, the data order
continues on resume, and a signal ends the run with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from openpi import transforms
from openpi.data.batch_loader import merged_state
from openpi.models.tokenizer import load_sentencepiece
from openpi.policies.policy_config import ACTION_TOKENIZER_DIR, TOKENIZER_FILE
from openpi.shared import normalize
from openpi.training import adapters, preflight, processes, recipe_io, run_directory, sharding, step_jax
from openpi.training.checkpoints import Checkpoints
from openpi.training.config import TrainConfig
from openpi.training.first_batch import contact_sheet
from openpi.training.interrupts import Interrupts
from openpi.training.prefetch import Prefetcher
from openpi.training.progress import Progress, Stopwatch, Window
from openpi.training.tracking import Observer, open_observers
from openpi.training.validation import Validation
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
        ValueError, FileNotFoundError, FileExistsError: the recipe, the data or the run's folder do not fit; raised
            before anything long starts.
        OSError: a checkpoint could not be written; those before it are intact.
    """
    with processes.together("checking the recipe"):
        preflight.check_recipe(config)
        mesh = sharding.make_mesh(config.fsdp_devices)
    processes.check_same("the recipes differ", recipe_io.recipe_values(config))
    checkpoints, last_step = run_directory.open_run(config)
    start = 0 if last_step is None else last_step + 1
    with checkpoints, Interrupts() as interrupts:
        if last_step is None:
            processes.on_first("fetching the weights", lambda: preflight.check_weights(config))
        processes.on_first("computing the statistics", lambda: preflight.ensure_norm_stats(config))
        with processes.together("opening the data"):
            data = preflight.open_data(config)
        spec = step_jax.state_spec(config, mesh)
        processes.on_first("checking the disk", lambda: preflight.check_disk_space(config, spec))
        init_key, train_key = jax.random.split(jax.random.key(config.seed))
        window = Window()
        if last_step is None:
            state = step_jax.create_state(config, init_key, mesh)
        else:
            state = _continue(config, checkpoints, last_step, spec, data, window)
        _log_size(config, spec)
        base = adapters.base_of(config, state, None if last_step is None else checkpoints.path(last_step))

        train_step = step_jax.compile_train_step(config, mesh)
        validate = Validation(config, data, mesh) if data.holdout is not None else None
        observers = _open_observers(config, checkpoints.directory, start)
        vote = processes.Vote(mesh)
        batches = Prefetcher(data.train, lambda batch: step_jax.place_batch(step_jax.cut_batch(config, batch), mesh))
        stopwatch, step, reported, signum = Stopwatch(), start - 1, {}, 0
        try:
            with Progress(num_steps=config.num_train_steps, start=start, is_shown=processes.is_first()) as progress:
                for step in range(start, config.num_train_steps):
                    batch = next(batches)
                    if step == start:
                        _show(observers, step, "first_batch", contact_sheet(sharding.local_rows(batch)))
                    state, metrics = train_step(train_key, state, batch)
                    window.add(metrics)
                    progress.step_done()
                    is_last = step == config.num_train_steps - 1
                    if is_last or step % config.log_interval == 0:
                        samples = len(window) * config.batch_size
                        _check_finite(step, metrics, checkpoints)
                        reported = window.means() | stopwatch.read(samples=samples, waited_s=batches.waited_s)
                        _report(observers, progress, step, reported)
                    evaluated = {}
                    if validate is not None and _is_due(step, config.eval_interval or config.save_interval, is_last):
                        with stopwatch.paused():
                            evaluated = validate(state.inference_params)
                        reported |= evaluated
                        _report(observers, progress, step, evaluated)
                    signum = vote(interrupts.signum or 0)
                    if _is_due(step, config.save_interval, is_last) or signum:
                        _check_finite(step, metrics, checkpoints)
                        extras = _Extras(config, data, loader_state(batches.state), window, base)
                        left_out = adapters.left_out(config)
                        checkpoints.save(
                            step, state, write_extras=extras.write, metrics=evaluated, is_left_out=left_out
                        )
                    if signum:
                        break
        finally:
            batches.close()
            data.train.close()
            for observer in observers:
                observer.close()
        checkpoints.wait()
        return TrainResult(checkpoints.path(step), step, reported, signum or None)


def _open_observers(config: TrainConfig, directory: Path, start: int) -> list[Observer]:
    """Of several processes the first reports."""
    return open_observers(config, directory, resume_step=start or None) if processes.is_first() else []


def loader_state(own: Mapping[str, Any]) -> dict[str, Any]:
    """Where the data are, from what each process knows: of a stream, each reads its own part."""
    return merged_state(processes.exchange("where the data are", own))


def _is_due(step: int, interval: int, is_last: bool) -> bool:
    """Step 0 is no milestone; the last step always is one."""
    return (step > 0 and step % interval == 0) or is_last


def _check_finite(step: int, metrics: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """Raises RuntimeError when the loss is no number: nothing is learnt any more, and good checkpoints must not go."""
    loss = float(metrics["loss"])
    if not np.isfinite(loss):
        steps = checkpoints.steps()
        good = f"the checkpoint of step {steps[-1]} is from before" if steps else "there is no checkpoint from before"
        raise RuntimeError(
            f"the loss of step {step} is {loss}; {good}. Look for NaN and outliers in the data (`openpi stats`, "
            "`openpi explain`), or lower the learning rate"
        )


def _report(observers: list[Observer], progress: Progress, step: int, metrics: Mapping[str, float]) -> None:
    progress.report(step, metrics)
    for observer in observers:
        observer.log(step, metrics)


def _show(observers: list[Observer], step: int, name: str, image: np.ndarray) -> None:
    for observer in observers:
        observer.image(step, name, image)


def _log_changes(checkpoint: Path, config: TrainConfig) -> None:
    """A resumed run may have other flags than before; they hold from here on."""
    if not (checkpoint / recipe_io.RECIPE_FILE).is_file():
        return
    before = recipe_io.load_recipe(checkpoint)
    for field in dataclasses.fields(config):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in ("resume", "overwrite"):
            logger.warning("changed since the checkpoint: %s was %s, is %s", field.name, old, new)


def _log_size(config: TrainConfig, spec: step_jax.TrainState) -> None:
    trainable, frozen = step_jax.split_params(spec.params, config.freeze_filter)
    counts = [sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(part)) for part in (trainable, frozen)]
    logger.info(
        "%s: %s parameters train, %s are frozen; %d devices (%s) of %d processes",
        config.name,
        *(f"{count:,}" for count in counts),
        jax.device_count(),
        jax.devices()[0].device_kind,
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
    config: TrainConfig,
    checkpoints: Checkpoints,
    step: int,
    spec: step_jax.TrainState,
    data: preflight.TrainingData,
    window: Window,
) -> step_jax.TrainState:
    """The state after `step`; data order and metrics go on, too."""
    _log_changes(checkpoints.path(step), config)
    state = checkpoints.restore(step, spec)
    _restore_loop(checkpoints.path(step), data, window)
    return state


def _restore_loop(checkpoint: Path, data: preflight.TrainingData, window: Window) -> None:
    """Continues the data order; checkpoints of the reference trainer do not have it and start it anew."""
    file = checkpoint / LOOP_STATE_FILE
    if not file.is_file():
        logger.warning("%s has no %s: the data order starts from the seed again", checkpoint, LOOP_STATE_FILE)
        return
    loop_state = json.loads(file.read_text())
    data.train.restore(loop_state["loader"])
    window.restore(loop_state["window"])


def use_compilation_cache() -> None:
    """Compiled steps are kept in `~/.cache/jax`, unless JAX has been told otherwise."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # defined at run time
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax"))
