"""Schedules, AdamW with clipping, averaging and the FSDP rule against recordings of the reference implementation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi.shared.tree import unflatten
from openpi.training import sharding
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig, get_config
from openpi.training.optimizer import SGD, AdamW, CosineDecaySchedule, RsqrtDecaySchedule, create_optimizer

SCHEDULE_RTOL = 3e-4  # recorded in float32
ADAM_ATOL = 1e-6
NORM_RTOL = 1e-6
F32_ROUNDING = 2e-7


def _schedules() -> dict[str, CosineDecaySchedule | RsqrtDecaySchedule]:
    return {
        "cosine_default": TrainConfig(name="x").lr_schedule,
        "cosine_pi05_libero": get_config("pi05_libero").lr_schedule,
        "cosine_droid": get_config("pi05_full_droid_finetune").lr_schedule,
        "rsqrt_default": RsqrtDecaySchedule(),
        "cosine_warmup10": CosineDecaySchedule(warmup_steps=10, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4),
    }


def test_schedules_match_the_recordings(golden):
    with np.load(golden / "data" / "lr_schedules.npz") as archive:
        recorded = dict(archive)
    steps = recorded.pop("steps")
    assert recorded.keys() == _schedules().keys()
    for name, config in _schedules().items():
        schedule = config.create()
        found = [float(schedule(int(step))) for step in steps]
        np.testing.assert_allclose(found, recorded[name], rtol=SCHEDULE_RTOL, err_msg=name)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            CosineDecaySchedule(warmup_steps=700, peak_lr=3e-4, decay_steps=9_000, decay_lr=7e-6),
            optax.warmup_cosine_decay_schedule(3e-4 / 701, 3e-4, 700, 9_000, 7e-6),
        ),
        (
            CosineDecaySchedule(warmup_steps=0, peak_lr=1e-3, decay_steps=50, decay_lr=0.0),
            optax.warmup_cosine_decay_schedule(1e-3, 1e-3, 0, 50, 0.0),
        ),
        (
            RsqrtDecaySchedule(warmup_steps=30, peak_lr=5e-5, timescale=17.5),
            optax.join_schedules(
                [
                    optax.linear_schedule(5e-5 / 31, 5e-5, 30),
                    lambda since: 5e-5 / jnp.sqrt((17.5 + since) / 17.5),
                ],
                [30],
            ),
        ),
    ],
)
def test_schedules_are_optax_s_in_jax_and_the_same_without(ours, theirs):
    steps = jnp.asarray([0, 1, 2, 29, 30, 31, 49, 50, 51, 699, 700, 701, 5_000, 8_999, 9_000, 1_000_000])
    found, expected = (np.asarray(jax.jit(jax.vmap(schedule))(steps)) for schedule in (ours.create(), theirs))
    assert found.dtype == expected.dtype
    # A product and a sum may be rounded once or twice, as a processor's compiler likes.
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(np.float32).eps, atol=0)
    alone = [float(ours.create()(int(step))) for step in steps]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=F32_ROUNDING * expected.max())  # of numbers up to the peak


def test_adamw_with_clipping_and_averaging_matches_the_recording(golden):
    with np.load(golden / "data" / "adamw_clip_ema.npz") as archive:
        recorded = unflatten(dict(archive))
    schedule = CosineDecaySchedule(warmup_steps=3, peak_lr=1e-2, decay_steps=20, decay_lr=1e-3)
    optimizer = create_optimizer(AdamW(), schedule)
    params = average = jax.tree.map(jnp.asarray, recorded["init"])
    state = optimizer.init(params)
    for i in range(8):
        grads = jax.tree.map(jnp.asarray, recorded[f"grad{i}"])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = step_jax.average(0.99, average, params)
        np.testing.assert_allclose(step_jax.norm(grads), recorded[f"grad_norm{i}"], rtol=NORM_RTOL)
        for name in ("a", "b"):
            np.testing.assert_allclose(params[name], recorded[f"param{i}"][name], atol=ADAM_ATOL)
            np.testing.assert_allclose(average[name], recorded[f"ema{i}"][name], atol=ADAM_ATOL)


def test_fsdp_rule_shards_the_recorded_axes(golden):
    recorded = json.loads((golden / "data" / "fsdp_sharding.json").read_text())
    for name, case in recorded.items():
        if not name.startswith("fsdp_"):
            continue
        num_devices = case["mesh"]["fsdp"]
        for leaf in case["specs"]:
            dtype = jnp.dtype(leaf["dtype"])
            spec = tuple(sharding.fsdp_spec(tuple(leaf["shape"]), dtype, num_devices))
            axis = spec.index(sharding.FSDP_AXIS) if sharding.FSDP_AXIS in spec else None
            assert axis == leaf["sharded_axis"], (name, leaf)


def test_a_mesh_that_does_not_divide_the_devices_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"fsdp_devices=7 .* choose one of \[1"):
        sharding.make_mesh(7)


def test_a_decay_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"decay_steps=100 .* warmup_steps=1000"):
        CosineDecaySchedule(decay_steps=100).create()


def test_sgd_takes_its_rate_from_the_schedule_and_does_not_clip():
    optimizer = create_optimizer(SGD(momentum=0.0), CosineDecaySchedule(warmup_steps=0, peak_lr=0.5, decay_lr=0.5))
    params = {"w": jnp.zeros(2)}
    grads = {"w": jnp.asarray([300.0, 400.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-150.0, -200.0], rtol=1e-6)
