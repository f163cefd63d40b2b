"""The LeRobot writer: read back equal, in the library's layout, and there whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi.data.lerobot import stats as feature_stats
from openpi.data.lerobot import video_writer
from openpi.data.lerobot.episode_check import FrameStream
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter

IMAGE = {"dtype": "image", "shape": [16, 24, 3], "names": ["height", "width", "channel"]}
STATE = {"dtype": "float32", "shape": [5], "names": [f"joint_{i}" for i in range(5)]}
ACTION = {"dtype": "float32", "shape": [2], "names": None}
FEATURES = {"cam": IMAGE, "state": STATE, "action": ACTION}

# Lossy, but a frame more or less would be 8 levels brighter or darker.
VIDEO_BRIGHTNESS_DIFFERENCE = 3


def make_episode(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "cam": rng.integers(0, 256, (length, 16, 24, 3), dtype=np.uint8),
        "state": rng.normal(size=(length, 5)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }


def smooth_frames(length: int, offset: int, size_hw: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Grey ramps, 8 levels brighter from frame to frame, so that a wrong frame is seen."""
    ramp = np.linspace(0, 40, size_hw[1])[None, None, :, None]
    brightness = (offset + 8 * np.arange(length)) % 200
    return np.broadcast_to(brightness[:, None, None, None] + ramp, (length, *size_hw, 3)).astype(np.uint8)


