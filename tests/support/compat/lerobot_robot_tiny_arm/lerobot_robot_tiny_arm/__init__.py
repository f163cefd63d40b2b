"""A simulated arm of two joints and a gripper, as a plug-in of LeRobot."""

from lerobot_robot_tiny_arm.config_tiny_arm import TinyArmConfig
from lerobot_robot_tiny_arm.tiny_arm import TinyArm

__all__ = ["TinyArm", "TinyArmConfig"]
