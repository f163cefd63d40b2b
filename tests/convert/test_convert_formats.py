"""Recordings of other programs to LeRobot datasets: every value is what an independent reader of the raw file says."""

import hashlib
import importlib
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image

import paths
import raw_recordings as raw
import rlds_datasets
from openpi.cli.main import main
from openpi.convert import engine
from openpi.convert.episode_work import Options
from openpi.convert.formats import ros_bag_file
from openpi.convert.formats.aloha import AlohaHdf5
from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.formats.robomimic import RobomimicHdf5
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.calvin_policy import CALVIN_SPEC
from openpi.serving import recording_mcap
from openpi.serving.recorded import Exchange, SessionInfo
from openpi.shared.pools import WorkerLostError

MAX_GREY_LEVELS = 6  # mean over a picture that went through a lossy encoder
TWO = ("cam_high", "cam_low")
INDEX = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


def convert(*arguments: object, code: int = 0) -> None:
    """In this process, as the command line does."""
    assert main(["convert", *map(str, arguments), "--workers", "0"]) == code


def assert_same(folder: Path, episodes: list[dict[str, np.ndarray]], *, tolerance: float = 0) -> LeRobotDataset:
    """Every column of the dataset is what was written, and it has no others."""
    dataset = LeRobotDataset(folder)
    assert set(dataset.metadata.features) - INDEX == set(episodes[0])
    assert len(dataset.episode_bounds) == len(episodes)
    for number, (written, (begin, end)) in enumerate(zip(episodes, dataset.episode_bounds, strict=True)):
        for key, values in written.items():
            assert end - begin == len(values), key
            if values.ndim == 4:
                found = dataset.camera_frames(key, number, range(len(values)))
                difference = np.abs(np.stack(found).astype(float) - values)
                assert difference.mean() <= tolerance, key
            else:
                np.testing.assert_array_equal(dataset.column(key)[begin:end], values.astype(np.float32), key)
    return dataset


def provenance(folder: Path) -> dict:
    (path,) = folder.glob("run_metadata_*.yaml")
    return json.loads(path.read_text())


@pytest.fixture
def aloha(tmp_path) -> Path:
    """Ten and more episodes, whose names do not sort as text, of which 3 are there."""
    folder = tmp_path / "aloha"
    folder.mkdir()
    for number in (2, 9, 10):
        raw.aloha_episode(folder / f"episode_{number}.hdf5", number, cameras=TWO)
    return folder


def test_aloha_is_converted_value_by_value(aloha, tmp_path):
    written = [raw.aloha_episode(aloha / f"episode_{n}.hdf5", n, 6 + n) for n in (2, 9, 10)]
    convert("aloha", aloha, tmp_path / "set", "--task", "fold the shirt", "--images")
    dataset = assert_same(tmp_path / "set", written)
    info = dataset.metadata
    assert (info.fps, info.features["action"]["names"][6]) == (50, "left_gripper")
    assert info.features["observation.images.cam_high"]["shape"] == [3, 24, 32]
    assert dataset[0]["task"] == "fold the shirt"
    told = provenance(tmp_path / "set")
    assert [entry["name"] for entry in told["episodes"]] == ["episode_2.hdf5", "episode_9.hdf5", "episode_10.hdf5"]
    content = (aloha / "episode_9.hdf5").read_bytes()
    assert told["sources"][1] == {
        "files": ["episode_9.hdf5"],
        "num_files": 1,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "identity": hashlib.sha256(hashlib.sha256(content).hexdigest().encode()).hexdigest()[:16],
    }
    assert told["format"] == "AlohaHdf5" and told["options"]["task"] == "fold the shirt"


