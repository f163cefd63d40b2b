"""The LeRobot reader against recordings of the libraries, and on damaged or unusual datasets."""

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpi.data.lerobot import reader, video_layout
from openpi.data.lerobot.files import read_row_groups
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.video import VideoFile
from openpi.data.lerobot.video_writer import encode_video

SETS = [
    "lerobot_v20/image",
    "lerobot_v20/video",
    "lerobot_v21/image",
    "lerobot_v21/video",
    "lerobot_v21/chunked",
    "lerobot_v30/image",
    "lerobot_v30/video",
    "lerobot_v30/chunked",
    "lerobot_v30/converted_image",
    "lerobot_v30/converted_video",
]
VIDEO_SETS = [name for name in SETS if "image" not in name]

# The decoder behind the recordings is the one used here or a close relative; yuv -> rgb may round
# differently.
VIDEO_MAX_DIFFERENCE = 2


def recorded_deltas(golden: Path, name: str, kind: str) -> dict[str, list[float]]:
    return json.loads((golden / f"{name}.json").read_text())[kind]


def assert_samples_equal(dataset: LeRobotDataset, recording) -> None:
    for row, index in enumerate(recording["indices"]):
        sample = dataset[int(index)]
        for name in recording.files:
            if name in ("indices", "len"):
                continue
            expected = recording[name][row]
            if name.startswith("str:"):
                assert sample[name[4:]] == str(expected)
            elif name.startswith("image_u8:"):
                assert_image_equal(sample[name[9:]], np.moveaxis(expected, -3, -1), dataset, name[9:])
            else:
                assert sample[name].dtype == expected.dtype, name
                np.testing.assert_array_equal(sample[name], expected, err_msg=f"{name} at {index}")


def assert_image_equal(found: np.ndarray, expected: np.ndarray, dataset: LeRobotDataset, key: str) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    tolerance = VIDEO_MAX_DIFFERENCE if dataset.metadata.features[key]["dtype"] == "video" else 0
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def frame_label(image: np.ndarray) -> tuple[int, int]:
    """(frame in episode, 2 * episode + camera), as painted into the top rows of every recorded frame."""
    bits = image[[4, 12], 4:64:8].mean(axis=-1) > 128
    frame, source = (bits @ (1 << np.arange(7, -1, -1))).tolist()
    return frame, source


@pytest.mark.parametrize("name", SETS)
def test_samples_equal_those_of_the_library(golden, name):
    dataset = LeRobotDataset(golden / name, delta_timestamps=recorded_deltas(golden, name, "delta_timestamps"))
    with np.load(golden / f"{name}.npz") as recording:
        assert len(dataset) == recording["len"]
        assert_samples_equal(dataset, recording)


@pytest.mark.parametrize("name", SETS)
def test_state_and_camera_history_equal_those_of_the_library(golden, name):
    deltas = recorded_deltas(golden, name, "history_delta_timestamps")
    with np.load(golden / f"{name}_history.npz") as recording:
        assert_samples_equal(LeRobotDataset(golden / name, delta_timestamps=deltas), recording)


@pytest.mark.parametrize("name", SETS)
def test_every_frame_is_the_frame_that_its_label_names_in_any_order(golden, name):
    dataset = LeRobotDataset(golden / name)
    order = np.random.default_rng(0).permutation(len(dataset))
    for index in [*order[:40], *range(20, 26)]:
        sample = dataset[int(index)]
        for camera, key in enumerate(dataset.metadata.camera_keys):
            expected = (int(sample["frame_index"]), 2 * int(sample["episode_index"]) + camera)
            assert frame_label(sample[key]) == expected


@pytest.mark.parametrize("name", SETS)
def test_a_subset_of_episodes_has_its_own_bounds_and_pads_at_them(golden, name):
    key = "actions" if "image" in name else "action"
    deltas = {key: [0.0, 0.1, 0.2]}
    full = LeRobotDataset(golden / name, delta_timestamps=deltas)
    part = LeRobotDataset(golden / name, episodes=[2, 0], delta_timestamps=deltas)
    np.testing.assert_array_equal(part.episode_bounds, [[0, 23], [23, 53]])
    assert len(part) == 53
    for index, original in [(0, 0), (21, 21), (22, 22), (23, 60), (52, 89), (-1, 89)]:
        found, expected = part[index], full[original]
        assert found.keys() == expected.keys()
        for name_ in expected:
            np.testing.assert_array_equal(found[name_], expected[name_])
    np.testing.assert_array_equal(part[22][f"{key}_is_pad"], [False, True, True])


