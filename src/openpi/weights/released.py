"""Writing weights tensor by tensor: `params/`, and `model.safetensors` in the released PyTorch layout and LeRobot's.

Source: the checkpoint specification, sections 1.1, 4, 4.1 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from openpi.weights import names, spelling
from openpi.weights.blocks import Block, Select, Weights
from openpi.weights.names import Row
from openpi.weights.safetensors_io import Spec, Writer, rows_per_block


def cast(weights: Weights, dtype: DTypeLike | None = None, *, only: Select | None = None) -> Iterator[Block]:
    """The tensors in another dtype (None = as stored), each with its bytes in order; `only` as of `Weights.blocks`."""
    for block in weights.blocks(only):
        wanted = weights.dtype(block.row) if dtype is None else np.dtype(dtype)
        yield Block(block.row, block.start, np.ascontiguousarray(block.values, dtype=wanted))


def write_tensors(
    file: Path,
    config: object,
    blocks: Iterable[Block],
    dtype: Callable[[Row], np.dtype],
    *,
    prefix: str = "",
    left_out: Collection[str] = (),
) -> None:
    """Writes every tensor of a model under its released name; the file is whole or not there.

    Args:
        blocks: of all rows, in `dtype`.
        prefix: before each name; LeRobot's is `spelling.LEROBOT_PREFIX`.
        left_out: paths of arrays of the tree whose tensors are not written.
    Raises:
        ValueError: blocks are missing, or not of that dtype.
    """
    experts = names.dims_in(config).experts
    table = [row for row in names.rows(config) if row.tree not in left_out]
    specs = {prefix + row.released: Spec(row.shape, np.dtype(dtype(row))) for row in table}
    unused = prefix + spelling.UNUSED_TABLE
    if len(experts) > 1 and not left_out:  # the reference's strict loader wants it
        specs[unused] = Spec((experts[0].vocab_size, experts[1].width), np.dtype(dtype(table[0])))
    with Writer(file, specs, metadata=spelling.tied_names(prefix=prefix)) as writer:
        for block in blocks:
            writer.write(prefix + block.row.released, block.values)
        if unused in specs:
            writer.write_zeros(unused)


def write_params(
    folder: Path,
    config: object,
    blocks: Iterable[Block],
    dtype: Callable[[Row], np.dtype],
    *,
    left_out: Collection[str] = (),
) -> None:
    """Writes a `params/` folder, with a chunk for each tensor.

    Args:
        blocks: of all rows, in `dtype`.
        left_out: paths of arrays that are not written.
    """
    from openpi.weights import orbax_parts

    shapes = names.tree_shapes(config)
    specs, chunks = {}, {}
    for row in names.rows(config):
        if row.tree not in left_out:
            specs[row.tree] = (shapes[row.tree], np.dtype(dtype(row)))
            chunks[row.tree] = (1,) * len(row.index) + _chunk_rows(row.part_shape, specs[row.tree][1].itemsize)
    stores = orbax_parts.create_arrays(folder, specs, chunks)
    for block in blocks:
        store, index = stores[block.row.tree], block.row.index
        if block.is_whole:
            store[(*index, ...)].write(np.ascontiguousarray(block.row.to_tree(block.values))).result()
        else:
            store[(*index, slice(block.start, block.start + len(block.values)), ...)].write(block.values).result()


def _chunk_rows(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """All of a part, or as many of its rows as a block of a large tensor has."""
    return (min(shape[0], rows_per_block(shape, itemsize)), *shape[1:])


def num_bytes(config: object, dtype: Callable[[Row], np.dtype], *, left_out: Collection[str] = ()) -> int:
    """Of the tensors, about as large as the file."""
    rows = [row for row in names.rows(config) if row.tree not in left_out]
    return sum(Spec(row.shape, np.dtype(dtype(row))).nbytes for row in rows)