@pytest.mark.parametrize("compression", ["padded", "variable"])
def test_aloha_mobile_with_other_cameras_as_jpeg_and_video(compression, tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    options = {"cameras": ("front", "wrist"), "compression": compression, "is_mobile": True}
    depth = {"observations/images/front_depth": np.zeros((9, 24, 32), np.uint16)}
    written = [raw.aloha_episode(folder / f"episode_{n}.hdf5", n, extra=depth, **options) for n in range(2)]
    convert("aloha", folder, tmp_path / "set", "--mobile", "--task", "push the chair")
    assert_same(tmp_path / "set", written, tolerance=MAX_GREY_LEVELS)
    assert json.loads((tmp_path / "set/meta/info.json").read_text())["robot_type"] == "mobile_aloha"


def test_a_rate_that_the_recording_has_not_is_told_since_nothing_is_sampled(aloha, tmp_path, capsys):
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--fps", "25")
    assert "have 50 frames per second, and the dataset will say 25" in capsys.readouterr().err
    dataset = LeRobotDataset(tmp_path / "set")
    assert (len(dataset), dataset.metadata.fps) == (27, 25)


def test_encoded_depth_is_refused_and_not_cut_to_white(tmp_path, capsys):
    content = io.BytesIO()
    Image.fromarray(np.full((24, 32), 1500, np.uint16)).save(content, "PNG")
    path = tmp_path / "episode_0.hdf5"
    raw.aloha_episode(path, 0, 3, cameras=TWO)
    with h5py.File(path, "r+") as file:
        name = "observations/images/cam_behind"  # nothing in its name says that it is depth
        file[name] = np.tile(np.frombuffer(content.getvalue(), np.uint8), (3, 1))
    convert("aloha", tmp_path, tmp_path / "set", "--task", "t", code=1)
    assert "picture 0 of" in (told := capsys.readouterr().err) and "16 bits a value, such as a depth map" in told


def test_pictures_that_are_bgr_are_swapped_when_told(aloha, tmp_path):
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--swap-colors", "--episodes", "0")
    written = raw.aloha_episode(aloha / "again.hdf5", 2, cameras=TWO)
    assert_same(tmp_path / "set", [{k: v[..., ::-1] if v.ndim == 4 else v for k, v in written.items()}])


def test_changes_that_float32_cannot_tell_apart_are_told(aloha, tmp_path):
    """All frames of an episode would have one time."""
    with h5py.File(aloha / "episode_9.hdf5", "r+") as file:
        times = np.zeros(file["observations/qpos"].shape)
        times[:, 3] = 1_700_000_000 + 0.02 * np.arange(len(times))
        times[:, 4] = 20_000 + np.arange(len(times))
        del file["observations/effort"]
        file["observations/effort"] = times
    convert("aloha", aloha / "episode_9.hdf5", tmp_path / "set", "--task", "fold", "--images")
    [[told]] = provenance(tmp_path / "set")["remarks"].values()
    assert told.startswith("'observation.effort', left_forearm_roll: it changes by ") and "around 1.7e+09" in told


def test_a_dry_run_shows_the_mapping_and_writes_nothing(aloha, tmp_path, capsys):
    convert("aloha", aloha, tmp_path / "set", "--dry-run")
    shown = capsys.readouterr().out
    assert "episode_2.hdf5, the first of 3: 9 frames at 50" in shown
    assert "observation.state" in shown and "/observations/qpos" in shown and "left_gripper" in shown
    assert "--task" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aloha"]


def spoil_nan(file: h5py.File) -> None:
    file["action"][4, 13] = np.nan


def spoil_length(file: h5py.File) -> None:
    values = file["action"][:-1]
    del file["action"]
    file["action"] = values


def spoil_camera(file: h5py.File) -> None:
    del file["observations/images/cam_low"]


def spoil_size(file: h5py.File) -> None:
    del file["observations/images/cam_low"]
    file["observations/images/cam_low"] = np.zeros((9, 12, 16, 3), np.uint8)


def spoil_jpeg(file: h5py.File) -> None:
    name = "observations/images/cam_low"
    contents = [raw.jpeg(picture) for picture in raw.pictures(0, 9)]
    contents[5] = b"no picture"
    del file[name]
    raw._write_encoded(file, name, contents, "variable")


def spoil_jpeg_end(file: h5py.File) -> None:
    """Half-written, in a row that is padded with zeros: the decoder makes the rest up."""
    name = "observations/images/cam_low"
    contents = [raw.jpeg(picture) for picture in raw.pictures(0, 9)]
    contents[5] = contents[5][: 2 * len(contents[5]) // 3]
    del file[name]
    raw._write_encoded(file, name, contents, "padded")


def spoil_by_link(file: h5py.File) -> None:
    del file["action"]
    file["action"] = h5py.ExternalLink("episode_2.hdf5", "/action")


def spoil_by_virtual(file: h5py.File) -> None:
    del file["action"]
    layout = h5py.VirtualLayout((9, 14), "f8")
    layout[:] = h5py.VirtualSource("episode_2.hdf5", "action", (9, 14))
    file.create_virtual_dataset("action", layout)


def spoil_by_storage(file: h5py.File) -> None:
    del file["action"]
    file.create_dataset("action", (9, 14), "f8", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


def spoil_by_size(file: h5py.File) -> None:
    del file["action"]
    file.create_dataset("action", (2**40, 14), "f8", chunks=(1, 14), compression="gzip")


def spoil_by_packing(file: h5py.File) -> None:
    del file["action"]
    twice = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    twice.set_chunk((9, 14))
    twice.set_shuffle()
    for _ in range(2):
        twice.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_OPTIONAL, (9,))
    h5py.h5d.create(file.id, b"action", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((9, 14)), twice)


def spoil_unwritten(file: h5py.File) -> None:
    del file["action"]
    file.create_dataset("action", (9, 14), "f8")


def spoil_unwritten_pictures(file: h5py.File) -> None:
    """A recorder that makes room for the whole episode, and was stopped after six frames."""
    name = "observations/images/cam_low"
    values = file[name][:6]
    del file[name]
    file.create_dataset(name, (9, *values.shape[1:]), "u1", chunks=(1, *values.shape[1:]))[:6] = values


def spoil_dtype(file: h5py.File) -> None:
    del file["action"]
    file.create_dataset("action", data=[b"text"] * 9)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_nan, ("'action'", "frame 4", "dimension [13]")),
        (spoil_length, ("'action': 8", "'observation.state': 9")),
        (spoil_camera, ("lacks 'observation.images.cam_low'",)),
        (spoil_size, ("'observation.images.cam_low'", "[3, 12, 16]", "[3, 24, 32]")),
        (spoil_jpeg, ("'observation.images.cam_low'", "frame 5", "not a readable image")),
        (spoil_jpeg_end, ("picture 5 of", "cam_low", "a JPEG without its end")),
        (spoil_by_link, ("link to another file",)),
        (spoil_by_virtual, ("lies in another file",)),
        (spoil_by_packing, ("compressed several times over, by ['deflate', 'deflate']",)),
        (spoil_by_storage, ("lies in another file",)),
        (spoil_by_size, ("/action", "at most")),
        (spoil_unwritten, ("/action: 1 of its 1 parts were never written",)),
        (spoil_unwritten_pictures, ("cam_low: 3 of its 9 parts were never written",)),
        (spoil_dtype, ("/action", "expected numbers")),
    ],
)
def test_what_is_wrong_is_told_with_file_episode_and_frame_and_nothing_is_left(spoil, words, aloha, tmp_path, capsys):
    with h5py.File(aloha / "episode_9.hdf5", "a") as file:
        spoil(file)
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", code=1)
    told = capsys.readouterr().err
    assert "1 of 3 episodes cannot be converted" in told and "episode_9.hdf5" in told
    for word in words:
        assert word in told
    assert not (tmp_path / "set").exists()
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--skip-unusable")
    assert [entry["name"] for entry in provenance(tmp_path / "set")["episodes"]] == [
        "episode_2.hdf5",
        "episode_10.hdf5",
    ]
    assert "episode_9.hdf5" in provenance(tmp_path / "set")["left_out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aloha", "set"]


def test_files_that_are_something_else_say_what_they_are(aloha, tmp_path, capsys):
    (aloha / "episode_2.hdf5").write_text("version https://git-lfs.github.com/spec/v1\n")
    convert("aloha", aloha, tmp_path / "set", "--task", "t", code=1)
    assert "Git LFS pointer" in capsys.readouterr().err
    convert("aloha", tmp_path / "nowhere", tmp_path / "set", code=1)
    assert "does not exist" in capsys.readouterr().err


def test_an_odd_first_episode_does_not_make_all_others_unusable(aloha, tmp_path, capsys):
    with h5py.File(aloha / "episode_2.hdf5", "a") as file:
        spoil_camera(file)
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--skip-unusable", code=1)
    assert "If the first one is the odd one out" in capsys.readouterr().err
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--episodes", "1-2")
    assert len(LeRobotDataset(tmp_path / "set").episode_bounds) == 2


