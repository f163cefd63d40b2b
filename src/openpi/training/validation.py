"""Validation on episodes that training never sees: the loss, and the error of sampled actions in the robot's units.

Noise and flow time are the same at every validation and for every model, so that numbers can be compared.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from openpi import transforms
from openpi.models.compact import Extent, drops_cameras
from openpi.models.fast_codec import UndecodableActionsError
from openpi.models.model_config import ModelType
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
        self._writes_tokens = config.model.model_type is ModelType.PI0_FAST
        self._place = functools.partial(step_jax.place_batch, mesh=mesh)
        self._extent = functools.partial(_extent, config, mesh=mesh)
        self._loss = jax.jit(functools.partial(step_jax.eval_step, config), static_argnames="extent")
        grammar = transforms.action_grammar(data.config.model_transforms.outputs)
        options = {} if grammar is None else {"grammar": grammar}
        sample = functools.partial(step_jax.sample_step, config, **options)
        self._sample = jax.jit(sample, static_argnames="extent")

    def __call__(self, params: step_jax.Params) -> dict[str, float]:
        """`validation_loss`, `action_error` (mean absolute) and `action_error/<name>` per action dimension.

        A model that writes actions as tokens also has `undecodable`, the share of samples that were no chunk; the
        error is that of the others, and missing when there are none.
        """
        losses, errors, num_samples = [], [], 0
        for i, batch in enumerate(self._batches):
            key = jax.random.fold_in(jax.random.key(_SEED), i)
            placed = self._place(batch)
            extent = self._extent(placed)
            losses.append(float(self._loss(key, params, placed, extent=extent)))
            errors += self._action_errors(np.asarray(self._sample(key, params, placed, extent=extent)), batch)
            num_samples += len(batch["state"])
        found = {"validation_loss": float(np.mean(losses))}
        if self._writes_tokens:
            found["undecodable"] = 1 - len(errors) / num_samples
        if not errors:
            return found
        error = np.mean(errors, axis=0)
        names = self._names if len(self._names) == len(error) else [str(i) for i in range(len(error))]
        per_dim = {f"action_error/{name}": float(e) for name, e in zip(names, error, strict=True)}
        return found | {"action_error": float(error.mean())} | per_dim

    def _action_errors(self, sampled: np.ndarray, batch: Mapping[str, Any]) -> list[np.ndarray]:
        """Per decodable sample float[d]: mean over the horizon of |sampled - recorded|, in the robot's units."""
        errors = []
        for state, ours, theirs in zip(batch["state"], sampled, batch["actions"], strict=True):
            with contextlib.suppress(UndecodableActionsError):
                difference = self._sampled_to_robot(state, ours) - self._recorded_to_robot(state, theirs)
                errors.append(np.abs(difference).mean(axis=0))
        return errors


def _extent(config: TrainConfig, placed: Mapping[str, Any], mesh: Mesh) -> Extent | None:
    if not config.model.skip_unused:
        return None
    return step_jax.used_extent(placed, mesh, drops_cameras=drops_cameras(config.model))


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
