"""Success on the table-top while the policy's answers come late: naive switching, guided and trained chunking.

Usage: python benchmarks/delays_tabletop.py --work FOLDER [--episodes 100] [--delays 0 1 2 3 4 5 6] [--jobs 2]
           [--plain CHECKPOINT --trained CHECKPOINT] [--report FILE] [--smoke]

Without checkpoints it makes them first, by public commands: `openpi demo record`, then `openpi train tabletop_place`
twice, from the same base, on the same data, for the same number of steps: as it is, and with `--model.rtc-max-delay=6`.

The loop is the product's own, `openpi_client.realtime.ControlLoop`, under a virtual clock; the world moves when the
clock does. A delay of d ticks (of 0.1 s) means that the answer to the observation of tick k is there at tick k + d. Chunks
have 12 rows, and every 6 rows there is a new one. Delay 0: the world waits for the answer, for which there is only
`Synchronous(6)`. Scenes and noise are the same for all. Episodes are kept in FOLDER/episodes.jsonl, and not played again.
"""

import argparse
import datetime
import functools
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Before JAX: one core per process, as many processes as jobs.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np

from openpi.envs.tabletop import PROMPTS, TabletopEnv, tabletop_observation, tasks
from openpi.envs.tabletop.env import MAX_STEPS
from openpi.envs.tabletop.render import make_renderer
from openpi.envs.tabletop.world import CAMERAS, CONTROL_HZ
from openpi.evaluation.stats import wilson_interval
from openpi_client import realtime
from openpi_client.base_policy import BasePolicy

RECIPE = "tabletop_place"
MAX_DELAY = 6
EXECUTION_HORIZON = 6  # the only one that lets a delay of 6 be played from a chunk of 12
FIRST_SEED = 1_000_000  # scenes that no demonstration has shown
STABLE_TICKS = 2


class Method(NamedTuple):
    """How answers become commands: which checkpoint, which strategy, and what guides."""

    label: str
    checkpoint: str
    strategy: type[realtime.Receding]
    jacobian: str = "vjp"


METHODS = {
    "naive": Method("naive: plain checkpoint, `Receding`", "plain", realtime.Receding),
    "guided": Method("plain checkpoint, `GuidedRTC`, vjp", "plain", realtime.GuidedRTC),
    "identity": Method("plain checkpoint, `GuidedRTC`, identity", "plain", realtime.GuidedRTC, "identity"),
    "trained": Method("trained with delays, `TrainedRTC`", "trained", realtime.TrainedRTC),
}


class Cell(NamedTuple):
    """One entry of the table."""

    method: str
    delay: int


class Table(realtime.Robot):
    """The table-top; what is commanded is done while the clock moves."""

    def __init__(self, seed: int) -> None:
        prompts = PROMPTS[tasks.PLACE]
        env = TabletopEnv(tasks.PLACE, num_blocks=3)
        env.reset(seed=seed, options={"prompt": prompts[seed % len(prompts)]})
        self._world, self._goal = env.world, env.goal
        self._renderer = make_renderer("rays", 64)
        self._command = self._world.state
        self._num_stable = 0

    def observe(self) -> dict:
        images = {camera: self._renderer.render(self._world, camera) for camera in CAMERAS}
        return tabletop_observation({"images": images, "state": self._world.state, "prompt": self._goal.prompt})

    def apply(self, action: np.ndarray) -> None:
        self._command = action

    def move(self, seconds: float) -> None:
        for _ in range(round(seconds * CONTROL_HZ)):
            self._world.step(self._command)
            self._num_stable = self._num_stable + 1 if tasks.is_success(self._world, self._goal) else 0

    def is_done(self) -> bool:
        return self._num_stable >= STABLE_TICKS


class SeededPolicy(BasePolicy):
    """Tells the policy which noise to start from, so that episodes can be repeated, and compared."""

    def __init__(self, policy: BasePolicy, seed: int) -> None:
        self._policy, self._seed, self._count = policy, seed, 0

    def infer(self, obs: dict) -> dict:
        self._count += 1
        return self._policy.infer({**obs, "seed": zlib.crc32(f"{self._seed} {self._count}".encode())})


