"""Gemma for any number of experts that attend jointly: pi0, pi0.5 (two experts) and pi0-FAST (one).

Functions over the published parameter tree; layers are stacked on a leading axis and scanned.
Source: the model specification, sections 4, 5.1 and 9.

Legend: b batch, t query tokens, s key tokens, c cached tokens, d model width, n query heads, k key/value heads,
g = n/k, h head width, f MLP width, l layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi.models import gemma_config, lora
from openpi.models.activations import keep_rows
from openpi.models.gemma_config import GemmaConfig
from openpi.shared.tree import Params

# Under their published names; the models' configurations have them without JAX.
Config = GemmaConfig
get_config = gemma_config.get_config

# The cached length differs between what goes in and what comes out, so it is not bound (leading underscore).
KVCache = tuple[Float[Array, "l b _c k h"], Float[Array, "l b _c k h"]]
# Whether this layer is the last, how many of an expert's first tokens are unread then, and `remat`.
Unread = tuple[Bool[Array, ""], int, str]

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
    adarms_cond: Sequence[Float[Array, "b *_t _d"] | None] | None = None,
    kv_cache: KVCache | None = None,
    write_at: Int[Array, ""] | None = None,
    unread: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    remat: str = "full",
) -> tuple[list[Float[Array, "b _t _d"] | None], KVCache]:
    """Runs the experts over their tokens; in every layer each token attends to those of all experts.

    Args:
        params: the `llm` subtree.
        configs: dims of each expert.
        embedded: tokens of each expert, concatenated in this order for attention; None = expert absent.
        positions: RoPE positions of the concatenated tokens.
        mask: true where a query may attend to a key; keys are cached ones first, then the new ones.
        adarms_cond: condition of each expert's adaptive norms, one for a sample or one for a token; None = plain norms.
        kv_cache: keys (after RoPE) and values of earlier tokens.
        write_at: slot of the cache that the new keys go to; None = they are appended.
        unread: per expert, how many of its first tokens have outputs that nobody reads: the last layer computes only
            their keys and values. None = all outputs are read.
    Returns:
        Outputs after each expert's final norm (None where absent or wholly unread, meaningless for unread tokens), and
        the cache with the new keys.
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

    skipped = list(unread) if unread is not None else [0] * len(xs)
    is_last = np.arange(configs[0].depth) == configs[0].depth - 1

    def layer(xs: list, stacked: tuple[Params, tuple[Array, Array] | None, Array]):
        layer_params, layer_cache, is_last = stacked
        first_read = [(is_last, count, remat) if count else None for count in skipped]
        return block(layer_params, configs, keep_rows(xs), positions, mask, conds, layer_cache, write_at, first_read)

    scanned = (params["layers"], kv_cache, is_last)
    xs, new_cache = jax.lax.scan(rematerialised(layer, remat), xs, scanned, unroll=unroll(configs[0].depth))
    final = [
        None if x is None or x.shape[1] == count else norm(params["final_norm" + suffix(i)], x, cond)[0]
        for i, (x, cond, count) in enumerate(zip(xs, conds, skipped, strict=True))
    ]
    return final, new_cache


def block(
    params: Params,
    configs: Sequence[GemmaConfig],
    xs: list[Float[Array, "b _t _d"] | None],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t s"],
    conds: Sequence[Float[Array, "b *_t _d"] | None],
    cache: tuple[Array, Array] | None,
    write_at: Int[Array, ""] | None = None,
    unread: Sequence[Unread | None] | None = None,
) -> tuple[list[Float[Array, "b _t _d"] | None], tuple[Array, Array]]:
    """One layer: norm, keys and values of all experts, then each expert's own tokens; no post-norms."""
    normed: list = [None] * len(xs)
    gates: list = [None] * len(xs)
    for i, x in enumerate(xs):
        if x is not None:
            normed[i], gates[i] = norm(params["pre_attention_norm" + suffix(i)], x, conds[i])
    k, v = keys_values(params["attn"], configs, normed, positions, cache, write_at)

    outs, start = [], 0
    for i, x in enumerate(xs):
        if x is None:
            outs.append(None)
            continue
        rows = slice(start, start + x.shape[1])
        tokens = (x, normed[i], gates[i], positions[:, rows], mask[:, rows])
        run = functools.partial(_tokens, configs[i], i)
        outs.append(_but_unread(run, unread[i] if unread else None, params, tokens, (k, v), conds[i]))
        start = rows.stop
    return outs, (k, v)


def _tokens(
    config: GemmaConfig,
    expert: int,
    first: int,
    params: Params,
    tokens: tuple[Array, Array, Array | None, Array, Array],
    keys: tuple[Array, Array],
    cond: Array | None,
) -> Float[Array, "b t d"]:
    """What attention and MLP make of one expert's tokens from `first` on; those before stay as they are."""
    x, normed, gate, positions, mask = tokens
    if first == x.shape[1]:
        return x
    q = project_q(params["attn"], expert, config, normed[:, first:])
    mixed = attend(q, *keys, positions[:, first:], mask[:, first:])
    y = _residual(x[:, first:], project_out(params["attn"], expert, config, mixed), gate)
    normed, gate = norm(params["pre_ffw_norm" + suffix(expert)], y, cond)
    y = _residual(y, mlp(params["mlp" + suffix(expert)], config, normed), gate)
    return jnp.concatenate([x[:, :first], y], axis=1) if first else y