def test_most_episodes_may_be_left_out_where_they_are_damaged(aloha, tmp_path):
    for name in ("episode_9.hdf5", "episode_10.hdf5"):
        with h5py.File(aloha / name, "a") as file:
            spoil_nan(file)
    convert("aloha", aloha, tmp_path / "set", "--task", "t", "--images", "--skip-unusable")
    assert len(LeRobotDataset(tmp_path / "set").episode_bounds) == 1


def test_recordings_of_any_format_are_appended_once_wherever_they_lie(aloha, tmp_path, capsys):
    moved, flags = tmp_path / "day" / "aloha", ("--task", "t", "--images")
    convert("aloha", aloha, tmp_path / "set", *flags, "--episodes", "0-1")
    before = contents(tmp_path / "set")
    moved.parent.mkdir()
    aloha.rename(moved)
    convert("aloha", moved, tmp_path / "set", *flags, "--append", code=1)
    assert "2 of 3 recordings are in" in capsys.readouterr().err
    assert contents(tmp_path / "set") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day", "set"]
    convert("aloha", moved, tmp_path / "set", *flags, "--append", "--episodes", "2")
    assert len(LeRobotDataset(tmp_path / "set").episode_bounds) == 3
    assert "other options" not in capsys.readouterr().err
    convert("aloha", moved, tmp_path / "set", *flags, "--append", "--repeat", "--swap-colors")
    assert "swap_colors was False, and is True" in capsys.readouterr().err
    with h5py.File(moved / "episode_2.hdf5", "a") as file:
        file.attrs["note"] = "later"
    convert("aloha", moved, tmp_path / "set", *flags, "--append", "--episodes", "0")
    assert "1 of 1 recordings are called as others in" in capsys.readouterr().err
    assert main(["dataset", "split", str(tmp_path / "set"), f"{tmp_path / 'part'}=0,1"]) == 0
    convert("aloha", moved, tmp_path / "part", *flags, "--append")  # what is in a part is told by nobody


def test_a_policy_that_is_told_nothing_is_refused(aloha, tmp_path, capsys):
    convert("aloha", aloha, tmp_path / "set", code=1)
    assert "--task" in capsys.readouterr().err


def test_an_existing_dataset_is_replaced_only_when_told(aloha, tmp_path, capsys):
    for options, code in (((), 0), ((), 1), (("--overwrite",), 0)):
        convert("aloha", aloha, tmp_path / "set", "--task", "t", "--episodes", "1", *options, code=code)
    assert "exists" in capsys.readouterr().err


class LossyPool:
    """Loses its worker at the second job, as a decoder does that a damaged file makes crash."""

    def threads(self, num_jobs: int) -> int:
        return 1

    def each(self, function, jobs):
        yield jobs[0], function(jobs[0])
        raise WorkerLostError("a worker process was ended")


def test_who_loses_a_worker_is_told_at_which_recordings(aloha, tmp_path):
    told = r"ended: what is prepared is kept\. .* look at 'episode_9\.hdf5', 'episode_10\.hdf5', the first that are not"
    with pytest.raises(WorkerLostError, match=told):
        engine.convert(AlohaHdf5(aloha), tmp_path / "set", Options(task="t"), pool=LossyPool())


KILLED = """
import os, signal, sys
from pathlib import Path
from openpi.convert.engine import Options, convert
from openpi.convert.formats import aloha

original = aloha.AlohaHdf5.read

def read(self, ref):
    if ref.name == "episode_10.hdf5":
        os.kill(os.getppid(), signal.SIGKILL)
    return original(self, ref)

aloha.AlohaHdf5.read = read

if __name__ == "__main__":
    convert(aloha.AlohaHdf5(Path(sys.argv[1])), Path(sys.argv[2]), Options(task="t"), num_workers=2)
"""


FORMAT_OF_A_USER = """import dataclasses
from pathlib import Path
import numpy as np
from openpi.convert.source import EpisodeRef, Numbers, RawEpisode

@dataclasses.dataclass(frozen=True)
class Format:
    root: Path
    def episodes(self):
        return [EpisodeRef(file.name, (file,)) for file in sorted(self.root.iterdir())]
    def read(self, ref):
        values = np.array([float(number) for number in ref.files[0].read_text().split()])
        return RawEpisode({"action": Numbers(values * SCALE, "a")}, 10, "t")
"""


def test_what_was_prepared_by_a_format_before_it_was_corrected_is_not_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0").write_text("1 2 3")
    (tmp_path / "raw" / "1").write_text("damaged")
    for scale in ("1.0", "1000.0"):
        (tmp_path / "format_of_a_user.py").write_text(FORMAT_OF_A_USER.replace("SCALE", scale))
        sys.modules.pop("format_of_a_user", None)
        source = importlib.import_module("format_of_a_user").Format(tmp_path / "raw")
        if scale == "1.0":
            with pytest.raises(ValueError, match="damaged"):
                engine.convert(source, tmp_path / "set", num_workers=0)
    (tmp_path / "raw" / "1").write_text("4 5 6")
    engine.convert(source, tmp_path / "set", num_workers=0)
    np.testing.assert_array_equal(LeRobotDataset(tmp_path / "set").column("action"), 1000 * np.arange(1, 7))


def test_a_format_that_was_typed_into_a_notebook_converts_and_is_never_gone_on_with(tmp_path):
    """Other processes do not see its class, and no file says whether it is the same as before."""
    (tmp_path / "raw").mkdir()
    for name in ("0", "1"):
        (tmp_path / "raw" / name).write_text("1 2 3")
    typed = (
        FORMAT_OF_A_USER.replace("SCALE", "2")
        + """
from openpi.convert.engine import convert
from openpi.convert.origin import code_of
source = Format(Path("raw"))
assert code_of(source) != code_of(source)
convert(source, Path("set"), num_workers=2)
"""
    )
    subprocess.run([sys.executable, "-c", typed], cwd=tmp_path, check=True)
    assert LeRobotDataset(tmp_path / "set").column("action").tolist() == [2, 4, 6] * 2