@functools.cache
def load_policy(checkpoint: Path, jacobian: str) -> BasePolicy:
    from openpi.models.rtc_config import RtcConfig
    from openpi.policies.policy_config import create_trained_policy
    from openpi.training.config import get_config

    return create_trained_policy(get_config(RECIPE), checkpoint, rtc=RtcConfig(jacobian=jacobian))


def play(cell: Cell, seed: int, checkpoint: Path) -> dict:
    """One episode, as plain values."""
    method = METHODS[cell.method]
    policy = load_policy(checkpoint, method.jacobian)
    metadata = {"contract": policy.contract.as_metadata(), "rtc": policy.rtc_metadata}
    table = Table(seed)
    clock = realtime.VirtualClock(on_advance=table.move)
    requester = realtime.SimulatedLatency(SeededPolicy(policy, seed), clock, [cell.delay / CONTROL_HZ], metadata)
    strategy = method.strategy(EXECUTION_HORIZON) if cell.delay else realtime.Synchronous(EXECUTION_HORIZON)
    # The robot starts where the policy was trained to start, and is not dangerous.
    safety = realtime.Safety(blend_s=0, accept_warnings=True)
    loop = realtime.ControlLoop(table, requester, strategy=strategy, safety=safety, clock=clock)
    # As long as others have, from the first answer on.
    summary = loop.run(max_s=(MAX_STEPS + cell.delay) / CONTROL_HZ, until=table.is_done)
    assert summary["strategy"] == strategy.name
    return {
        **cell._asdict(),
        "seed": seed,
        "success": table.is_done(),
        "end": summary["end"],
        "ticks": summary["ticks"],
        "held": summary["ticks_without_row_after_start"],
        "discarded": summary["discarded"] + summary["too_late"] + summary["stale"],
        "delays": summary["delay_ticks"],
        "jump_over_step": summary["seams"]["jump_over_step"],
    }


def begin_worker() -> None:
    logging.getLogger("openpi_client").setLevel(logging.ERROR)


# Making checkpoints


def make_checkpoint(work: Path, name: str, args: argparse.Namespace) -> Path:
    """Trains it, unless it is there; the run's latest checkpoint."""
    run = work / "checkpoints" / RECIPE / name
    if not (dataset := work / "dataset").exists():
        openpi("demo", "record", f"--output={dataset}", f"--episodes={args.demonstrations}")
    if not latest(run):
        flags = [f"--model.rtc-max-delay={MAX_DELAY}"] if name == "trained" else []
        flags += [] if args.steps is None else [f"--num-train-steps={args.steps}", "--batch-size=4"]
        folders = [f"--checkpoint-base-dir={work / 'checkpoints'}", f"--assets-base-dir={work / 'assets'}"]
        openpi("train", RECIPE, f"--exp-name={name}", f"--data.repo-id={dataset}", *folders, "--overwrite", *flags)
    return latest(run)[-1]


def latest(run: Path) -> list[Path]:
    return sorted(run.glob("[0-9]*"), key=lambda path: int(path.name))


def openpi(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "openpi.cli.main", *words], check=True)


# The table


