"""Devices as a mesh (`batch`, `fsdp`), which axis of which parameter is split over it, and batches placed on it.

The devices are those of all processes, in the order of the processes, so that every process holds consecutive rows of
a batch, and `fsdp` stays within a node where it can. Source: the training specification, section 10.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openpi.models.activations import keep_rows, split_by_rows

logger = logging.getLogger(__name__)

BATCH_AXIS = "batch"
FSDP_AXIS = "fsdp"
# Both: rows of a batch are split over all devices.
DATA_AXIS = (BATCH_AXIS, FSDP_AXIS)

# Below this a copy on every device costs less than gathering the pieces at every use.
MIN_SHARDED_BYTES = 4 * 2**20


def make_mesh(num_fsdp_devices: int) -> Mesh:
    """All devices as `[devices / num_fsdp_devices, num_fsdp_devices]`.

    Raises:
        ValueError: the device count is not a multiple of it, or processes have different numbers of devices.
    """
    count = jax.device_count()
    if num_fsdp_devices < 1 or count % num_fsdp_devices:
        raise ValueError(
            f"fsdp_devices={num_fsdp_devices} does not divide the {count} devices; choose one of "
            f"{[n for n in range(1, count + 1) if count % n == 0]}"
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shares = collections.Counter(device.process_index for device in devices)
    if len(set(shares.values())) > 1:
        raise ValueError(f"processes have different numbers of devices ({dict(shares)}); give each the same")
    return Mesh(np.asarray(devices).reshape(-1, num_fsdp_devices), DATA_AXIS)


def set_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Within it, models keep the activations of functions that are traced split by rows of the batch."""
    return split_by_rows(data_sharding(mesh))


def activation_sharding_constraint(pytree: object) -> object:
    """A tree of arrays with a leading batch axis, split over the devices of `set_mesh`; unchanged outside of it."""
    return keep_rows(pytree)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def place_rows(rows: object, mesh: Mesh) -> Any:
    """A tree of this process's rows of a batch -> the global batch. Inverse: `local_rows`."""
    where = data_sharding(mesh)
    if where.is_fully_addressable:
        return jax.device_put(rows, where)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf), rows)


def local_rows(batch: object) -> Any:
    """A tree of arrays split by rows -> this process's rows, as NumPy arrays."""
    return jax.tree.map(_local_rows, batch)


def _local_rows(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def sliceable(array: jax.Array) -> jax.Array | _InParts:
    """Something with the array's shape whose slices are there in every process; all have to take the same ones."""
    return array if array.is_fully_addressable else _InParts(array)


class _InParts:
    """An array of which each process holds a part."""

    def __init__(self, array: jax.Array) -> None:
        self.shape = array.shape
        self._array = array

    def __getitem__(self, index: object) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(self._array[index], tiled=True))


def fsdp_spec(
    shape: tuple[int, ...], dtype: np.dtype, num_fsdp_devices: int, *, min_bytes: float | None = None
) -> PartitionSpec:
    """Splits the largest axis that divides evenly (the later one of equals); arrays below `min_bytes`
    (`MIN_SHARDED_BYTES`) are not split."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_fsdp_devices == 1 or len(shape) < 2 or size_bytes < (MIN_SHARDED_BYTES if min_bytes is None else min_bytes):
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: (shape[axis], axis), reverse=True):
        if shape[axis] % num_fsdp_devices == 0:
            return PartitionSpec(*(FSDP_AXIS if i == axis else None for i in range(len(shape))))
    logger.warning("no axis of %s is a multiple of %d: kept whole on every device", shape, num_fsdp_devices)
    return PartitionSpec()


def fsdp_sharding(tree: object, mesh: Mesh, *, min_size_mbytes: float | None = None, log: bool = False) -> object:
    """`fsdp_spec` for every leaf (anything with a shape and a dtype) of a tree.

    Args:
        min_size_mbytes: smaller arrays are not split; `MIN_SHARDED_BYTES` by default.
        log: say how each array that is split lies.
    """

    min_bytes = None if min_size_mbytes is None else min_size_mbytes * 2**20

    def place(path: jax.tree_util.KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        spec = fsdp_spec(tuple(leaf.shape), leaf.dtype, mesh.shape[FSDP_AXIS], min_bytes=min_bytes)
        if log and spec != PartitionSpec():
            logger.info("%s, %s, is split as %s", jax.tree_util.keystr(path), tuple(leaf.shape), spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)