@pytest.mark.parametrize("name", ["lerobot_v20/image", "lerobot_v21/chunked", "lerobot_v30/converted_image"])
def test_a_column_is_what_the_samples_hold(golden, name):
    dataset = LeRobotDataset(golden / name, episodes=[0, 2])
    for key in ("timestamp", "task_index", "actions" if "image" in name else "action"):
        column = dataset.column(key)
        np.testing.assert_array_equal(column, np.stack([dataset[i][key] for i in range(len(dataset))]))


def test_only_the_columns_asked_for_are_in_the_sample_and_other_videos_are_never_opened(golden, tmp_path):
    root = shutil.copytree(golden / "lerobot_v30/video", tmp_path / "set")
    shutil.rmtree(root / "videos/observation.images.cam_wrist")
    sample = LeRobotDataset(root, columns=["observation.state", "observation.images.cam_high"])[5]
    index_columns = {"timestamp", "frame_index", "episode_index", "index", "task_index", "task"}
    assert sample.keys() == {"observation.state", "observation.images.cam_high", *index_columns}


def test_tasks_may_change_within_an_episode(golden, tmp_path):
    root = shutil.copytree(golden / "lerobot_v30/image", tmp_path / "set")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    tasks = table["task_index"].to_numpy().copy()
    tasks[10:23] = 1
    table = table.set_column(table.column_names.index("task_index"), "task_index", pa.array(tasks))
    pq.write_table(table, path)
    dataset = LeRobotDataset(root)
    assert dataset[9]["task"] == "pick up the red cube"
    assert dataset[10]["task"] == "open the drawer"


def test_a_dataset_survives_pickling_with_open_videos(golden):
    dataset = LeRobotDataset(golden / "lerobot_v30/video")
    before = dataset[13]
    copy = pickle.loads(pickle.dumps(dataset))
    for key, value in copy[13].items():
        np.testing.assert_array_equal(value, before[key])


def test_what_is_sent_to_workers_has_the_columns_of_the_first_in_common(golden, monkeypatch):
    dataset = LeRobotDataset(golden / "lerobot_v30/image")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < dataset.column("actions").nbytes + 30_000
    monkeypatch.setattr(reader, "load_columns", None)  # nobody reads the tables again
    first = pickle.loads(pickled)
    for copy in (first, pickle.loads(pickle.dumps(first))):
        column = copy.column("actions")
        assert isinstance(column.base, np.memmap) and not column.flags.writeable
        np.testing.assert_array_equal(column, dataset.column("actions"))
        assert copy[13]["task"] == dataset[13]["task"]


def test_workers_read_the_tables_where_nothing_can_be_shared(golden, tmp_path, monkeypatch):
    gone = LeRobotDataset(golden / "lerobot_v30/image")
    expected, pickled = gone.column("actions"), pickle.dumps(gone)
    del gone
    np.testing.assert_array_equal(pickle.loads(pickled).column("actions"), expected)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    copy = pickle.loads(pickle.dumps(LeRobotDataset(golden / "lerobot_v30/image")))
    np.testing.assert_array_equal(copy.column("actions"), expected)


def test_tables_of_several_files_are_put_together_without_a_second_copy_of_all(golden, tmp_path, monkeypatch):
    """Of 27 million frames it was 2.7 GB beside 2.7 GB, for good. Kinds of numbers that a file has alone are kept."""
    root = tmp_path / "set"
    shutil.copytree(golden / "lerobot_v21/image", root)
    before = LeRobotDataset(root)
    file = sorted(root.glob("data/*/*.parquet"))[1]
    table = pq.read_table(file)
    whole = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(len(table) * 7)), 7)
    pq.write_table(table.set_column(table.column_names.index("actions"), "actions", whole), file)
    monkeypatch.setattr(np, "concatenate", _refuse_long(np.concatenate, len(before) * 7))
    actions = LeRobotDataset(root, columns=["actions"]).column("actions")
    begin, end = before.episode_bounds[1]
    np.testing.assert_array_equal(actions[begin:end].ravel(), np.arange((end - begin) * 7))
    np.testing.assert_array_equal(actions[:begin], before.column("actions")[:begin])
    np.testing.assert_array_equal(actions[end:], before.column("actions")[end:])


