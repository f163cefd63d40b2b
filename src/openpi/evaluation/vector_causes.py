"""Why two recordings of the same vectors differ: another order, other units, a sign, an offset, another scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_RELATIVE, _ABSOLUTE = 1e-4, 1e-6
_MOST_NAMED = 6
_FACTORS = {
    "degrees instead of radians": 180 / math.pi,
    "radians instead of degrees": math.pi / 180,
    "millimeters instead of meters": 1e3,
    "meters instead of millimeters": 1e-3,
    "centimeters instead of meters": 1e2,
    "percent instead of fractions": 1e2,
    "the opposite sign": -1.0,
}


@dataclasses.dataclass(frozen=True)
class Cause:
    """Attributes:
    kind: `order`, `units`, `sign`, `scale`, `offset` or `values`.
    found: what differs, in words.
    """

    kind: str
    found: str


def are_close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool, of the shape of both: the same but for rounding, NaN included."""
    return np.isclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)


def explain(trained: np.ndarray, served: np.ndarray, names: Sequence[str]) -> Cause | None:
    """None where they are the same.

    Args:
        trained, served: float[n d], n observations of the same moments.
        names: of the dimensions.
    """
    differs = np.asarray(~are_close(trained, served).all(axis=0))
    if not differs.any():
        return None
    if (order := _order(trained, served, differs)) is not None:
        moved = [f"{names[j]} holds {names[i]}" for j, i in enumerate(order) if i != j]
        return Cause("order", _listed(moved))
    dims = np.flatnonzero(differs)
    fits = [_affine(trained[:, j], served[:, j]) for j in dims]
    told = ", ".join(names[int(j)] for j in dims[:_MOST_NAMED]) + (" and others" if len(dims) > _MOST_NAMED else "")
    values = f"{served[0, dims[0]]:.5g} instead of {trained[0, dims[0]]:.5g}"
    scales = [fit[0] for fit in fits if fit is not None and abs(fit[1]) < 1e-3 * (1 + abs(fit[0]))]
    if len(scales) == len(dims) and np.allclose(scales, scales[0], rtol=1e-2):
        for name, factor in _FACTORS.items():
            if math.isclose(scales[0], factor, rel_tol=1e-2):
                return Cause("sign" if factor < 0 else "units", f"{told}: {name} ({values})")
        return Cause("scale", f"{told}: {scales[0]:.4g} times as large ({values})")
    if all(fit is not None and abs(fit[0] - 1) < 1e-3 for fit in fits):
        offsets = [f"{fit[1]:+.4g}" for fit in fits[:_MOST_NAMED] if fit is not None]
        return Cause("offset", f"{told}: moved by {', '.join(offsets)} ({values})")
    if all(fit is not None for fit in fits):
        return Cause("scale", f"{told}: scaled and moved, each in its own way ({values})")
    return Cause("values", f"{told}: other values ({values})")


def _order(trained: np.ndarray, served: np.ndarray, differs: np.ndarray) -> list[int] | None:
    """Which dimension of training each of the served ones holds, where all that differ hold another one."""
    order = list(range(trained.shape[1]))
    dims = np.flatnonzero(differs)
    for j in dims:
        same = [i for i in dims if i != j and are_close(trained[:, i], served[:, j]).all()]
        if not same:
            return None
        order[j] = int(same[0])
    return order if len(dims) > 1 else None


def _affine(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """(a, b) of y = a x + b, where that holds; a constant has no scale but by itself."""
    if np.ptp(x) < 1e-6 * (1 + np.abs(x).max()):
        is_constant = np.ptp(y) < 1e-6 * (1 + np.abs(y).max())
        return (float(y[0] / x[0]), 0.0) if is_constant and abs(x[0]) > 1e-6 else None
    a, b = np.polyfit(x, y, 1)
    is_exact = np.allclose(a * x + b, y, rtol=1e-2, atol=1e-3 * np.ptp(y) + 1e-6)
    return (float(a), float(b)) if is_exact else None


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_MOST_NAMED]) + (" and others" if len(items) > _MOST_NAMED else "")
