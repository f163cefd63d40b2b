"""Attention by whatever is fastest on a GPU, for inference: chosen for each shape by a measurement, while warming up.

Which kernel wins depends on the card, the libraries, and the shapes: heads are 256 wide here, all query heads share one
key head, and the rows are 50 actions or 968 tokens. A candidate that does not run there, or whose result differs from
the plain one, is left out; without a measurement the plain one is used.

Legend: b batch, t query tokens, s key tokens, n query heads, k key heads, h head width.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi.models_pytorch import fusion
from openpi.shared.errors import first_line

logger = logging.getLogger(__name__)

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # as `plain`

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative to the largest output
PLAIN = "plain"
_ROUNDS, _CALLS = 3, 20
_HEAD_START = 5_000_000  # clocks that the device idles, 2 or 3 ms, in which the host launches the calls

_chosen: dict[Any, Attention] = {}
_measures = threading.local()


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Within, in this thread, shapes that come for the first time are measured."""
    _measures.is_on = True
    try:
        yield
    finally:
        _measures.is_on = False


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(h) + bias) v; query head i uses key head i // (n/k).

    Args:
        q: f[b t n h]; k, v: f[b s k h].
        bias: f[b 1 t s], finite; None = nothing is masked.
    Returns:
        f[b t n h].
    """
    q, k, v = _heads_first(q, k, v)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=k.shape[1] != q.shape[1])
    return mixed.transpose(1, 2)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f[b _ n h]; a single key head as many times as there are queries': not all kernels know of fewer. Views."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if k.shape[1] == 1:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return q, k, v


# PyTorch's own kernels by name: switches that choose between them are the whole process's, in which others infer.


def cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    heads, bias = _heads_first(q, k, v), None if bias is None else bias.expand(-1, q.shape[2], -1, -1)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, bias, False)[0].transpose(1, 2)


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    heads, bias = _heads_first(q, k, v), None if bias is None else bias.expand(-1, q.shape[2], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*heads, bias, False)[0].transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    assert bias is None, "it knows no mask"
    return torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))[0].transpose(1, 2)


def folded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Two products for all heads together, which one key head allows; the softmax in f32."""
    b, t, n, h = q.shape
    logits = torch.matmul(q.reshape(b, t * n, h), k[:, :, 0].transpose(1, 2)).view(b, t, n, -1).float() * h**-0.5
    if bias is not None:
        logits = logits + bias[:, 0, :, None]
    weights = torch.softmax(logits, dim=-1).to(v.dtype)
    return torch.matmul(weights.view(b, t * n, -1), v[:, :, 0]).view(b, t, n, h)


def candidates(q: Tensor, k: Tensor, bias: Tensor | None) -> dict[str, Attention]:
    """By name; the plain one first."""
    found: dict[str, Attention] = {PLAIN: plain, "cuDNN": cudnn, "efficient": efficient}
    if bias is None:
        found["flash"] = flash
    num_key_heads, rows = k.shape[2], q.shape[1] * q.shape[2] // k.shape[2]
    if num_key_heads == 1:
        found["folded"] = folded
    h = q.shape[3]
    if q.is_cuda and fusion.works_on(q.device) and h >= 16 and h & (h - 1) == 0:
        from openpi.models_pytorch import attention_kernels as kernels

        shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
        for tiling in kernels.tilings(rows, shared):
            found[f"triton {tiling}"] = functools.partial(kernels.attend, tiling=tiling)
    return found


def choose(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[str, Attention]:
    """The fastest candidate that computes the same as the plain one."""
    found, expected, times = candidates(q, k, bias), plain(q, k, v, bias).float(), {}
    limit = TOLERANCE[q.dtype] * float(expected.abs().amax())
    for name, candidate in found.items():
        try:
            error = float((candidate(q, k, v, bias).float() - expected).abs().amax())
            if error <= limit:
                times[name] = _seconds(lambda candidate=candidate: candidate(q, k, v, bias), q.device)
            else:
                logger.info("attention by %s is off by %.2g, and is left out", name, error)
        except Exception as error:  # whatever a library or a compiler raises where its kernel does not run
            logger.debug("attention by %s does not run here: %s", name, first_line(error))
    best = min(times, key=lambda name: times[name])
    told = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in sorted(times.items(), key=lambda pair: pair[1]))
    logger.info("attention of %s to %s: by %s (us: %s)", tuple(q.shape), tuple(k.shape), best, told)
    return best, found[best]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of some rounds, without the host's share where it is a GPU."""
    if device.type != "cuda":
        return min(_elapsed(call) for _ in range(_ROUNDS))
    rounds = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / _CALLS)
    return min(rounds)


def _elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _signature(q: Tensor, k: Tensor, bias: Tensor | None) -> object:
    return q.shape, k.shape, q.dtype, q.device, bias is None


@torch.library.custom_op(
    "openpi::attend", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? bias) -> Tensor"
)
def fastest(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As `plain`, without gradients, by what was chosen for these shapes. One operation for a compiler."""
    signature = _signature(q, k, bias)
    if signature not in _chosen and getattr(_measures, "is_on", False):
        _chosen[signature] = choose(q, k, v, bias)[1]
    return _chosen.get(signature, plain)(q, k, v, bias).contiguous()


@fastest.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    del k, v, bias
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As `plain`; on a GPU, where no gradients are wanted, by the fastest."""
    if q.is_cuda and not torch.is_grad_enabled():
        return fastest(q, k, v, bias)
    return plain(q, k, v, bias)
