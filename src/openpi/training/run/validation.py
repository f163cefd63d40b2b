"""Validation on episodes that training never sees: the loss, and the error of sampled actions in the robot's units,
beside the errors of policies that learn nothing.

Noise and flow time are the same at every validation and for every model, so that numbers can be compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import numpy as np

from openpi import transforms
from openpi.models.fast_codec import UndecodableActionsError
from openpi.models.model_config import ModelType
from openpi.policies.hold import hold_transforms
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.shared.tree import Tree
from openpi.training.backend import Backend, State
from openpi.training.config import TrainConfig
from openpi.training.data.training_data import TrainingData
from openpi.training.data_config import DataConfig
from openpi.training.data_loader import back_to_robot
from openpi.training.distributed import processes

logger = logging.getLogger(__name__)

ToRobot = Callable[[np.ndarray, np.ndarray], np.ndarray]

_SHOWN = 4  # frames in the picture


class Validation:
    """Callable on a state; the batches are read once and kept on the host. Without a contract of the data, nobody can
    tell what a robot would be given, and there is only a loss.

    Args:
        is_to_stop: asked before each batch; true in any process ends the call without numbers. Whoever asks a run to
            stop kills it within half a minute, and what was trained has to be saved by then.

    Each process of a run reads its rows and turns them into the robot's units; all return the same numbers.

    Attributes:
        shown: of the last call, float[n ah d] chunks recorded and predicted, of this process; NaN where none was.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, backend: Backend, is_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        assert data.holdout is not None
        self._backend = backend
        self._is_to_stop = is_to_stop
        with processes.together("reading what is held out"), contextlib.closing(data.holdout):
            self._batches = list(data.holdout)
        self._sampled_to_robot = back_to_robot(data.config, is_sampled=True)
        self._recorded_to_robot = back_to_robot(data.config, is_sampled=False)
        self._names = data.action_names
        self._writes_tokens = config.model.model_type is ModelType.PI0_FAST
        grammar = transforms.action_grammar(data.config.model_transforms.outputs)
        self._sample_options = {} if grammar is None else {"grammar": grammar}
        self._has_actions = data.contract is not None
        self._baselines = self._baseline_errors(data.config) if self._has_actions else {}
        self.shown: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def names(self) -> Sequence[str]:
        """Of the dimensions of `shown`."""
        assert self.shown is not None
        return self._names_of(self.shown[0].shape[-1])

    def __call__(self, state: State) -> dict[str, float]:
        """`validation_loss`, `action_error` (mean absolute) and `action_error/<name>` per action dimension; and
        `baseline/<name>`, that of policies that learn nothing, which a model has to be below.

        A model that writes actions as tokens also has `undecodable`, the share of samples that were no chunk; the
        error is that of the others, and missing when there are none. Nothing at all where the run is to stop.
        """
        losses, sampled = [], []
        for i, batch in enumerate(self._batches):
            if any(processes.exchange("whether to stop", self._is_to_stop())):
                return {}
            loss, rows = self._backend.evaluate(state, batch, i, **self._sample_options)
            losses.append(loss)
            sampled.append(rows)
        found = {"validation_loss": float(np.mean(losses)), **self._baselines}
        if not self._has_actions:
            return found
        with processes.together("validating"):
            decodable, errors = self._compared(sampled)
        is_decodable, error = _of_all_processes(decodable), _of_all_processes(errors)
        if self._writes_tokens:
            found["undecodable"] = 1 - int(is_decodable.sum()) / len(is_decodable)
        if not is_decodable.any():
            return found
        error = np.mean(error[is_decodable], axis=0)
        per_dim = {f"action_error/{name}": float(e) for name, e in zip(self._names_of(len(error)), error, strict=True)}
        return found | {"action_error": float(error.mean())} | per_dim

    def _compared(self, sampled: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per batch: which rows are chunks, bool[b], and their errors in the robot's units, float[b d]."""
        decodable, errors = [], []
        for i, (rows, batch) in enumerate(zip(sampled, self._batches, strict=True)):
            recorded, chunks, decodable_rows = self._chunks(rows, batch)
            if i == 0:
                shown = evenly_spaced(range(len(chunks)), _SHOWN)
                self.shown = recorded[shown], chunks[shown]
            decodable.append(decodable_rows)
            errors.append(np.where(decodable_rows[:, None], np.abs(chunks - recorded).mean(axis=1), 0.0))
        return decodable, errors

    def _names_of(self, width: int) -> Sequence[str]:
        return self._names if len(self._names) == width else [str(i) for i in range(width)]

    def _chunks(self, sampled: np.ndarray, batch: Tree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float[b ah d] recorded and sampled, in the robot's units, NaN where tokens are no chunk; and where they are
        one, bool[b].
        """
        recorded = self._recorded(batch)
        chunks, is_decodable = np.full(recorded.shape, np.nan), np.zeros(len(recorded), bool)
        for i, (state, ours) in enumerate(zip(batch["state"], sampled, strict=True)):
            with contextlib.suppress(UndecodableActionsError):
                chunks[i] = self._sampled_to_robot(state, ours)
                is_decodable[i] = True
        return recorded, chunks, is_decodable

    def _recorded(self, batch: Tree) -> np.ndarray:
        rows = zip(batch["state"], batch["actions"], strict=True)
        return np.stack([np.asarray(self._recorded_to_robot(*row), np.float64) for row in rows])

    def _baseline_errors(self, data_config: DataConfig) -> dict[str, float]:
        """Mean absolute errors of standing still, where the robot says how, and of the mean action of the dataset."""
        found: dict[str, float] = {}
        horizon = self._batches[0]["actions"].shape[1]
        for name, policy in _baselines(data_config, self._recorded_to_robot, horizon).items():
            try:
                errors = [self._errors_of(policy, batch) for batch in self._batches]
            except Exception as error:  # a user's transforms, which no model's actions went through yet
                logger.info("the baseline '%s' is left out: %s: %s", name, type(error).__name__, error)
                errors = []
            if all(processes.exchange(f"whether there is the baseline '{name}'", bool(errors))):
                found[f"baseline/{name}"] = float(_of_all_processes(errors).mean())
        return found

    def _errors_of(self, policy: ToRobot, batch: Tree) -> np.ndarray:
        """f64[b d], mean over the horizon."""
        chunks = np.stack([policy(*row) for row in zip(batch["state"], batch["actions"], strict=True)])
        return np.abs(chunks - self._recorded(batch)).mean(axis=1)


def _baselines(data_config: DataConfig, to_robot: ToRobot, horizon: int) -> dict[str, ToRobot]:
    """(state, recorded actions) as the model has them -> float[ah d], by name. Of the actions only the shape counts."""
    found: dict[str, ToRobot] = {}
    with contextlib.suppress(ValueError):  # the robot does not say how it stands still
        still = transforms.compose(hold_transforms(data_config, horizon))
        found["standing_still"] = lambda state, actions: np.asarray(still({"state": state})["actions"])
    if (stats := (data_config.norm_stats or {}).get("actions")) is not None:
        normalize = transforms.Normalize({"actions": stats}, use_quantiles=data_config.use_quantile_norm)
        mean = normalize({"actions": np.asarray(stats.mean, np.float64)[None]})["actions"]

        def mean_action(state: np.ndarray, actions: np.ndarray) -> np.ndarray:
            made = np.zeros(actions.shape)
            made[:, : mean.shape[-1]] = mean[:, : actions.shape[-1]]
            return to_robot(state, made)

        found["mean_action"] = mean_action
    return found


def _of_all_processes(batches: list[np.ndarray]) -> np.ndarray:
    """This process's rows of every batch -> all rows, in the order in which one process would have had them."""
    gathered = processes.gather(np.stack(batches))  # [process batch row ...]
    return gathered.swapaxes(0, 1).reshape(-1, *gathered.shape[3:])
