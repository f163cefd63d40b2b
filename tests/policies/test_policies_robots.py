"""Robot inputs and outputs against recordings, and what they refuse."""

import numpy as np
import pytest

from openpi.models.model_config import ModelType
from openpi.policies import (
    aloha_policy,
    calvin_policy,
    droid_policy,
    libero_policy,
    ur5_policy,
)
from openpi.policies.robot_inputs import RobotInputs, RobotOutputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.collected_warnings import collected_warnings
from openpi.transforms import flatten_dict, unflatten_dict
from openpi_positronic import policy as positronic_policy

ATOL = 1e-6


def recorded(path):
    """(inputs, outputs, other) of a recording; inputs nested as the robot sends them."""
    arrays = dict(np.load(path))
    inputs = {k.removeprefix("in/"): v for k, v in arrays.items() if k.startswith("in/")}
    outputs = {k.removeprefix("out/"): v for k, v in arrays.items() if k.startswith("out/")}
    return inputs, outputs, arrays


def assert_same(found: dict, expected: dict) -> None:
    flat = flatten_dict(found)
    assert flat.keys() == expected.keys()
    for key, want in expected.items():
        got = np.asarray(flat[key])
        assert got.shape == want.shape, key
        if np.issubdtype(want.dtype, np.floating):
            assert got.dtype == want.dtype, key
            np.testing.assert_allclose(got, want, rtol=0, atol=ATOL, err_msg=key)
        else:
            assert got.dtype.kind == want.dtype.kind, key
            np.testing.assert_array_equal(got, want, err_msg=key)


def frozen(tree):
    """A copy whose arrays cannot be written to."""
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    copy = np.array(tree)
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "case",
    ["adapt_all", "adapt_float_images", "adapt_no_prompt", "noadapt_all", "noadapt_high_only"],
)
def test_aloha_inputs_agree_with_the_recording_and_leave_their_input_alone(golden, case):
    inputs, outputs, arrays = recorded(golden / "data" / f"aloha_inputs_{case}.npz")
    transform = aloha_policy.AlohaInputs(adapt_to_pi=bool(arrays["adapt_to_pi"]))
    sample = frozen(unflatten_dict(inputs))
    before = {key: value.copy() for key, value in flatten_dict(sample).items()}
    assert_same(transform(sample), outputs)
    assert_same(sample, before)


def test_aloha_takes_each_camera_under_the_key_that_its_contract_names():
    sample = aloha_policy.make_aloha_example()
    images = sample.pop("images")
    flat = {**sample, **{f"images/{name}": image for name, image in images.items()}}
    nested = flatten_dict(aloha_policy.AlohaInputs()({**sample, "images": images}))
    del nested["prompt"], flat["prompt"]
    assert_same(aloha_policy.AlohaInputs()(flat), nested)
    del flat["images/cam_high"]
    with pytest.raises(KeyError, match="images/cam_high"):
        aloha_policy.AlohaInputs()(flat)


@pytest.mark.parametrize("adapt", [0, 1])
@pytest.mark.parametrize("dim", [14, 32])
def test_aloha_outputs_agree_with_the_recording(golden, adapt, dim):
    inputs, outputs, _ = recorded(golden / "data" / f"aloha_outputs_adapt{adapt}_dim{dim}.npz")
    assert_same(aloha_policy.AlohaOutputs(adapt_to_pi=bool(adapt))(frozen(inputs)), outputs)


def test_the_aloha_gripper_maps_agree_with_the_recording(golden):
    maps = np.load(golden / "data" / "aloha_gripper.npz")
    values = maps["value"]
    rows = np.zeros((len(values), 14))
    rows[:, 6] = rows[:, 13] = values
    image = np.zeros((3, 8, 9), np.uint8)
    sample = {"images": {"cam_high": image}}
    inputs = [aloha_policy.AlohaInputs()({**sample, "state": row, "actions": row}) for row in rows]
    outputs = aloha_policy.AlohaOutputs()({"actions": rows})["actions"]
    for gripper in (6, 13):
        state = np.array([sample["state"][gripper] for sample in inputs])
        actions = np.array([sample["actions"][gripper] for sample in inputs])
        np.testing.assert_allclose(state, maps["gripper_to_angular"], atol=ATOL)
        np.testing.assert_allclose(actions, maps["gripper_from_angular_inv"], atol=ATOL)
        np.testing.assert_allclose(outputs[:, gripper], maps["gripper_from_angular"], atol=ATOL)


