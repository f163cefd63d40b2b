"""Statistics from columns equal those of the samples that training sees, and land where the recipe reads them."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

import paths
from openpi import transforms
from openpi.cli.data import stats as stats_command
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.models.pi0_config import Pi0Config
from openpi.policies import data_half
from openpi.shared import normalize
from openpi.training import data_loader
from openpi.training.config import TrainConfig, get_config
from openpi.training.data import frame_blocks, norm_stats, recipe_data
from openpi.training.data.tabular_frames import Frames, open_frames
from openpi.training.data_config import (
    AssetsConfig,
    DataConfig,
    LeRobotAlohaDataConfig,
    LeRobotDROIDDataConfig,
    LeRobotLiberoDataConfig,
    SimpleDataConfig,
)

HORIZON = 5
LENGTHS = (7, 3, 11)


def feature(dtype: str, *shape: int) -> dict:
    names = ["height", "width", "channels"] if dtype == "image" else None
    return {"dtype": dtype, "shape": list(shape), "names": names}


ALOHA = {
    "observation.images.top": feature("image", 12, 16, 3),
    "observation.state": feature("float32", 14),
    "action": feature("float32", 14),
}
LIBERO = {
    "image": feature("image", 12, 16, 3),
    "wrist_image": feature("image", 12, 16, 3),
    "state": feature("float32", 8),
    "actions": feature("float32", 7),
}
DROID = {
    "exterior_image_1_left": feature("image", 12, 16, 3),
    "exterior_image_2_left": feature("image", 12, 16, 3),
    "wrist_image_left": feature("image", 12, 16, 3),
    "joint_position": feature("float32", 7),
    "gripper_position": feature("float32", 1),
    "actions": feature("float32", 8),
}


def write_dataset(root: Path, features: dict) -> Path:
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=10, features=features) as writer:
        for number, length in enumerate(LENGTHS):
            frames = {}
            for key, entry in features.items():
                shape = (length, *entry["shape"])
                if entry["dtype"] == "image":
                    frames[key] = np.full(shape, 40 * number, np.uint8)
                else:
                    frames[key] = rng.uniform(0, 1, shape).astype(np.float32)
            writer.add_episode(frames, f"task {number % 2}")
    return root


def recipe(tmp_path: Path, features: dict, factory: type, **options) -> TrainConfig:
    root = write_dataset(tmp_path / "set", features)
    model = Pi0Config(action_horizon=HORIZON, pi05=options.pop("pi05", False))
    base = DataConfig(prompt_from_task="actions" in features)  # ALOHA datasets have a fixed prompt
    data = factory(repo_id=str(root), assets=AssetsConfig(asset_id="robot"), base_config=base, **options)
    return TrainConfig(name="test", model=model, data=data, assets_base_dir=str(tmp_path / "assets"))


def stats_of_samples(config: TrainConfig) -> dict[str, normalize.NormStats]:
    """The slow way: every sample of the loader's dataset, cameras decoded, up to normalisation."""
    data_config = config.data.create(config.assets_dirs, config.model)
    dataset = recipe_data.create_dataset(data_config, config.model)
    chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
    end = [isinstance(transform, transforms.Normalize) for transform in chain].index(True)
    running = {key: normalize.RunningStats() for key in ("state", "actions")}
    for index in range(len(dataset)):
        sample = transforms.compose(chain[:end])(dataset[index])
        for key, stats in running.items():
            stats.update(sample[key])
    return {key: stats.get_statistics() for key, stats in running.items()}


