"""The contract: what it refuses, what it warns of, and that it survives its file."""

import dataclasses
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from openpi.policies import policy_config
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.contract import Contract
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.images import channel_mean, channel_means, looks_bgr
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.normalize import NormStats
from openpi.training.config import get_config

REDDISH = (150.0, 100.0, 60.0)


def build(name: str, **kwargs) -> Contract:
    config = get_config(name)
    assets = dataclasses.replace(config.data.assets, assets_dir=None)
    data = dataclasses.replace(config.data, assets=assets).create(config.assets_dirs, config.model)
    stats = kwargs.pop("norm_stats", None)
    return Contract.build(dataclasses.replace(data, norm_stats=stats), config.model, **kwargs)


def stats(state_width: int, action_width: int) -> dict[str, NormStats]:
    def entry(width):
        return NormStats(mean=np.zeros(width), std=np.ones(width), q01=-np.ones(width), q99=np.ones(width))

    return {"state": entry(state_width), "actions": entry(action_width)}


@pytest.fixture(scope="module")
def droid() -> Contract:
    return build(
        "pi05_droid",
        norm_stats=stats(8, 8),
        control_hz=15.0,
        camera_means={"observation/exterior_image_1_left": REDDISH},
    )


def with_prompt_default(contract: Contract) -> Contract:
    return dataclasses.replace(contract, default_prompt="tidy up")


def test_how_a_robot_stands_still_and_how_far_it_may_go_is_told_to_clients_where_it_is_known(droid, tmp_path):
    told = droid.as_metadata()["actions"]
    assert not {"hold", "low", "high", "max_step"} & told.keys()  # velocities or positions: nobody knows
    libero = build("pi0_libero")
    assert libero.as_metadata()["actions"]["hold"] == ["zero"] * 7
    known = dataclasses.replace(libero, action_low=(-1.0,) * 7, action_high=(1.0,) * 7, action_max_step=(0.5,) * 7)
    known.save(tmp_path)
    assert Contract.load(tmp_path) == known
    assert known.as_metadata()["actions"]["max_step"] == [0.5] * 7
    document = json.loads((tmp_path / "contract.json").read_text())
    for name in ("hold", "action_low", "action_high", "action_max_step"):
        del document[name]  # as older versions wrote it
    (tmp_path / "contract.json").write_text(json.dumps(document))
    assert Contract.load(tmp_path).action_low is None and Contract.load(tmp_path).hold == ()


def test_a_contract_says_what_training_knew(droid):
    assert droid.robot == "droid"
    assert droid.model_type == "pi05"
    assert [camera.slot for camera in droid.cameras if camera.required] == ["base_0_rgb", "left_wrist_0_rgb"]
    assert droid.state_names == (*(f"joint_{i}" for i in range(1, 8)), "gripper")
    assert droid.actions.width == 8
    assert not any(droid.trained_relative)
    assert droid.action_horizon == 15
    assert droid.normalization == "quantile"
    assert droid.asset_id == "droid"
    assert droid.default_prompt is None
    assert droid.state_q01 == (-1.0,) * 8


def test_relative_training_dims_and_default_prompts_are_found_in_the_transforms():
    contract = build("pi0_aloha_towel")
    assert contract.trained_relative == ((True,) * 6 + (False,)) * 2
    assert contract.default_prompt == "fold the towel"
    assert contract.normalization == "zscore"


def test_a_contract_survives_its_file(droid, tmp_path):
    droid.save(tmp_path / "step")
    assert Contract.load(tmp_path / "step") == droid
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["contract.json"]


