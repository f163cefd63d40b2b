"""A policy on a suite of LIBERO: how many of its tasks succeed.

python examples/libero/main.py --args.task-suite-name libero_object --args.host 192.168.1.20
"""

import collections
import dataclasses
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from typing_extensions import Literal

from openpi_client.robots import libraries, program, video
from openpi_client.robots.libero import MAX_STEPS, LiberoWorld

logger = logging.getLogger("libero")

RENDERED = 256
VIDEO_FPS = 10
_INSTALL = "pip install -r examples/libero/requirements.txt"


@dataclasses.dataclass(frozen=True)
class Args(program.WorldArgs):
    """A policy on a suite of LIBERO: how many of its tasks succeed.

    Attributes:
        host, port: of the server; default port: 8000, or 443 of wss://...
        resize_size: of pictures, before they are sent.
        replan_steps: rows that are played of each chunk.
        task_suite_name: which tasks.
        num_steps_wait: steps until the objects have come to rest.
        num_trials_per_task: each from another of the task's initial states.
        num_tasks: only the first ones; None = all.
        video_out_path: gets a video of each trial.
        seed: of the simulator; it moves objects although the initial states are fixed.
    """

    host: str = "0.0.0.0"
    port: Optional[int] = None
    resize_size: int = 224
    replan_steps: int = 5
    task_suite_name: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = (
        "libero_spatial"
    )
    num_steps_wait: int = 10
    num_trials_per_task: int = 50
    num_tasks: Optional[int] = None
    video_out_path: Path = Path("data/libero/videos")
    seed: int = 7
    log_dir: Optional[Path] = Path("data/libero/logs")


def main(args: Args) -> None:
    np.random.seed(args.seed)
    benchmark = libraries.need("libero.libero.benchmark", _INSTALL)
    suite = benchmark.get_benchmark_dict()[args.task_suite_name]()
    results: Dict[int, List[bool]] = collections.defaultdict(list)
    try:
        for number in range(suite.n_tasks if args.num_tasks is None else min(args.num_tasks, suite.n_tasks)):
            run_task(args, suite, number, results)
            rates = np.mean(results[number]), np.mean(sum(results.values(), []))
            logger.info("success of this task %.3f, of all so far %.3f", *rates)
    finally:  # hours may lie behind a server that goes
        print_table(suite, results)


def print_table(suite: Any, results: Dict[int, List[bool]]) -> None:
    """Of the trials so far."""
    trials = sum(results.values(), [])
    if not trials:
        return
    for number, successes in results.items():
        print(f"{sum(successes):4d} of {len(successes):<4d} {number:2d} {suite.get_task(number).language}")
    print(f"success: {np.mean(trials):.4f} ({sum(trials)} of {len(trials)})")


def run_task(args: Args, suite: Any, number: int, results: Dict[int, List[bool]]) -> None:
    """All trials of one task."""
    task, states = suite.get_task(number), suite.get_task_init_states(number)
    # Two tasks of libero_90 may have the same text.
    stem = f"rollout_{task.language.replace(' ', '_')}_{number:02d}"
    recorder = video.Recorder(VIDEO_FPS, lambda observed: observed["observation/image"])
    world = LiberoWorld(
        make_env(task, args.seed),
        states,
        task.language,
        size=args.resize_size,
        num_steps_wait=args.num_steps_wait,
        on_step=recorder.seen,
    )
    world.reset()
    with program.playing(world, args.host, args.port, args, rows=args.replan_steps) as (robot, loop):
        for trial in range(args.num_trials_per_task):
            recorder.begin(args.video_out_path / f"{stem}_{trial:03d}.mp4")
            try:
                if trial > 0:
                    world.trial = trial
                    robot.reset()
                how = program.played(loop, world, MAX_STEPS[args.task_suite_name])["end"]
            except (ValueError, RuntimeError, ArithmeticError) as error:  # of the simulator
                world.is_over, how = False, f"{type(error).__name__}: {error}"
            finally:
                recorder.end("_success" if world.is_over else "_failure")
            results[number].append(world.is_over)
            logger.info("%s, trial %d: %s (%s)", task.language, trial, world.is_over, how)


def make_env(task: Any, seed: int) -> Any:
    places = libraries.need("libero.libero", _INSTALL)
    envs = libraries.need("libero.libero.envs", _INSTALL)
    bddl = Path(places.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    env = envs.OffScreenRenderEnv(bddl_file_name=str(bddl), camera_heights=RENDERED, camera_widths=RENDERED)
    env.seed(seed)
    return env


if __name__ == "__main__":
    program.main(main, Args, prefix="args.")
