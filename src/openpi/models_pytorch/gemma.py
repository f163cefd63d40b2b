"""Gemma for any number of experts that attend jointly: pi0, pi0.5 (two experts) and pi0-FAST (one).

The PyTorch twin of `openpi.models.gemma`. A block holds one layer of every expert, so that it is the unit that is
rematerialised, sharded (FSDP) and compiled. Source: the model specification, sections 4, 5.1 and 9.

Legend: b batch, t query tokens, s key tokens, d model width, n query heads, k key/value heads, g = n/k, h head width,
f MLP width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from openpi.models.gemma_config import GemmaConfig
from openpi.models_pytorch import attention, fusion
from openpi.models_pytorch.lora import DenseAdapter, HeadsAdapter, OutAdapter
from openpi.models_pytorch.remat import rematerialised
from openpi.models_pytorch.siglip import Linear

# Per layer, keys (after RoPE) and values [b s k h].
KVCache = list[tuple[Tensor, Tensor]]

# The most negative finite value the published models were trained with; a row that is masked everywhere then
# attends uniformly instead of turning into NaN.
MASKED_LOGIT = -2.3819763e38
NORM_EPSILON = 1e-6
ROPE_BASE = 10_000


class Modulations(NamedTuple):
    """What the adaptive norms of an expert make of a condition, which the whole batch may share; takes its place.

    Attributes:
        layers: f[l 2 _b _t 3*d], of the norms before attention and before the MLP.
        final: f[_b _t 3*d].
    """

    layers: Tensor
    final: Tensor


# Of an expert's norms: f[b d], or f[b t d] of each token, or its modulations; None = they are plain.
Condition = Tensor | Modulations | None


class Places(NamedTuple):
    """Where the tokens of a pass stand, and what they may attend to; all layers share it.

    Attributes:
        sin, cos: of the rotary position embedding, f32[b t 1 h/2].
        bias: f[b 1 t s], added to the logits of every head.
    """

    sin: Tensor
    cos: Tensor
    bias: Tensor


class Gemma(nn.Module):
    """The `llm` subtree: the token table of the first expert, and the layers and final norms of all.

    Args:
        adaptive: per expert, whether its norms are adaptive.
    """

    def __init__(self, configs: Sequence[GemmaConfig], *, adaptive: Sequence[bool]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(configs[0].vocab_size, configs[0].width)
        self.blocks: Any = nn.ModuleList(Block(configs, adaptive) for _ in range(configs[0].depth))
        pairs = zip(configs, adaptive, strict=True)
        self.norms: Any = nn.ModuleList(RMSNorm(config.width, is_adaptive=is_adaptive) for config, is_adaptive in pairs)

    def forward(
        self,
        embedded: Sequence[Float[Tensor, "b _t _d"] | None],
        places: Places,
        *,
        adarms_cond: Sequence[Condition] | None = None,
        kv_cache: KVCache | None = None,
        slots: Int[Tensor, " t"] | None = None,
        unread: Sequence[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        remat: str = "full",
    ) -> tuple[list[Tensor | None], KVCache]:
        """Runs the experts over their tokens; in every layer each token attends to those of all experts.

        Args:
            embedded: tokens of each expert, concatenated in this order for attention; None = expert absent.
            places: of the concatenated tokens, see `places`; keys are cached ones first, then the new ones.
            adarms_cond: condition of each expert's adaptive norms.
            kv_cache: keys and values of earlier tokens.
            slots: int64, places in the cache that the new keys and values are written to, in place; None = they are
                appended.
            unread: per expert, how many of its first tokens have outputs that nobody reads: the last layer computes
                only their keys and values. None = all outputs are read.
        Returns:
            Outputs after each expert's final norm (None where absent or wholly unread, meaningless for unread tokens),
            and the cache with the new keys.
        Raises:
            ValueError: the mask does not cover the cached and the new tokens.
        """
        xs = [None if x is None else x.to(dtype) for x in embedded]
        conds = list(adarms_cond) if adarms_cond is not None else [None] * len(xs)
        skipped = list(unread) if unread is not None else [0] * len(xs)
        num_new = sum(x.shape[1] for x in xs if x is not None)
        num_cached = kv_cache[0][0].shape[1] if kv_cache is not None else 0
        num_keys = num_cached if slots is not None else num_cached + num_new
        covered = places.bias.shape[2:]
        if covered != (num_new, num_keys):
            raise ValueError(f"the attention mask is of {tuple(covered)} (queries, keys), expected {num_new, num_keys}")
        cache: KVCache = []
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            earlier = None if kv_cache is None else kv_cache[i]
            first_read = skipped if is_last else [0] * len(xs)
            of_layer = [cond.layers[i] if isinstance(cond, Modulations) else cond for cond in conds]
            xs, keys_values = block(xs, places, of_layer, earlier, slots, first_read, remat=remat)
            cache.append(keys_values)
        of_final = [cond.final if isinstance(cond, Modulations) else cond for cond in conds]
        final = [
            None if x is None or x.shape[1] == count else norm(x, cond)[0]
            for norm, x, cond, count in zip(self.norms, xs, of_final, skipped, strict=True)
        ]
        return final, cache

    def places(self, positions: Int[Tensor, "b t"], mask: Bool[Tensor, "b t s"], dtype: torch.dtype) -> Places:
        """Of tokens at RoPE `positions`.

        Args:
            mask: true where a query may attend to a key.
            dtype: of the activations.
        """
        return Places(*rotations(positions, self.blocks[0].head_dim), additive(mask, dtype))

    def modulations(self, expert: int, cond: Float[Tensor, "b t d"]) -> Modulations:
        """What an expert's adaptive norms make of a condition; `forward` takes it in the condition's place."""
        layers = [block.experts[expert] for block in self.blocks]
        pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        stacked = [torch.stack([norm.modulation(cond) for norm in pair]) for pair in pairs]
        return Modulations(torch.stack(stacked), self.norms[expert].modulation(cond))


class Block(nn.Module):
    """One layer of every expert: norm, keys and values of all, then each expert's own tokens; no post-norms."""

    def __init__(self, configs: Sequence[GemmaConfig], adaptive: Sequence[bool]) -> None:
        super().__init__()
        self.head_dim = configs[0].head_dim
        self.experts: Any = nn.ModuleList(Layer(*pair) for pair in zip(configs, adaptive, strict=True))

    def forward(
        self,
        xs: Sequence[Float[Tensor, "b _t _d"] | None],
        places: Places,
        conds: Sequence[Tensor | None],
        cache: tuple[Tensor, Tensor] | None,
        slots: Int[Tensor, " t"] | None,
        first_read: Sequence[int],
        *,
        remat: str,
    ) -> tuple[list[Tensor | None], tuple[Tensor, Tensor]]:
        """
        Args:
            conds: of each expert, the condition f[b d] or f[b t d], or its modulations f[2 _b _t 3*d] in this layer.
            first_read: of each expert, the first token whose output is read; those before stay as they are.
        """
        return rematerialised(self._run, remat, xs, places, conds, cache, slots, first_read)

    def _run(
        self,
        xs: Sequence[Float[Tensor, "b _t _d"] | None],
        places: Places,
        conds: Sequence[Tensor | None],
        cache: tuple[Tensor, Tensor] | None,
        slots: Int[Tensor, " t"] | None,
        first_read: Sequence[int],
    ) -> tuple[list[Tensor | None], tuple[Tensor, Tensor]]:
        present = [i for i, x in enumerate(xs) if x is not None]
        before, after = zip(*map(_of_norms, conds), strict=True)
        ends = list(itertools.accumulate(0 if x is None else x.shape[1] for x in xs))
        qkv, gates = {}, {}
        for i in present:
            x = xs[i]
            assert x is not None
            rows = slice(ends[i] - x.shape[1], ends[i])
            normed, gates[i] = self.experts[i].input_layernorm(x, before[i])
            qkv[i] = self.experts[i].self_attn.project(normed, places.sin[:, rows], places.cos[:, rows], first_read[i])
        k, v = (_joined([qkv[i][part] for i in present]) for part in (1, 2))
        if cache is not None:
            k, v = _remember(cache[0], k, slots), _remember(cache[1], v, slots)

        outs: list[Tensor | None] = list(xs)
        for i in present:
            x, first, expert = xs[i], first_read[i], self.experts[i]
            assert x is not None
            if first == x.shape[1]:
                continue
            rows = slice(ends[i] - x.shape[1] + first, ends[i])
            mixed = expert.self_attn.o_proj(attend(qkv[i][0], k, v, places.bias[:, :, rows]))
            y, inner, gate = expert.post_attention_layernorm.of_sum(x[:, first:], mixed, gates[i], after[i])
            y = _residual(y, expert.mlp(inner), gate)
            outs[i] = torch.cat([x[:, :first], y], dim=1) if first else y
        return outs, (k, v)


