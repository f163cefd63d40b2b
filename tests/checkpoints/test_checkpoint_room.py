"""One checkpoint, open: what its folder is and holds is found out once, whoever asks; old ones stay what they were."""

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

import tiny_arm
import weight_layouts
from arm_files import arm_observation, run, write_stats
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.serving import server
from openpi.serving import warm_up
from openpi.shared import download
from openpi.training import loop
from openpi.training.backends.jax import state_files
from openpi.training.config import LeRobotLiberoDataConfig
from openpi.training.recipe_io import load_recipe
from openpi.training.run import resume
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import layout, opening, orbax_io, published_tree
from paths import ROOT

FROZEN = ROOT / "tests" / "golden" / "checkpoint_v1" / "1"


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose layout was asked for."""
    folders: list[Path] = []
    find_layout = layout.find_layout
    for module in (layout, opening):  # which has the name of its own
        monkeypatch.setattr(module, "find_layout", lambda folder: (folders.append(folder), find_layout(folder))[1])
    return folders


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Data halves of recipes that were expanded."""
    found, create = [], LeRobotLiberoDataConfig.create
    monkeypatch.setattr(LeRobotLiberoDataConfig, "create", lambda *args: found.append(args) or create(*args))
    return found


@pytest.mark.parametrize("backend", ["jax", "pytorch"])
def test_training_that_starts_from_a_checkpoint_looks_for_its_layout_and_expands_the_recipe_once(
    backend: Literal["jax", "pytorch"],
    looked_at: list[Path],
    expanded: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_stats(tmp_path)
    start = CheckpointWeightLoader(str(FROZEN / "params"))
    config = dataclasses.replace(tiny_arm.recipe, exp_name="first", batch_size=2, backend=backend, weight_loader=start)
    # What is called next when the state is made.
    monkeypatch.setattr(loop, "_log_size", lambda config, backend: signal.raise_signal(signal.SIGTERM))
    assert loop.train(config).signum == signal.SIGTERM
    assert (looked_at, len(expanded)) == ([FROZEN / "params"], 1)


@pytest.mark.parametrize("backend", [None, "pytorch"])  # None = that of the layout
def test_a_checkpoint_of_version_1_is_served_and_all_is_looked_for_once(
    backend: Literal["pytorch"] | None,
    looked_at: list[Path],
    expanded: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, *a, **kw: opened.append(file.name) or read_text(file, *a, **kw))
    policy = server.load_policy(server.Args(str(FROZEN.parent), num_steps=1, rtc="off", backend=backend))
    assert (looked_at, len(expanded), opened.count("norm_stats.json")) == ([FROZEN], 1, 1)
    actions = policy.infer(arm_observation())["actions"]
    assert actions.shape == (5, 7) and np.isfinite(actions).all()


def test_a_run_of_version_1_goes_on_bit_for_bit_and_its_layout_is_looked_for_once(
    looked_at: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "tests")  # its recipe names files from here
    restored = []
    continue_run = resume.continue_run
    monkeypatch.setattr(resume, "continue_run", lambda *args: restored.append(continue_run(*args)) or restored[-1])
    shutil.copytree(FROZEN, tmp_path / "tiny_arm" / "first" / "1")
    flags = ["--exp-name=first", f"--checkpoint-base-dir={tmp_path}", "--resume"]
    assert run("train", f"{tiny_arm.__file__}:recipe", *flags) == 0
    assert len(looked_at) <= 1
    [state] = restored
    again = tmp_path / "again"
    again.mkdir()
    state_files.begin_write(again, state)()
    for item in (state_files.PARAMS, state_files.TRAIN_STATE):
        before, after = (
            orbax_io.leaves_by_path(weight_layouts.read_orbax(folder / item)) for folder in (FROZEN, again)
        )
        assert before.keys() == after.keys()
        for path, leaf in before.items():
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)


def test_a_checkpoint_of_version_1_is_written_in_another_layout_and_back(tmp_path: Path) -> None:
    there, back = tmp_path / "pytorch", tmp_path / "jax"
    assert run("convert-checkpoint", FROZEN, there, "--no-certify") == 0
    assert run("convert-checkpoint", there, back, "--to=jax", "--no-certify") == 0
    model = load_recipe(back).model
    before, after = (
        jax.tree.leaves(published_tree.tree_of(opening.open_weights(model, folder))) for folder in (FROZEN, back)
    )
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_released_checkpoint_is_served_without_asking_the_network_for_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no recipe and no contract; its recipe names a bucket for the statistics that lie in it, too."""
    folder = shutil.copytree(FROZEN, tmp_path / "released", ignore=shutil.ignore_patterns("*.json", "train_state"))
    shutil.copytree(FROZEN / "assets", folder / "assets", dirs_exist_ok=True)
    recipe = tmp_path / "released_recipe.py"
    recipe.write_text(
        "import dataclasses\nimport tiny_arm\nfrom openpi.training.config import AssetsConfig\n"
        "assets = AssetsConfig(assets_dir='gs://nowhere/assets', asset_id='arm')\n"
        "data = dataclasses.replace(tiny_arm.recipe.data, assets=assets)\n"
        "recipe = dataclasses.replace(tiny_arm.recipe, data=data)\n"
    )
    asked, warmed, fetch = [], [], download.maybe_download
    monkeypatch.setattr(download, "maybe_download", lambda url, **kw: asked.append(str(url)) or fetch(url, **kw))
    monkeypatch.setattr(warm_up, "warm_up", lambda policy, cameras, state: warmed.append((cameras, state)))
    server.load_policy(server.Args(str(folder), config=f"{recipe}:recipe"))
    assert [url for url in asked if "://" in url] == []
    assert len(warmed) == 1


def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, opened, read_text = Checkpoint.open(FROZEN.parent), [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, *a, **kw: opened.append(file.name) or read_text(file, *a, **kw))
    first = [checkpoint.norm_stats("arm"), checkpoint.read(load_recipe)]
    again = [checkpoint.norm_stats("arm"), checkpoint.read(load_recipe)]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert opened.count("norm_stats.json") == 1