def test_a_missing_or_damaged_contract_is_named(droid, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contract\.json does not exist"):
        Contract.load(tmp_path)
    for text in ("{", "[]", "{}", '{"version": 99}', '{"version": 1}'):
        (tmp_path / "contract.json").write_text(text)
        with pytest.raises(ValueError, match=r"contract\.json is damaged"):
            Contract.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"action_horizon": "5"}, r"contract\.action_horizon is '5' \(str\); expected int"),
        ({"robot": ["droid"]}, r"contract\.robot is \['droid'\]"),
        ({"control_hz": float("nan")}, r"contract\.control_hz is nan"),
        ({"cameras": [{"key": "top", "slot": None, "shape": [100_000, 100_000]}]}, "would take 10,000,000,000 pixels"),
        ({"cameras": [{"key": "top", "slot": None, "shape": [-1, -1]}]}, "expected a height and a width"),
        ({"cameras": [{"key": "top", "slot": None, "__class__": "x"}]}, r"camera has the fields \['__class__'\]"),
        ({"state": [{"key": 1, "names": ["a"], "units": ["b"]}]}, r"vector\.key is 1"),
        ({"state_q01": [None]}, r"contract\.state_q01 is"),
        ({"state": []}, r"contract\.state is empty; expected the vectors of a state of 8 dimensions"),
        ({"trained_relative": [True]}, r"contract\.trained_relative has 1 values; expected 8"),
        ({"action_low": [0.0] * 9}, r"contract\.action_low has 9 values; expected 8"),
        ({"state_q01": [0.0]}, r"state_q01 and state_q99 have different widths"),
        ({"control_hz": -15}, r"control_hz=-15; expected a number above 0 and at most 10000"),
        ({"action_horizon": 0}, r"action_horizon=0; expected a whole number of at least 1"),
        ({"action_horizon": 10**12}, r"action_horizon=10+; expected"),
        ({"rtc_max_delay": -4}, r"rtc_max_delay=-4; expected"),
        ({"hold": ["fly"] * 8}, r"contract\.hold\[0\] is 'fly'.*expected Literal\['stay', 'zero'\]"),
        ({"normalization": "none"}, r"contract\.normalization is 'none'"),
        ({"action_low": [1.0] * 8, "action_high": [0.0] * 8}, r"action_low has 1\.0, above the 0\.0 of action_high"),
        ({"action_max_step": [0.0] * 8}, r"action_max_step has 0\.0; expected more than 0"),
        (
            {"cameras": [{"key": "top", "slot": None}] * 2},
            r"contract\.cameras has the keys 'top', 'top'; expected each",
        ),
    ],
)
def test_a_contract_of_other_types_is_refused_by_its_field(droid, change, expected, tmp_path):
    droid.save(tmp_path)
    document = json.loads((tmp_path / "contract.json").read_text())
    (tmp_path / "contract.json").write_text(json.dumps(document | change))
    with pytest.raises(ValueError, match=expected):
        Contract.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "make"), [("pi05_droid", make_droid_example), ("pi0_aloha", make_aloha_example)], ids=["droid", "aloha"]
)
def test_the_example_observation_is_accepted_and_left_alone(name, make):
    example = make()
    before = {key: np.array(value) for key, value in example.items() if key != "images"}
    build(name).check(example)
    for key, value in before.items():
        np.testing.assert_array_equal(example[key], value)


EXTERIOR, WRIST = "observation/exterior_image_1_left", "observation/wrist_image_left"
JOINTS = "observation/joint_position"


def broken(**changes):
    """The example with entries replaced; None removes one."""
    example = make_droid_example()
    for key, value in changes.items():
        path = {"exterior": EXTERIOR, "joints": JOINTS}.get(key, key)
        example.pop(path, None)
        if value is not None:
            example[path] = value
    return example


