"""LeRobot policy folders: what is written says what the recipe does, or is refused; what is read is compared.

The folders of `golden/lerobot_061` were written by LeRobot 0.6.1; `test_lerobot_upstream.py` runs it.
"""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paths
from golden_kits import load_kit
from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.checkpoints import _lerobot, convert_checkpoint
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import ModelType
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.tokenizer import BinningTokenizer
from openpi.policies import lerobot_robot, policy_config
from openpi.policies.robot_inputs import RobotInputs, RobotOutputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared import normalize
from openpi.training import recipe_io
from openpi.training.config import AssetsConfig, TrainConfig
from openpi.training.data_config import (
    DataConfig,
    LeRobotAlohaDataConfig,
    LeRobotDROIDDataConfig,
    LeRobotLiberoDataConfig,
    LeRobotUR5DataConfig,
)
from openpi.weights import lerobot_files, lerobot_writer, orbax_io, safetensors_io

RECORDED = paths.GOLDEN / "lerobot_061" / "policies"
NAMES = ("waist.pos", "elbow.pos", "wrist.pos", "gripper.pos")
SPEC = RobotSpec(
    robot="four",
    cameras=(CameraSpec("observation.images.top", "base_0_rgb"), CameraSpec("hand", "left_wrist_0_rgb")),
    state=(VectorSpec.uniform("observation.state", NAMES, "rad"),),
    actions=VectorSpec.uniform("actions", NAMES, "rad"),
)
RELATIVE = (True, True, True, False)
MODEL = Pi0Config(action_horizon=5, image_resolution=(28, 28))


def data_config(
    *more_inputs: Any, mask: Any = None, outputs: tuple = (), spec: RobotSpec = SPEC, **fields
) -> DataConfig:
    """Of a robot as `openpi init` writes it, with further transforms."""
    group = transforms.Group(inputs=(RobotInputs(spec, ModelType.PI0),), outputs=(RobotOutputs(spec),))
    group = transforms.Group(inputs=(*group.inputs, *more_inputs), outputs=(*outputs, *group.outputs))
    if mask is not None:
        group = group.push(inputs=(transforms.DeltaActions(mask),), outputs=(transforms.AbsoluteActions(mask),))
    return DataConfig(data_transforms=group, **fields)


def describe(config: DataConfig, model: Any = MODEL) -> lerobot_robot.Described:
    return lerobot_robot.describe(config, model, None)


# --- from a recipe ------------------------------------------------------------------------------------------------


def test_a_robot_without_conversions_is_the_same_in_lerobot():
    described = describe(data_config(mask=RELATIVE))
    assert described.losses == ()
    assert described.robot == lerobot_writer.LeRobotRobot(
        cameras=("observation.images.top", "observation.images.left_wrist_0_rgb"),
        state_width=4,
        action_names=NAMES,
        relative=RELATIVE,
        use_quantiles=False,
    )
    assert described.notes == ("LeRobot's observation.images.left_wrist_0_rgb is the camera 'hand'",)


def flip(data: dict) -> dict:
    return {**data, "state": data["state"] * np.array([1, -1, 1, 1])}


def flip_back(data: dict) -> dict:
    return {**data, "actions": data["actions"] * np.array([1, 1, 1, -1] + [1] * (data["actions"].shape[-1] - 4))}


def turned(data: dict) -> dict:
    return {**data, "image": {key: image[::-1, ::-1] for key, image in data["image"].items()}}


def lower(data: dict) -> dict:
    return {**data, "prompt": np.asarray(str(data["prompt"]).lower())}


def thresholded(data: dict) -> dict:
    actions = np.array(data["actions"])
    actions[..., 3] = np.where(actions[..., 3] > 0.5, 1.0, 0.0)
    return {**data, "actions": actions}


def shuffled(data: dict) -> dict:
    return {**data, "state": data["state"][[1, 0, 2, 3]]}


def needs_more(data: dict) -> dict:
    return {**data, "state": data["force"]}


@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (data_config(flip), r"flip: state are changed in 'elbow\.pos'"),
        (data_config(shuffled), r"state are changed in 'waist\.pos', 'elbow\.pos'"),
        (
            data_config(outputs=(flip_back,)),
            r"flip_back, RobotOutputs: actions for the robot are changed in 'grip",
        ),
        (data_config(outputs=(thresholded,)), r"actions for the robot are changed in 'gripper\.pos'"),
        (data_config(turned), r"image 'base_0_rgb' is no camera as the robot sends it"),
        (data_config(lower), r"the prompt is changed"),
        (data_config(needs_more), r"cannot be tried: KeyError"),
        (data_config(transforms.DeltaActions(RELATIVE)), r"actions for the robot are changed in 'waist"),
        (data_config(transforms.DeltaActions(RELATIVE), mask=RELATIVE), r"actions are changed in 'waist"),
        (data_config(transforms.SubsampleActions(2)), r"actions have shape \(3, 4\), of \(5, 4\)"),
        (data_config(repack_transforms=transforms.Group(inputs=(flip,))), r"function, a repack transform"),
        (data_config(model_transforms=transforms.Group(outputs=(flip_back,))), r"function, a model transform"),
    ],
)
def test_whatever_else_a_recipe_does_is_named(config: DataConfig, loss: str):
    losses = describe(config).losses
    assert any(re.search(loss, line) for line in losses), losses


