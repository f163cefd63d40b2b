"""`openpi record`: what an expert does, as a dataset that the world's recipe trains on."""

import dataclasses
import json

import numpy as np
import pytest

from openpi.cli.data.record import columns_of
from openpi.convert import demonstrations
from openpi.convert.demonstrations import RECORD_FILE, Recording, record
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.envs import world as worlds
from openpi.training import config as configs
from point_world import STEP_M, PointConfig


def recording(**changes) -> Recording:
    return Recording(PointConfig(), columns_of("pi05_libero"), **{"num_episodes": 5, "use_videos": False} | changes)


def seeds(root):
    return [(e["task"][6:], e["seed"]) for e in json.loads((root / RECORD_FILE).read_text())["episodes"]]


def test_columns_are_those_that_the_recipe_repacks():
    libero, aloha = columns_of("pi05_libero"), columns_of("pi0_aloha_sim")
    assert libero.names == {
        "observation/image": "image",
        "observation/wrist_image": "wrist_image",
        "observation/state": "state",
        "actions": "actions",
    }
    assert aloha.names == {
        "images/cam_high": "observation.images.top",
        "state": "observation.state",
        "actions": "action",
    }
    assert np.flatnonzero(aloha.clean).tolist() == [6, 13]
    assert len(libero.dimensions["observation/state"]) == 8


def test_the_recipe_trains_on_what_was_recorded(tmp_path):
    root = record(recording(), tmp_path / "set")
    dataset = LeRobotDataset(root)
    assert dataset.metadata.fps == 10
    assert len(dataset.episode_bounds) == 5
    assert sorted(dataset.metadata.tasks.values()) == ["go left", "go right"]
    config = configs.get_config("pi05_libero")
    data = dataclasses.replace(config.data, repo_id=str(root)).create(tmp_path, config.model)
    inputs = {**dataset[0], "prompt": dataset[0]["task"]}
    for transform in (*data.repack_transforms.inputs, *data.data_transforms.inputs):
        inputs = transform(inputs)
    assert inputs["image_mask"]["left_wrist_0_rgb"] and inputs["image"]["base_0_rgb"].shape == (16, 16, 3)
    sample = dataset[0]
    assert sample["image"].shape == (16, 16, 3) and sample["image"].any()
    assert sample["state"].shape == (8,) and sample["actions"].shape == (7,)
    moved = dataset[1]["state"][:3] - sample["state"][:3]
    np.testing.assert_allclose(moved, STEP_M * sample["actions"][:3], atol=1e-6)


def test_only_successes_are_kept_and_the_seeds_alone_decide_which(tmp_path):
    stuck = dataclasses.replace(recording(seed=6), world=PointConfig(stuck_every=4))
    alone = record(stuck, tmp_path / "alone")
    assert seeds(alone) == [("left", 6), ("left", 7), ("left", 9), ("right", 6), ("right", 7)]
    several = record(stuck, tmp_path / "several", num_workers=2)
    assert seeds(several) == seeds(alone)
    np.testing.assert_array_equal(LeRobotDataset(several).column("actions"), LeRobotDataset(alone).column("actions"))


def test_disturbed_is_what_the_robot_does_and_not_what_is_recorded(tmp_path):
    data = LeRobotDataset(record(recording(noise=0.3, num_episodes=2), tmp_path / "set"))
    state, actions = data.column("state"), data.column("actions")
    (first, last), *_ = data.episode_bounds
    strayed = np.diff(state[first:last, :3], axis=0) - STEP_M * actions[first : last - 1, :3]
    assert np.abs(strayed).max() > 0.2 * STEP_M
    assert np.all(actions[:, 6] == -1)
    again = LeRobotDataset(record(recording(noise=0.3, num_episodes=2), tmp_path / "again"))
    np.testing.assert_array_equal(again.column("state"), state)


def test_a_stopped_run_goes_on_and_a_finished_one_is_never_replaced_by_chance(tmp_path, monkeypatch):
    played, play = [], demonstrations.play

    def interrupted(world, expert, task, seed, **options):
        if len(played) == 3:
            raise KeyboardInterrupt
        played.append((task.name, seed))
        return play(world, expert, task, seed, **options)

    monkeypatch.setattr(demonstrations, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(recording(), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    played.clear()
    record(recording(), tmp_path / "set")
    assert len(played) == 2
    with pytest.raises(FileExistsError, match="--overwrite"):
        record(recording(), tmp_path / "set")
    played.clear()
    record(recording(num_episodes=2), tmp_path / "set", overwrite=True)
    assert len(LeRobotDataset(tmp_path / "set").episode_bounds) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_cannot_be_recorded_is_said_before_or_as_soon_as_it_shows(tmp_path):
    hopeless = dataclasses.replace(recording(), world=PointConfig(stuck_every=1))
    with pytest.raises(ValueError, match="failed 10 times in a row"):
        record(hopeless, tmp_path / "set")
    twice = dataclasses.replace(recording(num_episodes=9), world=PointConfig(num_starts=3))
    with pytest.raises(ValueError, match="begins at 3 places, and 5 episodes"):
        record(twice, tmp_path / "set")
    with pytest.raises(ValueError, match="no task is called 'point/up'; there are 'point/left', 'point/right'"):
        record(recording(tasks=("point/up",)), tmp_path / "set")
    for wrong in ({"num_episodes": 0}, {"noise": float("nan")}, {"noise": -1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong)).removeprefix("num_")):
            recording(**wrong)
    assert not (tmp_path / "set").exists()


def test_installed_worlds_are_configurations_of_worlds():
    assert {"aloha", "libero"} <= set(worlds.names())
    for name in ("aloha", "libero"):
        config = worlds.find(name)()
        assert isinstance(config, worlds.WorldConfig)
        assert configs.get_config(config.recipe).name == config.recipe
