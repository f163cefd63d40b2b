"""Codecs: every recorded vector, and what holds for any codec made of these parts."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import packed_arrays
import paths
from openpi.policies.guards import ObservationError
from openpi_positronic.codecs import catalog
from openpi_positronic.codecs.action import BinariseGrip, CartesianPose, JointDelta
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.observation import Camera, ObservationCodec, Vector
from openpi_positronic.codecs.timing import Timing
from openpi_positronic.raw_episodes import RawDataset

NUMBERS = 1e-6
TIMES_S = 1e-9
MAX_GREY_LEVELS = 3  # of training images, which pass through a video decoder

# The recording has the joined form beside the one to implement; both are made of the same parts.
JOINED_OBSERVATION = ObservationCodec(
    (Vector("observation/joint_position", {"robot_state.q": 7, "grip": 1}, "observation/joint_position"),),
    (
        Camera("observation/wrist_image_left", "image.wrist", "observation/wrist_image_left"),
        Camera("observation/exterior_image_1_left", "image.exterior", "observation/exterior_image_1_left"),
    ),
)
JOINED_DROID = Timing() | (JOINED_OBSERVATION & JointDelta())
CODECS = {f"current/{name}": get_codec(name) for name in catalog.CURRENT if name != "droid"}
CODECS |= {"current/droid_split_keys": get_codec("droid"), "current/droid": JOINED_DROID}
CODECS |= {f"legacy/{name}": get_codec(f"older/{name}") for name in catalog.OLDER}
TRAINED = {name: codec for name, codec in CODECS.items() if "droid" not in name}
TRAINED["current/droid"] = JOINED_OBSERVATION


@pytest.fixture(scope="module")
def recorded(golden):
    def load(name):
        return (
            packed_arrays.load(golden / "codecs" / "packed", name),
            json.loads((golden / "codecs" / f"{name}.json").read_text()),
        )

    return load


def raw_observation(vectors) -> dict:
    raw = {key.removeprefix("encode_in/"): value for key, value in vectors.items() if key.startswith("encode_in/")}
    return raw | {"task": str(raw["task"])}


def test_every_recording_is_tested(golden):
    index = json.loads((golden / "codecs" / "packed" / "index.json").read_text())
    assert set(index) == set(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_observations_are_encoded_as_recorded(recorded, name):
    vectors, described = recorded(name)
    raw, codec = raw_observation(vectors), CODECS[name]
    encoded = codec.encode(raw)
    assert set(encoded) == set(described["encode_out"])
    for key, expected in described["encode_out"].items():
        if isinstance(expected, str):
            assert encoded[key] == expected
            continue
        assert (encoded[key].dtype, encoded[key].shape) == (expected["dtype"], tuple(expected["shape"]))
        np.testing.assert_array_equal(encoded[key], vectors[f"encode_out/{key}"])
    without_task = codec.encode({key: value for key, value in raw.items() if key != "task"})
    assert sorted(without_task) == described.get("encode_keys_without_task", sorted(without_task))
    for key, expected in described.get("encode_missing_input", {}).items():
        rest = {other: value for other, value in raw.items() if other != key}
        if expected == "ok":
            codec.encode(rest)
            continue
        with pytest.raises(KeyError, match=key):
            codec.encode(rest)


@pytest.mark.parametrize("name", CODECS)
def test_actions_are_decoded_as_recorded(recorded, name):
    vectors, described = recorded(name)
    assert_decoded(CODECS[name].decode(vectors["decode_in/actions"]), vectors, "decode_out", described)
    rows = [{"action": row} for row in vectors["decode_in/actions"]]
    assert_decoded(CODECS[name].decode(rows), vectors, "decode_out", described)
    one = CODECS[name].decode(rows[0])
    assert one.keys() == CODECS[name].decode(rows)[0].keys()
    assert one.get("timestamp", 0.0) == 0.0


@pytest.mark.parametrize("name", [name for name in catalog.CURRENT if name != "droid"])
def test_without_a_horizon_every_step_is_kept(recorded, name):
    vectors, described = recorded(f"current/{name}")
    steps = get_codec(name, horizon_s=None).decode(vectors["decode_in/actions"])
    assert len(steps) == described["decode"]["n_out_without_horizon"]
    assert_decoded(steps, vectors, "decode_nohorizon", described)


def assert_decoded(steps, vectors, prefix, described):
    expected = {key.removeprefix(f"{prefix}/"): value for key, value in vectors.items() if key.startswith(f"{prefix}/")}
    payload = next(key for key in expected if key not in ("target_grip", "timestamp"))
    assert {len(steps)} == {len(value) for value in expected.values()}
    assert {step["robot_command"]["type"] for step in steps} == {
        {"pose": "cartesian_pos", "positions": "joint_pos", "velocities": "joint_delta"}[payload]
    }
    found = np.stack([step["robot_command"][payload] for step in steps])
    assert found.dtype == expected[payload].dtype
    np.testing.assert_allclose(found, expected[payload], atol=NUMBERS)
    np.testing.assert_allclose([step["target_grip"] for step in steps], expected["target_grip"], atol=NUMBERS)
    assert all(type(step["target_grip"]) is float for step in steps)
    if "timestamp" in expected:
        np.testing.assert_allclose([step["timestamp"] for step in steps], expected["timestamp"], atol=TIMES_S)
    if "decode" in described:
        assert sorted(steps[0]) == sorted(described["decode"]["keys"])


@pytest.mark.parametrize("name", CODECS)
def test_what_is_told_to_clients_and_to_the_converter_is_as_recorded(recorded, name):
    _, described = recorded(name)
    assert CODECS[name].served_meta == described["served_meta"]
    if "training_meta" in described:
        assert CODECS[name].training_meta == described["training_meta"]


@pytest.mark.parametrize("name", TRAINED)
def test_training_columns_are_as_recorded(golden, recorded, name):
    vectors, described = recorded(name)
    dataset = RawDataset(golden / "positronic_raw" / "dataset")
    codec = TRAINED[name]
    columns = codec.training_columns()
    for number, episode in enumerate(dataset):
        expected = described["training"][str(number)]
        task = codec.training_task(episode.static)
        assert task == expected["task"]
        assert sorted(columns) == sorted(set(expected["keys"]) - {"task"})
        stamps = vectors[f"train/{number}/ts"]
        assert len(stamps) == expected["n_frames"]
        signals = {signal for column in columns.values() for signal in column.signals}
        rows = {signal: episode.signal(signal).rows_at(stamps) for signal in signals}
        for key, column in columns.items():
            values = column.derive({name: episode.signal(name).values(rows[name]) for name in column.signals})
            frames = vectors.get(f"train/{number}/{key}/frames_0_1_last")
            if f"train/{number}/{key}" in vectors:
                recording = vectors[f"train/{number}/{key}"]
                assert (values.dtype, values.shape) == (recording.dtype, recording.shape)
                np.testing.assert_allclose(values, recording, atol=NUMBERS)
            elif frames is not None:
                assert np.abs(values[[0, 1, -1]].astype(int) - frames).max() <= MAX_GREY_LEVELS


@pytest.mark.parametrize("name", ["droid", "older/droid"])
def test_a_codec_for_inference_only_refuses_to_make_training_data(name):
    with pytest.raises(ValueError, match="inference only"):
        get_codec(name).training_columns()


@pytest.mark.parametrize("name", CODECS)
def test_the_warm_up_observation_looks_like_a_real_one(recorded, name):
    real = CODECS[name].encode(raw_observation(recorded(name)[0]))
    dummy = CODECS[name].dummy_encoded()
    assert {key: getattr(value, "shape", None) for key, value in dummy.items()} == {
        key: getattr(value, "shape", None) for key, value in real.items()
    }
    assert [value for value in dummy.values() if isinstance(value, str)] == ["warmup"]


@pytest.mark.parametrize("name", ["eepose_absolute", "eepose_q", "joints", "ee", "openpi_positronic"])
def test_any_codec_can_speak_the_keys_of_the_recipe(recorded, name):
    codec = catalog.for_slash_keys(get_codec(name))
    vectors, _ = recorded("current/ee")
    keys = {"observation/state", "observation/image", "observation/wrist_image", "prompt"}
    assert set(codec.encode(raw_observation(vectors))) == keys
    assert set(codec.dummy_encoded()) == keys
    assert len(codec.decode(vectors["decode_in/actions"])) == len(get_codec(name).decode(vectors["decode_in/actions"]))


# --- training and serving are one ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "current/droid"])
def test_a_policy_is_served_exactly_what_it_was_trained_on(golden, name):
    """At any moment of a recording, the encoded observation is the row of the dataset."""
    options = {"observed_binary": True} if "traj" in name else {}
    codec = get_codec(name.replace("current/", "").replace("legacy/", "older/"), **options)
    for episode in RawDataset(golden / "positronic_raw" / "dataset"):
        times = np.linspace(episode.start_ts, episode.last_ts, 5).astype(np.int64)
        columns = {key: column for key, column in codec.training_columns().items() if key != "action"}
        for time in times.tolist():
            encoded = codec.encode(episode.time[time])
            for key, column in columns.items():
                signals = {signal: episode.signal(signal) for signal in column.signals}
                rows = {signal: entry.values(entry.rows_at([time])) for signal, entry in signals.items()}
                served_key = key if key in encoded else catalog.SLASH_KEYS[key]
                np.testing.assert_array_equal(encoded[served_key], column.derive(rows)[0])


@pytest.mark.parametrize("name", ["ee", "ee_joints", "joints_traj", "eepose_absolute"])
def test_a_trained_action_decodes_to_the_command_that_was_recorded(golden, name):
    """What a policy that has learnt its data by heart would do."""
    codec = get_codec(name, horizon_s=None) if name in catalog.CURRENT else get_codec(name)
    episode = RawDataset(golden / "positronic_raw" / "dataset")[0]
    column = codec.training_columns()["action"]
    times = np.arange(episode.start_ts, episode.last_ts, 200_000_000)
    values = {signal: episode.signal(signal).time[times].values for signal in column.signals}
    arm, grip = (values[signal] for signal in column.signals)
    for row, step in enumerate(codec.decode(column.derive(values))):
        command = step["robot_command"]
        if command["type"] == "joint_pos":
            np.testing.assert_allclose(command["positions"], arm[row], atol=1e-6)
            assert step["target_grip"] == float(grip[row] > 0.5)
            continue
        np.testing.assert_allclose(command["pose"][:3], arm[row][:3], atol=1e-6)
        w, x, y, z = arm[row][3:] / np.linalg.norm(arm[row][3:])
        np.testing.assert_allclose(np.trace(command["pose"][3:].reshape(3, 3)), 4 * w * w - 1, atol=1e-5)
        np.testing.assert_allclose(command["pose"][3:].reshape(3, 3) @ [x, y, z], [x, y, z], atol=1e-5)  # its axis
        assert step["target_grip"] == pytest.approx(float(grip[row]), abs=1e-6)


# --- properties ---------------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3, width=32)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(8)), elements=finite))
def test_decoded_rotations_are_rotations_and_turn_as_their_quaternion_does(chunk):
    chunk[:, 3] += np.where(chunk[:, 3] < 0, -1, 1)
    for row, step in zip(chunk.astype(float), CartesianPose().decode(chunk), strict=True):
        pose = step["robot_command"]["pose"]
        rotation = pose[3:].reshape(3, 3)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0
        w, *axis = row[3:7] / np.linalg.norm(row[3:7])
        vector = np.array([0.3, -0.2, 0.9])
        turned = vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)
        np.testing.assert_allclose(rotation @ vector, turned, atol=1e-9)
        np.testing.assert_array_equal(pose[:3], row[:3])
        assert step["target_grip"] == row[7]


@given(fps=st.floats(1, 1000), horizon_s=st.one_of(st.none(), st.floats(0.001, 10)), steps=st.integers(0, 60))
def test_a_horizon_keeps_what_is_due_before_it(fps, horizon_s, steps):
    kept = Timing(fps, horizon_s).decode([{"i": i} for i in range(steps)])
    assert [step["i"] for step in kept] == [i for i in range(steps) if horizon_s is None or i / fps < horizon_s]
    assert [step["timestamp"] for step in kept] == [step["i"] / fps for step in kept]


@given(st.lists(st.floats(-2, 2), min_size=1))
def test_a_grip_is_as_binary_in_training_as_in_commands_and_binarising_twice_changes_nothing(grips):
    binary = BinariseGrip()
    steps = binary.decode([{"target_grip": grip} for grip in grips])
    column = binary.training({"grip": _given(grips), "target_grip": _given(grips)})["target_grip"]
    assert column.derive({}).tolist() == [step["target_grip"] for step in steps]
    assert binary.decode(steps) == steps


def _given(values):
    from openpi_positronic.codecs.codec import Column

    return Column((), lambda _: np.asarray(values))


def test_composition_runs_in_the_documented_order(recorded):
    """`|` encodes left to right and decodes right to left; in `&` the right side wins, in training the left."""
    vectors, _ = recorded("current/ee")
    first, second = Vector("k", {"grip": 1}, "c"), Vector("k", {"robot_state.q": 7}, "c")
    both = ObservationCodec((first,), ()) & ObservationCodec((second,), ())
    raw = {"grip": 0.5, "robot_state.q": np.arange(7)}
    assert both.encode(raw)["k"].shape == (7,)
    assert both.training_columns()["c"].signals == ("grip",)
    assert both.training_meta["lerobot_features"]["c"]["shape"] == [7]
    early, late = Timing(10, None), Timing(20, None)
    assert (early | late).served_meta["action_fps"] == 20
    decoded = (early | late | CartesianPose()).decode(vectors["decode_in/actions"])
    assert decoded[1]["timestamp"] == pytest.approx(0.1)  # the left one decodes last


def test_the_observed_grip_is_binary_only_on_request(recorded):
    raw = raw_observation(recorded("current/ee")[0]) | {"grip": 0.7}
    assert get_codec("ee_traj").encode(raw)["observation/state"][7] == np.float32(0.7)
    assert get_codec("ee_traj", observed_binary=True).encode(raw)["observation/state"][7] == 1
    broken = {**raw, "grip": np.array([np.nan]), "task": b"open the drawer"}
    encoded = get_codec("ee_traj", observed_binary=True).encode(broken)
    assert np.isnan(encoded["observation/state"][7])  # a broken gripper is not an open one
    assert encoded["prompt"] == b"open the drawer"  # not "b'open the drawer'"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ee", "joints_traj", "droid"])
def test_actions_that_no_robot_may_get_are_refused(name):
    good = np.tile(np.float32([0.1, 0.2, 0.3, 1, 0, 0, 0, 0.5]), (10, 1))
    codec = get_codec(name)
    codec.decode(good)
    with pytest.raises(ValueError, match="expected 7 values for the arm"):
        codec.decode(good[:, :7])
    bad = good.copy()
    bad[3, 5] = np.nan
    with pytest.raises(ValueError, match="step 3 of the actions has nan at 5"):
        codec.decode(bad)
    with pytest.raises(ValueError, match="expected 'action'"):
        codec.decode([{"actions": good[0]}])


def test_a_quaternion_of_no_length_is_refused():
    with pytest.raises(ValueError, match=r"step 0 .* no rotation"):
        get_codec("ee").decode(np.zeros((1, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"robot_state.ee_pose": np.zeros(6)}, "'robot_state.ee_pose' has 6 values; expected 7"),
        ({"image.wrist": np.zeros((10, 10, 3))}, "'image.wrist' is float64 .* expected uint8 RGB"),
        ({"image.wrist": np.zeros((3, 10, 10), np.uint8)}, "'image.wrist' is uint8 .* expected uint8 RGB"),
        ({"image.wrist": np.zeros((9, 1, 1, 3), np.uint8)}, r"'image.wrist' is uint8 of shape \(9, 1, 1, 3\)"),
        ({"image.wrist": np.zeros((0, 9, 3), np.uint8)}, r"'image.wrist' is uint8 of shape \(0, 9, 3\)"),
        ({"image.wrist": np.zeros((1, 20_000, 3), np.uint8)}, r"'image.wrist' is uint8 of shape \(1, 20000, 3\)"),
        ({"image.wrist": [[1], [2, 3]]}, "'image.wrist' has lists of different lengths"),
        ({"robot_state.ee_pose": ["x"] * 7}, "'robot_state.ee_pose' has dtype <U1; expected numbers"),
        ({"grip": None}, "'grip' has dtype object; expected numbers"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_by_name(recorded, change, message):
    raw = raw_observation(recorded("current/ee")[0]) | change
    with pytest.raises(ObservationError, match=message):
        get_codec("ee").encode(raw)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ee_trajectory", {}, "Did you mean 'ee_traj'"),
        ("ee", {"horizon": 1}, "codec 'ee': .*horizon"),
        ("ee", {"fps": 0}, "fps is 0"),
        ("ee", {"horizon_s": -1}, "horizon_s is -1"),
        ("ee", {"horizon_s": 10**400}, "horizon_s is 1000"),  # which no message can tell
    ],
)
def test_a_codec_that_is_not_there_or_not_possible_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_codec(name, **options)


def test_a_codec_of_ones_own_is_found_by_its_file(tmp_path):
    file = tmp_path / "lab_codec.py"
    file.write_text(
        "from openpi_positronic.codecs.catalog import ee\nfrom openpi_positronic.codecs.timing import Timing\n"
        "def codec(fps=5.0): return ee(fps=fps)\nother = ee()\nnumber = 3\n"
    )
    assert get_codec(f"{file}").served_meta["action_fps"] == 5
    assert get_codec(f"{file}:codec", fps=7).served_meta["action_fps"] == 7
    assert get_codec(f"{file}:other").served_meta["action_fps"] == 15
    with pytest.raises(ValueError, match="expected a Codec"):
        get_codec(f"{file}:number")
    with pytest.raises(ValueError, match="has no 'ee_far'"):
        get_codec(f"{file}:ee_far")


def test_the_codec_of_the_guide_works(tmp_path):
    page = paths.ROOT / "docs" / "how-to" / "codecs.md"
    (code,) = [block for block in page.read_text().split("```python\n") if block.startswith("# my_codec.py")]
    (tmp_path / "my_codec.py").write_text(code.split("```")[0])
    codec = get_codec(str(tmp_path / "my_codec.py"))
    raw = {"robot_state.q": np.zeros(7), "grip": 1, "image.front": np.zeros((48, 64, 3), np.uint8)}
    assert codec.encode(raw)["observation/state"].tolist() == [0] * 7 + [1]
    assert len(codec.decode(np.zeros((50, 8)))) == 15
    assert set(codec.training_columns()) == set(codec.training_meta["lerobot_features"])


@pytest.mark.parametrize("name", CODECS)
def test_codecs_pickle(name):
    assert pickle.loads(pickle.dumps(CODECS[name])) == CODECS[name]


def test_codecs_load_neither_a_framework_nor_a_file_format():
    code = "import openpi_positronic.codecs.catalog, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in ("jax", "torch", "pyarrow", "av", "optax", "mujoco") if name in loaded] == []


# Newer codecs; the numbers are what Positronic 0.4.1 made of the same values.

POSE = np.array([0.4, 0.1, 0.3, 0.0, 1.0, 0.0, 0.0])
ROW = np.array([0.4, 0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.7])


def seen(pose=POSE):
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    return {
        "robot_state.ee_pose": pose,
        "robot_state.q": np.arange(7) / 10,
        "grip": 0.25,
        "image.wrist": image,
        "image.exterior": image,
    }


@pytest.mark.parametrize(
    ("quaternion", "hand"),
    [
        ([0, 1, 0, 0], [2.221442, -2.221442, 0]),
        ([1, 9, -3, 2], [-1.307723, 2.615446, -0.653862]),
        ([-2, 3, 9, 1], [-2.410766, -1.205383, 0.200897]),
        ([1, 0, 0, 0], [0, 0, 1.570796]),
    ],
)
def test_libero_sees_the_hand_the_fingers_and_a_mirror(quaternion, hand):
    raw = seen(np.array([0.4, 0.1, 0.3, *quaternion]))
    encoded = get_codec("libero").encode(raw)
    np.testing.assert_allclose(encoded["observation/state"], [0.4, 0.1, 0.3, *hand, 0.029887, -0.029887], atol=NUMBERS)
    plain = get_codec("ee").encode(raw)
    for name in ("observation/image", "observation/wrist_image"):
        np.testing.assert_array_equal(encoded[name], plain[name][:, ::-1])


def test_libero_moves_by_steps_of_the_pose():
    rows = np.array([[0.5, -2, 1, 0.2, -0.4, 0.9, 0.6], [0, 0, 0.1, 0, 0, 2, -1]] * 5)
    first, second, *rest = get_codec("libero").decode(rows)
    assert len(rest) == 3 and rest[0]["timestamp"] == pytest.approx(0.1)  # a quarter of a second, 20 per second
    command = first["robot_command"]
    assert command["type"] == "cartesian_delta"
    np.testing.assert_allclose(command["delta"][:3], [0.025, -0.05, 0.05])
    turn = command["delta"][3:].reshape(3, 3)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=NUMBERS)
    np.testing.assert_allclose(turn @ [0.1, -0.2, 0.45], [0.1, -0.2, 0.45], atol=NUMBERS)
    assert np.trace(turn) == pytest.approx(1 + 2 * np.cos(np.linalg.norm([0.1, -0.2, 0.45])))
    np.testing.assert_allclose(second["robot_command"]["delta"][3:5], [np.cos(0.5), -np.sin(0.5)], atol=NUMBERS)
    assert (first["target_grip"], second["target_grip"]) == (pytest.approx(0.8), 0.0)
    with pytest.raises(ValueError, match="expected 6 values for the arm"):
        get_codec("libero").decode(ROW[None])
    with pytest.raises(ValueError, match="no rotation"):
        get_codec("libero").encode(seen(np.zeros(7)))


def test_a_gripper_that_is_turned_round_is_so_in_all_that_a_policy_sees_and_gives():
    codec = get_codec("ee_flip_grip")
    assert codec.encode(seen())["observation/state"][7] == 0.75
    assert codec.decode(ROW[None])[0]["target_grip"] == pytest.approx(0.3)
    assert codec.decode(ROW)["target_grip"] == pytest.approx(0.3)
    columns, plain = codec.training_columns(), get_codec("ee").training_columns()
    values = {"robot_state.ee_pose": POSE[None], "robot_commands.pose": POSE[None]}
    values |= {"grip": np.array([0.25]), "target_grip": np.array([1.0])}
    for name, column in (("observation.state", 0.5), ("action", -1.0)):
        difference = columns[name].derive(values) - plain[name].derive(values)
        np.testing.assert_allclose(difference, [[0] * 7 + [column]])


def test_how_the_arm_carries_commands_out_is_part_of_them():
    [step] = get_codec("phail_v1").decode(ROW[None])
    assert step["robot_command"]["mode"] == {"type": "position_control"}
    steps = get_codec("droid_jointpos").decode(np.tile(ROW, (30, 1)))
    assert len(steps) == 30 and steps[0]["target_grip"] == 1.0  # the whole chunk
    command = steps[0]["robot_command"]
    assert command["type"] == "joint_pos" and command["mode"]["kq"] == [40.0, 30.0, 50.0, 25.0, 35.0, 25.0, 10.0]
    np.testing.assert_array_equal(command["positions"], ROW[:7])


@pytest.mark.parametrize("name", ["joints_ik", "joints_ik_sim"])
def test_joint_angles_of_commanded_poses_are_served_only(name):
    codec = get_codec(name)
    np.testing.assert_allclose(codec.encode(seen())["observation/state"], [*np.arange(7) / 10, 0.25])
    assert codec.decode(ROW[None])[0]["target_grip"] == 0.7
    with pytest.raises(ValueError, match="inference only"):
        codec.training_columns()


def test_parameters_of_a_session_reach_the_parts_that_have_them():
    codec = get_codec("ee_traj").with_parameters({"fps": 10, "horizon_sec": 0.5, "binarise_observation": True})
    assert codec == get_codec("ee_traj", fps=10, horizon_s=0.5, observed_binary=True)
    assert codec.parameters == {"fps": 10, "horizon_sec": 0.5, "binarise_observation": True}
    for wrong in ({"fps": "fast"}, {"fps": float("inf")}, {"horizon_sec": True}, {"binarise_observation": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("sec", "s")):
            codec.with_parameters(wrong)
