"""Parameters over several processes: whole on each (DDP), or split (FSDP2), over all of them or within groups.

`fsdp_devices` of a recipe is how many devices share one copy of the parameters, as in JAX; groups of devices each have
one. Source: the training specification, section 10.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from openpi.models_pytorch import gemma, siglip
from openpi.training.distributed import processes


def split(model: nn.Module, num_fsdp_devices: int, device: torch.device) -> None:
    """Splits the parameters in place, block by block; nothing if every process keeps them whole."""
    if num_fsdp_devices == 1:
        return
    shape = (processes.count() // num_fsdp_devices, num_fsdp_devices)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    # It warns of outputs that are views, which in-place operations would spoil; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options: Any = {"mesh": mesh["shard"] if shape[0] == 1 else mesh}
    for module in model.modules():
        if isinstance(module, (gemma.Block, siglip.Block)):
            fully_shard(module, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "sample_actions")


def replicated(model: nn.Module, num_fsdp_devices: int, device: torch.device) -> nn.Module:
    """What to call for the loss, so that gradients become the mean over all processes."""
    if processes.count() == 1 or num_fsdp_devices > 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    # They get no gradient in any process. Left to look for such, DDP would wait for the device in every step. Nor does
    # it have to send frozen ones, which all processes have read alike.
    unread: Any = model.unread_parameters
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*unread(), *frozen])
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def set_exchanges_gradients(forward: nn.Module, is_on: bool) -> None:
    """Off for all but the last part of a batch that is run in parts."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = is_on
    elif hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(is_on)  # type: ignore[operator]  # added by `fully_shard`


def is_split(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def split_again(model: nn.Module) -> None:
    """Lets go of parameters that a forward pass has put together; only a backward pass would do it for all of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor from its parts; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(example: Tensor, rows: Tensor) -> Tensor:
    """This process's rows as a tensor that is split as `example` is; they may be of another width."""
    if not isinstance(example, DTensor):
        return rows
    shape = torch.Size((*example.shape[:-1], rows.shape[-1]) if example.ndim > 1 else example.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, example.device_mesh, example.placements, run_check=False, shape=shape, stride=stride
    )


def distributed(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device and in the parts of `example`."""
    if not isinstance(example, DTensor):
        return tensor.to(example.device)
    local = tensor.to(example.device)
    return distribute_tensor(local, example.device_mesh, example.placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, values: Tensor, start: int = 0) -> None:
    """Copies into a tensor, or into this process's part of it.

    Args:
        values: the whole of it, or its rows from `start` on; every process has the same.
    """
    if values.ndim == 0:
        target.copy_(values)
        return
    part, first = local(target), _first_row(target)
    begin, end = max(first, start), min(first + len(part), start + len(values))
    if begin < end:
        part[begin - first : end - first].copy_(values[begin - start : end - start])


def _first_row(tensor: Tensor) -> int:
    """Where in the whole tensor the rows of this process begin."""
    if not isinstance(tensor, DTensor):
        return 0
    mine = local(distributed(torch.arange(tensor.shape[0]), tensor))
    return int(mine[0]) if len(mine) else 0
