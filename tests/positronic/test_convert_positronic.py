"""Positronic's recordings to LeRobot datasets: what training reads is what was recorded, and no run loses anything."""

import dataclasses
import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st

import forked
import packed_arrays
from openpi.cli.main import main
from openpi.convert import engine, episode_work
from openpi.convert.episode_work import Options
from openpi.convert.sampling import instants
from openpi.convert.source import Numbers
from openpi.convert.work_folder import WorkFolder
from openpi.data.lerobot.reader import LeRobotDataset
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.codec import Codec
from openpi_positronic.conversion import PositronicRecordings
from openpi_positronic.raw_episodes import RawDataset, RawDatasetWriter
from positronic import to_lerobot

MAX_GREY_LEVELS = 6  # mean over an image that went through two lossy encoders


@pytest.fixture
def raw(golden, tmp_path) -> Path:
    """A copy of the recordings, which a test may change."""
    return Path(shutil.copytree(golden / "positronic_raw" / "dataset", tmp_path / "raw"))


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory) -> Path:
    """By two processes, from the command line."""
    folder = tmp_path_factory.mktemp("converted")
    command = [sys.executable, "-m", "openpi.cli.main", "convert", "positronic"]
    command += [golden / "positronic_raw" / "dataset", folder / "ee", "--workers", "2"]
    forked.run(command, preloads=("openpi_positronic.conversion",), check=True, capture_output=True)
    assert [path.name for path in folder.iterdir()] == ["ee"]
    return folder / "ee"


def convert(raw: Path, output: Path, codec: str | Codec, fps: float | None = None, **options) -> Path:
    """In this process."""
    return engine.convert(PositronicRecordings(raw, codec, fps), output, Options(**options), num_workers=0)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_recordings_of_newer_releases_have_the_same_signals_under_newer_names(raw, tmp_path):
    source = PositronicRecordings(raw)
    expected = source.read(source.episodes()[0]).columns["action"]
    assert isinstance(expected, Numbers)
    for path in raw.rglob("robot_commands.*"):
        path.rename(path.with_name(path.name.replace("robot_commands.", "robot_command.")))
    dataset = convert(raw, tmp_path / "set", "ee", use_videos=False, episodes=(0,))
    np.testing.assert_array_equal(LeRobotDataset(dataset).column("action"), expected.values)


def test_the_dataset_has_what_the_codec_derives(golden, converted):
    vectors = packed_arrays.load(golden / "codecs" / "packed", "current/ee")
    described = json.loads((golden / "codecs" / "current" / "ee.json").read_text())
    dataset = LeRobotDataset(converted)
    features = {key: feature for key, feature in dataset.metadata.features.items() if "." in key or key == "action"}
    for key, feature in described["training_meta"]["lerobot_features"].items():
        assert {name: features[key][name] for name in feature} == feature
    assert dataset.metadata.fps == 15
    for number, (begin, end) in enumerate(dataset.episode_bounds):
        expected = described["training"][str(number)]
        assert end - begin == expected["n_frames"]
        assert dataset[int(begin)]["task"] == expected["task"]
        for key in ("observation.state", "action"):
            np.testing.assert_allclose(dataset.column(key)[begin:end], vectors[f"train/{number}/{key}"], atol=1e-6)
    begin, end = dataset.episode_bounds[0]
    for key in ("observation.images.left", "observation.images.side"):
        frames = vectors[f"train/0/{key}/frames_0_1_last"]
        for row, frame in zip((begin, begin + 1, end - 1), frames, strict=True):
            assert np.abs(dataset[int(row)][key].astype(float) - frame).mean() < MAX_GREY_LEVELS


def test_images_are_stored_exactly_and_the_number_of_processes_changes_nothing(golden, tmp_path):
    source = PositronicRecordings(golden / "positronic_raw" / "dataset")
    recorded = packed_arrays.load(golden / "codecs" / "packed", "current/ee")
    for workers in (0, 2):
        engine.convert(source, tmp_path / str(workers), Options(use_videos=False), num_workers=workers)
    alone, together = LeRobotDataset(tmp_path / "0"), LeRobotDataset(tmp_path / "2")
    for i in range(len(alone)):
        for key in ("observation.images.left", "observation.state", "action"):
            np.testing.assert_array_equal(alone[i][key], together[i][key])
    expected = recorded["train/0/observation.images.side/frames_0_1_last"]
    assert np.abs(alone[0]["observation.images.side"].astype(int) - expected[0]).max() <= 3


