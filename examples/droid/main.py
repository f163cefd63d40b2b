"""A policy on a DROID station: asks for an instruction, rolls out, asks how it went.

    python examples/droid/main.py --external_camera left --left_camera_id 24259877 --right_camera_id 24514023 \
        --wrist_camera_id 13062452 --remote_host 192.168.1.20
"""

import contextlib
import csv
import dataclasses
import datetime
import itertools
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np
from PIL import Image
from typing_extensions import Literal

from openpi_client import image_tools
from openpi_client.robots import program, video
from openpi_client.robots.droid import DroidRobot

VIDEO_FPS = 10
COLUMNS: Tuple[str, ...] = ("success", "duration", "video_filename")
_NO_CAMERA = "<your_camera_id>"


@dataclasses.dataclass(frozen=True)
class Args(program.RobotArgs):
    """A policy on a DROID station.

    Attributes:
        left_camera_id, right_camera_id, wrist_camera_id: serial numbers.
        external_camera: which of the first two the policy sees; has to be given.
        max_timesteps: of a rollout, at 15 Hz.
        open_loop_horizon: rows from one question to the next, at least.
        remote_host, remote_port: of the server; default port: 8000, or 443 of wss://...
        action_space: what the policy was trained with; released checkpoints: velocities, which need no `blend_s`.
        results_dir: of the tables of scores.
    """

    left_camera_id: str = _NO_CAMERA
    right_camera_id: str = _NO_CAMERA
    wrist_camera_id: str = _NO_CAMERA
    external_camera: Optional[Literal["left", "right"]] = None
    max_timesteps: int = 600
    open_loop_horizon: int = 8
    remote_host: str = "0.0.0.0"
    remote_port: Optional[int] = None
    action_space: Literal["joint_velocity", "joint_position"] = "joint_velocity"
    results_dir: Path = Path("results")
    log_dir: Optional[Path] = Path("data/droid/logs")


def main(args: Args) -> None:
    if args.external_camera is None:
        raise ValueError("--external_camera is missing; expected left or right: the camera that the policy sees")
    ids = {"left": args.left_camera_id, "right": args.right_camera_id, "wrist": args.wrist_camera_id}
    missing = [f"--{name}_camera_id" for name, serial in ids.items() if serial == _NO_CAMERA]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; expected the serial numbers of the station's cameras")
    if args.action_space == "joint_velocity":
        args = dataclasses.replace(args, blend_s=0.0)

    def make_robot(metadata: Mapping[str, Any]) -> DroidRobot:
        nonlocal station
        options = {"external_camera": args.external_camera, "action_space": args.action_space}
        station = DroidRobot(ids, moves=not args.dry_run, **options)
        station.prompt = "(not asked yet)"
        return station

    station: Optional[DroidRobot] = None
    table = unused(args.results_dir / f"eval_{datetime.datetime.now():%I:%M%p_%B_%d_%Y}.csv")
    scores: List[Dict[str, Any]] = []
    host, rows = args.remote_host, args.open_loop_horizon
    with program.running(make_robot, host, args.remote_port, args, rows=rows) as (robot, loop):
        assert station is not None
        save_views(station, Path("robot_camera_views.png"))
        while True:
            station.prompt = input("Instruction: ").strip()
            name = unused(Path(f"video_{datetime.datetime.now():%Y_%m_%d_%H:%M:%S}.mp4"))
            film = video.VideoWriter(name, VIDEO_FPS, drops=True)
            num_ticks = rollout(args, loop, station, film)
            path = film.close()
            scores.append({"success": ask_score(), "duration": num_ticks - 1, "video_filename": str(path or "")})
            write_table(table, scores)
            if input("One more rollout? (y or n) ").strip().lower() != "y":
                break
            robot.reset()
    print(f"results: {table}")


def rollout(args: Args, loop: Any, station: DroidRobot, film: video.VideoWriter) -> int:
    """One rollout, which Ctrl-C ends.

    Returns:
        how many ticks it had.
    """
    print("Ctrl-C ends the rollout early.")

    def seen() -> bool:
        film.add(station.picture(args.external_camera or "left"))
        return False

    with contextlib.suppress(KeyboardInterrupt):
        most = args.blend_s + program.seconds(args.max_timesteps, loop.rate_hz)
        print(loop.run(max_s=most, until=seen)["end"])
    return len(loop.last_log.ticks)


def ask_score() -> float:
    """0 to 1."""
    while True:
        answer = input("Success? (y, n, or 0 to 100 for a part) ").strip().lower()
        if answer in ("y", "n"):
            return float(answer == "y")
        with contextlib.suppress(ValueError):
            if 0 <= float(answer) <= 100:
                return float(answer) / 100
        print(f"{answer!r} is none of these")


def unused(path: Path) -> Path:
    """The path, or one with a number, if there is such a file already."""
    taken = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], taken) if not found.exists())


def write_table(path: Path, scores: List[Dict[str, Any]]) -> None:
    """After each rollout, so that none is lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(scores)
    partial.replace(path)


def save_views(station: DroidRobot, path: Path) -> None:
    """What the three cameras see, side by side: left, wrist, right."""
    views = [station.picture(name) for name in ("left", "wrist", "right")]
    height, width = views[0].shape[:2]
    Image.fromarray(np.concatenate([image_tools.resize_with_pad(view, height, width) for view in views], 1)).save(path)


if __name__ == "__main__":
    program.main(main, Args)