def test_aloha_outputs_undo_what_aloha_inputs_do_to_actions():
    actions = np.random.default_rng(0).normal(size=(5, 14))
    sample = {"images": {"cam_high": np.zeros((8, 9, 3), np.uint8)}, "state": np.ones(14), "actions": actions}
    adapted = aloha_policy.AlohaInputs()(sample)["actions"]
    np.testing.assert_allclose(aloha_policy.AlohaOutputs()({"actions": adapted})["actions"], actions, atol=1e-12)


@pytest.mark.parametrize("robot", ["droid", "libero"])
@pytest.mark.parametrize("model", ["pi0", "pi05", "pi0_fast"])
@pytest.mark.parametrize("variant", ["chw_float", "hwc_uint8"])
def test_one_armed_robot_inputs_agree_with_the_recording(golden, robot, model, variant):
    inputs, outputs, _ = recorded(golden / "data" / f"{robot}_inputs_{model}_{variant}.npz")
    transforms = {"droid": droid_policy.DroidInputs, "libero": libero_policy.LiberoInputs}
    flat = frozen({key.replace("observation.", "observation/"): value for key, value in inputs.items()})
    before = {key: value.copy() for key, value in flat.items()}
    transform = transforms[robot](model_type=ModelType(model))
    assert_same(transform(flat), outputs)
    assert_same(transform(unflatten_dict(flat)), outputs)
    assert_same(flat, flatten_dict(before))


def test_one_armed_robot_outputs_agree_with_the_recording(golden):
    arrays = np.load(golden / "data" / "droid_libero_outputs.npz")
    for robot, transform in (
        ("droid", droid_policy.DroidOutputs()),
        ("libero", libero_policy.LiberoOutputs()),
    ):
        for suffix in ("", "1d"):
            actions = transform({"actions": arrays[f"in{suffix}/actions"]})["actions"]
            np.testing.assert_array_equal(actions, arrays[f"{robot}{suffix}/actions"])


EXAMPLES = [
    (aloha_policy.make_aloha_example, aloha_policy.AlohaInputs(), 14),
    (droid_policy.make_droid_example, droid_policy.DroidInputs(ModelType.PI05), 8),
    (libero_policy.make_libero_example, libero_policy.LiberoInputs(ModelType.PI0), 8),
    (ur5_policy.make_ur5_example, ur5_policy.UR5Inputs(ModelType.PI0), 7),
    (calvin_policy.make_calvin_example, calvin_policy.CalvinInputs(ModelType.PI0), 15),
    (positronic_policy.make_positronic_example, positronic_policy.PositronicInputs(ModelType.PI05), 8),
]


@pytest.mark.parametrize(("make", "transform", "width"), EXAMPLES)
def test_the_example_observation_passes_the_robot_transform_and_fits_its_spec(make, transform, width):
    example, spec = make(), transform.spec
    inputs = transform(example)
    assert inputs["state"].shape == (width,)
    assert set(inputs["image"]) == set(inputs["image_mask"])
    assert isinstance(spec, RobotSpec)
    leaves = flatten_dict(example)
    assert {camera.key for camera in spec.cameras if camera.required} <= leaves.keys()
    assert sum(vector.width for vector in spec.state) == width
    for vector in spec.state:
        assert np.size(leaves[vector.key]) == vector.width
    assert {camera.slot for camera in spec.cameras if camera.slot} <= set(inputs["image"])


def test_a_ur5_gripper_may_be_a_single_number_and_blocks_of_frames_pass():
    example = ur5_policy.make_ur5_example()
    transform = ur5_policy.UR5Inputs(ModelType.PI0)
    scalar = transform({**example, "gripper": np.float64(0.25)})["state"]
    np.testing.assert_array_equal(scalar, [*example["joints"], 0.25])
    block = transform({**example, "joints": np.zeros((5, 6)), "gripper": np.ones((5, 1))})["state"]
    assert block.shape == (5, 7)
    actions = ur5_policy.UR5Outputs()({"actions": np.zeros((4, 32))})["actions"]
    assert actions.shape == (4, 7)