@pytest.mark.parametrize(
    "codec", ["ee_joints", "ee_traj", "ee_joints_traj", "joints_traj", "eepose_absolute", "joints"]
)
def test_every_codec_with_an_action_converts(golden, tmp_path, codec):
    fps = None if codec in ("ee_joints", "ee_traj", "ee_joints_traj", "joints_traj") else 15
    convert(golden / "positronic_raw" / "dataset", tmp_path / "set", codec, fps, episodes=(0,))
    folder = "current" if fps is None else "legacy"
    expected = packed_arrays.load(golden / "codecs" / "packed", f"{folder}/{codec}")
    dataset = LeRobotDataset(tmp_path / "set")
    for key in ("observation.state", "action"):
        np.testing.assert_allclose(dataset.column(key), expected[f"train/0/{key}"], atol=1e-6)


@given(start=st.integers(0, 2 * 10**18), length=st.integers(1, 10**12), fps=st.integers(1, 240))
def test_times_are_exact_whatever_the_clock(start, length, fps):
    times = instants([np.array([start, start + length])], fps)
    assert len(times) == -(-length * fps // 10**9)
    assert set(np.diff(times).tolist()) <= {10**9 // fps}
    assert times[0] == start and times[-1] < start + length


def record(root: Path, **signals: tuple[int, list]) -> Path:
    """An episode, of each signal its first nanosecond and its values, 50 ms apart."""
    with RawDatasetWriter(root).new_episode() as episode:
        for name, (start_ns, values) in signals.items():
            for i, value in enumerate(values):
                episode.append(name.replace("__", "."), value, start_ns + 50_000_000 * i)
    return episode.path


@pytest.mark.parametrize("rate", [Fraction(15, 2), Fraction(25, 2), 100])
def test_pictures_are_those_of_their_rows_whatever_the_rate_of_their_video(rate, tmp_path):
    greys = [np.full((16, 16, 3), 2 * i, np.uint8) for i in range(60)]
    path = record(tmp_path, image__wrist=(0, greys))
    with av.open(str(path / "image.wrist.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=rate, options={"crf": "0"}, width=16, height=16, pix_fmt="yuv444p")
        for grey in greys:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        video.mux(stream.encode())
    found = RawDataset(tmp_path)[0].signal("image.wrist").values(np.arange(60))[:, 0, 0, 0]
    np.testing.assert_allclose(found.astype(int), 2 * np.arange(60), atol=1)


@pytest.mark.parametrize(("joints_ns", "words"), [(10**9, "'robot_state.q' are of 1.0"), (10**18, "'image.")])
def test_a_signal_of_another_clock_is_no_part_of_the_episode(joints_ns, words, tmp_path, capsys):
    """Its last value would be in all frames; a gripper that was told once holds."""
    grey = [np.full((16, 16, 3), i, np.uint8) for i in range(20)]
    joints = [np.full(7, i) for i in range(20)]
    cameras = dict.fromkeys(("image__wrist", "image__exterior"), (10**10, grey))
    command = ["convert", "positronic", str(tmp_path / "raw"), str(tmp_path / "set"), "--codec", "joints_traj"]
    record(tmp_path / "raw", robot_state__q=(joints_ns, joints), grip=(0, [1.0]), **cameras)
    assert main([*command, "--workers", "0"]) == 1
    assert words in capsys.readouterr().err
    shutil.rmtree(tmp_path / "raw")
    record(tmp_path / "raw", robot_state__q=(10**10, joints), grip=(0, [1.0]), **cameras)
    assert main([*command, "--workers", "0"]) == 0


@pytest.mark.parametrize(("said", "code"), [(None, 0), (["pick", "place"], 1)])
def test_a_task_that_is_no_text_becomes_no_prompt(said, code, raw, tmp_path, capsys):
    path = RawDataset(raw).paths[0] / "static.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": said}))
    command = ["convert", "positronic", str(raw), str(tmp_path / "set"), "--workers", "0"]
    assert main(command) == code
    told = capsys.readouterr().err
    assert ("its 'task' is" if code else "recordings say no task") in told


def test_times_that_go_back_are_refused_where_they_are_unsigned_too(tmp_path):
    path = record(tmp_path, grip=(0, [0.0, 1.0, 2.0])) / "grip.parquet"
    stamps = pa.array([0, 200, 100], pa.uint64())
    pq.write_table(pa.table({"timestamp": stamps, "value": [0.0, 1.0, 2.0]}), path)
    with pytest.raises(ValueError, match="does not increase at row 2"):
        RawDataset(tmp_path)[0].signal("grip").values([0])


def test_no_frame_is_decoded_twice(golden, monkeypatch, tmp_path):
    from openpi.data.lerobot.video import VideoFile

    decoded = []
    original = VideoFile.frame
    monkeypatch.setattr(
        VideoFile, "frame", lambda self, number: decoded.append((id(self), number)) or original(self, number)
    )
    # More than the cameras give.
    convert(golden / "positronic_raw" / "dataset", tmp_path / "set", "ee", fps=60, episodes=(0,))
    assert len(decoded) == len(set(decoded)) > 0


@dataclasses.dataclass(frozen=True)
class Described(Codec):
    """The action, as a codec of one's own describes it."""

    described: str
    value: object

    @property
    def training_meta(self):
        feature = {"dtype": "float32", "shape": [8], "names": None, self.described: self.value}
        return {"lerobot_features": {"action": feature}}

    def training(self, signals):
        return {"action": get_codec("ee").training(signals)["action"]}


@pytest.mark.parametrize(
    ("described", "value", "words"),
    [("dtype", "int64", "has dtype float32, expected int64"), ("shape", [7], r"shape \(8,\), expected \(7,\)")],
)
def test_what_a_codec_describes_otherwise_than_it_is_is_refused_and_nothing_is_cut(
    described, value, words, raw, tmp_path
):
    with pytest.raises(ValueError, match=words):
        convert(raw, tmp_path / "set", Described(described, value), fps=15)


def test_features_are_what_the_codec_describes(raw, tmp_path):
    convert(raw, tmp_path / "set", Described("names", [f"a{i}" for i in range(8)]), fps=7.5)
    metadata = LeRobotDataset(tmp_path / "set").metadata
    assert (metadata.features["action"]["names"][7], metadata.fps) == ("a7", 7.5)


def test_a_preview_shows_what_both_commands_would_write(raw, tmp_path, capsys, monkeypatch):
    assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "episode 000000000000/000000000000, the first of 3: 24 frames at 15 Hz" in shown
    assert "action                   float32 [8]  <- robot_commands.pose, target_grip" in shown
    where = [f"--dataset.dataset.path={raw}", f"--output_dir={tmp_path / 'set'}", "--dry_run=True"]
    monkeypatch.setattr(sys, "argv", ["positronic-to-lerobot", "convert", "--dataset.dataset=.local", *where])
    to_lerobot.main()
    assert capsys.readouterr().out == shown
    assert names(tmp_path) == ["raw"]


def test_a_task_for_all_replaces_those_of_the_recordings_and_is_one_text(raw, tmp_path):
    task = "x" * 24  # as many letters as the episode has frames
    assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), "--task", task, "--workers", "0"]) == 0
    assert dict(LeRobotDataset(tmp_path / "set").metadata.tasks) == {0: task}