REFUSED = [
    (broken(exterior=None), r"missing the camera 'observation/exterior_image_1_left' \(cameras found: "),
    (broken(exterior=np.full((8, 9, 3), 200, np.float32)), r"dtype float32 and values from 200 to 200; .*astype"),
    (
        broken(exterior=np.full((8, 9, 3), np.nan)),
        r"image_1_left' has dtype float64 and values from nan to nan",
    ),
    (broken(exterior=np.zeros((8, 9, 3), np.int32)), r"has dtype int32 and values from 0 to 0; .*astype\(np\.uint8\)"),
    (broken(exterior=np.full((8, 9, 3), "x")), r"exterior_image_1_left' has dtype <U1; expected uint8"),
    (broken(exterior=np.zeros((0, 9, 3), np.uint8)), r"shape \(0, 9, 3\); expected one RGB image"),
    (broken(exterior=np.zeros((1, 8, 9, 3), np.uint8)), r"shape \(1, 8, 9, 3\); expected one RGB image"),
    (broken(exterior=np.zeros((8, 9, 4), np.uint8)), r"shape \(8, 9, 4\)"),
    (broken(exterior=b"\xff\xd8\xff\xe0"), r"is 4 bytes; expected an array, .*'__jpeg__': true, 'data'"),
    (broken(joints=np.zeros(6)), r"joint_position' has shape \(6,\); expected \(7,\): joint_1, .*another robot"),
    (broken(joints=np.zeros((1, 7))), r"joint_position' has shape \(1, 7\); expected \(7,\)"),
    (broken(joints=None), r"missing 'observation/joint_position' \(found: .*Rename the key"),
    (
        broken(joints=np.array([0, np.nan, 0, 0, np.inf, 0, 0])),
        r"joint_position' has NaN or infinity in joint_2, joint_5",
    ),
    (broken(joints=np.array(list("abcdefg"))), r"joint_position' has dtype <U1; expected numbers"),
    (broken(joints=np.full(7, 1e300)), r"joint_position' has NaN or infinity in joint_1, .*finite in float32"),
    (broken(joints=np.zeros(7, np.longdouble)), r"joint_position' has dtype float128; expected numbers"),
    (broken(observation={"joint_position": np.zeros(7)}), r"joint_position' is there twice, in full and within a map"),
    (broken(prompt=None), r"no 'prompt'.*Send the task"),
    (broken(prompt=np.array(["a", "b"])), r"'prompt' has 2 texts; expected one"),
    (broken(prompt=np.array([], "<U3")), r"'prompt' has 0 texts; expected one"),
    (broken(prompt=["tidy", "up"]), r"'prompt' is of type list; expected text"),
    (broken(prompt=[None]), r"'prompt' is of type list; expected text"),
    (broken(prompt="lift \ud800"), r"'prompt' holds characters that there are not; expected text in UTF-8"),
    (broken(prompt=np.frombuffer(b"\xff" * 4, "<U1")), r"'prompt' holds characters that there are not"),
    (broken(prompt=np.bytes_(b"\xff")), r"'prompt' holds characters that there are not"),
]


@pytest.mark.parametrize(("observation", "told"), REFUSED)
def test_a_broken_observation_is_refused_with_field_found_expected_and_fix(droid, observation, told):
    with pytest.raises(ValueError, match=told):
        droid.check(observation)


def test_a_prompt_is_not_needed_where_there_is_a_default(droid):
    with_prompt_default(droid).check(broken(prompt=None))


def test_optional_cameras_may_be_left_out_and_known_unused_ones_sent(droid):
    droid.check(broken(**{"observation/exterior_image_2_left": np.zeros((8, 9, 3), np.uint8)}))
    example = make_aloha_example()
    del example["images"]["cam_left_wrist"]
    build("pi0_aloha").check(example)


def test_what_else_a_robot_sends_is_named_and_no_reason_to_refuse_it(droid):
    """A third camera, depth, poses of cameras: the published transforms do not look at them either."""
    more = {"side_camera": np.zeros((8, 9, 3), np.uint8), "depth": np.zeros((8, 9, 1)), "poses": np.zeros((5, 4, 4))}
    assert droid.check(broken(**more, timestamp=1.5, episode_id="7")) == [*more]


def test_a_camera_of_another_name_is_refused_where_one_is_not_there(droid):
    example = make_aloha_example()
    example["images"]["left_wrist"] = example["images"].pop("cam_left_wrist")
    with pytest.raises(ValueError, match=r"'images/left_wrist', which .* and lacks 'images/cam_left_wrist'.*rename it"):
        build("pi0_aloha").check(example)


@pytest.mark.parametrize(
    "changes",
    [
        {"exterior": np.linspace(0, 1, 216, dtype=np.float32).reshape(8, 9, 3)},
        {"exterior": np.linspace(0, 1, 216).reshape(3, 8, 9)},
        {"observation/gripper_position": True},
        {"prompt": ["tidy up"]},
        {"prompt": b"tidy up"},
    ],
)
def test_what_the_published_transforms_take_is_taken(droid, changes):
    droid.check(broken(**changes))


