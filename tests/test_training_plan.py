"""The memory plan: agrees with the compiler, counts the state exactly, and takes seconds for the real model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from openpi.cli import train as cli_train
from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.training import liveness, plan, step_jax
from openpi.training.config import TrainConfig, get_config

# Predicted / XLA for the CPU. Compilers fuse and order as they like; see benchmarks/memory_plan.md.
BAND = (0.65, 1.5)


def recipe(**fields) -> TrainConfig:
    """Small, with enough tokens that activations outweigh the state."""
    expert = GemmaConfig(64, 5, 256, 4, 1, 16, vocab_size=512)
    model = Pi0Config(
        dtype="float32",
        paligemma_variant=expert,
        action_expert_variant=expert,
        image_encoder_variant=SiglipConfig(64, 2, 128, 2, 14),
        augmentation=False,
        **fields,
    )
    return dataclasses.replace(get_config("debug"), model=model, batch_size=4, ema_decay=0.99)


@pytest.mark.parametrize("fields", [{"remat": "full", "pi05": True}, {"remat": "none"}], ids=["full", "none"])
def test_the_prediction_agrees_with_the_compiler(fields: dict) -> None:
    config = recipe(**fields)
    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(step_jax.init_state, config), key)
    observation, actions = config.model.inputs_spec(batch_size=config.batch_size)
    step = jax.jit(functools.partial(step_jax.train_step, config), donate_argnums=1)
    found = step.lower(key, state, {**observation.to_dict(), "actions": actions}).compile().memory_analysis()
    ratio = plan.predict(config).total / (found.argument_size_in_bytes + found.temp_size_in_bytes)
    assert BAND[0] < ratio < BAND[1]


def test_buffers_live_from_their_making_to_their_last_reader() -> None:
    def program(x: jax.Array) -> jax.Array:
        a = jnp.tanh(x @ x)  # one buffer for the product, which its tangent takes over
        b = a @ a
        c = b @ b  # a is gone by now
        return jnp.sum(c)

    size = 16 * 16 * 4
    traced = jax.make_jaxpr(program)(jax.ShapeDtypeStruct((16, 16), jnp.float32))
    assert 2 * size <= liveness.peak_bytes(traced, liveness.plain_size) < 2.1 * size


def test_a_loop_keeps_what_it_stacks() -> None:
    def program(x: jax.Array) -> jax.Array:
        _, stacked = jax.lax.scan(lambda c, _: (c @ c, c @ x), x, length=10)
        return stacked @ x

    size = 16 * 16 * 4
    traced = jax.make_jaxpr(program)(jax.ShapeDtypeStruct((16, 16), jnp.float32))
    assert liveness.peak_bytes(traced, liveness.plain_size) >= 20 * size


def test_the_state_of_the_real_model_is_counted_exactly() -> None:
    memory = plan.predict(dataclasses.replace(get_config("pi0_libero"), batch_size=1))
    parameters = 4 * 3_238_048_528
    assert memory.parameters == memory.gradients == memory.average == parameters
    assert memory.optimizer == pytest.approx(2 * parameters, rel=1e-6)


def test_every_alternative_that_should_save_memory_does() -> None:
    config = dataclasses.replace(get_config("pi0_libero"), batch_size=32)
    as_it_is = plan.predict(config)
    options = dict(plan.alternatives(config))
    lora, averageless = options["LoRA variants, freeze_filter, no EMA"], options["--ema-decay=None"]
    assert plan.predict(lora).total < plan.predict(averageless).total < as_it_is.total
    assert 80 not in as_it_is.fits or 48 not in as_it_is.fits
    kept = plan.predict(options["--model.remat=none"])
    assert kept.activations > 3 * as_it_is.activations
    shared = plan.predict(options["--fsdp-devices=4"], num_devices=4)
    assert shared.parameters == pytest.approx(as_it_is.parameters / 4, rel=0.01)
    assert shared.activations < as_it_is.activations


def test_the_command_prints_the_plan_without_a_run_a_dataset_or_weights(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_train.main(["pi0_libero_low_mem_finetune", "--plan", "--batch-size=16"]) == 0
    table = capsys.readouterr().out
    assert "batch 16 on 1 device(s)" in table and "as it is" in table and "--gradient-accumulation-steps=4" in table
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_split_is_refused(capsys) -> None:
    assert cli_train.main(["pi0_libero", "--plan", "--batch-size=30", "--fsdp-devices=4"]) == 1
    assert "batch_size=30 does not split into 4 devices" in capsys.readouterr().err