def test_a_conversion_by_two_processes_that_was_killed_goes_on_and_gives_the_same(aloha, tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    process = subprocess.run([sys.executable, program, aloha, tmp_path / "set"], check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (tmp_path / "set").exists()
    convert("aloha", aloha, tmp_path / "set", "--task", "t")
    assert re.search("going on with [12] prepared episodes", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aloha", "program.py", "set"]
    convert("aloha", aloha, tmp_path / "at_once", "--task", "t")
    assert contents(tmp_path / "set") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("package", ["h5py", "zarr", "rosbags"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    word, file = {"h5py": ("aloha", "episode_0.hdf5"), "zarr": ("umi", "d.zip"), "rosbags": ("ros", "a.bag")}[package]
    (tmp_path / file).touch()
    options = ("--draft", tmp_path / "m") if word == "ros" else ("--dry-run",)
    convert(word, tmp_path, tmp_path / "set", *options, code=1)
    assert "uv sync --extra convert" in capsys.readouterr().err


def contents(root: Path) -> dict[str, bytes]:
    """All files but those that say when it was made."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("run_metadata")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_libero_s_own_demonstrations_become_the_published_columns(tmp_path, capsys):
    folder = tmp_path / "libero_goal"
    folder.mkdir()
    written = raw.libero_file(folder / "a_demo.hdf5", 0, (4, 5), "open the drawer")
    written += raw.libero_file(folder / "b_demo.hdf5", 7, (3,), "put the bowl on the plate")
    convert("libero", folder, tmp_path / "set", "--images")
    dataset = assert_same(tmp_path / "set", written)
    assert [dataset[int(begin)]["task"] for begin, _ in dataset.episode_bounds] == [
        *("open the drawer", "open the drawer", "put the bowl on the plate")
    ]
    assert (dataset.metadata.fps, dataset.metadata.features["image"]["shape"]) == (20, [16, 16, 3])
    assert [entry["source"] for entry in provenance(tmp_path / "set")["episodes"]] == [0, 0, 1]
    convert("libero", folder, tmp_path / "set", "--dry-run", "--as-stored")
    assert "obs/joint_states" in capsys.readouterr().out  # left out


@pytest.mark.parametrize("is_late", [True, False])
def test_libero_s_observations_go_with_the_action_that_follows_them(is_late, tmp_path):
    """LIBERO's script keeps what an action led to; files made anew, as the published ones, what went before."""
    (written,) = raw.libero_file(tmp_path / "a_demo.hdf5", 0, (6,), "open the drawer")
    with h5py.File(tmp_path / "a_demo.hdf5", "a") as file:
        moving = np.arange(7)[:, None] * 0.05 + np.arange(7)  # of the arm, before each action and after the last
        states = np.array(file["data/demo_0/states"])
        states[:, 1:8] = moving[:6]
        del file["data/demo_0/states"], file["data/demo_0/obs/joint_states"]
        file["data/demo_0/states"] = states
        file["data/demo_0/obs/joint_states"] = moving[1:] if is_late else moving[:6]
    convert("libero", tmp_path / "a_demo.hdf5", tmp_path / "set", "--images")
    paired = {key: values[1:] if key == "actions" else values[:-1] for key, values in written.items()}
    assert_same(tmp_path / "set", [paired if is_late else written])
    assert provenance(tmp_path / "set")["remarks"] == {}


def test_a_file_of_many_episodes_is_walked_no_more_than_one_of_few(tmp_path, monkeypatch):
    walked, keys = [], Hdf5File._keys
    monkeypatch.setattr(Hdf5File, "_keys", lambda file, node: walked.append(node.name) or keys(file, node))

    def count(episodes: int) -> int:
        raw.robomimic_file(tmp_path / f"{episodes}.hdf5", [2] * episodes)
        source = RobomimicHdf5(tmp_path / f"{episodes}.hdf5")
        walked.clear()
        source.read(source.episodes()[-1])
        return walked.count("/data")

    assert count(3) == count(30)


def test_a_subset_of_robomimic_s_demonstrations(tmp_path, capsys):
    written = raw.robomimic_file(tmp_path / "low.hdf5", [3] * 11)
    convert("robomimic", tmp_path / "low.hdf5", tmp_path / "set", "--task", "lift", "--subset", "train", "--images")
    dataset = assert_same(tmp_path / "set", written[::2])
    assert dataset.metadata.features["observation.state"]["names"][3] == "robot0_eef_quat_0"
    convert("robomimic", tmp_path / "low.hdf5", tmp_path / "other", "--task", "t", "--subset", "valid", code=1)
    assert "it has 'train'" in capsys.readouterr().err
    convert("robomimic", tmp_path / "low.hdf5", tmp_path / "other", "--task", "t", "--state", "robot0_joints", code=1)
    assert "robot0_joints" in capsys.readouterr().err
    with h5py.File(tmp_path / "low.hdf5", "r+") as file:
        del file["data/demo_4"]
    convert("robomimic", tmp_path / "low.hdf5", tmp_path / "other", "--task", "t", "--subset", "train", code=1)
    assert "'mask/train' lists 'demo_4', which the file has not" in capsys.readouterr().err


def test_droid_s_raw_episodes(tmp_path):
    folder = tmp_path / "droid"
    written = [raw.droid_episode(folder / "success/day_1", "LAB+1", 0, 3)]
    written.append(raw.droid_episode(folder / "success/day_2", "LAB+2", 5, 10, num_filmed=9))
    raw.droid_episode(folder / "success/day_3", "LAB+3", 5, 4, num_filmed=3)
    told = {"LAB+1": {"language_instruction1": "close the lid"}}
    (folder / "aggregated-annotations-030724.json").write_text(json.dumps(told))
    convert("droid", folder, tmp_path / "set", "--images", "--skip-unusable")
    dataset = assert_same(tmp_path / "set", written)
    tasks = [dataset[int(begin)]["task"] for begin, _ in dataset.episode_bounds]
    assert (tasks, dataset.metadata.fps) == (["close the lid", "Do something"], 15)
    told = provenance(tmp_path / "set")
    assert "its last 1 of 10 steps have no picture" in told["remarks"]["success/day_2"][1]
    assert "'wrist_image_left': 3" in told["left_out"]["success/day_3"]
    assert "success/day_1/recordings/MP4/3333.mp4" in told["sources"][0]["files"]


@pytest.mark.parametrize(("is_zipped", "zarr_format"), [(True, 2), (False, 2), (False, 3)])
def test_umi_s_replay_buffers(is_zipped, zarr_format, tmp_path):
    path = tmp_path / ("d.zarr.zip" if is_zipped else "d.zarr")
    written = raw.umi_buffer(path, (5, 3), zarr_format=zarr_format)
    convert("umi", path, tmp_path / "set", "--task", "fold the cup", "--images")
    dataset = assert_same(tmp_path / "set", written)
    assert dataset.metadata.fps == 60
    assert dataset.metadata.features["action"]["names"][-1] == "robot0_gripper_width"


def test_diffusion_policy_s_replay_buffers_say_no_rate(tmp_path, capsys):
    written = raw.pusht_buffer(tmp_path / "pusht.zarr", (4, 6))
    convert("umi", tmp_path / "pusht.zarr", tmp_path / "set", "--task", "push", "--images", code=1)
    assert "--fps" in capsys.readouterr().err
    convert("umi", tmp_path / "pusht.zarr", tmp_path / "set", "--task", "push", "--images", "--fps", "10")
    assert_same(tmp_path / "set", written)
    data = zarr.open_group(tmp_path / "pusht.zarr/data", mode="a", zarr_format=2)
    channels_first = np.moveaxis(data["img"][:], 3, 1)
    del data["img"]
    data.create_array("img", data=channels_first, chunks=(3, *channels_first.shape[1:]))
    convert("umi", tmp_path / "pusht.zarr", tmp_path / "again", "--task", "push", "--images", "--fps", "10")
    assert_same(tmp_path / "again", written)


def spoil_by_objects(path: Path) -> None:
    group = zarr.open_group(path / "data", mode="a", zarr_format=2)
    del group["robot0_eef_pos"]
    meta = {"chunks": [8], "compressor": None, "dtype": "|O", "fill_value": 0, "filters": [{"id": "pickle"}]}
    folder = path / "data/robot0_eef_pos"
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps({**meta, "order": "C", "shape": [8], "zarr_format": 2}))
    (folder / "0").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")


def spoil_by_chunk(path: Path) -> None:
    about = path / "data/robot0_eef_pos/.zarray"
    about.write_text(json.dumps({**json.loads(about.read_text()), "chunks": [2**40, 3], "shape": [2**40, 3]}))


def spoil_by_packing_twice(path: Path) -> None:
    about = path / "data/robot0_eef_pos/.zarray"
    about.write_text(json.dumps({**json.loads(about.read_text()), "filters": [{"id": "zlib", "level": 1}]}))


def spoil_by_ends(path: Path) -> None:
    zarr.open_group(path, mode="a", zarr_format=2)["meta/episode_ends"][:] = [9, 5]


def spoil_by_bytes(path: Path) -> None:
    next(file for file in (path / "data/robot0_eef_pos").iterdir() if file.name[0].isdigit()).write_bytes(b"no blosc")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_by_objects, "an array that is not read here"),
        (spoil_by_chunk, "at most"),
        (spoil_by_packing_twice, "compressed several times over, by ["),
        (spoil_by_ends, "numbers that rise"),
        (spoil_by_bytes, "cannot be read"),
    ],
)
def test_a_spoilt_replay_buffer_is_refused(spoil, words, tmp_path, capsys):
    raw.umi_buffer(tmp_path / "d.zarr", (5, 3))
    spoil(tmp_path / "d.zarr")
    convert("umi", tmp_path / "d.zarr", tmp_path / "set", "--task", "t", code=1)
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["d.zarr"]


@pytest.mark.parametrize(("zarr_format", "chunk"), [(2, "6.0.0.0"), (3, "c/6/0/0/0")])
def test_what_a_replay_buffer_lacks_is_told_and_not_made_up(zarr_format, chunk, tmp_path, capsys):
    """Zarr reads zeros where a chunk was not copied, and frames of one number may be of two moments."""
    path = tmp_path / "d.zarr"
    written = raw.umi_buffer(path, (5, 3, 2), zarr_format=zarr_format)
    data = zarr.open_group(path, mode="a", zarr_format=zarr_format)
    data["meta/episode_ends"].resize((2,))
    (path / "data/robot0_gripper_width" / ("c/0/0" if zarr_format == 3 else "0.0")).unlink()
    convert("umi", path, tmp_path / "set", "--task", "t", "--images", "--episodes", "0")
    convert("umi", path, tmp_path / "second", "--task", "t", "--images", "--episodes", "1")
    told = provenance(tmp_path / "second")["remarks"]["d.zarr/episode_1"]
    assert "the 2 frames behind it are of no episode" in told[0]
    assert "robot0_gripper_width: frames '5..7' are not stored" in told[1]
    (path / "data/camera0_rgb" / chunk).unlink()
    convert("umi", path, tmp_path / "third", "--task", "t", "--images", "--skip-unusable", "--episodes", "0,1")
    assert "camera0_rgb: frames '6..6' are not stored" in capsys.readouterr().err
    third = LeRobotDataset(tmp_path / "third")
    np.testing.assert_array_equal(third.column("action")[:5, :6], written[0]["action"][:, :6].astype(np.float32))
    if zarr_format == 3:  # which by default stores no chunk that is all zeros: it may have been black
        assert [row for row in range(8) if not third[row]["observation.images.camera0_rgb"].any()] == [6]
    else:
        assert len(third) == 5
    data["data/camera0_rgb"].resize((11, 16, 16, 3))
    convert("umi", path, tmp_path / "other", "--task", "t", code=1)
    assert "one number of frames is expected of all arrays" in capsys.readouterr().err


def test_calvin_s_annotated_stretches_are_episodes(tmp_path, capsys):
    stretches = [("lift the block", 3, 6), ("push the drawer", 5, 9)]
    written = raw.calvin_split(tmp_path / "task_D_D/training", 3, 9, stretches)
    convert("calvin", tmp_path / "task_D_D", tmp_path / "unpadded", "--images", "--unpadded")
    assert_same(tmp_path / "unpadded", written)
    convert("calvin", tmp_path / "task_D_D", tmp_path / "set", "--images")
    padded = [{**episode, "actions": np.pad(episode["actions"], ((0, 0), (0, 8)))} for episode in written]
    dataset = assert_same(tmp_path / "set", padded)
    spec = CALVIN_SPEC
    assert dataset.metadata.features["actions"]["names"] == list(spec.actions.names)
    assert dataset.metadata.features["state"]["names"] == list(spec.state_names)
    assert [dataset[int(begin)]["task"] for begin, _ in dataset.episode_bounds] == [text for text, *_ in stretches]
    convert("calvin", tmp_path / "task_D_D", tmp_path / "play", "--play", "--task", "play", "--absolute")
    assert len(LeRobotDataset(tmp_path / "play")) == 7
    (tmp_path / "task_D_D/training/episode_0000005.npz").unlink()
    convert("calvin", tmp_path / "task_D_D", tmp_path / "other", "--episodes", "0", code=1)
    assert "episode_0000005.npz is missing" in capsys.readouterr().err


def test_calvin_s_annotations_are_data(tmp_path, capsys):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "done",))

    raw.calvin_split(tmp_path / "training", 0, 2, [("lift", 0, 2)], annotations={"language": Harmful()})
    convert("calvin", tmp_path, tmp_path / "set", code=1)
    assert "auto_lang_ann.npy" in capsys.readouterr().err
    assert not (tmp_path / "done").exists()


