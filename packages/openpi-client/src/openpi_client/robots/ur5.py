"""UR5 and its relatives, by Universal Robots' RTDE (the library ur-rtde), with a Robotiq gripper.

Joints are servoed to absolute positions in rad; the gripper is 0 open .. 1 closed.
"""

import contextlib
import logging
import time
from typing import Any, Mapping, Optional, Sequence

import numpy as np

from openpi_client.base_policy import Observation
from openpi_client.realtime import Limits, Robot
from openpi_client.robots.cameras import MAX_AGE_S, Camera
from openpi_client.robots.libraries import need
from openpi_client.robots.motion import check_rate
from openpi_client.robots.robotiq import RobotiqGripper

logger = logging.getLogger(__name__)

JOINTS = ("base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3")
# Of the base models' UR5e data.
RATE_HZ = 20.0

_INSTALL = "pip install ur-rtde"
# Of a UR5(e): two turns, and rad/s; the gripper in 0.1 s.
_LOW = (*(-2 * np.pi,) * 6, 0.0)
_HIGH = (*(2 * np.pi,) * 6, 1.0)
_MAX_SPEED = (*(np.pi,) * 6, np.inf)

# Of RTDE's `safety_mode`: normal, and reduced speed. In all others the arm is stopped, and what is servoed meanwhile it
# would jump to: after a safeguard stop by itself, when somebody closes the door.
_MOVING_MODES = (1, 2)

# Of `servoJ`: s that it looks ahead, which smooths; and its gain, 100 to 2000.
_LOOKAHEAD_S = 0.1
_GAIN = 300.0


class UR5Robot(Robot):
    """One arm, a gripper, a scene camera and one on the wrist."""

    action_names = (*JOINTS, "gripper")
    state_names: Mapping[str, Sequence[str]] = {"joints": JOINTS, "gripper": ("gripper",)}
    holds = "stay"
    limits = Limits(low=_LOW, high=_HIGH, max_speed=_MAX_SPEED)

    def __init__(
        self,
        host: str,
        cameras: Mapping[str, Camera],
        *,
        rate_hz: float = RATE_HZ,
        gripper: Optional[RobotiqGripper] = None,
        prompt: str = "",
        moves: bool = True,
    ) -> None:
        """
        Args:
            host: of the controller.
            cameras: `base_rgb` and `wrist_rgb`.
            rate_hz: of commands: a target is reached in one period.
            gripper: None = there is none; it is said to be open.
            moves: False only listens: no program is started on the controller.
        Raises:
            ImportError: no ur-rtde here.
            ValueError: the rate is none.
            ConnectionError: no controller, or one that does not take commands.
            TimeoutError: a camera is silent.
        """
        check_rate(rate_hz)
        self._host = host
        self._cameras, self._gripper, self._prompt = dict(cameras), gripper, prompt
        self._period_s = 1 / rate_hz
        self.rate_hz = rate_hz
        self._receive = self._control = None
        self._fault = ""  # after which nothing more is commanded
        self._told_at = -1.0  # by the controller's clock
        self._heard_s = 0.0  # by ours
        try:
            self._receive = need("rtde_receive", _INSTALL).RTDEReceiveInterface(host)
            self.pose()  # before a program is started on a controller that has stopped its arm
            for camera in self._cameras.values():
                camera.wait()
            if moves:
                self._control = need("rtde_control", _INSTALL).RTDEControlInterface(host)
        except RuntimeError as error:
            self.close()
            raise ConnectionError(
                f"the controller at {host} does not take commands ({error}): is it on, in remote control, and without "
                "another program?"
            ) from error
        except BaseException:
            self.close()
            raise

    def observe(self) -> Observation:
        """Raises RuntimeError: the controller is gone, says nothing new, or has stopped the arm."""
        pose = self.pose()
        pictures = {name: camera.picture() for name, camera in self._cameras.items()}
        joints, gripper = pose[:6].astype(np.float32), pose[6:].astype(np.float32)
        return {**pictures, "joints": joints, "gripper": gripper, "prompt": self._prompt}

    def pose(self) -> np.ndarray:
        opening = 0.0 if self._gripper is None else self._gripper.position
        return np.array([*self._alive().getActualQ(), opening], np.float64)

    def apply(self, action: np.ndarray) -> None:
        """Raises RuntimeError: the controller does not take it."""
        self._alive()
        joints = [float(angle) for angle in action[:6]]
        control: Any = self._control
        if not control.servoJ(joints, 0.0, 0.0, self._period_s, _LOOKAHEAD_S, _GAIN):
            raise RuntimeError("the controller does not servo: is its program still running?")
        if self._gripper is not None:
            self._gripper.move(float(action[6]))

    def _alive(self) -> Any:
        receive: Any = self._receive
        if not self._fault:
            self._fault = self._found(receive)
            if self._fault:  # now: on a line that is silent the library may take its time to end
                logger.error("%s", self._fault)
        if self._fault:
            raise RuntimeError(self._fault)
        return receive

    def _found(self, receive: Any) -> str:
        """Why nothing more may be commanded; '' = it may."""
        if not receive.isConnected():
            return "the controller is gone"
        told_at, now_s = receive.getTimestamp(), time.monotonic()
        if told_at != self._told_at:
            self._told_at, self._heard_s = told_at, now_s
        elif now_s - self._heard_s > MAX_AGE_S:
            return f"the controller says nothing new since {now_s - self._heard_s:.1f} s: see its cable"
        if receive.getSafetyMode() not in _MOVING_MODES:
            return "the controller has stopped the arm: see its screen, and start anew"
        return ""

    def hold(self) -> None:
        """Ends servoing: the arm decelerates and stands. One that is stopped, or silent, does so by `close`."""
        if self._control is not None and not self._fault:
            self._control.servoStop()

    def close(self) -> None:
        with contextlib.ExitStack() as last:  # each lets go, whatever another one raises
            for connection in (self._receive, self._control):
                if connection is not None:
                    last.callback(connection.disconnect)
            if self._gripper is not None:
                last.callback(self._gripper.close)
            for camera in self._cameras.values():
                last.callback(camera.close)
            if self._control is not None:
                self._end_program(self._control)
        self._control = self._receive = None

    def _end_program(self, control: Any) -> None:
        """While the arm is stopped, or its line is, the library sends nothing: its program would wait there, and go on
        once the stop is cleared."""
        try:
            self._alive()
            control.servoStop()
            control.stopScript()
            is_running = control.isProgramRunning()
        except RuntimeError:
            is_running = True
        if is_running:
            self._stop_program()

    def _stop_program(self) -> None:
        try:
            dashboard = need("dashboard_client", _INSTALL).DashboardClient(self._host)
            dashboard.connect()
            dashboard.stop()
            dashboard.disconnect()
        except RuntimeError as error:
            logger.error("the program on the controller is still running (%s): stop it on the pendant", error)
