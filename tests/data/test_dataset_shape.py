"""Datasets split, merged and shrunk: every value stays what it was, or what is lost is said."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from browser import BROWSER, MISSING, dom
from openpi.cli.data._dataset_shape import shown
from openpi.cli.data._dataset_view import Pages, open_server, page
from openpi.cli.main import main
from openpi.data.check import runner
from openpi.data.check.findings import Finding, Severity
from openpi.data.check.runner import check_dataset
from openpi.data.lerobot import metadata as metadata_module
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.shaping import divide, merge, split
from openpi.data.lerobot.video_cut import VideoPackets
from openpi.data.lerobot.video_writer import JoinedVideo, encode_video
from openpi.data.lerobot.writer import LeRobotWriter
from openpi_client.image_tools import resize_with_pad
from paths import GOLDEN

NUMBERS = {"state": {"dtype": "float32", "shape": (1,), "names": None}}
STORED = ("lerobot_v21/image", "lerobot_v21/video", "lerobot_v30/converted_video", "lerobot_v30/chunked")


def call(*words) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as log:
        code = main([str(word) for word in words])
    return code, out.getvalue(), log.getvalue()


def assert_same_samples(found: LeRobotDataset, expected: LeRobotDataset, rows: range, into: int = 0) -> None:
    """All rows of the tables, and some pictures."""
    for key in expected.metadata.column_keys:
        if key not in ("index", "episode_index", "task_index", "timestamp"):
            columns = found.column(key)[into : into + len(rows)], expected.column(key)[rows.start : rows.stop]
            np.testing.assert_array_equal(*columns)
    for row in {rows.start, rows.start + 1, (rows.start + rows.stop) // 2, rows.stop - 1}:
        sample, other = found[into + row - rows.start], expected[row]
        assert sample["task"] == other["task"]
        for key in expected.metadata.camera_keys:
            np.testing.assert_array_equal(sample[key], other[key])


@pytest.mark.parametrize("stored", STORED)
def test_parts_hold_every_value_and_pixel_of_their_episodes_in_order(stored, tmp_path):
    root = GOLDEN / stored
    whole = LeRobotDataset(root)
    numbers = [episode.index for episode in whole.episodes]
    split(LeRobotMetadata.load(root), {tmp_path / "a": numbers[::2], tmp_path / "b": numbers[1::2]})
    for name, chosen in (("a", numbers[::2]), ("b", numbers[1::2])):
        part, begin = LeRobotDataset(tmp_path / name), 0
        assert [episode.index for episode in part.episodes] == list(range(len(chosen)))
        for number in chosen:
            first, last = whole.episode_bounds[numbers.index(number)]
            assert_same_samples(part, whole, range(first, last), begin)
            begin += last - first
        assert len(part) == begin
        report = check_dataset(tmp_path / name)
        refused = [f for f in report.findings if f.group in ("metadata", "videos", "statistics", "portability")]
        assert [f.code for f in refused if f.severity == "error"] == []


def test_what_is_split_and_merged_again_is_what_it_was_and_metadata_are_read_once(tmp_path, monkeypatch):
    root, read = GOLDEN / "lerobot_v30/converted_video", []
    read_json = metadata_module.read_json
    monkeypatch.setattr(metadata_module, "read_json", lambda path: (read.append(path.parents[1]), read_json(path))[1])
    code, _, log = call("dataset", "split", root, f"{tmp_path}/first=0,1", f"{tmp_path}/others=rest")
    assert code == 0, log
    code, _, log = call("dataset", "merge", tmp_path / "first", tmp_path / "others", "--output", tmp_path / "again")
    assert code == 0, log
    assert read == [root, tmp_path / "first", tmp_path / "others"]
    again, whole = LeRobotDataset(tmp_path / "again"), LeRobotDataset(root)
    assert_same_samples(again, whole, range(len(whole)))
    assert [e.length for e in again.episodes] == [e.length for e in whole.episodes]
    for key in whole.metadata.features.keys() - {"timestamp", "frame_index", "episode_index", "index", "task_index"}:
        assert again.metadata.features[key] == whole.metadata.features[key]


ANNOTATED = GOLDEN / "lerobot_061/datasets/annotated"


def assert_same_language(found: Path, expected: Path, begin: int = 0) -> None:
    """Texts, and the type of the columns, of the episodes from a row on."""
    names = ("language_persistent", "language_events", "subtask")
    after, before = (LeRobotDataset(root, columns=names) for root in (found, expected))
    for name in names:
        assert after.column(name).tolist() == before.column(name).tolist()[begin:]
    after, before = (pq.read_table(next(root.glob("data/*/*.parquet"))).schema for root in (found, expected))
    assert [after.field(name) for name in names[:2]] == [before.field(name) for name in names[:2]]


def test_parts_keep_what_is_told_frame_by_frame(tmp_path):
    root = ANNOTATED
    split(LeRobotMetadata.load(root), {tmp_path / "first": [0], tmp_path / "second": [1]})
    assert_same_language(tmp_path / "second", root, LeRobotDataset(root).episode_bounds[1][0])
    merge([LeRobotMetadata.load(tmp_path / name) for name in ("first", "second")], tmp_path / "again")
    assert_same_language(tmp_path / "again", root)
    assert not [
        f for f in check_dataset(tmp_path / "again").findings if f.severity == "error" and f.group == "metadata"
    ]


def test_language_that_only_one_of_two_has_is_left_out_and_told(tmp_path, caplog):
    shutil.copytree(ANNOTATED, tmp_path / "bare")
    info = json.loads((tmp_path / "bare/meta/info.json").read_text())
    del info["features"]["language_events"]
    (tmp_path / "bare/meta/info.json").write_text(json.dumps(info))
    merge([LeRobotMetadata.load(root) for root in (ANNOTATED, tmp_path / "bare")], tmp_path / "both")
    assert "left out: 'language_events', which not all of these datasets have" in caplog.messages
    both = LeRobotMetadata.load(tmp_path / "both")
    assert both.annotation_keys == ("language_persistent", "subtask")


def test_shrunk_sets_keep_what_is_told_frame_by_frame(tmp_path):
    words = ("--size", "32x32", "--codec", "images", "--workers", 0)
    code, _, log = call("dataset", "shrink", ANNOTATED, tmp_path / "small", *words)
    assert code == 0, log
    assert_same_language(tmp_path / "small", ANNOTATED)
    assert LeRobotMetadata.load(tmp_path / "small").subtasks == LeRobotMetadata.load(ANNOTATED).subtasks


def test_shrunk_sets_keep_columns_of_text(tmp_path):
    features = {
        "action": {"dtype": "float32", "shape": (2,)},
        "cam": {"dtype": "image", "shape": (16, 16, 3)},
        "subtask": {"dtype": "string", "shape": (1,)},
    }
    with LeRobotWriter(tmp_path / "set", fps=10, features=features) as writer:
        for texts in (["reach"] * 2 + ["carry it"], ["", "lay it down", "lay it down"]):
            frames = {"action": np.zeros((3, 2), np.float32), "cam": np.zeros((3, 16, 16, 3), np.uint8)}
            writer.add_episode({**frames, "subtask": np.array(texts, object)}, "tidy up")
    code, _, log = call("dataset", "shrink", tmp_path / "set", tmp_path / "small", "--size", "32x32", "--workers", 0)
    assert code == 0, log
    told = ["reach", "reach", "carry it", "", "lay it down", "lay it down"]
    assert LeRobotDataset(tmp_path / "small").column("subtask").tolist() == told


def test_parts_keep_their_subtasks_and_sets_of_other_ones_are_not_merged(tmp_path):
    root = ANNOTATED
    split(LeRobotMetadata.load(root), {tmp_path / "second": [1]})
    parts = [LeRobotMetadata.load(tmp_path / "second"), LeRobotMetadata.load(root)]
    assert parts[0].subtasks == parts[1].subtasks
    assert LeRobotDataset(tmp_path / "second", columns=["subtask"])[4]["subtask"] == "carry it"
    pq.write_table(
        pa.table({"subtask_index": [0, 1], "subtask": ["carry it", "reach"]}), tmp_path / "second/meta/subtasks.parquet"
    )
    with pytest.raises(ValueError, match="subtask_index means other texts"):
        merge([LeRobotMetadata.load(each) for each in (root, tmp_path / "second")], tmp_path / "both")


def test_videos_are_cut_and_joined_without_being_encoded_again(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a video was encoded again")

    monkeypatch.setattr("openpi.data.lerobot.video_writer.encode_video", refuse)
    split(LeRobotMetadata.load(GOLDEN / "lerobot_v30/converted_video"), {tmp_path / "part": [1]})
    assert len(LeRobotDataset(tmp_path / "part")) == 37


def moving(num_frames: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    still = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
    return [np.roll(still, 3 * i, axis=1) for i in range(num_frames)]


def long_groups(path: Path, frames: list[np.ndarray], lost_before: int | None = None) -> None:
    """H.264 as a phone writes it: a key frame seldom, frames that lean on later ones, and a clock that may be uneven.

    Args:
        lost_before: the number of a frame, before which three were lost.
    """
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "12", "bf": "3", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, content in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(content, format="rgb24")
            late = 3 if lost_before is not None and number >= lost_before else 0
            frame.pts, frame.time_base = 100 * (number + late) + 40 * (late and number % 2), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_episodes_of_an_uneven_clock_are_joined_evenly_and_in_order(tmp_path):
    long_groups(tmp_path / "long.mp4", moving(24), lost_before=9)
    packets = VideoPackets.read(tmp_path / "long.mp4")
    place = packets.place(0, 24)
    assert place is not None
    packets.cut(place, tmp_path / "cut.mp4", 10)
    joined = JoinedVideo(tmp_path / "joined.mp4", 10)
    for _ in range(2):
        joined.append(tmp_path / "cut.mp4")
    joined.close()
    whole = decoded(tmp_path / "long.mp4")
    np.testing.assert_array_equal(decoded(tmp_path / "joined.mp4"), [*whole, *whole])
    with av.open(str(tmp_path / "joined.mp4")) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times_s, np.arange(48) / 10, atol=1e-4)  # as exactly as LeRobot asks for


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_cut_begins_with_a_key_frame_and_holds_the_same_pixels_or_is_not_made(tmp_path):
    long_groups(tmp_path / "long.mp4", moving(36))
    encode_video(tmp_path / "short.mp4", moving(36), 10, "libx264")
    for name, first, length, can in (
        ("long", 0, 12, True),
        ("long", 12, 24, True),
        ("long", 12, 20, False),
        ("long", 5, 12, False),
        ("short", 6, 7, True),
        ("short", 7, 6, False),
    ):
        packets = VideoPackets.read(tmp_path / f"{name}.mp4")
        place = packets.place(first, length)
        if name == "long" and length == 20 and place is not None:
            can = True  # by chance the last frames lean on none that follows
        assert (place is not None) is can, (name, first, length)
        if place is not None:
            packets.cut(place, tmp_path / "cut.mp4", 10)
            whole = decoded(tmp_path / f"{name}.mp4")[first : first + length]
            np.testing.assert_array_equal(decoded(tmp_path / "cut.mp4"), whole)


def test_an_episode_that_begins_within_a_group_of_pictures_is_encoded_again_and_that_is_said(tmp_path, caplog):
    camera = {"dtype": "video", "shape": (32, 48, 3), "names": ["height", "width", "channel"]}
    features = {"top": camera, "action": {"dtype": "float64", "shape": (2,), "names": ["a", "b"]}}
    root = tmp_path / "set"
    action = np.random.default_rng(0).uniform(-1, 1, (18, 2))
    with LeRobotWriter(root, fps=10, features=features, video_codec="h264") as writer:
        for _ in range(2):
            writer.add_episode({"top": np.stack(moving(18)), "action": action}, "push")
    long_groups(next(root.glob("videos/top/*/*.mp4")), [*moving(18), *moving(18)])
    whole = LeRobotDataset(root)
    with caplog.at_level("WARNING", "openpi"):
        split(LeRobotMetadata.load(root), {tmp_path / "second": [1]})
    assert "episode 1: top encoded again" in caplog.text
    part = LeRobotDataset(tmp_path / "second")
    assert len(part) == 18
    unlike = [np.abs(part[7]["top"].astype(int) - whole[row]["top"]).mean() for row in range(18, 36)]
    assert int(np.argmin(unlike)) == 7
    stored = pq.read_table(next((tmp_path / "second").glob("data/*/*.parquet")))["action"].to_pylist()
    np.testing.assert_array_equal(stored, action)  # as float64, which samples are not


def test_what_others_have_written_of_each_episode_is_not_lost_without_a_word(tmp_path, caplog):
    root = shutil.copytree(GOLDEN / "lerobot_v30/image", tmp_path / "set")
    file = next((root / "meta/episodes").rglob("*.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.append_column("operator", pa.array(["Ann"] * len(table))), file)
    with caplog.at_level("WARNING", "openpi"):
        split(LeRobotMetadata.load(root), {tmp_path / "part": [0]})
    assert "'operator' of meta/episodes" in caplog.text


def test_datasets_of_two_codecs_are_merged_into_files_of_their_own(tmp_path):
    camera = {"dtype": "video", "shape": (32, 48, 3), "names": ["height", "width", "channel"]}
    features = {"top": camera, "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]}}
    for codec in ("h264", "av1"):
        with LeRobotWriter(tmp_path / codec, fps=10, features=features, video_codec=codec) as writer:
            writer.add_episode({"top": np.stack(moving(6)), "action": np.ones((6, 2), np.float32)}, codec)
    merge([LeRobotMetadata.load(tmp_path / codec) for codec in ("h264", "av1")], tmp_path / "both")
    both = LeRobotDataset(tmp_path / "both")
    assert_same_samples(both, LeRobotDataset(tmp_path / "h264"), range(6))
    assert_same_samples(both, LeRobotDataset(tmp_path / "av1"), range(6), into=6)
    assert set(both.metadata.tasks.values()) == {"h264", "av1"}


def test_datasets_that_differ_are_not_merged_and_nothing_is_left(tmp_path):
    roots = [GOLDEN / "lerobot_v30/image", GOLDEN / "lerobot_v30/video"]
    with pytest.raises(ValueError, match=r"cannot be in one dataset: .*mixture"):
        merge([LeRobotMetadata.load(each) for each in roots], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rates", "hint"), [((30, 20), r"leaving out frames \(--fps 10\)"), ((30, 29.97), "only some have")]
)
def test_a_merge_of_two_rates_says_what_brings_them_to_one(rates, hint, tmp_path):
    (tmp_path / "sets").mkdir()
    for rate in rates:
        with LeRobotWriter(tmp_path / f"sets/{rate}", fps=rate, features=NUMBERS) as writer:
            writer.add_episode({"state": np.zeros((2, 1), np.float32)}, "t")
    metadatas = [LeRobotMetadata.load(tmp_path / f"sets/{rate}") for rate in rates]
    with pytest.raises(ValueError, match=hint) as refused:
        merge(metadatas, tmp_path / "out")
    assert ("--fps" in str(refused.value)) == (rates == (30, 20))


def test_datasets_are_merged_on_request_without_what_only_some_have(tmp_path):
    for name, features in {"a": NUMBERS, "b": {**NUMBERS, "effort": NUMBERS["state"]}}.items():
        with LeRobotWriter(tmp_path / name, fps=10, features=features) as writer:
            writer.add_episode({key: np.ones((2, 1), np.float32) for key in features}, name)
    code, _, log = call("dataset", "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    assert code == 1 and "'effort' is only in one of them" in log and "--common" in log
    code, _, log = call("dataset", "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both", "--common")
    both = LeRobotDataset(tmp_path / "both")
    assert code == 0 and len(both) == 4 and "effort" not in both.metadata.features
    assert "left out: 'effort', which not all of these datasets have" in log


def test_a_column_that_a_file_lacks_is_left_out_of_copies_and_told(tmp_path, caplog):
    """As of sets that were put together by hand: they train, as nobody reads it."""
    root = shutil.copytree(GOLDEN / "lerobot_v21/image", tmp_path / "set")
    file = root / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["state"]), file)
    metadata, whole = LeRobotMetadata.load(root), LeRobotDataset(GOLDEN / "lerobot_v21/image")
    split(metadata, {tmp_path / "all": [0, 1, 2], tmp_path / "others": [0, 2]})
    assert "left out: 'state', a column that 1 of the 3 data files lack" in caplog.text
    assert "state" not in LeRobotMetadata.load(tmp_path / "all").features
    np.testing.assert_array_equal(LeRobotDataset(tmp_path / "all").column("actions"), whole.column("actions"))
    assert "state" in LeRobotMetadata.load(tmp_path / "others").features
    merge([metadata, LeRobotMetadata.load(tmp_path / "all")], tmp_path / "both")
    assert len(LeRobotDataset(tmp_path / "both").episodes) == 6
    code, _, log = call(
        "dataset", "shrink", root, tmp_path / "small", "--size", "28x28", "--codec", "images", "--workers", 0
    )
    assert code == 0, log


def test_a_damaged_dataset_leaves_nothing_half_written(tmp_path):
    shutil.copytree(GOLDEN / "lerobot_v21/video", tmp_path / "set")
    videos = sorted((tmp_path / "set/videos").rglob("*.mp4"))
    content = videos[-1].read_bytes()
    (tmp_path / "out").mkdir()
    videos[-1].write_bytes(content[: len(content) // 2])
    code, _, log = call("dataset", "split", tmp_path / "set", f"{tmp_path}/out/part=rest")
    advised = re.search(
        r"leave it out with (--data.exclude-episodes 2) \(of training, or `openpi dataset split`\)", log
    )
    assert code == 1 and advised is not None
    assert list((tmp_path / "out").iterdir()) == []
    _, _, log = call("dataset", "merge", tmp_path / "set", GOLDEN / "lerobot_v21/video", "--output", tmp_path / "both")
    assert advised[0] in log
    assert call("dataset", "split", tmp_path / "set", f"{tmp_path}/out/part=rest", *advised[1].split())[0] == 0


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"a": [3, 1], "b": "rest"}, {"a": [1, 3], "b": [0, 2, 4, 5, 6, 7, 8, 9]}),
        ({"a": 1.0}, {"a": list(range(10))}),
    ],
)
def test_episodes_are_divided_by_list_share_and_rest(parts, expected):
    assert divide(range(10), parts) == expected


def test_shares_leave_nobody_out_and_give_nobody_twice():
    parts = divide(range(10), {"a": 0.5, "b": [0], "c": 0.25, "d": "rest"}, seed=3)
    assert sorted(number for part in parts.values() for number in part) == list(range(10))
    assert [len(parts[name]) for name in "abcd"] == [4, 1, 3, 2]
    assert divide(range(10), {"a": 0.5}, seed=4) != divide(range(10), {"a": 0.5}, seed=3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": [10]}, r"episodes \[10\] are not there"),
        ({"a": [1], "b": [1]}, r"episodes \[1\] are in two parts"),
        ({"a": 0.7, "b": 0.7}, "the shares are 1.4"),
        ({"a": 0.01}, "a gets no episode"),
        ({"a": 1.0, "b": "rest"}, "b gets no episode"),
    ],
)
def test_what_cannot_be_divided_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        divide(range(10), parts)


def test_split_leaves_out_by_condition_and_writes_over_nothing(tmp_path):
    root = GOLDEN / "lerobot_v30/image"
    code, _, _ = call("dataset", "split", root, f"{tmp_path}/good=rest", "--exclude-where", "length < 25")
    assert code == 0
    assert [e.length for e in LeRobotMetadata.load(tmp_path / "good").episodes] == [37, 30]
    code, _, log = call("dataset", "split", root, f"{tmp_path}/good=rest")
    assert code == 1 and "exists; name a new folder" in log


# --- shrink ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def measured_shortly(monkeypatch):
    monkeypatch.setattr("openpi.convert.shrinking._SPEED_S", 0.05)


def test_shrunk_images_are_the_pixels_that_a_model_would_have_seen(tmp_path):
    root = GOLDEN / "lerobot_v30/converted_video"
    code, out, log = call(
        "dataset", "shrink", root, tmp_path / "small", "--size", "28x28", "--codec", "images", "--workers", 0
    )
    assert code == 0, log
    small, whole = LeRobotDataset(tmp_path / "small"), LeRobotDataset(root)
    assert len(small) == len(whole)
    for row in (0, 40, len(whole) - 1):
        for key in whole.metadata.camera_keys:
            np.testing.assert_array_equal(small[row][key], resize_with_pad(whole[row][key], 28, 28))
            assert f"{key}: no pixel differs" in out
        assert small[row]["task"] == whole[row]["task"]
    for key in whole.metadata.column_keys:
        if key not in ("task_index", "timestamp"):
            np.testing.assert_array_equal(small.column(key), whole.column(key))
    assert "samples/s of one thread" in out and "bytes: " in out


def test_a_shrunk_set_has_a_slower_rate_on_request(tmp_path):
    root = GOLDEN / "lerobot_v30/image"  # 10 Hz, episodes of 23, 37 and 30 frames
    words = ("dataset", "shrink", root, tmp_path / "slow", "--size", "28x28", "--codec", "images", "--workers", 0)
    code, out, log = call(*words, "--fps", 5)
    assert code == 0, log
    assert "one frame of 2 is kept, with the action that was recorded with it" in log
    slow, whole = LeRobotDataset(tmp_path / "slow"), LeRobotDataset(root)
    assert slow.metadata.fps == 5 and [episode.length for episode in slow.episodes] == [12, 19, 15]
    np.testing.assert_allclose(slow.column("timestamp")[:13], [*(0.2 * np.arange(12)), 0], rtol=1e-6)
    for row, expected in ((0, 0), (11, 22), (12, 23), (45, 88)):
        np.testing.assert_array_equal(slow.column("actions")[row], whole.column("actions")[expected])
        for key in whole.metadata.camera_keys:
            np.testing.assert_array_equal(slow[row][key], resize_with_pad(whole[expected][key], 28, 28))
            assert f"{key}: no pixel differs" in out
    for rate in (20, 4, 0):
        code, _, log = call(*words, "--fps", rate)
        assert code == 1 and f"--fps is {rate}, and the dataset has 10; expected a whole part of it: 5, 3.33333" in log


def test_a_shrunk_set_keeps_all_digits_and_kinds_of_its_columns(tmp_path):
    """A clock in float64 came out in steps of 128 s."""
    clock = 1_700_000_000.7 + 0.1 * np.arange(6)
    features = {
        "top": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]},
        "clock": {"dtype": "float64", "shape": (1,), "names": None},
        "grade": {"dtype": "int32", "shape": (1,), "names": None},
    }
    with LeRobotWriter(tmp_path / "set", fps=10, features=features) as writer:
        grades = np.arange(6, dtype=np.int32)[:, None]
        pictures = np.zeros((6, 32, 32, 3), np.uint8)
        writer.add_episode({"top": pictures, "clock": clock[:, None], "grade": grades}, "")
    code, _, log = call(
        "dataset",
        "shrink",
        tmp_path / "set",
        tmp_path / "small",
        "--size",
        "28x28",
        "--codec",
        "images",
        "--workers",
        0,
    )
    assert code == 0 and "1 of 1 recordings say no task" in log, log
    small = LeRobotMetadata.load(tmp_path / "small")
    assert [small.features[key]["dtype"] for key in ("clock", "grade")] == ["float64", "int32"]
    stored = pq.read_table(next((tmp_path / "small" / "data").rglob("*.parquet")))["clock"].to_pylist()
    np.testing.assert_array_equal(np.ravel(stored), clock)


def test_a_shrunk_set_says_what_the_codec_lost_and_which_episodes_it_took(tmp_path):
    root = GOLDEN / "lerobot_v30/image"
    words = ("--size", "32x32", "--codec", "h264", "--exclude-episodes", "1", "--workers", 0)
    code, out, log = call("dataset", "shrink", root, tmp_path / "small", *words)
    assert code == 0, log
    small, whole = LeRobotDataset(tmp_path / "small"), LeRobotDataset(root)
    assert [e.length for e in small.episodes] == [23, 30]
    key = small.metadata.camera_keys[0]
    error = np.square(small[23][key].astype(float) - resize_with_pad(whole[60][key], 32, 32)).mean()
    assert error > 0
    assert f"{key}: PSNR" in out
    assert small.metadata.features[key]["info"]["video.codec"] == "h264"


def test_shrinking_goes_on_after_a_stop_and_leaves_no_dataset_before_it_is_whole(tmp_path, monkeypatch):
    from openpi.convert import engine

    root = GOLDEN / "lerobot_v30/image"
    words = ("dataset", "shrink", root, tmp_path / "small", "--size", "28x28", "--codec", "images", "--workers", 0)
    prepare, done = engine.prepare, []

    def stopped(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.ref.name)
        return prepare(job)

    monkeypatch.setattr(engine, "prepare", stopped)
    assert call(*words)[0] == 130
    assert not (tmp_path / "small").exists()
    monkeypatch.setattr(engine, "prepare", prepare)
    code, _, _ = call(*words)
    assert code == 0 and len(LeRobotDataset(tmp_path / "small")) == 90
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "7x7"), "is no size"),
        (("--size", "224"), "is no size"),
        (("--codec", "mpeg2"), "invalid choice"),
    ],
)
def test_sizes_and_codecs_that_are_none_are_a_bad_command_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["dataset", "shrink", str(GOLDEN / "lerobot_v30/image"), str(tmp_path / "small"), *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# --- info -----------------------------------------------------------------------------------------------------


def test_info_tells_a_dataset_in_numbers():
    root = GOLDEN / "lerobot_v30/image"
    code, out, _ = call("dataset", "info", root, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["num_episodes"], told["num_frames"], told["fps"]) == (3, 90, 10)
    assert told["length"] == {"min": 23, "median": 30.0, "max": 37}
    assert told["features"]["state"]["shape"] == [8]
    assert sum(told["tasks"].values()) >= 3
    code, out, _ = call("dataset", "info", root)
    assert code == 0 and "3 episodes, 90 frames at 10 Hz" in out and "wrist_image" in out
    assert call("dataset", "info", root / "nothing")[0] == 1


def test_of_thousands_of_tasks_some_are_listed(tmp_path):
    with LeRobotWriter(tmp_path / "set", fps=10, features={"a": {"dtype": "float32", "shape": (1,)}}) as writer:
        for number in range(60):
            writer.add_episode({"a": np.zeros((2, 1), np.float32)}, f"task {number}")
    _, out, _ = call("dataset", "info", tmp_path / "set")
    assert out.count("1 episodes: 'task ") == 50 and "and 10 tasks more" in out
    assert len(json.loads(call("dataset", "info", tmp_path / "set", "--json")[1])["tasks"]) == 60


def test_a_dataset_is_never_shrunk_onto_itself(tmp_path):
    shutil.copytree(GOLDEN / "lerobot_v30/image", tmp_path / "set")
    code, _, log = call("dataset", "shrink", tmp_path / "set", tmp_path / "set", "--overwrite")
    assert code == 1 and "is the dataset itself" in log
    assert len(LeRobotDataset(tmp_path / "set")) == 90


# --- view -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def viewed():
    """A running server, with two findings of its dataset."""
    found = [
        Finding("anomalies.jump", Severity.ERROR, "a jump of 2.5 rad", episode=1, frames=(5, 9), column="state"),
        Finding("metadata.totals", Severity.WARNING, "<img src=x onerror=alert(1)>"),
    ]
    server = open_server(Pages(LeRobotDataset(GOLDEN / "lerobot_v30/image"), found))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_view_shows_what_can_be_opened_and_a_split_takes_the_flag_of_the_message(tmp_path, capsys):
    """Who hears that a file is damaged wants to look at the others, and pastes what the message says."""
    root = Path(shutil.copytree(GOLDEN / "lerobot_v21/video", tmp_path / "cut"))
    video = next(root.rglob("episode_000001.mp4"))
    video.write_bytes(video.read_bytes()[:900])
    assert [episode.index for episode in shown(root).episodes] == [0, 2]
    assert capsys.readouterr().err.startswith("not shown: episode 1, observation.images.")
    words = ["--data.exclude-episodes", "1"]
    assert main(["dataset", "split", str(root), f"{tmp_path / 'rest'}=rest", *words]) == 0
    assert len(LeRobotDataset(tmp_path / "rest").episodes) == 2


def test_a_large_dataset_is_shown_without_looking_for_faults_first(monkeypatch):
    monkeypatch.setattr(runner, "_MAX_EPISODES", 2)
    monkeypatch.setattr(runner, "readable", None)
    assert len(shown(GOLDEN / "lerobot_v30/image").episodes) == 3


def test_the_view_gives_signals_findings_and_the_very_frames_of_the_dataset(viewed):
    whole = LeRobotDataset(GOLDEN / "lerobot_v30/image")
    overview = json.loads(fetch(f"{viewed}/dataset.json")[1])
    assert [each["length"] for each in overview["episodes"]] == [23, 37, 30]
    assert overview["episodes"][1]["codes"] == ["anomalies.jump"]
    episode = json.loads(fetch(f"{viewed}/episode/1.json")[1])
    state = next(signal for signal in episode["signals"] if signal["key"] == "state")
    np.testing.assert_allclose(np.transpose(state["values"]), whole.column("state")[23:60], atol=1e-6)
    assert [finding["code"] for finding in episode["findings"]] == ["anomalies.jump", "metadata.totals"]
    camera = overview["cameras"].index("wrist_image")
    picture = np.asarray(Image.open(io.BytesIO(fetch(f"{viewed}/frame/{camera}/1/7.jpg")[1])))
    assert np.abs(picture.astype(int) - whole[30]["wrist_image"]).mean() < 12


@pytest.mark.parametrize("path", ["/episode/3.json", "/frame/9/0/0.jpg", "/frame/0/0/23.jpg", "/../etc/passwd", "/x"])
def test_pages_that_are_not_there_are_not_found(path, viewed):
    assert fetch(viewed + path)[0] == 404


def test_other_pages_do_not_reach_the_view_under_names_of_their_own(viewed):
    assert fetch(f"{viewed}/dataset.json", Host="evil.example:80")[0] == 403


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_a_browser_shows_pictures_signals_and_findings_of_the_episode_asked_for(viewed, tmp_path):
    shot = Path(os.environ.get("OPENPI_SCREENSHOT", tmp_path / "view.png"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,1200"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]
    command += [f"--screenshot={shot}", "--dump-dom", f"{viewed}/#1/7"]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shot.stat().st_size > 20_000
    for words in ("frame 7 of 37", "frame/0/1/7.jpg", "anomalies.jump", "polyline", 'class="marked"'):
        assert words in dump
    assert "<img src=x" not in dump and "&lt;img src=x" in dump
    assert re.search(r'class="plot"><small>-?[\d.]+</small><small>-?[\d.]+</small>', dump)  # the range of the axis


_SLOW_FIRST = """<script>
const told = (i) => {
  const signal = { key: "s", names: ["s"], values: [[i, i]] };
  return { length: 2, tasks: [`task ${i}`], findings: [], signals: [signal] };
};
const episodes = [0, 1, 2].map((i) => ({ index: i, length: 2, codes: [] }));
window.fetch = async (name) => ({ json: async () => {
  if (name === "dataset.json") return { name: "d", fps: 10, cameras: [], others: ["skin [16, 16]"], episodes };
  const i = Number(/\\d+/.exec(name)[0]);
  await new Promise((done) => setTimeout(done, i === 1 ? 1500 : 100));
  return told(i);
} });
setTimeout(() => { by("next").onclick(); by("next").onclick(); }, 1000);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_an_episode_that_comes_late_is_not_shown_beside_the_pictures_of_another(tmp_path):
    (tmp_path / "page.html").write_text(
        page().replace('<script>\n"use strict"', f'{_SLOW_FIRST}<script>\n"use strict"')
    )
    dump = dom(tmp_path, f"file://{tmp_path}/page.html")
    assert '<p id="task">task 2</p>' in dump and "<small>2</small>" in dump
    assert "without curves: skin [16, 16]</p>" in dump


def test_signals_are_shown_in_full_precision_whatever_their_unit(tmp_path):
    feature = {"dtype": "float32", "shape": [1], "names": ["meganewton"]}
    skin = {"dtype": "float32", "shape": [100], "names": None}
    forces = np.array([[1.5e-8], [-3e-9]], np.float32)
    with LeRobotWriter(tmp_path / "set", fps=10, features={"force": feature, "skin": skin}) as writer:
        writer.add_episode({"force": forces, "skin": np.zeros((2, 100), np.float32)}, "push")
    pages = Pages(LeRobotDataset(tmp_path / "set"), [])
    assert json.loads(pages.get("/dataset.json")[2])["others"] == ["skin [100]"]
    [signal] = json.loads(pages.get("/episode/0.json")[2])["signals"]
    np.testing.assert_array_equal(np.float32(signal["values"]), forces.T)
