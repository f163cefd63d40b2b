"""A policy on an ALOHA, under ROS 1. (ROS 2: main_ros2.py.)

python examples/aloha_real/main.py --args.host 192.168.1.20
"""

import dataclasses
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

from typing_extensions import Literal

from openpi_client.robots import aloha, program
from openpi_client.robots.ros1 import Ros1Topics


@dataclasses.dataclass(frozen=True)
class Args(program.RobotArgs):
    """A policy on an ALOHA.

    Attributes:
        host, port: of the server; default port: 8000, or 443 of wss://...
        action_horizon: rows from one question to the next, at least.
        num_episodes: each begins at the reset pose.
        max_episode_steps: of an episode, at 50 Hz.
        prompt: what the policy is told; None = its own prompt.
        left_arm, right_arm: names of the followers.
        camera_topic: of a camera, by its name.
        gripper: whose ranges: those of ALOHA or of ALOHA 2.
    """

    host: str = "0.0.0.0"
    port: Optional[int] = None
    action_horizon: int = 25
    num_episodes: int = 1
    max_episode_steps: int = 1000
    prompt: Optional[str] = None
    left_arm: str = "puppet_left"
    right_arm: str = "puppet_right"
    camera_topic: str = "/{camera}"
    gripper: Literal["aloha", "aloha2"] = "aloha"
    log_dir: Optional[Path] = Path("data/aloha_real/logs")


def main(args: Args, make_topics: Callable[[], aloha.Topics] = Ros1Topics) -> None:
    def make_robot(metadata: Mapping[str, Any]) -> aloha.AlohaRobot:
        return aloha.AlohaRobot(
            make_topics(),
            arms=(args.left_arm, args.right_arm),
            camera_topics={name: args.camera_topic.format(camera=name) for name in aloha.CAMERAS},
            gripper=aloha.GRIPPERS[args.gripper],
            reset_pose=metadata.get("reset_pose", aloha.RESET_POSE),
            prompt=args.prompt,
        )

    # Published servers take [3, h, w] only.
    options = {"rows": args.action_horizon, "image_layout": "chw"}
    with program.running(make_robot, args.host, args.port, args, **options) as (robot, loop):
        for number in range(args.num_episodes):
            robot.reset()
            summary = loop.run(max_s=args.blend_s + program.seconds(args.max_episode_steps, loop.rate_hz))
            print(f"episode {number}: {summary['rows_played']} steps; {summary['end']}")


if __name__ == "__main__":
    program.main(main, Args, prefix="args.")
