"""Adam with moments of eight bits, against Adam."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_recipe
from openpi.training.backends.jax import adam_8bit, plan
from openpi.training.config import get_config
from openpi.training.optimizer import AdamW, CosineDecaySchedule

# Operation by operation, each of them would be compiled.
encode = jax.jit(adam_8bit.encode, static_argnames="is_squares")
decode = jax.jit(adam_8bit.decode)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), columns=st.sampled_from([72, 1152, 7]))
def test_a_value_comes_back_within_one_code(seed, columns):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(3, columns)) * 10.0 ** rng.uniform(-6, 2, (3, columns))).astype(np.float32)
    for is_squares, power, top in ((False, 2, 127), (True, 4, 255)):
        given_values = np.square(values) if is_squares else values
        coded = encode(given_values, jax.random.key(seed), is_squares=is_squares)
        size = np.gcd(columns, adam_8bit.BLOCK)
        scales = np.repeat(np.abs(given_values).reshape(3, -1, size).max(axis=-1), size, axis=-1)
        place = top * (np.abs(given_values) / scales) ** (1 / power)  # between two codes
        low, high = (scales * (np.clip(f(place), 0, top) / top) ** power for f in (np.floor, np.ceil))
        found = np.asarray(decode(coded))
        low = np.where((low == 0) & is_squares, scales * (1 / top) ** power, low)  # never zero: it is divided by
        slack = 1e-3 * np.abs(given_values) + 1e-30
        assert (np.minimum(low, high) - slack <= np.abs(found)).all()
        assert (np.abs(found) <= np.maximum(low, high) + slack).all()
        assert (np.sign(found) * np.sign(given_values) >= 0).all()


def test_changes_smaller_than_a_code_are_not_lost():
    """With b2 = 0.999 a step changes the squares by a tenth of the distance of two codes."""
    tx = adam_8bit.scale_by_adam_8bit(0.9, 0.999, 1e-8)
    params = {"w": jnp.zeros((16, 256))}

    @functools.partial(jax.jit, static_argnames="steps")
    def updated(state, size, steps):
        grads = {"w": jnp.full((16, 256), size)}
        return jax.lax.fori_loop(0, steps, lambda _, state: tx.update(grads, state)[1], state)

    state = jax.jit(tx.init)(params)
    for size, steps in ((1.0, 200), (0.1, 1500)):
        state = updated(state, size, steps)
    expected = 1.0 * (1 - 0.999**200) * 0.999**1500 + 0.01 * (1 - 0.999**1500)
    found = np.asarray(decode(state.nu["w"]))
    np.testing.assert_allclose(found.mean(), expected, rtol=0.05)


def test_what_is_kept_is_right_on_average():
    """Also for values far below the largest of their block."""
    values = np.full((64, 256), 1e-4, np.float32)
    values[:, 0] = 1
    for is_squares in (False, True):
        draws = [np.asarray(decode(encode(values, jax.random.key(i), is_squares=is_squares))) for i in range(8)]
        np.testing.assert_allclose(np.mean(draws, axis=(0, 1))[1:].mean(), 1e-4, rtol=0.05)


def test_a_network_learns_as_with_adam():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(16, 8)) / 4).astype(np.float32)
    shapes = {"a": (16, 64), "b": (64, 64), "c": (64, 8)}  # the second has enough numbers to be kept in eight bits
    params = {name: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0]) for name, shape in shapes.items()}

    @jax.jit
    def loss(p):
        return jnp.mean(jnp.square(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] - y))

    losses = []
    for bits in (32, 8):
        tx = dataclasses.replace(AdamW(), state_bits=bits).create(1e-3)

        @jax.jit
        def step(p, state, tx=tx):
            value, grads = jax.value_and_grad(loss)(p)
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state, value

        p, state = jax.tree.map(jnp.asarray, params), jax.jit(tx.init)(params)
        start = float(loss(p))
        for _ in range(300):
            p, state, value = step(p, state)
        losses.append(float(value))
    assert losses[0] < 0.02 * start
    assert losses[1] < 1.5 * losses[0]


def test_its_state_takes_a_quarter_and_the_plan_knows():
    config = dataclasses.replace(get_config("pi05_libero"), batch_size=8)
    small = dataclasses.replace(config, optimizer=AdamW(state_bits=8))
    whole, eighth = plan.count_state(config).optimizer, plan.count_state(small).optimizer
    assert 0.25 < eighth / whole < 0.27
    assert "--optimizer.state-bits=8" in [label for label, _ in plan.alternatives(config)]


def test_another_number_of_bits_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.state_bits=4; expected 32, or 8"):
        AdamW(state_bits=4).create(CosineDecaySchedule().create())  # type: ignore[arg-type]


def test_its_state_survives_a_checkpoint(tmp_path):
    from openpi.training.backends.jax import state_files
    from openpi.training.backends.jax import step as step_jax

    wide = dataclasses.replace(tiny_recipe.MODEL, paligemma_variant=dataclasses.replace(tiny_recipe._EXPERT, width=64))
    config = dataclasses.replace(tiny_recipe.tiny, model=wide, optimizer=AdamW(state_bits=8))
    state = jax.jit(lambda key: step_jax.init_state(config, key))(jax.random.key(0))
    ones_more = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), tree))
    filled = dataclasses.replace(state, opt_state=ones_more(state.opt_state))
    state_files.begin_write(tmp_path / "2", filled)()
    restored = state_files.restore_state(tmp_path / "2", state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(restored.opt_state)}
    assert {"int8", "uint8", "float32"} <= kinds
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(filled), strict=True):
        np.testing.assert_array_equal(found, expected)
