"""How long a policy call takes, and its parts: the programs that serve, timed one by one."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_parts import models
from gpu_parts.calls import batch_of, observation_for, pipeline_of, policy_of
from gpu_parts.records import Records, figure, times_ms
from gpu_parts.sizes import Shape, Size
from gpu_parts.start import since_start
from gpu_parts.work import NUM_STEPS
from openpi import transforms
from openpi.models import compact

_NUM_KERNELS = 10


def _timed(
    make_sampler: Callable[[Shape], Any], part: str, shapes: dict[str, Shape], seconds: float, records: Records
) -> None:
    for name, shape in shapes.items():
        pipeline = pipeline_of(shape)
        observation = observation_for(shape, pipeline)
        start = time.perf_counter()
        sampler = make_sampler(shape)
        policy = policy_of(sampler, pipeline)
        policy.warm_up(observation)
        ready = figure(time.perf_counter() - start, "s")
        noise = np.random.default_rng(0).standard_normal(
            (shape.model.action_horizon, shape.model.action_dim), dtype=np.float32
        )
        actions = np.asarray(policy.infer(observation, noise=noise)["actions"])
        first = {"first chunk after": since_start()} if name == next(iter(shapes)) else {}
        calls = times_ms(lambda policy=policy, seen=observation: policy.infer(seen), seconds=seconds, at_most=1000)
        whole = figure(calls, "ms")
        figures = {"policy call": whole, "p99 / p50": figure(whole["p99"] / whole["p50"], ""), "ready after": ready}
        figures |= first
        kept = {"actions": actions.astype(float).round(6).tolist()}
        records.write(part, name, figures=figures, **kept)  # should what follows not come to its end
        figures |= _parts(sampler, pipeline, observation, noise[None], seconds / 4)
        records.write(part, name, figures=figures | _memory(part), **kept)
        if part.startswith("latency/pytorch") and (first or models.on_gpu()):
            _write_kernels(lambda policy=policy, seen=observation: policy.infer(seen), part, name, records)


def _memory(part: str) -> dict[str, Any]:
    peak = models.peak_bytes("jax" if part.endswith("jax") else "pytorch")
    return {} if peak is None else {"peak memory": figure(peak / 1e9, "GB")}


def _parts(sampler: Any, pipeline: Any, observation: dict, noise: np.ndarray, seconds: float) -> dict[str, Any]:
    """Of a step, the difference of what takes ten and what takes one, a ninth; what is left is the prefix."""
    to_model, to_robot = transforms.compose(pipeline.inputs), transforms.compose(pipeline.outputs)
    inputs = batch_of(pipeline, observation)
    # What the sampler was made ready for: else the shorter program, which it was not, would run on all there could be.
    inputs = compact.cut(inputs, compact.longer(compact.used_extent(inputs), compact.whole_extent(inputs)))
    whole, short = sampler.program(inputs, noise), sampler.program(inputs, noise, num_steps=1)
    actions = whole()
    answer = {"state": np.asarray(inputs["state"])[0], "actions": actions[0]}
    time_it = functools.partial(times_ms, seconds=seconds, at_most=200)
    all_steps, one_step = (_waited(program, program.run, time_it) for program in (whole, short))
    step = [(a - np.median(one_step)) / (NUM_STEPS - 1) for a in all_steps]
    found = {
        "input transforms": time_it(lambda: to_model({**observation})),
        "host to device": _waited(whole, whole.send, time_it),
        "on the device": all_steps,
        "prefix": [ms - np.median(step) for ms in one_step],
        "denoising, a step": step,
        # Of new actions each time: JAX keeps what it has brought once.
        "read-back": time_it(whole.fetch, before=lambda: (whole.run(), whole.wait())),
        "output transforms": time_it(lambda: to_robot({**answer})),
    }
    return {name: figure(times, "ms") for name, times in found.items()}


def _waited(program: Any, call: Callable[[], None], time_it: Callable[..., list[float]]) -> list[float]:
    program()  # what is sent stays sent

    def to_its_end() -> None:
        call()
        program.wait()

    return time_it(to_its_end)


def _write_kernels(call: Callable[[], Any], part: str, case: str, records: Records) -> None:
    """The kernels that take longest, per call; of a GPU also every launch, for a viewer of traces."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = models.on_gpu()
    count = 3 if on_gpu else 1  # a processor's thousands of events take seconds to sort
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(count):
            call()
    events = [event for event in profiled.key_averages() if (event.device_type.name == "CUDA") == on_gpu]
    spent = {event: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    kernels = [
        {"name": event.key[:120], "launches": event.count / count, "ms": us / count / 1e3}
        for event, us in spent.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    total = {"name": "all", "launches": sum(k["launches"] for k in kernels), "ms": sum(k["ms"] for k in kernels)}
    records.write(part, f"kernels of a {case} call", kernels=[total, *kernels[:_NUM_KERNELS]])
    if on_gpu:
        profiled.export_chrome_trace(str(records.folder / f"{part.replace('/', '-')}-{case}.trace.json.gz"))


def pytorch(part: str, *, compile_mode: str | None, uses_graphs: bool, size: Size, records: Records) -> None:
    how: Any = {"compile_mode": compile_mode if size.compiles else None, "uses_graphs": uses_graphs}
    _timed(lambda shape: models.pytorch_sampler(shape.model, **how), part, size.shapes, size.seconds, records)


def fp8(part: str, *, size: Size, records: Records) -> None:
    """Compiled and as graphs, with the scales of the very observation."""
    how: Any = {"compile_mode": "default" if size.compiles else None, "uses_graphs": True}

    def make(shape: Shape) -> Any:
        pipeline = pipeline_of(shape)
        found = models.calibrated(shape.model, batch_of(pipeline, observation_for(shape, pipeline)))
        case = next(name for name, other in size.shapes.items() if other is shape)
        figures = {"cosine to bfloat16": figure(found.lowest, "")}
        note = f"{len(found.chosen())} of {len(found.layers)} products in FP8"
        records.write(part, f"likeness of a {case} chunk", figures=figures, note=note)
        return models.pytorch_sampler(shape.model, calibration=found, **how)

    _timed(make, part, size.shapes, size.seconds, records)


def jax(part: str, *, size: Size, records: Records) -> None:
    shapes = size.shapes if size.compiles else dict(list(size.shapes.items())[:1])
    _timed(lambda shape: models.jax_sampler(shape.model), part, shapes, size.seconds, records)