def assert_stats_equal(found: dict[str, normalize.NormStats], expected: dict[str, normalize.NormStats]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_allclose(getattr(found[key], name), getattr(expected[key], name), rtol=1e-9, atol=1e-12)


def frames_of(config: TrainConfig) -> Frames:
    return open_frames(config.data.create(config.assets_dirs, config.model), config.model)


RECIPES = {
    "aloha, pi space, relative actions": (ALOHA, LeRobotAlohaDataConfig, {}),
    "aloha, robot space, absolute actions": (
        ALOHA,
        LeRobotAlohaDataConfig,
        {"adapt_to_pi": False, "use_delta_joint_actions": False},
    ),
    "libero, relative actions": (LIBERO, LeRobotLiberoDataConfig, {"extra_delta_transform": True}),
    "libero, pi0.5": (LIBERO, LeRobotLiberoDataConfig, {"pi05": True}),
    "droid": (DROID, LeRobotDROIDDataConfig, {}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_statistics_from_columns_equal_those_of_all_samples(tmp_path, name, caplog):
    features, factory, options = RECIPES[name]
    config = recipe(tmp_path, features, factory, **options)
    with caplog.at_level(logging.INFO):
        found = norm_stats.compute_norm_stats(frames_of(config))
    assert "sample by sample" not in caplog.text  # the published robots are computed in blocks
    assert_stats_equal(found, stats_of_samples(config))


def test_blocks_of_any_size_give_the_same_statistics(tmp_path, monkeypatch):
    frames = frames_of(recipe(tmp_path, ALOHA, LeRobotAlohaDataConfig))
    whole = norm_stats.compute_norm_stats(frames)
    monkeypatch.setattr(frame_blocks, "BLOCK_FRAMES", 4)
    assert_stats_equal(norm_stats.compute_norm_stats(frames), whole)


def test_a_block_costs_the_same_whatever_else_is_in_the_dataset(tmp_path, monkeypatch):
    """27 million frames were sorted for each of 6,600 blocks of them."""
    frames = frames_of(recipe(tmp_path, ALOHA, LeRobotAlohaDataConfig))
    sort = np.unique

    def watched(values, *arguments, **options):
        assert np.size(values) < len(frames)
        return sort(values, *arguments, **options)

    monkeypatch.setattr(np, "unique", watched)
    assert len(frames.block(np.arange(4))) == 4


def mean_of_the_sample(data: dict) -> dict:
    """Works on blocks, but then mixes samples: must be found out."""
    return {"state": np.asarray(data["state"]) - np.mean(data["state"]), "actions": data["actions"]}


def only_vectors(data: dict) -> dict:
    """Refuses blocks."""
    if np.asarray(data["state"]).shape != (8,):
        raise ValueError("state must have 8 values")
    return {"state": np.asarray(data["state"])[::-1], "actions": data["actions"][:, :6]}


@pytest.mark.parametrize("transform", [mean_of_the_sample, only_vectors])
def test_transforms_that_need_single_samples_are_given_single_samples(tmp_path, transform, caplog):
    group = transforms.Group(inputs=[transform])
    config = recipe(tmp_path, LIBERO, SimpleDataConfig, data_transforms=lambda model: group)
    with caplog.at_level(logging.INFO):
        found = norm_stats.compute_norm_stats(frames_of(config))
    assert "sample by sample" in caplog.text
    assert_stats_equal(found, stats_of_samples(config))


def test_an_error_in_a_transform_is_shown_as_it_is(tmp_path):
    def broken(data: dict) -> dict:
        raise RuntimeError("the gripper is missing")

    group = transforms.Group(inputs=[broken])
    config = recipe(tmp_path, LIBERO, SimpleDataConfig, data_transforms=lambda model: group)
    with pytest.raises(RuntimeError, match="the gripper is missing"):
        norm_stats.compute_norm_stats(frames_of(config))


def test_videos_are_never_opened(golden, tmp_path):
    root = shutil.copytree(golden / "lerobot_v30/video", tmp_path / "set")
    shutil.rmtree(root / "videos")
    repack = transforms.RepackTransform(
        {"image": {"base": "observation.images.cam_high"}, "state": "observation.state", "actions": "action"}
    )
    data = SimpleDataConfig(
        repo_id=str(root),
        data_transforms=lambda model: transforms.Group(),
        base_config=DataConfig(repack_transforms=transforms.Group(inputs=[repack]), action_sequence_keys=("action",)),
    )
    config = TrainConfig(name="test", model=Pi0Config(action_horizon=10), data=data, assets_base_dir=str(tmp_path))
    stats = norm_stats.compute_norm_stats(frames_of(config))
    recorded = json.loads((golden / "lerobot_v30/video.json").read_text())["stats"]["observation.state"]
    np.testing.assert_allclose(stats["state"].mean, recorded["mean"], rtol=1e-6)
    np.testing.assert_allclose(stats["state"].std, recorded["std"], rtol=1e-5)


def test_statistics_are_written_where_the_recipe_reads_them(tmp_path):
    config = recipe(tmp_path, LIBERO, LeRobotLiberoDataConfig)
    assert config.data.create(config.assets_dirs, config.model).norm_stats is None
    computed = norm_stats.compute(config)
    assert computed.path == tmp_path / "assets/test/robot/norm_stats.json"
    assert computed.num_frames == sum(LENGTHS)
    assert config.data.create(config.assets_dirs, config.model).norm_stats == computed.stats


def test_a_recipe_is_expanded_with_given_statistics_and_reads_none(tmp_path, monkeypatch):
    """Also by a `create` of the user's own, which asks `create_base_config` for them."""
    config = recipe(tmp_path, LIBERO, LeRobotLiberoDataConfig)
    stats = norm_stats.compute(config).stats

    class Own(LeRobotLiberoDataConfig):
        def create(self, assets_dirs, model_config):
            return dataclasses.replace(super().create(assets_dirs, model_config), prompt_from_task=True)

    own = Own(**{field.name: getattr(config.data, field.name) for field in dataclasses.fields(config.data)})
    assert own.create(config.assets_dirs, config.model).norm_stats == stats
    monkeypatch.setattr(normalize, "load", lambda folder: pytest.fail(f"{folder} is read"))
    given = {key: dataclasses.replace(value, mean=value.mean + 1) for key, value in stats.items()}
    assert data_half.expanded(own, config.assets_dirs, config.model, given).norm_stats is given
    assert data_half.expanded(own, config.assets_dirs, config.model, None).norm_stats is None


def test_statistics_of_a_remote_folder_are_not_computed_into_nowhere(tmp_path):
    config = recipe(tmp_path, LIBERO, LeRobotLiberoDataConfig)
    assets = AssetsConfig(assets_dir="gs://bucket/assets", asset_id="robot")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, assets=assets))
    with pytest.raises(ValueError, match=r"gs://bucket/assets/robot.*--data.assets.assets-dir"):
        norm_stats.compute(config)


def test_a_part_of_the_frames_is_drawn_from_the_whole_dataset(tmp_path):
    frames = frames_of(recipe(tmp_path, LIBERO, LeRobotLiberoDataConfig))
    few = norm_stats.compute_norm_stats(frames, max_frames=12)
    assert not np.array_equal(few["state"].mean, norm_stats.compute_norm_stats(frames)["state"].mean)
    assert few == norm_stats.compute_norm_stats(frames, max_frames=12)
    assert norm_stats.compute_norm_stats(frames, max_frames=1000) == norm_stats.compute_norm_stats(frames)
    with pytest.raises(ValueError, match="max_frames is 0"):
        norm_stats.compute_norm_stats(frames, max_frames=0)


def test_a_dimension_that_never_moves_is_named_and_widened(tmp_path):
    config = recipe(tmp_path, LIBERO, LeRobotLiberoDataConfig)
    root = Path(config.data.repo_id or "")
    shutil.rmtree(root)
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=10, features=LIBERO) as writer:
        state = rng.normal(size=(20, 8)).astype(np.float32)
        state[:, 6] = 0.04
        images = np.zeros((20, 12, 16, 3), np.uint8)
        actions = rng.normal(size=(20, 7)).astype(np.float32)
        writer.add_episode({"image": images, "wrist_image": images, "state": state, "actions": actions}, "task")
    computed = norm_stats.compute(config)
    assert len(computed.messages) == 1
    assert computed.messages[0].startswith("state/finger_left is constant at 0.04")
    assert computed.stats["state"].std[6] == 1