def write(root: Path, episodes: list[dict[str, np.ndarray]], **options) -> Path:
    with LeRobotWriter(root, fps=10, features=options.pop("features", FEATURES), **options) as writer:
        for number, episode in enumerate(episodes):
            writer.add_episode(episode, task=f"task {number % 2}")
    return root


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DTYPES = st.sampled_from(["float32", "float64", "int64", "int32", "uint8", "bool"])
SHAPES = st.sampled_from([(1,), (2,), (7,), (2, 3), (2, 1, 2)])
TASKS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(
    features=st.dictionaries(st.sampled_from("abcd"), st.tuples(DTYPES, SHAPES), min_size=1),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    tasks=st.lists(TASKS, min_size=1, max_size=3),
    file_mb=st.sampled_from([0.0001, 100]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back(tmp_path_factory, features, lengths, tasks, file_mb, seed):
    rng = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("data") / "set"
    entries = {key: {"dtype": dtype, "shape": shape} for key, (dtype, shape) in features.items()}
    episodes, texts = [], []
    with LeRobotWriter(root, fps=30, features=entries, data_file_mb=file_mb) as writer:
        for length in lengths:
            episodes.append(
                {key: rng.integers(0, 100, (length, *shape)).astype(dtype) for key, (dtype, shape) in features.items()}
            )
            texts.append([tasks[i] for i in rng.integers(0, len(tasks), length)])
            writer.add_episode(episodes[-1], texts[-1])
    dataset = LeRobotDataset(root)
    assert len(dataset) == sum(lengths)
    for number, (episode, text) in enumerate(zip(episodes, texts, strict=True)):
        begin = dataset.episode_bounds[number, 0]
        for frame in range(lengths[number]):
            sample = dataset[begin + frame]
            assert (sample["episode_index"], sample["frame_index"], sample["task"]) == (
                number,
                frame,
                text[frame],
            )
            for key, (_, shape) in features.items():
                expected = episode[key][frame].reshape(() if shape == (1,) else shape)
                np.testing.assert_array_equal(sample[key], expected)


def test_images_are_read_back_exactly_in_either_layout(tmp_path):
    episode = make_episode(5)
    chw = {"dtype": "image", "shape": [3, 16, 24], "names": ["channels", "height", "width"]}
    for name, features, cam in [
        ("hwc", FEATURES, episode["cam"]),
        ("chw", FEATURES | {"cam": chw}, np.moveaxis(episode["cam"], -1, 1)),
    ]:
        dataset = LeRobotDataset(write(tmp_path / name, [episode | {"cam": cam}], features=features))
        np.testing.assert_array_equal(np.stack([dataset[i]["cam"] for i in range(5)]), episode["cam"])


def test_videos_roll_over_for_each_camera_alone_and_every_frame_is_found(tmp_path):
    large = {"dtype": "video", "shape": [128, 160, 3], "names": ["height", "width", "channels"]}
    small = {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channels"]}
    lengths = [7, 12, 5, 9]
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        noise = rng.integers(0, 30, (1, 128, 160, 3))
        wide = smooth_frames(length, 20 * number, (128, 160)) + noise
        episodes.append(
            {
                "large": wide.astype(np.uint8),
                "small": smooth_frames(length, 50 * number),
                "x": np.ones(length),
            }
        )
    features = {"large": large, "small": small, "x": {"dtype": "float32", "shape": [1]}}
    root = write(tmp_path / "set", episodes, features=features, use_videos=True, video_file_mb=0.02)
    num_files = [len(list((root / "videos" / key).glob("*/*.mp4"))) for key in ("large", "small")]
    assert num_files[0] > 1
    assert num_files[1] == 1
    dataset = LeRobotDataset(root)
    for index in np.random.default_rng(1).permutation(sum(lengths)):
        sample = dataset[int(index)]
        for key in ("large", "small"):
            expected = episodes[int(sample["episode_index"])][key][int(sample["frame_index"])]
            assert abs(sample[key].mean() - expected.mean()) < VIDEO_BRIGHTNESS_DIFFERENCE


def test_the_layout_is_that_of_the_library(golden, tmp_path):
    recorded = golden / "lerobot_v30/video"
    info = json.loads((recorded / "meta/info.json").read_text())
    source = LeRobotDataset(recorded)
    with LeRobotWriter(tmp_path / "set", fps=10, features=info["features"], robot_type="panda") as writer:
        for begin, end in source.episode_bounds:
            samples = [source[i] for i in range(begin, end)]
            keys = [key for key in info["features"] if key.startswith(("observation", "action"))]
            writer.add_episode({k: np.stack([s[k] for s in samples]) for k in keys}, samples[0]["task"])
    written = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert written == info
    for table in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        found, expected = (pq.read_table(root / table) for root in (tmp_path / "set", recorded))
        assert set(found.column_names) == set(expected.column_names)
        for name in expected.column_names:
            assert found.schema.field(name).type == expected.schema.field(name).type, name
        numbers = [name for name in expected.column_names if not name.startswith("stats/")]
        assert found.select(numbers).to_pylist() == expected.select(numbers).to_pylist()
    found, expected = (json.loads((root / "meta/stats.json").read_text()) for root in (tmp_path / "set", recorded))
    assert found.keys() == expected.keys()
    for key in ("observation.state", "action", "timestamp", "index"):
        assert found[key].keys() == expected[key].keys()
        for name in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(found[key][name], expected[key][name], rtol=1e-5, atol=1e-6)


# --- atomicity ----------------------------------------------------------------------------------------------


def test_nothing_is_left_when_an_episode_fails(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        LeRobotWriter(tmp_path / "set", fps=10, features=FEATURES) as writer,
    ):
        writer.add_episode(make_episode(3), "task")
        raise ZeroDivisionError
    assert siblings(tmp_path) == []


def test_the_dataset_appears_only_when_it_is_complete(tmp_path):
    with LeRobotWriter(tmp_path / "set", fps=10, features=FEATURES) as writer:
        writer.add_episode(make_episode(3), "task")
        assert not (tmp_path / "set").exists()
    assert siblings(tmp_path) == ["set"]


def test_an_existing_dataset_is_only_replaced_on_request_and_only_by_a_complete_one(tmp_path):
    write(tmp_path / "set", [make_episode(3)])
    with pytest.raises(FileExistsError, match=r"overwrite"):
        LeRobotWriter(tmp_path / "set", fps=10, features=FEATURES)
    with pytest.raises(ValueError, match=r"no episode"):
        write(tmp_path / "set", [], overwrite=True)
    assert len(LeRobotDataset(tmp_path / "set")) == 3
    write(tmp_path / "set", [make_episode(4)], overwrite=True)
    assert len(LeRobotDataset(tmp_path / "set")) == 4
    assert siblings(tmp_path) == ["set"]
    with pytest.raises(FileExistsError, match=r"is no dataset .*info\.json\), and what it holds would be deleted"):
        write(tmp_path, [make_episode(4)], overwrite=True)


FILL_THE_DISK = """
import resource, signal, sys
import numpy as np
from openpi.data.lerobot.writer import LeRobotWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an OSError, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
features = {"cam": {"dtype": sys.argv[2], "shape": [64, 64, 3]}}
writer = LeRobotWriter(sys.argv[1], fps=10, features=features)
try:
    for _ in range(3):
        writer.add_episode({"cam": frames}, "task")
    writer.finish()
except OSError:
    sys.exit(17)
"""


@pytest.mark.parametrize("dtype", ["image", "video"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, dtype):
    command = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path / "set"), dtype]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 17
    assert siblings(tmp_path) == []


# --- errors -------------------------------------------------------------------------------------------------


def test_an_episode_that_does_not_fit_is_refused_and_the_rest_survives(tmp_path):
    good = make_episode(4)
    cases = [
        (KeyError, r"missing are \['action'\], unknown are \['actions'\]", {"actions": good["action"]}),
        (ValueError, r"'state' has frames of shape \(4,\), expected \(5,\)", {"state": good["state"][:, :4]}),
        (ValueError, r"same number of frames.*'state': 3", {"state": good["state"][:3]}),
        (
            ValueError,
            r"camera 'cam' has dtype float32, expected uint8",
            {"cam": good["cam"].astype(np.float32)},
        ),
        (ValueError, r"camera 'cam' has frames of shape \(24, 16, 3\)", {"cam": good["cam"].swapaxes(1, 2)}),
        (ValueError, r"'state' has dtype complex128", {"state": good["state"].astype(np.complex128)}),
    ]
    with LeRobotWriter(tmp_path / "set", fps=10, features=FEATURES) as writer:
        writer.add_episode(good, "task")
        for kind, message, change in cases:
            episode = good | change
            if "actions" in change:
                del episode["action"]
            with pytest.raises(kind, match=message):
                writer.add_episode(episode, "task")
        with pytest.raises(ValueError, match=r"'task': 2"):
            writer.add_episode(good, ["a", "b"])
        writer.add_episode(good, "task")
    assert len(LeRobotDataset(tmp_path / "set")) == 8


LANGUAGE = {"action": {"dtype": "float32", "shape": (1,)}, "language_persistent": {"dtype": "language", "shape": (1,)}}
SAID = [{"role": "assistant", "content": "reach", "style": "subtask", "timestamp": 0.5}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**SAID[0], "speaker": "me"}], r"'language_persistent' has a row with \['speaker'\]"),
        ([{**SAID[0], "timestamp": "soon"}], "none of language"),
        ([{**SAID[0], "tool_calls": [{1, 2}]}], "none of language"),
        (["reach"], "none of language"),
        (None, "none of language"),
    ],
)
def test_language_is_written_frame_by_frame_and_what_is_none_is_refused(tmp_path, rows, message):
    action = np.zeros((2, 1), np.float32)
    calls = [{"type": "function", "function": {"name": "say"}}]
    with LeRobotWriter(tmp_path / "set", fps=10, features=LANGUAGE) as writer:
        writer.add_episode({"action": action, "language_persistent": [SAID, [{**SAID[0], "tool_calls": calls}]]}, "go")
        with pytest.raises(ValueError, match=message):
            writer.add_episode({"action": action, "language_persistent": [SAID, rows]}, "go")
    told = LeRobotDataset(tmp_path / "set", columns=["language_persistent"]).column("language_persistent")
    assert told.tolist() == [
        [{**SAID[0], "camera": None, "tool_calls": None}],
        [{**SAID[0], "camera": None, "tool_calls": calls}],
    ]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"x/y": STATE}, r"contains '/'"),
        ({"x": {"dtype": "float32"}}, r"lacks \['shape'\]"),
        ({"x": {"dtype": "quaternion", "shape": [4]}}, r"dtype 'quaternion'"),
        ({"x": {"dtype": "image", "shape": [16, 24]}}, r"expected \(h, w, 3\)"),
    ],
)
def test_features_that_the_format_cannot_hold_are_refused(tmp_path, feature, message):
    with pytest.raises(ValueError, match=message):
        LeRobotWriter(tmp_path / "set", fps=10, features=feature)
    assert siblings(tmp_path) == []


