"""Telling RGB from BGR: no image proves its colour order, but a camera's images have a cast that a swap breaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from openpi.policies.images import to_uint8_hwc
from openpi.shared.tree import flatten

# Grey levels by which the mean red and blue of the training images must differ for a swap to show.
_MIN_COLOUR_CAST = 8.0
# A mean needs no more than every eighth pixel each way, and is asked for with every request.
_STRIDE = 8


def channel_mean(image: np.ndarray) -> tuple[float, float, float]:
    """Mean of the three channels of an RGB image in either layout, 0..255."""
    sparse = to_uint8_hwc(image, "image")[::_STRIDE, ::_STRIDE]
    red, green, blue = sparse.reshape(-1, 3).mean(axis=0).tolist()
    return red, green, blue


def channel_means(samples: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Per camera key, the mean over samples of `channel_mean`; what `Contract.camera_means` stores."""
    sums: dict[str, list[tuple[float, float, float]]] = {}
    for sample in samples:
        for key, value in flatten(sample).items():
            if np.ndim(value) == 3:
                sums.setdefault(key, []).append(channel_mean(value))
    return {key: tuple(np.mean(values, axis=0).tolist()) for key, values in sums.items()}


def looks_bgr(mean: tuple[float, float, float], training_mean: tuple[float, float, float]) -> bool:
    """Whether an image's channel means fit clearly better with red and blue swapped.

    Says no where the training images have no colour cast: then the means cannot tell.
    """
    found, expected = np.array(mean), np.array(training_mean)
    if abs(expected[0] - expected[2]) < _MIN_COLOUR_CAST:
        return False
    # Brightness is taken out: a darker room is no reason for alarm.
    found, expected = found - found.mean(), expected - expected.mean()
    return bool(2 * np.linalg.norm(found[::-1] - expected) < np.linalg.norm(found - expected))
