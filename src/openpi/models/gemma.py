"""Gemma for any number of experts that attend jointly: pi0, pi0.5 (two experts) and pi0-FAST (one).

Functions over the published parameter tree; layers are stacked on a leading axis and scanned.
Source: the model specification, sections 4, 5.1 and 9.

Legend: b batch, t query tokens, s key tokens, c cached tokens, d model width, n query heads, k key/value heads,
g = n/k, h head width, f MLP width, l layers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from openpi.models import lora
from openpi.models.activations import keep_rows
from openpi.models.gemma_config import GemmaConfig

Params = Mapping[str, Any]
# The cached length differs between what goes in and what comes out, so it is not bound (leading underscore).
KVCache = tuple[Float[Array, "l b _c k h"], Float[Array, "l b _c k h"]]

# The most negative finite value the published models were trained with; a row that is masked everywhere then
# attends uniformly instead of turning into NaN.
MASKED_LOGIT = -2.3819763e38
NORM_EPSILON = 1e-6
ROPE_BASE = 10_000


def forward(
    params: Params,
    configs: Sequence[GemmaConfig],
    embedded: Sequence[Float[Array, "b _t _d"] | None],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t s"],
    *,
    adarms_cond: Sequence[Float[Array, "b _d"] | None] | None = None,
    kv_cache: KVCache | None = None,
    write_at: Int[Array, ""] | None = None,
    dtype: str = "bfloat16",
    remat: str = "full",
) -> tuple[list[Float[Array, "b _t _d"] | None], KVCache]:
    """Runs the experts over their tokens with one joint attention per layer.

    Args:
        params: the `llm` subtree.
        configs: dims of each expert.
        embedded: tokens of each expert, concatenated in this order for attention; None = expert absent.
        positions: RoPE positions of the concatenated tokens.
        mask: true where a query may attend to a key; keys are cached ones first, then the new ones.
        adarms_cond: condition of each expert's adaptive norms; None = plain norms.
        kv_cache: keys (after RoPE) and values of earlier tokens.
        write_at: slot of the cache that the new keys go to; None = they are appended.
    Returns:
        Outputs after each expert's final norm (None where absent), and the cache with the new keys.
    Raises:
        ValueError: the mask does not cover the cached and the new tokens.
    """
    xs = [None if x is None else x.astype(dtype) for x in embedded]
    conds = list(adarms_cond) if adarms_cond is not None else [None] * len(xs)
    num_new = sum(x.shape[1] for x in xs if x is not None)
    num_cached = kv_cache[0].shape[2] if kv_cache is not None else 0
    num_keys = num_cached if write_at is not None else num_cached + num_new
    if mask.shape[1:] != (num_new, num_keys):
        raise ValueError(f"attention mask has shape {mask.shape}, expected (batch, {num_new}, {num_keys})")

    def layer(xs: list, stacked: tuple[Params, tuple[Array, Array] | None]):
        layer_params, layer_cache = stacked
        return block(layer_params, configs, keep_rows(xs), positions, mask, conds, layer_cache, write_at)

    scanned = (params["layers"], kv_cache)
    xs, new_cache = jax.lax.scan(rematerialised(layer, remat), xs, scanned, unroll=unroll(configs[0].depth))
    final = [
        None if x is None else norm(params["final_norm" + suffix(i)], x, cond)[0]
        for i, (x, cond) in enumerate(zip(xs, conds, strict=True))
    ]
    return final, new_cache


def block(
    params: Params,
    configs: Sequence[GemmaConfig],
    xs: list[Float[Array, "b _t _d"] | None],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t s"],
    conds: Sequence[Float[Array, "b _d"] | None],
    cache: tuple[Array, Array] | None,
    write_at: Int[Array, ""] | None = None,
) -> tuple[list[Float[Array, "b _t _d"] | None], tuple[Array, Array]]:
    """One layer: norm, joint attention, residual, norm, MLP, residual; no post-norms."""
    present = [i for i, x in enumerate(xs) if x is not None]
    normed, gates = _norms(params, "pre_attention_norm", xs, conds, present)
    attended, cache = attention(params["attn"], configs, normed, positions, mask, cache, write_at)
    xs = [_residual(x, y, gate) for x, y, gate in zip(xs, attended, gates, strict=True)]

    normed, gates = _norms(params, "pre_ffw_norm", xs, conds, present)
    outs: list = [None] * len(xs)
    for i in present:
        outs[i] = mlp(params["mlp" + suffix(i)], configs[i], normed[i])
    return [_residual(x, y, gate) for x, y, gate in zip(xs, outs, gates, strict=True)], cache


def attention(
    params: Params,
    configs: Sequence[GemmaConfig],
    xs: Sequence[Float[Array, "b _t _d"] | None],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t s"],
    cache: tuple[Array, Array] | None,
    write_at: Int[Array, ""] | None = None,
) -> tuple[list[Float[Array, "b _t _d"] | None], tuple[Array, Array]]:
    """Every expert projects its own tokens; one attention over all of them; every expert projects back."""
    projected = [
        project_qkv(params, i, config, x)
        for i, (config, x) in enumerate(zip(configs, xs, strict=True))
        if x is not None
    ]
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
    dtype, head_dim = q.dtype, q.shape[-1]
    q = rope(q, positions).astype(dtype) * head_dim**-0.5
    k = rope(k, positions).astype(dtype)
    if cache is not None:
        k, v = _remember(cache[0], k, write_at), _remember(cache[1], v, write_at)

    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], n // k.shape[2], h)  # query head n uses kv head n // g
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
    probs = jax.nn.softmax(logits, axis=-1).astype(dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)

    outs: list = []
    start = 0
    for i, (config, x) in enumerate(zip(configs, xs, strict=True)):
        if x is None:
            outs.append(None)
            continue
        outs.append(project_out(params, i, config, mixed[:, start : start + x.shape[1]]))
        start += x.shape[1]
    return outs, (k, v)


def _remember(cached: Array, new: Array, write_at: Int[Array, ""] | None) -> Array:
    if write_at is None:
        return jnp.concatenate([cached, new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(cached, new, write_at, axis=1)


def project_qkv(
    params: Params, expert: int, config: GemmaConfig, x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    q_params, kv_params = params["q_einsum" + suffix(expert)], params["kv_einsum" + suffix(expert)]
    q = jnp.einsum("btd,ndh->btnh", x, q_params["w"].astype(x.dtype))
    kv = jnp.einsum("btd,ckdh->cbtkh", x, kv_params["w"].astype(x.dtype))
    if config.attn_lora is not None:
        q = q + lora.q_delta(x, q_params, config.attn_lora)
        kv = kv + lora.kv_delta(x, kv_params, config.attn_lora)
    return q, kv[0], kv[1]


def project_out(params: Params, expert: int, config: GemmaConfig, x: Float[Array, "b t n h"]) -> Float[Array, "b t d"]:
    p = params["attn_vec_einsum" + suffix(expert)]
    out = jnp.einsum("btnh,nhd->btd", x, p["w"].astype(x.dtype))
    return out if config.attn_lora is None else out + lora.out_delta(x, p, config.attn_lora)


def mlp(params: Params, config: GemmaConfig, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """GeGLU: `gelu(x W_gate) * (x W_up) W_out`, without biases."""

    def dot(x: Array, name: str, index: int | tuple[()] = ()) -> Array:
        y = x @ params[name][index].astype(x.dtype)
        if config.ffn_lora is None:
            return y
        # Published adapters have alpha = rank, so there is no scale here; see `GemmaConfig`.
        low = x @ params[name + "_lora_a"][index].astype(x.dtype)
        return y + low @ params[name + "_lora_b"][index].astype(x.dtype)

    hidden = jax.nn.gelu(dot(x, "gating_einsum", 0), approximate=True) * dot(x, "gating_einsum", 1)
    return dot(hidden, "linear")


def norm(
    params: Params, x: Float[Array, "b t d"], cond: Float[Array, "b d"] | None
) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"] | None]:
    """RMS norm; with a condition, adaptive: scale, shift and residual gate come from it."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    if cond is None:
        return (normed * (1 + params["scale"])).astype(x.dtype), None
    dense = params["Dense_0"]
    modulation = cond.astype(x.dtype) @ dense["kernel"].astype(x.dtype) + dense["bias"].astype(x.dtype)
    scale, shift, gate = jnp.split(modulation[:, None], 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def rope(x: Float[Array, "b t heads h"], positions: Int[Array, "b t"]) -> Float[Array, "b t heads h"]:
    """Rotary position embedding, half-split layout, in f32."""
    half = x.shape[-1] // 2
    period = ROPE_BASE ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions[..., None] / period)[:, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def embed(params: Params, tokens: Int[Array, "b t"], dtype: str) -> Float[Array, "b t d"]:
    """Token embeddings times sqrt(d), the root rounded to the table's dtype as the weights were trained with."""
    table = jnp.asarray(params["embedder"]["input_embedding"])
    return (table[tokens] * jnp.sqrt(table.shape[-1]).astype(table.dtype)).astype(dtype)


def suffix(expert: int) -> str:
    """Name suffix of an expert's leaves in the published tree: '', '_1', ..."""
    return f"_{expert}" if expert else ""


def rematerialised(layer: Callable, remat: str) -> Callable:
    """Wraps a scanned layer so that its backward pass recomputes what `remat` says (see `Pi0Config.remat`)."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if remat == "full" else policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def unroll(depth: int) -> int:
    """Layers per scan step: shallow stacks are unrolled, so that the compiler drops what nobody reads."""
    return depth if depth <= 4 else 1


def _norms(params: Params, name: str, xs: Sequence, conds: Sequence, present: list[int]) -> tuple[list, list]:
    normed: list = [None] * len(xs)
    gates: list = [None] * len(xs)
    for i in present:
        normed[i], gates[i] = norm(params[name + suffix(i)], xs[i], conds[i])
    return normed, gates


def _residual(x: Array | None, y: Array | None, gate: Array | None) -> Array | None:
    if x is None or y is None:
        return x
    return x + y if gate is None else x + y * gate


# --- initialisation -------------------------------------------------------------------------------------------


def init(rng: jax.Array, configs: Sequence[GemmaConfig], *, adaptive: Sequence[bool]) -> dict[str, Any]:
    """Fresh f32 parameters of the `llm` subtree.

    Args:
        adaptive: per expert, whether its norms are adaptive.
    """
    embed_key, *keys = jax.random.split(rng, 1 + len(configs))
    table = 0.01 * jax.random.normal(embed_key, (configs[0].vocab_size, configs[0].width))
    params: dict[str, Any] = {"embedder": {"input_embedding": table}}
    layers: dict[str, Any] = {"attn": {}}
    for i, (config, key) in enumerate(zip(configs, keys, strict=True)):
        per_layer = jax.vmap(functools.partial(_init_layer, config=config, adaptive=adaptive[i], s=suffix(i)))
        fresh = per_layer(jax.random.split(key, config.depth))
        layers["attn"] |= fresh.pop("attn")
        layers |= fresh
        params["final_norm" + suffix(i)] = _init_norm(config.width, adaptive[i])
    return params | {"layers": layers}


def _init_layer(rng: jax.Array, *, config: GemmaConfig, adaptive: bool, s: str) -> dict[str, Any]:
    d, f, n, k, h = config.width, config.mlp_dim, config.num_heads, config.num_kv_heads, config.head_dim
    keys = iter(jax.random.split(rng, 10))

    def weight(shape: tuple[int, ...], fan_in: int) -> Array:
        return _lecun_normal(next(keys), shape, fan_in)

    attn = {
        "q_einsum": {"w": weight((n, d, h), d)},
        "kv_einsum": {"w": weight((2, k, d, h), d)},
        "attn_vec_einsum": {"w": weight((n, h, d), n * h)},
    }
    feed_forward = {"gating_einsum": weight((2, d, f), d), "linear": weight((f, d), f)}
    if config.attn_lora is not None:
        for leaf in attn.values():
            leaf["lora_a"], leaf["lora_b"] = lora.init_pair(next(keys), leaf["w"].shape, config.attn_lora.rank)
    if config.ffn_lora is not None:
        for name in ("gating_einsum", "linear"):
            pair = lora.init_pair(next(keys), feed_forward[name].shape, config.ffn_lora.rank)
            feed_forward[name + "_lora_a"], feed_forward[name + "_lora_b"] = pair
    return {
        "attn": {name + s: leaf for name, leaf in attn.items()},
        "mlp" + s: feed_forward,
        "pre_attention_norm" + s: _init_norm(d, adaptive),
        "pre_ffw_norm" + s: _init_norm(d, adaptive),
    }


def _init_norm(width: int, adaptive: bool) -> dict[str, Any]:
    if not adaptive:
        return {"scale": jnp.zeros(width)}
    return {"Dense_0": {"kernel": jnp.zeros((width, 3 * width)), "bias": jnp.zeros(3 * width)}}


def _lecun_normal(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> Array:
    # Truncated at two standard deviations; 0.8796 is the standard deviation that truncation leaves.
    return jax.random.truncated_normal(rng, -2, 2, shape) * (fan_in**-0.5 / 0.87962566103423978)
