"""Programs for the published system run as they are: `tests/support/programs`, in the manner of their users."""

import dataclasses
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tyro

import tiny_recipe
import weight_layouts
from notebooks import run_cells
from openpi.policies.policy import PolicyRecorder
from openpi.policies.policy_config import create_trained_policy
from openpi.shared.tree import flatten, unflatten
from openpi.training import config as _config
from openpi.training.checkpoints import load_norm_stats
from openpi.training.data_loader import create_data_loader
from openpi.training.freeze import freeze_nothing
from openpi.training.recipe.adopted import as_recipe
from openpi.training.recipe_io import load_recipe, save_recipe
from openpi.weights import orbax_io
from paths import ROOT, SUPPORT

PROGRAMS = SUPPORT / "programs"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, arm_dataset):
    """A folder to run them in, with statistics that a program made."""
    folder = tmp_path_factory.mktemp("programs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(PROGRAMS)
        patch.setenv("THEIR_DATASET", str(arm_dataset))
        patch.setenv("THEIR_BASE", str(folder / "base"))
        orbax_io.write_params(folder / "base" / "params", random_params(tiny_recipe.MODEL))
        yield folder
    for name in [name for name in sys.modules if name.startswith("their_")]:
        del sys.modules[name]


def random_params(config) -> dict:
    """None of them zero; cheaper than compiling their initialisation."""
    rng = np.random.default_rng(3)
    flat = flatten(config.abstract_params())
    return unflatten({path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in flat.items()})


@pytest.fixture
def run(workspace, monkeypatch, capsys):
    """A program's output."""

    def call(program: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        runpy.run_path(str(PROGRAMS / program), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def statistics(workspace):
    """Made by the program, and read back by the published function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["their_norm_stats.py", "--config-name", "pi0_arm"])
        runpy.run_path(str(PROGRAMS / "their_norm_stats.py"), run_name="__main__")
    return load_norm_stats(workspace / "assets" / "pi0_arm", "arm")


@pytest.fixture(scope="module")
def trained(workspace, statistics):
    """A run of the training script: the folder of its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["their_training.py", str(workspace / "run")])
        runpy.run_path(str(PROGRAMS / "their_training.py"), run_name="__main__")
    return workspace / "run" / "2"


def test_statistics_of_a_script_of_ones_own_are_those_of_openpi_stats(statistics):
    import their_config
    from openpi.training.data import norm_stats, tabular_frames

    config = their_config.get_config("pi0_arm")
    data_config = config.data.create(config.assets_dirs, config.model)
    expected = norm_stats.compute_norm_stats(tabular_frames.open_frames(data_config, config.model))
    for key, found in statistics.items():
        np.testing.assert_allclose(found.mean, expected[key].mean, atol=1e-6)
        np.testing.assert_allclose(found.std, expected[key].std, atol=1e-6)


def test_a_part_of_the_frames_makes_statistics_too(run, statistics, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("their_norm_stats.py", "--config-name", "pi0_arm", "--max-frames", 13) == "3 batches\n"
    found = load_norm_stats(tmp_path / "assets" / "pi0_arm", "arm")
    assert not np.array_equal(found["state"].mean, statistics["state"].mean)


def test_a_training_script_of_ones_own_trains_saves_and_goes_on(run, trained):
    text = run("their_training.py", trained.parent, "--resume")
    shapes = [line for line in text.splitlines() if "@" in line]
    assert "[0].images['base_0_rgb']: (4, 28, 28, 3)@float32" in shapes
    assert "[0].tokenized_prompt: (4, 8)@int32" in shapes and "[1]: (4, 3, 4)@float32" in shapes
    assert re.findall(r"Step (\d+): loss=\d+\.\d+", text) == ["3", "4"]
    assert {path.name for path in trained.parent.glob("[0-9]*")} == {"4"}  # no `keep_period`: the latest


def latest(trained: Path) -> Path:
    return max(trained.parent.glob("[0-9]*"), key=lambda path: int(path.name))


def test_its_checkpoint_is_served_and_what_it_answered_is_looked_at_in_a_notebook(trained, tmp_path):
    import their_config
    import their_policy

    checkpoint = latest(trained)
    policy = create_trained_policy(their_config.get_config("pi0_arm"), checkpoint)
    recorder = PolicyRecorder(policy, tmp_path / "policy_records")
    for _ in range(2):
        recorder.infer(their_policy.make_arm_example())
    text = run_cells("policy_records.ipynb", f"RECORDS = {str(tmp_path / 'policy_records')!r}")
    assert "requests: 2" in text and "actions [request, horizon, width]: (2, 3, 3)" in text
    for key, what in (
        ("inputs/arm/camera", r"uint8\[32, 32, 3\]"),
        ("inputs/prompt", "pick up the cube"),
        ("outputs/actions", r"float64\[3, 3\]"),
    ):
        assert re.search(rf"{key} +{what}", text), text
    assert "outputs/policy_timing/infer_ms: median" in text


def test_the_cells_of_the_inference_notebook_run(trained):
    names = f"""
        from their_policy import make_arm_example as make_example
        POLICY_CONFIG = MODEL_CONFIG = "their_config:pi0_arm"
        POLICY_CHECKPOINT = MODEL_CHECKPOINT = {str(latest(trained))!r}
    """
    lines = run_cells("inference.ipynb", textwrap.dedent(names)).splitlines()
    assert "actions [horizon, width]: (3, 3)" in lines
    assert lines[-2:] == ["loss [batch, horizon]: (1, 3)"] * 2


def test_a_program_of_pytorch_reads_released_weights(run, trained, tmp_path):
    pytest.importorskip("torch")
    import their_config

    config = their_config.get_config("pi0_arm")
    weight_layouts.write(latest(trained) / "params", config.model, tmp_path / "released", "pytorch")
    shutil.copytree(latest(trained) / "assets", tmp_path / "released" / "assets")
    text = run("their_inference.py", tmp_path / "released")
    assert text.splitlines() == [
        "Actions shape: (3, 3)",
        "Read by the configuration: True",
        "Losses: (4, 3, 4) True",
        "Sampled: (4, 3, 4) float32",
        "By hand: True",
    ]


def test_recipes_of_a_copied_head_are_found_beside_ours(workspace):
    import their_config

    assert {"paligemma_vq_droid", "pi05_droid_jointpos_polaris"} <= their_config._CONFIGS_DICT.keys()
    assert _config.get_config("their_config:pi0_arm") is their_config.get_config("pi0_arm")
    with pytest.raises(
        ValueError, match=r"has no 'pi0_amr'; name one of its recipes: their_config:pi0_arm, their_config:"
    ):
        _config.get_config("their_config:pi0_amr")
    assert _config._CONFIGS_DICT["debug"] is _config.get_config("debug")
    assert _config._CONFIGS[0] in _config._CONFIGS_DICT.values()


def test_the_training_script_trains_a_recipe_that_a_program_hands_it(statistics, tmp_path, monkeypatch):
    pytest.importorskip("torch")  # which compiles nothing
    import their_config

    monkeypatch.syspath_prepend(ROOT)
    script = importlib.import_module("scripts.train")
    places = {"exp_name": "theirs", "checkpoint_base_dir": str(tmp_path), "backend": "pytorch", "num_train_steps": 1}
    config = dataclasses.replace(their_config.get_config("pi0_arm"), holdout_episodes=0, **places)
    result = script.main(config)
    assert result.checkpoint == tmp_path / "pi0_arm" / "theirs" / "0"
    assert load_recipe(result.checkpoint) == config


def test_a_program_s_own_copy_of_the_recipe_classes_is_read_served_and_saved(trained, tmp_path):
    import their_copied_config
    import their_policy

    theirs = their_copied_config.arm
    observation, actions = next(iter(create_data_loader(theirs)))
    assert observation.state.shape == (4, 4) and actions.shape == (4, 3, 4)
    policy = create_trained_policy(theirs, latest(trained))
    assert policy.infer(their_policy.make_arm_example())["actions"].shape == (3, 3)
    ours = _config.get_config("their_copied_config:arm")
    assert ours.project_name == "theirs" and ours.data.asset_id == "arm" and ours.freeze_filter is freeze_nothing
    data_config = ours.data.create(ours.assets_dirs, ours.model)
    assert isinstance(data_config, _config.DataConfig) and set(data_config.norm_stats) == {"state", "actions"}
    save_recipe(tmp_path, ours)
    assert load_recipe(tmp_path) == ours
    unnamed = as_recipe(dataclasses.replace(theirs, exp_name=tyro.MISSING))
    with pytest.raises(ValueError, match="exp_name is empty; name this run with --exp-name=NAME"):
        _ = unnamed.checkpoint_dir
    with pytest.raises(ValueError, match="is a type; expected a TrainConfig"):
        _config.get_config("their_copied_config:TrainConfig")


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index")
def test_programs_that_use_flax_run_where_it_is_installed(workspace, statistics, trained, tmp_path):
    """flax is no dependency of ours: it is installed beside, for this test."""
    install = [
        "uv",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        tmp_path / "flax",
    ]
    subprocess.run([*install, "flax", "treescope"], check=True, cwd=tmp_path)
    path = os.pathsep.join(map(str, (tmp_path / "flax", ROOT, PROGRAMS, PROGRAMS.parent)))
    failures = {}
    for program in ("flax_filters.py", "flax_params.py", "flax_modules.py"):
        done = subprocess.run(
            [sys.executable, PROGRAMS / program, latest(trained)],
            env={**os.environ, "PYTHONPATH": path},
            cwd=workspace,
            capture_output=True,
            text=True,
        )
        if done.returncode or not done.stdout.rstrip().endswith("ok"):
            failures[program] = done.stderr
    assert failures == {}, "\n".join(failures.values())
