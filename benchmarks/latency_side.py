"""One side of the latency benchmark, in a process of its own. Prints one JSON line.

    python benchmarks/latency_side.py SIDE --size full

Weights are random and made on the device, equal for all sides of PyTorch; the pipeline is that of `pi05_aloha`, whose
prompt fills the tokens of the model.
"""

import argparse
import dataclasses
import functools
import json
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from openpi import transforms
from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.policy import Policy
from openpi.policies.policy_config import Pipeline, make_pipeline
from openpi.shared.normalize import NormStats
from openpi.shared.tree import unflatten
from openpi.training.config import get_config
from openpi.weights import names

PARTS = (
    "input transforms",
    "host to device",
    "image encoder",
    "prefix",
    "denoising",
    "device to host",
    "output transforms",
)
NUM_STEPS = 10
_WEIGHT_STD = 0.02


def _expert(width: int, mlp_dim: int, depth: int, head_dim: int) -> GemmaConfig:
    return GemmaConfig(width, depth, mlp_dim, num_heads=8, num_kv_heads=1, head_dim=head_dim, vocab_size=4096)


SIZES = {
    "full": Pi0Config(pi05=True),
    "small": Pi0Config(
        pi05=True,
        paligemma_variant=_expert(512, 2048, depth=6, head_dim=64),
        action_expert_variant=_expert(256, 1024, depth=6, head_dim=64),
        image_encoder_variant=SiglipConfig(256, 6, 1024, num_heads=4),
    ),
    "tiny": Pi0Config(
        pi05=True,
        paligemma_variant=_expert(64, 128, depth=2, head_dim=16),
        action_expert_variant=_expert(32, 64, depth=2, head_dim=16),
        image_encoder_variant=SiglipConfig(32, 1, 64, num_heads=2),
    ),
}

# --- the call -----------------------------------------------------------------------------------------------------


def pipeline_of(model: Pi0Config, tokenizer: str) -> Pipeline:
    recipe = get_config("pi05_aloha")
    model = dataclasses.replace(model, tokenizer_path=tokenizer)
    data = recipe.data.create(recipe.assets_dirs, model)
    stats = NormStats(mean=np.zeros(14), std=np.ones(14), q01=np.full(14, -2.0), q99=np.full(14, 2.0))
    return make_pipeline(dataclasses.replace(data, norm_stats={"state": stats, "actions": stats}))


def observation_for(pipeline: Pipeline, model: Pi0Config) -> dict:
    """Three cameras, and a prompt just short of being cut."""
    observation = make_aloha_example()
    del observation["images"]["cam_low"]  # the model does not see it
    to_model = transforms.compose(pipeline.inputs)
    prompt = "stack the cups"
    while to_model({**observation, "prompt": prompt})["tokenized_prompt_mask"].sum() <= model.max_token_len - 8:
        prompt += " up"
    return {**observation, "prompt": prompt}


def times_ms(call: Callable[[], Any], *, seconds: float, at_most: int = 300) -> list[float]:
    """Of calls that return when they are done; the first one is not counted."""
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - started < seconds and len(times) < at_most):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measured(policy: Policy, pipeline: Pipeline, observation: dict, seconds: float) -> dict[str, Any]:
    """The whole call, and what it does around the model."""
    noise = np.random.default_rng(0).standard_normal((50, 32), dtype=np.float32)
    actions = policy.infer(observation, noise=noise)["actions"]
    times = times_ms(lambda: policy.infer(observation), seconds=seconds)
    to_model, to_robot = transforms.compose(pipeline.inputs), transforms.compose(pipeline.outputs)
    inputs = to_model(observation)
    answer = {"state": np.asarray(inputs["state"]), "actions": noise}
    around = {
        "input transforms": times_ms(lambda: to_model({**observation}), seconds=1),
        "output transforms": times_ms(lambda: to_robot({**answer}), seconds=1),
    }
    return {
        "infer_ms": {"p50": float(np.median(times)), "p99": float(np.percentile(times, 99)), "calls": len(times)},
        "parts_ms": {part: float(np.median(values)) for part, values in around.items()},
        "actions": np.asarray(actions, np.float64).round(6).tolist(),
    }


def batch_of(pipeline: Pipeline, observation: dict) -> dict[str, Any]:
    inputs = transforms.compose(pipeline.inputs)(observation)
    return {
        key: {name: np.asarray(item)[None] for name, item in value.items()}
        if isinstance(value, dict)
        else np.asarray(value)[None]
        for key, value in inputs.items()
    }


def stages(image: float, prefix: float, whole: float) -> dict[str, float]:
    """Times of programs that each begin at the images, as times of parts."""
    return {"image encoder": image, "prefix": prefix - image, "denoising": whole - prefix}


# --- PyTorch ------------------------------------------------------------------------------------------------------


