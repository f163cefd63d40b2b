"""What the backward pass computes again instead of remembering it; see `Pi0Config.remat`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils import checkpoint

T = TypeVar("T")

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def rematerialised(layer: Callable[..., T], remat: str, *args: object) -> T:
    """`layer(*args)`, keeping for the backward pass: its inputs (`full`), products with weights as well (`dots`), or
    everything (`none`). Without gradients it is just the call.
    """
    if remat == "none" or not torch.is_grad_enabled():
        return layer(*args)
    if remat == "full":
        return checkpoint.checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, list(_PRODUCTS))
    return checkpoint.checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
