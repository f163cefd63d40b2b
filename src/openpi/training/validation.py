"""Validation on episodes that training never sees: the loss, and the error of sampled actions in the robot's units.

Noise and flow time are the same at every validation and for every model, so that numbers can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi import transforms
from openpi.models.fast_codec import UndecodableActionsError
from openpi.models.model_config import ModelType
from openpi.training import processes
from openpi.training.backend import Backend, State
from openpi.training.config import TrainConfig
from openpi.training.preflight import TrainingData
from openpi.training.robot_actions import robot_actions


class Validation:
    """Callable on a state; the batches are read once and kept on the host.

    Each process of a run reads its rows and turns them into the robot's units; all return the same numbers.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, backend: Backend) -> None:
        assert data.holdout is not None
        self._backend = backend
        with contextlib.closing(data.holdout):
            self._batches = list(data.holdout)
        self._sampled_to_robot = robot_actions(data.config, is_sampled=True)
        self._recorded_to_robot = robot_actions(data.config, is_sampled=False)
        self._names = data.action_names
        self._writes_tokens = config.model.model_type is ModelType.PI0_FAST
        grammar = transforms.action_grammar(data.config.model_transforms.outputs)
        self._sample_options = {} if grammar is None else {"grammar": grammar}

    def __call__(self, state: State) -> dict[str, float]:
        """`validation_loss`, `action_error` (mean absolute) and `action_error/<name>` per action dimension.

        A model that writes actions as tokens also has `undecodable`, the share of samples that were no chunk; the
        error is that of the others, and missing when there are none.
        """
        losses, decodable, errors = [], [], []
        for i, batch in enumerate(self._batches):
            loss, sampled = self._backend.evaluate(state, batch, i, **self._sample_options)
            losses.append(loss)
            decodable_rows, error_rows = self._action_errors(sampled, batch)
            decodable.append(decodable_rows)
            errors.append(error_rows)
        found = {"validation_loss": float(np.mean(losses))}
        is_decodable, error = _of_all_processes(decodable), _of_all_processes(errors)
        if self._writes_tokens:
            found["undecodable"] = 1 - int(is_decodable.sum()) / len(is_decodable)
        if not is_decodable.any():
            return found
        error = np.mean(error[is_decodable], axis=0)
        names = self._names if len(self._names) == len(error) else [str(i) for i in range(len(error))]
        per_dim = {f"action_error/{name}": float(e) for name, e in zip(names, error, strict=True)}
        return found | {"action_error": float(error.mean())} | per_dim

    def _action_errors(self, sampled: np.ndarray, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Per sample whether it is decodable, bool[b], and the error f64[b d], zero where it is not.

        The error is the mean over the horizon of |sampled - recorded|, in the robot's units.
        """
        recorded = [self._recorded_to_robot(*row) for row in zip(batch["state"], batch["actions"], strict=True)]
        is_decodable = np.zeros(len(recorded), bool)
        errors = np.zeros((len(recorded), recorded[0].shape[-1]))
        for i, (state, ours, theirs) in enumerate(zip(batch["state"], sampled, recorded, strict=True)):
            with contextlib.suppress(UndecodableActionsError):
                errors[i] = np.abs(self._sampled_to_robot(state, ours) - theirs).mean(axis=0)
                is_decodable[i] = True
        return is_decodable, errors


def _of_all_processes(batches: list[np.ndarray]) -> np.ndarray:
    """This process's rows of every batch -> all rows, in the order in which one process would have had them."""
    gathered = processes.gather(np.stack(batches))  # [process batch row ...]
    return gathered.swapaxes(0, 1).reshape(-1, *gathered.shape[3:])
