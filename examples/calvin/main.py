"""A policy on CALVIN: how many subtasks of a sequence it does, one after the other.

python examples/calvin/main.py --args.calvin-data-path /data/task_D_D --args.host 192.168.1.20
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np

from openpi_client.robots import libraries, program, video
from openpi_client.robots.calvin import CalvinWorld

logger = logging.getLogger("calvin")

VIDEO_FPS = 30
_INSTALL = "see examples/calvin/README.md: CALVIN is installed from its repository"
_CONF = "callbacks/rollout/tasks/new_playtable_tasks.yaml", "annotations/new_playtable_validation.yaml"


@dataclasses.dataclass(frozen=True)
class Args(program.WorldArgs):
    """A policy on CALVIN: how many subtasks of a sequence it does, one after the other.

    Attributes:
        host, port: of the server; default port: 8000, or 443 of wss://...
        replan_steps: rows that are played of each chunk.
        calvin_data_path: a data set of CALVIN, in which the desk of its validation is described.
        max_subtask_steps: until a subtask is a failure, and its sequence over.
        num_sequences: of five subtasks.
        seed: of NumPy.
        video_out_path: of the videos.
        num_save_videos: sequences of which there is a video.
    """

    host: str = "0.0.0.0"
    port: Optional[int] = None
    replan_steps: int = 5
    calvin_data_path: Path = Path("data/calvin/task_D_D")
    max_subtask_steps: int = 360
    num_sequences: int = 1000
    seed: int = 7
    video_out_path: Path = Path("data/calvin/videos")
    num_save_videos: int = 5
    log_dir: Optional[Path] = Path("data/calvin/logs")


def main(args: Args) -> None:
    np.random.seed(args.seed)
    sequences = libraries.need("calvin_agent.evaluation.multistep_sequences", _INSTALL)
    start_of = libraries.need("calvin_agent.evaluation.utils", _INSTALL).get_env_state_for_initial_condition
    oracle, texts = tasks()
    make_env = libraries.need("calvin_env.envs.play_table_env", _INSTALL).get_env
    recorder = video.Recorder(VIDEO_FPS, lambda observed: observed["observation/rgb_static"])
    world = CalvinWorld(make_env(str(args.calvin_data_path / "validation"), show_gui=False), on_step=recorder.seen)
    todo = sequences.get_sequences(args.num_sequences)
    world.place(*start_of(todo[0][0]))
    world.prompt = texts[todo[0][1][0]][0]
    world.reset()
    done: List[int] = []
    with program.playing(world, args.host, args.port, args, rows=args.replan_steps) as (robot, loop):
        try:
            for number, (start, subtasks) in enumerate(todo):
                if number < args.num_save_videos:
                    recorder.begin(args.video_out_path / f"sequence_{number:04d}.mp4")
                if number > 0:
                    world.place(*start_of(start))
                    robot.reset()
                done.append(play(loop, world, subtasks, oracle, texts, args.max_subtask_steps))
                recorder.end(f"_{done[-1]}_of_{len(subtasks)}")
                logger.info("sequence %d: %d subtasks; %.3f on average", number, done[-1], np.mean(done))
        finally:  # hours may lie behind a server that goes
            print_table(done)


def play(loop: Any, world: CalvinWorld, subtasks: Sequence[str], oracle: Any, texts: Any, most_steps: int) -> int:
    """How many subtasks are done, until one is not."""
    for count, subtask in enumerate(subtasks):
        world.begin(texts[subtask][0], lambda then, now, name=subtask: is_done(oracle, then, now, name))
        program.played(loop, world, most_steps)
        if not world.is_over:
            return count
    return len(subtasks)


def tasks() -> Any:
    """What decides whether a subtask is done, and the subtasks in words."""
    omegaconf = libraries.need("omegaconf", _INSTALL)
    hydra = libraries.need("hydra.utils", _INSTALL)
    agent = Path(str(libraries.need("calvin_agent", _INSTALL).__file__)).parents[1]
    rules, texts = (omegaconf.OmegaConf.load(agent / "conf" / name) for name in _CONF)
    return hydra.instantiate(rules), texts


def is_done(oracle: Any, then: Any, now: Any, subtask: str) -> bool:
    return len(oracle.get_task_info_for_set(then, now, {subtask})) > 0


def print_table(done: List[int]) -> None:
    """Sequences that got so far, as CALVIN reports them."""
    if not done:
        return
    for count in range(1, 6):
        share = np.mean([number >= count for number in done])
        print(f"{count} in a row: {share:.3f}")
    print(f"average: {np.mean(done):.3f} of 5, in {len(done)} sequences")


if __name__ == "__main__":
    program.main(main, Args, prefix="args.")
