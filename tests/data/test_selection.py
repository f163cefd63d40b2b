"""Which episodes of a dataset are left out and held out: by number, by findings of the check, by conditions."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from openpi.cli import main as cli
from openpi.data.episode_condition import EpisodeCondition, EpisodeValues
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.data.selection import Selection
from openpi.models.pi0_config import Pi0Config
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.training.data import dataset_look, holdout, recipe_data
from openpi.training.data_config import DataConfig, SimpleDataConfig, repack

LENGTHS = (12, 30, 14, 20)
TASKS = ("stack the cups", "open the box", "stack the cups", "fold")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four episodes; the shoulder of episode 1 jumps to 3, the gripper of episode 3 never moves."""
    vector = {"dtype": "float32", "shape": (2,), "names": ["shoulder", "gripper"]}
    features = {"observation.state": vector, "action": vector}
    features["cost"] = {"dtype": "int64", "shape": (1,), "names": None}
    folder = tmp_path_factory.mktemp("selection") / "set"
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder, fps=10, features=features) as writer:
        for number, (length, task) in enumerate(zip(LENGTHS, TASKS, strict=True)):
            state = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
            if number == 1:
                state[5, 0] = 3
            if number == 3:
                state[:, 1] = 0.5
            writer.add_episode({"observation.state": state, "action": state, "cost": np.full(length, number)}, task)
    return folder


@pytest.fixture(scope="module")
def metadata(root):
    return LeRobotMetadata.load(root)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("length < 15", {0, 2}),
        ("seconds >= 2", {1, 3}),
        ("14 <= length <= 20", {2, 3}),
        ('task == "fold"', {3}),
        ('"cups" in task and length > 12', {2}),
        ('task not in ["fold", "open the box"]', {0, 2}),
        ("episode in (0, 3)", {0, 3}),
        ("max(abs(action)) > 2.5", {1}),
        ('max(action["shoulder"]) > 2.5', {1}),
        ("max(action[1]) > 2.5", set()),
        ("max(action[-2]) > 2.5", {1}),
        ('std(observation.state["gripper"]) < 1e-6', {3}),
        ("max(abs(diff(observation.state[0]))) > 2", {1}),
        ("any(action[0] > 2.5 and action[1] < 5)", {1}),
        ("count(action[0] > 2.5) == 1", {1}),
        ("not any(action != observation.state) and first(cost) == 2", {2}),
        ('mean(column["cost"]) * 2 - 1 == 3 or last(cost) / 1 == 3', {2, 3}),
        ("all(diff(cost) == 0) and -length < -25", {1}),
    ],
)
def test_conditions_choose_by_length_task_and_values(condition, expected, metadata):
    assert Selection(exclude_where=condition).excluded(metadata) == expected


def test_who_asks_for_lengths_opens_no_table(metadata, monkeypatch):
    """Of a set in v2.1 there are as many as episodes."""
    monkeypatch.setattr("openpi.data.selection.load_columns", None)
    assert Selection(exclude_where="length < 15 or episode == 3").excluded(metadata) == {0, 2, 3}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("__import__('os').system('true')", "is not for conditions"),
        ("open('/etc/passwd')", "is not for conditions"),
        ("(lambda: 1)()", "is not for conditions"),
        ("[x for x in task]", "is not for conditions"),
        ("length ** 9 ** 9 > 1", "is not for conditions"),
        ("max(action, key=abs) > 1", "is not for conditions"),
        ("max(*action) > 1", "is not for conditions"),
        ("f'{task}' == 'fold'", "is not for conditions"),
        ("(length := 3) > 1", "is not for conditions"),
        ("length < 5 if task else 3", "is not for conditions"),
        ("length is 3", "use == or !="),
        ("task * 99999999 == 'a'", "'task' is no number"),
        ("9" * 400 + " > length", "too large a number"),
        ("-" * 1900 + "1 < length", "nested too deeply"),
        ("length" + "+1" * 900 + " > 3", "nested too deeply"),
        ("length < 1" + " or length < 1" * 400, "expected at most 2000"),
        ("length <", "cannot be read"),
        ("", "cannot be read"),
        ("action > 1", r"has a value for each frame or dimension; say any\(...\) or all"),
        ("max(action)", "neither true nor false"),
        ("length and task", "neither true nor false"),
        ("max(length) > 3", "is of all the frames of a column"),
        ("any(diff(action) < action)", "cannot be worked out"),
        ("task < 3", "cannot be worked out"),
        ("action[0][1] > 3", "two dimensions"),
        ("action[:] > 3", "names no dimension"),
        ("action[1.5] > 3", "names no dimension"),
    ],
)
def test_what_is_no_condition_is_refused_with_the_part_that_is_none(condition, message, metadata):
    with pytest.raises(ValueError, match=message):
        Selection(exclude_where=condition).excluded(metadata)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("max(actions) > 1", "needs the key 'actions'.*Did you mean 'action'"),
        ("max(action['sholder']) > 1", "no dimension 'sholder'.*Did you mean 'shoulder'"),
        ("max(action[2]) > 1", "has 2 dimensions, so none with the number 2"),
        ("max(action.__class__) > 1", "needs the key 'action.__class__'"),
    ],
)
def test_what_a_condition_reads_must_be_there(condition, message, metadata):
    with pytest.raises(KeyError, match=message):
        Selection(exclude_where=condition).excluded(metadata)