def test_a_table_that_is_read_leaves_nothing_behind(golden):
    """Of 95,600 files it was 1.9 GB."""

    def footers() -> int:
        return sum(type(each).__name__ == "FileMetaData" for each in gc.get_objects())

    file = next((golden / "lerobot_v21/image").glob("data/*/*.parquet"))
    gc.collect()
    gc.disable()
    try:
        before = footers()
        read_row_groups(file, ["index"], "episode_index", lambda low, high: True)
        assert footers() == before
    finally:
        gc.enable()


def _refuse_long(concatenate, size: int):
    def limited(arrays, *arguments, **options):
        joined = concatenate(arrays, *arguments, **options)
        assert joined.size < size
        return joined

    return limited


def test_a_video_is_compared_with_its_table_once_as_long_as_it_is_the_same(golden, tmp_path, monkeypatch):
    """Of 957 films of 300 episodes, nearly every sample opens some, and comparing took a third of its time."""
    root = tmp_path / "set"
    shutil.copytree(golden / "lerobot_v30/video", root)
    looked = []
    check_clock = video_layout.VideoLayout._check_clock

    def counted(layout, video, *arguments):
        looked.append(video.path)
        check_clock(layout, video, *arguments)

    monkeypatch.setattr(video_layout.VideoLayout, "_check_clock", counted)
    dataset = LeRobotDataset(root)
    number = len(looked)
    copy = pickle.loads(pickle.dumps(dataset))
    assert dataset[0]["task"] == copy[0]["task"] and len(looked) == number > 0
    for path in set(looked):
        os.utime(path, ns=(1, 1))
    assert pickle.loads(pickle.dumps(dataset))[0].keys() == copy[0].keys() and len(looked) > number


def test_a_repository_id_is_looked_up_in_the_lerobot_home(golden, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(golden))
    assert len(LeRobotDataset("lerobot_v30/image")) == 90


def test_timestamps_with_jitter_are_read(golden, tmp_path):
    root = shutil.copytree(golden / "lerobot_v21/video", tmp_path / "set")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(table)).astype(np.float32)
    stamps = pa.array(table["timestamp"].to_numpy() + jitter)
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", stamps), path)
    dataset = LeRobotDataset(root)
    assert frame_label(dataset[23 + 17]["observation.images.cam_high"]) == (17, 2)


def test_writing_to_a_sample_does_not_change_the_dataset(golden):
    dataset = LeRobotDataset(golden / "lerobot_v30/image", delta_timestamps={"actions": [0.0, 0.1]})
    for key in ("state", "actions", "image"):
        before = dataset[3][key].copy()
        dataset[3][key][:] = 0
        np.testing.assert_array_equal(dataset[3][key], before)


def encode_again(
    path: Path,
    options: dict[str, str],
    *,
    first_pts: int = 0,
    jitter: float = 0,
    period: float = 100,
    container: str = "mp4",
) -> None:
    """Replaces a video by its frames in H.264, `period` ms each, with times off by up to `jitter` of that."""
    with av.open(str(path)) as source:
        frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format=container) as target:
        stream = target.add_stream("libx264", rate=10, options={"crf": "18", **options})
        stream.height, stream.width, stream.pix_fmt = (*frames[0].shape[:2], "yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, content in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(content, format="rgb24")
            frame.pts = first_pts + int(period * (number + jitter * rng.uniform(-1, 1) * (number > 0)))
            frame.time_base = Fraction(1, 1000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"g": "2", "bf": "0"}, {}),
        ({"g": "12", "bf": "3"}, {}),  # shown in another order than stored
        ({"g": "250", "bf": "2"}, {}),  # one key frame for the whole file
        ({"g": "10", "bf": "3", "x264-params": "open-gop=1"}, {}),
        ({"g": "5", "bf": "0"}, {"jitter": 0.4}),
        ({"g": "12", "bf": "3"}, {"jitter": 0.4}),  # an index of neither order tells when they are shown
        ({"g": "12", "bf": "2"}, {"first_pts": 500}),
        ({"g": "10", "bf": "0"}, {"container": "matroska"}),  # its index lists key frames
        ({"g": "10", "bf": "0"}, {"container": "matroska", "period": 99.2}),  # another clock
    ],
)
def test_frames_are_found_in_videos_of_any_structure(golden, tmp_path, options, extra):
    root = shutil.copytree(golden / "lerobot_v30/converted_video", tmp_path / "set")
    for path in root.glob("videos/*/*/*.mp4"):
        encode_again(path, options, **extra)
    dataset = LeRobotDataset(root, delta_timestamps={"observation.images.cam_high": [-0.3, 0.0, 0.1]})
    order = np.random.default_rng(1).permutation(len(dataset))
    for index in [*order, *range(20, 30), *reversed(range(20, 30))]:
        sample = dataset[int(index)]
        frame, episode = int(sample["frame_index"]), int(sample["episode_index"])
        last = int(np.diff(dataset.episode_bounds[episode])[0]) - 1
        history = [frame_label(image) for image in sample["observation.images.cam_high"]]
        assert history == [(f, 2 * episode) for f in (max(frame - 3, 0), frame, min(frame + 1, last))]
        assert frame_label(sample["observation.images.cam_wrist"]) == (frame, 2 * episode + 1)