def test_a_robot_with_more_actions_than_state_cannot_be_relative_in_lerobot():
    spec = dataclasses.replace(SPEC, state=(VectorSpec.uniform("observation.state", NAMES[:3], "rad"),))
    (loss,) = describe(data_config(mask=RELATIVE[:3], spec=spec)).losses
    assert "a state of 3 values, fewer than the action's 4" in loss


@pytest.mark.parametrize(
    ("factory", "is_same"),
    [
        (LeRobotAlohaDataConfig(), False),
        (LeRobotAlohaDataConfig(adapt_to_pi=False), True),
        (LeRobotLiberoDataConfig(extra_delta_transform=True), True),
        (LeRobotUR5DataConfig(), True),
        (LeRobotDROIDDataConfig(), True),
    ],
)
def test_known_robots_go_along_where_they_convert_nothing(factory: Any, is_same: bool, tmp_path: Path):
    factory = dataclasses.replace(factory, repo_id="robot")
    described = describe(factory.create(tmp_path, MODEL))
    assert (not described.losses) == is_same, described.losses
    if not is_same:
        assert any("left_shoulder" in line and "left_gripper" in line for line in described.losses)
    assert described.robot is not None
    assert any(described.robot.relative) == (not isinstance(factory, LeRobotDROIDDataConfig))


@given(
    st.lists(st.tuples(st.sampled_from(["joint_1", "joint_10", "Gripper", "grip", "a", ""]), st.booleans()), min_size=1)
)
def test_any_mask_is_said_in_lerobots_words(dims: list[tuple[str, bool]]):
    names, mask = zip(*dims, strict=True)
    written, excluded = lerobot_writer.exclusions(names, mask)
    assert tuple(lerobot_files.is_relative(name, excluded) for name in written) == mask


# --- written ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in LeRobot's layout, of tiny models of a robot whose actions are changes."""
    found = {}
    for family in ("pi0", "pi05", "pi0_fast"):
        kit = load_kit(golden / family)
        tokenizer = str(golden / "tokenizers" / "tiny_paligemma_tokenizer.model")
        model = dataclasses.replace(kit.config, tokenizer_path=tokenizer)
        data = LeRobotLiberoDataConfig(assets=AssetsConfig(asset_id="robot"), extra_delta_transform=True)
        recipe = TrainConfig(name="tiny_lerobot", model=model, data=data)
        folder = tmp_path_factory.mktemp(family) / "step"
        orbax_io.write_params(folder / "params", kit.params)
        normalize.save(folder / "assets" / "robot", stats())
        recipe_io.save_recipe(folder, recipe)
        with pytest.raises(ValueError, match=r"cannot build this model:\npaligemma_variant=.*(\n.*)*tokenizer_path="):
            convert_checkpoint.convert(str(folder), convert_checkpoint.Target(folder.parent / "out", to="lerobot"))
        found[family] = folder.parent / "out"
        convert_checkpoint.convert(
            str(folder), convert_checkpoint.Target(found[family], to="lerobot", any_model=True, certify=False)
        )
    return found


def stats() -> dict[str, normalize.NormStats]:
    rng = np.random.default_rng(5)
    found = {}
    for key, width in (("state", 8), ("actions", 7)):
        low, span = rng.normal(size=width), np.array([2, 1e-3, 0.5, 3, 1, 1e-4, 0, 0.7])[:width]
        found[key] = normalize.NormStats(mean=low + span / 2, std=span / 4, q01=low, q99=low + span)
    return found


@pytest.mark.parametrize("family", ["pi0", "pi05", "pi0_fast"])
def test_an_export_has_the_steps_of_lerobots_own_policies(family: str, exported: dict[str, Path]):
    theirs, ours = RECORDED / f"{family}_relative", exported[family]
    for name in ("policy_preprocessor", "policy_postprocessor"):
        found, expected = (options_of(folder / f"{name}.json") for folder in (ours, theirs))
        assert found.keys() == expected.keys()
        assert all(found[step].keys() == expected[step].keys() for step in found)
    assert found["absolute_actions_processor"] == {"enabled": True}
    config, known = (json.loads((folder / "config.json").read_text()) for folder in (ours, theirs))
    assert config.keys() <= known.keys()
    assert config["use_relative_actions"]
    assert lerobot_files.read_relative(ours) == (True,) * 6 + (False,)


