"""Normalisation statistics from columns against the same statistics from fully decoded samples.

    python benchmarks/norm_stats.py --dataset FOLDER [--decoded-frames 400] [--report benchmarks/norm_stats.md]

The slow way is what reading a dataset for training costs: every camera of every sample is decoded, then the recipe's
transforms run on it. It is measured on some frames only. The yardstick is CPU time per frame, see `loader.py`.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import loader_dataset
import numpy as np

from openpi import transforms
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.pi0_config import Pi0Config
from openpi.shared.normalize import RunningStats
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import norm_stats, recipe_data
from openpi.training.data.tabular_frames import TabularFrames, open_frames
from openpi.training.data_config import DataConfig, LeRobotLiberoDataConfig

HORIZON = 10


def recipe(dataset: Path) -> TrainConfig:
    data = LeRobotLiberoDataConfig(
        repo_id=str(dataset), extra_delta_transform=True, base_config=DataConfig(prompt_from_task=True)
    )
    return TrainConfig(name="benchmark", model=Pi0Config(action_horizon=HORIZON), data=data)


def from_columns(config: TrainConfig) -> int:
    """Everything, opening the dataset included; returns the number of frames."""
    frames = open_frames(config.data.create(config.assets_dirs, config.model), config.model)
    assert isinstance(frames, TabularFrames)
    norm_stats.compute_norm_stats(frames)
    return len(frames)


def from_samples(config: TrainConfig, num_frames: int) -> int:
    data_config = config.data.create(config.assets_dirs, config.model)
    dataset = recipe_data.create_dataset(data_config, config.model)
    assert isinstance(dataset, LeRobotDataset)
    chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
    end = [isinstance(transform, transforms.Normalize) for transform in chain].index(True)
    run = transforms.compose(chain[:end])
    running = {key: RunningStats() for key in ("state", "actions")}
    for index in np.random.default_rng(0).permutation(len(dataset))[:num_frames]:
        sample = run(dataset[int(index)])
        for key, stats in running.items():
            stats.update(sample[key])
    for stats in running.values():
        stats.get_statistics()
    return num_frames


def microseconds_per_frame(work: Callable[[], int], repeats: int) -> tuple[float, float]:
    """CPU and wall time; the best of `repeats`, since everything else on the machine only adds."""
    results = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        frames = work()
        results.append(((time.process_time() - cpu) / frames * 1e6, (time.perf_counter() - wall) / frames * 1e6))
    return min(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--decoded-frames", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if not args.dataset.exists():
        loader_dataset.write(args.dataset)
    config = recipe(args.dataset)
    num_frames = from_columns(config)  # also warms the file cache
    columns = microseconds_per_frame(lambda: from_columns(config), args.repeats)
    samples = microseconds_per_frame(lambda: from_samples(config, args.decoded_frames), args.repeats)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report = "\n".join(
        [
            "# Normalisation statistics: columns against decoded samples",
            "",
            f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}; load average while measuring: {load}.",
            f"Command: `python benchmarks/norm_stats.py {' '.join(sys.argv[1:])}`. {num_frames} frames, two 256x256 "
            f"video cameras, action horizon {HORIZON}, LIBERO conventions with relative actions; best of "
            f"{args.repeats}.",
            "",
            "| way | CPU us/frame | frames/s and core | wall us/frame |",
            "|---|---|---|---|",
            f"| columns, all frames | {columns[0]:.1f} | {1e6 / columns[0]:.0f} | {columns[1]:.1f} |",
            f"| samples, {args.decoded_frames} frames | {samples[0]:.1f} | {1e6 / samples[0]:.0f} | {samples[1]:.1f} |",
            "",
            f"Ratio of CPU times: {samples[0] / columns[0]:.0f}; of wall times: {samples[1] / columns[1]:.0f}.",
            "",
        ]
    )
    print(report)
    if args.report:
        args.report.write_text(report)


if __name__ == "__main__":
    main()
