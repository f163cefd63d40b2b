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
    taken = np.zeros((len(values) - 1, values.shape[1]), bool)
    for width, how_far in ((4, _quaternion), (3, _rotation_vector), (1, _angle)):
        windows = [list(range(first, first + width)) for first in range(values.shape[1] - width + 1)]
        found = [(dims, how_far(values[:, dims])) for dims in windows if is_far[dims].any()]
        # Windows off by one fit some of the steps, too, though not as well: the numbers beside have to be small.
        for dims, off in sorted(found, key=lambda each: _fit(each[1])):
            if (is_new := np.isfinite(off) & ~taken[:, dims].any(axis=1)).any():
                taken[:, dims] |= is_new[:, None]
                yield dims, np.flatnonzero(is_new)


def _fit(off: np.ndarray) -> tuple[int, float]:
    """Less is better."""
    is_anew = np.isfinite(off)
    return -int(is_anew.sum()), float(off[is_anew].sum())


# Each says of the steps from frame to frame, f64[n - 1], how far they lead from the same orientation written anew;
# infinite where they do not write it anew.


def _quaternion(values: np.ndarray) -> np.ndarray:
    is_unit = (np.abs(np.linalg.norm(values, axis=1) - 1) < _UNIT).all()
    off = np.linalg.norm(values[1:] + values[:-1], axis=1)
    return np.where(is_unit & (off < _NEAR), off, np.inf)


def _rotation_vector(values: np.ndarray) -> np.ndarray:
    before, after = values[:-1], values[1:]
    length = np.linalg.norm(before, axis=1, keepdims=True)
    off = np.linalg.norm(after - before * (1 - 2 * np.pi / np.where(length > 0, length, np.inf)), axis=1)
    # An angle that goes round beside two small numbers, which stay as they are instead of turning over, is not one.
    largest = np.argmax(np.abs(before), axis=1)[:, None] == np.arange(3)
    of_angle = np.linalg.norm(after - (before - 2 * np.pi * np.sign(before) * largest), axis=1)
    is_same = (length[:, 0] > np.pi - 1) & (off < _NEAR) & (off <= of_angle)
    return np.where(is_same & _is_burst(np.linalg.norm(after - before, axis=1)), off, np.inf)


def _angle(values: np.ndarray) -> np.ndarray:
    steps = np.abs(np.diff(values[:, 0]))
    off = np.min([np.abs(steps / turn - 1) for turn in _TURNS], axis=0)
    is_turn = (off < _TURN) & (steps > _WHOLE * np.ptp(values))
    return np.where(is_turn & _is_burst(steps), off, np.inf)


def _is_burst(steps: np.ndarray) -> np.ndarray:
    return steps > _BURST * np.quantile(steps, 0.9 if len(steps) >= 10 else 0.5)
