"""Adam whose two moments take a byte per parameter each, instead of four.

A moment is stored in blocks of neighbours along the last axis: the largest magnitude of the block, and for every value
a code for its share of that. Shares are companded (square root for the mean, fourth root for the squares), so that
small values keep a relative precision of a few per cent, and rounded up or down at random, right on average, so that
changes smaller than a code are not lost. Small arrays stay in f32. After Dettmers et al. 2022, "8-bit Optimizers via
Block-wise Quantization", whose codes are other ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256
MIN_SIZE = 4096  # of an array; below it, codes save nothing worth having


class Coded(NamedTuple):
    """Values as codes.

    Attributes:
        codes: int8[shape] or, of squares, uint8[shape].
        scales: f32[..., blocks], the largest magnitude of each block.
    """

    codes: jax.Array
    scales: jax.Array


class State(NamedTuple):
    """What is kept from step to step.

    Attributes:
        num_steps: int32.
        mu, nu: mean of the gradients and of their squares; `Coded`, or f32 arrays.
    """

    num_steps: jax.Array
    mu: Any
    nu: Any


def adamw(
    learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, eps: float, weight_decay: float, mask: object = None
) -> optax.GradientTransformation:
    """As `optax.adamw`, with moments of eight bits."""
    return optax.chain(
        scale_by_adam_8bit(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`; each step computes in f32 and rounds what it keeps."""

    def init(params: object) -> State:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        encode = functools.partial(_encode_tree, key=jax.random.key(0))
        return State(jnp.zeros((), jnp.int32), encode(zeros, is_squares=False), encode(zeros, is_squares=True))

    def update(grads: object, state: State, params: object = None) -> tuple[object, State]:
        del params
        count = state.num_steps + 1
        mu = jax.tree.map(lambda g, m: b1 * decode(m) + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * decode(v) + (1 - b2) * jnp.square(g), grads, state.nu)
        updates = jax.tree.map(
            lambda m, v: (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps),
            mu,
            nu,
        )
        mu_key, nu_key = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        mu, nu = _encode_tree(mu, key=mu_key, is_squares=False), _encode_tree(nu, key=nu_key, is_squares=True)
        return updates, State(count, mu, nu)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]  # optax types its states as trees


def encode(values: jax.Array, key: jax.Array, *, is_squares: bool) -> Coded:
    """Codes of f32 values; none but zero becomes zero where they are squares, which get divided by."""
    blocks = _blocks(values)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    shares = jnp.abs(blocks) / jnp.where(scales == 0, 1, scales)[..., None]
    chance = jax.random.bits(key, values.shape, jnp.uint8).reshape(blocks.shape).astype(jnp.float32) / 256
    top, power = (255, 4) if is_squares else (127, 2)
    below = jnp.clip(jnp.floor(top * shares ** (1 / power)), 0, top - 1)
    low, high = (below / top) ** power, ((below + 1) / top) ** power
    # Up with the probability that makes the decoded value right on average.
    magnitudes = below + (chance < (shares - low) / (high - low))
    if is_squares:
        codes = jnp.maximum(magnitudes, shares > 0).astype(jnp.uint8)
    else:
        codes = (jnp.sign(blocks) * magnitudes).astype(jnp.int8)
    return Coded(codes.reshape(values.shape), scales)


def decode(stored: Coded | jax.Array) -> jax.Array:
    """f32 values of codes; what is stored as it is, as it is."""
    if not isinstance(stored, Coded):
        return stored
    is_squares = stored.codes.dtype == jnp.uint8
    blocks = _blocks(stored.codes).astype(jnp.float32)
    shares = (blocks / 255) ** 4 if is_squares else jnp.sign(blocks) * jnp.square(blocks / 127)
    return (shares * stored.scales[..., None]).reshape(stored.codes.shape)


def _encode_tree(tree: object, *, key: jax.Array, is_squares: bool) -> object:
    leaves, treedef = jax.tree.flatten(tree)
    coded = [
        encode(leaf, jax.random.fold_in(key, i), is_squares=is_squares) if leaf.size >= MIN_SIZE else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, coded)


def _blocks(values: jax.Array) -> jax.Array:
    """[..., n] -> [..., blocks, size]: as many neighbours as divide the axis and `BLOCK`."""
    size = math.gcd(values.shape[-1], BLOCK)
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
