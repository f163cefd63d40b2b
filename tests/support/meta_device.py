"""A device that stands in for a GPU where there is none: it refuses to tell numbers, and shapes that depend on them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout")


class NothingWaits(TorchDispatchMode):
    """Raises for what waits for the device, moves data between it and the host, or draws random numbers on it.

    A CUDA graph cannot capture any of these; in a training step they keep the host from launching the next kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        out = function(*args, **(kwargs or {}))
        given = {x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0}
        made = {x.device for x in pytree.tree_leaves(out) if isinstance(x, Tensor)}
        if len(given | made) > 1:
            raise AssertionError(f"{name} moves data between {given} and {made}")
        if name.startswith("lift_fresh") and DEVICE in made:
            raise AssertionError(f"{name}: a tensor of the device is made from numbers of the host")
        if any(word in name for word in RANDOM):
            raise AssertionError(f"{name} draws random numbers")
        self.num_operations += 1
        return out
