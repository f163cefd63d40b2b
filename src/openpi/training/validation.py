"""Validation on episodes that training never sees: the loss, and the error of sampled actions in the robot's units.

Noise and flow time are the same at every validation and for every model, so that numbers can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from openpi import transforms
from openpi.training import step_jax
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig
from openpi.training.preflight import TrainingData

_SEED = 0


class Validation:
    """Callable on parameters; the batches are read once and kept on the host."""

    def __init__(self, config: TrainConfig, data: TrainingData, mesh: Mesh) -> None:
        assert data.holdout is not None
        self._batches = list(data.holdout)
        data.holdout.close()
        self._sampled_to_robot = robot_actions(data.config, is_sampled=True)
        self._recorded_to_robot = robot_actions(data.config, is_sampled=False)
        self._names = data.action_names
        self._place = functools.partial(step_jax.place_batch, mesh=mesh)
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
        pairs = [
            (self._sampled_to_robot(state, ours), self._recorded_to_robot(state, theirs))
            for state, ours, theirs in zip(batch["state"], sampled, batch["actions"], strict=True)
        ]
        return np.mean([np.abs(ours - theirs).mean(axis=0) for ours, theirs in pairs], axis=0)


def robot_actions(data_config: DataConfig, *, is_sampled: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(state, actions) as the model has them -> actions of the robot, by the transforms that serving uses.

    Args:
        is_sampled: the actions are what the model returned, which pi0-FAST's output transform decodes first.
    """
    chain = transforms.compose(
        (
            *(data_config.model_transforms.outputs if is_sampled else ()),
            transforms.Unnormalize(data_config.norm_stats, use_quantiles=data_config.use_quantile_norm),
            *data_config.data_transforms.outputs,
        )
    )
    return lambda state, actions: np.asarray(chain({"state": state, "actions": actions})["actions"])
