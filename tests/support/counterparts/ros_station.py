"""An ALOHA of no matter behind the fake `rospy` and `rclpy`: its arms are where they are told to be."""

import array
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import told
from aloha.msg import RGBGrayscaleImage
from sensor_msgs.msg import Image, JointState

NAMES = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
NAMES += ["left_finger", "right_finger"]
HEIGHT, WIDTH = 48, 64
# Commands: those of the reset, and a few of an episode.
_DIES_AFTER = 560


class Station:
    """
    Attributes:
        topics: type by name.
    """

    def __init__(self, arms: tuple[str, str], camera_topic: str, *, is_ros2: bool) -> None:
        self._is_ros2 = is_ros2
        finger = 0.05 if is_ros2 else 0.04
        self._joints = {arm: [0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.5, finger, -finger] for arm in arms}
        self._num_commands = 0
        self._listeners: dict[str, list[Callable[[Any], None]]] = {}
        cameras = ["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"]
        self._cameras = [camera_topic.format(camera=name) for name in cameras]
        self.topics = {f"/{arm}/joint_states": "sensor_msgs/JointState" for arm in arms}
        kind = "sensor_msgs/Image" if is_ros2 else "aloha/RGBGrayscaleImage"
        self.topics |= dict.fromkeys(self._cameras, kind)
        threading.Thread(target=self._run, daemon=True).start()

    def listen(self, topic: str, callback: Callable[[Any], None]) -> None:
        self._listeners.setdefault(topic, []).append(callback)

    def take(self, topic: str, message: Any) -> None:
        """A command of the program under test."""
        arm, joints = topic.split("/")[1], self._joints[topic.split("/")[1]]
        if topic.endswith("joint_group"):
            joints[:6] = message.cmd
        else:
            joints[6] = message.cmd
        self._num_commands += 1
        told.write("command", topic=topic, name=message.name, cmd=message.cmd, time_s=time.monotonic(), arm=arm)

    def serve(self, service: str, fields: dict[str, Any]) -> None:
        told.write("service", service=service, **{f"field_{name}": value for name, value in fields.items()})

    def _run(self) -> None:
        tick = 0
        while True:
            is_frozen = told.fault("camera dies") and self._num_commands > _DIES_AFTER
            for arm, joints in self._joints.items():
                self._send(f"/{arm}/joint_states", JointState(name=NAMES, position=array.array("d", joints)))
            for number, topic in enumerate(self._cameras if tick % 3 == 0 else ()):
                if topic in self.topics and not (is_frozen and number == 0):
                    self._send(topic, self._picture(number, tick))
            tick += 1
            time.sleep(0.01)

    def _send(self, topic: str, message: Any) -> None:
        for callback in self._listeners.get(topic, ()):
            callback(message)

    def _picture(self, number: int, tick: int) -> Any:
        """Its camera's number in red, the time in green; blue comes first, and rows are padded."""
        pixels = np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8)
        pixels[..., 2], pixels[..., 1] = 40 * number + 10, tick % 256
        data = pixels.tobytes()
        shape = {"height": HEIGHT, "width": WIDTH, "step": 3 * (WIDTH + 2), "encoding": "bgr8"}
        image = Image(data=array.array("B", data) if self._is_ros2 else data, **shape)
        return image if self._is_ros2 else RGBGrayscaleImage(images=[image, Image(encoding="16UC1")])