def pytorch(args: argparse.Namespace, *, compiled: bool, graphs: bool) -> dict[str, Any]:
    import torch

    from openpi.policies.sampler_pytorch import Graphs, PytorchSampler, host_tensors, observation_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if graphs and device.type != "cuda":
        return {"skipped": "needs a GPU"}
    config = SIZES[args.size]
    pipeline = pipeline_of(config, args.tokenizer)
    observation = observation_for(pipeline, config)
    start = time.perf_counter()
    model: Any = random_pytorch(config, device)
    sampler = PytorchSampler(
        model, device=str(device), compile_mode=args.compile_mode if compiled else None, uses_graphs=graphs
    )
    policy = Policy(sampler, transforms=pipeline.inputs, output_transforms=pipeline.outputs)
    policy.warm_up(observation)
    result: dict[str, Any] = {"ready_s": time.perf_counter() - start}
    say(f"ready after {result['ready_s']:.0f} s")
    result |= measured(policy, pipeline, observation, args.seconds)
    say(f"infer {result['infer_ms']}")
    if device.type == "cuda":  # before the graphs below, which no server has
        result["memory_gb"] = torch.cuda.max_memory_reserved() / 1e9

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def median(call: Callable[[], Any]) -> float:
        def to_its_end() -> None:
            call()
            finished()

        return float(np.median(times_ms(to_its_end, seconds=2, at_most=100)))

    host = host_tensors(batch_of(pipeline, observation)) | {"noise": torch.randn(1, 50, 32)}
    flow_times = model.flow_times(NUM_STEPS)

    def seen(tensors: dict[str, Any]) -> Any:
        return model.embed_prefix(model.preprocess(observation_of(tensors, ())))

    programs = (
        lambda tensors: seen(tensors).embedded,
        lambda tensors: model.prepare(seen(tensors)).places.bias,
        lambda tensors: model.sample(model.preprocess(observation_of(tensors, ())), tensors["noise"], flow_times),
    )
    parts = result["parts_ms"]
    with torch.no_grad():
        if graphs:
            captures = Graphs(device)
            replays = [captures.capture(program, host) for program in programs]
            parts |= stages(*(median(graph.replay) for graph in replays))
            parts["host to device"] = median(lambda: replays[2].send(host))
            parts["device to host"] = median(replays[2].fetch)
        else:
            on_device = {key: value.to(device) for key, value in host.items()}
            parts |= stages(*(median(functools.partial(program, on_device)) for program in programs))
            parts["host to device"] = median(lambda: {key: value.to(device) for key, value in host.items()})
            parts["device to host"] = median(lambda: on_device["noise"].float().cpu().numpy())
    if device.type == "cuda":
        say(json.dumps(result))  # should the profiler not work here
        result["kernels"] = kernels(lambda: policy.infer(observation))
    return result


def random_pytorch(config: Pi0Config, device: Any) -> Any:
    import torch

    from openpi.models_pytorch import loading

    model = loading.create(config)
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)
    for row in names.rows(config):
        shape, dtype = model.get_parameter(row.torch).shape, loading.served_dtype(row, torch.bfloat16)
        weight = torch.empty(shape, device=device, dtype=dtype)
        if generator is not None:
            weight.normal_(std=_WEIGHT_STD, generator=generator)
        loading.set_parameter(model, row.torch, weight, requires_grad=False)
    return model


