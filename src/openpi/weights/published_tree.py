"""Opened weights as the published tree, array by array. No framework here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import numpy as np
from numpy.typing import DTypeLike

from openpi.shared.tree import unflatten
from openpi.weights import names
from openpi.weights.blocks import Weights, put_into
from openpi.weights.compare import LoadReport, compare
from openpi.weights.names import Row


def tree_of(
    weights: Weights, *, dtype: DTypeLike | None = None, only: Collection[str] | None = None
) -> dict[str, object]:
    """The published tree (NumPy); arguments as of `arrays`."""
    return unflatten(dict(arrays(weights, dtype=dtype, only=only)))


def arrays(
    weights: Weights, *, dtype: DTypeLike | None = None, only: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Path and values of one array of the tree after the other.

    Args:
        dtype: of the arrays; None = as stored, float32 where parts of one array differ.
        only: paths of the arrays to read; None = all that are there.
    """
    shapes = names.shapes_of(weights.table)
    for path, rows in loaded_rows(weights).items():
        if only is None or path in only:
            array = np.empty(shapes[path], stored_dtype(weights, rows) if dtype is None else dtype)
            for block in weights.blocks({row.released for row in rows}.__contains__):
                put_into(array, block)
            yield path, array


def loaded_rows(weights: Weights) -> dict[str, list[Row]]:
    """Per array of the tree that is there whole, the tensors that it is made of."""
    found = names.by_array(weights.table)
    lacking = set(weights.report.kept)
    return {path: rows for path, rows in found.items() if not any(row.released in lacking for row in rows)}


def stored_dtype(weights: Weights, rows: Iterable[Row]) -> np.dtype:
    """Of an array of the tree that is made of these; float32 where they differ."""
    dtypes = {weights.dtype(row) for row in rows}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def by_path(weights: Weights) -> LoadReport:
    """The report by paths of the tree; what is unused is called as in the file."""
    shapes = names.shapes_of(weights.table)
    there = {path: shapes[path] for path in loaded_rows(weights)}
    report = compare(shapes, there, may_keep=".*", source=weights.report.source)
    return dataclasses.replace(report, unused=weights.report.unused)
