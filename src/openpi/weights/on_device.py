"""Parameters of any layout as `jax.Array`s of the published tree, array by array.

The host holds a few arrays at a time, and of these only what the devices of this process get.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import DTypeLike

from openpi.shared.tree import Params, unflatten
from openpi.weights import blocks, names, published_tree
from openpi.weights.blocks import Box, Weights
from openpi.weights.names import Row

# The frozen weights that are on a device, for as long as a model uses them: further adapters over the same base take
# them from here, so that a server holds a base once.
_shared: weakref.WeakValueDictionary[tuple[str, ...], jax.Array] = weakref.WeakValueDictionary()


class Leaf(Protocol):
    """What an array is to be; a `jax.ShapeDtypeStruct` is one."""

    dtype: Any
    sharding: Any


def read_params(
    weights: Weights, *, dtype: DTypeLike | None = None, sharding: jax.sharding.Sharding | None = None
) -> Params:
    """The tree of all that is there; of adapters alone, arrays of their base are shared with others that have it.

    Args:
        dtype: of the arrays; None = as stored, float32 where parts of one array differ.
        sharding: default: the first device.
    Raises:
        ValueError: as of `Weights.blocks`.
    """
    frozen = {} if weights.base is None else weights.base.frozen

    def read(path: str, rows: Sequence[Row]) -> jax.Array:
        wanted = published_tree.stored_dtype(weights, rows) if dtype is None else np.dtype(dtype)
        key = None
        if weights.base is not None and path in frozen:
            key = (weights.base.place, path, frozen[path].digest, str(wanted), str(sharding))
        array = None if key is None else _shared.get(key)
        if array is None:
            array = _read_array(weights, rows, wanted, sharding)
            if key is not None:
                _shared[key] = array
        return array

    return unflatten(blocks.by_array(read, published_tree.loaded_rows(weights)))


def read_like(weights: Weights, leaves: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    """By path, each of those asked for that is there, in the dtype and sharding of its leaf.

    Raises:
        ValueError: as of `Weights.blocks`.
    """
    there = {path: rows for path, rows in published_tree.loaded_rows(weights).items() if path in leaves}
    return blocks.by_array(
        lambda path, rows: _read_array(weights, rows, leaves[path].dtype, leaves[path].sharding), there
    )


def _read_array(
    weights: Weights, rows: Sequence[Row], dtype: DTypeLike, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """One array of the tree, of all its tensors."""
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    (shape,) = names.shapes_of(rows).values()
    boxes = {_box(index, shape) for index in place.addressable_devices_indices_map(shape).values()}
    parts = {box: np.empty([end - begin for begin, end in box], dtype) for box in boxes}
    for block in weights.blocks({row.released for row in rows}.__contains__):
        for box, part in parts.items():
            blocks.put_into(part, block, box)
    array = jax.make_array_from_callback(shape, place, lambda index: parts[_box(index, shape)])
    return array.block_until_ready()  # else the host would hold what is still on its way


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
