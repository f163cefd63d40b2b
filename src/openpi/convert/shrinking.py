"""What a dataset loses and wins by being shrunk: likeness of pictures, bytes, samples a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared.evenly_spaced import evenly_spaced
from openpi_client.image_tools import resize_with_pad

_PICTURES = 40  # of each camera
_SPEED_S = 2.0  # of reading each
_MAX_DB = 100.0  # of equal pictures, whose PSNR is infinite


@dataclass(frozen=True)
class Shrunk:
    """A dataset beside the one that it was made of.

    Attributes:
        psnr_db: by camera, mean and least over some pictures, against the resized original; 100 = equal.
        num_bytes: of all files, before and after.
        samples_per_s: random samples with all cameras at the model's size, on one thread, before and after.
    """

    psnr_db: Mapping[str, tuple[float, float]]
    num_bytes: tuple[int, int]
    samples_per_s: tuple[float, float]

    def lines(self) -> list[str]:
        before, after = self.num_bytes
        slow, fast = self.samples_per_s
        lost = [
            f"{key}: {'no pixel differs' if least >= _MAX_DB else f'PSNR {mean:.1f} dB, at least {least:.1f}'}"
            for key, (mean, least) in self.psnr_db.items()
        ]
        return [
            *lost,
            f"bytes: {before:,} -> {after:,} ({after / before:.2f} of them)",
            f"samples/s of one thread: {slow:.0f} -> {fast:.0f} ({fast / slow:.1f} times)",
        ]


def compare(root: Path, episodes: list[int] | None, shrunk: Path, size_hw: tuple[int, int], stride: int = 1) -> Shrunk:
    """Reads some of both.

    Args:
        episodes: numbers in the original that were taken, in order; None = all.
        stride: of each episode, which frames were taken.
    """
    small = LeRobotDataset(shrunk)
    cameras = small.metadata.camera_keys
    before = LeRobotDataset(root, episodes=episodes, columns=cameras)
    found: dict[str, list[float]] = {key: [] for key in cameras}
    taken = np.concatenate([np.arange(begin, end, stride) for begin, end in before.episode_bounds])
    for row in evenly_spaced(range(len(taken)), _PICTURES):
        original, stored = before[int(taken[row])], small[row]
        for key in cameras:
            found[key].append(_psnr_db(resize_with_pad(original[key], *size_hw), stored[key]))
    return Shrunk(
        {key: (float(np.mean(values)), float(np.min(values))) for key, values in found.items()},
        (_num_bytes(root), _num_bytes(shrunk)),
        (_speed(before, size_hw), _speed(LeRobotDataset(shrunk, columns=cameras), size_hw)),
    )


def _psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    error = float(np.mean(np.square(expected.astype(np.float64) - found)))
    return _MAX_DB if error == 0 else min(_MAX_DB, 10 * float(np.log10(255**2 / error)))


def _num_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def _speed(dataset: LeRobotDataset, size_hw: tuple[int, int]) -> float:
    """Of random samples, each camera resized as the loader does, where it has another size."""
    rng, done, begin = np.random.default_rng(0), 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < _SPEED_S or not done:
        sample = dataset[int(rng.integers(len(dataset)))]
        for key in dataset.metadata.camera_keys:
            resize_with_pad(sample[key], *size_hw)
        done += 1
    return done / took