def test_what_an_episode_costs_does_not_grow_with_the_tasks_before_it(tmp_path):
    """DROID has 30,000 texts: each frame looked for the largest number among those before."""

    class Counted(dict):
        looks = 0

        def values(self):
            Counted.looks += 1
            return super().values()

    with LeRobotWriter(tmp_path / "set", fps=10, features={"a": {"dtype": "float32", "shape": (1,)}}) as writer:
        writer._tasks = Counted()
        for number in range(3):
            writer.add_episode({"a": np.zeros((50, 1), np.float32)}, f"task {number}")
        assert Counted.looks == 3
    assert list(LeRobotDataset(tmp_path / "set").metadata.tasks.values()) == ["task 0", "task 1", "task 2"]


def test_a_dataset_may_be_moved(tmp_path):
    write(tmp_path / "set", [make_episode(3)])
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    assert len(LeRobotDataset(tmp_path / "elsewhere")) == 3


def test_numbers_that_are_none_are_refused_and_the_writer_goes_on(tmp_path):
    good = make_episode(5)
    key = next(key for key, feature in FEATURES.items() if feature["dtype"] == "float32")
    bad = good | {key: good[key].copy()}
    bad[key][3, ..., -1] = np.nan
    with LeRobotWriter(tmp_path / "set", fps=30, features=FEATURES) as writer:
        writer.add_episode(good, "x")
        with pytest.raises(ValueError, match=rf"feature '{key}' has nan in frame 3"):
            writer.add_episode(bad, "x")
    assert len(LeRobotDataset(tmp_path / "set")) == 5