# --- stopped, continued, appended ---------------------------------------------------------------------------


def test_a_stopped_conversion_goes_on_where_it_was(raw, tmp_path, capsys, monkeypatch):
    video = RawDataset(raw).paths[1] / "image.wrist.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    command = ["convert", "positronic", str(raw), str(tmp_path / "set"), "--workers", "0"]
    assert main(command) == 1
    assert "image.wrist.mp4" in capsys.readouterr().err
    assert names(tmp_path) == [".set.converting", "raw"]  # no dataset, and no half of one
    prepared = [path for path in (tmp_path / ".set.converting").iterdir() if path.is_dir()]
    made = [path.stat().st_mtime_ns for path in prepared]
    video.write_bytes(whole)
    seen = []
    original = episode_work.prepare_episode

    def counted(*args, **kwargs):
        seen.append(kwargs["folder"])
        assert [path.stat().st_mtime_ns for path in prepared] == made
        return original(*args, **kwargs)

    monkeypatch.setattr(episode_work, "prepare_episode", counted)
    assert main(command) == 0
    assert (len(prepared), len(seen)) == (2, 1)
    assert names(tmp_path) == ["raw", "set"]
    assert len(LeRobotDataset(tmp_path / "set").metadata.episodes) == 3


def test_what_was_prepared_for_other_options_or_of_another_recording_is_not_used(raw, tmp_path):
    video = RawDataset(raw).paths[1] / "image.wrist.mp4"
    whole = video.read_bytes()
    video.write_bytes(b"")
    assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), "--workers", "0"]) == 1
    video.write_bytes(whole)
    grip = RawDataset(raw).paths[0] / "grip.parquet"
    shutil.copyfile(RawDataset(raw).paths[0] / "target_grip.parquet", grip)
    options = ["--codec", "joints_traj", "--fps", "10", "--workers", "0"]
    assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), *options]) == 0
    fresh = convert(raw, tmp_path / "fresh", "joints_traj", fps=10)
    found, expected = LeRobotDataset(tmp_path / "set"), LeRobotDataset(fresh)
    np.testing.assert_array_equal(found.column("observation.state"), expected.column("observation.state"))


