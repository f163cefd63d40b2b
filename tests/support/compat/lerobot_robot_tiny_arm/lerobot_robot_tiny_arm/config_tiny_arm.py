"""Its flags: `--robot.type=tiny_arm --robot.log=FILE`."""

from dataclasses import dataclass

from lerobot.robots import RobotConfig


@RobotConfig.register_subclass("tiny_arm")
@dataclass
class TinyArmConfig(RobotConfig):
    """
    Attributes:
        log: gets a line of JSON for each observation and each command.
        max_step: degrees that a joint goes at most per command; more is clipped.
    """

    log: str = ""
    max_step: float = 1000.0
