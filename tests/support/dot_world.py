"""A world of somebody's own for tests: a dot in five dimensions, and a gripper, under the keys of the table-top."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from openpi.envs.gym_world import GymWorld
from openpi.envs.world import PRIVILEGED, Task
from openpi_client.base_policy import BasePolicy

REACH, STEP, HORIZON = 0.02, 0.1, 12


class DotEnv(gymnasium.Env):
    """Moves towards its target position by `STEP` at most; done when it is there."""

    observation_space = spaces.Box(-1, 1, (6,), np.float32)
    action_space = spaces.Box(-1, 1, (6,), np.float32)
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, trouble: str = "") -> None:
        self.render_mode = "rgb_array"
        self._trouble = trouble

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.seed, self.place = seed, np.zeros(6, np.float32)
        self.goal = self.np_random.uniform(-1, 1, 6).astype(np.float32) * (1 if (options or {}).get("far") else 0.3)
        return self._raw(), {}

    def step(self, action):
        if self._trouble == "raise" and self.seed == 2:
            raise ArithmeticError("the dot is lost")
        if self._trouble == "die" and self.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        self.place = self.place + np.clip(action - self.place, -STEP, STEP)
        is_there = bool(np.abs(self.place - self.goal).max() < REACH)
        return self._raw(), 0.0, is_there, False, {"is_success": is_there}

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[int(16 + 15 * self.place[0]), int(16 + 15 * self.place[1])] = 255
        return picture

    def _raw(self) -> dict[str, np.ndarray]:
        return {"place": self.place.copy(), "goal": self.goal}


@dataclass(frozen=True)
class Dot:
    """A dot that goes to where its picture says.

    Attributes:
        trouble: `raise` or `die`, in episodes of seed 2.
        rows: of a chunk that are played.
    """

    trouble: str = ""
    rows: int = 3

    recipe: ClassVar[str] = "tabletop_place"
    control_hz: ClassVar[float] = 10.0

    @property
    def execute_horizon(self) -> int:
        return self.rows

    def tasks(self) -> Sequence[Task]:
        return [Task("near", "go there", max_steps=20), Task("far [2]", "go far", max_steps=12)]

    def open(self, *, privileged: bool = False) -> GymWorld:
        return GymWorld(
            DotEnv(self.trouble),
            observe=lambda raw, task: keys(raw, task, is_privileged=privileged),
            hold=lambda raw: raw["place"],
            options=lambda task: {"far": task.name != "near"},
        )

    def expert(self) -> "Walker":
        return Walker()


def keys(raw: dict[str, np.ndarray], task: Task, *, is_privileged: bool) -> dict[str, Any]:
    """The goal is in the picture, as brightness."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[0, :6, 0] = np.round(127.5 * (raw["goal"] + 1))
    known = {PRIVILEGED: {"goal": raw["goal"]}} if is_privileged else {}
    cameras = {"observation/image": picture, "observation/wrist_image": picture}
    return {**cameras, "observation/state": raw["place"], "prompt": task.prompt, **known}


class Walker:
    """Goes straight to the goal, in steps that shrink with the distance; what it is asked, it remembers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(obs)
        seen = obs["observation/image"][0, :6, 0] / 127.5 - 1
        goal = obs[PRIVILEGED]["goal"] if PRIVILEGED in obs else seen
        here = obs["observation/state"]
        path = [here + (goal - here) * (1 - 0.5 ** (k + 1)) for k in range(HORIZON)]
        return {"actions": np.array(path, np.float32)}


class Walking(BasePolicy):
    """The walker behind a server, under a contract if it is given one."""

    def __init__(self, contract: object = None) -> None:
        self.metadata: dict = {}
        self.checkpoint: dict | None = None
        self.walker = Walker()
        if contract is not None:
            self.contract = contract

    def infer(self, obs: dict) -> dict:
        return self.walker.infer(obs)
