"""Devices as a mesh (`batch`, `fsdp`), and which axis of which parameter is split over it.

Source: the training specification, section 10.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger("openpi")

BATCH_AXIS = "batch"
FSDP_AXIS = "fsdp"
DATA_AXES = (BATCH_AXIS, FSDP_AXIS)

# Below this a copy on every device costs less than gathering the pieces at every use.
MIN_SHARDED_BYTES = 4 * 2**20


def make_mesh(num_fsdp_devices: int) -> Mesh:
    """All devices as `[devices / num_fsdp_devices, num_fsdp_devices]`.

    Raises:
        ValueError: the device count is not a multiple of it.
    """
    count = jax.device_count()
    if num_fsdp_devices < 1 or count % num_fsdp_devices:
        raise ValueError(
            f"fsdp_devices={num_fsdp_devices} does not divide the {count} devices of this machine; choose one of "
            f"{[n for n in range(1, count + 1) if count % n == 0]}"
        )
    devices = np.asarray(jax.devices()).reshape(-1, num_fsdp_devices)
    return Mesh(devices, DATA_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The batch axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def fsdp_spec(shape: tuple[int, ...], dtype: Any, num_fsdp_devices: int) -> PartitionSpec:
    """Splits the largest axis that divides evenly (the later one of equals); small arrays are not split."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_fsdp_devices == 1 or len(shape) < 2 or size_bytes < MIN_SHARDED_BYTES:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: (shape[axis], axis), reverse=True):
        if shape[axis] % num_fsdp_devices == 0:
            return PartitionSpec(*(FSDP_AXIS if i == axis else None for i in range(len(shape))))
    logger.warning("no axis of %s is a multiple of %d: kept whole on every device", shape, num_fsdp_devices)
    return PartitionSpec()


def fsdp_sharding(tree: Any, mesh: Mesh) -> Any:
    """`fsdp_spec` for every leaf (anything with a shape and a dtype) of a tree."""
    num_fsdp_devices = mesh.shape[FSDP_AXIS]
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, fsdp_spec(tuple(leaf.shape), leaf.dtype, num_fsdp_devices)), tree
    )
