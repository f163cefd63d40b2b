"""Training steps of recipes, in the backend's own loop of place, step, wait; and the memory they take."""

import dataclasses
import importlib.util
import time
from typing import Any

from gpu_parts import models
from gpu_parts.records import Records, figure
from gpu_parts.sizes import Size, batch
from openpi.training.backend import open_backend
from openpi.training.config import TrainConfig

_AT_LEAST, _AT_MOST = 3, 20


def steps(part: str, *, backend: str, case: str, size: Size, records: Records, is_compiled: bool = False) -> None:
    """Steps that wait for the device, so that each has a time of its own."""
    training = size.training[case](backend)
    config, note = dataclasses.replace(training.config, pytorch_compile=is_compiled and size.compiles), training.note
    if backend == "jax" and _for_jax(config) is not config:
        config = _for_jax(config)
        note += "; without image augmentation, for want of augmax"
    engine = open_backend(config)
    engine.check()
    rows = batch(config.model, config.batch_size, cameras=training.cameras, prompt_len=training.prompt_len)
    start = time.perf_counter()
    state = _state(engine)
    ready_s = time.perf_counter() - start
    times, loss = _times_ms(engine, state, rows, size.seconds)
    figures = {
        "step": figure(times[1:], "ms"),
        "samples": figure([config.batch_size / ms * 1e3 for ms in times[1:]], "1/s"),
        "first step after": figure(ready_s + times[0] / 1e3, "s"),
    }
    peak = models.peak_bytes(backend)
    if peak is not None:
        figures["peak memory"] = figure(peak / 1e9, "GB")
    note += f"; loss {loss:.3g}"
    records.write(part, case, figures=figures, note=note)
    if size.compiles or case == "full":  # tracing a tiny step takes longer than making it
        records.write(part, case, figures=figures | _planned(config), note=note)


def _for_jax(config: TrainConfig) -> TrainConfig:
    """Without the image augmentation, where the library is not there that makes it in JAX."""
    model: Any = config.model
    if not model.augmentation or importlib.util.find_spec("augmax") is not None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, augmentation=False))


def _times_ms(engine: Any, state: Any, rows: dict[str, Any], seconds: float) -> tuple[list[float], float]:
    """Of steps, the one that compiles included, each with what is left of the transfer of its batch; and the loss."""
    times: list[float] = []
    metrics: Any = None
    while len(times) <= _AT_LEAST or (sum(times) < seconds * 1e3 and len(times) < _AT_MOST):
        placed = engine.place(rows, len(times))
        start = time.perf_counter()
        state, metrics = engine.train_step(state, placed)
        engine.wait(metrics)
        times.append((time.perf_counter() - start) * 1e3)
    return times, float(metrics["loss"])


def _state(engine: Any) -> Any:
    """Random weights made on the device."""
    if engine.name == "jax":
        return engine.create_state()
    state = engine.empty_state()
    models.fill(state.params)
    for name, average in (state.average or {}).items():
        average.copy_(state.params[name].detach())
    return state


def _planned(config: TrainConfig) -> dict[str, Any]:
    """What `openpi train --plan` knows without compiling; it needs JAX."""
    if importlib.util.find_spec("jax") is None:
        return {}
    from openpi.training.backends.jax import plan

    return {"state and gradients by --plan": figure(plan.count_state(_for_jax(config)).total / 1e9, "GB")}
