"""A LIBERO without physics: task 0 succeeds after 12 steps of the policy, task 1 never."""

from typing import Any

import numpy as np
import told


class OffScreenRenderEnv:
    def __init__(self, bddl_file_name: str, camera_heights: int, camera_widths: int) -> None:
        self._size, self._succeeds = (camera_heights, camera_widths), "task_0" in bddl_file_name
        told.write("made", bddl=bddl_file_name, size=self._size)

    def seed(self, seed: int) -> None:
        told.write("seed", seed=seed)

    def reset(self) -> dict[str, Any]:
        self._count = 0
        told.write("reset")
        return self._observed()

    def set_init_state(self, state: np.ndarray) -> dict[str, Any]:
        told.write("initial", state=state.tolist())
        return self._observed()

    def step(self, action: list[float]) -> tuple[dict, float, bool, dict]:
        told.write("step", action=action)
        self._count += 1
        return self._observed(), 0.0, self._succeeds and self._count >= 10 + 12, {}

    def _observed(self) -> dict[str, Any]:
        """Upside down, as MuJoCo draws it: what is red lies at the bottom left."""
        pictures = np.zeros((2, *self._size, 3), np.uint8)
        pictures[:, -40:, :40, 0] = 255
        quaternion = [0.0, 0.0, np.sin(0.2), np.cos(0.2)]
        return {
            "agentview_image": pictures[0],
            "robot0_eye_in_hand_image": pictures[1],
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array(quaternion),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def close(self) -> None:
        told.write("closed")