def test_a_camera_that_died_and_a_task_that_nobody_said_are_told(tmp_path, capsys):
    with RawDatasetWriter(tmp_path / "raw").new_episode() as episode:
        for i in range(45):
            for name in ("image.wrist", "image.exterior") if i < 6 else ("image.wrist",):
                episode.append(name, np.full((16, 16, 3), 5 * i, np.uint8), 66_666_667 * i)
            for name, value in {"robot_state.q": np.ones(7), "grip": 1.0}.items():
                episode.append(name, value, 66_666_667 * i)
    assert main(["convert", "positronic", str(tmp_path / "raw"), str(tmp_path / "set"), "--codec", "joints_traj"]) == 0
    told = capsys.readouterr().err
    assert "'image.exterior' has no new picture for 2.6 s from 0.3 s on" in told and "image.wrist" not in told
    assert "1 of 1 recordings say no task" in told


def test_what_was_prepared_by_a_codec_before_it_was_corrected_is_not_used(raw, tmp_path):
    lines = """import dataclasses
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.codec import Codec

@dataclasses.dataclass(frozen=True)
class Scaled(Codec):
    def training(self, signals):
        return {**signals, "action": signals["action"].map(lambda values: values * SCALE)}

def codec():
    return get_codec("joints_traj", fps=10) | Scaled()
"""
    file, command = tmp_path / "codec_of_a_user.py", ["convert", "positronic", str(raw), str(tmp_path / "set")]
    command += ["--codec", f"{file}:codec", "--workers", "0"]
    video = RawDataset(raw).paths[1] / "image.wrist.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    file.write_text(lines.replace("SCALE", "1.0"))
    assert main(command) == 1
    video.write_bytes(whole)
    file.write_text(lines.replace("SCALE", "1000.0"))
    del sys.modules["codec_of_a_user"]
    assert main(command) == 0
    plain = convert(raw, tmp_path / "plain", "joints_traj", fps=10)
    found, expected = LeRobotDataset(tmp_path / "set"), LeRobotDataset(plain)
    np.testing.assert_allclose(found.column("action"), 1000 * expected.column("action"), rtol=1e-6)


