"""Samples per second of our loader against the LeRobot library, from two 256x256 cameras.

    python benchmarks/loader.py --dataset FOLDER [--lerobot-python PATH] [--report benchmarks/loader.md]

Each measurement is a process of its own (`loader_side.py`); sides alternate in rounds, so that a change of the
machine's load meets all. The dataset is written if it is not there. The yardstick is CPU time per sample, of the
process and its workers: it is what limits a machine that trains, and other programs disturb it little.
`--lerobot-python` is the interpreter of an environment with `lerobot` and PyTorch; without it only ours runs.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import loader_dataset

SIDE = Path(__file__).with_name("loader_side.py")
OURS, BACKENDS = "ours", ("pyav", "torchcodec")
BATCHES = {OURS: 20, "pyav": 5, "torchcodec": 7}


def measure(side: str, dataset: Path, workers: int, lerobot_python: str) -> dict[str, float] | None:
    """CPU and wall milliseconds per sample; None if the side does not run here."""
    batches = ["--workers", str(workers), "--batches", str(BATCHES[side])]
    if side == OURS:
        command = [sys.executable, str(SIDE), OURS, str(dataset), *batches]
    else:
        command = [lerobot_python, str(SIDE), "lerobot", str(dataset), *batches, "--backend", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{side}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    result = json.loads(lines[-1])
    return {name: 1000 * result[f"{name}_s"] / result["samples"] for name in ("cpu", "wall")}


def compare(dataset: Path, lerobot_python: str | None, rounds: int, workers: list[int]) -> list[str]:
    """Rows of the report."""
    sides = [OURS, *(BACKENDS if lerobot_python else ())]
    found: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(rounds):
        for count in workers:
            for side in sides:
                result = measure(side, dataset, count, lerobot_python or "")
                if result:
                    found[count, side].append(result)
                    print(count, side, result, flush=True)
    rows = []
    for (count, side), results in sorted(found.items()):
        cpu, wall = (statistics.median(result[name] for result in results) for name in ("cpu", "wall"))
        base = statistics.median(result["cpu"] for result in found[count, OURS])
        name = OURS if side == OURS else f"LeRobot, {side}"
        rows.append(f"| {name} | {count} | {cpu:.2f} | {1000 / cpu:.0f} | {wall:.1f} | {cpu / base:.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--lerobot-python")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if not args.dataset.exists():
        loader_dataset.write(args.dataset)
    rows = compare(args.dataset, args.lerobot_python, args.rounds, args.workers)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report = "\n".join(
        [
            "# Loader: samples from two 256x256 video cameras",
            "",
            f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}; load average while measuring: {load}.",
            f"Command: `python benchmarks/loader.py {' '.join(sys.argv[1:])}`; median of {args.rounds} rounds.",
            "Compare CPU times: wall times are those of cores shared with whatever else the machine was doing.",
            "",
            "| side | workers | CPU ms/sample | samples/s and core | wall ms/sample | CPU time, ours = 1 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(report)
    if args.report:
        args.report.write_text(report)


if __name__ == "__main__":
    main()
