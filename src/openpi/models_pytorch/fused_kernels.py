"""What lies between the products of a transformer layer, in Triton: one kernel where PyTorch launches two to ten.

Numbers are computed in f32 and rounded once. Without gradients.

Legend: b batch, t tokens, d width, f MLP width, h head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi.models_pytorch.attention_kernels import launch

_BLOCK = 1024  # of a row


def norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float, residual: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    """RMS norm of x, or of x + y or x + y * gate, times 1 + scale, plus shift.

    Args:
        x: [b t d], any strides but 1 of the last axis.
        scale: [d], or as shift; shift: [_b _t d], which may be broadcast; None = none.
        residual: y [b t d], and its gate [_b _t d] or None; None = x as it is.
    Returns:
        What was normed and the norm, [b t d], contiguous; without residual the former is x.
    """
    b, t, d = x.shape
    out = torch.empty((b, t, d), dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if residual is not None else x
    y, gate = residual if residual is not None else (None, None)
    others = [x if other is None else other.expand(b, t, d) for other in (y, gate, scale, shift)]
    launch(
        _norm,
        (b * t,),
        *(x, *others, total, out),
        *(t, d, *x.stride()[:2]),
        *(stride for other in others for stride in other.stride()[:2]),
        epsilon,
        WIDTH=triton.next_power_of_2(d),
        HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None,
        HAS_SHIFT=shift is not None,
        num_warps=8 if d >= 2048 else 4,
    )
    return total, out


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with tanh, of [*b 2*f] contiguous: [*b f]."""
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    grid = (out.numel() // width, triton.cdiv(width, _BLOCK))
    launch(_geglu, grid, gate_up, out, width, BLOCK=_BLOCK, num_warps=4)
    return out


def rope(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotary position embedding, halves apart.

    Args:
        x: [b t heads h], any strides but 1 of the last axis.
        sin, cos: f32[b t 1 h/2], of the same strides.
    """
    b, t, heads, h = x.shape
    out = torch.empty((b, t, heads, h), dtype=x.dtype, device=x.device)
    launch(
        _rope,
        (b * t,),
        *(x, sin, cos, out, t, heads, h // 2),
        *x.stride()[:3],
        *sin.expand(b, t, 1, h // 2).stride()[:2],
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(h // 2),
        num_warps=4,
    )
    return out


@triton.jit
def _norm(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, total_ptr, out_ptr, num_tokens, width,
    x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t, shift_b, shift_t, epsilon,
    WIDTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample = row // num_tokens
    token = row % num_tokens
    column = tl.arange(0, WIDTH)
    is_column = column < width
    x = tl.load(x_ptr + sample * x_b + token * x_t + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = tl.load(y_ptr + sample * y_b + token * y_t + column, mask=is_column, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + sample * gate_b + token * gate_t + column, mask=is_column, other=0.0)
            y = y * gate.to(tl.float32)
        rounded = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + column, rounded, mask=is_column)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    scale = tl.load(scale_ptr + sample * scale_b + token * scale_t + column, mask=is_column, other=0.0)
    normed = normed * (1 + scale.to(tl.float32))
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + sample * shift_b + token * shift_t + column, mask=is_column, other=0.0)
        normed += shift.to(tl.float32)
    tl.store(out_ptr + row * width + column, normed.to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _geglu(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    x = tl.load(gate_up_ptr + row * 2 * width + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=is_column, other=0.0).to(tl.float32)
    # tanh(z) = 2 sigmoid(2 z) - 1, so gelu(x) = x sigmoid(2 z).
    gelu = x * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    tl.store(out_ptr + row * width + column, (gelu * up).to(out_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _rope(
    x_ptr, sin_ptr, cos_ptr, out_ptr, num_tokens, num_heads, half, x_b, x_t, x_n, sin_b, sin_t,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample = row // num_tokens
    token = row % num_tokens
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    is_column = column < half
    is_there = (head < num_heads)[:, None] & is_column[None, :]
    angle = sample * sin_b + token * sin_t + column
    sin = tl.load(sin_ptr + angle, mask=is_column, other=0.0)[None, :]
    cos = tl.load(cos_ptr + angle, mask=is_column, other=0.0)[None, :]
    at = x_ptr + sample * x_b + token * x_t + head[:, None] * x_n + column[None, :]
    first = tl.load(at, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=is_there, other=0.0).to(tl.float32)
    to = out_ptr + (row * num_heads + head[:, None]) * 2 * half + column[None, :]
    tl.store(to, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=is_there)
    tl.store(to + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=is_there)