def test_recordings_are_appended_once(raw, converted, tmp_path, capsys):
    root = Path(shutil.copytree(converted, tmp_path / "set"))
    with RawDatasetWriter(raw).new_episode() as writer:
        for i in range(60):
            stamp = i * 20_000_000
            writer.append("robot_state.ee_pose", np.arange(7.0) + i, stamp)
            writer.append("robot_commands.pose", np.arange(7.0) - i, stamp)
            writer.append("grip", i / 60, stamp)
            writer.append("target_grip", 1 - i / 60, stamp)
            for name in ("wrist", "exterior"):
                writer.append(f"image.{name}", np.full((48, 64, 3), 4 * i, np.uint8), stamp)
        writer.set_static("task", "a new task")
    (told,) = root.glob("run_metadata_*")
    entries = json.loads(told.read_text())["episodes"]
    told.write_text(json.dumps({"codec": "c", "recordings": [{"id": entry["id"]} for entry in entries]}))  # as before
    before = contents(root)
    command = ["convert", "positronic", str(raw), str(root), "--append", "--workers", "0"]
    assert main(command) == 1
    assert "3 of 4 recordings are in" in capsys.readouterr().err
    assert contents(root) == before
    new = tmp_path / "new" / "000000000000"
    new.mkdir(parents=True)
    shutil.move(writer.path, new / writer.path.name)
    command[2] = str(tmp_path / "new")
    assert main(command) == 0
    dataset = LeRobotDataset(root)
    assert len(dataset.metadata.episodes) == 4
    sample = dataset[int(dataset.episode_bounds[3, 0])]
    assert sample["task"] == "a new task"
    np.testing.assert_array_equal(sample["observation.state"], [*np.arange(7.0), 0])
    assert len(list(root.glob("append_metadata_*.yaml"))) == 1
    assert main(command) == 1
    assert main([*command, "--repeat"]) == 0
    assert len(LeRobotDataset(root).metadata.episodes) == 5
    assert "other options" not in capsys.readouterr().err
    assert main([*command, "--repeat", "--codec", "ee_traj"]) == 0  # the same columns, and other actions in them
    assert "was converted with other options" in capsys.readouterr().err
    assert main([*command, "--repeat", "--fps", "10"]) == 1
    assert "15 frames per second" in capsys.readouterr().err
    assert main([*command, "--repeat", "--codec", "ee_joints"]) == 1
    assert "lacks robot_state.q" in capsys.readouterr().err


def test_copies_of_recordings_are_told(raw, tmp_path, caplog):
    shutil.copytree(raw, tmp_path / "all" / "set")
    convert(tmp_path / "all", tmp_path / "one", "ee", use_videos=False)
    assert "copies" not in caplog.text
    shutil.copytree(raw / "000000000000" / "000000000001", tmp_path / "all/set_old/000000000000/000000000001")
    convert(tmp_path / "all", tmp_path / "two", "ee", use_videos=False)
    assert "1 of 4 recordings are copies of others" in caplog.text and "set_old" in caplog.text


def test_two_conversions_do_not_write_one_dataset(raw, tmp_path, capsys):
    with WorkFolder(tmp_path / "set"):
        assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), "--workers", "0"]) == 1
    assert "another conversion is writing" in capsys.readouterr().err


def test_an_existing_dataset_is_not_touched_without_being_asked(raw, converted, tmp_path, capsys):
    root = Path(shutil.copytree(converted, tmp_path / "set"))
    before = contents(root)
    assert main(["convert", "positronic", str(raw), str(root), "--workers", "0"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert contents(root) == before
    assert (
        main(["convert", "positronic", str(raw), str(root), "--overwrite", "--codec", "ee_traj", "--workers", "0"]) == 0
    )
    assert contents(root) != before


# --- what cannot be converted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--codec", "droid"], "inference only"),
        (["--codec", "openpi_positronic", "--fps", "15"], "convert with 'ee'"),
        (["--codec", "eepose_absolute"], "no rate of its own"),
        (["--fps", "0"], "expected frames per second, above 0"),
        (["--codec", "eee"], "no codec 'eee'"),
    ],
)
def test_what_cannot_be_is_said_before_work_starts(raw, tmp_path, capsys, options, message):
    assert main(["convert", "positronic", str(raw), str(tmp_path / "set"), *options]) == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["raw"]


