"""PyTorch runs of several real processes (gloo on this machine): the numbers of one, whole or split parameters."""

import json
import signal
import sys
from pathlib import Path

import jax
import pytest
from test_torch_training import metrics_of

import forked
import tiny_recipe
import training_processes
import weight_layouts
from openpi.training.checkpoints import complete_steps
from openpi.weights import orbax_io

# Several runs one after another in the same processes: most of their time is importing.
TRAIN_SEVERAL = """
import json, os, sys
if __name__ == "__main__":
    from openpi.cli.console import configure_logging
    from openpi.training import config, loop
    from openpi.training.distributed import processes
    from openpi.training.distributed.launch import find_launch
    from openpi.weights import safetensors_io
    safetensors_io._WHOLE_BYTES, safetensors_io._BLOCK_BYTES = 0, 1000  # so that tensors come in rows
    launch = find_launch({}, os.environ)
    configure_logging(process=launch.process_id)
    processes.start(launch, "pytorch")
    for words in json.loads(sys.argv[1]):
        try:
            loop.train(config.cli(words))
        except (OSError, RuntimeError) as error:
            print(f"{type(error).__name__}: {error}")
    processes.end(0)
"""

# The first waits for what never comes, as in a collective between GPUs; the second is gone.
WAITS = """
import os, signal, threading
if __name__ == "__main__":
    from openpi.training.backends.pytorch import processes as processes_pytorch
    from openpi.training.distributed import processes
    from openpi.training.distributed.launch import find_launch
    processes_pytorch._BEAT_S, processes_pytorch._GONE_S, processes_pytorch._LAST_WORDS_S = 0.2, 2, 0.1
    processes.start(find_launch({}, os.environ), "pytorch")
    if processes.index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()
"""

RECIPE = f"{tiny_recipe.__file__}:tiny"
ARM = f"{tiny_recipe.__file__}:arm"
DATA_END = f"{tiny_recipe.__file__}:data_end"
LORA = f"{tiny_recipe.__file__}:lora"


def words(recipe: str, name: str, *flags: str, save_interval: int = 100) -> list[str]:
    """By default only the last step is saved: split parameters are put together for each checkpoint."""
    return [recipe, f"--exp-name={name}", "--backend=pytorch", f"--save-interval={save_interval}", *flags]


def train(folder: Path, count: int, runs: list[list[str]]) -> list[str]:
    """The logs."""
    environment = training_processes.environment()
    command = [sys.executable, "-c", TRAIN_SEVERAL, json.dumps(runs)]
    return training_processes.run(command, count, environment, folder / f"logs-{count}", preloads=forked.PYTORCH)


def test_a_process_that_waits_in_a_collective_ends_when_another_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITS]
    children = training_processes.start(command, 2, training_processes.environment(), tmp_path, forked.PYTORCH)
    codes, logs = training_processes.end(children, tmp_path)
    assert codes == [1, -signal.SIGKILL], logs
    assert "process 1 of 2 has not been heard of" in logs[0]


def assert_same_numbers(found: Path, expected: Path, steps: range) -> None:
    ours, theirs = metrics_of(found), metrics_of(expected)
    for step in steps:
        for name in ("loss", "grad_norm", "param_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4), (found.name, step, name)


def test_two_and_four_processes_train_as_one_and_continue_each_others_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm_dataset: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    orbax_io.write_params(tmp_path / "jax" / "params", tiny_recipe.MODEL.create(jax.random.key(7)).params)
    base = weight_layouts.write(tmp_path / "jax" / "params", tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    adapters = (LORA, "lora", f"--data.repo-id={arm_dataset}", f"--pytorch-weight-path={base}")
    adapters += ("--no-save-frozen-params",)
    half, rest = "--num-train-steps=3", "--resume"
    train(
        tmp_path,
        4,
        [
            words(RECIPE, "ddp4", half),
            words(RECIPE, "fsdp4", half, "--fsdp-devices=4"),
            words(RECIPE, "groups", half, "--fsdp-devices=2"),
            words(*adapters, "--num-train-steps=2", "--fsdp-devices=4"),
        ],
    )
    pi05 = (ARM, "pi05", f"--data.repo-id={arm_dataset}", "--model.pi05", "--holdout-episodes=1", "--eval-batches=1")
    pi05 += ("--ema-decay=0.9",)
    logs = train(
        tmp_path,
        2,
        [
            words(RECIPE, "ddp2"),
            words(RECIPE, "fsdp2", "--fsdp-devices=2"),
            words(RECIPE, "fsdp4", rest),
            words(RECIPE, "ddp4", rest, "--fsdp-devices=2"),
            words(*adapters, rest),
            words(*pi05, "--fsdp-devices=2", "--num-train-steps=3", save_interval=1),
            words(RECIPE, "8bit", "--fsdp-devices=2", "--optimizer.state-bits=8", half),
            words(DATA_END, "ends", f"--data.repo-id={arm_dataset}", "--num-train-steps=100", "--fsdp-devices=2"),
        ],
    )
    from openpi.training import config, loop

    for run in (
        words(RECIPE, "one"),
        words(RECIPE, "groups", rest),
        words(*adapters, "--exp-name=lora-one"),
        words(*pi05, rest, "--num-train-steps=5", save_interval=1),
        words(*pi05, "--exp-name=pi05-one", "--num-train-steps=5", save_interval=1),
        words(RECIPE, "8bit", "--optimizer.state-bits=8", rest),
    ):
        loop.train(config.cli(run))
    runs = tmp_path / "checkpoints" / "tiny"
    for name in ("ddp2", "fsdp2", "ddp4", "fsdp4", "groups"):
        assert_same_numbers(runs / name, runs / "one", range(6))
    assert_same_numbers(runs.parent / "arm" / "pi05", runs.parent / "arm" / "pi05-one", range(5))
    found, expected = (metrics_of(runs.parent / "arm" / name) for name in ("pi05", "pi05-one"))
    for step in range(1, 5):
        for name in ("validation_loss", "action_error"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-3), (step, name)
    assert metrics_of(runs / "8bit")[5]["loss"] == pytest.approx(metrics_of(runs / "one")[5]["loss"], rel=0.05)
    lora = tmp_path / "checkpoints" / "lora"
    assert_same_numbers(lora / "lora", lora / "lora-one", range(4))
    # A process that has no data any more: all say so, and save the last step.
    assert "RuntimeError: process 1 failed while reading the data: the disk is gone" in logs[0]
    assert "OSError: the disk is gone" in logs[1]
    ended = tmp_path / "checkpoints" / "arm" / "ends"
    assert complete_steps(ended) == [max(metrics_of(ended))]
