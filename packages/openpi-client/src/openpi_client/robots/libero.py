"""LIBERO's simulated Franka as a robot, in the conventions of its published data.

Pictures are turned by 180 degrees, as those of the training data are. Actions are seven: shares of the controller's
step in position and rotation, and the gripper, -1 open .. 1 close.
"""

import math
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from typing_extensions import Protocol

from openpi_client import image_tools
from openpi_client.base_policy import Metadata, Observation
from openpi_client.robots.worlds import World

# Steps of the policy until an episode is a failure: a little more than the longest demonstration has.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
RATE_HZ = 20.0

_STAND_STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)


class LiberoEnv(Protocol):
    """What is used of LIBERO's `OffScreenRenderEnv`."""

    def reset(self) -> object: ...

    def set_init_state(self, state: np.ndarray) -> Metadata: ...

    def step(self, action: List[float]) -> Tuple[Metadata, float, bool, Metadata]: ...

    def close(self) -> None: ...


class LiberoWorld(World):
    """One task of LIBERO, from one of its initial states."""

    action_names = ("dx", "dy", "dz", "d_axis_angle_x", "d_axis_angle_y", "d_axis_angle_z", "gripper")
    state_names: Mapping[str, Sequence[str]] = {
        "observation/state": (
            *("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
        )
    }
    holds = "zero"
    step_hz = RATE_HZ

    def __init__(
        self,
        env: LiberoEnv,
        initial_states: Sequence[np.ndarray],
        prompt: str,
        *,
        size: int = 224,
        num_steps_wait: int = 10,
        on_step: Callable[[Mapping[str, object]], None] = lambda observation: None,
    ) -> None:
        """
        Args:
            env: `libero.libero.envs.OffScreenRenderEnv`, seeded.
            initial_states: of the task; `trial` counts through them.
            num_steps_wait: of standing still, until all objects have fallen to where they lie.
            on_step: called with each observation.
        """
        super().__init__()
        self.trial = 0
        self._env, self._initial_states, self._prompt = env, initial_states, prompt
        self._size, self._num_steps_wait, self._on_step = size, num_steps_wait, on_step
        self._observed: Dict[str, Any] = {}

    def reset(self) -> None:
        super().reset()
        self._env.reset()
        raw = self._env.set_init_state(self._initial_states[self.trial % len(self._initial_states)])
        for _ in range(self._num_steps_wait):
            raw, _, _, _ = self._env.step(list(_STAND_STILL))
        self._take(raw)

    def observe(self) -> Observation:
        return self._observed

    def _step(self, action: np.ndarray) -> None:
        raw, _, is_done, _ = self._env.step(action.tolist())
        self.is_over = bool(is_done)
        self._take(raw)

    def _take(self, raw: Metadata) -> None:
        self._observed = {
            "observation/image": self._picture(raw["agentview_image"]),
            "observation/wrist_image": self._picture(raw["robot0_eye_in_hand_image"]),
            "observation/state": state(raw),
            "prompt": self._prompt,
        }
        self._on_step(self._observed)

    def _picture(self, picture: np.ndarray) -> np.ndarray:
        upright = np.ascontiguousarray(picture[::-1, ::-1])
        return image_tools.convert_to_uint8(image_tools.resize_with_pad(upright, self._size, self._size))

    def close(self) -> None:
        self._env.close()


def state(raw: Metadata) -> np.ndarray:
    """float32[8]: the hand's place and rotation vector, and the two fingers."""
    return np.concatenate(
        (raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]), dtype=np.float32
    )


def axis_angle(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """float64[3]: the rotation's axis, times its angle in rad; zeros for none.

    As in the data: where w is negative the angle is more than pi.
    """
    w = min(max(float(quaternion_xyzw[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion_xyzw[:3], np.float64) * 2.0 * math.acos(w) / sine