def test_unusable_episodes_are_named_and_left_out_on_request(raw, tmp_path, capsys):
    paths = RawDataset(raw).paths
    (paths[1] / "target_grip.parquet").unlink()
    late = RawDatasetWriter(raw).new_episode()
    with late:  # a signal that starts with the last sample of all
        for name in ("robot_state.ee_pose", "robot_commands.pose"):
            late.append(name, np.zeros(7), 100)
        for name in ("grip", "target_grip"):
            late.append(name, 0.0, 100)
        for name in ("image.wrist", "image.exterior"):
            late.append(name, np.zeros((16, 16, 3), np.uint8), 100)
    command = ["convert", "positronic", str(raw), str(tmp_path / "set"), "--workers", "0"]
    assert main(command) == 1
    assert (
        "1 of 4 episodes cannot be converted:\n  000000000000/000000000001: it lacks target_grip"
        in capsys.readouterr().err
    )
    assert names(tmp_path) == ["raw"]
    shutil.copyfile(paths[0] / "target_grip.parquet", paths[1] / "target_grip.parquet")
    shutil.rmtree(paths[1])
    assert main(command) == 1
    assert f"000000000000/{late.path.name}: its signals have no time in common" in capsys.readouterr().err
    (paths[2] / "image.wrist.mp4").write_bytes(b"no video")
    assert main(command) == 1
    assert "2 of 3 episodes cannot be converted" in capsys.readouterr().err
    assert main([*command, "--skip-unusable"]) == 0
    assert len(LeRobotDataset(tmp_path / "set").metadata.episodes) == 1


def test_recordings_are_read_from_a_bucket_and_datasets_written_to_one(raw, tmp_path, bucket, capsys, monkeypatch):
    s3, lab, url = bucket
    options = ["--endpoint-url", url, "--workers", "0"]
    s3.put(f"{raw}/", f"{lab}/recordings/", recursive=True)
    command = ["convert", "positronic", f"s3://{lab}/recordings", f"s3://{lab}/sets/ee", *options]
    failing = [True]
    original = s3fs.S3FileSystem.put_file

    def put_file(self, *args, **kwargs):
        if failing.pop() if failing else False:
            raise OSError("the line broke")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", put_file)
    assert main(command) == 1
    assert "the line broke" in capsys.readouterr().err
    assert not s3.exists(f"{lab}/sets/ee/meta/info.json")  # nobody takes it for a dataset
    monkeypatch.setattr(episode_work, "prepare_episode", None)  # all is made; it is only sent again
    assert main(command) == 0
    monkeypatch.undo()
    s3.invalidate_cache()
    s3.get(f"{lab}/sets/ee/", str(tmp_path / "got"), recursive=True)
    assert len(LeRobotDataset(tmp_path / "got").metadata.episodes) == 3


def test_recordings_are_appended_to_a_dataset_in_a_bucket(raw, converted, tmp_path, bucket, capsys):
    s3, lab, url = bucket
    options = ["--endpoint-url", url, "--workers", "0"]
    s3.put(f"{converted}/", f"{lab}/ee/", recursive=True)
    before = {path: s3.info(path)["ETag"] for path in s3.find(f"{lab}/ee")}
    assert main(["convert", "positronic", str(raw), f"s3://{lab}/ee", *options]) == 1
    assert "choose another place, append" in capsys.readouterr().err
    assert main(["convert", "positronic", str(raw), f"s3://{lab}/ee", "--append", "--repeat", *options]) == 0
    s3.invalidate_cache()
    after = {path: s3.info(path)["ETag"] for path in s3.find(f"{lab}/ee")}
    kept = {path for path in before if before[path] == after[path]}
    rewritten = {"info.json", "stats.json"}
    assert {Path(path).name for path in before.keys() - kept} <= rewritten | {"tasks.parquet"}
    s3.get(f"{lab}/ee/", str(tmp_path / "got"), recursive=True)
    assert len(LeRobotDataset(tmp_path / "got").metadata.episodes) == 6
