"""A policy on a Trossen AI kit: two WidowX AI arms and four RealSense cameras.

    python examples/trossen_ai/main.py --mode autonomous --task_prompt "grab and handover the red cube" \
        --policy_host 192.168.1.20
"""

import dataclasses
from pathlib import Path
from typing import Any, Mapping, Optional

from typing_extensions import Literal

from openpi_client import realtime
from openpi_client.robots import program
from openpi_client.robots.cameras import open_camera
from openpi_client.robots.trossen import TrossenRobot

CAMERAS = ("cam_high", "cam_low", "cam_right_wrist", "cam_left_wrist")


@dataclasses.dataclass(frozen=True)
class Args(program.RobotArgs):
    """A policy on a Trossen AI kit: two WidowX AI arms and four RealSense cameras.

    Attributes:
        policy_host, policy_port: of the server; default port: 8000, or 443 of wss://...
        control_freq: Hz.
        mode: test = log each action and send none, as --dry_run.
        task_prompt: what the policy is told.
        max_steps: of the episode, after the move to where the policy begins.
        rate_of_inference: rows from one question to the next, at least; 25 is quicker to react than a whole chunk.
        temporal_ensemble_coefficient: m of the weights exp(-m i), i = 0 for the oldest chunk, of the mean of all chunks
            that is played; None = the newest one is.
        left_arm, right_arm: addresses of the followers.
        cam_high, cam_low, cam_right_wrist, cam_left_wrist: serial numbers; None = there is no such camera.
        min_time_to_move_multiplier: periods in which the driver reaches a target.
        image_resize: pad, as in training; stretch, as the published program does.
    """

    policy_host: str = "localhost"
    policy_port: Optional[int] = None
    control_freq: float = 30.0
    mode: Literal["autonomous", "test"] = "autonomous"
    task_prompt: str = "move the arm to the left"
    max_steps: int = 1000
    rate_of_inference: int = 50
    temporal_ensemble_coefficient: Optional[float] = None
    left_arm: str = "192.168.1.5"
    right_arm: str = "192.168.1.4"
    cam_high: Optional[str] = "218622270304"
    cam_low: Optional[str] = "130322272628"
    cam_right_wrist: Optional[str] = "128422271347"
    cam_left_wrist: Optional[str] = "218622274938"
    min_time_to_move_multiplier: float = 4.0
    image_resize: Literal["pad", "stretch"] = "pad"
    log_dir: Optional[Path] = Path("data/trossen_ai/logs")


def main(args: Args) -> None:
    args = dataclasses.replace(args, dry_run=args.dry_run or args.mode == "test")
    rows, m = args.rate_of_inference, args.temporal_ensemble_coefficient
    if m is not None and args.strategy != "auto":
        raise ValueError(
            f"--temporal_ensemble_coefficient is a strategy of its own; leave out --strategy {args.strategy}"
        )
    ensembling = None if m is None else realtime.TemporalEnsembling(rate_of_inference=rows, m=m)

    def make_robot(metadata: Mapping[str, Any]) -> TrossenRobot:
        serials = {name: getattr(args, name) for name in CAMERAS}
        cameras = {name: open_camera(name, f"realsense:{serial}") for name, serial in serials.items() if serial}
        return TrossenRobot(
            (args.left_arm, args.right_arm),
            cameras,
            rate_hz=args.control_freq,
            time_to_move_multiplier=args.min_time_to_move_multiplier,
            resize=args.image_resize,
            prompt=args.task_prompt,
            moves=not args.dry_run,
        )

    options = {"rows": rows, "strategy": ensembling, "image_layout": "chw"}
    with program.running(make_robot, args.policy_host, args.policy_port, args, **options) as (_, loop):
        summary = loop.run(max_s=args.blend_s + program.seconds(args.max_steps, loop.rate_hz))
        print(f"{summary['rows_played']} steps; {summary['end']}")


if __name__ == "__main__":
    program.main(main, Args)
