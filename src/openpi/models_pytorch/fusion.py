"""When the kernels of `fused_kernels` take the place of PyTorch's: on a GPU, for inference that no compiler sees.

`torch.compile` fuses the same, and more, such as the rounding to FP8 that follows. The environment variable
OPENPI_KERNELS=off keeps kernels of ours from being used at all.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from openpi.shared.errors import first_line

KERNELS_VARIABLE = "OPENPI_KERNELS"

logger = logging.getLogger(__name__)


def applies(x: Tensor) -> bool:
    """Whether they are to be used for what is computed from x."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and works_on(x.device)


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether kernels of ours are wanted, and Triton is there and finds what it compiles and links with."""
    if os.environ.get(KERNELS_VARIABLE) == "off":
        return False
    try:
        from openpi.models_pytorch import fused_kernels

        fused_kernels.geglu(torch.ones(1, 32, device=device)).sum()
    except Exception as error:  # what it lacks may be anything from a compiler to a driver
        logger.warning("Triton does not work here, and PyTorch's own kernels run instead: %s", first_line(error))
        return False
    return True