def test_a_picture_that_the_decoder_makes_up_is_refused_up_to_the_next_key_frame(golden, tmp_path):
    root = shutil.copytree(golden / "lerobot_v30/converted_video", tmp_path / "set")
    (path,) = root.glob("videos/*cam_high/*/*.mp4")
    encode_again(path, {"g": "10", "bf": "0", "x264-params": "scenecut=0"})
    with av.open(str(path)) as video:
        packet = next(
            packet for packet in video.demux(video=0) if packet.pts == 34 * video.streams.video[0].duration // 90
        )
        begin, end = packet.pos, packet.pos + packet.size
    content = bytearray(path.read_bytes())
    content[end - (end - begin) // 2 : end] = bytes((end - begin) // 2)
    path.write_bytes(content)
    dataset = LeRobotDataset(root, columns=["observation.images.cam_high"])
    for index in (33, 30, 40, 29):
        dataset[index]
    for index in (34, 39, 36):
        with pytest.raises(ValueError, match=r"is damaged: at \d\.\d+ s its decoder has to make up"):
            dataset[index]
    dataset[40]


def test_a_picture_that_cannot_be_decoded_is_no_missing_one_when_it_is_asked_for_again(tmp_path):
    path = tmp_path / "film.mp4"
    encode_video(path, np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8), 10, "libsvtav1")
    with av.open(str(path)) as film:
        packet = [packet for packet in film.demux(video=0) if packet.size][5]
    content = bytearray(path.read_bytes())
    content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)
    video = VideoFile(path)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be decoded at"):
            video.frame(5)
    video.frame(6)


def test_a_video_names_no_other_files_whatever_it_is_called(tmp_path, monkeypatch):
    frames = np.full((4, 64, 64, 3), 90, np.uint8)
    monkeypatch.chdir(tmp_path)
    path = Path("run 10:00:00 %d/a.mp4")  # which FFmpeg took for a protocol
    path.parent.mkdir()
    encode_video(path, frames, 10, "libsvtav1")
    assert VideoFile(path).frame(3).shape == (64, 64, 3)
    playlist = path.with_name("list.mp4")
    playlist.write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(ValueError, match=r"list\.mp4 is not a readable video: .*; expected MP4, Matroska or AVI"):
        VideoFile(playlist)