def test_the_parts_of_a_ur5_state_are_checked_before_nobody_can_tell_them_apart():
    example = ur5_policy.make_ur5_example()
    swapped = {**example, "joints": example["gripper"], "gripper": example["joints"]}
    with pytest.raises(ValueError, match=r"'joints' has shape \(1,\); expected 6 values: base, shoulder"):
        ur5_policy.UR5Inputs(ModelType.PI0)(swapped)
    with pytest.raises(ValueError, match=r"'gripper' has shape \(2,\); expected 1 values"):
        ur5_policy.UR5Inputs(ModelType.PI0)({**example, "gripper": np.zeros(2)})


def test_a_positronic_state_may_have_the_width_of_any_codec():
    example = positronic_policy.make_positronic_example()
    transform = positronic_policy.PositronicInputs(ModelType.PI05, state_dim=15)
    assert transform.spec.state[0].width == 15
    assert transform({**example, "observation/state": np.zeros(15)})["state"].shape == (15,)
    assert positronic_policy.PositronicOutputs()({"actions": np.zeros((50, 32))})["actions"].shape == (50, 8)


def test_a_mask_leaves_out_the_dimensions_that_are_named_and_knows_their_names():
    vector = VectorSpec.uniform("actions", ["a", "b", "grip"], "rad")
    assert vector.mask_without(["grip"]) == (True, True, False)
    assert vector.mask_without(()) == (True, True, True)
    with pytest.raises(ValueError, match="'actions' has no dimension 'gripper'; it has 'a', 'b', 'grip'"):
        vector.mask_without(["gripper"])


@pytest.mark.parametrize("model", list(ModelType))
def test_any_robot_goes_by_its_spec(model):
    spec = RobotSpec(
        robot="one_eyed",
        cameras=(CameraSpec("hand", slot="left_wrist_0_rgb"), CameraSpec("side", slot="base_0_rgb", required=False)),
        state=(VectorSpec.uniform("height", ["z"], "m"), VectorSpec.uniform("arm", ["a", "b"], "rad")),
        actions=VectorSpec.uniform("actions", ["a", "b"], "rad"),
    )
    hand = np.full((8, 9, 3), 7, np.uint8)
    sample = {"hand": hand, "height": 0.5, "arm": np.array([1.0, 2.0]), "prompt": "go", "unrelated": 1}
    inputs = RobotInputs(spec, model)(sample)
    np.testing.assert_array_equal(inputs["state"], [0.5, 1, 2])
    np.testing.assert_array_equal(inputs["image"]["left_wrist_0_rgb"], hand)
    assert inputs["image"]["base_0_rgb"].shape == hand.shape and not inputs["image"]["base_0_rgb"].any()
    sees_black = model is ModelType.PI0_FAST
    assert {slot: bool(mask) for slot, mask in inputs["image_mask"].items()} == {
        "base_0_rgb": sees_black,
        "left_wrist_0_rgb": True,
        "right_wrist_0_rgb": sees_black,
    }
    assert inputs["prompt"] == "go" and "unrelated" not in inputs
    assert RobotOutputs(spec)({"actions": np.zeros((3, 32))})["actions"].shape == (3, 2)
    with pytest.raises(KeyError, match="RobotInputs needs the key 'arm'"):
        RobotInputs(spec, model)({key: sample[key] for key in ("hand", "height")})


def aloha(**changes):
    return {"images": {"cam_high": np.zeros((3, 8, 9), np.uint8)}, "state": np.zeros(14), **changes}


def test_aloha_takes_channels_last_images_as_they_are():
    image = np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8)
    hwc = aloha_policy.AlohaInputs()(aloha(images={"cam_high": image}))
    chw = aloha_policy.AlohaInputs()(aloha(images={"cam_high": np.moveaxis(image, -1, 0)}))
    np.testing.assert_array_equal(hwc["image"]["base_0_rgb"], image)
    np.testing.assert_array_equal(chw["image"]["base_0_rgb"], image)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((3, 8, 3), np.uint8), "could be"),
        (np.zeros((8, 9, 4), np.uint8), r"\[h, w, 3\] or \[3, h, w\]"),
        (np.zeros((1, 3, 8, 9), np.uint8), "batch"),
        (np.full((3, 8, 9), 128.0), r"from 128 to 128; expected \[0, 1\]"),
        (np.full((3, 8, 9), np.nan), r"nan; expected \[0, 1\]"),
        (np.zeros((3, 8, 9), np.int64), "dtype int64; expected uint8"),
    ],
)
def test_an_image_that_would_be_misread_is_refused_with_its_name(image, told):
    with pytest.raises(ValueError, match=told) as error:
        aloha_policy.AlohaInputs()(aloha(images={"cam_high": image}))
    assert "images/cam_high" in str(error.value)


