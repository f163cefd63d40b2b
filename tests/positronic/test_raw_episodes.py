"""Positronic's raw recordings: read as recorded, written and read back, whole or marked as unfinished."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import packed_arrays
from openpi_positronic.raw_episodes import Episode, RawDataset, RawDatasetWriter

MAX_GREY_LEVELS = 3  # between H.264 decoders and colour conversions


@pytest.fixture(scope="module")
def dataset(golden) -> RawDataset:
    return RawDataset(golden / "positronic_raw" / "dataset")


@pytest.fixture(scope="module")
def recorded(golden) -> dict[str, np.ndarray]:
    return packed_arrays.load(golden / "positronic_raw" / "packed", "reader")


@pytest.fixture(scope="module")
def described(golden) -> list[dict]:
    return json.loads((golden / "positronic_raw" / "reader.json").read_text())


def assert_same(found, expected):
    found = np.asarray(found)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = MAX_GREY_LEVELS if expected.dtype == np.uint8 else 0
    assert np.abs(found.astype(float) - expected.astype(float)).max(initial=0) <= tolerance


def test_episodes_are_described_as_recorded(dataset, described):
    assert len(dataset) == len(described)
    for episode, expected in zip(dataset, described, strict=True):
        assert set(episode) == set(expected["keys"])
        assert episode.static == expected["static"]
        assert (episode.start_ts, episode.last_ts) == (expected["start_ts"], expected["last_ts"])
        assert episode.duration_ns == episode.meta["duration_ns"] == expected["duration_ns"]
        for name, entry in expected["signals"].items():
            signal = episode.signal(name)
            found = (len(signal), signal.kind, str(signal.dtype), list(signal.shape), signal.start_ts, signal.last_ts)
            assert found == tuple(entry[key] for key in ("n", "kind", "dtype", "shape", "start_ts", "last_ts"))


def test_every_sample_is_as_recorded(dataset, recorded):
    for number, episode in enumerate(dataset):
        for name, signal in episode.signals.items():
            np.testing.assert_array_equal(signal.timestamps, recorded[f"{number}/{name}/ts"])
            kind = "frames" if signal.kind == "image" else "values"
            assert_same(signal.values(range(len(signal))), recorded[f"{number}/{name}/{kind}"])
            assert set(signal.timelines) == {"message", "system"}
            assert all(len(stamps) == len(signal) for stamps in signal.timelines.values())


@pytest.mark.parametrize("convert", [list, np.asarray, lambda times: [float(t) for t in times]])
def test_values_at_times_are_the_newest_so_far(dataset, recorded, convert):
    number, episode = 0, dataset[0]  # whose times are small enough for floats
    found = episode.time[convert(recorded[f"{number}/query_ts"])]
    for name in episode.signals:
        assert_same(found[name].values, recorded[f"{number}/query/{name}"])
    assert found["task"] == episode.static["task"]


def test_values_at_times_are_the_newest_so_far_in_every_episode(dataset, recorded):
    for number, episode in enumerate(dataset):
        times = recorded[f"{number}/query_ts"]
        for name, signal in episode.signals.items():
            assert_same(signal.time[times].values, recorded[f"{number}/query/{name}"])
            assert_same(signal.time[int(times[3])], recorded[f"{number}/query/{name}"][3])


def test_windows_carry_the_value_before_them_and_steps_are_stamped_as_asked(dataset, recorded):
    for number, episode in enumerate(dataset):
        begin, end = recorded[f"{number}/window/target_grip/bounds"].tolist()
        signal = episode.signal("target_grip")
        window, stepped = signal.time[begin:end], signal.time[begin:end:50_000_000]
        for found, kind in ((window, "window"), (stepped, "stepped")):
            np.testing.assert_array_equal(found.timestamps, recorded[f"{number}/{kind}/target_grip/ts"])
            assert_same(found.values, recorded[f"{number}/{kind}/target_grip/values"])


def test_what_has_no_answer_is_refused(dataset):
    episode, signal = dataset[0], dataset[0].signal("grip")
    with pytest.raises(KeyError, match="starts at"):
        signal.time[signal.start_ts - 1]
    with pytest.raises(KeyError, match="starts at"):
        signal.time[signal.start_ts - 1 :: 1000]
    with pytest.raises(KeyError, match="needs a step"):
        episode.time[0:10]
    with pytest.raises(KeyError, match="needs a start"):
        signal.time[:10:5]
    with pytest.raises(KeyError, match=r"robot_state\.q"):
        episode.signal("robot_state.p")
    for times in ("now", None, [[1]], ["1"], True):
        with pytest.raises(TypeError):
            signal.time[times]
    assert len(signal.time[[]]) == 0


def test_a_step_without_an_end_reaches_the_last_sample(dataset):
    episode = dataset[0]
    step = episode.duration_ns
    np.testing.assert_array_equal(
        episode.time[episode.start_ts :: step]["grip"].timestamps, [episode.start_ts, episode.last_ts]
    )


def test_an_image_is_decoded_once_however_often_it_is_asked_for(dataset, monkeypatch):
    from openpi.data.lerobot.video import VideoFile

    signal = dataset[1].signal("image.exterior")
    decoded = []
    original = VideoFile.frame
    monkeypatch.setattr(VideoFile, "frame", lambda self, number: decoded.append(number) or original(self, number))
    frames = signal.values([5, 3, 5, 3, 3])
    assert len(decoded) == 2
    np.testing.assert_array_equal(frames[0], frames[2])


def test_a_folder_of_datasets_is_read_as_one(golden, tmp_path):
    source = golden / "positronic_raw" / "dataset"
    (tmp_path / "all" / "b" / "deep").mkdir(parents=True)
    (tmp_path / "all" / "z").symlink_to(source)
    (tmp_path / "all" / "b" / "deep" / "c").symlink_to(source / "000000000000" / "..")
    (tmp_path / "all" / "b" / "round").symlink_to(tmp_path / "all")
    assert len(RawDataset(tmp_path / "all")) == 3  # one place, however many links lead to it
    assert len(RawDataset(tmp_path / "all")[0:2]) == 2


def test_an_episode_pickles_as_its_path(dataset):
    copy = pickle.loads(pickle.dumps(dataset[2]))
    assert copy.path == dataset[2].path
    assert set(copy) == set(dataset[2])


# --- writing ------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(["float32", "float64", "int64", "int8", "bool"])


@settings(max_examples=25)
@given(
    signals=st.dictionaries(
        st.sampled_from(["a", "a.b", "robot_state.q"]), st.tuples(NUMBERS, st.integers(0, 4)), min_size=1
    ),
    steps=st.lists(st.integers(1, 10**9), min_size=1, max_size=8),
    start=st.sampled_from([0, 1_732_000_000_000_000_000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_numbers_are_read_back_as_written(tmp_path_factory, signals, steps, start, seed):
    rng = np.random.default_rng(seed)
    stamps = start + np.cumsum(steps)
    values = {
        name: rng.integers(0, 2, (len(stamps), width) if width else len(stamps)).astype(dtype)
        for name, (dtype, width) in signals.items()
    }
    root = tmp_path_factory.mktemp("raw")
    with RawDatasetWriter(root).new_episode() as writer:
        for i, stamp in enumerate(stamps.tolist()):
            for name, rows in values.items():
                writer.append(name, rows[i], stamp, {"system": stamp + 1})
        writer.set_static("task", "stack")
    (episode,) = RawDataset(root)
    assert episode.static == {"task": "stack"}
    for name, rows in values.items():
        signal = episode.signal(name)
        np.testing.assert_array_equal(signal.timestamps, stamps)
        np.testing.assert_array_equal(signal.timelines["system"], stamps + 1)
        np.testing.assert_array_equal(signal.values(range(len(stamps))), rows)
        assert signal.dtype == rows.dtype


def gradient(i: int) -> np.ndarray:
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 4, columns * 3, np.full_like(rows, 5 * i)], axis=-1).astype(np.uint8)


def test_images_are_read_back_in_order(tmp_path):
    with RawDatasetWriter(tmp_path).new_episode() as writer:
        for i in range(40):
            writer.append("image.wrist", gradient(i), 10 * i)
    signal = RawDataset(tmp_path)[0].signal("image.wrist")
    assert signal.shape == (48, 64, 3)
    np.testing.assert_array_equal(signal.timestamps, 10 * np.arange(40))
    for rows in (range(40), [39, 0, 31, 30]):
        blue = signal.values(rows)[:, 8:40, 8:56, 2].mean(axis=(1, 2))
        assert np.abs(blue - 5 * np.asarray(rows)).max() < 4


def test_a_recording_is_marked_until_it_is_finished_and_gone_when_aborted(tmp_path):
    writers = RawDatasetWriter(tmp_path)
    first = writers.new_episode()
    first.append("grip", 0.5, 1)
    with pytest.raises(FileNotFoundError, match="1 that are not finished"):
        RawDataset(tmp_path)
    with pytest.raises(ValueError, match="not finished"):
        Episode(first.path)
    second = writers.new_episode()
    assert int(second.path.name) == int(first.path.name) + 1
    second.append("image.wrist", gradient(0), 5)
    with pytest.raises(RuntimeError), second:
        raise RuntimeError("the robot fell over")
    assert not second.path.exists()
    first.finish()
    assert RawDataset(tmp_path).paths == [first.path]
    assert RawDataset(tmp_path)[0].meta["schema_version"] == 1


def test_a_recording_that_cannot_be_completed_is_kept_and_marked(tmp_path):
    writer = RawDatasetWriter(tmp_path).new_episode()
    writer.append("grip", 0.5, 1)
    (writer.path / "static.json").mkdir()  # in the way, as a full disk is
    with pytest.raises(OSError):
        writer.finish()
    assert (writer.path / "grip.parquet").stat().st_size > 0
    assert (writer.path / ".unfinished").exists()


def test_the_thousandth_episode_starts_a_block(tmp_path):
    (tmp_path / "000000000000" / "000000000999").mkdir(parents=True)
    with RawDatasetWriter(tmp_path).new_episode() as writer:
        writer.append("grip", 0.0, 1)
    assert writer.path == tmp_path / "000000001000" / "000000001000"


@pytest.mark.parametrize(
    ("name", "value", "ts", "timelines", "message"),
    [
        ("grip", 0.5, 10, {"world": 1}, "must be later"),
        ("grip", 0.5, 11, {}, "timelines"),
        ("grip", np.float32(1), 11, {"world": 1}, "float32"),
        ("grip", [1.0], 11, {"world": 1}, r"\(1,\)"),
        ("task", 1.0, 11, {}, "constant"),
        ("a/b", 1.0, 11, {}, "cannot name a signal"),
        ("x.frames", 1.0, 11, {}, "cannot name a signal"),
        ("matrix", np.eye(3), 11, {}, "expected a number"),
        ("image", np.zeros((5, 4, 3), np.uint8), 11, {}, "even"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_and_the_episode_unharmed(tmp_path, name, value, ts, timelines, message):
    with RawDatasetWriter(tmp_path).new_episode() as writer:
        writer.set_static("task", "stack")
        writer.append("grip", 0.25, 10, {"world": 0})
        with pytest.raises(ValueError, match=message):
            writer.append(name, value, ts, timelines)
        for constant in ("grip", "nothing"):
            with pytest.raises(ValueError, match="constant"):
                writer.set_static(constant, None)
    (episode,) = RawDataset(tmp_path)
    assert episode.time[10]["grip"] == 0.25
    assert set(episode) == {"grip", "task"}


def test_a_damaged_table_is_named(tmp_path):
    with RawDatasetWriter(tmp_path).new_episode() as writer:
        writer.append("grip", 0.5, 1)
    for table, message in (
        ({"timestamp": [2, 1], "value": [0.0, 0.0]}, "does not increase at row 1"),
        ({"timestamp": [1, 2], "value": [[0.0], [0.0, 1.0]]}, "one width"),
        ({"timestamp": [1]}, "expected 'value'"),
        ({"ts": [1], "value": [1]}, "expected at least one 'timestamp'"),
        ({"timestamp": [1, None], "value": [1.0, 2.0]}, "expected whole nanoseconds, none of them null"),
        ({"timestamp": [0.1, 0.2], "value": [1.0, 2.0]}, "'timestamp' holds double; expected whole nanoseconds"),
        ({"timestamp": ["1", "2"], "value": [1.0, 2.0]}, "'timestamp' holds string; expected whole nanoseconds"),
        ({"timestamp": [1, 2], "value": [1.0, None]}, "'value' has nulls"),
        ({"timestamp": [1, 2], "value": [[1.0, None], [1.0, 2.0]]}, "'value' has nulls"),
        ({"timestamp": [1, 2], "value": [[1.0], None]}, "'value' has nulls"),
        ({"timestamp": [1, 2], "value": ["open", "shut"]}, "'value' holds string; expected numbers"),
    ):
        pq.write_table(pa.table(table), writer.path / "grip.parquet")
        with pytest.raises(ValueError, match=message) as caught:
            RawDataset(tmp_path)[0].signal("grip").values([0])
        assert "grip.parquet" in str(caught.value)


def test_files_of_a_recording_that_are_no_such_files_are_named(golden, tmp_path):
    root = shutil.copytree(golden / "positronic_raw" / "dataset", tmp_path / "set")
    path = RawDataset(root).paths[0]
    video = next(iter(sorted(path.glob("*.mp4"))))
    name = video.stem
    index = path / f"{name}.frames.parquet"
    table = pq.read_table(index)
    pq.write_table(table.slice(0, len(table) - 1), index)
    with pytest.raises(ValueError, match=rf"{name}\.mp4 holds {len(table)} frames, .* has {len(table) - 1} rows"):
        RawDataset(root)[0].signal(name).values([0])
    for file in (video, index, path / "static.json"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n")
    for read in (lambda e: e.signal(name).shape, lambda e: e.signal(name).timestamps, lambda e: e.static):
        with pytest.raises(ValueError, match=r"it is a Git LFS pointer.*git lfs pull"):
            read(RawDataset(root)[0])
    (path / "static.json").write_bytes(b'\xef\xbb\xbf{"task": "stack"}')
    assert RawDataset(root)[0].static == {"task": "stack"}
