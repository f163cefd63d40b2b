"""Products in 8-bit floating point (W8A8, e4m3): weights and inputs both, each with one scale that is known beforehand.

Cards from Ada and Hopper on multiply it twice as fast as bfloat16, and read half the bytes. Numbers keep 3 bits of
mantissa over 15 binades, so one scale for a whole tensor costs little: what it shifts is where zero begins.

Legend: b batch, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from openpi.models_pytorch.fp8_file import Layer
from openpi.models_pytorch.siglip import Linear

CODE = torch.float8_e4m3fn
LARGEST = 448.0  # of its finite numbers
# So much larger than all that was seen may inputs be before they are clipped. It takes one of 15 binades.
HEADROOM = 2.0
ALIGNED = 16  # numbers of inputs and outputs that a product in FP8 can have are multiples
_WEIGHTS_DIFFER = 1e-2  # relative; the same weights on another device differ by less


class Fp8Linear(nn.Module):
    """A `Linear` without gradients whose product is made in FP8, summed in f32.

    Where gradients are enabled (real-time chunking with `vjp`), it multiplies its weights in the dtype of the input.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Linear, amax: float) -> None:
        """
        Args:
            amax: of inputs that were seen.
        """
        super().__init__()
        weight = linear.weight.detach().float()
        scale = torch.as_tensor(amax * HEADROOM / LARGEST, dtype=torch.float32, device=weight.device)
        weight_scale = (weight.abs().amax() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", encoded(weight, weight_scale))
        self.register_buffer("scale", scale)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled():
            return F.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype), bias)
        rows = encoded(x.flatten(0, -2), self.scale)
        if x.device.type == "cpu":
            y = self._summed_in_f32(rows, bias).to(x.dtype)
        else:
            y = self._scaled(rows, bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])

    def _scaled(self, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = torch._scaled_mm(  # type: ignore[reportPrivateImportUsage]
            rows,
            self.weight.t(),
            scale_a=self.scale,
            scale_b=self.weight_scale,
            bias=None if dtype == torch.float32 else bias,  # which it does not add in f32
            out_dtype=dtype,
            use_fast_accum=True,
        )
        return y if bias is None or dtype != torch.float32 else y + bias

    def _summed_in_f32(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """The same, where the library's product in FP8 is a loop over single numbers (hundreds of times slower)."""
        y = F.linear(rows.float(), self.weight.float()) * (self.scale * self.weight_scale)
        return y if bias is None else y + bias.float()


def encoded(x: Tensor, scale: Tensor) -> Tensor:
    """As e4m3; what does not fit is clipped, where a plain conversion may write NaN."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(CODE)


def candidates(model: nn.Module) -> dict[str, Linear]:
    """The products of a model that can be made in FP8: those of the transformers' attention and MLPs, once fused.

    Projections of state, actions and time, embeddings and norms stay as they are: they are small, and sensitive.
    """
    parts = (".self_attn.", ".mlp.")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and any(part in name for part in parts)
        and not any(size % ALIGNED for size in module.weight.shape)
    }


def quantize(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Replaces products by those in FP8, in place.

    Raises:
        ValueError: the layers are not those of this model, or of other weights.
    """
    found = candidates(model)
    unknown = sorted(layers.keys() - found.keys())
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the layers that were calibrated for FP8 are not of this model, such as '{unknown[0]}'; "
            "calibrate this checkpoint with its own recipe: `openpi calibrate-fp8`"
        )
    for name, layer in layers.items():
        amax = float(found[name].weight.detach().abs().amax())
        if abs(amax - layer.weight_amax) > _WEIGHTS_DIFFER * layer.weight_amax:
            raise ValueError(
                f"the largest weight of '{name}' is {amax:.4g}, and was {layer.weight_amax:.4g} when the inputs of its "
                "layers were measured: that was another checkpoint. Calibrate this one: `openpi calibrate-fp8`"
            )
    for name, layer in layers.items():
        set_module(model, name, Fp8Linear(found[name], layer.amax))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def check_device(device: torch.device) -> None:
    """Processors make the same products, slowly.

    Raises:
        ValueError: the GPU knows no FP8.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; FP8 needs "
            "8.9 or later (Ada, Hopper, Blackwell). Serve without FP8"
        )
