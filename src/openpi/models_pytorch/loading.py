"""PyTorch models from parameters in the published tree, and back. Source: the checkpoint specification, section 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.models_pytorch.model import DTYPES
from openpi.models_pytorch.pi0 import Pi0
from openpi.shared.tree import Tree, flatten
from openpi.weights import names
from openpi.weights.blocks import Weights, by_array


def create(config: BaseModelConfig, *, device: torch.device | str = "meta") -> nn.Module:
    """The model with empty f32 parameters; on "meta" they take no memory."""
    with torch.device(device):
        return _family(config)(config)


def _family(config: BaseModelConfig) -> type[nn.Module]:
    if config.model_type is ModelType.PI0_FAST:
        from openpi.models_pytorch.pi0_fast import Pi0FAST

        return Pi0FAST
    return Pi0


def load(
    config: BaseModelConfig,
    read: Callable[[names.Row], object],
    *,
    device: torch.device | str = "cpu",
    dtype: Callable[[names.Row, torch.dtype], torch.dtype] = lambda row, stored: stored,
) -> nn.Module:
    """A model on a device, filled tensor by tensor, so that no second copy of it is ever in memory.

    Args:
        read: the tensor (or array) of a row.
        dtype: of the parameter, from that of what was read.
    """
    model = create(config)
    for row in names.rows(config):
        tensor = as_tensor(read(row))
        set_parameter(model, row.torch, tensor.to(device, dtype(row, tensor.dtype)))
    return model


def from_tree(
    config: BaseModelConfig,
    params: Tree,
    *,
    dtype: Callable[[names.Row, torch.dtype], torch.dtype] = lambda row, stored: stored,
) -> nn.Module:
    """As `load`, from the published tree (nested dicts of NumPy arrays), on the CPU."""
    flat = flatten(params)
    return load(config, lambda row: row.to_torch(flat[row.tree][row.index]), dtype=dtype)


def load_checkpoint(
    config: BaseModelConfig,
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> nn.Module:
    """A model from a checkpoint of any layout, read as it is: no conversion, no second copy in memory.

    Args:
        dtype: of the parameters, see `served_dtype`; None = as stored.
    Raises:
        ValueError: as of `Weights.blocks`.
    """
    model = create(config)

    def fill(_: str, rows: Sequence[names.Row]) -> None:
        whole = torch.empty(0)
        for block in weights.blocks({row.released for row in rows}.__contains__):
            values = as_tensor(block.values)
            if block.start == 0:
                as_asked = values.dtype if dtype is None else served_dtype(block.row, DTYPES[dtype])
                whole = torch.empty(block.row.shape, dtype=as_asked, device=device)
                set_parameter(model, block.row.torch, whole)  # filled below
            whole[block.start : block.start + len(values)].copy_(values)

    by_array(fill, names.by_array(weights.table))
    return model


def served_dtype(row: names.Row, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter in a model that is served in `dtype`: what the model computes with in float32 stays so.

    That is plain norms, patch and position embeddings, and the projections of state, actions and time. They are less
    than 1 % of a model; it comes closer to float32, and none of them has to be widened in every call.
    """
    is_norm = "norm" in row.torch and ".dense." not in row.torch
    is_embedding = row.torch.startswith(("vision.patch_embedding", "vision.position_embedding"))
    is_projection = not row.torch.startswith(("vision.", "language."))
    return torch.float32 if is_norm or is_embedding or is_projection else dtype


def to_tree(config: BaseModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The published tree (NumPy) of parameters, or gradients, by our names."""
    return names.to_tree(names.rows(config), lambda row: as_array(tensors[row.torch]))


def set_parameter(model: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> None:
    """Replaces a parameter, which may be on "meta", by one of the same shape.

    Raises:
        ValueError: the shape is another.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model has {tuple(old.shape)}")
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=requires_grad))


def as_tensor(array: object) -> Tensor:
    """A tensor of an array of any float dtype; bfloat16 arrays (ml_dtypes) included."""
    if isinstance(array, Tensor):
        return array
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_array(tensor: Tensor) -> np.ndarray:
    """Inverse of `as_tensor`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
