"""Models with random weights, made on the device, in the samplers that serve them."""

import functools
from typing import Any

import numpy as np

from openpi.shared.tree import unflatten
from openpi.weights import names

_STD = 0.02


def on_gpu() -> bool:
    """Whether PyTorch has one."""
    import torch

    return torch.cuda.is_available()


def pytorch_model(config: Any, device: Any) -> Any:
    """Of PyTorch, as it is served; on the device `meta` without values."""
    import torch

    from openpi.models_pytorch import loading

    model = loading.create(config)
    for row in names.rows(config):
        shape, dtype = model.get_parameter(row.torch).shape, loading.served_dtype(row, torch.bfloat16)
        weight = torch.empty(shape, device=device, dtype=dtype)
        loading.set_parameter(model, row.torch, weight, requires_grad=False)
    if str(device) != "meta":
        fill(dict(model.named_parameters()))
    return model


def fill(parameters: dict[str, Any]) -> None:
    """With random numbers, the same each time."""
    import torch

    from openpi.models_pytorch.int8_rows import Int8Rows

    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(0)
    with torch.no_grad():
        for value in parameters.values():
            if isinstance(value, Int8Rows):
                value.copy_(torch.randn(value.shape, device=value.device, generator=generator) * _STD)
            else:
                value.normal_(std=_STD, generator=generator)


def pytorch_sampler(config: Any, *, compile_mode: str | None, uses_graphs: bool, calibration: Any = None) -> Any:
    """Without graphs where there is no GPU."""
    import torch

    from openpi.policies.sampler_pytorch import PytorchSampler

    device = "cuda" if on_gpu() else "cpu"
    model = pytorch_model(config, torch.device(device))
    graphs = uses_graphs and on_gpu()
    return PytorchSampler(model, device=device, compile_mode=compile_mode, uses_graphs=graphs, calibration=calibration)


def calibrated(config: Any, inputs: Any) -> Any:
    """What of the same model bears FP8, on one sample."""
    from openpi.models_pytorch import fp8_calibration

    sampler = pytorch_sampler(config, compile_mode=None, uses_graphs=False)
    noise = np.random.default_rng(0).standard_normal((1, config.action_horizon, config.action_dim), dtype=np.float32)
    return fp8_calibration.calibrate(
        sampler.model, lambda: sampler.sample(inputs, noise), target=0.998, about={"weights": "random"}
    )


def jax_sampler(config: Any) -> Any:
    """Of JAX; its weights are other random numbers than PyTorch's."""
    import jax
    import jax.numpy as jnp

    from openpi.policies.sampler_jax import JaxSampler

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: Any, shape: tuple[int, ...]) -> Any:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(_STD)

    shapes = names.tree_shapes(config)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    flat = {path: draw(key, shape) for key, (path, shape) in zip(keys, shapes.items(), strict=True)}
    return JaxSampler(config.load(unflatten(flat)))


def peak_bytes(backend: str) -> int | None:
    """Of device memory in use at once so far; None = the device does not tell."""
    if backend == "pytorch":
        import torch

        return torch.cuda.max_memory_allocated() if on_gpu() else None
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest value."""
    return float(np.abs(np.subtract(found, expected)).max() / np.abs(expected).max())