def compared(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two success rates of the same episodes, with its 95 % interval.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", 1998, method 10: Wilson's intervals of both, and their correlation.
    """
    n = len(before)
    p1, p2 = sum(before) / n, sum(after) / n
    (l1, u1), (l2, u2) = wilson_interval(sum(before), n), wilson_interval(sum(after), n)
    both = sum(map(bool.__and__, before, after)) / n
    spread = math.sqrt(p1 * (1 - p1) * p2 * (1 - p2))
    phi = (both - p1 * p2) / spread if spread else 0.0
    down = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    up = math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2)
    return p2 - p1, p2 - p1 - down, p2 - p1 + up


def table_of(episodes: Iterable[dict], methods: Sequence[str], delays: Sequence[int]) -> str:
    """Markdown: success, and the difference to delay 0."""
    cells: dict[Cell, dict[int, dict]] = {}
    for episode in episodes:
        cells.setdefault(Cell(episode["method"], episode["delay"]), {})[episode["seed"]] = episode
    lines = [
        "| strategy | delay, ticks | success | 95 % | points to delay 0 (paired 95 %) | jump / step | ticks held | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, delay in itertools.product(methods, delays):
        if (cell := cells.get(Cell(method, delay))) is not None:
            lines.append(_line(METHODS[method].label, delay, cell, cells.get(Cell(method, 0), {})))
    return "\n".join(lines)


def _line(label: str, delay: int, cell: dict[int, dict], at_zero: dict[int, dict]) -> str:
    successes = [episode["success"] for episode in cell.values()]
    low, high = wilson_interval(sum(successes), len(successes))
    seeds = sorted(set(cell) & set(at_zero))
    difference = ""
    if delay and seeds:
        numbers = compared([at_zero[s]["success"] for s in seeds], [cell[s]["success"] for s in seeds])
        difference = "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * number for number in numbers))
    jumps = [e["jump_over_step"] for e in cell.values() if e["jump_over_step"] is not None]
    seconds = [e["ticks"] / CONTROL_HZ for e in cell.values() if e["success"]]
    return " | ".join(
        [
            f"| {label}",
            str(delay),
            f"{sum(successes)}/{len(successes)} = {sum(successes) / len(successes):.0%}",
            f"{100 * low:.0f} to {100 * high:.0f}",
            difference,
            f"{np.mean(jumps):.2f}" if jumps else "",
            f"{np.mean([e['held'] for e in cell.values()]):.1f}",
            f"{np.mean(seconds):.1f} |" if seconds else " |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for the dataset, the checkpoints and the episodes")
    parser.add_argument("--plain", type=Path, help="checkpoint of the recipe as it is; default: trained in --work")
    parser.add_argument("--trained", type=Path, help="checkpoint with delays; default: trained in --work")
    parser.add_argument("--episodes", type=int, default=100, help="of each cell")
    parser.add_argument("--delays", type=int, nargs="+", default=list(range(MAX_DELAY + 1)), help="in ticks")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--demonstrations", type=int, default=400)
    parser.add_argument("--steps", type=int, help="of training, in small batches; default: the recipe's")
    parser.add_argument("--report", type=Path, help="Markdown")
    parser.add_argument("--smoke", action="store_true", help="the whole path with tiny numbers; learns nothing")
    args = parser.parse_args()
    if args.smoke:
        args.episodes, args.demonstrations, args.steps, args.delays, args.jobs = 1, 9, 2, [0, 2], 1
    checkpoints = {
        "plain": args.plain or make_checkpoint(args.work, "plain", args),
        "trained": args.trained or make_checkpoint(args.work, "trained", args),
    }
    table = table_of(run(args, checkpoints), args.methods, args.delays)
    print(table)
    if args.report is not None:
        where = f"{datetime.date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        args.report.write_text(f"# Late answers on the table-top\n\n{where}\n\n{table}\n")


def run(args: argparse.Namespace, checkpoints: dict[str, Path]) -> list[dict]:
    """All episodes; those that `episodes.jsonl` has are not played again."""
    path = args.work / "episodes.jsonl"
    episodes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(e["method"], e["delay"], e["seed"]) for e in episodes}
    seeds = range(FIRST_SEED, FIRST_SEED + args.episodes)
    cells = [Cell(method, delay) for method in args.methods for delay in args.delays]
    # Scene by scene, so that an interrupted run has something of all.
    todo = [(cell, seed) for seed in seeds for cell in cells if (*cell, seed) not in known]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=begin_worker) as pool, path.open("a") as file:
        played = [pool.submit(play, cell, seed, checkpoints[METHODS[cell.method].checkpoint]) for cell, seed in todo]
        for count, future in enumerate(played, start=1):
            episodes.append(future.result())
            file.write(json.dumps(episodes[-1]) + "\n")
            file.flush()
            if count % 20 == 0 or count == len(played):
                print(f"{count} of {len(played)} episodes", file=sys.stderr)
    return episodes


if __name__ == "__main__":
    main()
