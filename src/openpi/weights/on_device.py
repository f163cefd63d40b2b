"""Parameters of any layout as `jax.Array`s of the published tree, array by array.

The host holds one array at a time, and of that only what the devices of this process get.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from openpi.shared.tree import Params, unflatten
from openpi.weights import blocks, names, published_tree
from openpi.weights.blocks import Box, Weights

# The frozen weights that are on a device, for as long as a model uses them: further adapters over the same base take
# them from here, so that a server holds a base once.
_shared: weakref.WeakValueDictionary[tuple[str, ...], jax.Array] = weakref.WeakValueDictionary()


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
    found = {}
    for path, rows in published_tree.loaded_rows(weights).items():
        wanted = published_tree.stored_dtype(weights, rows) if dtype is None else np.dtype(dtype)
        key = None
        if weights.base is not None and path in frozen:
            key = (weights.base.place, path, frozen[path].digest, str(wanted), str(sharding))
        array = None if key is None else _shared.get(key)
        if array is None:
            array = read_array(weights, path, wanted, sharding)
            if key is not None:
                _shared[key] = array
        found[path] = array
    return unflatten(found)


def read_array(
    weights: Weights, path: str, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None = None
) -> jax.Array:
    """One array of the tree, all of whose parts are there.

    Args:
        sharding: default: the first device.
    Raises:
        ValueError: as of `Weights.blocks`.
    """
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    rows = [row for row in weights.table if row.tree == path]
    shape = names.shapes_of(rows)[path]
    boxes = {_box(index, shape) for index in place.addressable_devices_indices_map(shape).values()}
    parts = {box: np.empty([end - begin for begin, end in box], dtype) for box in boxes}
    for block in weights.blocks({row.released for row in rows}.__contains__):
        for box, part in parts.items():
            blocks.put_into(part, block, box)
    array = jax.make_array_from_callback(shape, place, lambda index: parts[_box(index, shape)])
    return array.block_until_ready()  # else the host would hold what is still on its way


def _box(index: Any, shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