class Layer(nn.Module):
    """One expert's weights of a layer; `Block` runs them."""

    def __init__(self, config: GemmaConfig, is_adaptive: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, is_adaptive=is_adaptive)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, is_adaptive=is_adaptive)
        self.mlp = Mlp(config)


class Attention(nn.Module):
    """The projections of one expert."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        d, n, k, h, lora = config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.attn_lora
        self.num_heads, self.num_kv_heads, self.head_dim = n, k, h
        adapters = [None if lora is None else HeadsAdapter(heads, d, h, lora) for heads in (n, k, k)]
        self.q_proj = AdaptedLinear(d, n * h, adapters[0])
        self.k_proj = AdaptedLinear(d, k * h, adapters[1])
        self.v_proj = AdaptedLinear(d, k * h, adapters[2])
        self.o_proj: Linear = AdaptedLinear(n * h, d, None if lora is None else OutAdapter(n, h, d, lora))
        self.qkv_proj: Linear | None = None

    def fuse(self) -> None:
        """Makes one weight of three: one product instead of three, for inference. Adapters are merged."""
        self.qkv_proj = fused(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = fused(self.o_proj)
        del self.q_proj, self.k_proj, self.v_proj

    def project(
        self, x: Float[Tensor, "b t d"], sin: Tensor, cos: Tensor, first_read: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [b t-first_read n h] and keys [b t k h], and values [b t k h]."""

        def heads(y: Tensor) -> Float[Tensor, "b t _n h"]:
            return y.unflatten(-1, (-1, self.head_dim))

        if self.qkv_proj is None:
            q = rope(heads(self.q_proj(x[:, first_read:])), sin[:, first_read:], cos[:, first_read:])
            return q, rope(heads(self.k_proj(x)), sin, cos), heads(self.v_proj(x))
        # Queries and keys lie side by side: one rotation does for both.
        qk, v = heads(self.qkv_proj(x)).split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        q, k = rope(qk, sin, cos).split([self.num_heads, self.num_kv_heads], dim=2)
        return q[:, first_read:], k, v