# --- appending ----------------------------------------------------------------------------------------------

VIDEO = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]}
WITH_VIDEO = {"cam": VIDEO, "state": STATE}


def make_video_episode(length: int, offset: int) -> dict[str, np.ndarray]:
    return {"cam": smooth_frames(length, offset), "state": make_episode(length, seed=offset)["state"]}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_appended_episodes_come_behind_the_others(tmp_path):
    episodes = [make_video_episode(length, 20 * length) for length in (5, 3, 4)]
    root = write(tmp_path / "set", episodes[:1], features=WITH_VIDEO)
    (root / "notes.yaml").write_text("kept")
    write(root, episodes[1:], features=WITH_VIDEO | {"cam": VIDEO | {"dtype": "image"}}, append=True)
    whole = write(tmp_path / "whole", [episodes[i] for i in (0, 1, 2)], features=WITH_VIDEO)
    assert siblings(tmp_path) == ["set", "whole"]
    assert (root / "notes.yaml").read_text() == "kept"
    found, expected = LeRobotDataset(root), LeRobotDataset(whole)
    tasks = ["task 0"] * 5 + ["task 0"] * 3 + ["task 1"] * 4
    assert [found[i]["task"] for i in range(12)] == tasks
    for i in range(12):
        for key in ("state", "index", "episode_index", "frame_index", "timestamp"):
            np.testing.assert_array_equal(found[i][key], expected[i][key])
        assert abs(found[i]["cam"].mean() - expected[i]["cam"].mean()) < VIDEO_BRIGHTNESS_DIFFERENCE
    found, expected = (json.loads((folder / "meta/stats.json").read_text()) for folder in (root, whole))
    for key in WITH_VIDEO:
        for name, values in expected[key].items():
            np.testing.assert_allclose(found[key][name], values, rtol=1e-6, atol=1e-9)
    found, expected = (json.loads((folder / "meta/info.json").read_text()) for folder in (root, whole))
    assert found == expected


