"""A world in a few lines, for what is the same in all worlds: a point goes to a mark, in LIBERO's keys and actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openpi.envs.world import PRIVILEGED, Task

STEP_M = 0.05  # for an action of 1, as LIBERO's controller
NEAR_M = 0.04


class PointWorld:
    def __init__(self, config: PointConfig, *, privileged: bool):
        self._config, self._is_privileged = config, privileged

    def reset(self, task: Task, seed: int) -> None:
        rng = np.random.default_rng([seed, len(task.name)])
        self._task, self._is_stuck = task, bool(self._config.stuck_every) and seed % self._config.stuck_every == 0
        self._point, self._mark = np.zeros(3), rng.uniform(-0.5, 0.5, 3)

    def observe(self) -> dict:
        image = np.zeros((16, 16, 3), np.uint8)
        column, row = ((self._point[:2] + 1) * 7.5).astype(int).clip(0, 15)
        image[row, column] = (255, 80, 0)
        observation = {
            "observation/image": image,
            "observation/wrist_image": image[::-1].copy(),
            "observation/state": np.concatenate([self._point, np.zeros(5)]),
            "prompt": self._task.prompt,
        }
        return observation | ({PRIVILEGED: {"mark": self._mark}} if self._is_privileged else {})

    def step(self, action: np.ndarray) -> None:
        self._point = self._point + (0 if self._is_stuck else STEP_M) * np.clip(action[:3], -1, 1)

    def hold(self) -> np.ndarray:
        return np.zeros(7)

    @property
    def is_success(self) -> bool:
        return bool(np.linalg.norm(self._point - self._mark) < NEAR_M)

    def render(self) -> np.ndarray:
        return self.observe()["observation/image"]

    def close(self) -> None: ...


class PointExpert:
    def infer(self, obs: dict) -> dict:
        move = np.clip((obs[PRIVILEGED]["mark"] - obs["observation/state"][:3]) / STEP_M, -1, 1)
        return {"actions": np.array([[*move, 0, 0, 0, -1]], np.float32)}


@dataclass(frozen=True)
class PointConfig:
    """Two tasks; in every `stuck_every`th seed the point does not move."""

    stuck_every: int = 0
    num_starts: int | None = None

    @property
    def recipe(self) -> str:
        return "pi05_libero"

    @property
    def control_hz(self) -> float:
        return 10.0

    def tasks(self) -> tuple[Task, ...]:
        names = ("point/left", "point/right")
        return tuple(Task(name, f"go {name[6:]}", 40, self.num_starts) for name in names)

    def open(self, *, privileged: bool = False) -> PointWorld:
        return PointWorld(self, privileged=privileged)

    def expert(self) -> PointExpert:
        return PointExpert()
