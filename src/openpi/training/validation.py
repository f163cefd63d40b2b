"""Validation on episodes that training never sees: the loss, and the error of sampled actions in the robot's units.

Noise and flow time are the same at every validation and for every model, so that numbers can be compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from openpi import transforms
from openpi.training import sharding, step_jax
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig
from openpi.training.preflight import TrainingData

_SEED = 0


class Validation:
    """Callable on parameters; the batches are read once and kept on the host."""

    def __init__(self, config: TrainConfig, data: TrainingData, mesh: Mesh) -> None:
        assert data.holdout is not None
        self._batches = list(itertools.islice(data.holdout, config.eval_batches))
        self._to_robot = output_transform(data.config)
        self._names = data.action_names
        self._place = lambda batch: jax.device_put(batch, sharding.data_sharding(mesh))
        self._loss = jax.jit(functools.partial(step_jax.eval_step, config))
        self._sample = jax.jit(functools.partial(step_jax.sample_step, config))

    def __call__(self, params: step_jax.Params) -> dict[str, float]:
        """`validation_loss`, `action_error` (mean absolute) and `action_error/<name>` per action dimension."""
        losses, errors = [], []
        for i, batch in enumerate(self._batches):
            key = jax.random.fold_in(jax.random.key(_SEED), i)
            placed = self._place(batch)
            losses.append(float(self._loss(key, params, placed)))
            errors.append(self._action_error(np.asarray(self._sample(key, params, placed)), batch))
        error = np.mean(errors, axis=0)
        names = self._names if len(self._names) == len(error) else [str(i) for i in range(len(error))]
        per_dim = {f"action_error/{name}": float(e) for name, e in zip(names, error, strict=True)}
        return {"validation_loss": float(np.mean(losses)), "action_error": float(error.mean()), **per_dim}

    def _action_error(self, sampled: np.ndarray, batch: Mapping[str, Any]) -> np.ndarray:
        """float[d]: mean over batch and horizon of |sampled - recorded|, both taken to the robot's units."""
        state, recorded = np.asarray(batch["state"]), np.asarray(batch["actions"])
        pairs = [
            (self._to_robot(state[i], sampled[i]), self._to_robot(state[i], recorded[i]))
            for i in range(len(state))
        ]
        return np.mean([np.abs(a - b).mean(axis=0) for a, b in pairs], axis=0)


def output_transform(data_config: DataConfig) -> Any:
    """(state, actions) of the model -> actions of the robot, by the transforms that serving uses."""
    chain: Sequence[Any] = (
        *data_config.model_transforms.outputs,
        transforms.Unnormalize(data_config.norm_stats, use_quantiles=data_config.use_quantile_norm),
        *data_config.data_transforms.outputs,
    )
    run = transforms.compose(chain)
    return lambda state, actions: np.asarray(run({"state": state, "actions": actions})["actions"])