def _but_unread(run: Callable, unread: Unread | None, *args: object) -> Float[Array, "b t d"]:
    """`run(first, *args)` for all tokens; in the last layer for those that are read.

    A branch inside the scan, because taking the last layer out of it would copy the stacked weights of all others.
    Each branch is rematerialised on its own, so that no intermediate result has to leave it.
    """
    if unread is None:
        return run(0, *args)
    is_last, count, remat = unread
    whole, part = (rematerialised(functools.partial(run, first), remat) for first in (0, count))
    return jax.lax.cond(is_last, part, whole, *args)


def keys_values(
    params: Params,
    configs: Sequence[GemmaConfig],
    xs: Sequence[Float[Array, "b _t _d"] | None],
    positions: Int[Array, "b t"],
    cache: tuple[Array, Array] | None,
    write_at: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """Keys (after RoPE) and values of all experts' tokens, after those in the cache."""
    projected = [
        project_kv(params, i, config, x) for i, (config, x) in enumerate(zip(configs, xs, strict=True)) if x is not None
    ]
    k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected, strict=True))
    k = rope(k, positions).astype(k.dtype)
    if cache is not None:
        k, v = _remember(cache[0], k, write_at), _remember(cache[1], v, write_at)
    return k, v


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    positions: Int[Array, "b t"],
    mask: Bool[Array, "b t s"],
) -> Float[Array, "b t n h"]:
    """Attention of queries (before RoPE) to all keys that their mask row allows."""
    dtype = q.dtype
    q = rope(q, positions).astype(dtype) * q.shape[-1] ** -0.5
    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], n // k.shape[2], h)  # query head n uses kv head n // g
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
    probs = jax.nn.softmax(logits, axis=-1).astype(dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, n, h)


def _remember(cached: Array, new: Array, write_at: Int[Array, ""] | None) -> Array:
    if write_at is None:
        return jnp.concatenate([cached, new], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(cached, new, write_at, axis=1)


def project_q(params: Params, expert: int, config: GemmaConfig, x: Float[Array, "b t d"]) -> Float[Array, "b t n h"]:
    p = params["q_einsum" + suffix(expert)]
    q = jnp.einsum("btd,ndh->btnh", x, p["w"].astype(x.dtype))
    return q if config.attn_lora is None else q + lora.q_delta(x, p, config.attn_lora)


def project_kv(
    params: Params, expert: int, config: GemmaConfig, x: Float[Array, "b t d"]
) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    p = params["kv_einsum" + suffix(expert)]
    kv = jnp.einsum("btd,ckdh->cbtkh", x, p["w"].astype(x.dtype))
    if config.attn_lora is not None:
        kv = kv + lora.kv_delta(x, p, config.attn_lora)
    return kv[0], kv[1]


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
    params: Params, x: Float[Array, "b t d"], cond: Float[Array, "b *_t d"] | None
) -> tuple[Float[Array, "b t d"], Float[Array, "_b _t d"] | None]:
    """RMS norm; with a condition, adaptive: scale, shift and residual gate come from it, or from `modulations`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    if "scale" in params:
        return (normed * (1 + params["scale"])).astype(x.dtype), None
    modulation = jnp.atleast_2d(params["modulation"]) if cond is None else _modulation(params, cond.astype(x.dtype))
    modulation = modulation[:, None] if modulation.ndim == 2 else modulation
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def _modulation(params: Params, cond: Float[Array, "*b d"]) -> Float[Array, "*b 3*d"]:
    dense = params["Dense_0"]
    return cond @ dense["kernel"].astype(cond.dtype) + dense["bias"].astype(cond.dtype)


def modulations(params: Params, expert: int, conds: Float[Array, "steps d"], dtype: str) -> Params:
    """What an expert's adaptive norms make of conditions that are the same for the whole batch.

    Returns:
        One tree per condition, stacked: its subtrees take the place of the norms', and `forward` then needs no
        condition for this expert.
    """
    conds = conds.astype(dtype)
    names = [name + suffix(expert) for name in ("pre_attention_norm", "pre_ffw_norm")]
    per_layer = jax.vmap(_modulation, in_axes=(0, None), out_axes=1)
    return {
        "layers": {name: {"modulation": per_layer(params["layers"][name], conds)} for name in names},
        "final_norm" + suffix(expert): {"modulation": _modulation(params["final_norm" + suffix(expert)], conds)},
    }


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


def _residual(x: Array, y: Array, gate: Array | None) -> Array:
    return x + y if gate is None else x + y * gate


# --- initialisation -------------------------------------------------------------------------------------------


def init(rng: jax.Array, configs: Sequence[GemmaConfig], *, adaptive: Sequence[bool]) -> Params:
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


def _init_layer(rng: jax.Array, *, config: GemmaConfig, adaptive: bool, s: str) -> dict[str, object]:
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


def _init_norm(width: int, adaptive: bool) -> dict[str, object]:
    if not adaptive:
        return {"scale": jnp.zeros(width)}
    return {"Dense_0": {"kernel": jnp.zeros((width, 3 * width)), "bias": jnp.zeros(3 * width)}}


def _lecun_normal(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> Array:
    # Truncated at two standard deviations; 0.8796 is the standard deviation that truncation leaves.
    return jax.random.truncated_normal(rng, -2, 2, shape) * (fan_in**-0.5 / 0.87962566103423978)
