"""Whole training runs as users start them: processes, signals, sudden deaths, and what is left on disk.

Commands that nobody disturbs run in this process, where they find what others have compiled.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import forked
import paths
import weight_layouts
from openpi.cli.main import main
from openpi.policies import policy_config
from openpi.policies.contract import Contract
from openpi.shared import normalize
from openpi.shared.tree import flatten
from openpi.training.checkpoints import complete_steps
from openpi.training.recipe_io import load_recipe
from openpi.weights import orbax_io

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:arm"
PROGRAM = (sys.executable, "-m", "openpi.cli.main")
NUM_STEPS = 6
NUMBERS = ("loss", "grad_norm", "param_norm", "learning_rate")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def dataset(arm_dataset) -> Path:
    return arm_dataset


@pytest.fixture(scope="module")
def command(workspace, dataset) -> list[str]:
    flags = {
        "data.repo-id": dataset,
        "checkpoint-base-dir": workspace / "checkpoints",
        "assets-base-dir": workspace / "assets",
        "num-train-steps": NUM_STEPS,
        "holdout-episodes": 1,
        "keep-best": None,
    }
    words = [f"--{name}" if value is None else f"--{name}={value}" for name, value in flags.items()]
    return ["train", RECIPE, *words]


@pytest.fixture(scope="module")
def whole_run(workspace, command) -> Path:
    """The folder of a run that nobody disturbed."""
    done = _train(command, "whole")
    assert done.returncode == 0, done.stderr
    return workspace / "checkpoints" / "arm" / "whole"


def _train(command: list[str], name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return _call(*command, f"--exp-name={name}", *more)


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    """A command in this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        try:
            code = main(list(words))
        finally:
            logging.root.handlers[:] = handlers
            logging.root.setLevel(level)
    return subprocess.CompletedProcess(words, code, out.getvalue(), log.getvalue())


def _train_until(command: list[str], name: str, text: str, signum: int) -> tuple[int, str]:
    """Sends a signal when `text` appears in the log; returns exit code and log."""
    child = forked.Popen([*PROGRAM, *command, f"--exp-name={name}"], stderr=subprocess.PIPE, text=True)
    with child:
        log = "".join(_lines_sending(child, text, signum))
    return child.returncode, log


def _lines_sending(child: subprocess.Popen[str], text: str, signum: int) -> Iterator[str]:
    assert child.stderr is not None
    is_sent = False
    for line in child.stderr:
        if text in line and not is_sent:
            child.send_signal(signum)
            is_sent = True
        yield line


