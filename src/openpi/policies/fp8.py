"""Measures what of a checkpoint bears FP8, on samples of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.models.model_config import ModelType
from openpi.models_pytorch.fp8_file import Calibration

if TYPE_CHECKING:
    from openpi.models.model_config import BaseModelConfig


TARGET = 0.998
_SEED = 0


def check_model(model_config: BaseModelConfig, dtype: str | None = None) -> None:
    """Raises ValueError for a model that FP8 is not for."""
    if model_config.model_type is ModelType.PI0_FAST:
        raise ValueError("fp8 is for pi0 and pi0.5; pi0-FAST, which writes its actions token by token, has none yet")
    if (dtype or getattr(model_config, "dtype", None)) == "float32":
        raise ValueError("fp8 is asked of a model in float32; take it in bfloat16 (--dtype bfloat16), or leave it out")


def calibrate(
    model_config: BaseModelConfig,
    checkpoint: Checkpoint,
    samples: Sequence[Mapping[str, object]],
    *,
    device: str | None = None,
    target: float = TARGET,
    about: Mapping[str, object] | None = None,
    sample_kwargs: Mapping[str, object] | None = None,
) -> Calibration:
    """
    Args:
        samples: un-batched model inputs, as the recipe's transforms make them; what else they have is not read.
        target: lowest cosine of a sample's chunk in FP8 and without.
        about: what the samples are, for people.
    Raises:
        ValueError: there are no samples, or FP8 is not for this model or this device.
    """
    from openpi.models_pytorch import fp8, fp8_calibration, loading
    from openpi.policies.sampler_pytorch import PytorchSampler, resolve_device

    check_model(model_config)
    on = resolve_device(device)
    fp8.check_device(on)
    if not samples:
        raise ValueError("there are no samples to calibrate with")
    model = loading.load_checkpoint(model_config, checkpoint.weights(model_config), device=on, dtype="bfloat16")
    sampler = PytorchSampler(model, device=str(on), uses_graphs=False)
    shape = (len(samples), 1, sampler.action_horizon, sampler.action_dim)
    noise = np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)
    batches = [_batch(sample) for sample in samples]

    def run() -> np.ndarray:
        pairs = zip(batches, noise, strict=True)
        return np.concatenate([sampler.sample(batch, start, **(sample_kwargs or {})) for batch, start in pairs])

    told = {"samples": len(samples), "device": on.type, **(about or {})}
    return fp8_calibration.calibrate(sampler.model, run, target=target, about=told)


def _batch(sample: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _batch(value) if isinstance(value, Mapping) else np.asarray(value)[None] for key, value in sample.items()
    }
