"""Simulators as robots: a tick is a step of the world, which waits while the policy thinks."""

import abc
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np
from typing_extensions import Protocol

from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime import Robot


class World(Robot):
    """A simulator that steps when the loop's virtual clock moves.

    Attributes:
        is_over: whether the episode has ended by itself.
        step_hz: steps per second, where the policy does not say its own rate.
    """

    is_over: bool = False
    step_hz: float = 1.0

    def __init__(self) -> None:
        self._command: Optional[np.ndarray] = None

    def apply(self, action: np.ndarray) -> None:
        self._command = action

    def advance(self, seconds: float) -> None:
        """Steps the world with the last command; given to a `VirtualClock`."""
        if self._command is not None and not self.is_over:
            self._step(self._command)

    def reset(self) -> None:
        self._command, self.is_over = None, False

    @abc.abstractmethod
    def _step(self, action: np.ndarray) -> None:
        """One step of the world; sets `is_over`."""


class GymEnv(Protocol):
    """A `gymnasium.Env`."""

    def reset(self, *, seed: int) -> Tuple[Observation, Metadata]: ...

    def step(self, action: np.ndarray) -> Tuple[Observation, float, bool, bool, Metadata]: ...

    def close(self) -> None: ...


class GymWorld(World):
    """Any gymnasium environment.

    Attributes:
        reward: the largest one of the episode so far.
    """

    def __init__(
        self,
        env: GymEnv,
        observation: Callable[[Observation], Observation],
        *,
        step_hz: float,
        seed: int = 0,
        on_step: Callable[[Mapping[str, object]], None] = lambda observation: None,
    ) -> None:
        """
        Args:
            env: a `gymnasium.Env`, already made.
            observation: what `env` observes -> what the policy is sent.
            seed: of a generator that draws one for each reset.
            on_step: called with what the policy would be sent, after each reset and each step.
        """
        super().__init__()
        self.step_hz = step_hz
        self._env, self._observation, self._on_step = env, observation, on_step
        self._rng = np.random.default_rng(seed)
        self._observed: Dict[str, Any] = {}
        self.reward = 0.0

    def reset(self) -> None:
        super().reset()
        observed, _ = self._env.reset(seed=int(self._rng.integers(2**32 - 1)))
        self._observed, self.reward = self._observation(observed), 0.0
        self._on_step(self._observed)

    def observe(self) -> Observation:
        return self._observed

    def _step(self, action: np.ndarray) -> None:
        observed, reward, is_terminated, is_truncated, _ = self._env.step(action)
        self._observed, self.reward = self._observation(observed), max(self.reward, float(reward))
        self.is_over = bool(is_terminated or is_truncated)
        self._on_step(self._observed)

    def close(self) -> None:
        self._env.close()
