"""Trossen AI kits: two WidowX AI arms by Trossen's driver (the library trossen-arm), and RealSense cameras.

State and action, 14, in the driver's units: left joints 0-5 (rad), left carriage (m), right joints 0-5, right carriage.
"""

import contextlib
import math
from typing import Any, List, Mapping, Sequence

import numpy as np
from typing_extensions import Literal

from openpi_client.base_policy import Observation
from openpi_client.realtime import Limits, Robot
from openpi_client.robots import pictures
from openpi_client.robots.aloha import NAMES
from openpi_client.robots.cameras import Camera
from openpi_client.robots.libraries import need
from openpi_client.robots.motion import check_rate

RATE_HZ = 30.0

_INSTALL = "pip install trossen-arm"
_SIZE = (224, 224)
_TIMEOUT_S = 20.0


class TrossenRobot(Robot):
    """Two followers and four cameras."""

    action_names = NAMES
    state_names: Mapping[str, Sequence[str]] = {"state": NAMES}
    holds = "stay"

    def __init__(
        self,
        addresses: Sequence[str],
        cameras: Mapping[str, Camera],
        *,
        rate_hz: float = RATE_HZ,
        time_to_move_multiplier: float = 4.0,
        resize: Literal["pad", "stretch"] = "pad",
        prompt: str = "",
        moves: bool = True,
    ) -> None:
        """
        Args:
            addresses: of the left and the right follower.
            cameras: by the names that the policy knows, `cam_high` and so on.
            rate_hz: of commands.
            time_to_move_multiplier: periods in which the driver reaches a target: more is smoother, and lags more.
            resize: of pictures. Training pads; "stretch" is what the published program does.
            moves: False leaves the motors as they are, and only listens.
        Raises:
            ImportError: no driver here.
            ValueError: a rate or a time is none.
            ConnectionError: an arm does not answer.
        """
        check_rate(rate_hz)
        if not 0 < time_to_move_multiplier < math.inf:
            raise ValueError(f"min_time_to_move_multiplier is {time_to_move_multiplier}; expected more than 0")
        self.rate_hz = rate_hz
        self._arm = need("trossen_arm", _INSTALL)
        self._cameras, self._prompt, self._stretches = dict(cameras), prompt, resize == "stretch"
        self._goal_s = time_to_move_multiplier / rate_hz
        self._drivers: List[Any] = []
        try:
            for address in addresses:
                self._drivers.append(self._connected(address))
            self.limits = self._hardware_limits()
            for camera in self._cameras.values():
                camera.wait()
            if moves:
                for driver in self._drivers:
                    driver.set_all_modes(self._arm.Mode.position)
        except BaseException:
            self.close()
            raise

    def observe(self) -> Observation:
        images = {name: self._picture(camera) for name, camera in self._cameras.items()}
        return {"state": self.pose().astype(np.float32), "images": images, "prompt": self._prompt}

    def pose(self) -> np.ndarray:
        return np.concatenate([np.asarray(driver.get_all_positions(), np.float64) for driver in self._drivers])

    def apply(self, action: np.ndarray) -> None:
        for driver, positions in zip(self._drivers, np.split(action, len(self._drivers))):
            driver.set_all_positions(positions, self._goal_s, False)

    def close(self) -> None:
        """The arms brake in their place."""
        with contextlib.ExitStack() as last:  # each lets go, whatever another one raises
            for camera in self._cameras.values():
                last.callback(camera.close)
            for driver in self._drivers:
                last.callback(driver.cleanup)
            self._drivers = []

    def _connected(self, address: str) -> object:
        driver = self._arm.TrossenArmDriver()
        follower = self._arm.StandardEndEffector.wxai_v0_follower
        try:
            driver.configure(self._arm.Model.wxai_v0, follower, address, False, _TIMEOUT_S)
        except RuntimeError as error:
            raise ConnectionError(f"no arm at {address}: {error}") from error
        return driver

    def _hardware_limits(self) -> Limits:
        joints = [joint for driver in self._drivers for joint in driver.get_joint_limits()]
        return Limits(
            low=[joint.position_min for joint in joints],
            high=[joint.position_max for joint in joints],
            max_speed=[joint.velocity_max for joint in joints],
        )

    def _picture(self, camera: Camera) -> object:
        picture = camera.picture()
        return pictures.stretched(picture, *_SIZE) if self._stretches and picture is not None else picture
