"""A policy on an ALOHA 2, under ROS 2.

python examples/aloha_real/main_ros2.py --args.host 192.168.1.20
"""

import dataclasses

from main import Args, main
from typing_extensions import Literal

from openpi_client.robots import program
from openpi_client.robots.ros2 import Ros2Topics


@dataclasses.dataclass(frozen=True)
class Ros2Args(Args):
    __doc__ = Args.__doc__

    left_arm: str = "follower_left"
    right_arm: str = "follower_right"
    camera_topic: str = "/{camera}/camera/color/image_rect_raw"
    gripper: Literal["aloha", "aloha2"] = "aloha2"


if __name__ == "__main__":
    program.main(lambda args: main(args, Ros2Topics), Ros2Args, prefix="args.")
