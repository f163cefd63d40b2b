"""AdamW with moments of eight bits: the codes of `adam_8bit`, which explains them, in PyTorch.

Weights that are kept in bfloat16 are rounded at random, so that they are right on average: most steps of a fine-tune
are smaller than half of what bfloat16 can tell, and rounded to the nearest none of them would count.

Of parameters that are split over devices each device codes its own rows: blocks lie along the last axis, which is not
split. Vectors stay in f32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openpi.training.backends.pytorch.parallel import local, part_of

BLOCK = 256
MIN_SIZE = 4096  # of a parameter; below it, codes save nothing worth having
_ELEMENTS_AT_ONCE = 2**24  # what an update computes with takes ten times their bytes, and a token table has 5e8


class AdamW8bit(torch.optim.Optimizer):
    """As `torch.optim.AdamW`; each step computes in f32 and rounds what it keeps."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._numbers = {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # there is no closure
        del closure
        for group in self.param_groups:
            for param in [param for param in group["params"] if param.grad is not None]:
                self._update(param, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})

    def _update(
        self, param: torch.nn.Parameter, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        state = self.state[param]
        if not state:
            state |= {"step": torch.tensor(0.0), **_zeros(param, "exp_avg"), **_zeros(param, "exp_avg_sq")}
        state["step"] += 1
        step = int(state["step"].item())
        b1, b2 = betas
        assert param.grad is not None
        all_values = _rows(local(param))
        all_grads = local(param.grad).reshape(all_values.shape)
        slots = {name: _rows(local(tensor)) for name, tensor in state.items() if name != "step"}
        rounding = torch.Generator(all_values.device).manual_seed(self._seed(param, step))
        num_rows = max(1, _ELEMENTS_AT_ONCE // param.shape[-1])
        for start in range(0, len(all_values), num_rows):
            some = slice(start, start + num_rows)
            values, grad, moments = all_values[some], all_grads[some].float(), {k: x[some] for k, x in slots.items()}
            mean = b1 * _decoded(moments, "exp_avg") + (1 - b1) * grad
            square = b2 * _decoded(moments, "exp_avg_sq") + (1 - b2) * grad.square()
            change = (mean / (1 - b1**step)) / ((square / (1 - b2**step)).sqrt() + eps)
            move = lr * (change + weight_decay * values.float())
            if values.dtype == torch.bfloat16:
                values.copy_(rounded(values.float() - move, rounding))
            else:
                values.sub_(move)
            _remember(moments, "exp_avg", mean, rounding)
            _remember(moments, "exp_avg_sq", square, rounding)

    def _seed(self, param: torch.nn.Parameter, step: int) -> int:
        """Of the rounding: the same in every run, and on every device that holds the same part of the parameter."""
        number = self._numbers[param]
        part = param.device_mesh.get_local_rank(param.device_mesh.ndim - 1) if isinstance(param, DTensor) else 0
        # A processor's generator takes 32 bits of a seed and forgets the others.
        return zlib.crc32(f"{step}/{part}/{number}".encode())


def _rows(tensor: Tensor) -> Tensor:
    """As a matrix, its last axis kept; the same memory."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor[None]


def _zeros(param: Tensor, name: str) -> dict[str, Tensor]:
    if not is_coded(param):
        return {name: torch.zeros_like(param, dtype=torch.float32)}
    size = math.gcd(param.shape[-1], BLOCK)
    scales = part_of(param, local(param).new_zeros((*local(param).shape[:-1], param.shape[-1] // size)).float())
    dtype = torch.uint8 if name == "exp_avg_sq" else torch.int8
    return {f"{name}_codes": torch.zeros_like(param, dtype=dtype), f"{name}_scales": scales}


def moment_bytes(shape: tuple[int, ...]) -> int:
    """What one moment of a parameter takes."""
    size = math.prod(shape)
    if len(shape) < 2 or size < MIN_SIZE:
        return 4 * size
    return size + 4 * size // math.gcd(shape[-1], BLOCK)


def is_coded(param: Tensor) -> bool:
    """Whether a parameter's moments are codes."""
    return param.ndim > 1 and param.numel() >= MIN_SIZE


def _decoded(state: dict[str, Tensor], name: str) -> Tensor:
    return state[name] if name in state else decode(state[f"{name}_codes"], state[f"{name}_scales"])


def _remember(state: dict[str, Tensor], name: str, values: Tensor, rounding: torch.Generator) -> None:
    if name in state:
        state[name].copy_(values)
        return
    codes, scales = encode(values, rounding, is_squares=name == "exp_avg_sq")
    state[f"{name}_codes"].copy_(codes)
    state[f"{name}_scales"].copy_(scales)


def encode(values: Tensor, rounding: torch.Generator, *, is_squares: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of f32 values; none but zero becomes zero where they are squares, which get divided by."""
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=-1)
    shares = blocks.abs() / torch.where(scales == 0, 1, scales)[..., None]
    top, power = (255, 4) if is_squares else (127, 2)
    below = (top * shares ** (1 / power)).floor().clamp(0, top - 1)
    low, high = (below / top) ** power, ((below + 1) / top) ** power
    # Up with the probability that makes the decoded value right on average.
    chance = torch.rand(shares.shape, generator=rounding, device=shares.device)
    magnitudes = below + (chance < (shares - low) / (high - low))
    if is_squares:
        codes = torch.maximum(magnitudes, (shares > 0).float()).to(torch.uint8)
    else:
        codes = (blocks.sign() * magnitudes).to(torch.int8)
    return codes.reshape(values.shape), scales


def rounded(values: Tensor, rounding: torch.Generator) -> Tensor:
    """bfloat16 of f32 values: of the two beside each, one by chance, in proportion to how near it is."""
    bits = values.contiguous().view(torch.int32)
    below = torch.randint(0, 1 << 16, bits.shape, generator=rounding, device=bits.device, dtype=torch.int32)
    # bfloat16 is the upper half of an f32; a carry out of the lower half rounds away from zero.
    return ((bits + below) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """f32 values of codes."""
    is_squares = codes.dtype == torch.uint8
    blocks = _blocks(codes).float()
    shares = (blocks / 255) ** 4 if is_squares else blocks.sign() * (blocks / 127).square()
    return (shares * scales[..., None]).reshape(codes.shape)


def _blocks(values: Tensor) -> Tensor:
    """[..., n] -> [..., blocks, size]: as many neighbours as divide the axis and `BLOCK`."""
    size = math.gcd(values.shape[-1], BLOCK)
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
