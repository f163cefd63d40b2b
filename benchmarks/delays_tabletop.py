"""Success on the table-top while the policy's answers come late: naive switching, guided and trained chunking.

Usage: python benchmarks/delays_tabletop.py --work FOLDER [--episodes 100] [--delays 0 1 2 3 4 5 6] [--jobs 2]
           [--demonstrations 400] [--steps 900] [--plain CHECKPOINT --trained CHECKPOINT] [--report FILE] [--smoke]

Without checkpoints it makes them first, by public commands: `openpi demo record`, then `openpi train tabletop_place`
twice, from the same base, on the same data, for the same number of steps: as it is, and with `--model.rtc-max-delay=6`.

The loop is the product's own, `openpi_client.realtime.ControlLoop`, under a virtual clock; the world moves when the
clock does. A delay of d ticks (of 0.1 s) means that the answer to the observation of tick k is there at tick k + d.
Chunks have 12 rows, and every 6 rows there is a new one. Delay 0: the world waits for the answer, and the strategy is
`Synchronous(6)`. Scenes and noise are the same for all. Episodes are kept in FOLDER/episodes.jsonl, and not played
again.
"""

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Before JAX: one core per process, as many processes as jobs.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np

from openpi.data.lerobot.writer import LeRobotWriter
from openpi.evaluation.stats import Paired, Tally
from openpi_client import realtime
from openpi_client.base_policy import BasePolicy
from openpi_client.realtime.log import KINDS
from openpi_demo.tabletop import TabletopEnv, arm, record, tabletop_observation, tasks
from openpi_demo.tabletop.env import MAX_STEPS
from openpi_demo.tabletop.render import make_renderer
from openpi_demo.tabletop.world import CAMERAS, CONTROL_HZ, PLATE_COLOURS

if TYPE_CHECKING:
    from openpi.models.rtc_config import Jacobian
    from openpi.policies.policy import Policy

RECIPE = "tabletop_place"
MAX_DELAY = 6
EXECUTION_HORIZON = 6  # the only one that lets a delay of 6 be played from a chunk of 12
FIRST_SEED = 1_000_000  # scenes that no demonstration has shown
STABLE_TICKS = 2
# Of a joint from one tick to the next, rad: demonstrations have 0.222 at most. Controllers of real arms stop at a
# command that is far from the one before.
STOP_RAD = 0.28
WARM_UP_S = 6.0  # of playing: more answers than a forecast of delays asks for


def named(goal: tasks.Goal) -> tuple[str, list[tasks.Goal]]:
    """The prompt, and what is asked for: this plate."""
    return goal.prompt, [goal]


def either(goal: tasks.Goal) -> tuple[str, list[tasks.Goal]]:
    """Any plate, for which demonstrators took one or the other: the policy has two intentions."""
    return f"put the {goal.block} block on a plate", [tasks.Goal(goal.block, plate) for plate in PLATE_COLOURS]


TASKS = {"named": named, "either": either}
HEADINGS = {"named": "The plate is named", "either": "Either plate will do"}


class Method(NamedTuple):
    """How answers become commands: which checkpoint, which strategy, and what guides."""

    label: str
    checkpoint: str
    strategy: type[realtime.Receding] | type[realtime.GuidedRTC]
    jacobian: "Jacobian" = "vjp"


METHODS = {
    "naive": Method("naive: plain checkpoint, `Receding`", "plain", realtime.Receding),
    "guided": Method("plain checkpoint, `GuidedRTC`, vjp", "plain", realtime.GuidedRTC),
    "identity": Method("plain checkpoint, `GuidedRTC`, identity", "plain", realtime.GuidedRTC, "identity"),
    "trained": Method("trained with delays, `TrainedRTC`", "trained", realtime.TrainedRTC),
    "trained naive": Method("trained with delays, naive", "trained", realtime.Receding),
}


class Cell(NamedTuple):
    """One entry of the table."""

    task: str
    method: str
    delay: int

    @property
    def played(self) -> "Cell":
        """Where its episodes are: without delay all methods with the same checkpoint do the same."""
        if self.delay:
            return self
        checkpoint = METHODS[self.method].checkpoint
        return self._replace(method=next(name for name, method in METHODS.items() if method.checkpoint == checkpoint))