def options_of(file: Path) -> dict[str, dict]:
    return {step["registry_name"]: step["config"] for step in json.loads(file.read_text())["steps"]}


def test_pi0_fast_has_the_published_action_tokenizer(exported: dict[str, Path]):
    options = options_of(exported["pi0_fast"] / "policy_preprocessor.json")
    assert options["action_tokenizer_processor"]["action_tokenizer_name"] == "physical-intelligence/fast"


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_statistics_come_back_as_they_were(family: str, exported: dict[str, Path]):
    found = lerobot_files.read_norm_stats(exported[family], use_quantiles=family == "pi05")
    for key, expected in stats().items():
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_allclose(getattr(found[key], name), getattr(expected, name), rtol=1e-6, atol=3e-7)


def test_what_lerobot_cannot_say_is_refused_before_anything_is_written(tmp_path: Path):
    recipe = TrainConfig(name="aloha", model=Pi0Config(), data=LeRobotAlohaDataConfig(repo_id="robot"))
    with pytest.raises(ValueError, match=r"would send its robot other actions:\nAlohaInputs: state are changed in"):
        _lerobot.plan(recipe, Checkpoint(tmp_path), {}, any_model=False)
    plain = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, adapt_to_pi=False))
    with pytest.raises(ValueError, match="statistics of 'state' have 0 dimensions, and the robot 14"):
        _lerobot.plan(plain, Checkpoint(tmp_path), {}, any_model=False)
    plan = _lerobot.plan(recipe, Checkpoint(tmp_path), None, any_model=False)
    plan.write(tmp_path, recipe.model, dtype="float32")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Pi0Config(paligemma_variant="gemma_300m"), "paligemma_variant='gemma_300m'"),
        (Pi0Config(action_expert_variant=GemmaConfig(512, 18, 2048, 8, 1, 256)), "action_expert_variant=GemmaConfig("),
        (Pi0Config(image_encoder_variant="B/16"), "image_encoder_variant='B/16'"),
        (Pi0Config(image_resolution=(224, 448)), "square"),
        (Pi0Config(pi05=True, discrete_state_input=False), "discrete_state_input=False"),
        (Pi0FASTConfig(image_resolution=(112, 112)), "for (224, 224) only"),
        (Pi0FASTConfig(fast_model_tokenizer=BinningTokenizer), "BinningTokenizer"),
        (Pi0FASTConfig(action_tokenizer_path=str(RECORDED)), "action_tokenizer_path"),
    ],
)
def test_models_that_lerobot_cannot_build_are_named(model: Any, why: str):
    (found,) = _lerobot.obstacles(model)
    assert why in found


def test_models_that_lerobot_builds_are_written_with_their_sizes():
    model = Pi0Config(action_expert_variant="gemma_2b", image_resolution=(112, 112), action_horizon=7)
    assert list(_lerobot.obstacles(model)) == []
    assert _lerobot.variants(model) == {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_2b"}
    assert list(_lerobot.obstacles(Pi0FASTConfig())) == []


# --- read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast"])
def test_masks_of_lerobots_own_policies_are_read(kind: str):
    assert lerobot_files.read_relative(RECORDED / f"{kind}_relative") == RELATIVE
    assert lerobot_files.read_relative(RECORDED / f"{kind}_off") == (False,) * 4


@pytest.mark.parametrize(
    ("folder", "mask", "message"),
    [
        ("pi0_relative", None, r"'waist\.pos' \(0\), 'elbow\.pos' \(1\), 'wrist\.pos' \(2\) are changes in the policy"),
        ("pi0_relative", (True, True, True, True), r"'gripper\.pos' \(3\) are targets in the policy"),
        ("pi0_off", RELATIVE, r"'wrist\.pos' \(2\) are targets in the policy.*absolute actions"),
        ("pi0_relative", RELATIVE, None),
        ("pi0_off", None, None),
    ],
)
def test_a_policy_is_not_served_under_other_relative_actions(folder: str, mask: Any, message: str | None, caplog):
    config = data_config(mask=mask)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            lerobot_robot.check_relative(RECORDED / folder, config)
        return
    with caplog.at_level(logging.WARNING):
        lerobot_robot.check_relative(RECORDED / folder, config)
        lerobot_files.read_norm_stats(RECORDED / folder, use_quantiles=False)
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["statistics", "normalization"])
def test_processors_that_contradict_each_other_or_the_config_are_refused(tmp_path, kind):
    shutil.copytree(RECORDED / "pi05_relative", tmp_path, dirs_exist_ok=True)
    if kind == "statistics":
        file = tmp_path / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
        tensors = {name: np.array(values) for name, values in safetensors_io.open_tensors(file).items()}
        safetensors_io.save(file, {**tensors, "action.q99": tensors["action.q99"] * 2})
        expected = r"unnormalizer_processor\.safetensors has another 'action\.q99' than the step before it"
    else:
        file = tmp_path / "policy_postprocessor.json"
        file.write_text(file.read_text().replace("QUANTILES", "MEAN_STD"))
        expected = r"policy_postprocessor\.json normalises STATE by MEAN_STD, and this recipe does it by QUANTILES"
    with pytest.raises(ValueError, match=expected):
        lerobot_files.read_norm_stats(tmp_path, use_quantiles=True)


