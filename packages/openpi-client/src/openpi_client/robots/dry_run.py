"""A robot that says what it would do."""

from typing import Callable, Optional

import numpy as np

from openpi_client.base_policy import Observation
from openpi_client.realtime import Robot


class DryRun(Robot):
    """Sees what another robot sees, and prints commands instead of sending them."""

    def __init__(self, robot: Robot, write: Callable[[str], None] = print) -> None:
        self._robot, self._write = robot, write
        self.action_names, self.state_names = robot.action_names, robot.state_names
        self.rate_hz, self.holds, self.limits = robot.rate_hz, robot.holds, robot.limits

    def observe(self) -> Observation:
        return self._robot.observe()

    def pose(self) -> Optional[np.ndarray]:
        return self._robot.pose()

    def apply(self, action: np.ndarray) -> None:
        names = self.action_names or range(len(action))
        self._write("would command " + ", ".join(f"{name} {value:.4f}" for name, value in zip(names, action)))

    def hold(self) -> None:
        self._write("would hold")

    def reset(self) -> None:
        self._write("would go to where an episode begins")
        self._robot.observe()

    def close(self) -> None:
        self._robot.close()