def test_frames_have_the_size_that_the_file_announces(tmp_path):
    raw = b""
    for side in (64, 128):
        with av.open(str(tmp_path / "part.h264"), "w") as part:
            stream = part.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
            part.mux(stream.encode(av.VideoFrame(side, side, "yuv420p")))
            part.mux(stream.encode())
        raw += (tmp_path / "part.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(raw)
    path = tmp_path / "film.mp4"
    with av.open(str(tmp_path / "both.h264")) as source, av.open(str(path), "w") as film:
        stream = film.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet.pts = packet.dts = number * 120000
            packet.stream = stream
            film.mux(packet)
    with pytest.raises(ValueError, match=r"changes its size: at 0\.1\d* s to 128 x 128 .*; expected 64 x 64"):
        VideoFile(path, 10).frame(1)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(golden, tmp_path):
    """Copies a recorded dataset so that a test may damage it."""

    def copy(name: str) -> Path:
        return shutil.copytree(golden / name, tmp_path / "set")

    return copy


def test_an_unknown_format_version_is_named(damaged):
    root = damaged("lerobot_v30/image")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v4.0"}))
    with pytest.raises(ValueError, match=r"v4\.0.*v2\.0, v2\.1, v3\.0"):
        LeRobotDataset(root)


def test_a_video_shorter_than_the_table_is_found_when_loading(damaged):
    root = damaged("lerobot_v30/chunked")
    videos = root / "videos/observation.images.cam_high"
    shutil.copy(videos / "chunk-000/file-000.mp4", videos / "chunk-000/file-001.mp4")
    with pytest.raises(ValueError, match=r"file-001\.mp4 holds 23 frames .*the table expects 37 .*episode 1"):
        LeRobotDataset(root)


def test_a_missing_video_is_named(damaged):
    root = damaged("lerobot_v21/video")
    (root / "videos/chunk-000/observation.images.cam_wrist/episode_000002.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"cam_wrist/episode_000002\.mp4"):
        LeRobotDataset(root)


def test_a_missing_table_is_named(damaged):
    root = damaged("lerobot_v21/image")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"episode_000001\.parquet"):
        LeRobotDataset(root)


def test_a_table_without_its_end_is_explained(damaged):
    root = damaged("lerobot_v30/chunked")
    path = root / "data/chunk-000/file-001.parquet"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(
        ValueError, match=r"file-001\.parquet is not a readable parquet file: .*lacks the footer.*finalize"
    ):
        LeRobotDataset(root)


def test_a_table_with_too_few_rows_is_explained(damaged):
    root = damaged("lerobot_v21/image")
    path = root / "data/chunk-000/episode_000002.parquet"
    pq.write_table(pq.read_table(path).slice(0, 12), path)
    with pytest.raises(ValueError, match=r"episode_000002\.parquet holds 12 frames of episode 2 .* promises 30"):
        LeRobotDataset(root)


def test_unknown_features_are_answered_with_the_known_ones(golden):
    root = golden / "lerobot_v30/image"
    known = r"\['stat'\].*'image', 'wrist_image', 'state', 'actions'"
    with pytest.raises(KeyError, match=known):
        LeRobotDataset(root, columns=["stat"])
    with pytest.raises(KeyError, match=known):
        LeRobotDataset(root, delta_timestamps={"stat": [0.0]})
    with pytest.raises(KeyError, match=r"'image' is not a column.*'state'"):
        LeRobotDataset(root).column("image")


def test_deltas_between_two_frames_are_refused(golden):
    with pytest.raises(ValueError, match=r"delta_timestamps\['actions'\] has \[0\.15\] s"):
        LeRobotDataset(golden / "lerobot_v30/image", delta_timestamps={"actions": [0.0, 0.15]})


def test_unknown_episodes_and_frames_are_refused(golden):
    with pytest.raises(IndexError, match=r"episodes \[3\].*3 episodes numbered 0 to 2"):
        LeRobotDataset(golden / "lerobot_v30/image", episodes=[0, 3])
    with pytest.raises(IndexError, match=r"frame 90 of a dataset of 90"):
        LeRobotDataset(golden / "lerobot_v30/image")[90]


def test_a_dataset_that_is_nowhere_is_explained(tmp_path):
    script = "from openpi.data.lerobot.reader import LeRobotDataset; LeRobotDataset('nobody/nothing')"
    environment = os.environ | {"OPENPI_OFFLINE": "0", "HF_HUB_OFFLINE": "1", "HF_LEROBOT_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "FileNotFoundError: dataset 'nobody/nothing' is neither in" in found.stderr


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("gs://bucket/arm", "gs://bucket/arm"),
        ("lab/arm@v2.1", "hf://datasets/lab/arm@v2.1"),
        ("hf://datasets/lab/arm", "hf://datasets/lab/arm"),
    ],
)
def test_a_dataset_at_a_url_or_of_a_revision_is_told_how_to_bring(name, url):
    with pytest.raises(FileNotFoundError, match=f"`openpi fetch {url}`, and give the folder that this prints"):
        LeRobotDataset(name)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a LeRobot dataset"):
        LeRobotDataset(tmp_path)


ANNOTATED = "lerobot_061/datasets/annotated"


