"""DROID: a Franka by the laboratory's own `RobotEnv`, joint velocities (or positions) and a gripper, 15 Hz.

A policy sees one exterior and the wrist camera, each the left lens of a stereo pair.
"""

import time
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from typing_extensions import Literal

from openpi_client.base_policy import Observation
from openpi_client.realtime import Limits, Robot
from openpi_client.robots import pictures
from openpi_client.robots.libraries import need

NAMES = (*(f"joint_{i}" for i in range(1, 8)), "gripper")
RATE_HZ = 15.0

_SAME_TICK_S = 0.5 / RATE_HZ

_INSTALL = "install the package of github.com/droid-dataset/droid on the robot's computer"


class DroidRobot(Robot):
    """A DROID station.

    Attributes:
        prompt: what the policy is told.
    """

    action_names = NAMES
    state_names: Mapping[str, Sequence[str]] = {"observation/joint_position": NAMES[:7]}
    rate_hz = RATE_HZ

    def __init__(
        self,
        camera_ids: Mapping[str, str],
        *,
        external_camera: Literal["left", "right"],
        action_space: Literal["joint_velocity", "joint_position"] = "joint_velocity",
        moves: bool = True,
    ) -> None:
        """
        Args:
            camera_ids: serial numbers of `left`, `right` and `wrist`.
            external_camera: which of the first two the policy sees.
            moves: whether the station may go to its start now, as it does when it is opened.
        Raises:
            ImportError: no DROID here.
        """
        is_velocity = action_space == "joint_velocity"
        arm: List[Literal["stay", "zero"]] = ["zero" if is_velocity else "stay"]
        self.holds = [*arm * 7, "stay"]
        # Velocities are shares of the full speed, and the station refuses what is beyond.
        self.limits = Limits(low=-1.0, high=1.0) if is_velocity else Limits(low=_LOW, high=_HIGH, max_speed=_MAX_SPEED)
        env = need("droid.robot_env", _INSTALL).RobotEnv
        self._env = env(action_space=action_space, gripper_action_space="position", do_reset=moves)
        self._ids, self._external = dict(camera_ids), external_camera
        self._seen: Optional[Dict[str, Any]] = None
        self._seen_s = 0.0
        self.prompt = ""

    def observe(self) -> Observation:
        """Raises KeyError: a camera is not there."""
        seen = self._look()
        return {
            "observation/exterior_image_1_left": self.picture(self._external),
            "observation/wrist_image_left": self.picture("wrist"),
            "observation/joint_position": np.asarray(seen["robot_state"]["joint_positions"], np.float32),
            "observation/gripper_position": np.atleast_1d(np.float32(seen["robot_state"]["gripper_position"])),
            "prompt": self.prompt,
        }

    def picture(self, camera: str) -> np.ndarray:
        """What `left`, `right` or `wrist` sees since the last command, uint8[h, w, 3], RGB."""
        images, serial = self._look()["image"], self._ids[camera]
        found = [key for key in images if serial in key and "left" in key]
        if not found:
            raise KeyError(f"no picture of the {camera} camera '{serial}'; the station has {', '.join(sorted(images))}")
        return pictures.bgr_to_rgb(np.asarray(images[found[0]]))

    def pose(self) -> np.ndarray:
        state = self._look()["robot_state"]
        return np.array([*state["joint_positions"], state["gripper_position"]], np.float64)

    def apply(self, action: np.ndarray) -> None:
        gripper = 1.0 if action[7] > 0.5 else 0.0
        self._env.step(np.append(action[:7], gripper))
        self._seen = None

    def reset(self) -> None:
        self._env.reset()
        self._seen = None

    def close(self) -> None:
        close = getattr(self._env, "close", None)  # Older versions have none.
        if close is not None:
            close()

    def _look(self) -> Observation:
        """All sensors, once per tick: reading them waits for a frame of each camera."""
        if self._seen is None or time.monotonic() - self._seen_s > _SAME_TICK_S:
            self._seen = self._env.get_observation()
            self._seen_s = time.monotonic()
        assert self._seen is not None
        return self._seen


# Of the Franka, rad and rad/s, for joint positions; and the gripper, 0 open .. 1 closed.
_LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973, 0.0)
_HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973, 1.0)
_MAX_SPEED = (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61, np.inf)