class Table(realtime.Robot):
    """The table-top; what is commanded is done while the clock moves."""

    def __init__(self) -> None:
        self._renderer = make_renderer("rays", 64)
        self.place("named", FIRST_SEED)

    def place(self, task: str, seed: int) -> None:
        """Another scene."""
        goals = tasks.GOALS[tasks.PLACE]
        env = TabletopEnv(tasks.PLACE, num_blocks=3)
        env.reset(seed=seed, options={"prompt": goals[seed % len(goals)].prompt})
        self._world = env.world
        self._prompt, self._goals = TASKS[task](env.goal)
        self._command = self._world.state
        self._num_stable = 0

    def observe(self) -> dict:
        images = {camera: self._renderer.render(self._world, camera) for camera in CAMERAS}
        return tabletop_observation({"images": images, "state": self._world.state, "prompt": self._prompt})

    def apply(self, action: np.ndarray) -> None:
        self._command = action

    def move(self, seconds: float) -> None:
        for _ in range(round(seconds * CONTROL_HZ)):
            self._world.step(self._command)
            is_success = any(tasks.is_success(self._world, goal) for goal in self._goals)
            self._num_stable = self._num_stable + 1 if is_success else 0

    def is_done(self) -> bool:
        return self._num_stable >= STABLE_TICKS


class SeededPolicy(BasePolicy):
    """Tells the policy which noise to start from, so that episodes can be repeated, and compared."""

    def __init__(self, policy: BasePolicy) -> None:
        self._policy = policy
        self.begin(0)

    def begin(self, seed: int) -> None:
        """An episode."""
        self._seed, self._count = seed, 0

    def infer(self, obs: dict) -> dict:
        self._count += 1
        return self._policy.infer({**obs, "seed": zlib.crc32(f"{self._seed} {self._count}".encode())})


@cache
def load_policy(checkpoint: Path, jacobian: "Jacobian") -> "Policy":
    from openpi.models.rtc_config import RtcConfig
    from openpi.policies.policy_config import create_trained_policy
    from openpi.training.config import get_config

    return create_trained_policy(get_config(RECIPE), checkpoint, rtc=RtcConfig(jacobian=jacobian))


class Loop(NamedTuple):
    """A robot that stays switched on, episode after episode."""

    table: Table
    policy: SeededPolicy
    clock: realtime.VirtualClock
    control: realtime.ControlLoop


@cache
def loop_of(cell: Cell, checkpoint: Path) -> Loop:
    method = METHODS[cell.method]
    policy = load_policy(checkpoint, method.jacobian)
    assert policy.contract is not None  # of a checkpoint of ours
    metadata = {"contract": policy.contract.as_metadata(), "rtc": policy.rtc_metadata}
    table, seeded = Table(), SeededPolicy(policy)
    clock = realtime.VirtualClock(on_advance=table.move)
    requester = realtime.SimulatedLatency(seeded, clock, [cell.delay / CONTROL_HZ], metadata)
    strategy = method.strategy(EXECUTION_HORIZON) if cell.delay else realtime.Synchronous(EXECUTION_HORIZON)
    # The robot starts where the policy was trained to start, and is not dangerous.
    safety = realtime.Safety(blend_s=0, accept_warnings=True)
    loop = Loop(
        table, seeded, clock, realtime.ControlLoop(table, requester, strategy=strategy, safety=safety, clock=clock)
    )
    loop.control.run(max_s=WARM_UP_S)  # A robot that runs knows how late its answers are.
    return loop


def play(cell: Cell, seed: int, checkpoint: Path) -> dict:
    """One episode, as plain values."""
    table, policy, clock, control = loop_of(cell, checkpoint)
    clock.advance(1.0)  # Answers to the episode before are there.
    table.place(cell.task, seed)
    policy.begin(seed)
    # As long as others have, from the first answer on.
    summary = control.run(max_s=(MAX_STEPS + cell.delay) / CONTROL_HZ, until=table.is_done)
    strategy = METHODS[cell.method].strategy if cell.delay else realtime.Synchronous
    assert summary["strategy"] == strategy.__name__  # no fallback
    assert control.last_log is not None
    return {
        **cell._asdict(),
        "seed": seed,
        "success": table.is_done(),
        "end": summary["end"],
        "ticks": summary["ticks"],
        "held": summary["ticks_without_row_after_start"],
        "discarded": summary["discarded"] + summary["too_late"] + summary["stale"],
        "delays": summary["delay_ticks"],
        **seams(control.last_log.ticks, control.last_log.commands),
    }


