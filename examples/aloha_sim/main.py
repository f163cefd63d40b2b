"""A policy in gym-aloha's simulated ALOHA.

python examples/aloha_sim/main.py --args.host 192.168.1.20
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from openpi_client import image_tools
from openpi_client.robots import aloha, libraries, pictures, program, video
from openpi_client.robots.worlds import GymWorld


@dataclasses.dataclass(frozen=True)
class Args(program.WorldArgs):
    """A policy in gym-aloha's simulated ALOHA.

    Attributes:
        out_dir: of the videos.
        task: a gymnasium environment, gym_aloha/AlohaTransferCube-v0 or gym_aloha/AlohaInsertion-v0.
        seed: of where the objects lie.
        action_horizon: rows that are played of each chunk.
        host, port: of the server; default port: 8000, or 443 of wss://...
        display: show what the camera sees.
    """

    out_dir: Path = Path("data/aloha_sim/videos")
    task: str = "gym_aloha/AlohaTransferCube-v0"
    seed: int = 0
    action_horizon: int = 10
    host: str = "0.0.0.0"
    port: Optional[int] = None
    display: bool = False
    log_dir: Optional[Path] = Path("data/aloha_sim/logs")


class AlohaSim(GymWorld):
    """The simulator under the names of a real ALOHA."""

    action_names = aloha.NAMES
    holds = "stay"


def observation(observed: Dict[str, Any]) -> Dict[str, Any]:
    picture = image_tools.resize_with_pad(observed["pixels"]["top"], 224, 224)
    return {
        "state": observed["agent_pos"],
        "images": {"cam_high": pictures.chw(image_tools.convert_to_uint8(picture))},
    }


class Screen:
    """A window with the newest picture."""

    def __init__(self) -> None:
        self._plot = libraries.need("matplotlib.pyplot", "pip install matplotlib")
        self._plot.ion()
        self._picture: Any = None

    def show(self, picture: Any) -> None:
        if self._picture is None:
            self._picture = self._plot.imshow(picture)
        self._picture.set_data(picture)
        self._plot.pause(0.001)


def next_video(folder: Path) -> Path:
    """`out_<n>.mp4`, of which there is none yet."""
    taken = [int(found.group(1)) for path in folder.glob("out_*.mp4") if (found := re.match(r"out_(\d+)$", path.stem))]
    return folder / f"out_{max(taken, default=-1) + 1}.mp4"


def main(args: Args) -> None:
    gymnasium = libraries.need("gymnasium", "pip install -r examples/aloha_sim/requirements.txt")
    libraries.need("gym_aloha", "pip install -r examples/aloha_sim/requirements.txt")
    film = video.VideoWriter(next_video(args.out_dir), fps=int(aloha.RATE_HZ))
    screen = Screen() if args.display else None

    def seen(observed: Mapping[str, Any]) -> None:
        picture = observed["images"]["cam_high"].transpose(1, 2, 0)
        film.add(picture)
        if screen is not None:
            screen.show(picture)

    env = gymnasium.make(args.task, obs_type="pixels_agent_pos")
    world = AlohaSim(env, observation, step_hz=aloha.RATE_HZ, seed=args.seed, on_step=seen)
    try:
        world.reset()
        with program.playing(world, args.host, args.port, args, rows=args.action_horizon) as (_, loop):
            summary = program.played(loop, world, env.spec.max_episode_steps or 1000)
            print(f"largest reward: {world.reward:g}; {summary['rows_played']} steps; {summary['end']}")
    finally:
        print(f"video: {film.close()}")


if __name__ == "__main__":
    program.main(main, Args, prefix="args.")