class Mlp(nn.Module):
    """GeGLU: `gelu(x W_gate) * (x W_up) W_out`, without biases."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        d, f, lora = config.width, config.mlp_dim, config.ffn_lora

        def linear(i: int, o: int) -> AdaptedLinear:
            return AdaptedLinear(i, o, None if lora is None else DenseAdapter(i, o, lora))

        self.gate_proj, self.up_proj = linear(d, f), linear(d, f)
        self.down_proj: Linear = linear(f, d)
        self.gate_up_proj: Linear | None = None

    def fuse(self) -> None:
        """As of `Attention`."""
        self.gate_up_proj = fused(self.gate_proj, self.up_proj)
        self.down_proj = fused(self.down_proj)
        del self.gate_proj, self.up_proj

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if self.gate_up_proj is not None:
            return self.down_proj(geglu(self.gate_up_proj(x)))
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class AdaptedLinear(Linear):
    """A weight without bias, and its adapter if it has one."""

    def __init__(self, in_features: int, out_features: int, lora: nn.Module | None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.lora: Any = lora

    def forward(self, x: Float[Tensor, "b t i"]) -> Float[Tensor, "b t o"]:
        y = super().forward(x)
        return y if self.lora is None else y + self.lora(x)

    def merged_weight(self) -> Float[Tensor, "o i"]:
        """The weight with its adapter's update, added in f32, in the weight's dtype."""
        if self.lora is None:
            return self.weight.detach()
        return (self.weight.detach().float() + self.lora.update().T).to(self.weight.dtype)


def fused(*linears: Any) -> Linear:
    """One layer that gives the outputs of several side by side, their adapters merged into it."""
    weights = [linear.merged_weight() for linear in linears]
    one = Linear(weights[0].shape[1], sum(len(weight) for weight in weights), bias=False)
    one.weight = nn.Parameter(_joined(weights, dim=0), requires_grad=False)
    return one


class RMSNorm(nn.Module):
    """RMS norm; if adaptive, scale, shift and residual gate come from a condition."""

    def __init__(self, width: int, *, is_adaptive: bool) -> None:
        super().__init__()
        self.weight = None if is_adaptive else nn.Parameter(torch.empty(width))
        self.dense = Linear(width, 3 * width) if is_adaptive else None

    def forward(
        self, x: Float[Tensor, "b t d"], cond: Tensor | None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "_b _t d"] | None]:
        """
        Args:
            cond: of an adaptive norm, or what `modulation` makes of it, f[_b 3*d] or f[_b _t 3*d].
        """
        scale, shift, gate = self._modulated(x, cond)
        if fusion.applies(x):
            return fused_norm(x, scale, shift)[1], gate
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPSILON) * (1 + scale)
        return (normed if shift is None else normed + shift).to(x.dtype), gate

    def of_sum(
        self, x: Float[Tensor, "b t d"], y: Float[Tensor, "b t d"], gate: Tensor | None, cond: Tensor | None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"], Float[Tensor, "_b _t d"] | None]:
        """The sum of x and the gated y, and `forward` of it."""
        if not fusion.applies(x):
            total = _residual(x, y, gate)
            return total, *self(total, cond)
        scale, shift, next_gate = self._modulated(x, cond)
        return *fused_norm(x, scale, shift, (y, gate)), next_gate

    def _modulated(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scale, shift and gate."""
        if self.weight is not None:
            return self.weight.float(), None, None
        assert cond is not None, "adaptive norms need a condition"
        modulation = cond if cond.shape[-1] == 3 * x.shape[-1] else self.modulation(cond.to(x.dtype))
        modulation = modulation[:, None] if modulation.ndim == 2 else modulation
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return scale, shift, gate

    def modulation(self, cond: Float[Tensor, "*b d"]) -> Float[Tensor, "*b 3*d"]:
        assert self.dense is not None
        return self.dense(cond)


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Embedding(nn.Module):
    """Token embeddings times sqrt(d), the root rounded to the table's dtype as the weights were trained with."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))
        # Rounded on the host, so that nothing is read from a device. Not by a function that the compiler takes for a
        # constant: telling it so imports the compiler, which takes four seconds.
        self._root = {dtype: torch.tensor(width**0.5, dtype=dtype, device="cpu").item() for dtype in _DTYPES}

    def forward(self, tokens: Int[Tensor, "b t"], dtype: torch.dtype) -> Float[Tensor, "b t d"]:
        return (F.embedding(tokens, self.weight) * self._root[self.weight.dtype]).to(dtype)


def attend(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    bias: Float[Tensor, "b 1 t s"],
) -> Float[Tensor, "b t nh"]:
    """Attention of rotated queries to keys; query head n uses key/value head n // g."""
    return attention.attend(q, k, v, bias).flatten(2)


