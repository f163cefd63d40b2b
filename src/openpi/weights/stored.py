"""`Weights` of what is stored: arrays of the tree, and tensors of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from openpi.weights import names, safetensors_io, second_names, spelling
from openpi.weights.adapter_base import AdapterBase
from openpi.weights.blocks import Array, Block, Select
from openpi.weights.compare import LoadReport, Shapes, compare
from openpi.weights.names import Row


class ArrayWeights:
    """`Weights` of arrays of the tree.

    Args:
        report: by paths of the tree.
        arrays: by path.
    """

    base: AdapterBase | None = None

    def __init__(self, table: Sequence[Row], report: LoadReport, arrays: Mapping[str, Array]) -> None:
        self.table: Sequence[Row] = table
        loaded, kept = set(report.loaded), set(report.kept)
        self.report = dataclasses.replace(
            report,
            loaded=tuple(row.released for row in table if row.tree in loaded),
            kept=tuple(row.released for row in table if row.tree in kept),
        )
        self._arrays = arrays

    def has(self, row: Row) -> bool:
        return row.tree in self._arrays

    def dtype(self, row: Row) -> np.dtype:
        return self._arrays[row.tree].dtype

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        members: dict[str, dict[tuple[int, ...], Row]] = {}
        for row in self.table:
            if self.has(row) and (only is None or only(row.released)):
                members.setdefault(row.tree, {})[row.index] = row
        for path, rows in members.items():
            yield from _blocks_of(self._arrays[path], rows)


def _blocks_of(array: Array, rows: Mapping[tuple[int, ...], Row]) -> Iterator[Block]:
    is_stacked = () not in rows
    if not is_stacked and not rows[()].is_plain:
        yield Block(rows[()], 0, rows[()].to_torch(array.read()))
        return
    for start, some in array.rows():
        if not is_stacked:
            yield Block(rows[()], start, some)
            continue
        for index, row in rows.items():
            if start <= index[0] < start + len(some):
                yield Block(row, 0, row.to_torch(some[(index[0] - start, *index[1:])]))


class TensorWeights:
    base: AdapterBase | None = None

    def __init__(
        self,
        table: Sequence[Row],
        tensors: safetensors_io.Tensors,
        spelled: spelling.Spelling,
        elsewhere: Shapes,
        may_keep: str,
        source: str,
    ) -> None:
        self.table: Sequence[Row] = table
        self._tensors = tensors
        self._names = {
            row.released: second_names.one_of(spelled.names[row.released], tensors, source)
            for row in table
            if row.released in spelled.names
        }
        shapes, trees = tensors.shapes, names.shapes_of(table)
        stored = {released: shapes[name] for released, name in self._names.items()}
        for row in table:
            if row.released not in self._names and row.tree in elsewhere:
                whole = elsewhere[row.tree]
                stored[row.released] = row.shape if whole == trees[row.tree] else whole
        unused = {
            name: shapes[name]
            for released, those in spelled.names.items()
            if released not in self._names and not spelling.is_known_unused(released)
            for name in those
        }
        unused |= {path: elsewhere[path] for path in elsewhere if path not in trees}
        model = {row.released: row.shape for row in table}
        self.report = compare(model, stored | unused, may_keep=may_keep, source=source)

    @property
    def read_names(self) -> Collection[str]:
        """Of the tensors, in the file."""
        return self._names.values()

    def has(self, row: Row) -> bool:
        return row.released in self._names

    def dtype(self, row: Row) -> np.dtype:
        return self._tensors.spec(self._names[row.released]).dtype

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        for row in self.table:
            if self.has(row) and (only is None or only(row.released)):
                for start, values in self._tensors.rows(self._names[row.released], whole=not row.is_plain):
                    yield Block(row, start, values)
