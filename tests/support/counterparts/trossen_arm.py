"""Trossen's driver, as much of it as a robot's program uses: an arm of no matter is where it is told to be.

Names and signatures are those of trossen-arm 1.11, which a test compares.
"""

import enum
import time
from collections.abc import Sequence
from typing import NamedTuple

import told


class Mode(enum.Enum):
    idle, position, velocity, external_effort, effort = range(5)


class Model(enum.Enum):
    wxai_v0 = 0


class StandardEndEffector:
    wxai_v0_follower = "wxai_v0_follower"


class JointLimit(NamedTuple):
    position_min: float
    position_max: float
    velocity_max: float


_LIMITS = [JointLimit(-3.1, 3.1, 3.0), JointLimit(0.0, 3.1, 3.0), JointLimit(0.0, 2.3, 3.0)]
_LIMITS += [JointLimit(-1.6, 1.6, 6.0)] * 2 + [JointLimit(-3.1, 3.1, 6.0), JointLimit(0.0, 0.04, 0.2)]


class TrossenArmDriver:
    def configure(
        self, model: Model, end_effector: str, serv_ip: str, clear_error: bool, timeout: float = 20.0
    ) -> None:
        if told.fault("no arm"):
            raise RuntimeError(f"Failed to connect to the arm controller's TCP server at {serv_ip}")
        self._address, self._mode = serv_ip, Mode.idle
        self._positions = [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.02]
        self._num_commands = 0

    def get_num_joints(self) -> int:
        return len(self._positions)

    def get_joint_limits(self) -> list[JointLimit]:
        return _LIMITS

    def set_all_modes(self, mode: Mode = Mode.idle) -> None:
        told.write("mode", arm=self._address, mode=mode.name)
        self._mode = mode

    def get_all_positions(self) -> list[float]:
        return list(self._positions)

    def set_all_positions(
        self,
        goal_positions: Sequence[float],
        goal_time: float = 2.0,
        blocking: bool = True,
        goal_feedforward_velocities: Sequence[float] | None = None,
        goal_feedforward_accelerations: Sequence[float] | None = None,
    ) -> None:
        assert self._mode is Mode.position and not blocking and len(goal_positions) == 7
        self._num_commands += 1
        _check_line(self)
        self._positions = [float(value) for value in goal_positions]
        told.write(
            "positions", arm=self._address, positions=self._positions, goal_time=goal_time, time_s=time.monotonic()
        )

    def cleanup(self, reboot_controller: bool = False) -> None:
        told.write("cleanup", arm=self._address)
        _check_line(self)


def _check_line(driver: TrossenArmDriver) -> None:
    if told.fault(f"{driver._address} goes") and driver._num_commands > 5:
        raise RuntimeError(f"Failed to send to the arm controller at {driver._address}")