def test_the_mask_is_checked_where_a_pipeline_is_loaded(tmp_path: Path):
    """Also beside statistics of our own, and when a policy is converted."""
    folder = tmp_path / "policy"
    shutil.copytree(RECORDED / "pi0_relative", folder)
    data = LeRobotLiberoDataConfig(assets=AssetsConfig(asset_id="robot"))
    normalize.save(folder / "assets" / "robot", stats())
    recipe = TrainConfig(name="tiny", model=MODEL, data=data)
    for load in (policy_config.load_pipeline, convert_checkpoint._find_norm_stats):
        arguments = (recipe, Checkpoint(folder))
        with pytest.raises(ValueError, match="are changes in the policy"):
            load(*arguments)


def test_steps_that_contradict_each_other_are_refused(tmp_path: Path):
    shutil.copytree(RECORDED / "pi0_relative", tmp_path, dirs_exist_ok=True)
    shutil.copyfile(RECORDED / "pi0_off" / "policy_postprocessor.json", tmp_path / "policy_postprocessor.json")
    with pytest.raises(ValueError, match=r"enabled=True, and 'absolute_actions_processor' .* enabled=False"):
        lerobot_files.read_relative(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            r'"exclude_joints": \[[^]]*\]',
            '"exclude_joints": "gripper"',
            r"exclude_joints is 'gripper' \(str\); expected",
        ),
        ('"enabled": true', '"enabled": "false"', r"enabled is 'false' \(str\); expected bool"),
        (r'"action_names": \[[^]]*\]', '"action_names": [1]', r"action_names is \[1\]"),
        ('"registry_name": "rename_observations_processor"', '"registry_name": "relative_actions_processor"', "twice"),
        (
            '"registry_name": "rename_observations_processor"',
            '"registry_name": []',
            "damaged .a registry_name is no text",
        ),
    ],
)
def test_a_relative_step_of_other_types_is_refused(old: str, new: str, message: str, tmp_path: Path):
    shutil.copytree(RECORDED / "pi0_relative", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "policy_preprocessor.json"
    changed, count = re.subn(old, new, file.read_text(), count=1)
    file.write_text(changed)
    assert count == 1
    with pytest.raises(ValueError, match=message):
        lerobot_files.read_relative(tmp_path)


def test_a_step_that_is_told_by_its_class_is_known(tmp_path: Path):
    shutil.copytree(RECORDED / "pi0_relative", tmp_path, dirs_exist_ok=True)
    for name in ("relative", "absolute"):
        for file in tmp_path.glob("policy_*.json"):
            text = f'"class": "lerobot.processor.{name.title()}ActionsProcessorStep"'
            file.write_text(file.read_text().replace(f'"registry_name": "{name}_actions_processor"', text))
    assert lerobot_files.read_relative(tmp_path) == RELATIVE


def test_a_base_policy_says_nothing_and_an_old_one_is_absolute(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"type": "pi0"}')
    lerobot_robot.check_relative(tmp_path, data_config(mask=RELATIVE))
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": [{"registry_name": "normalizer_processor"}]}')
    with pytest.raises(ValueError, match="are targets in the policy"):
        lerobot_robot.check_relative(tmp_path, data_config(mask=RELATIVE))
    lerobot_robot.check_relative(tmp_path, data_config())


def test_lerobots_epsilon_is_made_up_for():
    """Its formulas, with 1e-8, and ours, with 1e-6, give the same numbers of its statistics."""
    tensors = safetensors_io.open_tensors(next((RECORDED / "pi05_off").glob("policy_pre*.safetensors")))
    q01, q99, mean, std = (np.array(tensors[f"action.{name}"], np.float64) for name in ("q01", "q99", "mean", "std"))
    x = mean + std
    for kind, use_quantiles, expected in (
        ("pi0_off", False, (x - mean) / (std + 1e-8)),
        ("pi05_off", True, 2 * (x - q01) / (q99 - q01) - 1),
    ):
        found = lerobot_files.read_norm_stats(RECORDED / kind, use_quantiles=use_quantiles)
        ours = transforms.Normalize(found, use_quantiles=use_quantiles)({"actions": x})["actions"]
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)
