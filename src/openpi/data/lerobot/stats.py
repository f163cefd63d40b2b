"""Feature statistics as LeRobot stores them with a dataset (not the normalisation statistics of training).

Numbers are taken over all frames of an episode; cameras over some frames and pixels, per channel, in [0, 1]
with shape [3, 1, 1].
"""

from collections.abc import Mapping, Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MAX_FRAMES, MAX_SIDE_PX = 100, 150  # of a camera: enough for a colour distribution

FeatureStats = dict[str, np.ndarray]


def vector_stats(values: np.ndarray) -> FeatureStats:
    """Statistics of `[n, *shape]` over n; `count` is [n]."""
    rows = values.reshape(len(values), -1)
    stats = _stats(rows)
    stats = {name: stat.reshape(values.shape[1:] or (1,)) for name, stat in stats.items()}
    return stats | {"count": np.array([len(rows)])}


def image_stats(frames_hwc: np.ndarray) -> FeatureStats:
    """Statistics per channel of uint8 `[n, h, w, 3]`; `count` is the number of frames looked at."""
    step = max(1, -(-max(frames_hwc.shape[1:3]) // MAX_SIDE_PX))
    chosen = np.unique(np.linspace(0, len(frames_hwc) - 1, MAX_FRAMES).round().astype(int))
    pixels = frames_hwc[chosen, ::step, ::step].reshape(-1, frames_hwc.shape[-1])
    stats = {name: (stat / 255).reshape(-1, 1, 1) for name, stat in _stats(pixels).items()}
    return stats | {"count": np.array([len(chosen)])}


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
        **{name: average([part[name] for part in parts]) for name in QUANTILES},
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
