"""What a run holds out where its recipe does not say, and what it says of its time."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

import tiny_arm
import tiny_recipe
from arm_files import arm_stats
from openpi import transforms
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.training.data import holdout, recipe_data, training_data
from openpi.training.data_loader import back_to_robot
from openpi.training.mixture_config import MixtureDataConfig, MixturePart
from openpi.training.run.pictures import compared
from openpi.training.run.progress import Progress
from openpi.training.run.run_report import advice, read_metrics
from openpi.training.run.validation import _baselines

VECTOR = {"dtype": "float32", "shape": (3,), "names": ["lift", "turn", "grip"]}
CAMERA = {"dtype": "image", "shape": (4, 4, 3), "names": ["height", "width", "channel"]}
PICTURES = np.zeros((10, 4, 4, 3), np.uint8)


def recipe(folder: Path, num_episodes: int, **changes) -> TrainConfig:
    """Of a dataset of episodes of ten frames."""
    features = {"front": CAMERA, "joints": VECTOR, "actions": VECTOR}
    with LeRobotWriter(folder / "data", fps=10, features=features) as writer:
        for number in range(num_episodes):
            frames = np.full((10, 3), number, np.float32)
            writer.add_episode({"front": PICTURES, "joints": frames, "actions": frames}, "lift it")
    data = dataclasses.replace(tiny_recipe.arm.data, repo_id=str(folder / "data"))
    options = {"data": data, "holdout_episodes": None, "exp_name": "run", "checkpoint_base_dir": str(folder / "runs")}
    return dataclasses.replace(tiny_recipe.arm, **{**options, **changes})


def decided(config: TrainConfig, num_devices: int = 1) -> TrainConfig:
    return holdout.decided(config, recipe_data.open_recipe(config), num_devices)


@pytest.mark.parametrize(("num_episodes", "expected"), [(1, 0), (2, 0), (3, 1), (21, 2), (60, 3)])
def test_a_recipe_that_does_not_say_holds_out_a_few_and_says_so(tmp_path, caplog, num_episodes, expected):
    caplog.set_level(logging.INFO, "openpi")
    config = decided(recipe(tmp_path, num_episodes))
    assert (config.holdout_episodes, config.keep_best) == (expected, expected > 0)
    assert ("no episode is held out" if expected == 0 else "--holdout-episodes=0 trains on all") in caplog.text
    if expected:
        metadata = recipe_data.open_metadata(recipe_data.expanded(config))
        train, held = holdout.holdout_split(config, metadata, recipe_data.expanded(config))
        assert len(held) == expected and len(train) == num_episodes - expected


def test_what_a_recipe_says_stands(tmp_path):
    config = recipe(tmp_path, 5, holdout_episodes=0)
    for stated in (config, dataclasses.replace(config, holdout_episodes=0.4)):
        assert decided(stated) is stated


def test_nothing_is_held_out_that_a_batch_needs_or_that_cannot_be(tmp_path):
    assert decided(recipe(tmp_path, 3, batch_size=25)).holdout_episodes == 0
    assert decided(dataclasses.replace(tiny_recipe.tiny, holdout_episodes=None)).holdout_episodes == 0


@pytest.mark.parametrize(("num_devices", "expected"), [(1, 1), (10, 1), (11, 2), (40, 4), (41, 0)])
def test_as_many_are_held_out_as_give_every_device_a_frame_or_none_which_is_said(
    tmp_path, caplog, num_devices, expected
):
    caplog.set_level(logging.INFO, "openpi")
    found = decided(recipe(tmp_path, 8, batch_size=40), num_devices)
    assert (found.holdout_episodes, found.keep_best) == (expected, expected > 0)
    assert (f"held out for one on {num_devices} device(s)" in caplog.text) == (expected == 0)


def test_a_run_that_goes_on_with_more_devices_than_frames_held_out_is_not_validated(tmp_path, caplog):
    config = recipe(tmp_path, 5, holdout_episodes=1)
    data = recipe_data.open_recipe(config)
    held = [holdout.split_dataset(config, *member)[1] for member in data.members]
    with pytest.raises(ValueError, match=r"give 10 frames, fewer than there are devices \(16\); hold out more"):
        training_data._open_holdout(config, data, data.datasets, held, 16)
    going_on = dataclasses.replace(config, resume=True)
    assert training_data._open_holdout(going_on, data, data.datasets, held, 16) is None
    assert "this run is not validated any more" in caplog.text


def test_what_is_held_out_by_name_stands_and_of_a_mixture_the_smallest_dataset_decides(tmp_path):
    config = recipe(tmp_path / "large", 25)
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_episodes=(4,)))
    assert (found := decided(named)).holdout_episodes == 0 and not found.keep_best
    for fewest, expected in ((2, 0), (3, 1)):
        small = recipe(tmp_path / f"of_{fewest}", fewest)
        parts = (MixturePart(config.data, 1.0), MixturePart(small.data, 1.0))
        mixture = dataclasses.replace(config, data=MixtureDataConfig(parts=parts))
        assert decided(mixture).holdout_episodes == expected


@pytest.mark.parametrize("before", [0, 3])
def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path, before):
    """Those of before this wrote 0."""
    config = recipe(tmp_path, 40, resume=True)
    step = config.checkpoint_dir / "7"
    (step / "params").mkdir(parents=True)
    (step / "params" / "_METADATA").touch()
    recipe_io.save_recipe(step, dataclasses.replace(config, holdout_episodes=before, keep_best=False, resume=False))
    found = decided(config)
    assert (found.holdout_episodes, found.keep_best) == (before, False)
    assert decided(dataclasses.replace(config, exp_name="another")).holdout_episodes == 2


def test_the_mean_action_is_the_dataset_s_in_the_robot_s_units_relative_or_not():
    config, stats = tiny_arm.recipe, arm_stats()
    for is_relative in (False, True):
        data = dataclasses.replace(config.data, extra_delta_transform=is_relative)
        data_config = dataclasses.replace(data.create(config.assets_dirs, config.model), norm_stats=stats)
        policy = _baselines(data_config, back_to_robot(data_config, is_sampled=False), 5)["mean_action"]
        state = transforms.Normalize(stats, use_quantiles=data_config.use_quantile_norm)({"state": np.full(8, 0.3)})
        chunk = policy(np.pad(state["state"], (0, 2)), np.zeros((5, 10), np.float32))
        moved = 0.3 * np.array([1, 1, 1, 1, 1, 1, 0]) * is_relative
        np.testing.assert_allclose(chunk, np.tile(stats["actions"].mean + moved, (5, 1)), atol=1e-4)


def test_log_lines_tell_the_time_that_is_left(caplog):
    caplog.set_level(logging.INFO, "openpi")
    with Progress(num_steps=100, start=0) as progress:
        for step in (0, 10, 99):
            progress.report(step, {"loss": 1.0})
    lines = [record.message for record in caplog.records]
    assert "left" not in lines[0] and lines[1].endswith(" left") and "left" not in lines[2]


def test_metrics_are_read_by_step_and_a_line_that_is_being_written_is_left_out(tmp_path):
    lines = '{"step": 0, "loss": 1.5}\n{"step": 10, "loss": 0.5}\n{"step": 10, "action_error": 0.1}\n{"step": 2'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.5}, {"step": 10, "loss": 0.5, "action_error": 0.1}]


def test_waiting_for_data_is_advised_on():
    assert advice(0.02, 2) == "The data keep up with the model."
    assert "--num-workers=4 (now 2)" in advice(0.4, 2)


def test_a_picture_of_chunks_shows_both_and_leaves_out_what_is_none():
    recorded = np.zeros((2, 5, 3))
    predicted = np.full((2, 5, 3), np.nan)
    assert (compared(recorded, predicted, ["a", "b", "c"]) == (11, 122, 117)).all(-1).sum() < 300  # its name only
    predicted = np.ones((2, 5, 3))
    assert (compared(recorded, predicted, ["a", "b", "c"]) == (11, 122, 117)).all(-1).sum() > 1000


def test_rows_of_a_picture_of_chunks_are_told_apart_and_those_left_out_are_said():
    chunks = np.tile(np.linspace(0, 1, 5)[None, :, None], (1, 1, 18))
    names = [f"left_arm_joint_number_{number}" for number in range(18)]
    picture = compared(chunks, chunks, names)
    labels = {picture[top : top + 74, :96].tobytes() for top in range(22, 22 + 82 * 16, 82)}
    assert len(labels) == 16
    assert (picture[:22, 158:] < 255).any() and not (
        compared(chunks[..., :16], chunks[..., :16], names)[:22, 158:] < 255
    ).any()