def test_data_are_compared_with_statistics_from_elsewhere_without_writing(arm_dataset, tmp_path, capsys):
    recipe = f"{paths.SUPPORT / 'tiny_recipe.py'}:arm"
    flags = [f"--data.repo-id={arm_dataset}", f"--assets-base-dir={tmp_path}"]
    assert stats_command.main([recipe, "--compare", *flags]) == 1
    assert "compute them first" in capsys.readouterr().err

    assert stats_command.main([recipe, *flags]) == 0
    file = tmp_path / "arm" / "dataset" / "norm_stats.json"
    own = normalize.load(file.parent)
    actions = own["actions"]
    assert actions.q01 is not None and actions.q99 is not None
    q99 = actions.q01 + (actions.q99 - actions.q01) * np.array([1.0, 0.2, 1e3])
    normalize.save(file.parent, own | {"actions": dataclasses.replace(actions, q99=q99)})
    before = file.read_bytes()
    capsys.readouterr()
    assert stats_command.main([recipe, "--compare", *flags]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "reaches 4.0 ranges beyond" in lines["actions/1"]
    assert "covers hardly any" in lines["actions/2"]
    assert "use statistics" not in lines["actions/0"] + lines["state/0"]
    assert file.read_bytes() == before


def test_statistics_of_a_package_are_not_written_over():
    with pytest.raises(ValueError, match=r"reads its statistics from package:.*cannot be written"):
        norm_stats.compute(get_config("tabletop_place"))