def seams(ticks: np.ndarray, commands: np.ndarray) -> dict:
    """Largest change of a joint, rad, from chunk to chunk and within one, mean of an episode; fingers jump anyway."""
    is_row = ticks["kind"] == KINDS.index("row")
    goes_on = is_row[1:] & is_row[:-1]
    changes = np.abs(np.diff(commands[:, : arm.NUM_JOINTS], axis=0)).max(axis=1)
    jumps, steps = changes[goes_on & ticks["is_seam"][1:]], changes[goes_on & ~ticks["is_seam"][1:]]
    return {
        "jump_rad": float(jumps.mean()) if len(jumps) else None,
        "step_rad": float(steps.mean()),
        "largest_rad": float(changes[goes_on].max()),
    }


def begin_worker() -> None:
    logging.getLogger("openpi_client").setLevel(logging.ERROR)


# Making checkpoints


def make_checkpoint(work: Path, name: str, args: argparse.Namespace) -> Path:
    """Trains it, unless that is done; the run's last checkpoint."""
    finished = work / f"{name}.txt"  # holds its path
    if not (dataset := work / "dataset").exists():
        record_both(dataset, args.demonstrations, args.jobs)
    if not finished.exists():
        flags = [f"--model.rtc-max-delay={MAX_DELAY}"] if name == "trained" else []
        if args.steps is not None:
            schedule = "--batch-size=4" if args.smoke else f"--lr-schedule.decay-steps={args.steps}"
            flags += [f"--num-train-steps={args.steps}", schedule]
        folders = [f"--checkpoint-base-dir={work / 'checkpoints'}", f"--assets-base-dir={work / 'assets'}"]
        words = ["train", RECIPE, f"--exp-name={name}", f"--data.repo-id={dataset}", *folders, "--overwrite", *flags]
        subprocess.run([sys.executable, "-m", "openpi.cli.main", *words], check=True)
        steps = (work / "checkpoints" / RECIPE / name).glob("[0-9]*")
        finished.write_text(str(max(steps, key=lambda path: int(path.name))))
    return Path(finished.read_text())


def record_both(root: Path, demonstrations: int, jobs: int) -> None:
    """Each demonstration under two prompts: the plate that was taken, and any plate."""
    features = record.lerobot_features()
    with LeRobotWriter(root, fps=CONTROL_HZ, features=features, robot_type="tabletop") as writer:
        for demonstration in record.demonstrations(
            tasks.PLACE, range(demonstrations), num_blocks=3, prompts_per_scene=1, num_workers=jobs
        ):
            for task in TASKS.values():
                prompt, _ = task(tasks.parse_prompt(demonstration.prompt))
                writer.add_episode(record.lerobot_frames(demonstration), prompt)


# The table


Episodes = dict[Cell, dict[int, dict]]  # by seed


