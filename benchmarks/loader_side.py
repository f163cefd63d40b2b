"""One side of the loader benchmark: shuffled batches of 32 from a LeRobot dataset. Prints one JSON line.

    python benchmarks/loader_side.py ours|lerobot FOLDER [--workers 0] [--batches 15] [--backend pyav]

`lerobot` runs in an environment of its own that has the library and PyTorch; it needs nothing of this project.
CPU seconds are those of this process and its workers while batches are taken, without their start.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import psutil

BATCH = 32
WARM_UP_BATCHES = 2
DELTAS = {"actions": [step / 10 for step in range(10)]}


def ours(folder: str, workers: int) -> Iterator[Any]:
    from openpi.data.batch_loader import BatchLoader
    from openpi.data.lerobot.reader import LeRobotDataset

    return iter(BatchLoader(LeRobotDataset(folder, delta_timestamps=DELTAS), batch_size=BATCH, num_workers=workers))


def lerobot(folder: str, workers: int, backend: str) -> Iterator[Any]:
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    torch.set_num_threads(1)  # its small tensor operations are slower on many threads
    dataset = LeRobotDataset("benchmark/set", root=folder, delta_timestamps=DELTAS, video_backend=backend)
    context = "spawn" if workers else None
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, multiprocessing_context=context
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def cpu_s() -> float:
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["ours", "lerobot"])
    parser.add_argument("folder")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--backend", default="pyav")
    args = parser.parse_args()
    is_ours = args.side == "ours"
    batches = ours(args.folder, args.workers) if is_ours else lerobot(args.folder, args.workers, args.backend)
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    begin, begin_cpu = time.perf_counter(), cpu_s()
    for _ in range(args.batches):
        next(batches)
    seconds, cpu = time.perf_counter() - begin, cpu_s() - begin_cpu
    print(json.dumps({"samples": args.batches * BATCH, "wall_s": seconds, "cpu_s": cpu}), flush=True)


if __name__ == "__main__":
    main()
