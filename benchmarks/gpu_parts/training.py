"""Training steps of recipes, in the backend's own loop of place, step, wait; and the memory they take."""

import dataclasses
import importlib.util
import time
from typing import Any

from gpu_parts import models
from gpu_parts.records import Records, figure
from gpu_parts.sizes import Size, batch
from openpi.training.backend import open_backend

_AT_LEAST, _AT_MOST = 3, 20


def steps(part: str, *, backend: str, case: str, size: Size, records: Records, is_compiled: bool = False) -> None:
    """Steps that wait for the device, so that each has a time of its own; their batches lie on it already."""
    training = size.training[case](backend)
    config, note = dataclasses.replace(training.config, pytorch_compile=is_compiled), training.note
    if config.model.augmentation and backend == "jax" and importlib.util.find_spec("augmax") is None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, augmentation=False))
        note += "; without image augmentation, for want of augmax"
    engine = _engine(config, size)
    engine.check()
    rows = batch(config.model, config.batch_size, cameras=training.cameras, prompt_len=training.prompt_len)
    start = time.perf_counter()
    state, times = _state(engine), []
    while len(times) < _AT_LEAST + 1 or (sum(times) < size.seconds * 1e3 and len(times) < _AT_MOST):
        placed = engine.place(rows, len(times))
        begun = time.perf_counter()
        state, metrics = engine.train_step(state, placed)
        engine.wait(metrics)
        times.append((time.perf_counter() - begun) * 1e3)
        if len(times) == 1:
            first = time.perf_counter() - start
    loss = float(metrics["loss"])
    figures = _figures(times[1:], config.batch_size) | {"first step after": figure(first, "s")}
    peak = models.peak_bytes(backend)
    if peak is not None:
        figures["peak memory"] = figure(peak / 1e9, "GB")
    note += f"; loss {loss:.3g}"
    records.write(part, case, figures=figures, note=note)
    records.write(part, case, figures=figures | _planned(config), note=note)


def _engine(config: Any, size: Size) -> Any:
    """Compiled by nothing but the tracer where everything is tiny."""
    if not config.pytorch_compile or size.name != "smoke":
        return open_backend(config)
    from openpi.training.backend_pytorch import PyTorchBackend

    return PyTorchBackend(config, compile_backend="eager")


def _figures(times: list[float], rows: int) -> dict[str, Any]:
    return {"step": figure(times, "ms"), "samples": figure([rows / ms * 1e3 for ms in times], "1/s")}


def _state(engine: Any) -> Any:
    """Random weights made on the device."""
    if engine.name == "jax":
        return engine.create_state()
    state = engine.empty_state()
    models.fill(state.params)
    for name, average in (state.average or {}).items():
        average.copy_(state.params[name].detach())
    return state


def _planned(config: Any) -> dict[str, Any]:
    """What `openpi train --plan` says, which needs JAX to trace the step."""
    if importlib.util.find_spec("jax") is None:
        return {}
    from openpi.training import plan

    return {"peak as --plan has it": figure(plan.predict(config).total / 1e9, "GB")}
