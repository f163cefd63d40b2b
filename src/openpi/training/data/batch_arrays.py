"""Batches of NumPy arrays as arrays of JAX, on their devices, or as tensors of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from openpi import transforms
from openpi.data.batch_loader import Batch
from openpi.models.observation import model_side

if TYPE_CHECKING:
    from jax.sharding import Sharding


Framework = Literal["jax", "pytorch"]


def model_side_placer(framework: Framework, sharding: Sharding | None) -> Callable[[Batch], Batch]:
    """As `placer`, without what the model does not take, such as texts."""
    place = placer(framework, sharding)
    if framework == "jax":
        import openpi.models.model  # noqa: F401  # from here on an `Observation` is a pytree
    return lambda batch: place(model_side(batch))


def process_part(framework: Framework) -> tuple[int, int]:
    """(process, number of processes) of a run that the program has started."""
    if framework == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def placer(framework: Framework, sharding: Sharding | None) -> Callable[[Batch], Batch]:
    """From a batch of NumPy arrays to one of the framework; doubles become f32."""
    if framework == "pytorch":
        if sharding is not None:
            raise ValueError("sharding places arrays of JAX; leave it out with framework='pytorch'")
        return _as_tensors
    if framework != "jax":
        raise ValueError(f"framework={framework!r}; expected 'jax' or 'pytorch'")
    return lambda batch: _on_devices(batch, sharding)


def _as_tensors(batch: Batch) -> Batch:
    import torch

    return _map_arrays(batch, lambda array: torch.as_tensor(_narrow(array)))


def _on_devices(batch: Batch, sharding: Sharding | None) -> Batch:
    import jax

    if sharding is None:
        sharding = _split_over_devices(len(next(iter(transforms.flatten_dict(batch).values()))))

    def place(array: np.ndarray) -> object:
        narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        return jax.make_array_from_process_local_data(sharding, narrow)

    return _map_arrays(batch, place)


def _split_over_devices(num_rows: int) -> Sharding:
    """Rows over all devices; over fewer, where those of all cannot share them equally."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices()
    if jax.process_count() == 1:
        devices = devices[: math.gcd(num_rows, len(devices))]
    return NamedSharding(Mesh(np.asarray(devices), ("B",)), PartitionSpec("B"))


def _narrow(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _map_arrays(batch: Mapping[str, object], place: Callable[[np.ndarray], object], path: str = "") -> Batch:
    placed = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            placed[key] = _map_arrays(value, place, f"{path}{key}/")
            continue
        array = np.asarray(value)
        if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
            raise ValueError(
                f"'{path}{key}' of a batch holds {array.dtype}, which is no number; take texts out with a transform "
                "before the loader"
            )
        placed[key] = place(array)
    return placed
