"""DROID in RLDS form: what TFDS wrote is read as TFDS reads it; which frames come out, and in what order."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import paths
import rlds_datasets
from openpi.data.batch_loader import SourceLoader
from openpi.data.batch_order import merged_state
from openpi.data.images import decode_image
from openpi.training.data_config import DataConfig
from openpi.training.droid_rlds_dataset import DroidActionSpace, RLDSDataset
from openpi_rlds import episode as episode_module
from openpi_rlds import idle, stream
from openpi_rlds.droid import DroidStream
from openpi_rlds.episode import feature_names, make_episode
from openpi_rlds.example import MalformedError, parse_example, read_features
from openpi_rlds.folder import open_folder
from openpi_rlds.frame_ranges import FrameRanges
from openpi_rlds.in_order import FramesInOrder, episodes
from openpi_rlds.stream import Mixture, MixturePart, MixtureSource
from openpi_rlds.tfrecord import TFRecordFile

HORIZON = 4
LENGTHS = {"droid": (30, 12, 21, 16, 9, 25), "simulated": (11, 8)}
FAILURES = {"droid": {3}, "simulated": set()}


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[rlds_datasets.RecordedEpisode]]:
    return {
        name: [rlds_datasets.episode(name, i, n, is_success=i not in FAILURES[name]) for i, n in enumerate(lengths)]
        for name, lengths in LENGTHS.items()
    }


@pytest.fixture(scope="module")
def data_dir(recorded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rlds")
    rlds_datasets.write(folder, "droid", "1.0.1", recorded["droid"], num_shards=3)
    rlds_datasets.write(folder, "simulated", "1.0.0", recorded["simulated"], num_shards=1)
    return folder


@pytest.fixture(scope="module")
def ranges(recorded) -> FrameRanges:
    """Episode 1 is not named; of the others two stretches, the second beyond the end."""
    return FrameRanges({e.key: [[2, 6], [8, 40]] for i, e in enumerate(recorded["droid"]) if i != 1}, "the test's")


@pytest.fixture(scope="module")
def mixture(data_dir, ranges) -> Mixture:
    droid, simulated = open_folder(data_dir, "droid", "1.0.1"), open_folder(data_dir, "simulated", "1.0.0")
    parts = [MixturePart(droid, 0.75, ranges), MixturePart(simulated, 0.25, FrameRanges())]
    return Mixture(parts, "joint_position", HORIZON)


def only(mixture: Mixture, part: int = 0) -> Mixture:
    return dataclasses.replace(mixture, parts=[dataclasses.replace(mixture.parts[part], weight=1.0)])


def batches(source: MixtureSource, count: int, state=None) -> list[tuple[list, dict]]:
    """Frames and the state after them, as it comes back from a file."""
    running = source.batches(state or source.start())
    taken = [(list(frames), json.loads(json.dumps(state))) for frames, state in itertools.islice(running, count)]
    running.close()
    return taken


def ids(frames) -> list[tuple]:
    return [(frame.step_id, frame.prompt, frame.image) for frame in frames]


def expected_frames(recorded, name: str, ranges: FrameRanges) -> set[str]:
    return {
        f"{e.key}--{t}"
        for i, e in enumerate(recorded[name])
        if i not in FAILURES[name]
        for t in ranges.kept(e.key, len(e))
    }


# --- files --------------------------------------------------------------------------------------------------------


def test_what_tfds_wrote_is_read_as_tfds_reads_it(golden):
    folder = open_folder(golden / "rlds", "droid", "1.0.1")
    by_tfds = np.load(golden / "rlds" / "read_by_tfds.npz")
    number = 0
    for shard, length in zip(folder.shards, folder.shard_lengths, strict=True):
        with TFRecordFile(shard) as file:
            for _ in range(length):
                features = parse_example(file.load(file.next()), feature_names("joint_velocity"))
                found = make_episode(features, "joint_velocity", "here")
                expected = {
                    key.partition("/")[2]: by_tfds[key] for key in by_tfds.files if key.startswith(f"{number}/")
                }
                assert found.key == f"{expected['recording_folderpath']}--{expected['file_path']}"
                assert found.is_success == ("success" in str(expected["file_path"]))
                actions = [expected["action_dict/joint_velocity"], expected["action_dict/gripper_position"]]
                np.testing.assert_array_equal(found.actions, np.concatenate(actions, axis=1))
                np.testing.assert_array_equal(found.joints, expected["observation/joint_position"])
                np.testing.assert_array_equal(found.gripper, expected["observation/gripper_position"])
                for name, texts in zip(episode_module.INSTRUCTIONS, found.instructions, strict=True):
                    assert [text.decode() for text in texts] == expected[name.removeprefix("steps/")].tolist()
                for camera in (*episode_module.EXTERIOR_CAMERAS, episode_module.WRIST_CAMERA):
                    images = episode_module.images_of(features, camera, len(found), "here")
                    decoded = [decode_image(bytes(content), "here") for content in images]
                    np.testing.assert_array_equal(decoded, expected[camera.removeprefix("steps/")])
                number += 1
            assert file.next() is None
    assert number == folder.num_episodes == 5


values = st.one_of(
    st.lists(st.binary(max_size=300), min_size=1, max_size=20),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300).map(lambda v: np.array(v, np.float32)),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20).map(np.array),
)


@hypothesis.given(st.dictionaries(st.text(max_size=80), values, max_size=8))
def test_any_example_of_protobuf_is_parsed_whole_or_from_a_file(tmp_path_factory, features):
    data = rlds_datasets.encode(features)
    file = tmp_path_factory.mktemp("any") / "records"
    file.write_bytes(rlds_datasets.framed(b"before") + rlds_datasets.framed(data))
    with TFRecordFile(file) as opened:
        opened.next()
        found = [parse_example(data, features), read_features(opened, opened.next(), features)]
    for parsed in found:
        assert parsed.keys() == features.keys()
        for name, value in features.items():
            if isinstance(value, np.ndarray):
                assert parsed[name].dtype == value.dtype
                np.testing.assert_array_equal(parsed[name], value)
            else:
                assert [bytes(each) for each in parsed[name]] == value


@hypothesis.given(st.data())
def test_a_damaged_example_is_an_error_or_another_example_but_nothing_else(data):
    whole = rlds_datasets.encode({"steps/a": [b"xyz", b""], "steps/b": np.ones(3, np.float32), "c": np.arange(4)})
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    for broken in (bytes(damaged), whole[:at]):
        try:
            parse_example(broken, {"steps/a", "steps/b", "c"})
        except MalformedError:
            continue


def test_floats_that_are_not_packed_are_read_too():
    number = b"\x0d" + np.float32(2.5).tobytes()
    entry = b"\x0a\x01f" + b"\x12\x0c" + (b"\x12\x0a" + number * 2)
    data = b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry
    np.testing.assert_array_equal(parse_example(data, {"f"})["f"], np.float32([2.5, 2.5]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-3], r"record 1: \d+ bytes are announced, and the file ends before"),
        (lambda b: b[:-20] + bytes([b[-20] ^ 1]) + b[-19:], "record 1: the checksum of its data does not match"),
        (lambda b: bytes([b[0] ^ 1]) + b[1:], "record 0: the checksum of its length does not match"),
        (lambda b: b + b"abc", "record 2: the file ends within the record's header"),
    ],
)
def test_a_damaged_file_is_named_with_its_record(tmp_path, damage, message):
    path = tmp_path / "records"
    path.write_bytes(damage(rlds_datasets.framed(b"first") + rlds_datasets.framed(b"second, which is longer")))
    with TFRecordFile(path) as file, pytest.raises(ValueError, match=f"{path}, {message}"):
        while (span := file.next()) is not None:
            file.load(span)


def test_a_record_that_is_no_episode_of_droid_is_named(tmp_path, mixture, recorded):
    broken = dict(recorded["droid"][0].features)
    del broken["steps/action_dict/joint_position"]
    record = rlds_datasets.RecordedEpisode(broken, {})
    folder = rlds_datasets.write(tmp_path, "droid", "1.0.1", [record], num_shards=1)
    source = MixtureSource(
        Mixture([MixturePart(open_folder(tmp_path, "droid", "1.0.1"), 1.0, FrameRanges())], "joint_position", HORIZON),
        batch_size=1,
        seed=0,
    )
    with pytest.raises(KeyError, match=r"00000-of-00001, record 0 needs the key 'steps/action_dict/joint_position'"):
        batches(source, 1)
    (folder / "droid-train.tfrecord-00000-of-00001").write_bytes(rlds_datasets.framed(b"\xff\xff no example"))
    with pytest.raises(ValueError, match=r"record 0: not a readable tf.train.Example"):
        batches(source, 1)


def test_a_folder_that_is_not_the_right_one_says_which_is(data_dir, tmp_path):
    for given in (data_dir / "droid", data_dir / "droid" / "1.0.1"):
        with pytest.raises(FileNotFoundError, match=f"the dataset's own folder; expected the one above, {data_dir}$"):
            open_folder(given, "droid", "1.0.1")
    with pytest.raises(FileNotFoundError, match=r"versions there: '1\.0\.1'"):
        open_folder(data_dir, "droid", "1.0.0")
    with pytest.raises(FileNotFoundError, match=r"holds 'droid', 'simulated'"):
        open_folder(data_dir, "bridge", "1.0.0")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_folder(tmp_path / "nowhere", "droid", "1.0.1")
    with pytest.raises(ValueError, match="is not on this machine"):
        open_folder("gs://gresearch/robotics", "droid", "1.0.1")


def test_files_that_are_missing_or_of_another_format_are_said(data_dir, tmp_path):
    shutil.copytree(data_dir / "droid", tmp_path / "droid")
    folder = tmp_path / "droid" / "1.0.1"
    (folder / "droid-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 files are missing: droid-train.tfrecord-00001-of-00003"):
        open_folder(tmp_path, "droid", "1.0.1")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    with pytest.raises(ValueError, match="the files are in the format 'array_record'"):
        open_folder(tmp_path, "droid", "1.0.1")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{DATASET.__class__}-{SHARD_INDEX}", r"field '\{DATASET\.__class__\}'"),
        ("{SHARD_INDEX:>0999999999}", r"field '\{SHARD_INDEX:>0999999999\}'; expected \{SHARD_INDEX\}"),
        ("../{SHARD_X_OF_Y}", "out of the dataset"),
        ("/etc/{SHARD_X_OF_Y}", "out of the dataset"),
        ("{HOME}/{SHARD_INDEX}", r"field '\{HOME\}'"),
        ("{DATASET}-{SPLIT}", "gives one name to several files"),
    ],
)
def test_names_of_files_are_no_way_out_of_the_folder(data_dir, tmp_path, template, message):
    folder = shutil.copytree(data_dir / "droid", tmp_path / "droid") / "1.0.1"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = template
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"dataset_info\.json cannot be used: filepathTemplate .*{message}"):
        open_folder(tmp_path, "droid", "1.0.1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
            "it is a Git LFS pointer.*git lfs pull",
        ),
        (b"", "the file ends after 0 records, dataset_info.json says 2; it is empty"),
        (None, "the file ends after 1 records, dataset_info.json says 2"),
    ],
)
def test_a_file_that_lacks_records_is_not_passed_over(data_dir, tmp_path, content, message):
    folder = shutil.copytree(data_dir / "droid", tmp_path / "droid") / "1.0.1"
    file = folder / "droid-train.tfrecord-00000-of-00003"
    with TFRecordFile(file) as whole:
        first = whole.next()
        assert first is not None
    file.write_bytes(file.read_bytes()[: first.offset + first.length + 4] if content is None else content)
    part = MixturePart(open_folder(tmp_path, "droid", "1.0.1"), 1.0, FrameRanges())
    mixture = Mixture([part], "joint_position", HORIZON)
    with pytest.raises(ValueError, match=message):
        batches(MixtureSource(mixture, batch_size=1, seed=0), 100)
    with pytest.raises(ValueError, match=message):
        FramesInOrder(mixture)[80]


def test_a_file_with_more_records_than_it_should_have_is_not_cut_short(data_dir, tmp_path):
    folder = shutil.copytree(data_dir / "droid", tmp_path / "droid") / "1.0.1"
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][0] = "1"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    mixture = Mixture([MixturePart(open_folder(tmp_path, "droid", "1.0.1"), 1.0, FrameRanges())], "joint_position", 2)
    with pytest.raises(ValueError, match=r"record 1: dataset_info\.json says that the file has 1 records, not more"):
        batches(MixtureSource(mixture, batch_size=1, seed=0), 100)


def test_an_episode_without_steps_costs_nobody_the_others(tmp_path):
    """What TFDS writes of one: its features, empty."""
    whole = rlds_datasets.episode("droid", 0, 5)
    nothing = {name: [] if name.startswith("steps/") else value for name, value in whole.features.items()}
    rlds_datasets.write(tmp_path, "droid", "1.0.1", [rlds_datasets.RecordedEpisode(nothing, {}), whole], num_shards=1)
    mixture = Mixture([MixturePart(open_folder(tmp_path, "droid", "1.0.1"), 1.0, FrameRanges())], "joint_position", 2)
    taken = batches(MixtureSource(mixture, batch_size=5, seed=0, shuffle=False), 2)
    for frames, _ in taken:
        assert [frame.step_id for frame in frames] == [f"{whole.key}--{t}" for t in range(5)]
    assert FramesInOrder(mixture)[4]["step_id"].decode() == f"{whole.key}--4"
    datasets = (RLDSDataset("droid", "1.0.1", 1.0, None),)
    space = DroidActionSpace.JOINT_POSITION
    config = DataConfig(rlds_data_dir=str(tmp_path), datasets=datasets, action_space=space)
    ((_, blocks),) = DroidStream(config, 2).blocks(None)
    assert sum(len(block.episodes) for block in blocks) == 5


def test_a_record_of_two_episodes_is_refused(recorded):
    """The chunks of the first would end in the second."""
    features = dict(recorded["droid"][1].features)
    features["steps/is_first"] = np.isin(np.arange(12), (0, 7)).astype(np.int64)
    parsed = parse_example(rlds_datasets.encode(features), feature_names("joint_position"))
    with pytest.raises(ValueError, match="record 4: 'steps/is_first' is true at step 7, too"):
        make_episode(parsed, "joint_position", "record 4")


def test_a_path_that_is_no_text_is_named_with_its_record(recorded):
    features = {**recorded["droid"][1].features, "episode_metadata/file_path": [b"/success/\xff"]}
    parsed = parse_example(rlds_datasets.encode(features), feature_names("joint_position"))
    with pytest.raises(ValueError, match=r"record 4: 'episode_metadata/file_path' is .*expected UTF-8"):
        make_episode(parsed, "joint_position", "record 4")


def test_numbers_that_are_none_are_refused_unless_their_frames_are_left_out(recorded):
    joints = np.array(recorded["droid"][0].features["steps/observation/joint_position"])
    joints[7, 2] = np.nan
    broken = recorded["droid"][0].features | {"steps/observation/joint_position": joints}
    features = parse_example(rlds_datasets.encode(broken), feature_names("joint_position"))
    spoilt = make_episode(features, "joint_position", "record 0")
    with pytest.raises(ValueError, match=r"joint_position' is not finite in 1 frames, the first 7 \(dimension 2\)"):
        episode_module.kept_frames(spoilt, FrameRanges())
    assert len(episode_module.kept_frames(spoilt, FrameRanges({spoilt.key: [[0, 7], [8, 12]]}))) == 11


# --- frames -------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_successes_within_the_ranges_with_what_was_recorded_at_them(mixture, recorded, ranges):
    by_key = {e.key: e for e in recorded["droid"]}
    source = MixtureSource(only(mixture), batch_size=8, seed=3, buffer_size=64)
    seen = Counter()
    for frame in itertools.chain.from_iterable(frames for frames, _ in batches(source, 40)):
        key, _, t = frame.step_id.rpartition("--")
        seen[frame.step_id] += 1
        of, t, sample = by_key[key], int(t), frame.decode()
        steps = np.minimum(t + np.arange(HORIZON), len(of) - 1)
        column = {name: of.features[f"steps/{name}"] for name in
                  ("action_dict/joint_position", "action_dict/gripper_position")}  # fmt: skip
        np.testing.assert_array_equal(sample["actions"], np.concatenate([c[steps] for c in column.values()], axis=1))
        np.testing.assert_array_equal(sample["actions_is_pad"], t + np.arange(HORIZON) >= len(of))
        observed = sample["observation"]
        for name in ("joint_position", "gripper_position"):
            np.testing.assert_array_equal(observed[name], of.features[f"steps/observation/{name}"][t])
        np.testing.assert_array_equal(observed["wrist_image"], of.images["wrist_image_left"][t])
        exterior = [of.images[f"exterior_image_{i}_left"][t] for i in (1, 2)]
        assert any(np.array_equal(observed["image"], image) for image in exterior)
        assert sample["step_id"] == frame.step_id.encode()
    assert set(seen) == expected_frames(recorded, "droid", ranges)
    assert max(seen.values()) - min(seen.values()) <= 6  # each about as often as the others


def test_one_camera_and_one_phrasing_are_drawn_for_each_visit_to_an_episode(mixture):
    source = MixtureSource(only(mixture, 1), batch_size=1, seed=0, shuffle=False)
    frames = [frames[0] for frames, _ in batches(source, 19 * 30)]
    visits: list[set] = []
    for frame in frames:
        if frame.step_id.endswith("--0"):
            visits.append(set())
        camera = int(frame.decode()["observation"]["image"][90, 160, 0] > 90)
        visits[-1].add((camera, frame.prompt.split(b" of ")[0]))
    assert all(len(drawn) == 1 for drawn in visits)
    assert len(set.union(*visits)) == 6  # all combinations, in 60 visits


def test_velocities_take_the_place_of_positions(mixture, recorded):
    source = MixtureSource(
        dataclasses.replace(only(mixture, 1), arm_action="joint_velocity"), batch_size=1, seed=0, shuffle=False
    )
    first = batches(source, 1)[0][0][0]
    velocity = recorded["simulated"][0].features["steps/action_dict/joint_velocity"]
    np.testing.assert_array_equal(first.actions[:, :7], velocity[:HORIZON])


def test_datasets_are_mixed_by_their_weights(mixture):
    source = MixtureSource(mixture, batch_size=32, seed=0, buffer_size=100)
    frames = itertools.chain.from_iterable(frames for frames, _ in batches(source, 60))
    shares = Counter(frame.step_id.split("/")[2] for frame in frames)
    assert shares["simulated"] / shares.total() == pytest.approx(0.25, abs=0.03)


def test_weights_that_do_not_add_up_to_one_are_refused(mixture):
    for weights in ((0.75, 0.2), (1.5, -0.5), ()):
        parts = [dataclasses.replace(p, weight=w) for p, w in zip(mixture.parts, weights, strict=False)]
        with pytest.raises(ValueError, match="expected positive ones that add up to 1"):
            dataclasses.replace(mixture, parts=parts)


def test_ranges_of_another_dataset_are_noticed(mixture, monkeypatch):
    monkeypatch.setattr(stream, "MAX_BARREN", 20)
    part = dataclasses.replace(mixture.parts[0], weight=1.0, ranges=FrameRanges({"another": [[0, 9]]}, "ranges.json"))
    source = MixtureSource(dataclasses.replace(mixture, parts=[part]), batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"20 episodes in a row, .* or not named in ranges.json"):
        batches(source, 1)
    with pytest.raises(ValueError, match=r"no frame of .*droid/1.0.1 can be used"):
        FramesInOrder(dataclasses.replace(mixture, parts=[part])).spread(2)


def test_a_file_of_ranges_is_checked(tmp_path):
    path = tmp_path / "ranges.json"
    for text in ("[", "[]", '{"a": [[3]]}', '{"a": [[5, 3]]}', '{"a": [1, 2]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            FrameRanges.load(path)
    path.write_text('{"a": [[1, 3], [2, 4], [9, 12]], "b": []}')
    table = FrameRanges.load(path)
    assert table.kept("a", 11).tolist() == [1, 2, 3, 9, 10]
    assert table.kept("b", 5).tolist() == table.kept("c", 5).tolist() == []


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_size", [1, 40, 1000])
def test_a_stream_continues_exactly_where_its_state_was_taken(mixture, buffer_size):
    source = MixtureSource(mixture, batch_size=4, seed=7, buffer_size=buffer_size)
    whole = batches(source, 160)
    for at in (0, 1, 30, 110):
        again = MixtureSource(mixture, batch_size=4, seed=7, buffer_size=buffer_size)
        continued = batches(again, 40, whole[at][1])
        for (frames, state), (expected, expected_state) in zip(continued, whole[at + 1 :], strict=False):
            assert ids(frames) == ids(expected)
            assert state == expected_state


def test_a_run_that_goes_on_with_another_batch_size_does_not_see_the_same_order_again(mixture):
    first, second = (MixtureSource(mixture, batch_size=size, seed=0, buffer_size=20) for size in (4, 8))
    begun = batches(first, 6)
    anew = second.start_after(begun[-1][1])
    order = [ids(frames) for frames, _ in batches(second, 6, anew)]
    assert order != [ids(frames) for frames, _ in batches(second, 6)]
    later = [frames for frames, _ in batches(second, 3, batches(second, 3, anew)[-1][1])]
    assert [ids(frames) for frames in later] == order[3:]
    assert second.start_after(anew)["order"] == 2


def test_continuing_reads_only_what_may_still_wait(mixture):
    """A state far into a run points to where its oldest frames came in, not to the beginning."""
    state = batches(MixtureSource(only(mixture), batch_size=4, seed=0, buffer_size=40), 150)[-1][1]
    for _, _, first_frame, time, _ in state["streams"].values():
        assert time - first_frame < 2 * 10 + 30 + 10  # twice what waits in a lane, an episode, and luck


def test_the_order_follows_from_the_seed_and_is_random(mixture):
    first, again, other = (
        [ids(frames) for frames, _ in batches(MixtureSource(mixture, batch_size=8, seed=seed, buffer_size=60), 20)]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    in_order = [
        frames[0].step_id
        for frames, _ in batches(MixtureSource(only(mixture), batch_size=1, seed=0, buffer_size=60), 30)
    ]
    assert len({step.rpartition("--")[0] for step in in_order}) > 3  # from the first batch on


def test_a_frame_waits_for_as_long_as_it_would_in_a_buffer_of_that_size(tmp_path):
    """The mean delay in steady state is N, and nothing waits for more than 2 N."""
    long = [rlds_datasets.episode("droid", i, 50) for i in range(2)]
    rlds_datasets.write(tmp_path, "droid", "1.0.1", long, num_shards=1)
    part = MixturePart(open_folder(tmp_path, "droid", "1.0.1"), 1.0, FrameRanges())
    waiting = 300
    source = MixtureSource(Mixture([part], "joint_position", HORIZON), batch_size=1, seed=0, buffer_size=waiting)
    streams = [state["streams"]["0/0"] for _, state in batches(source, 3000)]
    numbers, times = (np.array([stream[i] for stream in streams]) for i in (4, 3))
    # From the first one on, a frame leaves for each that comes.
    np.testing.assert_allclose(times, waiting + np.arange(len(times)), atol=60)
    assert sorted(numbers)[:1500] == list(range(1500))  # every frame once
    late = np.arange(len(numbers)) + waiting - numbers  # one came in for each that left
    settled = late[4 * waiting :]
    assert settled.mean() == pytest.approx(waiting, rel=0.1)
    assert settled.min() > -60  # luck, and an episode
    assert settled.max() < 2 * waiting + 60


@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_processes_of_a_run_share_the_batches_that_one_would_have(mixture, num_processes):
    options = {"batch_size": 8, "seed": 5, "buffer_size": 50}
    whole = batches(MixtureSource(mixture, **options), 50)
    parts = [batches(MixtureSource(mixture, part=(i, num_processes), **options), 30) for i in range(num_processes)]
    for number in range(30):
        together = itertools.chain.from_iterable(part[number][0] for part in parts)
        assert ids(together) == ids(whole[number][0])
    merged = merged_state([part[29][1] for part in parts])
    assert merged == whole[29][1]
    continued = batches(MixtureSource(mixture, part=(1, num_processes), **options), 20, merged)
    rows = slice(8 // num_processes, 2 * 8 // num_processes)
    assert [ids(frames) for frames, _ in continued] == [ids(frames[rows]) for frames, _ in whole[30:]]


def test_any_number_of_processes_has_lanes_of_its_own(mixture):
    sources = [MixtureSource(mixture, batch_size=20, seed=0, buffer_size=30, part=(i, 5)) for i in range(5)]
    assert {source.identity["lanes"] for source in sources} == {20}
    assert all(len(frames) == 4 for source in sources for frames, _ in batches(source, 2))
    of_any = [MixtureSource(mixture, batch_size=12, seed=0, part=(0, count)).identity for count in (1, 2, 3, 4, 6, 12)]
    assert all(identity == of_any[0] for identity in of_any)
    with pytest.raises(ValueError, match="batch_size 12 is not divisible by 5 processes"):
        MixtureSource(mixture, batch_size=12, seed=0, part=(0, 5))


def test_a_loader_of_another_stream_cannot_be_continued(mixture):
    def loader(**options):
        source = MixtureSource(mixture, **{"batch_size": 4, "seed": 0, "buffer_size": 30, **options})
        return SourceLoader(source, lambda frame: frame.decode())

    state = loader().state()
    for change in ({"batch_size": 8}, {"seed": 1}, {"buffer_size": 31}, {"shuffle": False}):
        name = next(iter(change))
        with pytest.raises(ValueError, match=f"the data order cannot be resumed: .*{name} was"):
            loader(**change).restore(state)
    part = mixture.parts[0]
    for changed, name in (
        ({"parts": [dataclasses.replace(part, ranges=FrameRanges({})), *mixture.parts[1:]]}, "datasets"),
        ({"arm_action": "joint_velocity"}, "arm_action"),
    ):
        other = MixtureSource(dataclasses.replace(mixture, **changed), batch_size=4, seed=0, buffer_size=30)
        assert [*SourceLoader(other, lambda frame: frame.decode()).changes_since(state)] == [name]


def test_a_run_that_stops_early_leaves_no_file_open(mixture, data_dir):
    before = _open_files(data_dir)
    source = MixtureSource(mixture, batch_size=4, seed=0, buffer_size=30)
    running = source.batches(source.start())
    next(running)
    assert _open_files(data_dir) > before
    running.close()
    assert _open_files(data_dir) == before


def _open_files(folder: Path) -> int:
    links = (link.resolve() for link in Path("/proc/self/fd").iterdir())
    return sum(folder in link.parents for link in links)


# --- in order, and idling ---------------------------------------------------------------------------------------------


def test_frames_in_order_are_the_kept_ones_and_their_images_are_theirs(mixture, recorded, ranges):
    frames = FramesInOrder(mixture)
    kept = [
        (e, int(t)) for i, e in enumerate(recorded["droid"]) if i not in FAILURES["droid"]
        for t in ranges.kept(e.key, len(e))
    ]  # fmt: skip
    for index in (0, 5, len(kept) - 1):
        recording, t = kept[index]
        sample = frames[index]
        assert sample["step_id"].decode() == f"{recording.key}--{t}"
        np.testing.assert_array_equal(sample["observation"]["wrist_image"], recording.images["wrist_image_left"][t])
    assert frames[len(kept)]["step_id"].decode().startswith("/data/simulated")
    with pytest.raises(IndexError, match=f"a mixture with {len(kept) + 19} frames"):
        frames[len(kept) + 19]


def test_columns_are_read_without_the_images(data_dir):
    shard = open_folder(data_dir, "droid", "1.0.1").shards[0]
    sizes = []

    class Counting(TFRecordFile):
        def read_at(self, offset, size):
            sizes.append(size)
            return super().read_at(offset, size)

    for file, span, _ in episodes(shard, "joint_position"):
        with Counting(file.path) as counting:
            read_features(counting, span, episode_module.column_names("joint_position"))
    assert sum(sizes) < shard.stat().st_size / 5  # small images; of DROID's, a hundredth


def test_idle_stretches_are_found_as_recorded(golden):
    velocities = np.load(golden / "data" / "droid_idle_velocities.npz")
    expected = json.loads((golden / "data" / "droid_idle_ranges.json").read_text())
    assert {name: idle.moving_ranges(velocities[name]) for name in expected} == expected


def test_ranges_are_written_for_all_that_can_be_read_and_added_to(data_dir, tmp_path, recorded, caplog):
    shutil.copytree(data_dir / "droid", tmp_path / "droid")
    script = paths.ROOT / "scripts" / "compute_droid_nonidle_ranges.py"
    output = tmp_path / "ranges.json"

    def run() -> str:
        command = [sys.executable, str(script), "--data-dir", str(tmp_path), "--output", str(output)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    file = tmp_path / "droid" / "1.0.1" / "droid-train.tfrecord-00001-of-00003"
    whole = file.read_bytes()
    with TFRecordFile(file) as records:
        first = records.next()
    file.write_bytes(whole[: first.offset + first.length + 4])  # a copy that was cut behind the first of two episodes
    assert "5 episodes computed, 0 known, 1 failed" in run()
    file.write_bytes(whole[:-100])
    assert "0 episodes computed, 5 known, 1 failed" in run()
    file.write_bytes(whole)
    assert "1 episodes computed, 5 known, 0 failed" in run()
    expected = {e.key: idle.moving_ranges(e.features["steps/action_dict/joint_velocity"]) for e in recorded["droid"]}
    assert json.loads(output.read_text()) == expected
    assert FrameRanges.load(output).kept(recorded["droid"][0].key, 30).tolist() == list(range(20))
