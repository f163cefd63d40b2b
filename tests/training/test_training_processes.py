"""Runs of several real processes: the same numbers as one, checkpoints that any number continues, and their ends.

One story in three parts, each compared with a run that one process did undisturbed: four processes are told to stop,
two continue and lose one of them, one finishes.
"""

import json
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import paths
import training_processes
from openpi.shared.tree import flatten
from openpi.training.checkpoints import complete_steps
from openpi.weights import orbax_io
from training_processes import metrics

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:expert_only"
NUM_STEPS = 24
# Runs that are stopped have a checkpoint soon; the others need no more than the last.
SAVES_OFTEN, SAVES_AT_THE_END = "--save-interval=2", f"--save-interval={NUM_STEPS}"
# f32 sums in another order, over up to NUM_STEPS updates. Measured: below 1e-4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return training_processes.environment()


@pytest.fixture(scope="module")
def words(workspace, arm_dataset) -> list[str]:
    """Of every run here."""
    flags = {
        "data.repo-id": arm_dataset,
        "checkpoint-base-dir": workspace / "checkpoints",
        "assets-base-dir": workspace / "assets",
        "num-train-steps": NUM_STEPS,
        "gradient-accumulation-steps": 2,
        "holdout-episodes": 1,
        "model.max-token-len": 96,  # of which the dataset's prompts take less than 32
    }
    return [RECIPE, *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module")
def whole_run(workspace, words, environment) -> Path:
    """The folder of a run that one process did, undisturbed."""
    more = ["--exp-name=whole", "--eval-interval=2", "--model.no-skip-unused"]
    command = training_processes.train_command(*words, *more, SAVES_AT_THE_END)
    training_processes.run(command, 1, environment, workspace / "whole")
    return workspace / "checkpoints" / "arm" / "whole"


@pytest.fixture(scope="module")
def stopped(workspace, words, environment) -> tuple[Path, list[int], list[str]]:
    """Four processes that share the parameters in pairs, of which the last is told to stop: run, exit codes, logs."""
    logs = workspace / "stopped"
    # Validation takes long to compile; two processes do it below.
    more = ["--exp-name=changing", "--fsdp-devices=2", f"--eval-interval={NUM_STEPS}", "--model.no-skip-unused"]
    command = training_processes.train_command(*words, *more, SAVES_OFTEN)
    children = training_processes.start(command, 4, environment, logs)
    training_processes.wait_for("Step 1:", children[0], logs / "0.log")
    children[3].send_signal(signal.SIGTERM)
    codes, texts = training_processes.end(children, logs)
    run = workspace / "checkpoints" / "arm" / "of_four"
    shutil.copytree(run.with_name("changing"), run)
    return run, codes, texts


@pytest.fixture(scope="module")
def bereft(workspace, words, environment, stopped) -> tuple[Path, list[int], list[str]]:
    """Two processes that continue the run of four, of which the second is killed: run, exit codes, logs.

    They compute what the samples of both use.
    """
    run, logs = stopped[0].with_name("changing"), workspace / "bereft"
    more = ["--exp-name=changing", "--resume", "--eval-interval=2", "--model.skip-unused"]
    command = training_processes.train_command(*words, *more, SAVES_OFTEN)
    children = training_processes.start(command, 2, environment, logs)
    training_processes.wait_for("checkpoint saved", children[0], logs / "0.log")
    children[1].kill()
    return run, *training_processes.end(children, logs)


def _assert_same_numbers(found: dict, expected: dict) -> None:
    for step, row in found.items():
        for name, value in row.items():
            np.testing.assert_allclose(value, expected[step][name], rtol=TOLERANCE, err_msg=f"{name}, step {step}")


def test_a_signal_to_one_of_four_processes_ends_all_with_one_checkpoint(stopped):
    run, codes, logs = stopped
    assert codes == [128 + signal.SIGTERM] * 4, "\n".join(logs)
    last = complete_steps(run)[-1]
    assert all(f"stopped after step {last};" in log for log in logs)
    assert not [entry.name for entry in run.iterdir() if entry.name.startswith((".partial", ".discarded", ".seen"))]


def test_four_processes_compute_what_one_does(stopped, whole_run):
    run = stopped[0]
    found = metrics(run)
    assert sorted(found) == list(range(complete_steps(run)[-1] + 1))
    _assert_same_numbers(found, metrics(whole_run))


def test_one_process_speaks_for_all(stopped):
    """Each step is reported once, on the console and in the file."""
    run, _, (first, *others) = stopped
    assert "4 devices (cpu) of 4 processes" in first
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(len(lines)))
    assert not any(re.search(r"INFO|Step \d", log) for log in others)


def test_each_process_writes_its_part_of_a_checkpoint_in_the_published_layout(stopped, whole_run):
    run = stopped[0]
    checkpoint = run / str(complete_steps(run)[-1])
    whole = whole_run / str(NUM_STEPS - 1)
    assert {entry.name for entry in checkpoint.iterdir()} == {e.name for e in whole.iterdir()} - {"eval_metrics.json"}
    writers = {entry.name for entry in (checkpoint / "params").glob("ocdbt.process_*")}
    assert len(writers) == 4
    for item in ("params", "train_state"):
        found, expected = (orbax_io.leaf_metadata(folder / item) for folder in (checkpoint, whole))
        assert {p: (leaf.shape, leaf.dtype) for p, leaf in found.items()} == {
            p: (leaf.shape, leaf.dtype) for p, leaf in expected.items()
        }


