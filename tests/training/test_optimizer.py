"""Muon, which the published recipes do not use."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import tiny_recipe
from openpi.shared.tree import flatten
from openpi.training import optimizer
from openpi.training.backends.jax import state_files
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig
from openpi.training.recipes.tabletop import TINY_PI05


def test_muon_treats_every_kernel_of_the_transformers_as_matrices_and_nothing_else() -> None:
    params = TINY_PI05.abstract_params()
    axes = flatten(optimizer._matrix_axes(params))
    for path, leaf in flatten(params).items():
        is_matrix = leaf.ndim > 1 and any(part in path for part in ("kernel", "/w", "einsum", "linear"))
        is_narrow = path.startswith(("action_in_proj", "action_out_proj")) or path.endswith("bias")
        assert (axes[path] is not None) == (is_matrix and not is_narrow), path
        if axes[path] is not None:
            used = [*axes[path].reduction_axis, *axes[path].output_axis]
            assert len(set(used)) == len(used) and max(used) < leaf.ndim, path


def test_muon_lowers_the_loss_and_its_state_survives_a_checkpoint(tmp_path: Path) -> None:
    model = dataclasses.replace(tiny_recipe.MODEL, pi05=True, loss_draws=4)
    schedule = optimizer.CosineDecaySchedule(warmup_steps=1, peak_lr=5e-3, decay_steps=100, decay_lr=5e-3)
    config = TrainConfig(name="muon", model=model, optimizer=optimizer.Muon(), lr_schedule=schedule, ema_decay=None)
    observation = model.fake_obs(4)
    batch = {**observation.to_dict(), "actions": jnp.full((4, model.action_horizon, model.action_dim), 0.5)}
    step = jax.jit(lambda state: step_jax.train_step(config, jax.random.key(1), state, batch))

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), model.abstract_params()
    )
    opt_state = jax.jit(config.optimizer.create(schedule.create()).init)(params)
    state = step_jax.TrainState(jnp.zeros((), jnp.int32), params, opt_state, None)
    losses = []
    for _ in range(12):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])

    state_files.begin_write(tmp_path, state)()
    restored = state_files.restore_state(tmp_path, jax.eval_shape(lambda: state))
    for saved, read in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(saved, read)
