"""Where an orientation that moves on smoothly is written anew: numbers jump, the robot does not.

quaternion         q and -q are one rotation
rotation vector    v and v - 2 pi v / |v|, as of a UR's tool that points down
angle              a and a - 2 pi, or a - 360
"""

from collections.abc import Iterator

import numpy as np

_UNIT = 0.02  # of the length of a quaternion
_NEAR = 0.3  # of what is the same: rad, or parts of a unit quaternion
_TURNS = (2 * np.pi, 360.0)
_TURN, _WHOLE = 0.1, 0.8  # of a turn that it may be off; of the range of the dimension that the step has to take
_LEAST = 0.8  # of one number of any of the three
_BURST = 8.0  # times the 90 % of all steps


def rewritten(values: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Dimensions of one orientation, and the numbers of the steps at which it is written anew.

    Args:
        values: f64[n, d], n > 1, of one episode.
    """
    is_far = np.abs(np.diff(values, axis=0)).max(axis=0) > _LEAST
    taken: set[int] = set()
    for width, is_anew in ((4, _quaternion), (3, _rotation_vector), (1, _angle)):
        for first in range(values.shape[1] - width + 1):
            dims = list(range(first, first + width))
            if (
                is_far[dims].any()
                and taken.isdisjoint(dims)
                and (frames := np.flatnonzero(is_anew(values[:, dims]))).size
            ):
                taken.update(dims)
                yield dims, frames


def _quaternion(values: np.ndarray) -> np.ndarray:
    if not (np.abs(np.linalg.norm(values, axis=1) - 1) < _UNIT).all():
        return np.zeros(len(values) - 1, bool)
    return np.linalg.norm(values[1:] + values[:-1], axis=1) < _NEAR


def _rotation_vector(values: np.ndarray) -> np.ndarray:
    before, after = values[:-1], values[1:]
    length = np.linalg.norm(before, axis=1, keepdims=True)
    other = before * (1 - 2 * np.pi / np.where(length > 0, length, np.inf))
    is_same = (length[:, 0] > np.pi - 1) & (np.linalg.norm(after - other, axis=1) < _NEAR)
    return is_same & _is_burst(np.linalg.norm(after - before, axis=1))


def _angle(values: np.ndarray) -> np.ndarray:
    steps = np.abs(np.diff(values[:, 0]))
    is_turn = np.any([np.abs(steps / turn - 1) < _TURN for turn in _TURNS], axis=0)
    return is_turn & (steps > _WHOLE * np.ptp(values)) & _is_burst(steps)


def _is_burst(steps: np.ndarray) -> np.ndarray:
    return steps > _BURST * np.quantile(steps, 0.9 if len(steps) >= 10 else 0.5)