def newest(times: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The last value at or before each instant, one by one."""
    return np.stack([values[max(i for i, time in enumerate(times) if time <= instant)] for instant in at])


@pytest.mark.parametrize("form", ["ros1", "ros2", "ros2 mcap"])
def test_bags_are_sampled_by_a_mapping_that_is_drafted_from_them(form, tmp_path):
    bags = tmp_path / "bags"
    bags.mkdir()
    wrote = raw.ros_bag(bags / ("take.bag" if form == "ros1" else "take"), form)
    mapping = tmp_path / "mapping.json"
    convert("ros", bags, tmp_path / "set", "--draft", mapping)
    drafted = json.loads(mapping.read_text())
    assert drafted["fps"] == 20
    assert drafted["columns"]["observation.images.camera_front"] == [{"topic": "/camera/front/image_raw"}]
    assert drafted["columns"]["action"] == [{"topic": "/arm/command", "field": "data"}]
    state, finger = drafted["columns"]["observation.state"]
    assert state == {"topic": "/joint_states", "field": "position", "names": ["elbow", "shoulder", "grip"]}
    assert finger == {"topic": "/joint_states", "field": "position", "names": ["finger"]}
    state["names"] = ["shoulder", "elbow"]
    mapping.write_text(json.dumps({**drafted, "task": "wipe the table"}))
    convert("ros", bags, tmp_path / "set", "--mapping", mapping, "--images")
    start = max(times[0] for times, _ in wrote.values())
    end = max(times[-1] for times, _ in wrote.values())
    at = np.arange(start, end, 50_000_000)
    joints = newest(*wrote["/joint_states"], at)
    dataset = assert_same(
        tmp_path / "set",
        [
            {
                "observation.images.camera_front": newest(*wrote["/camera/front/image_raw"], at),
                "observation.images.wrist": newest(*wrote["/wrist/image/compressed"], at),
                "observation.state": np.hstack([joints[:, [1, 0]], newest(*wrote["finger"], at)]),
                "action": newest(*wrote["/arm/command"], at),
            }
        ],
    )
    assert dataset[0]["task"] == "wipe the table"
    assert dataset.metadata.features["observation.state"]["names"] == ["shoulder", "elbow", "finger"]
    width = len(dataset.column("action")[0])
    assert dataset.metadata.features["action"]["names"] == [f"arm_command.{i}" for i in range(width)], (
        "data says nothing"
    )


def test_what_a_mapping_names_must_be_in_the_bag(tmp_path, capsys):
    raw.ros_bag(tmp_path / "take", "ros2")
    mapping = tmp_path / "m.json"
    for columns, words in (
        ({"action": [{"topic": "/other"}]}, "'/other'"),
        ({"action": [{"topic": "/arm/command", "field": "layout.__class__"}]}, "no '__class__'"),
        ({"action": [{"topic": "/joint_states", "field": "position", "names": ["knee"]}]}, "no messages about 'knee'"),
        ({"action": [{"topic": "/joint_states", "field": "position", "names": ["grip", "knee"]}]}, "no joint 'knee'"),
        ({"action": [{"topic": "/arm/command"}, {"topic": "/camera/front/image_raw"}]}, "is a camera"),
        ({"action": [{"topic": "/joint_states", "field": "position"}]}, "with names in the mapping"),
        ({"action": []}, "expected a list"),
    ):
        mapping.write_text(json.dumps({"fps": 20, "columns": columns, "task": "t"}))
        convert("ros", tmp_path / "take", tmp_path / "set", "--mapping", mapping, code=1)
        assert words in capsys.readouterr().err
    convert("ros", tmp_path / "take", tmp_path / "set", code=1)
    assert "--draft" in capsys.readouterr().err


def mapped_by(file, clock):
    """A mapping of a camera and joints, by this clock."""
    numbers = [{"topic": "/joint_states", "field": "position"}]
    columns = {"observation.images.c": [{"topic": "/camera"}], "observation.state": numbers, "action": numbers}
    file.write_text(json.dumps({"fps": 20, "clock": clock, "task": "t", "columns": columns}))
    return file


@pytest.mark.parametrize("joint_ns", [[0] * 40, [50_000_000 * i for i in range(40)]], ids=["unset", "since boot"])
def test_stamps_of_another_clock_are_refused_and_silence_of_a_camera_is_told(joint_ns, tmp_path, capsys):
    stamps = [1_700_000_000_000_000_000 + 50_000_000 * i for i in range(40)]
    raw.ros2_bag_by_stamps(tmp_path / "take", stamps[:10], joint_ns)
    mapping = mapped_by(tmp_path / "m.json", "header")
    convert("ros", tmp_path / "take", tmp_path / "set", "--mapping", mapping, code=1)
    assert "use the clock 'bag'" in capsys.readouterr().err
    mapped_by(mapping, "bag")
    convert("ros", tmp_path / "take", tmp_path / "set", "--mapping", mapping)
    np.testing.assert_array_equal(LeRobotDataset(tmp_path / "set").column("action"), np.arange(39))
    assert provenance(tmp_path / "set")["remarks"] == {"take": ["'/camera' has no new picture for 1.4 s from 0.5 s on"]}


def test_bags_of_a_recorder_that_was_killed_are_told_and_not_passed_over(tmp_path, capsys):
    bags = tmp_path / "bags"
    bags.mkdir()
    for name, form in (("a", "ros2"), ("b", "ros2"), ("c", "ros2 mcap"), ("d.bag", "ros1")):
        raw.ros_bag(bags / name, form)
    convert("ros", bags, tmp_path / "set", "--draft", tmp_path / "m.json")
    (bags / "b/metadata.yaml").unlink()
    cut = next((bags / "c").glob("*.mcap"))
    cut.write_bytes(cut.read_bytes()[:-4000])
    (bags / "d.bag").rename(bags / "d.bag.active")
    mapping = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps({**mapping, "task": "t"}))
    convert("ros", bags, tmp_path / "set", "--mapping", tmp_path / "m.json", code=1)
    told = capsys.readouterr().err
    assert "3 of 4 episodes" in told
    for repair in ("`ros2 bag reindex b`", "`mcap recover`", "`rosbag reindex d.bag.active`"):
        assert repair in told


def test_joints_that_fall_silent_are_told_and_a_command_that_was_said_once_is_not(tmp_path):
    """A robot that stands still in all frames, while its commands move, would teach that commands do nothing."""
    path, store = tmp_path / "take", raw.get_typestore(raw.Stores.ROS2_HUMBLE)
    joint, number = "sensor_msgs/msg/JointState", "std_msgs/msg/Float64"
    with raw.rosbag2.Writer(path, version=9) as writer:
        kinds = {"/joints": joint, "/command": number, "/grip": number}
        topics = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in kinds.items()}
        for i in range(200):
            for topic, kind in kinds.items():
                if not (topic == "/joints" and i >= 50) and not (topic == "/grip" and i > 0):
                    value = raw._joints(store, "ros2", np.array([float(i)]), ["a"])
                    message = value if kind == joint else store.types[number](float(i))
                    writer.write(topics[topic], 10**18 + 20_000_000 * i, store.serialize_cdr(message, kind))
    joints = [{"topic": "/joints", "field": "position"}]
    columns = {"observation.state": joints, "action": [{"topic": "/command"}, {"topic": "/grip"}]}
    mapping = tmp_path / "m.json"
    mapping.write_text(json.dumps({"fps": 50, "task": "t", "columns": columns}))
    convert("ros", path, tmp_path / "set", "--mapping", mapping)
    assert provenance(tmp_path / "set")["remarks"] == {"take": ["'/joints' has no new value for 3.0 s from 1.0 s on"]}


@pytest.mark.parametrize(
    ("later_s", "words"), [(-5, "joint_states, message 20: its stamp is"), (10**6, "would last 278 hours")]
)
def test_a_clock_that_was_set_while_it_recorded_mixes_no_two_stretches(later_s, words, tmp_path, capsys):
    stamps = [1_700_000_000_000_000_000 + 50_000_000 * i + (10**9 * later_s if i >= 20 else 0) for i in range(40)]
    raw.ros2_bag_by_stamps(tmp_path / "take", stamps[:20], stamps)
    mapping = mapped_by(tmp_path / "m.json", "header")
    convert("ros", tmp_path / "take", tmp_path / "set", "--mapping", mapping, code=1)
    assert words in capsys.readouterr().err


def test_definitions_in_a_bag_are_names_and_no_code(tmp_path, capsys):
    harmful = "Empty:\n  import pathlib; pathlib.Path('done').touch()\nclass X"
    raw.ros1_bag_of_type(tmp_path / "take.bag", harmful)
    convert("ros", tmp_path / "take.bag", tmp_path / "set", "--draft", tmp_path / "m.json", code=1)
    assert "the definition of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="defines messages with the name"):
        ros_bag_file._check_words({"std_msgs/msg/X": ([], [("a\nimport os", (1, ("float64", 0)))])}, "take.bag")


def test_recorded_sessions_become_a_dataset_of_what_was_played(tmp_path):
    times = np.array([0, 100, 203, 300]) * 1_000_000 + 1_700_000_000_000_000_000
    joints, chunks = raw.walk(1, 4, 3).astype(np.float32), raw.walk(2, 40, 2).reshape(4, 10, 2)
    frames = raw.pictures(1, 4, 16, 16)
    writer = recording_mcap.Writer(tmp_path / "a", SessionInfo("m", "openpi", "c", 0.0, {}))
    for i, time in enumerate(times.tolist()):
        seen = {"observation/image": frames[i].transpose(2, 0, 1), "joints": joints[i], "prompt": "pick", "note": "x"}
        writer.write(Exchange(2 * i, seen, {"actions": chunks[i]}, time, time + 5))
        writer.write(Exchange(2 * i + 1, seen, {"error": "busy"}, time + 6, time + 7))
    writer.finish()
    convert("session", tmp_path / "a.mcap", tmp_path / "set", "--fps", "50", "--images")
    at = np.arange(times[0], times[-1], 20_000_000)
    rows = [max(i for i, time in enumerate(times) if time <= instant) for instant in at]
    played = np.stack(
        [chunks[row][int((instant - times[row]) // 20_000_000)] for row, instant in zip(rows, at, strict=True)]
    )
    dataset = assert_same(
        tmp_path / "set", [{"observation.image": frames[rows], "joints": joints[rows], "actions": played}]
    )
    assert dataset[3]["task"] == "pick"
    told = provenance(tmp_path / "set")
    assert told["remarks"]["a.mcap"] == ["4 requests got no actions, and are left out"]
    assert (told["options"]["fps"], told["fps"]) == (50, 50)


def test_a_robot_that_did_not_ask_for_long_is_told(tmp_path):
    """It was paused, say: its frames there show the last picture, and the last action again and again."""
    writer = recording_mcap.Writer(tmp_path / "a", SessionInfo("m", "openpi", "c", 0.0, {}))
    for i, time_s in enumerate([0.0, 0.2, 30.2, 30.4]):
        seen = {"joints": np.full(2, i, np.float32), "prompt": "pick"}
        time_ns = 1_700_000_000_000_000_000 + int(1e9 * time_s)
        writer.write(Exchange(i, seen, {"actions": np.zeros((10, 2))}, time_ns, time_ns + 5))
    writer.finish()
    convert("session", tmp_path / "a.mcap", tmp_path / "set", "--fps", "10")
    assert provenance(tmp_path / "set")["remarks"]["a.mcap"] == [
        "the robot did not ask for 30.0 s from 0.2 s on; its last chunk ends there after 1.0 s, and is held"
    ]


def test_a_converted_set_has_statistics_by_the_door_of_a_recipe(tmp_path, capsys):
    """Those of the raw files' numbers."""
    folder = tmp_path / "raw"
    folder.mkdir()
    written = raw.libero_file(folder / "a_demo.hdf5", 0, (12, 15), "open the drawer")
    convert("libero", folder, tmp_path / "set", "--images")
    assets = ("--assets-base-dir", str(tmp_path / "assets"))
    assert main(["stats", "pi05_libero", f"--data.repo-id={tmp_path / 'set'}", *assets]) == 0
    (path,) = (tmp_path / "assets").rglob("norm_stats.json")
    found = json.loads(path.read_text())["norm_stats"]["state"]
    states = np.concatenate([episode["state"] for episode in written]).astype(np.float32)
    np.testing.assert_allclose(found["mean"][:8], states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["std"][:8], states.std(axis=0), atol=1e-5)


def libero_rlds(root: Path, lengths: tuple[int, ...] = (3, 2)) -> list[dict[str, np.ndarray]]:
    """The four published datasets, of two files each."""
    written = []
    for at, name in enumerate(LIBERO_SETS):
        episodes = []
        for number, length in enumerate(lengths):
            seed = 10 * at + number
            jpegs = {key: [raw.jpeg(p) for p in raw.pictures(seed + len(key), length, 16, 16)] for key in RLDS_CAMERAS}
            state, actions = raw.walk(seed, length, 8), raw.walk(seed + 1, length, 7)
            features = {
                "steps/observation/state": state.astype(np.float32),
                "steps/action": actions.astype(np.float32),
                "steps/language_instruction": [f"task {number} of {name}".encode()] * length,
                "steps/reward": np.zeros(length, np.float32),
                **{f"steps/observation/{key}": contents for key, contents in jpegs.items()},
            }
            episodes.append(rlds_datasets.RecordedEpisode(features, {}))
            pictures = {key: np.stack([raw.opened(content) for content in contents]) for key, contents in jpegs.items()}
            written.append({"state": state, "actions": actions, **pictures})
        rlds_datasets.write(root, name, "1.0.0", episodes)
    return written


LIBERO_SETS = ("libero_10_no_noops", "libero_goal_no_noops", "libero_object_no_noops", "libero_spatial_no_noops")
RLDS_CAMERAS = ("image", "wrist_image")


def script(place: str):
    """A published script, as a module."""
    path = paths.ROOT / "examples" / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_libero_script_converts_the_published_datasets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    written = libero_rlds(tmp_path / "rlds")
    flags = ["--data_dir", str(tmp_path / "rlds"), "--workers", "0"]
    assert script("libero/convert_libero_data_to_lerobot.py").main(flags) == 0
    folder = tmp_path / "home/your_hf_username/libero"
    dataset = assert_same(folder, written)
    begin = int(dataset.episode_bounds[3][0])
    assert dataset[begin]["task"] == "task 1 of libero_goal_no_noops"
    info = json.loads((folder / "meta/info.json").read_text())
    assert (info["robot_type"], info["fps"], info["features"]["image"]["dtype"]) == ("panda", 10, "image")
    assert info["features"]["image"]["names"] == ["height", "width", "channel"]
    assert script("libero/convert_libero_data_to_lerobot.py").main(flags) == 1  # it deletes nothing unasked
    assert "exists" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "rlds" / LIBERO_SETS[2])
    convert("libero-rlds", tmp_path / "rlds", tmp_path / "set", code=1)
    assert "libero_object_no_noops has no dataset" in capsys.readouterr().err


