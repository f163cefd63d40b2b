"""Low-rank adapters for the Gemma weights. Source: the model specification, section 9.1.

Legend: b batch, t tokens, d model width, n query heads, k kv heads, h head width, f MLP width, r rank, c 2 (k, v or
gate, up).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from openpi.models.gemma_config import LoRAConfig

INIT_STDDEV = 0.01


def init_pair(rng: jax.Array, shape: tuple[int, ...], rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors A `[..., x, r]` and B `[..., r, y]` for a weight `[..., x, y]`, both normal(0.01)."""
    *lead, x, y = shape
    key_a, key_b = jax.random.split(rng)
    return (
        INIT_STDDEV * jax.random.normal(key_a, (*lead, x, rank)),
        INIT_STDDEV * jax.random.normal(key_b, (*lead, rank, y)),
    )


def q_delta(x: Float[Array, "b t d"], p: Mapping[str, jax.Array], lora: LoRAConfig) -> Float[Array, "b t n h"]:
    low = jnp.einsum("btd,ndr->btnr", x, p["lora_a"].astype(x.dtype))
    return lora.scaling * jnp.einsum("btnr,nrh->btnh", low, p["lora_b"].astype(x.dtype))


def kv_delta(x: Float[Array, "b t d"], p: Mapping[str, jax.Array], lora: LoRAConfig) -> Float[Array, "2 b t k h"]:
    low = jnp.einsum("btd,ckdr->cbtkr", x, p["lora_a"].astype(x.dtype))
    return lora.scaling * jnp.einsum("cbtkr,ckrh->cbtkh", low, p["lora_b"].astype(x.dtype))


def out_delta(x: Float[Array, "b t n h"], p: Mapping[str, jax.Array], lora: LoRAConfig) -> Float[Array, "b t d"]:
    """One rank-r update shared by all heads, although B is stored per head.

    Published adapters were trained with the rank-space vector summed over heads before B, and B summed over
    heads: keep both sums.
    """
    low = jnp.einsum("btnh,nhr->btr", x, p["lora_a"].astype(x.dtype))
    return lora.scaling * jnp.einsum("btr,nrd->btd", low, p["lora_b"].astype(x.dtype))
