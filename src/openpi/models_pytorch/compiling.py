"""`torch.compile` as it is used here: whole functions, a program for each shape, however many shapes there are."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from openpi.models_pytorch import gemma, siglip

Backend = str | Callable[..., Any]  # as of `torch.compile`

# Of one function. Shapes are few by design (`openpi.models.compact`, batch sizes that are warmed up), but more than the
# eight after which PyTorch would stop to compile, or, as no part may stay behind, fail.
_MAX_PROGRAMS = 1024


def compiled(function: Callable[..., object], *, backend: Backend = "inductor", mode: str | None = None) -> Any:
    """`function`, compiled when it is called with new shapes.

    Args:
        backend: what makes the programs; `aot_eager` and `eager` trace, and run what they have traced.
        mode: of `inductor`.
    Raises:
        torch._dynamo.exc.Unsupported: (when called) a part of the function cannot be compiled.
    """
    options: dict[str, Any] = {"mode": mode} if backend == "inductor" else {}
    program = torch.compile(function, backend=backend, dynamic=False, fullgraph=True, **options)

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        # These hold in the thread that sets them. DDP's own splitting of programs is for whole models: ours are blocks.
        with torch._dynamo.config.patch(
            recompile_limit=_MAX_PROGRAMS, accumulated_recompile_limit=_MAX_PROGRAMS, optimize_ddp=False
        ):
            return program(*args, **kwargs)

    return call


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Where programs of its own, and the minutes to make them, are not worth it. Compiled functions run as written."""
    # The compiler takes seconds to import; who has compiled anything has done so.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def compile_blocks(model: nn.Module, *, backend: Backend = "inductor") -> None:
    """Compiles the transformer blocks in place, with what they compute again in the backward pass. All blocks of a kind
    share their programs. Hooks, such as those of FSDP, stay outside.
    """
    for module in model.modules():
        if isinstance(module, (gemma.Block, siglip.Block)):
            module.forward = compiled(module.forward, backend=backend)
