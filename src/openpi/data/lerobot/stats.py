"""Feature statistics as LeRobot stores them with a dataset (not the normalisation statistics of training).

Numbers are taken over all frames of an episode, and those of a matrix or more over all its axes but the last; cameras
over some frames and pixels, per channel, in [0, 1] with shape [3, 1, 1].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.data.lerobot.files import read_json
from openpi.data.lerobot.meta_values import shortened, wrong
from openpi.shared.evenly_spaced import evenly_spaced

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MAX_FRAMES, MAX_SIDE_PX = 100, 150  # of a camera: enough for a colour distribution

FeatureStats = dict[str, np.ndarray]
_FIX = "`openpi dataset split DATASET whole=rest` computes the statistics of a dataset anew"
_NEEDED = frozenset({"min", "max", "mean", "std", "count"})


def vector_stats(values: np.ndarray) -> FeatureStats:
    """Statistics of `[n, *shape]`, [shape[-1]] each ([1] of scalars); `count` is [n]."""
    rows = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    return _stats(rows) | {"count": np.array([len(values)])}


def along_last_axis(stats: FeatureStats, shape: Sequence[int]) -> FeatureStats:
    """Statistics per element of a matrix or more, as this writer stored them once, as LeRobot stores them."""
    if len(shape) < 2 or stats["mean"].shape != tuple(shape):
        return stats
    names = [name for name in stats if name != "count"]
    rows = zip(*(stats[name].reshape(-1, shape[-1]) for name in names), strict=True)
    parts = [dict(zip(names, row, strict=True)) | {"count": stats["count"]} for row in rows]
    return _merge(parts) | {"count": stats["count"]}


def image_stats(frames_hwc: np.ndarray) -> FeatureStats:
    """Statistics per channel of uint8 `[n, h, w, 3]`; `count` is the number of frames looked at."""
    sampler = ImageSampler(len(frames_hwc))
    for _ in sampler.watch(frames_hwc):
        pass
    return sampler.stats()


class ImageSampler:
    """Takes the statistics of a camera from frames that pass by, of which it keeps what it needs.

    Args:
        length: number of frames to come.
    """

    def __init__(self, length: int):
        self._chosen = frozenset(evenly_spaced(range(length), MAX_FRAMES))
        self._pixels: list[np.ndarray] = []

    def watch(self, frames_hwc: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Passes the frames on, uint8 [h, w, 3] each."""
        for i, frame in enumerate(frames_hwc):
            if i in self._chosen:
                step = max(1, -(-max(frame.shape[:2]) // MAX_SIDE_PX))
                self._pixels.append(frame[::step, ::step].reshape(-1, frame.shape[-1]))
            yield frame

    def stats(self) -> FeatureStats:
        stats = {name: (stat / 255).reshape(-1, 1, 1) for name, stat in _stats(np.concatenate(self._pixels)).items()}
        return stats | {"count": np.array([len(self._pixels)])}


def read_stats(path: Path) -> dict[str, FeatureStats]:
    """`meta/stats.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an entry is no array of finite numbers, or a feature lacks one that merging needs.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, which episodes are appended to. {_FIX}")
    stats = {}
    for key, entries in read_json(path).items():
        missing = sorted(_NEEDED - entries.keys()) if isinstance(entries, Mapping) else sorted(_NEEDED)
        if missing:
            raise ValueError(f"{path}, '{key}' lacks {missing}; found {shortened(entries)}. {_FIX}")
        stats[key] = {name: _numbers(value, f"{path}, '{key}', '{name}'") for name, value in entries.items()}
    return stats


def _numbers(value: object, where: str) -> np.ndarray:
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise wrong(where, value, "numbers, in lists of one length", _FIX) from None
    if not np.isfinite(numbers).all():
        raise wrong(where, value, "finite numbers", _FIX)
    return numbers


def merge(episodes: Sequence[Mapping[str, FeatureStats]]) -> dict[str, FeatureStats]:
    """Statistics of a dataset from those of its episodes.

    Mean and standard deviation are exact. Quantiles are the mean over episodes, weighted by their length, as
    the library does: an approximation.
    """
    return {name: _merge([episode[name] for episode in episodes]) for name in episodes[0]}


def _merge(parts: Sequence[FeatureStats]) -> FeatureStats:
    counts = np.array([int(part["count"][0]) for part in parts])
    weights = counts / counts.sum()

    def average(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(values).astype(np.float64), 1)

    mean = average([part["mean"] for part in parts])
    variance = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([counts.sum()]),
        **{name: average([part[name] for part in parts]) for name in QUANTILES if all(name in part for part in parts)},
    }


def _stats(rows: np.ndarray) -> FeatureStats:
    exact = rows if rows.dtype == np.uint8 else rows.astype(np.float64)
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(axis=0),
        "max": rows.max(axis=0),
        "mean": exact.mean(axis=0, dtype=np.float64),
        "std": exact.std(axis=0, dtype=np.float64),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }
