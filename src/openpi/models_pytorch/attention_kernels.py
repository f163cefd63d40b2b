"""Attention in Triton for wide heads and few rows, which the kernels of libraries leave most of a GPU idle with.

Fifty actions of eight heads that share one key head are 400 rows: seven blocks of 64, for 132 processors. So the keys
are split as well, each program takes some rows and some keys, and a second kernel puts the splits together
(Flash-Decoding). Rows of all query heads that share a key head lie in one block, so its keys are read once.

Legend: b batch, t query tokens, s key tokens, n query heads, k key heads, g = n/k, h head width, r = t*g rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
        rows, keys: of a block.
        split: keys that a program goes through; None = all.
    """

    rows: int
    keys: int
    split: int | None
    warps: int
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys} of {self.split or 'all'}, {self.warps} warps"


_FEW_ROWS = 1024
_LARGE_SHARED = 160 << 10  # A100, H100 and B200 have more; 3090, 4090 and 5090 have 99 KiB


def tilings(rows: int, shared_bytes: int) -> tuple[Tiling, ...]:
    """What is worth a measurement; each is compiled while a server starts, in seconds.

    Args:
        rows: of all heads that share a key head.
        shared_bytes: that a block can have on the card.
    """
    if shared_bytes < _LARGE_SHARED:
        return (Tiling(64, 32, 64, 4), Tiling(64, 32, 128, 8)) if rows <= _FEW_ROWS else (Tiling(64, 32, None, 8),)
    return (Tiling(64, 64, 64, 4), Tiling(64, 64, 128, 8)) if rows <= _FEW_ROWS else (Tiling(64, 64, None, 8),)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v.

    Args:
        q: [b t n h], any strides but 1 of the last axis; k, v: [b s k h]; h a power of two of at least 16.
        bias: [b 1 t s], finite.
    Returns:
        [b t n h], contiguous.
    """
    b, t, n, h = q.shape
    s, num_key_heads = k.shape[1], k.shape[2]
    rows, width = t * (n // num_key_heads), min(tiling.split or s, s)
    splits = triton.cdiv(s, width)
    out = torch.empty((b, t, n, h), dtype=q.dtype, device=q.device)
    is_split = splits > 1
    partial = (
        torch.empty((splits, b * num_key_heads, rows, h), dtype=torch.float32, device=q.device) if is_split else out
    )
    sums = torch.empty((2, splits, b * num_key_heads, rows), dtype=torch.float32, device=q.device)
    biased = q if bias is None else bias
    launch(
        _attend_split,
        (triton.cdiv(rows, tiling.rows), splits, b * num_key_heads),
        *(q, k, v, biased, partial, sums),
        *(rows, s, width, num_key_heads),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *(biased.stride(0), biased.stride(-2)),
        *out.stride()[:3],
        h**-0.5,
        GROUP=n // num_key_heads,
        WIDTH=h,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        HAS_BIAS=bias is not None,
        IS_SPLIT=is_split,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if is_split:
        launch(
            _join_splits,
            (rows, b * num_key_heads),
            *(partial, sums, out, splits, num_key_heads),
            *out.stride()[:3],
            GROUP=n // num_key_heads,
            WIDTH=h,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Its parameters are not what Python sees: of the tiling, the compiler's options, pointers for tensors."""
    kernel[grid](*args, **options)


@triton.jit
def _attend_split(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, sums_ptr,
    rows, num_keys, split, num_key_heads,
    q_b, q_t, q_n, k_b, k_s, k_k, v_b, v_s, v_k, bias_b, bias_t, out_b, out_t, out_n,
    scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """A block of rows over one split of the keys: outputs, or, of several splits, sums that are yet to be divided."""
    part = tl.program_id(1)
    of_head = tl.program_id(2)
    sample = of_head // num_key_heads
    key_head = of_head % num_key_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = key_head * GROUP + row % GROUP
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    q = tl.load(
        q_ptr + sample * q_b + token[:, None] * q_t + head[:, None] * q_n + column[None, :],
        mask=is_row[:, None],
        other=0.0,
    )
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    first = part * split
    end = tl.minimum(first + split, num_keys)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        k = tl.load(
            k_ptr + sample * k_b + key_head * k_k + key[:, None] * k_s + column[None, :],
            mask=is_key[:, None],
            other=0.0,
        )
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_BIAS:
            place = bias_ptr + sample * bias_b + token[:, None] * bias_t + key[None, :]
            logits += tl.load(place, mask=is_row[:, None] & is_key[None, :], other=0.0).to(tl.float32)
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp(highest - higher)
        weights = tl.exp(logits - higher[:, None])
        v = tl.load(
            v_ptr + sample * v_b + key_head * v_k + key[:, None] * v_s + column[None, :],
            mask=is_key[:, None],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    if IS_SPLIT:
        num_heads = tl.num_programs(2)
        at = (part * num_heads + of_head) * rows + row
        tl.store(out_ptr + at[:, None] * WIDTH + column[None, :], mixed, mask=is_row[:, None])
        tl.store(sums_ptr + at, highest, mask=is_row)
        tl.store(sums_ptr + tl.num_programs(1) * num_heads * rows + at, total, mask=is_row)
    else:
        place = out_ptr + sample * out_b + token[:, None] * out_t + head[:, None] * out_n + column[None, :]
        tl.store(place, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _join_splits(
    partial_ptr, sums_ptr, out_ptr, splits, num_key_heads, out_b, out_t, out_n,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    of_head = tl.program_id(1)
    rows = tl.num_programs(0)
    num_heads = tl.num_programs(1)
    part = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    is_part = part < splits
    at = (part * num_heads + of_head) * rows + row
    highest = tl.load(sums_ptr + at, mask=is_part, other=float("-inf"))
    total = tl.load(sums_ptr + splits * num_heads * rows + at, mask=is_part, other=0.0)
    weights = tl.exp(highest - tl.max(highest, 0))
    mixed = tl.load(partial_ptr + at[:, None] * WIDTH + column[None, :], mask=is_part[:, None], other=0.0)
    joined = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights, 0)  # type: ignore[operator]
    head = (of_head % num_key_heads) * GROUP + row % GROUP
    place = out_ptr + (of_head // num_key_heads) * out_b + (row // GROUP) * out_t + head * out_n + column
    tl.store(place, joined.to(out_ptr.dtype.element_ty))