def tables_of(episodes: Episodes, task: str, methods: Sequence[str], delays: Sequence[int]) -> str:
    """Markdown: a row per method, a column per delay."""
    later = [delay for delay in delays if delay]
    parts = [
        ("Success, % (95 %, Wilson)", delays, _success),
        (
            f"Success of an arm that stops at a step of more than {STOP_RAD} rad",
            delays,
            partial(_success, won=smoothly),
        ),
        ("Points to delay 0 (95 %, paired)", later, _difference),
        ("Points to delay 0, of an arm that stops", later, partial(_difference, won=smoothly)),
        ("Jump of the joints at a seam / step within a chunk", later, _jump),
        ("Ticks held after the first row, per episode", later, _held),
        ("Seconds of an episode that succeeds", delays, _seconds),
    ]
    lines: list[str] = []
    for title, columns, show in parts:
        lines += [
            f"{title}:",
            "",
            f"| delay, ticks | {' | '.join(map(str, columns))} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for method in methods:
            shown = [show(episodes, Cell(task, method, delay)) for delay in columns]
            lines.append(f"| {METHODS[method].label} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def anyhow(episode: dict) -> bool:
    return episode["success"]


def smoothly(episode: dict) -> bool:
    return episode["success"] and episode["largest_rad"] <= STOP_RAD


def _success(episodes: Episodes, cell: Cell, won: Callable[[dict], bool] = anyhow) -> str:
    successes = [won(episode) for episode in episodes[cell.played].values()]
    tally = Tally.of(successes)
    low, high = tally.interval
    return f"{100 * tally.rate:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _difference(episodes: Episodes, cell: Cell, won: Callable[[dict], bool] = anyhow) -> str:
    late, at_zero = episodes[cell.played], episodes.get(cell._replace(delay=0).played, {})
    seeds = sorted(set(late) & set(at_zero))
    if not seeds:
        return ""
    numbers = Paired.of([won(at_zero[seed]) for seed in seeds], [won(late[seed]) for seed in seeds]).difference
    return "{:+.1f} ({:+.0f} to {:+.0f})".format(*(100 * number for number in numbers))


def _jump(episodes: Episodes, cell: Cell) -> str:
    known = [episode for episode in episodes[cell.played].values() if episode["jump_rad"] is not None]
    if not known:
        return ""
    return f"{sum(e['jump_rad'] for e in known) / sum(e['step_rad'] for e in known):.2f}"


def _held(episodes: Episodes, cell: Cell) -> str:
    return _mean(episode["held"] for episode in episodes[cell.played].values())


def _seconds(episodes: Episodes, cell: Cell) -> str:
    return _mean(episode["ticks"] / CONTROL_HZ for episode in episodes[cell.played].values() if episode["success"])


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{np.mean(known):.2f}" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the dataset, the checkpoints and the episodes")
    parser.add_argument("--plain", type=Path, help="checkpoint of the recipe as it is; default: trained in --work")
    parser.add_argument("--trained", type=Path, help="checkpoint with delays; default: trained in --work")
    parser.add_argument("--episodes", type=int, default=100, help="of each cell")
    parser.add_argument("--delays", type=int, nargs="+", default=list(range(MAX_DELAY + 1)), help="in ticks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--demonstrations", type=int, default=400)
    parser.add_argument("--steps", type=int, help="of training; default: the recipe's")
    parser.add_argument("--report", type=Path, help="Markdown")
    parser.add_argument("--smoke", action="store_true", help="the whole path with tiny numbers; learns nothing")
    args = parser.parse_args()
    if args.smoke:
        args.episodes, args.demonstrations, args.steps, args.delays, args.jobs = 1, 9, 2, [0, 2], 1
    checkpoints = {
        "plain": args.plain or make_checkpoint(args.work, "plain", args),
        "trained": args.trained or make_checkpoint(args.work, "trained", args),
    }
    episodes = run(args, checkpoints)
    tables = "\n".join(
        f"## {HEADINGS[task]}\n\n{tables_of(episodes, task, args.methods, args.delays)}" for task in args.tasks
    )
    print(tables)
    if args.report is not None:
        where = f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        args.report.write_text(f"# Late answers on the table-top\n\n{where}\n\n{tables}")


def run(args: argparse.Namespace, checkpoints: dict[str, Path]) -> Episodes:
    """All episodes; those that `episodes.jsonl` has are not played again."""
    path = args.work / "episodes.jsonl"
    episodes: Episodes = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        keep(json.loads(line), episodes)
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    cells = dict.fromkeys(
        Cell(task, method, delay).played for task in args.tasks for method in args.methods for delay in args.delays
    )
    # Scene by scene, so that an interrupted run has something of all.
    todo = [(cell, seed) for seed in seeds for cell in cells if seed not in episodes.get(cell, {})]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=begin_worker) as pool, path.open("a") as file:
        played = [pool.submit(play, cell, seed, checkpoints[METHODS[cell.method].checkpoint]) for cell, seed in todo]
        for count, future in enumerate(played, start=1):
            keep(future.result(), episodes)
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            if count % 20 == 0 or count == len(played):
                print(f"{count} of {len(played)} episodes", file=sys.stderr)
    return episodes


def keep(episode: dict, episodes: Episodes) -> None:
    episodes.setdefault(Cell(*(episode[field] for field in Cell._fields)), {})[episode["seed"]] = episode


if __name__ == "__main__":
    main()
