"""The documents: links lead somewhere, reference pages are complete, the tutorial's files work."""

import dataclasses
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest

from openpi.cli.main import COMMANDS
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.shared import plugins
from openpi.training.config import TrainConfig, config_names
from paths import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_files(page: Path):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_command_has_a_row_in_the_reference():
    text = (ROOT / "docs/reference/commands.md").read_text()
    commands = (*COMMANDS, *plugins.names("openpi.commands"))
    assert [name for name in commands if f"`openpi {name} " not in text] == []


@pytest.mark.parametrize("config", [TrainConfig, Pi0Config, Pi0FASTConfig])
def test_every_field_of_a_recipe_has_a_row_in_the_reference(config):
    text = (ROOT / "docs/reference/recipes.md").read_text()
    assert [field.name for field in dataclasses.fields(config) if f"| `{field.name}` |" not in text] == []


def test_every_registered_recipe_is_in_the_reference():
    text = (ROOT / "docs/reference/recipes.md").read_text()
    assert [name for name in config_names() if f"- `{name}`" not in text] == []


def test_options_shown_in_documents_exist():
    """Of `explain` and `infer`, whose options no recipe decides."""
    from openpi.cli.debugging import explain, infer

    for command, module in (("explain", explain), ("infer", infer)):
        known = set(module._parser()._option_string_actions)
        lines = [line for page in PAGES for line in page.read_text().splitlines() if f"openpi {command} " in line]
        shown = {option for line in lines for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)}
        assert shown - known - {"--extra"} == set(), command


def test_groups_and_extras_that_documents_name_can_be_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    known = {"group": {*project["dependency-groups"]}, "extra": {*project["project"]["optional-dependencies"]}}
    named = {pair for page in PAGES for pair in re.findall(r"--(group|extra)[ =]([a-z0-9-]+)", page.read_text())}
    assert ("group", "rlds") in named  # as published scripts are started
    assert {(kind, name) for kind, name in named if name not in known[kind]} == set()


def test_adding_an_extra_never_removes_another():
    """uv leaves in an environment what a `sync` names, and nothing else."""
    sources = [file for folder in ("src", "packages") for file in (ROOT / folder).rglob("*.py")]
    for file in (*PAGES, *sources):
        for command in re.findall(r"uv sync\b[^`\n]*", file.read_text()):
            assert command.count("--extra") != 1 or "--inexact" in command, f"{file}: {command}"


def test_the_tutorial_s_dataset_and_recipe_surprise_nobody(tmp_path: Path):
    for file in (ROOT / "docs/tutorial").glob("*.py"):
        shutil.copy(file, tmp_path)

    def run(*argv: str) -> str:
        process = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout

    run("make_dataset.py", "my_dataset")
    run("-m", "openpi.cli.main", "stats", "my_robot.py:tiny")
    assert (tmp_path / "assets/my_robot_tiny/four_joint_arm/norm_stats.json").is_file()
    report = run("-m", "openpi.cli.main", "explain", "my_robot.py:tiny", "--index", "12")
    assert "the model reads 'Task: swing to the left, State: " in report
    assert "0 surprises (!!)" in report.splitlines()[-1]


def test_the_page_s_format_of_one_s_own_converts_its_files(tmp_path: Path):
    page = (ROOT / "docs/how-to/converting.md").read_text()
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class MyFiles" in block)
    (tmp_path / "own.py").write_text(script)
    (tmp_path / "my_recordings").mkdir()
    written = np.random.default_rng(0).normal(size=(2, 12, 6)).astype(np.float32)
    for number, values in zip((2, 10), written, strict=True):
        with h5py.File(tmp_path / f"my_recordings/run_{number}.h5", "w") as file:
            file["qpos"], file["qtarget"] = values, values + 1
            file["cam_front"] = np.full((12, 48, 64, 3), (200, 40, 30), np.uint8)
            file.attrs["task"] = f"task {number}"
    subprocess.run([sys.executable, "own.py"], cwd=tmp_path, check=True, capture_output=True)
    dataset = LeRobotDataset(str(tmp_path / "my_dataset"))
    np.testing.assert_array_equal(dataset.column("observation.state"), np.concatenate(written))
    np.testing.assert_array_equal(dataset.column("action"), np.concatenate(written) + 1)
    assert [episode.tasks for episode in dataset.episodes] == [("task 2",), ("task 10",)]
    assert np.abs(dataset[20]["observation.images.front"].mean((0, 1)) - (200, 40, 30)).max() < 6