def test_robots_of_ones_own_with_libero_s_transforms_have_a_state_of_any_width(droid):
    """As published, where they are what others start from: 7 joints ended the start of a run, and of a server."""
    sample = {"observation/state": np.zeros(7)}
    assert build("pi05_libero", sample=sample, state_names=list("abcdefg")).state_names == tuple("abcdefg")
    assert build("pi05_libero", sample=sample).state_names[0] == "state_0"
    assert build("pi05_libero", sample={"observation/state": np.zeros(8)}) == build("pi05_libero")
    sample = {"observation/joint_position": np.zeros(6), "observation/gripper_position": np.zeros(1)}
    assert build("pi05_droid", sample=sample).state == droid.state

    config = get_config("pi05_libero")
    data = config.data.create(Path("/nonexistent"), config.model)
    described = policy_config._described(dataclasses.replace(data, norm_stats=stats(7, 7)), config.model)
    assert described is not None and described.state[0].width == 7
    with pytest.raises(ValueError, match=r"the statistics of 'actions' .* have 6 dimensions; robot 'libero'"):
        policy_config._described(dataclasses.replace(data, norm_stats=stats(7, 6)), config.model)


def test_nested_keys_either_layout_lists_and_scalar_grippers_are_accepted(droid):
    example = make_droid_example()
    droid.check(
        {
            "observation": {
                "exterior_image_1_left": example[EXTERIOR],
                "wrist_image_left": np.moveaxis(example[WRIST], -1, 0),
                "joint_position": example[JOINTS].tolist(),
                "gripper_position": 0.5,
            },
            "prompt": "tidy up",
        }
    )


def test_a_fixed_layout_and_size_are_enforced_where_the_contract_has_them(droid):
    cameras = (CameraSpec(EXTERIOR, "base_0_rgb", layout="hwc", shape=(224, 224)), *droid.cameras[1:])
    strict = dataclasses.replace(droid, cameras=cameras)
    strict.check(make_droid_example())
    with pytest.raises(ValueError, match=r"layout \[3, h, w\]; expected \[h, w, 3\]"):
        strict.check(broken(exterior=np.zeros((3, 224, 224), np.uint8)))
    with pytest.raises(ValueError, match=r"is 8 x 9; expected 224 x 224"):
        strict.check(broken(exterior=np.zeros((8, 9, 3), np.uint8)))


def coloured(mean, shape=(16, 20)) -> np.ndarray:
    noise = np.random.default_rng(0).normal(scale=20, size=(*shape, 3))
    return np.clip(noise + mean, 0, 255).astype(np.uint8)


def test_swapped_colours_are_noticed_by_the_training_images_means(droid):
    assert droid.warnings(broken(exterior=coloured(REDDISH))) == []
    (warning,) = droid.warnings(broken(exterior=coloured(REDDISH[::-1])))
    assert warning.startswith(f"{EXTERIOR}: ")
    assert "image[..., ::-1]" in warning


@hypothesis.given(brightness=st.floats(-40, 40), shift=st.tuples(*[st.floats(-10, 10)] * 3))
def test_another_light_is_no_colour_swap(brightness, shift):
    mean = tuple(c + brightness + s for c, s in zip(REDDISH, shift, strict=True))
    assert not looks_bgr(mean, REDDISH)
    assert looks_bgr(mean[::-1], REDDISH)


def test_grey_scenes_cannot_tell_the_colour_order():
    assert not looks_bgr((120.0, 100.0, 118.0), (118.0, 100.0, 120.0))


def test_camera_means_are_taken_over_samples_in_either_layout():
    first, second = coloured((10, 100, 200)), coloured((30, 110, 220))
    means = channel_means([{"a": {"b": first}, "state": np.zeros(3)}, {"a": {"b": np.moveaxis(second, -1, 0)}}])
    assert list(means) == ["a/b"]
    np.testing.assert_allclose(means["a/b"], (np.array(channel_mean(first)) + channel_mean(second)) / 2)


def test_a_state_far_outside_the_training_range_is_named_not_refused(droid):
    state = np.zeros(8)
    assert droid.range_warnings(state) == []
    state[[1, 7]] = 1.5, 7.0
    (warning,) = droid.range_warnings(state)
    assert warning.startswith("state 'gripper': 7 is far outside the training range -1..1")


def test_statistics_of_another_robot_are_refused_with_names(droid):
    droid.check_norm_stats(stats(8, 8))
    with pytest.raises(ValueError, match=r"'actions' have 14 dimensions; .* with 8: joint_1"):
        droid.check_norm_stats(stats(8, 14))


