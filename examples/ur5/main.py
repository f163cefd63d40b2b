"""A policy on a UR5, by RTDE, with a Robotiq gripper and two cameras.

    python examples/ur5/main.py --robot_host 192.168.1.10 --base_camera realsense:SERIAL --wrist_camera opencv:0 \
        --prompt "pick up the cup" --host 192.168.1.20
"""

import dataclasses
from pathlib import Path
from typing import Any, Mapping, Optional

from openpi_client.robots import program
from openpi_client.robots.cameras import open_camera
from openpi_client.robots.robotiq import PORT, RobotiqGripper
from openpi_client.robots.ur5 import RATE_HZ, UR5Robot


@dataclasses.dataclass(frozen=True)
class Args(program.RobotArgs):
    """A policy on a UR5, by RTDE, with a Robotiq gripper and two cameras.

    Attributes:
        host, port: of the policy's server; default port: 8000, or 443 of wss://...
        robot_host: of the controller.
        base_camera, wrist_camera: realsense:SERIAL, opencv:INDEX or opencv:PATH.
        gripper: whether there is one.
        gripper_port: of its URCap.
        prompt: what the policy is told.
        action_horizon: rows from one question to the next, at least.
        rate_hz: of commands; None = the policy's own, else 20.
        max_seconds: of an episode.
        num_episodes: one after the other.
    """

    host: str = "0.0.0.0"
    port: Optional[int] = None
    robot_host: str = "192.168.1.10"
    base_camera: str = "opencv:0"
    wrist_camera: str = "opencv:1"
    gripper: bool = True
    gripper_port: int = PORT
    prompt: str = ""
    action_horizon: int = 25
    rate_hz: Optional[float] = None
    max_seconds: float = 60.0
    num_episodes: int = 1
    log_dir: Optional[Path] = Path("data/ur5/logs")


def main(args: Args) -> None:
    def make_robot(metadata: Mapping[str, Any]) -> UR5Robot:
        moves = not args.dry_run
        cameras = {
            "base_rgb": open_camera("base_rgb", args.base_camera),
            "wrist_rgb": open_camera("wrist_rgb", args.wrist_camera),
        }
        return UR5Robot(
            args.robot_host,
            cameras,
            rate_hz=args.rate_hz or program.rate_of(metadata) or RATE_HZ,
            gripper=RobotiqGripper(args.robot_host, args.gripper_port, moves=moves) if args.gripper else None,
            prompt=args.prompt,
            moves=moves,
        )

    with program.running(make_robot, args.host, args.port, args, rows=args.action_horizon) as (robot, loop):
        for number in range(args.num_episodes):
            robot.reset()
            summary = loop.run(max_s=args.max_seconds)
            print(f"episode {number}: {summary['rows_played']} steps; {summary['end']}")


if __name__ == "__main__":
    program.main(main, Args)