def test_two_processes_continue_and_validate_what_four_began(bereft, whole_run):
    run, _, logs = bereft
    assert "resuming after step" in logs[0]
    of_four = complete_steps(run.with_name("of_four"))[-1]
    assert complete_steps(run)[-1] > of_four
    found = metrics(run)
    validated = [step for step, row in found.items() if "validation_loss" in row]
    assert {"action_error", "action_error/grip"} <= found[validated[0]].keys()
    _assert_same_numbers(found, metrics(whole_run))


def test_a_process_that_dies_ends_the_others(bereft):
    _, codes, logs = bereft
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL), logs[0]


def test_one_process_with_four_devices_finishes_what_two_left(bereft, words, workspace, whole_run):
    run = bereft[0]
    more = ["--exp-name=changing", "--resume", "--fsdp-devices=2", "--eval-interval=2"]
    command = training_processes.train_command(*words, *more, SAVES_AT_THE_END)
    (log,) = training_processes.run(command, 1, training_processes.environment(devices=4), workspace / "finished")
    assert "4 devices" in log
    found, expected = metrics(run), metrics(whole_run)
    assert found.keys() == expected.keys()
    _assert_same_numbers(found, expected)
    params, wanted = (flatten(orbax_io.read_params(r / str(NUM_STEPS - 1) / "params")) for r in (run, whole_run))
    for path, leaf in wanted.items():
        # Some gradients are rounding errors only, as those of a bias under a softmax; Adam makes steps of them.
        np.testing.assert_allclose(params[path], leaf, rtol=TOLERANCE, atol=1e-5, err_msg=path)


# What processes tell each other, without training: two processes go through it and write what they met.
TALK = """
    import dataclasses, json, os, sys
    from pathlib import Path
    import numpy as np
    from jax._src import distributed
    from openpi.shared import normalize
    from openpi.training import sharding
    from openpi.training.distributed import launch
    from openpi.training.distributed import processes
    from openpi.training.backends.jax import processes as processes_jax
    from openpi.training.run import run_directory
    from openpi.training.data import stats_in_use
    from openpi.training.config import get_config

    processes.start(launch.find_launch({}, os.environ), "jax")
    here = processes.index()

    def error_of(action):
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def one_fails():
        with processes.together("opening the data"):
            if here == 1:
                raise FileNotFoundError("no dataset on this node")

    def stats(mean):
        return normalize.NormStats(np.array([1.0, mean]), np.ones(2))

    def statistics(own):
        return stats_in_use._of_first(own, "assets/arm")

    recipe = get_config(sys.argv[2])
    own = dataclasses.replace(recipe, exp_name="x", checkpoint_base_dir=f"{sys.argv[1]}/node{here}")
    client = distributed.global_state.client
    vote = processes_jax.Vote(sharding.make_mesh(1))
    found = {
        "failure": error_of(one_fails),
        "difference": error_of(lambda: processes.check_same("the recipes differ", {"seed": 0, "batch_size": 4 + here})),
        "statistics": error_of(lambda: statistics({"state": stats(0.0), "actions": stats(here / 4)})),
        "statistics of the first": float(statistics({"state": stats(0.5)} if here == 0 else None)["state"].mean[1]),
        "folder": error_of(lambda: run_directory.open_run(own)),
        "of the first": processes.on_first("counting", lambda: {"from": here}),
        "gathered": processes.gather(np.full((1, 2), 1 / 3 + here)).tolist(),
        "counted": [processes.exchange("counting up", [here, i]) for i in range(3)],
        "left in the store": len(client.key_value_dir_get("openpi/counting up/")),
        "votes": [vote(15 if here == 1 and i == 1 else 0) for i in range(5)],
    }
    Path(sys.argv[1], f"{here}.json").write_text(json.dumps(found))
    processes.end(0)
"""


@pytest.fixture(scope="module")
def told(workspace, environment) -> list[dict]:
    """What each of two processes met."""
    command = [sys.executable, "-c", textwrap.dedent(TALK), str(workspace), RECIPE]
    script_environment = {**environment, "OPENPI_COORDINATOR_TIMEOUT_S": "60"}
    training_processes.run(command, 2, script_environment, workspace / "talk")
    return [json.loads((workspace / f"{i}.json").read_text()) for i in range(2)]


def test_a_failure_in_one_process_is_an_error_in_all(told):
    assert told[1]["failure"] == "FileNotFoundError: no dataset on this node"
    assert told[0]["failure"] == "RuntimeError: process 1 failed while opening the data: no dataset on this node"


def test_processes_started_with_different_recipes_refuse_to_train(told):
    for found in told:
        assert "batch_size is 4 in process 0, 5 in process 1" in found["difference"]
        assert "seed" not in found["difference"]


def test_processes_with_other_statistics_refuse_to_train(told):
    for found in told:
        assert "process 1 has other normalisation statistics in assets/arm than process 0" in found["statistics"]
        assert "actions mean[1] is 0.0 and 0.25" in found["statistics"]


def test_a_process_without_statistics_gets_those_of_the_first(told):
    assert [found["statistics of the first"] for found in told] == [0.5, 0.5]


def test_a_checkpoint_folder_that_is_not_shared_is_noticed(told, workspace):
    for found in told:
        assert f"{workspace}/node1/arm/x is not the folder" in found["folder"]
        assert "--checkpoint-base-dir" in found["folder"]
    assert not (workspace / "node1").exists()


def test_what_one_process_knows_all_get_to_know(told):
    for found in told:
        assert found["of the first"] == {"from": 0}
        assert found["gathered"] == [[[1 / 3] * 2], [[4 / 3] * 2]]  # to the last bit
        assert found["counted"] == [[[0, i], [1, i]] for i in range(3)]
        assert found["left in the store"] <= 3  # the last round, and what the other has not removed yet
        assert found["votes"] == [0, 0, 0, 15, 0]
