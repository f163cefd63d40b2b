"""Joints go half of the way to where they are sent, each time they are told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lerobot.motors import Motor, MotorNormMode
from lerobot.robots import Robot

from lerobot_robot_tiny_arm.config_tiny_arm import TinyArmConfig

SIZE_HW = (48, 64)


class TinyArm(Robot):
    config_class = TinyArmConfig
    name = "tiny_arm"

    def __init__(self, config: TinyArmConfig):
        super().__init__(config)
        self.config = config
        self.cameras: dict[str, Any] = {}
        degrees, share = MotorNormMode.DEGREES, MotorNormMode.RANGE_0_100
        # A real one is a MotorsBus on a serial port.
        self.bus = SimpleNamespace(
            motors={
                "gripper": Motor(3, "sts3215", share),
                "elbow": Motor(2, "sts3215", degrees),
                "shoulder": Motor(1, "sts3215", degrees),
            }
        )
        self._positions = {"gripper.pos": 40.0, "elbow.pos": -30.0, "shoulder.pos": 15.0}
        self._is_connected = False
        self._count = 0

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**self.action_features, "front": (*SIZE_HW, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return dict.fromkeys(self._positions, float)

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    def connect(self, calibrate: bool = True) -> None:
        self._is_connected = True

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self) -> dict[str, Any]:
        assert self._is_connected
        self._count += 1
        self._write("observation", self._positions)
        return {**self._positions, "front": self._picture()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        assert self._is_connected
        wanted = {name: float(action[name]) for name in self._positions}
        self._write("action", wanted)
        step = self.config.max_step
        sent = {n: float(np.clip(v, self._positions[n] - step, self._positions[n] + step)) for n, v in wanted.items()}
        self._positions = {name: 0.5 * (self._positions[name] + sent[name]) for name in sent}
        return sent

    def disconnect(self) -> None:
        self._is_connected = False
        self._write("disconnected", {})

    def _picture(self) -> np.ndarray:
        """Other colors each time; red on the left, so that turned channels show."""
        picture = np.zeros((*SIZE_HW, 3), np.uint8)
        picture[:, : SIZE_HW[1] // 2, 0] = 200
        picture[..., 1] = self._count % 50
        return picture

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self.config.log:
            with Path(self.config.log).open("a") as file:
                file.write(json.dumps({"kind": kind, "count": self._count, **values}) + "\n")
