"""SigLIP image encoder: a pre-norm ViT without class token or pooling, one token per patch.

Functions over the published parameter tree. Source: the model specification, section 3.

Legend: b batch, y x patch rows and columns, p q pixels inside a patch, t = y*x tokens, d width, n heads, h head width,
o output width.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from openpi.models.activations import keep_rows, rows_sharding
from openpi.models.gemma import rematerialised, unroll
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import Params

NORM_EPSILON = 1e-6


def forward(
    params: Params,
    config: SiglipConfig,
    images: Float[Array, "b height width 3"],
    *,
    dtype: str,
    remat: str = "full",
) -> Float[Array, "b t o"]:
    """Image tokens, top-left patch first, projected to the language width.

    Args:
        params: the `img` subtree.
        images: f32 in [-1, 1].
        dtype: of the transformer; patch and position embeddings stay f32.
    """
    return _forward(params, images, config=config, dtype=dtype, remat=remat, rows=rows_sharding())


@functools.partial(jax.jit, static_argnames=("config", "dtype", "remat", "rows"))  # traced once for all cameras
def _forward(
    params: Params,
    images: Float[Array, "b height width 3"],
    *,
    config: SiglipConfig,
    dtype: str,
    remat: str,
    rows: jax.sharding.NamedSharding | None,
) -> Float[Array, "b t o"]:
    del rows  # what `keep_rows` reads, so that JAX tells the two apart
    x = patchify(images, config.patch_size) @ _kernel2d(params["embedding"]["kernel"])
    x = x + params["embedding"]["bias"].astype(jnp.float32) + params["pos_embedding"].astype(jnp.float32)

    def layer(x: Array, layer_params: Params) -> tuple[Array, None]:
        return block(layer_params, keep_rows(x)), None

    encoder = params["Transformer"]
    x, _ = jax.lax.scan(
        rematerialised(layer, remat), x.astype(dtype), encoder["encoderblock"], unroll=unroll(config.depth)
    )
    return dense(params["head"], layer_norm(encoder["encoder_norm"], x))


def patchify(images: Float[Array, "b height width c"], patch: int) -> Float[Array, "b t ppc"]:
    """Cuts images into flattened patches, so that the 'valid' strided convolution is one matrix product."""
    b, height, width, c = images.shape
    x = images.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def block(params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    x = x + attention(params["MultiHeadDotProductAttention_0"], layer_norm(params["LayerNorm_0"], x))
    hidden = jax.nn.gelu(dense(params["MlpBlock_0"]["Dense_0"], layer_norm(params["LayerNorm_1"], x)), approximate=True)
    return x + dense(params["MlpBlock_0"]["Dense_1"], hidden)


def attention(params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Full self-attention with biases; logits and softmax in the activation dtype, unlike Gemma."""

    def project(name: str) -> Float[Array, "b t n h"]:
        p = params[name]
        return jnp.einsum("btd,dnh->btnh", x, p["kernel"].astype(x.dtype)) + p["bias"].astype(x.dtype)

    q, k, v = project("query"), project("key"), project("value")
    q = q * q.shape[-1] ** -0.5
    probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), axis=-1)
    mixed = jnp.einsum("bnts,bsnh->btnh", probs, v)
    out = params["out"]
    return jnp.einsum("btnh,nhd->btd", mixed, out["kernel"].astype(x.dtype)) + out["bias"].astype(x.dtype)


def layer_norm(params: Params, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    var = jnp.maximum(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean), 0)
    normed = (x32 - mean) * (jax.lax.rsqrt(var + NORM_EPSILON) * params["scale"])
    return (normed + params["bias"]).astype(x.dtype)


def dense(params: Params, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def _kernel2d(kernel: Float[Array, "p q c d"]) -> Float[Array, "pqc d"]:
    return kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])


# --- initialisation -------------------------------------------------------------------------------------------


def init(rng: jax.Array, config: SiglipConfig, *, image_resolution: tuple[int, int], out_width: int) -> Params:
    """Fresh f32 parameters of the `img` subtree; the head starts at zero."""
    d, patch = config.width, config.patch_size
    num_tokens = (image_resolution[0] // patch) * (image_resolution[1] // patch)
    conv_key, pos_key, blocks_key = jax.random.split(rng, 3)
    initializers = jax.nn.initializers
    return {
        "embedding": {
            "kernel": initializers.lecun_normal()(conv_key, (patch, patch, 3, d)),
            "bias": jnp.zeros(d),
        },
        "pos_embedding": d**-0.5 * jax.random.normal(pos_key, (1, num_tokens, d)),
        "Transformer": {
            "encoderblock": jax.vmap(lambda key: _init_block(key, config))(jax.random.split(blocks_key, config.depth)),
            "encoder_norm": _init_layer_norm(d),
        },
        "head": {"kernel": jnp.zeros((d, out_width)), "bias": jnp.zeros(out_width)},
    }


def _init_block(rng: jax.Array, config: SiglipConfig) -> dict[str, object]:
    d, f, n = config.width, config.mlp_dim, config.num_heads
    h = d // n
    keys = iter(jax.random.split(rng, 8))
    xavier = jax.nn.initializers.xavier_uniform()

    def qkv() -> dict[str, Array]:
        return {"kernel": xavier(next(keys), (d, n * h)).reshape(d, n, h), "bias": jnp.zeros((n, h))}

    def mlp_dense(i: int, o: int) -> dict[str, Array]:
        return {"kernel": xavier(next(keys), (i, o)), "bias": 1e-6 * jax.random.normal(next(keys), (o,))}

    return {
        "LayerNorm_0": _init_layer_norm(d),
        "MultiHeadDotProductAttention_0": {
            "query": qkv(),
            "key": qkv(),
            "value": qkv(),
            "out": {"kernel": xavier(next(keys), (n * h, d)).reshape(n, h, d), "bias": jnp.zeros(d)},
        },
        "LayerNorm_1": _init_layer_norm(d),
        "MlpBlock_0": {"Dense_0": mlp_dense(d, f), "Dense_1": mlp_dense(f, d)},
    }


def _init_layer_norm(width: int) -> dict[str, Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
