"""A policy without a checkpoint: stands still, or plays a recorded episode, under a robot's contract.

So the robot's side can be built, and its timing measured, before there is a model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from openpi.policies.contract import Contract
from openpi.policies.guards import ContractGuard, ObservationError
from openpi.shared.tree import flatten
from openpi_client.base_policy import BasePolicy
from openpi_client.realtime.actions import are_other_units


class DummyPolicy(BasePolicy):
    """Checks observations as a trained policy does, and takes as long as one.

    Attributes:
        contract: told to clients.
        metadata: the same.
    """

    def __init__(
        self,
        contract: Contract,
        chunk: Callable[[np.ndarray], np.ndarray],
        *,
        latency_ms: float = 0.0,
        jitter_ms: float = 0.0,
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        Args:
            chunk: state, float64[s] -> actions, [horizon, width].
            latency_ms: that an answer takes, at least.
            jitter_ms: it takes up to so much longer or shorter, evenly.
            drop: share of the questions that are answered with an error.
        """
        self.contract, self.metadata = contract, {"dummy": True}
        self._guard = ContractGuard(contract)
        self._chunk = chunk
        self._latency_ms, self._jitter_ms, self._drop = latency_ms, jitter_ms, drop
        self._rng = np.random.default_rng(seed)

    def infer(self, obs: dict) -> dict:
        """Raises ObservationError for what the contract refuses, RuntimeError for an answer that is dropped."""
        [answer] = self.infer_prepared([self.prepare(obs)])
        return answer

    def prepare(self, obs: dict) -> np.ndarray:
        """The chunk, float[horizon, width]; errors as of `infer`.

        A server calls it in the thread of each session: robots do not share a place in an episode.
        """
        self._guard(obs)
        return self._chunk(state_of(self.contract, obs))

    def infer_prepared(self, chunks: Sequence[np.ndarray]) -> list[dict]:
        """The answers, after the time that a model would take; errors as of `infer`."""
        time.sleep(1e-3 * (self._latency_ms + self._jitter_ms * self._rng.uniform(-1, 1)))
        if self._rng.uniform() < self._drop:
            raise RuntimeError("this answer was dropped (--drop)")
        return [{"actions": rows.astype(np.float32)} for rows in chunks]


def state_of(contract: Contract, observation: Mapping[str, object]) -> np.ndarray:
    """float64[s]: all vectors of the state, one behind the other."""
    leaves = flatten(observation)
    return np.concatenate([np.ravel(leaves[vector.key]) for vector in contract.state] or [np.zeros(0)]).astype(float)


def standing_still(contract: Contract) -> Callable[[np.ndarray], np.ndarray]:
    """A chunk that keeps the robot where its state says it is.

    Raises:
        ValueError: the contract does not say how this robot stands still.
    """
    hold = contract.hold or (("stay",) * contract.actions.width if contract.action_kind.startswith("absolute") else ())
    stays = [dim for dim, word in enumerate(hold) if word == "stay"]
    places = [place for dim in stays if (place := _place_in_state(contract, dim)) is not None]
    if not hold or len(places) < len(stays):
        raise ValueError(
            f"robot '{contract.robot}' does not say how it stands still (its actions are "
            f"'{contract.action_kind or 'not described'}': {', '.join(contract.actions.names)}; its state is "
            f"{', '.join(contract.state_names)}); set follows_state in its RobotSpec, and the same names and units in "
            "both, or play an episode: --dataset FOLDER --episode N"
        )

    def chunk(state: np.ndarray) -> np.ndarray:
        row = np.zeros(contract.actions.width)
        row[stays] = state[places]
        return np.tile(row, (contract.action_horizon, 1))

    return chunk


def _place_in_state(contract: Contract, dim: int) -> int | None:
    """Where the state has what a dimension of the actions commands, by its name, in its unit; None = nowhere."""
    name, names = contract.actions.names[dim], contract.state_names
    if not set(names) & set(contract.actions.names):  # Other words for the same: by place, as `follows_state` means it.
        return dim if contract.hold and dim < len(names) else None
    if names.count(name) != 1:
        return None
    place = names.index(name)
    unit = [unit for vector in contract.state for unit in vector.units][place]
    return None if are_other_units(unit, contract.actions.units[dim]) else place


class RecordedEpisode(threading.local):
    """Plays the actions of an episode from the frame on whose state is nearest to the robot's.

    It looks from the last such frame on, one chunk ahead, so a motion that comes back to where it was goes on; and from
    the beginning when the episode is over. Each thread, which is that of a robot's session, has a place of its own.
    """

    def __init__(self, states: np.ndarray, actions: np.ndarray, horizon: int) -> None:
        """
        Args:
            states: float[n, s]; actions: float[n, width].
        """
        self._states, self._actions, self._horizon = states, actions, horizon
        self._scale = np.maximum(states.std(0), 1e-6)
        self._frame = 0

    def __call__(self, state: np.ndarray) -> np.ndarray:
        if state.shape != self._states.shape[1:]:
            raise ObservationError(
                f"the state has {len(state)} values; the episode was recorded with {self._states.shape[1]}"
            )
        ahead = self._states[self._frame : self._frame + self._horizon]
        self._frame += int(np.argmin((((ahead - state) / self._scale) ** 2).sum(1)))
        rows = self._actions[self._frame : self._frame + self._horizon]
        if self._frame >= len(self._states) - 1:
            self._frame = 0
        return np.concatenate([rows, np.repeat(rows[-1:], self._horizon - len(rows), axis=0)])