def _metrics(run: Path) -> dict[int, dict[str, float]]:
    """Per step, everything that does not depend on the clock."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        numbers = {k: v for k, v in row.items() if k not in ("step", "samples_per_s", "data_wait")}
        rows.setdefault(row["step"], {}).update(numbers)
    return rows


def _assert_same_end(run: Path, expected: Path, *, stopped_at: int | None = None) -> None:
    """To the last bit: every metric, all parameters, the optimiser. Where it was stopped there may be no validation."""
    rows, expected_rows = _metrics(run), _metrics(expected)
    if stopped_at is not None:
        rows[stopped_at], expected_rows[stopped_at] = (
            {name: of[stopped_at][name] for name in NUMBERS} for of in (rows, expected_rows)
        )
    assert rows == expected_rows
    last = str(NUM_STEPS - 1)
    for read, item in ((orbax_io.read_params, "params"), (weight_layouts.read_orbax, "train_state")):
        found, wanted = flatten(read(run / last / item)), flatten(read(expected / last / item))
        assert found.keys() == wanted.keys()
        for path, leaf in wanted.items():
            np.testing.assert_equal(found[path], leaf, err_msg=path)


def test_a_run_leaves_a_checkpoint_that_explains_itself(whole_run, workspace, dataset):
    last = whole_run / str(NUM_STEPS - 1)
    assert {entry.name for entry in last.iterdir()} >= {
        "params",
        "train_state",
        "assets",
        "recipe.json",
        "recipe_source.py",
        "contract.json",
        "loader_state.json",
    }
    recipe = load_recipe(last)
    assert recipe.exp_name == "whole"
    assert recipe.data.repo_id == str(dataset)
    contract = Contract.load(last)
    assert contract.action_horizon == 3
    assert contract.control_hz == 10
    assert (last / "assets" / "tokenizer.model").stat().st_size > 0
    assert recipe.data.asset_id == "dataset"  # the folder's name
    stored = normalize.load(last / "assets" / "dataset")
    assert stored == normalize.load(workspace / "assets" / "arm" / "dataset")
    assert not (dataset / "norm_stats.json").exists()


def test_a_run_reports_every_step_and_the_error_on_held_out_episodes(whole_run):
    metrics = _metrics(whole_run)
    assert sorted(metrics) == list(range(NUM_STEPS))
    assert all(np.isfinite(metrics[step][name]) for step in metrics for name in NUMBERS)
    evaluated = [step for step, row in metrics.items() if "validation_loss" in row]
    assert evaluated == [2, 4, 5]
    per_joint = [metrics[5][f"action_error/{name}"] for name in ("lift", "turn", "grip")]
    np.testing.assert_allclose(metrics[5]["action_error"], np.mean(per_joint), rtol=1e-6)
    # Constant, and what a model that learned nothing but the mean would have.
    baselines = {metrics[step]["baseline/mean_action"] for step in evaluated}
    assert len(baselines) == 1 and 0 < baselines.pop() < metrics[2]["action_error"]


def test_a_run_has_a_page_with_a_picture_of_each_validation(whole_run):
    assert sorted(file.name for file in whole_run.glob("validation_*.png")) == [
        f"validation_{step}.png" for step in (2, 4, 5)
    ]
    page = (whole_run / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4  # and the first batch
    for words in ("Loss", "mean action", "grip", "Samples per second", "step 5: recorded in grey", "<b>6</b>"):
        assert words in page


def test_the_first_batch_is_shown_with_its_true_brightness(whole_run):
    sheet = np.asarray(Image.open(whole_run / "first_batch.png"))
    pictures = sheet[sheet.min(axis=-1) < 250]  # without the white around them
    assert 100 < pictures.mean() < 155  # the dataset's images are uniform noise in 0..255


def test_a_terminated_run_saves_and_resumes_as_if_nothing_had_happened(command, whole_run):
    code, log = _train_until(command, "terminated", "Step 2:", signal.SIGTERM)
    run = whole_run.with_name("terminated")
    assert code == 128 + signal.SIGTERM, log
    assert "--resume" in log
    stopped_at = complete_steps(run)[-1]
    assert 2 <= stopped_at < NUM_STEPS
    assert max(_metrics(run)) == stopped_at
    done = _train(command, "terminated", "--resume")
    assert done.returncode == 0, done.stderr
    _assert_same_end(run, whole_run, stopped_at=stopped_at)


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(command, whole_run):
    """And with worker processes, which change nothing."""
    code, log = _train_until(command, "killed", "checkpoint saved", signal.SIGKILL)
    run = whole_run.with_name("killed")
    assert code == -signal.SIGKILL, log
    assert complete_steps(run)
    done = _train(command, "killed", "--resume", "--num-workers=1")
    assert done.returncode == 0, done.stderr
    _assert_same_end(run, whole_run)
    assert not [entry for entry in run.iterdir() if entry.name.startswith((".partial", ".discarded"))]


def test_a_run_is_continued_with_its_own_recipe_and_another_batch_size(workspace, whole_run):
    """No flag of the start is given again; the data order that cannot go on begins anew."""
    shutil.copytree(whole_run, whole_run.with_name("longer"))
    where = f"--checkpoint-base-dir={workspace / 'checkpoints'}"
    done = _train(["train", RECIPE], "longer", where, "--resume", "--num-train-steps=8", "--batch-size=2")
    assert done.returncode == 0, done.stderr
    run = whole_run.with_name("longer")
    assert "batch_size was 4, is 2" in done.stderr and "a new order begins" in done.stderr
    found, before = _metrics(run), _metrics(whole_run)
    assert sorted(found) == list(range(8))
    assert {step: found[step] for step in range(NUM_STEPS - 1)} == {s: before[s] for s in range(NUM_STEPS - 1)}
    assert "validation_loss" in found[7]  # of the held-out episode that the first command named
    recipe = load_recipe(run / "7")
    assert (recipe.batch_size, recipe.holdout_episodes, recipe.keep_best) == (2, 1, True)


STUCK = """
import dataclasses, os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
import tiny_recipe
from openpi.transforms import Group

@dataclasses.dataclass(frozen=True)
class StuckInputs(tiny_recipe.ArmInputs):
    def __call__(self, data):
        if Path("stop").exists():
            Path("is_stuck").touch()
            time.sleep(600)
        return super().__call__(data)

@dataclasses.dataclass(frozen=True)
class StuckData(tiny_recipe.ArmData):
    def create(self, assets_dirs, model_config):
        group = Group(inputs=(StuckInputs(),), outputs=(tiny_recipe.ArmOutputs(),))
        return dataclasses.replace(super().create(assets_dirs, model_config), data_transforms=group)

