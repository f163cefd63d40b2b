"""Whether two models answer the same: from the same noise, or, where a server takes none, by their samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from openpi.evaluation.difference import CHUNK, Difference

_PRECISION = 0.05  # of the size of the values: bfloat16 through a few denoising steps
_FAR = 4.0  # standard errors of the mean, in the median

_CAUSE = "the server has other weights: another step or run, or adapters that are not applied"
_FIX = "compare the checkpoint's path with the one that the server was started with"


def same_noise(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Difference]:
    """
    Args:
        ours, theirs: float[n ah ad], what the models gave from the same noise.
    """
    if ours.shape != theirs.shape:
        yield Difference(CHUNK, "model", f"gives {theirs.shape[1:]} instead of {ours.shape[1:]}", _CAUSE, _FIX)
        return
    difference, size = float(np.abs(ours - theirs).mean()), float(np.abs(ours).mean())
    if difference > _PRECISION * size:
        found = f"chunks of the same noise differ by {difference:.3g} in the mean, where their values are {size:.3g}"
        yield Difference(CHUNK, "model", found, _CAUSE, _FIX)


def other_noise(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Difference]:
    """
    Args:
        ours, theirs: float[n k ah w], k chunks for each observation, in the robot's units.
    """
    if ours.shape[2:] != theirs.shape[2:]:
        found = f"chunks are {theirs.shape[2:]} instead of {ours.shape[2:]} (rows, dimensions)"
        yield Difference(CHUNK, "actions", found, "the server has another recipe", "serve the checkpoint's recipe")
        return
    error = np.sqrt(ours.var(axis=1, ddof=1) / ours.shape[1] + theirs.var(axis=1, ddof=1) / theirs.shape[1])
    floor = 1e-3 * (np.ptp(ours, axis=(0, 1, 2)) + 1e-6)
    distance = np.abs(ours.mean(axis=1) - theirs.mean(axis=1))
    ratio = np.median(distance, axis=(0, 1)) / np.maximum(np.median(error, axis=(0, 1)), floor)
    if (dims := np.flatnonzero(ratio > _FAR)).size:
        found = f"dimensions {dims.tolist()} are {ratio.max():.1f} standard errors from those of the checkpoint here"
        cause = "another input, other statistics, another mask of relative actions, or other weights"
        fix = "serve the checkpoint with `openpi serve`, whose stages can be told apart"
        yield Difference(CHUNK, "actions", found, cause, fix)
