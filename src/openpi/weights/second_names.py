"""Tensors that a file holds under several names: the same numbers, or no telling which of them are meant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openpi.weights.safetensors_io import Tensors

_BLOCK_BYTES = 64 << 20


def one_of(names: Sequence[str], tensors: Tensors, source: str) -> str:
    """The name to read, of several that mean one tensor; they are compared, in the narrower of their dtypes.

    Args:
        source: names the weights in errors.
    Raises:
        ValueError: they differ; both are named, and by how much.
    """
    chosen = max(names, key=lambda name: tensors.spec(name).dtype.itemsize)  # the first of the most exact
    for name in names:
        if name != chosen:
            _refuse_difference(name, chosen, tensors, source)
    return chosen


def _refuse_difference(first: str, second: str, tensors: Tensors, source: str) -> None:
    shapes = [tensors.spec(name).shape for name in (first, second)]
    if shapes[0] != shapes[1]:
        found = f"shapes {shapes[0]} and {shapes[1]}"
    else:
        count, largest = _difference(tensors[first].reshape(-1), tensors[second].reshape(-1))
        if not count:
            return
        found = f"{count:,} of {tensors[first].size:,} entries, by up to {largest:.3g}"
    raise ValueError(
        f"{source} holds one tensor under two names, {first} and {second}, and they differ: {found}. Which one the "
        "model was trained with, only the program knows that wrote the file (a fine-tuning that unties them trains the "
        "one that it reads, and leaves the other as it was). Keep one: `openpi convert-checkpoint SRC DST --without "
        "NAME` writes a checkpoint without the other"
    )


def _difference(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """How many entries differ, and by how much at most (nan where one is no number)."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    step = _BLOCK_BYTES // max(a.itemsize, b.itemsize)
    count, largest = 0, 0.0
    for start in range(0, a.size, step):
        parts = [values[start : start + step].astype(narrow, copy=False) for values in (a, b)]
        if np.array_equal(parts[0].view(np.uint8), parts[1].view(np.uint8)):
            continue
        x, y = (part.astype(np.float64) for part in parts)
        is_other = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        count += int(is_other.sum())
        largest = float(np.maximum(largest, np.abs(x[is_other] - y[is_other]).max(initial=0.0)))
    return count, largest