def kernels(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """Those that take longest on the GPU, per call."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    count = 3
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    found = [
        {"name": event.key[:100], "launches": event.count / count, "ms": event.self_device_time_total / count / 1e3}
        for event in profiled.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA  # not the calls of the host that launched them
    ]
    found.sort(key=lambda kernel: -kernel["ms"])
    total = {"name": "all", "launches": sum(k["launches"] for k in found), "ms": sum(k["ms"] for k in found)}
    return [total, *found[:25]]


# --- JAX ----------------------------------------------------------------------------------------------------------


def of_jax(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from openpi.models import pi0
    from openpi.models.model import Observation
    from openpi.policies.sampler_jax import JaxSampler

    config = SIZES[args.size]
    if args.size == "full" and jax.default_backend() == "cpu":
        return {"skipped": "JAX sees no GPU; the extra cuda brings what it needs"}
    pipeline = pipeline_of(config, args.tokenizer)
    observation = observation_for(pipeline, config)
    start = time.perf_counter()
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(_WEIGHT_STD), static_argnums=1
    )
    shapes = names.tree_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    flat = {path: draw(key, shape) for key, (path, shape) in zip(keys, shapes.items(), strict=True)}
    model = config.load(unflatten(flat))
    policy = Policy(JaxSampler(model), transforms=pipeline.inputs, output_transforms=pipeline.outputs)
    policy.warm_up(observation)
    result: dict[str, Any] = {"ready_s": time.perf_counter() - start}
    say(f"ready after {result['ready_s']:.0f} s")
    result |= measured(policy, pipeline, observation, args.seconds)
    say(f"infer {result['infer_ms']}")

    def seen(model: Any, observation: Any) -> Any:
        prepared = model.preprocess(None, observation, train=False)
        return pi0.embed_prefix(config, model.params, prepared)

    programs = (
        lambda model, observation, noise: seen(model, observation).embedded,
        lambda model, observation, noise: pi0.encode_prefix(config, model.params, seen(model, observation)),
        lambda model, observation, noise: model.sample_actions(jax.random.key(0), observation, noise=noise),
    )
    batch = batch_of(pipeline, observation)
    noise = np.full((1, 50, 32), 0.5, np.float32)

    def to_device() -> Any:
        return jax.block_until_ready((jax.tree.map(jnp.asarray, Observation.from_dict(batch)), jnp.asarray(noise)))

    def median(call: Callable[[], Any]) -> float:
        return float(np.median(times_ms(lambda: jax.block_until_ready(call()), seconds=2, at_most=100)))

    on_device = to_device()
    compiled = [jax.jit(program) for program in programs]
    parts = result["parts_ms"]
    parts |= stages(*(median(functools.partial(program, model, *on_device)) for program in compiled))
    parts["host to device"] = median(to_device)
    parts["device to host"] = median(lambda: np.asarray(on_device[1] + 0))
    device = jax.devices()[0]
    result["memory_gb"] = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
    return result


# --- what the device and the model allow --------------------------------------------------------------------------


def ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """Measured rates of the device, and the work of the parts."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    side, num_bytes = (8192, 4 << 30) if on_gpu else (1024, 256 << 20)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (num_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def median_ms(call: Callable[[], Any]) -> float:
        def to_its_end() -> None:
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return float(np.median(times_ms(to_its_end, seconds=3, at_most=50)))

    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "gemm_tflops": 2 * side**3 / median_ms(lambda: a @ b) / 1e9,
        "copy_tbps": 2 * num_bytes / median_ms(lambda: target.copy_(source)) / 1e9,
        "work": work(SIZES[args.size]),
        "torch": torch.__version__,
    }


def work(config: Pi0Config) -> dict[str, dict[str, float]]:
    """FLOPs of products of the parts, and bytes of weights and cache that they have to read."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from openpi.models_pytorch.model import Observation

    meta = torch.device("meta")
    model = random_pytorch(config, meta)
    images = {key: torch.empty(1, *config.image_resolution, 3, device=meta) for key in config.image_keys}
    masks = {key: torch.empty(1, dtype=torch.bool, device=meta) for key in images}
    text = torch.empty(1, config.max_token_len, dtype=torch.int64, device=meta)
    state = torch.empty(1, config.action_dim, device=meta)
    noise = torch.empty(1, config.action_horizon, config.action_dim, device=meta)
    flops = {}
    with torch.no_grad():
        flow_times = model.flow_times(NUM_STEPS)
        observation = Observation(images, masks, state, text, text.bool())
        with FlopCounterMode(display=False) as counted:
            prefix = model.embed_prefix(observation)
        flops["image encoder"] = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            context = model.prepare(prefix)
        flops["prefix"] = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            for table in flow_times.tables:
                model.euler_step(state, noise, table, context, -0.1)
        flops["denoising"] = counted.get_total_flops()

    def read(*words: str) -> float:
        return sum(p.nbytes for name, p in model.named_parameters() if all(word in name for word in words))

    last = f"blocks.{config.experts[0].depth - 1}.experts.0."
    unread = read(last, "mlp") + read(last, "o_proj") + read(last, "post_attention")
    cache = sum(k.nbytes + v.nbytes for k, v in context.kv_cache)
    moved = {
        "image encoder": read("vision."),
        "prefix": read("experts.0.") - unread,
        # The norms' own weights are in the tables of the flow times.
        "denoising": NUM_STEPS * (read("experts.1.") - read("experts.1.", ".dense.") + read("action_") + cache),
    }
    return {part: {"tflop": flops[part] / 1e12, "gb": moved[part] / 1e9} for part in flops}


def say(text: str) -> None:
    print(text, flush=True)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "ceilings": ceilings,
    "PyTorch, compiled, graph": functools.partial(pytorch, compiled=True, graphs=True),
    "PyTorch, graph": functools.partial(pytorch, compiled=False, graphs=True),
    "PyTorch, eager": functools.partial(pytorch, compiled=False, graphs=False),
    "JAX": of_jax,
    "PyTorch, compiled": functools.partial(pytorch, compiled=True, graphs=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--compile-mode", required=True)
    parser.add_argument("--seconds", type=float, default=10, help="of repeating the whole call")
    args = parser.parse_args()
    result = SIDES[args.side](args)
    result["host_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert all(math.isfinite(value) for value in result.get("parts_ms", {}).values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