def test_episodes_are_appended_to_a_dataset_of_the_library_and_its_files_stay_as_they_are(golden, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(golden / "lerobot_v30/video", root)
    before = contents(root)
    old = LeRobotDataset(golden / "lerobot_v30/video")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    keys = [key for key in features if key.startswith(("observation", "action"))]
    samples = [old[i] for i in range(4)]
    with LeRobotWriter(root, fps=10, features=features, append=True) as writer:
        writer.add_episode({key: np.stack([sample[key] for sample in samples]) for key in keys}, "another task")
    after = contents(root)
    rewritten = {"meta/info.json", "meta/stats.json", "meta/tasks.parquet"}
    assert {name for name, data in before.items() if after.get(name) != data} == rewritten
    new = LeRobotDataset(root)
    assert len(new) == len(old) + 4
    for i in (0, len(old) - 1):
        assert all(np.array_equal(new[i][key], old[i][key]) for key in keys)
    assert new[len(old)]["task"] == "another task"
    np.testing.assert_array_equal(new[len(old) + 3]["observation.state"], samples[3]["observation.state"])
    rows = pq.ParquetDataset(root / "meta/episodes").read()
    assert len(rows) == len(old.metadata.episodes) + 1


@pytest.mark.parametrize("codec", ["av1", "hevc"])
def test_episodes_are_appended_to_films_of_lerobot_061(golden, tmp_path, codec):
    """AV1 of odd size, and HEVC; what the description says of the film stays as it is."""
    recorded = golden / "lerobot_061/datasets" / codec
    root = shutil.copytree(recorded, tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    old, film = LeRobotDataset(recorded), "observation.images.film"
    keys = ("observation.state", "action", "pose", film)
    with LeRobotWriter(root, fps=10, features=info["features"], append=True) as writer:
        assert video_writer.codec_name(writer.encoder) == codec
        writer.add_episode({key: np.stack([old[i][key] for i in range(5)]) for key in keys}, "again")
    new = LeRobotDataset(root)
    assert len(new) == len(old) + 5
    for i in range(5):
        assert new[10 + i][film].shape == old[i][film].shape
        assert np.abs(new[10 + i][film].astype(float) - old[i][film]).mean() < 3  # encoded twice
    assert json.loads((root / "meta/info.json").read_text())["features"] == info["features"]


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="of Linux")
def test_encoding_leaves_the_priority_of_the_process_alone(tmp_path):
    """SVT-AV1 takes the highest real-time priority where it may: as root."""
    policies = []

    def frames():
        for _ in range(3):
            yield np.zeros((64, 64, 3), np.uint8)
            policies.append({os.sched_getscheduler(int(thread.name)) for thread in Path("/proc/self/task").iterdir()})

    before = os.sched_getscheduler(0)
    video_writer.encode_video(tmp_path / "film.mp4", frames(), 10, "libsvtav1")
    assert policies == [{before}] * 3
    assert os.sched_getscheduler(0) == before


def test_statistics_of_matrices_have_the_shape_of_lerobot(golden, tmp_path):
    recorded = golden / "lerobot_061/datasets/hevc"
    expected = json.loads((recorded / "meta/stats.json").read_text())["pose"]
    source = LeRobotDataset(recorded)
    poses = source.column("pose")
    features = {"pose": {"dtype": "float32", "shape": [2, 3], "names": None}}
    root = write(tmp_path / "set", [{"pose": poses[:5]}, {"pose": poses[5:]}], features=features)
    found = json.loads((root / "meta/stats.json").read_text())["pose"]
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    assert {np.shape(found[name]) for name in feature_stats.QUANTILES} == {(3,)}


def test_statistics_per_element_that_were_written_once_are_joined(tmp_path):
    """Datasets of earlier versions have them; the numbers are those of all elements along the last axis."""
    rng = np.random.default_rng(0)
    features = {"pose": {"dtype": "float32", "shape": [2, 3], "names": None}}
    first, second = (rng.normal(size=(n, 2, 3)).astype(np.float32) for n in (6, 3))
    root = write(tmp_path / "set", [{"pose": first}], features=features)
    stats = json.loads((root / "meta/stats.json").read_text())
    per_element = {name: getattr(first.astype(np.float64), name)(axis=0) for name in ("min", "max", "mean", "std")}
    stats["pose"] = {name: value.tolist() for name, value in per_element.items()} | {"count": [6]}
    (root / "meta/stats.json").write_text(json.dumps(stats))
    write(root, [{"pose": second}], features=features, append=True)
    found = json.loads((root / "meta/stats.json").read_text())["pose"]
    rows = np.concatenate([first, second]).reshape(-1, 3)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(found[name], getattr(rows, name)(axis=0), rtol=1e-5, atol=1e-6)
    assert found["count"] == [9]


def test_films_of_odd_size_are_written_where_the_format_has_them():
    video_writer.check_size("cam", (15, 24), "libsvtav1")
    for encoder in ("libx264", "libx265"):
        with pytest.raises(ValueError, match="needs an even height and width"):
            video_writer.check_size("cam", (15, 24), encoder)


@pytest.mark.parametrize(
    ("change", "fps", "message"),
    [
        ({"state": STATE | {"shape": [4]}}, 10, r"other features than the new episodes: \['state'\]"),
        ({"state": STATE | {"names": list("abcde")}}, 10, r"other features"),
        ({"more": ACTION}, 10, r"'more' is not there"),
        ({}, 15, r"10 frames per second, and the new episodes 15"),
    ],
)
def test_episodes_that_are_not_like_the_others_are_not_appended(tmp_path, change, fps, message):
    root = write(tmp_path / "set", [make_episode(3)])
    before = contents(root)
    with pytest.raises(ValueError, match=message):
        LeRobotWriter(root, fps=fps, features=FEATURES | change, append=True)
    assert contents(root) == before
    assert siblings(tmp_path) == ["set"]


def test_a_failed_append_leaves_the_dataset_as_it_was(tmp_path, golden):
    root = write(tmp_path / "set", [make_episode(3)])
    before = contents(root)
    with (
        pytest.raises(ZeroDivisionError),
        LeRobotWriter(root, fps=10, features=FEATURES, append=True) as writer,
    ):
        writer.add_episode(make_episode(3), "task")
        raise ZeroDivisionError
    assert contents(root) == before
    assert siblings(tmp_path) == ["set"]
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset"):
        LeRobotWriter(tmp_path / "nothing", fps=10, features=FEATURES, append=True)
    with pytest.raises(ValueError, match=r"format v2\.1"):
        LeRobotWriter(golden / "lerobot_v21/video", fps=10, features=FEATURES, append=True)


def test_a_dataset_that_cannot_be_moved_into_place_leaves_the_old_one_there(tmp_path, monkeypatch):
    root = write(tmp_path / "set", [make_episode(3)])
    before = contents(root)
    original, moved = Path.rename, []

    def rename(path, target):
        moved.append((path.name, Path(target).name))
        if len(moved) == 2:
            raise PermissionError("not here")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(PermissionError):
        write(root, [make_episode(3)], append=True)
    assert contents(root) == before
    assert siblings(tmp_path) == ["set"]
    monkeypatch.undo()
    root.rename(tmp_path / ".set.tmp-x.replaced")  # as a kill at that moment leaves it
    with pytest.raises(FileNotFoundError, match=r"left it as .*\.set\.tmp-x\.replaced"):
        write(root, [make_episode(3)], append=True)


def test_a_camera_may_come_as_a_stream_and_is_stored_the_same(tmp_path):
    episode = make_video_episode(6, 40)
    whole = write(tmp_path / "whole", [episode], features=WITH_VIDEO)
    stream = FrameStream(6, (frame for frame in episode["cam"]))
    streamed = write(tmp_path / "streamed", [episode | {"cam": stream}], features=WITH_VIDEO)
    assert (whole / "meta/stats.json").read_text() == (streamed / "meta/stats.json").read_text()
    first, second = LeRobotDataset(whole), LeRobotDataset(streamed)
    assert all(np.array_equal(first[i]["cam"], second[i]["cam"]) for i in range(6))


@pytest.mark.parametrize(
    ("length", "frames", "message"),
    [
        (6, smooth_frames(5, 0), "gave 5 frames; the episode has 6"),
        (6, smooth_frames(6, 0, (32, 64)), r"frames of shape \(32, 64, 3\)"),
        (5, smooth_frames(5, 0), "same number of frames"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_and_the_rest_survives(tmp_path, length, frames, message):
    episode = make_video_episode(6, 0)
    with LeRobotWriter(tmp_path / "set", fps=10, features=WITH_VIDEO) as writer:
        writer.add_episode(episode, "task")
        with pytest.raises(ValueError, match=message):
            writer.add_episode(episode | {"cam": FrameStream(length, frames)}, "task")
    assert len(LeRobotDataset(tmp_path / "set")) == 6
    assert not list((tmp_path / "set").glob(".*"))
