"""The memory plan: counts the state exactly, asks the compiler where it can, and takes seconds for the real model."""

import dataclasses
import math

import jax
import pytest

from openpi.cli.training import train as cli_train
from openpi.training.backends.jax import plan
from openpi.training.config import get_config
from tiny_recipe import arm


def test_the_compiler_says_what_the_activations_take() -> None:
    known, asked = plan.count_state(arm), plan.ask_compiler(arm)
    assert dataclasses.replace(asked, activations=None) == known
    of_batch = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arm.model.inputs_spec(batch_size=arm.batch_size))
    )
    assert asked.activations > of_batch


def test_the_state_of_the_real_model_is_counted_exactly() -> None:
    memory = plan.count_state(dataclasses.replace(get_config("pi0_libero"), batch_size=1))
    parameters = 4 * 3_238_048_528
    assert memory.parameters == memory.gradients == memory.average == parameters
    assert memory.optimizer == pytest.approx(2 * parameters, rel=1e-6)


def test_every_alternative_that_should_save_memory_does() -> None:
    config = dataclasses.replace(get_config("pi0_libero"), batch_size=32)
    as_it_is = plan.count_state(config)
    options = dict(plan.alternatives(config))
    lora, averageless = options["LoRA variants, freeze_filter, no EMA"], options["--ema-decay=None"]
    assert plan.count_state(lora).total < plan.count_state(averageless).total < as_it_is.total
    assert as_it_is.fits == [80, 141]
    shared = plan.count_state(options["--fsdp-devices=4"], num_devices=4)
    assert shared.parameters == pytest.approx(as_it_is.parameters / 4, rel=0.01)


def test_the_command_prints_the_plan_without_a_run_a_dataset_or_weights(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_train.main(["pi0_libero_low_mem_finetune", "--plan", "--batch-size=16"]) == 0
    table = capsys.readouterr().out
    assert "batch 16 on 1 device(s), GiB on each; at least: no GPU here to compile for" in table
    assert "as it is" in table and "--optimizer.state-bits=8" in table
    assert "Activations come on top" in table and "They shrink with --gradient-accumulation-steps" in table
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_does_not_split_is_refused(capsys) -> None:
    assert cli_train.main(["pi0_libero", "--plan", "--batch-size=30", "--fsdp-devices=4"]) == 1
    assert "batch_size=30 does not split into 4 devices" in capsys.readouterr().err
