"""A DROID station of no matter: its arm goes where it is sent."""

import time
from typing import Any

import numpy as np
import told

SERIALS = ("11111111", "22222222", "33333333")


class RobotEnv:
    def __init__(
        self,
        action_space: str = "cartesian_velocity",
        gripper_action_space: str | None = None,
        camera_kwargs: dict[str, Any] | None = None,
        do_reset: bool = True,
    ) -> None:
        told.write("made", action_space=action_space, gripper_action_space=gripper_action_space)
        self._is_velocity = "velocity" in action_space
        self._joints, self._gripper, self._count = np.zeros(7), 0.0, 0
        if do_reset:
            self.reset()

    def reset(self, randomize: bool = False) -> None:
        told.write("reset")
        self._joints, self._gripper = np.array([0, -np.pi / 5, 0, -4 * np.pi / 5, 0, 3 * np.pi / 5, 0]), 0.0

    def step(self, action: np.ndarray) -> dict[str, Any]:
        assert len(action) == 8
        if self._is_velocity:
            assert action.max() <= 1 and action.min() >= -1
        told.write("step", action=action.tolist(), time_s=time.monotonic())
        self._joints = self._joints + 0.05 * action[:7] if self._is_velocity else action[:7]
        self._gripper = float(action[7])
        return {}

    def get_observation(self) -> dict[str, Any]:
        """Pictures are blue first, with alpha: red says which camera, green which lens, some of blue the time."""
        self._count += 1
        images = {}
        for number, serial in enumerate(SERIALS):
            for lens in ("left", "right"):
                picture = np.zeros((72, 128, 4), np.uint8)
                picture[..., 2], picture[..., 1] = 50 * number + 50, 200 if lens == "left" else 0
                picture[::8, ::8, 0] = self._count % 256
                images[f"{serial}_{lens}"] = picture
        state = {"joint_positions": self._joints.tolist(), "gripper_position": self._gripper}
        return {"image": images, "robot_state": {**state, "cartesian_position": [0.0] * 6}, "timestamp": {}}

    def close(self) -> None:
        told.write("closed")