def test_language_and_subtasks_reach_who_asks_for_them_as_the_library_reads_them(golden):
    asked = ["language_persistent", "language_events", "subtask"]
    dataset = LeRobotDataset(golden / ANNOTATED, columns=asked)
    expected = json.loads((golden / f"{ANNOTATED}.json").read_text())
    samples = [dataset[i] for i in range(len(dataset))]
    assert [{key: sample[key] for key in asked[:2]} for sample in samples] == expected
    assert [sample["subtask"] for sample in samples[:6]] == ["reach for the cup"] * 3 + ["carry it"] * 3
    samples[2]["language_events"][0]["content"] = "changed"
    assert dataset[2]["language_events"] == expected[2]["language_events"]
    assert dataset.column("language_persistent")[0] is dataset.column("language_persistent")[5]  # one for an episode
    assert pickle.loads(pickle.dumps(dataset))[2]["language_events"] == expected[2]["language_events"]
    assert LeRobotDataset(golden / ANNOTATED, columns=["action"]).column("subtask")[3] == "carry it"


def test_who_does_not_ask_for_language_does_not_read_it(golden, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(golden / ANNOTATED, root)
    (root / "meta/subtasks.parquet").write_text("damaged")
    [file] = root.glob("data/*/*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["language_persistent", "language_events"]), file)
    sample = LeRobotDataset(root)[0]
    assert not {"language_persistent", "language_events", "subtask"} & sample.keys()
    for key, message in (("subtask", "subtasks.parquet"), ("language_events", "lacks the columns")):
        with pytest.raises(ValueError, match=message):
            LeRobotDataset(root, columns=[key])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pa.array(["text"] * 12), "holds string; expected lists of rows"),
        (pa.array([[{"role": "user", "tool_calls": ["{"]}]] * 12), "tool_calls holds .*expected JSON"),
    ],
)
def test_language_that_is_none_is_refused_by_name(golden, tmp_path, content, message):
    root = tmp_path / "set"
    shutil.copytree(golden / ANNOTATED, root)
    [file] = root.glob("data/*/*.parquet")
    table = pq.read_table(file).drop_columns(["language_events"]).append_column("language_events", content)
    pq.write_table(table, file)
    with pytest.raises(ValueError, match=f"column 'language_events' {message}|column 'language_events'.*{message}"):
        LeRobotDataset(root, columns=["language_events"])


def test_a_row_is_told_anew_as_soon_as_any_of_it_differs(golden, tmp_path):
    def row(**more):
        return {"role": "user", "content": None, "style": None, "timestamp": 0.0, "tool_calls": None, **more}

    frames = [
        *([row()], [row()], [row(content="a")], [row(content="a"), row()], [row(content="a"), row(style="vqa")]),
        *(
            None,
            [],
            [row(timestamp=1.0)],
            [row(tool_calls=["1"])],
            [row(tool_calls=["2"])],
            [row(tool_calls=[])],
            [row(tool_calls=[])],
        ),
    ]
    root = tmp_path / "set"
    shutil.copytree(golden / ANNOTATED, root)
    [file] = root.glob("data/*/*.parquet")
    table = pq.read_table(file).drop_columns(["language_events"]).append_column("language_events", pa.array(frames))
    pq.write_table(table, file, row_group_size=5)
    found = LeRobotDataset(root, columns=["language_events"]).column("language_events")
    assert [[r["tool_calls"] for r in rows] for rows in found[8:10]] == [[[1]], [[2]]]
    assert found[10] is found[11] and found[11][0]["tool_calls"] == []
    plain = [[{**r, "tool_calls": None} for r in rows or ()] for rows in frames]
    assert [[{**r, "tool_calls": None} for r in rows] for rows in found] == plain


def test_only_the_row_groups_of_the_episodes_asked_for_are_read(golden, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(golden / ANNOTATED, root)
    [file] = root.glob("data/*/*.parquet")
    with pq.ParquetFile(file) as table:
        chunk = table.metadata.row_group(0).column(2)
        begin, size = chunk.data_page_offset, chunk.total_compressed_size
    content = bytearray(file.read_bytes())
    content[begin : begin + size] = bytes(size)
    file.write_bytes(content)
    whole, second = LeRobotDataset(golden / ANNOTATED), LeRobotDataset(root, episodes=[1])
    for i in range(6):
        for key in ("observation.state", "action", "index", "observation.images.top"):
            np.testing.assert_array_equal(second[i][key], whole[6 + i][key])
    with pytest.raises(ValueError, match="damaged parquet file"):
        LeRobotDataset(root)
