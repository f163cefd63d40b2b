"""A gymnasium environment as a world.

@dataclass(frozen=True)
class PushT:
    recipe: ClassVar[str] = "my_recipe.py:pusht"
    control_hz: ClassVar[float] = 10.0

    def tasks(self):
        return [Task("push_t", "push the T onto its mark", max_steps=300)]

    def open(self, *, privileged=False):
        env = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos", render_mode="rgb_array")
        return GymWorld(env, observe=keys, hold=lambda raw: raw["agent_pos"])

    def expert(self):
        return None

def keys(raw, task):
    picture = image_tools.resize_with_pad(raw["pixels"], 224, 224)
    return {"observation/image": picture, "observation/state": raw["agent_pos"], "prompt": task.prompt}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openpi.envs.world import Task
from openpi.shared.strict_json import Json
from openpi_client.base_policy import Observation

if TYPE_CHECKING:
    import gymnasium


class Step(NamedTuple):
    """What `gymnasium.Env.step` returned last."""

    raw: Any
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = {}


def has_succeeded(step: Step) -> bool:
    """What `info` says (`is_success`, `success`), else whether the episode is terminated."""
    for name in ("is_success", "success"):
        if name in step.info:
            return bool(step.info[name])
    return step.terminated


class GymWorld:
    """A `World` around an environment that draws pictures (`render_mode="rgb_array"`).

    One that ends its episode (it has failed for good, or its own time limit is shorter than `Task.max_steps`) rests
    from then on; `env.unwrapped` has no time limit.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        observe: Callable[[object, Task], Observation],
        hold: Callable[[object], np.ndarray],
        success: Callable[[Step], bool] = has_succeeded,
        options: Callable[[Task], Json | None] = lambda task: None,
    ) -> None:
        """
        Args:
            observe: the environment's observation -> what the robot's program sends, with its prompt.
            hold: the environment's observation -> the action that stands still, float[action_dim].
            options: task -> those of `env.reset`.
        """
        self._env, self._keys, self._stand, self._success, self._options = env, observe, hold, success, options

    def reset(self, task: Task, seed: int) -> None:
        raw, info = self._env.reset(seed=seed, options=self._options(task))
        self._task, self._last = task, Step(raw, info=info)

    def observe(self) -> dict[str, object]:
        return self._keys(self._last.raw, self._task)

    def step(self, action: np.ndarray) -> None:
        if self._last.terminated or self._last.truncated:
            return
        space = self._env.action_space
        raw, reward, terminated, truncated, info = self._env.step(np.asarray(action, space.dtype))
        self._last = Step(raw, float(reward), terminated, truncated, info)

    def hold(self) -> np.ndarray:
        return np.asarray(self._stand(self._last.raw), np.float64)

    @property
    def is_success(self) -> bool:
        return self._success(self._last)

    def render(self) -> np.ndarray:
        picture: Any = self._env.render()
        return picture

    def close(self) -> None:
        self._env.close()
