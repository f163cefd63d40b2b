"""Parameters on disk as a model sees them, whatever the layout: tensors with PyTorch's axes, some rows at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from openpi.shared import slow
from openpi.weights.adapter_base import AdapterBase
from openpi.weights.compare import LoadReport
from openpi.weights.names import Row

T = TypeVar("T")
# Arrays that are read at a time: the host holds as many. A third of a model's bytes are one array.
_AT_ONCE = 4
Select = Callable[[str], Any]
Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """A tensor with PyTorch's axes, or rows of one: those from `start` on."""

    row: Row
    start: int
    values: np.ndarray

    @property
    def is_whole(self) -> bool:
        return self.values.shape == self.row.shape


class Array(Protocol):
    """An array of the tree that is read when it is wanted."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive rows along axis 0, with the index of the first of them; of a small array, all at once."""
        ...


class Weights(Protocol):
    """Parameters on disk that fit a model.

    Attributes:
        table: the model's tensors.
        report: what is there of them, by released name.
        base: of a checkpoint of adapters alone: what is read from where.
    """

    table: Sequence[Row]
    report: LoadReport
    base: AdapterBase | None

    def dtype(self, row: Row) -> np.dtype:
        """As stored; of what is read from a base, bfloat16."""
        ...

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        """Tensors that are there, in an order that suits the files; rows of one tensor follow one another.

        Args:
            only: of a tensor's released name, whether it is wanted; None = all are.
        Raises:
            ValueError: an array of a base is not the one that the adapters were trained on.
        """
        ...


def told(blocks: Iterable[Block], what: str, total: int) -> Iterator[Block]:
    """The same blocks; how many MB they are so far is logged now and then.

    Args:
        what: becomes of them, such as `written`.
        total: bytes of all of them.
    """
    return slow.told(blocks, f"MB of weights {what}", total / 1e6, lambda block: block.values.nbytes / 1e6)


def by_array(read: Callable[[str, Sequence[Row]], T], arrays: Mapping[str, Sequence[Row]]) -> dict[str, T]:
    """`read(path, tensors)` of every array of the tree, by path.

    In a few threads, the largest array first: most of the time of reading goes into unpacking.
    """
    order = sorted(arrays, key=lambda path: -sum(math.prod(row.shape) for row in arrays[path]))
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1), thread_name_prefix="weights") as pool:
        return dict(zip(order, pool.map(read, order, [arrays[path] for path in order]), strict=True))


def put_into(target: np.ndarray, block: Block, box: Box | None = None) -> None:
    """Writes a block to its place in the array of the tree that it is part of, cast to its dtype.

    Args:
        box: begin and end along each axis, of the part of that array that `target` is; None = it is all of it.
    """
    bounds = [(0, size) for size in target.shape] if box is None else list(box)
    index, values = block.row.index, block.row.to_tree(block.values) if block.is_whole else block.values
    if not all(begin <= place < end for place, (begin, end) in zip(index, bounds, strict=False)):
        return
    where: list[Any] = [place - begin for place, (begin, _) in zip(index, bounds, strict=False)]
    if values.ndim:
        (first, last), *others = bounds[len(index) :]
        begin, end = max(first, block.start), min(last, block.start + len(values))
        if begin >= end:
            return
        where.append(slice(begin - first, end - first))
        values = values[(slice(begin - block.start, end - block.start), *(slice(*bound) for bound in others))]
    target[tuple(where)] = values
