"""ALOHA's simulator as a robot: the keys, picture and units of the recipe `pi0_aloha_sim`.

The picture is that of the published program: the camera `top`, 4:3, padded to a square, channels first. Source: the
serving specification, section 5.2.
"""

# dm_control and gym_aloha ship no type stubs.
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import uuid
import warnings
from typing import Any

import numpy as np

from openpi.envs.world import PRIVILEGED, Task
from openpi_client.base_policy import Observation
from openpi_client.image_tools import resize_with_pad
from openpi_sim import opengl
from openpi_sim.actions import checked_action
from openpi_sim.aloha.config import INSERTION, TRANSFER

ACTION_DIM = 14
_CAMERA = "top"
_EXACT_HW = (480, 640)
_FILM_HW = (240, 320)
_NAMES = {TRANSFER: "transfer_cube", INSERTION: "insertion"}  # as `gym_aloha` calls them


class AlohaWorld:
    """See `openpi.envs.world.World`. Privileged: `episode`, `task`, `step`s so far, `qpos`, `qvel`."""

    def __init__(self, *, image_size: int = 224, exact_images: bool = False, privileged: bool = False):
        self._size, self._is_exact, self._is_privileged = image_size, exact_images, privileged
        self._envs: dict[str, Any] = {}
        self._task: Task | None = None

    def reset(self, task: Task, seed: int) -> None:
        if task.name not in _NAMES:
            raise ValueError(f"the task is {task.name!r}; ALOHA has {', '.join(_NAMES)}")
        if task.name not in self._envs:
            self._envs[task.name] = _open(_NAMES[task.name])
        self._task, self._env = task, self._envs[task.name]
        self._env.reset(seed=seed)
        self._episode, self._step, self._is_success = f"{task.name}/{seed}/{uuid.uuid4().hex}", 0, False
        self._last_action = self._state

    def observe(self) -> Observation:
        assert self._task is not None, "reset comes first"
        image = self._exact_image() if self._is_exact else self._fast_image()
        observation: dict[str, Any] = {
            "state": self._state,
            "images": {"cam_high": np.ascontiguousarray(image.transpose(2, 0, 1))},
            "prompt": self._task.prompt,
        }
        return observation | self._privileged() if self._is_privileged else observation

    def step(self, action: np.ndarray) -> None:
        self._last_action = checked_action(action, ACTION_DIM)
        *_, is_success, _, _ = self._env.step(self._last_action)
        self._is_success |= bool(is_success)
        self._step += 1

    def hold(self) -> np.ndarray:
        return self._last_action.copy()

    @property
    def is_success(self) -> bool:
        return self._is_success

    def render(self) -> np.ndarray:
        return self._draw(*_FILM_HW, has_shadows=False)

    def close(self) -> None:
        for env in self._envs.values():
            env.unwrapped._env.close()
        self._envs.clear()

    @property
    def _physics(self) -> object:
        return self._env._env.physics

    @property
    def _state(self) -> np.ndarray:
        return self._env._env.task.get_qpos(self._physics)

    def _privileged(self) -> dict[str, object]:
        assert self._task is not None
        found: dict[str, Any] = {
            "episode": self._episode,
            "task": self._task.name,
            "step": self._step,
            "qpos": self._physics.data.qpos.copy(),
            "qvel": self._physics.data.qvel.copy(),
        }
        return {PRIVILEGED: found}

    def _exact_image(self) -> np.ndarray:
        return resize_with_pad(self._draw(*_EXACT_HW, has_shadows=True), self._size, self._size)

    def _fast_image(self) -> np.ndarray:
        image = np.zeros((self._size, self._size, 3), np.uint8)
        height = round(self._size * _EXACT_HW[0] / _EXACT_HW[1])
        top = (self._size - height) // 2
        image[top : top + height] = self._draw(height, self._size, has_shadows=False)
        return image

    def _draw(self, height: int, width: int, *, has_shadows: bool) -> np.ndarray:
        flags = {} if has_shadows else {"shadow": False}
        return self._physics.render(height=height, width=width, camera_id=_CAMERA, render_flag_overrides=flags)


def _open(name: str) -> object:
    opengl.choose()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        from gym_aloha.env import AlohaEnv
    env = AlohaEnv(name, obs_type="pixels_agent_pos")
    task = env._env.task
    # Theirs draws three pictures of 640 x 480 in every step, 280 to 470 ms, of which none is used here.
    nothing = {"top": np.empty(0, np.uint8)}
    task.get_observation = lambda physics: {"qpos": task.get_qpos(physics), "images": nothing}
    return env
