"""CALVIN's simulated Franka at a desk as a robot.

Of the 15 values of an action the simulator takes seven: a relative pose, and the gripper, whose sign counts.
"""

from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from typing_extensions import Literal, Protocol

from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime.actions import Hold
from openpi_client.robots.worlds import World

RATE_HZ = 30.0

_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_WIDTH = 15
_ZERO: Tuple[Literal["stay", "zero"]] = ("zero",)


class CalvinEnv(Protocol):
    """What is used of CALVIN's `PlayTableSimEnv`."""

    def reset(self, *, robot_obs: np.ndarray, scene_obs: np.ndarray) -> Observation: ...

    def get_info(self) -> Metadata: ...

    def get_obs(self) -> Observation: ...

    def step(self, action: object) -> Tuple[Observation, float, bool, Metadata]: ...

    def close(self) -> None: ...


class CalvinWorld(World):
    """The desk, for one subtask after the other.

    Attributes:
        prompt: the subtask in words.
    """

    action_names = (*(f"d_{name}" for name in _POSE), "gripper", *(f"unused_{i}" for i in range(_WIDTH - 7)))
    state_names: Mapping[str, Sequence[str]] = {
        "observation/state": (*_POSE, "gripper_width", *(f"joint_{i}" for i in range(1, 8)), "gripper")
    }
    holds: Optional[Hold] = (*_ZERO * 6, "stay", *_ZERO * (_WIDTH - 7))
    step_hz = RATE_HZ

    def __init__(
        self,
        env: CalvinEnv,
        *,
        on_step: Callable[[Mapping[str, object]], None] = lambda observation: None,
    ) -> None:
        """
        Args:
            env: `calvin_env`'s play table.
            on_step: called with each observation.
        """
        super().__init__()
        self._env, self._on_step = env, on_step
        self._is_done: Callable[[Any, Any], bool] = lambda start, now: False
        self._initial: Any = (None, None)
        self._start: Any = None
        self._observed: Dict[str, Any] = {}
        self.prompt = ""

    def place(self, robot_obs: object, scene_obs: object) -> None:
        """Where a sequence begins; `reset` puts the desk there."""
        self._initial = (robot_obs, scene_obs)

    def reset(self) -> None:
        super().reset()
        robot_obs, scene_obs = self._initial
        self._take(self._env.reset(robot_obs=robot_obs, scene_obs=scene_obs))

    def begin(self, prompt: str, is_done: Callable[[object, object], bool]) -> None:
        """The next subtask, from where the desk is.

        Args:
            is_done: what the simulator knew when the subtask began, and knows now -> whether it is done.
        """
        super().reset()
        self.prompt, self._is_done, self._start = prompt, is_done, self._env.get_info()
        self._take(self._env.get_obs())

    def observe(self) -> Observation:
        return self._observed

    def _step(self, action: np.ndarray) -> None:
        command = np.append(action[:6], 1.0 if action[6] > 0 else -1.0)
        raw, _, _, info = self._env.step(command)
        self.is_over = self._is_done(self._start, info)
        self._take(raw)

    def _take(self, raw: Observation) -> None:
        self._observed = {
            "observation/rgb_static": np.asarray(raw["rgb_obs"]["rgb_static"]),
            "observation/rgb_gripper": np.asarray(raw["rgb_obs"]["rgb_gripper"]),
            "observation/state": np.asarray(raw["robot_obs"], np.float32),
            "prompt": self.prompt,
        }
        self._on_step(self._observed)

    def close(self) -> None:
        self._env.close()