def additive(mask: Bool[Tensor, "b t s"], dtype: torch.dtype) -> Float[Tensor, "b 1 t s"]:
    """What is added to the logits of every head; finite, see `MASKED_LOGIT`."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, MASKED_LOGIT)[:, None]


def rotations(positions: Int[Tensor, "b t"], head_dim: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine f32[b t 1 h/2] of the rotary position embedding."""
    half = head_dim // 2
    period = ROPE_BASE ** (torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angle = (positions[..., None] / period)[:, :, None]
    return torch.sin(angle), torch.cos(angle)


def rope(x: Float[Tensor, "b t heads h"], sin: Tensor, cos: Tensor) -> Float[Tensor, "b t heads h"]:
    """Rotary position embedding, half-split layout, computed in f32."""
    if fusion.applies(x):
        from openpi.models_pytorch import fused_kernels

        return fused_kernels.rope(x, sin, cos)
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def fused_norm(
    x: Tensor, scale: Tensor, shift: Tensor | None, residual: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor]:
    from openpi.models_pytorch import fused_kernels  # needs Triton

    return fused_kernels.norm(x, scale, shift, NORM_EPSILON, residual)


def geglu(gate_up: Float[Tensor, "b t _2f"]) -> Float[Tensor, "b t f"]:
    """Of both halves side by side."""
    if fusion.applies(gate_up):
        from openpi.models_pytorch import fused_kernels

        return fused_kernels.geglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _of_norms(cond: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What the norms before attention and before the MLP get: the same condition, or each its modulation."""
    return (cond[0], cond[1]) if cond is not None and cond.ndim == 4 else (cond, cond)


def _joined(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """`torch.cat`, which copies even a single tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _remember(cached: Tensor, new: Tensor, slots: Tensor | None) -> Tensor:
    return torch.cat([cached, new], dim=1) if slots is None else cached.index_copy_(1, slots, new)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else x + y * gate