def test_libero_s_records_are_neither_dropped_nor_two_episodes(tmp_path, capsys):
    episode = {
        "steps/observation/state": raw.walk(0, 4, 8).astype(np.float32),
        "steps/action": raw.walk(1, 4, 7).astype(np.float32),
        "steps/language_instruction": [b"open the drawer"] * 4,
        "steps/is_first": np.array([1, 0, 1, 0]),
        **{f"steps/observation/{key}": [raw.jpeg(p) for p in raw.pictures(0, 4, 16, 16)] for key in RLDS_CAMERAS},
    }
    one = rlds_datasets.RecordedEpisode({**episode, "steps/is_first": np.array([1, 0, 0, 0])}, {})
    folder = rlds_datasets.write(tmp_path / "rlds", "a", "1.0.0", [one, one], num_shards=1)
    about = folder / "dataset_info.json"
    about.write_text(about.read_text().replace('"shardLengths": ["2"]', '"shardLengths": ["1"]'))
    convert("libero-rlds", tmp_path / "rlds", tmp_path / "set", "--sets", "a", code=1)
    assert "says that the file has 1 records, not more" in capsys.readouterr().err
    rlds_datasets.write(tmp_path / "rlds", "b", "1.0.0", [rlds_datasets.RecordedEpisode(episode, {})], num_shards=1)
    convert("libero-rlds", tmp_path / "rlds", tmp_path / "set", "--sets", "b", code=1)
    assert "'steps/is_first' is true at step 2, too" in capsys.readouterr().err


def test_the_other_published_scripts_take_the_published_flags(aloha, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    flags = ["--raw-dir", str(aloha), "--repo-id", "me/pens", "--episodes", "0", "2", "--no-push-to-hub", "--is-mobile"]
    more = ["--mode", "image", "--workers", "0"]
    assert script("aloha_real/convert_aloha_data_to_lerobot.py").main([*flags, *more]) == 0
    assert "say the task with --task" in caplog.text
    written = [raw.aloha_episode(tmp_path / "again.hdf5", number, cameras=TWO) for number in (2, 10)]
    dataset = assert_same(tmp_path / "home/me/pens", written)
    assert dataset[0]["task"] == "DEBUG"
    raw.droid_episode(tmp_path / "droid/day", "LAB+1", 0, 4)
    flags = ["--data_dir", str(tmp_path / "droid"), "--workers", "0"]
    # There is no hub here: it is told so, and the dataset is complete.
    assert script("droid/convert_droid_data_to_lerobot.py").main([*flags, "--push_to_hub"]) == 1
    assert "'your_hf_username/my_droid_dataset' was not sent" in capsys.readouterr().err
    assert len(LeRobotDataset(tmp_path / "home/your_hf_username/my_droid_dataset")) == 4