arm = dataclasses.replace(
    tiny_recipe.arm, data=StuckData(base_config=tiny_recipe._PROMPTS), num_workers=1, num_train_steps=100_000,
    save_interval=0, log_interval=1,
)
"""


def test_sigterm_ends_a_run_whose_data_are_stuck_with_a_checkpoint(dataset, tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    child = forked.Popen(
        [*PROGRAM, "train", "stuck.py:arm", "--exp-name=x", f"--data.repo-id={dataset}"],
        env={**os.environ, "TESTS": str(paths.SUPPORT)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = ""
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            log += line
            if "Step 2:" in line:
                break
        (tmp_path / "stop").touch()
        while not (tmp_path / "is_stuck").exists() and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        log += child.stderr.read()
    assert child.returncode == 128 + signal.SIGTERM, log
    assert complete_steps(tmp_path / "checkpoints" / "arm" / "x") != []
    assert "only checkpoint is that of the end" in log


FAILING = """
import dataclasses, itertools, sys
sys.path.insert(0, {tests!r})
import tiny_recipe
from openpi.transforms import Group

calls = itertools.count()

@dataclasses.dataclass(frozen=True)
class FailingInputs(tiny_recipe.ArmInputs):
    def __call__(self, data):
        if next(calls) > 100:
            raise KeyError("joints")
        return super().__call__(data)

@dataclasses.dataclass(frozen=True)
class FailingData(tiny_recipe.ArmData):
    def create(self, assets_dirs, model_config):
        group = Group(inputs=(FailingInputs(),), outputs=(tiny_recipe.ArmOutputs(),))
        return dataclasses.replace(super().create(assets_dirs, model_config), data_transforms=group)

arm = dataclasses.replace(
    tiny_recipe.arm, data=FailingData(base_config=tiny_recipe._PROMPTS), num_train_steps=1000, save_interval=0,
)
"""


def test_a_sample_that_cannot_be_read_is_named_and_costs_no_step(dataset, whole_run, tmp_path):
    recipe = tmp_path / "failing.py"
    recipe.write_text(FAILING.format(tests=str(paths.SUPPORT)))
    where = [f"--checkpoint-base-dir={tmp_path}", f"--assets-base-dir={tmp_path / 'assets'}", "--holdout-episodes=1"]
    done = _call("train", f"{recipe}:arm", "--exp-name=x", f"--data.repo-id={dataset}", *where)
    assert done.returncode == 1
    assert re.search(rf"openpi train: 'joints' \(KeyError, frame \d of episode \d of {dataset}; at sample", done.stderr)
    (kept,) = complete_steps(tmp_path / "arm" / "x")
    assert kept == max(_metrics(tmp_path / "arm" / "x"))


def test_an_existing_run_is_left_alone_unless_asked(command, whole_run):
    before = (whole_run / "metrics.jsonl").read_text()
    done = _train(command, "whole")
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_a_dataset_that_does_not_fit_is_refused_before_the_model_is_built(command):
    done = _train(command, "wrong", "--model.action-dim=2")
    assert done.returncode == 1
    assert "do not fit the model" in done.stderr
    assert "actions: shape [3, 3], the model takes [3, 2]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_start_does_not_block_the_corrected_one(command):
    refused = _train(command, "refused", "--data.repo-id=./nowhere", "--num-train-steps=1")
    assert refused.returncode == 1 and "nowhere" in refused.stderr
    again = _train(command, "refused", "--num-train-steps=1")
    assert again.returncode == 0, again.stderr


def test_statistics_are_computed_where_the_recipe_reads_them(workspace, dataset):
    where = workspace / "other_assets"
    flags = [f"--data.repo-id={dataset}", f"--assets-base-dir={where}", "--data.assets.asset-id=mine"]
    done = _call("stats", "--config-name", RECIPE, "--max-frames=20", *flags)
    assert done.returncode == 0, done.stderr
    assert str(where / "arm" / "mine" / "norm_stats.json") in done.stdout
    stats = normalize.load(where / "arm" / "mine")
    assert stats["state"].width == 3
    np.testing.assert_allclose(stats["actions"].std.shape, 3)


def test_a_model_that_writes_its_actions_trains_validates_and_serves(command, workspace):
    fast = [RECIPE.replace(":arm", ":fast") if word == RECIPE else word for word in command]
    done = _train(fast, "tokens")
    assert done.returncode == 0, done.stderr
    run = workspace / "checkpoints" / "fast" / "tokens"
    last = _metrics(run)[NUM_STEPS - 1]
    assert last["undecodable"] == 0 and np.isfinite(last["action_error/grip"])

    checkpoint = run / str(NUM_STEPS - 1)
    recipe = load_recipe(checkpoint)
    nowhere = dataclasses.replace(recipe.model, tokenizer_path="gone", action_tokenizer_path="gone")
    policy = policy_config.create_trained_policy(dataclasses.replace(recipe, model=nowhere), checkpoint)
    observation = {"camera": np.zeros((32, 32, 3), np.uint8), "joints": np.zeros(3), "prompt": "pick up the cube"}
    actions = policy.infer(observation)["actions"]
    assert actions.shape == (3, 3) and np.isfinite(actions).all()
    with pytest.raises(ValueError, match="token by token; leave noise out"):
        policy.infer(observation, noise=np.zeros((3, 3)))
