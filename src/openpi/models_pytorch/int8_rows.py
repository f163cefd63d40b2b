"""Frozen matrices in eight bits: integers, and for each row a step between them that is a power of two.

A row's largest number is from 64 to 127 steps. bfloat16 holds every such number exactly, so what is trained with,
saved, read again and served are the same numbers, and decoded numbers have the codes that they were decoded from.

Legend: i inputs, o outputs (rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")

LARGEST = 127
_aten: Any = torch.ops.aten


def encoded(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8[o i] and steps bfloat16[o 1] of a matrix f[o i]."""
    largest = values.detach().float().abs().amax(dim=1, keepdim=True)
    # Of x = m 2^e with m in [1/2, 1), the step 2^(e-7) makes 128 m; where that rounds to 128, the next one is taken.
    steps = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 7)
    steps = torch.where((largest / steps).round() > LARGEST, 2 * steps, steps).bfloat16()
    steps = torch.where(steps == 0, 1, steps)  # a row of zeros, or of what bfloat16 takes for zero
    steps = torch.where(largest.isfinite(), steps, torch.nan)  # what is no number is not made one
    return (values.detach().float() / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8), steps


class Int8Rows(Tensor):
    """A matrix that is bfloat16[o i] to all who ask, without gradients; copying into it encodes, by whole rows.

    What is computed from it is computed from its numbers in bfloat16, which are made anew for each product, forwards
    and backwards, and kept by none.
    """

    codes: Tensor
    steps: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, steps: Tensor) -> Int8Rows:
        # How tensors of other tensors are made, says PyTorch; its stubs have left it out.
        made: Any = Tensor._make_wrapper_subclass  # type: ignore[reportAttributeAccessIssue]
        return made(cls, codes.shape, strides=codes.stride(), dtype=steps.dtype, device=codes.device)

    def __init__(self, codes: Tensor, steps: Tensor) -> None:
        """
        Args:
            codes: int8[o i] or its transpose; steps: bfloat16[o 1], or its.
        """
        self.codes, self.steps = codes, steps

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, *, device: torch.device | str) -> Int8Rows:
        """With any values."""
        codes = torch.empty(num_rows, num_columns, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(num_rows, 1, dtype=torch.bfloat16, device=device))

    def decoded(self) -> Tensor:
        return self.codes.to(self.steps.dtype) * self.steps

    def map(self, function: Callable[[Tensor], Tensor]) -> Int8Rows:
        return Int8Rows(function(self.codes), function(self.steps))

    def __repr__(self, **_options: object) -> str:
        return f"Int8Rows({', '.join(map(str, self.shape))}, device={self.device})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        own = _OWN.get(func)
        if own is not None:
            return own(*args, **(kwargs or {}))
        # In lists, too, and as `out`: what is decoded for it would be changed, and forgotten.
        written = tree_leaves((args[:1], (kwargs or {}).get("out"))) if func._schema.is_mutable else []
        if any(isinstance(x, cls) for x in written):
            raise NotImplementedError(f"{func} would change a frozen matrix of eight bits, which takes `copy_` only")
        plain_args, plain_kwargs = tree_map(_plain, (tuple(args), dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)

    # For the compiler, to which it is its two tensors.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "steps"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], _context: None, _size: object, _stride: object) -> Int8Rows:
        return Int8Rows(inner["codes"], inner["steps"])


def _plain(x: T) -> T | Tensor:
    return x.decoded() if isinstance(x, Int8Rows) else x


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Rows):
        return target.copy_(_plain(source), non_blocking)
    both = (source.codes, source.steps) if isinstance(source, Int8Rows) else encoded(source.to(target.device))
    target.codes.copy_(both[0])
    target.steps.copy_(both[1])
    return target


def _embedding(weight: Int8Rows, indices: Tensor, *_options: object) -> Tensor:
    """Only of the rows that are asked for."""
    return weight.map(lambda x: x[indices.flatten()]).decoded().unflatten(0, indices.shape)


def _norms(tensors: Sequence[Tensor], *args: object, **kwargs: object) -> list[Tensor]:
    """One after another: decoded, all of them would take the memory that is to be saved."""
    return [_aten._foreach_norm.Scalar([_plain(x)], *args, **kwargs)[0] for x in tensors]


_OWN: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: lambda x: x.map(torch.detach),
    _aten.t.default: lambda x: x.map(torch.t),
    _aten.slice.Tensor: lambda x, dim=0, *place: (
        x.map(lambda part: _aten.slice.Tensor(part, dim, *place))
        if dim == 0
        else _aten.slice.Tensor(x.decoded(), dim, *place)
    ),
    _aten.empty_like.default: lambda x, device=None, **_options: x.map(
        lambda part: torch.empty_like(part, device=device)
    ),
    _aten.copy_.default: _copy,
    _aten.embedding.default: _embedding,
    _aten._foreach_norm.Scalar: _norms,
}