@pytest.mark.parametrize(("opening", "told"), [(255.0, "left_gripper': 255"), (-100.0, "-100"), (1.1, "")])
def test_an_aloha_gripper_of_another_scale_is_told_though_the_linkage_ends_there(opening, told):
    state = np.array([*np.zeros(6), opening, *np.zeros(7)])
    example = {**aloha_policy.make_aloha_example(), "state": state}
    with collected_warnings() as warnings:
        aloha_policy.AlohaInputs()(example)
    assert len(warnings) == bool(told) and told in "".join(warnings)


def test_unknown_aloha_cameras_are_named_with_the_known_ones():
    images = {"cam_high": np.zeros((3, 8, 9), np.uint8), "cam_top": np.zeros((3, 8, 9), np.uint8)}
    with pytest.raises(ValueError, match=r"'cam_top'.*'cam_high'.*'cam_left_wrist'"):
        aloha_policy.AlohaInputs()(aloha(images=images))


def test_a_missing_aloha_camera_is_named_with_what_is_there():
    with pytest.raises(KeyError, match=r"'images/cam_high', found: 'images/cam_left_wrist'"):
        aloha_policy.AlohaInputs()(aloha(images={"cam_left_wrist": np.zeros((3, 8, 9), np.uint8)}))


def test_another_robots_state_is_refused_where_joints_are_converted():
    with pytest.raises(ValueError, match=r"'state' has shape \(7,\); expected 14"):
        aloha_policy.AlohaInputs()(aloha(state=np.zeros(7)))
    assert aloha_policy.AlohaInputs(adapt_to_pi=False)(aloha(state=np.zeros(16)))["state"].shape == (16,)


@pytest.mark.parametrize(
    ("make", "transform"),
    [(make, transform) for make, transform, _ in EXAMPLES[1:]],
    ids=["droid", "libero", "ur5", "calvin", "positronic"],
)
def test_a_misspelled_key_is_named_with_what_was_sent(make, transform):
    example = make()
    key = next(key for key in example if "image" in key or "rgb" in key)
    example[key + "_x"] = example.pop(key)
    with pytest.raises(KeyError, match=f"'{key}', found: .*'{key}_x'.*Did you mean '{key}_x'"):
        transform(example)


@pytest.mark.parametrize(
    ("key", "shape", "told"),
    [
        ("joint_position", (6,), r"joint_position' has shape \(6,\); expected 7 values: joint_1"),
        ("gripper_position", (1, 1), r"gripper_position' has shape \(1, 1\); expected 1 values: gripper"),
    ],
)
def test_a_droid_state_of_another_arm_or_with_one_batch_axis_is_refused_by_its_part(key, shape, told):
    example = droid_policy.make_droid_example()
    example[f"observation/{key}"] = np.zeros(shape)
    with pytest.raises(ValueError, match=told):
        droid_policy.DroidInputs(ModelType.PI0)(example)


def with_slots(*slots: str | None) -> RobotInputs:
    cameras = tuple(CameraSpec(f"camera_{i}", slot, required=False) for i, slot in enumerate(slots))
    joint = VectorSpec.uniform("joint", ("joint",), "rad")
    return RobotInputs(RobotSpec("arm", cameras, (joint,), joint), ModelType.PI05)


def test_a_camera_that_the_model_would_not_see_is_refused():
    image = np.zeros((8, 9, 3), np.uint8)
    sent = {"camera_0": image, "camera_1": image, "joint": np.zeros(1)}
    assert with_slots("base_0_rgb", None)(sent)["image_mask"]["base_0_rgb"]
    with pytest.raises(
        ValueError, match=r"camera 'camera_1' .* has the slot 'wrist_0_rgb'; the model's are 'base_0_rgb'"
    ):
        with_slots("base_0_rgb", "wrist_0_rgb")(sent)
    with pytest.raises(ValueError, match="cameras 'camera_0' and 'camera_1' have the same slot 'base_0_rgb'"):
        with_slots("base_0_rgb", "base_0_rgb")(sent)
    with pytest.raises(ValueError, match="found no camera; expected at least one of 'camera_0'"):
        with_slots("base_0_rgb")({"joint": np.zeros(1)})