def test_equal_contracts_do_not_differ_and_others_do_line_by_line(droid):
    assert droid.diff(droid) == []
    other = dataclasses.replace(droid, action_horizon=10, cameras=droid.cameras[1:])
    differences = droid.diff(other)
    assert "action_horizon: 15 -> 10" in differences
    assert any(line.startswith(f"camera {EXTERIOR}: ") and line.endswith("-> absent") for line in differences)
    assert len(differences) == 2


def test_the_description_names_every_key_with_width_and_unit(droid):
    text = droid.describe()
    for part in (EXTERIOR, WRIST, JOINTS, "float[7]", "rad", "float[15, 8] at 15 Hz", "prompt", "quantile", "'droid'"):
        assert part in text
    assert "default 'tidy up'" in with_prompt_default(droid).describe()


def test_an_image_without_colours_and_a_prompt_that_is_no_text_are_named(droid):
    with pytest.raises(ValueError, match=rf"'{WRIST}'"):
        droid.check({**make_droid_example(), WRIST: np.zeros((120, 160), np.uint8)})
    for prompt in (3, ["a", "b"]):
        with pytest.raises(ValueError, match=f"'prompt' is of type {type(prompt).__name__}; expected text"):
            droid.check({**make_droid_example(), "prompt": prompt})
    long = "fold " * 3300
    for prompt in (long, long.encode(), np.array(long), np.array([long.encode()])):
        with pytest.raises(ValueError, match="'prompt' has 16500 characters; expected 16384 at most"):
            droid.check({**make_droid_example(), "prompt": prompt})


def test_lists_that_are_no_arrays_are_named_and_those_that_nobody_reads_are_ignored(droid):
    ragged = [[1.0], [2.0, 3.0]]
    droid.check({**make_droid_example(), "boxes": ragged})
    for key in (JOINTS, WRIST):
        with pytest.raises(ValueError, match=f"'{key}' has lists of different lengths; expected an array"):
            droid.check({**make_droid_example(), key: ragged})


def test_a_strip_of_millions_of_pixels_is_no_picture(droid):
    with pytest.raises(ValueError, match=rf"'{WRIST}' has shape \(1, 20000, 3\); expected sides of 16384 pixels"):
        droid.check({**make_droid_example(), WRIST: np.zeros((1, 20_000, 3), np.uint8)})


def test_padded_statistics_of_a_released_base_keep_the_names_of_the_robot():
    contract = build("pi05_libero", norm_stats=stats(32, 32))
    assert contract.actions.width == 7
    assert contract.stats_widths == {"state": 32, "actions": 32}


def test_a_robot_without_a_spec_is_described_from_a_sample():
    sample = {
        "camera": np.zeros((8, 9, 3), np.uint8),
        "joints": np.zeros(5, np.float32),
        "gripper": np.zeros(1, np.float32),
        "depth": np.zeros((8, 9, 1), np.float32),  # were refused as cameras that are no RGB
        "tactile": np.zeros((4, 4, 3), np.float32),
        "actions": {"arm": np.zeros((10, 5), np.float32), "gripper": np.zeros(10, np.float32)},
        "prompt": "x",
    }
    contract = build("debug", norm_stats=stats(6, 6), sample=sample)
    assert [camera.key for camera in contract.cameras] == ["camera"]
    assert contract.state_names == (*(f"joints_{i}" for i in range(5)), "gripper_0")
    contract.check(sample | {"gripper": np.array([True])})
    assert channel_means([sample]).keys() == {"camera"}
    with pytest.raises(ValueError, match="spec"):
        build("debug")


def test_a_robot_without_a_spec_takes_the_names_of_the_dataset_where_they_are_as_many():
    sample = {"joints": np.zeros(3, np.float32), "actions": np.zeros((10, 3), np.float32)}
    contract = build("debug", norm_stats=stats(3, 3), sample=sample, state_names="abc", action_names=["too", "few"])
    assert contract.state_names == ("a", "b", "c")
    assert contract.actions.names == ("actions_0", "actions_1", "actions_2")


def test_names_and_units_must_be_as_many():
    with pytest.raises(ValueError, match="2 names and 1 units"):
        VectorSpec("state", ("a", "b"), ("rad",))


def test_a_spec_from_a_sample_skips_text_and_actions():
    spec = RobotSpec.from_sample({"a": np.zeros(2), "actions": np.zeros((3, 2)), "task": "x"}, action_dim=2)
    assert spec.state_names == ("a_0", "a_1")
    assert spec.actions.width == 2