def test_an_episode_of_one_frame_has_no_changes():
    values = EpisodeValues({"length": 1, "task": ""}, {"action": np.ones((1, 2))}, {})
    assert not EpisodeCondition("max(diff(action)) > 0")(values)
    assert not EpisodeCondition("any(diff(action) > 0)")(values)


def test_a_condition_is_not_asked_of_episodes_that_are_left_out_already(root, tmp_path):
    """They may be those that cannot be read."""
    shutil.copytree(root, tmp_path / "set")
    file = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.filter(pc.not_equal(table["episode_index"], 1)), file)
    metadata = LeRobotMetadata.load(tmp_path / "set")
    selection = Selection(exclude_episodes=(1,), exclude_where="episode == 1 or max(cost) == 3")
    assert selection.excluded(metadata) == {1, 3}
    assert selection.kept(metadata) == [0, 2]


def test_findings_of_the_check_leave_out_the_kinds_that_are_asked_for(root, metadata, tmp_path, capsys):
    found = {"num_episodes": 4, "num_frames": sum(LENGTHS)}
    cases = [(0, "videos.frozen", "error"), (1, "anomalies.jump", "warning"), (None, "metadata.totals", "error")]
    findings = [{"episode": episode, "code": code, "severity": severity} for episode, code, severity in cases]
    file = tmp_path / "findings.json"
    file.write_text(json.dumps({**found, "findings": findings}))
    assert Selection(exclude_findings=str(file)).excluded(metadata) == {0}
    assert Selection(exclude_findings=str(file), exclude_kinds=("error", "warning")).excluded(metadata) == {0, 1}
    assert Selection(exclude_findings=str(file), exclude_kinds=("anomalies",)).excluded(metadata) == {1}
    assert Selection(exclude_findings=str(file), exclude_kinds=("videos.frozen",)).excluded(metadata) == {0}
    cli.main(["dataset", "check", str(root), "--json", "--no-pictures", "--jobs", "1"])
    file.write_text(capsys.readouterr().out)
    told = {f["episode"] for f in json.loads(file.read_text())["findings"] if f["code"] == "training.constant"} - {None}
    assert Selection(exclude_findings=str(file), exclude_kinds=("training.constant",)).excluded(metadata) == told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_episodes": 5, "num_frames": 76, "findings": []}, "is of another dataset: it has .*5"),
        (
            {"num_episodes": 4, "num_frames": 76, "findings": [], "episodes": [{"episode": 1, "length": 14}]},
            "is of another dataset: it has frames of episode 1 = 14, .* has 30",
        ),
        ({"findings": []}, "is no document of `openpi dataset check --json`"),
        ([], "is no document of"),
        ({"num_episodes": 4, "num_frames": 76, "findings": [{"episode": 1}]}, "is no document of"),
    ],
)
def test_findings_of_something_else_are_refused(content, message, metadata, tmp_path):
    file = tmp_path / "findings.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Selection(exclude_findings=str(file)).excluded(metadata)


def test_a_missing_file_of_findings_says_how_it_is_written(metadata, tmp_path):
    with pytest.raises(FileNotFoundError, match="openpi dataset check DATASET --json"):
        Selection(exclude_findings=str(tmp_path / "none.json")).excluded(metadata)


# --- in recipes -----------------------------------------------------------------------------------------------


def recipe(root, **changes) -> TrainConfig:
    structure = {"state": "observation.state", "actions": "action"}
    base = DataConfig(repack_transforms=repack(structure), action_sequence_keys=("action",))
    data = SimpleDataConfig(repo_id=str(root), base_config=base, **changes)
    return TrainConfig(name="test", model=Pi0Config(action_horizon=4), data=data, batch_size=2, num_workers=0)


def test_a_recipe_leaves_out_what_its_condition_says_and_holds_out_what_it_names(root, metadata, tmp_path):
    config = recipe(root, exclude_where='"box" in task', validation_episodes=(1, 2))
    data_config = recipe_data.expanded(config)
    assert holdout.holdout_split(config, metadata, data_config) == ([0, 3], [2])
    assert len(recipe_data.create_dataset(data_config, config.model)) == sum(LENGTHS) - 30
    assert dataset_look.reading_of(config)[1].excluded == {1}
    recipe_io.save_recipe(tmp_path, config)
    assert recipe_io.load_recipe(tmp_path).data == config.data


def test_held_out_episodes_are_named_or_drawn_but_not_both(root):
    config = dataclasses.replace(recipe(root, validation_episodes=(1,)), holdout_episodes=1)
    with pytest.raises(ValueError, match=r"holdout_episodes=1 .* and data.validation_episodes"):
        holdout.check_holdout(config, recipe_data.expanded(config))
    alone = recipe(root, validation_episodes=(7,))
    with pytest.raises(ValueError, match=r"validation_episodes has \[7\]"):
        holdout.holdout_split(alone, LeRobotMetadata.load(root), recipe_data.expanded(alone))
    everything = recipe(root, validation_episodes=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="leaves 0 episodes to train on and 4"):
        holdout.holdout_split(everything, LeRobotMetadata.load(root), recipe_data.expanded(everything))
