"""Datasets whose metadata, tables and videos are wrong or contradict each other are refused, by name and with a fix."""

import dataclasses
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import paths
from openpi.cli.data import _dataset_shape
from openpi.cli.recipes import _init_choices
from openpi.data.check import runner
from openpi.data.check.repair import repair
from openpi.data.check.runner import check_dataset, check_open
from openpi.data.check.subject import EVERYTHING
from openpi.data.lerobot import shaping
from openpi.data.lerobot.existing import ExistingDataset
from openpi.data.lerobot.features import dimension_names, unreadable_picture
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.data.selection import Selection
from openpi.models.pi0_config import Pi0Config
from openpi.models.tokenizer import load_sentencepiece, state_as_text
from openpi.training.config import TrainConfig
from openpi.training.data import dataset_look, holdout, norm_stats, recipe_data
from openpi.training.data.tabular_frames import open_frames
from openpi.training.data_config import DataConfig, SimpleDataConfig, repack
from openpi.weights.safetensors_io import open_tensors

V21, V30, V30_IMAGE = "lerobot_v21/video", "lerobot_v30/converted_video", "lerobot_v30/image"
V30_CHUNKED = "lerobot_v30/chunked"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n"
EPISODES, TASKS, DATA = (
    "meta/episodes/chunk-000/file-000.parquet",
    "meta/tasks.jsonl",
    "data/chunk-000/file-000.parquet",
)
HIGH = "observation.images.cam_high"
V21_DATA = "data/chunk-000/episode_00000"
HIGH_FILE = f"videos/{HIGH}/chunk-000/file-000.mp4"
FROM, TO = f"videos/{HIGH}/from_timestamp", f"videos/{HIGH}/to_timestamp"
LENGTHS = (23, 37, 30)  # of the recorded episodes, at 10 frames a second

Spoil = Callable[[Path], object]


def info(**changes: Any) -> Spoil:
    def spoil(root: Path) -> None:
        file = root / "meta/info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def feature(key: str, **changes: Any) -> Spoil:
    def spoil(root: Path) -> None:
        features = json.loads((root / "meta/info.json").read_text())["features"]
        info(features=features | {key: features[key] | changes})(root)

    return spoil


def column(file: str, name: str, change: Callable[[list], Any], kind: pa.DataType | None = None) -> Spoil:
    def spoil(root: Path) -> None:
        table = pq.read_table(root / file)
        values = table[name].to_pylist()
        values = change(values) or values
        column = pa.array(values, kind or table[name].type)
        pq.write_table(table.set_column(table.column_names.index(name), name, column), root / file)

    return spoil


def row_gone(file: str, row: int) -> Spoil:
    def spoil(root: Path) -> None:
        table = pq.read_table(root / file)
        pq.write_table(pa.concat_tables([table.slice(0, row), table.slice(row + 1)]), root / file)

    return spoil


def ranges(begins: list, ends: list) -> Spoil:
    return together(
        column(EPISODES, "dataset_from_index", lambda values: begins),
        column(EPISODES, "dataset_to_index", lambda values: ends),
    )


def without_columns(*names: str) -> Spoil:
    def spoil(root: Path) -> None:
        features = json.loads((root / "meta/info.json").read_text())["features"]
        info(features={key: feature for key, feature in features.items() if key not in names})(root)
        for file in root.glob("data/*/*.parquet"):
            pq.write_table(pq.read_table(file).drop_columns(list(names)), file)

    return spoil


def text(file: str, content: str | bytes) -> Spoil:
    return lambda root: (root / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def line(file: str, number: int, **changes: Any) -> Spoil:
    def spoil(root: Path) -> None:
        rows = [json.loads(row) for row in (root / file).read_text().splitlines()]
        rows[number] |= changes
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return spoil


def turned(file: str) -> Spoil:
    """Has players show a video upside down, as phones do that were held so."""
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", -1 << 16, 0, 0, 0, -1 << 16, 0, 0, 0, 1 << 30)

    def spoil(root: Path) -> None:
        content = (root / file).read_bytes()
        at = content.index(upright, content.index(b"tkhd"))
        (root / file).write_bytes(content[:at] + turned + content[at + len(turned) :])

    return spoil


def video(
    file: str, fps: float, frames: int, pixels: str = "yuv420p", *, container: str = "mp4", num_streams: int = 1
) -> Spoil:
    """Replaces a video by one of some frames at some rate."""

    def spoil(root: Path) -> None:
        with av.open(str(root / file), "w", format=container) as target:
            codec, rate = "libx264" if pixels.startswith("yuv") else "ffv1", Fraction(fps).limit_denominator(1001)
            streams = [target.add_stream(codec, rate=rate, options={"bf": "0"}) for _ in range(num_streams)]
            for stream in streams:
                stream.height, stream.width, stream.pix_fmt = 64, 64, pixels
            for number in range(frames):
                image = np.full((64, 64, 3), number, np.uint8)
                for stream in streams:
                    target.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            for stream in streams:
                target.mux(stream.encode())

    return spoil


def together(*parts: Spoil) -> Spoil:
    return lambda root: [part(root) for part in parts]


def link(file: str, target: Path) -> Spoil:
    def spoil(root: Path) -> None:
        shutil.move(root / file, target)
        (root / file).symlink_to(target)

    return spoil


def at(row: int, value: Any) -> Callable[[list], None]:
    return lambda values: values.__setitem__(row, value)


BAD_METADATA: dict[str, tuple[str, Spoil, str]] = {
    "fps null": (V21, info(fps=None), r"info\.json, 'fps' is None; expected a number from 0\.001 to 10000"),
    "fps word": (V21, info(fps="fast"), r"'fps' is 'fast'; expected a number"),
    "fps zero": (V21, info(fps=0), r"'fps' is 0; expected"),
    "camera of gigapixels": (V30_IMAGE, feature("image", shape=[99999, 99999, 3]), r"\['shape'\] is 99999; expected"),
    "fps true": (V21, info(fps=True), r"'fps' is True; expected"),
    "fps nan": (V21, info(fps=float("nan")), r"'fps' is nan; expected"),
    "chunks_size zero": (V21, info(chunks_size=0), r"'chunks_size' is 0; expected a whole number from 1"),
    "robot a list": (V21, info(robot_type=["arm"]), r"'robot_type' is \['arm'\]; expected a text of one line"),
    "robot of lines": (V21, info(robot_type="arm\n2"), r"'robot_type' is 'arm\\n2'; expected a text of one line"),
    "names that move the cursor": (
        V21,
        feature("action", names=["\x1b[2J"]),
        r"\['names'\] is '\\x1b\[2J'; expected a text",
    ),
    "a key that moves the cursor": (
        V21,
        info(features={"a\x07": {"dtype": "int64"}}),
        r"'features' is 'a\\x07'; expected a",
    ),
    "features a list": (V21, info(features=["state"]), r"'features' is \['state'\]; expected an object"),
    "info a list": (V21, text("meta/info.json", "[1]"), r"info\.json holds a list; expected an object"),
    "info cut": (V21, text("meta/info.json", '{"fps": 1'), r"info\.json is not valid JSON"),
    "info empty": (V21, text("meta/info.json", ""), r"info\.json is not valid JSON: it is empty"),
    "info of another system": (V21, text("meta/info.json", '{"fps": 1}'.encode("utf-16")), r"UTF-16.*UTF-8"),
    "info nested": (V21, text("meta/info.json", "[" * 100_000), r"info\.json is not valid JSON"),
    "fps twice": (
        V21,
        lambda root: text("meta/info.json", '{"fps": 20, ' + (root / "meta/info.json").read_text()[1:])(root),
        r"info\.json is not valid JSON: it has the key 'fps' twice",
    ),
    "fps of digits": (V21, text("meta/info.json", '{"fps": ' + "9" * 5000 + "}"), r"info\.json is not valid JSON"),
    "task of half a character": (V21, line(TASKS, 0, task="pick \ud83d"), r"line 1 is not valid JSON: its text 'pick"),
    "shape negative": (V21, feature("action", shape=[-7]), r"\['action'\]\['shape'\] is -7; expected a whole number"),
    "shape a number": (V21, feature("action", shape=7), r"\['shape'\] is 7; expected a list of sizes"),
    "dtype none": (V21, feature("action", dtype=None), r"\['action'\] is .*expected an object with a 'dtype'"),
    "length a text": (
        V21,
        line("meta/episodes.jsonl", 1, length="many"),
        r"line 2, 'length' is 'many'; expected a whole",
    ),
    "length negative": (V21, line("meta/episodes.jsonl", 1, length=-1), r"line 2, 'length' is -1; expected .* from 0"),
    "length of a half": (V21, line("meta/episodes.jsonl", 1, length=36.5), r"line 2, 'length' is 36\.5; expected"),
    "episode twice": (V21, line("meta/episodes.jsonl", 1, episode_index=0), r"line 2, 'episode_index' is 0.*line 1"),
    "episode negative": (V21, line("meta/episodes.jsonl", 1, episode_index=-1), r"'episode_index' is -1; expected"),
    "episode huge": (V21, line("meta/episodes.jsonl", 1, episode_index=10**12), r"'episode_index' is 10+; expected"),
    "tasks of an episode": (
        V21,
        line("meta/episodes.jsonl", 1, tasks={"a": 1}),
        r"'tasks' is .*expected a list of texts",
    ),
    "line a list": (V21, text("meta/episodes.jsonl", "[0, 1]\n"), r"line 1 holds a list; expected an object"),
    "line without length": (V21, text("meta/episodes.jsonl", '{"episode_index": 0}\n'), r"has no 'length'"),
    "tasks file a pointer": (V21, text(TASKS, POINTER), r"tasks\.jsonl.*Git LFS pointer.*git lfs pull.*openpi fetch"),
    "task a list": (
        V21,
        line(TASKS, 0, task=["one", "two"]),
        r"line 1, 'task' is \['one', 'two'\].*a list of 2.*Keep one",
    ),
    "task null": (V21, line(TASKS, 1, task=None), r"text of task 1, which 37 frames have.*frame 0 of episode 1"),
    "task a number": (V21, line(TASKS, 0, task=3), r"'task' is 3; expected the text of task 0"),
    "task index twice": (V21, line(TASKS, 1, task_index=0), r"line 2, 'task' is .*the text of task 0 further up"),
    "task index a word": (V21, line(TASKS, 1, task_index="first"), r"line 2, 'task_index' is 'first'; expected"),
    "row gone": (
        V30,
        row_gone(EPISODES, 1),
        r"'total_episodes' is 3, .*has 2: no row of episode 1.*to go on without it",
    ),
    "row twice": (V30, column(EPISODES, "episode_index", at(1, 0)), r"row 1, 'episode_index' is 0.*row 0"),
    "length null": (V30, column(EPISODES, "length", at(1, None)), r"row 1, 'length' is None; expected a whole number"),
    "file index a word": (
        V30,
        column(EPISODES, f"videos/{HIGH}/file_index", lambda values: ["0", "x", "0"], pa.string()),
        r"row 1, 'videos/.*file_index' is 'x'; expected a whole number",
    ),
    "start negative": (V30, column(EPISODES, FROM, at(1, -2.3)), r"from_timestamp' is -2\.3; expected a second"),
    "tasks without a text": (
        V30,
        lambda root: pq.write_table(pa.table({"task_index": [0, 1]}), root / "meta/tasks.parquet"),
        r"tasks\.parquet has no text column",
    ),
    "attribute in a path": (V21, info(data_path="{episode_index.__class__}"), r"field '\{episode_index\.__class__\}'"),
    "index in a path": (V21, info(video_path="{video_key[0]}/{episode_index}"), r"field '\{video_key\[0\]\}'"),
    "endless width": (V21, info(data_path="d/{episode_index:0999999999d}"), r"field '\{episode_index:0999999999d\}'"),
    "width of a name": (V21, info(video_path="{video_key:>999999999}{episode_index}"), r"expected \{video_key\}"),
    "nested width": (V21, info(data_path="{episode_index:{episode_chunk}}"), r"'data_path' is"),
    "unknown field": (V21, info(data_path="{home}/{episode_index}"), r"field '\{home\}'; expected '\{episode_chunk\}'"),
    "absolute path": (V21, info(data_path="/etc/{episode_index}"), r"leads to '/etc/0', out of the dataset"),
    "path upwards": (V21, info(data_path="a/../../{episode_index}"), r"out of the dataset"),
    "drive of Windows": (V21, info(data_path="C:\\x\\{episode_index}"), r"out of the dataset"),
    "no number": (V21, info(data_path="data/all.parquet"), r"without '\{episode_index\}': several parts"),
    "no camera": (V21, info(video_path="videos/{episode_index}.mp4"), r"without '\{video_key\}': several parts"),
    "path null": (V21, info(video_path=None), r"'video_path' is None; expected a path with the fields"),
    "camera upwards": (
        V21,
        lambda root: info(
            features={"..": {"dtype": "video", "shape": [64, 64, 3]}}, video_path="{video_key}/{episode_index}"
        )(root),
        r"takes the name '\.\.' for \{video_key\}",
    ),
}


BAD_FILES: dict[str, tuple[str, Spoil, str]] = {
    "spans overlap": (
        V30,
        column(EPISODES, FROM, at(1, 2.2)),
        r"episode 1 starts at 2\.200 s .* overlap of 1\.0 frames",
    ),
    "spans leave a gap": (
        V30,
        together(column(EPISODES, FROM, at(1, 2.4)), column(EPISODES, TO, at(0, 2.0))),
        r"episode 0 before it ends at 2\.300 s, a gap of 1\.0",
    ),
    "spans leave a gap that the file has not": (
        V30,
        column(EPISODES, FROM, lambda _: [0.0, 3.0, 6.7]),
        r"holds 90 frames .*the table expects 97 .*, 7 of them in gaps between spans: .*truncated",
    ),
    "all at the start": (
        V30,
        column(EPISODES, FROM, lambda v: [0.0] * 3),
        r"episode 1 starts at 0\.000.*expected 2\.300",
    ),
    "spans swapped": (
        V30,
        column(EPISODES, FROM, lambda v: [6.7, 0.0, 3.7]),
        r"episode 0 starts at 6\.700 s .* the file begins",
    ),
    "file begins late": (
        V30,
        column(EPISODES, FROM, lambda v: [x + 1 for x in v]),
        r"the file begins at 0\.000 s, a gap",
    ),
    "fps of another set": (V30, info(fps=12), r"All of its spans run at 10 frames per second, .* says fps 12: correct"),
    "a folder of links": (
        V30,
        lambda root: link(f"videos/{HIGH}/chunk-000", root.parent / "elsewhere")(root),
        r"file-000\.mp4 is a link to .*elsewhere/file-000\.mp4, outside of the dataset",
    ),
    "video too long": (V30, video(HIGH_FILE, 10, 91), r"holds 91 frames \(9\.100 s\), the table expects 90 .*too long"),
    "video too short": (V30, video(HIGH_FILE, 10, 89), r"holds 89 frames .*the table expects 90 .*truncated"),
    "video of another clock": (
        V30,
        video(HIGH_FILE, 15, 90),
        r"15 frames per second; expected .*info\.json says fps 10",
    ),
    "video of another clock without an index of it": (
        V30,
        video(HIGH_FILE, 15, 135, container="matroska"),
        r"file-000\.mp4 runs at 15 frames per second; expected 10, the fps",
    ),
    "two cameras in a file": (
        V30,
        video(HIGH_FILE, 10, 90, num_streams=2),
        r"has 2 video streams \(64 x 64 yuv420p, 64 x 64 yuv420p\); expected one",
    ),
    "video of 10 bits": (V30, video(HIGH_FILE, 10, 90, "yuv420p10le"), r"pixels of 10 bits \(yuv420p10le\)"),
    "video of no known codec": (
        V30,
        lambda root: (root / HIGH_FILE).write_bytes((root / HIGH_FILE).read_bytes().replace(b"av01", b"zzzz")),
        r"file-000\.mp4 is encoded in a way that is not known here",
    ),
    "pages of images damaged": (
        V30_IMAGE,
        lambda root: pages_overwritten(root / DATA, "image.bytes"),
        r"file-000\.parquet, column 'image', row 0: it is damaged \(.*Bring the file again",
    ),
    "video turned": (V30, turned(HIGH_FILE), r"file-000\.mp4 is to be shown turned by 180 degrees"),
    "video a pointer": (
        V30,
        text(HIGH_FILE, POINTER),
        r"Git LFS pointer.*git lfs pull.*episodes 0, 1, 2.*leave them out",
    ),
    "video a web page": (V30, text(HIGH_FILE, "<!DOCTYPE html><html>"), r"not a readable video: it is a web page"),
    "video empty": (V30, text(HIGH_FILE, ""), r"not a readable video: it is empty"),
    "video a table": (V30, lambda root: shutil.copy(root / DATA, root / HIGH_FILE), r"of another format, Parquet"),
    "video cut": (
        V30,
        lambda root: (root / HIGH_FILE).write_bytes((root / HIGH_FILE).read_bytes()[:900]),
        r"begins as MP4 and lacks its index",
    ),
    "table a pointer": (V30_IMAGE, text(DATA, POINTER), r"Git LFS pointer.*git lfs pull.*leave them out with"),
    "table of zeros": (V30_IMAGE, text(DATA, bytes(900)), r"not a readable parquet file: it begins with zeros"),
    "table a text": (V30_IMAGE, text(DATA, "a,b\n1,2\n"), r"do not begin as one does \(PAR1\)"),
    "table damaged": (
        V30_IMAGE,
        lambda root: (root / DATA).write_bytes(b"PAR1" + bytes(600) + b"PAR1"),
        r"what is between is damaged",
    ),
    "clock of the table": (
        V30_IMAGE,
        column(DATA, "timestamp", lambda values: [value * 0.67 for value in values]),
        r"episode 0 take 1\.474 s, 14\.93 frames per second; expected 2\.200 s.*fps 10",
    ),
    "a moment lost": (
        V30_IMAGE,
        column(DATA, "timestamp", lambda values: values[:40] + [v + 0.1 for v in values[40:60]] + values[60:]),
        r"frame 17 of episode 1 .*timestamp is 1\.8000 s, and 1\.6000 s the one before",
    ),
    "time not a number": (V30_IMAGE, column(DATA, "timestamp", at(30, float("nan"))), r"its timestamp is nan s"),
    "a column twice": (
        V30_IMAGE,
        lambda root: pq.write_table(
            (table := pq.read_table(root / DATA)).append_column("state", table["actions"]), root / DATA
        ),
        r"file-000\.parquet has the column 'state' twice",
    ),
    "rows swapped": (V30_IMAGE, column(DATA, "frame_index", at(5, 7)), r"frame 6 .*frame_index is 6 after 7"),
    "unknown task": (
        V30_IMAGE,
        column(DATA, "task_index", at(24, 9)),
        r"1 frames have task_index 9.*frame 1 of episode 1",
    ),
    "episode in two places": (
        V30_IMAGE,
        column(DATA, "episode_index", at(80, 0)),
        r"episode 0 from row 0 and again .* 80",
    ),
    "rows of nobody": (
        V30_IMAGE,
        column(DATA, "episode_index", at(59, 7)),
        r"holds 36 frames of episode 1 .* promises 37",
    ),
    "a vector too short": (
        V30_IMAGE,
        column(DATA, "state", lambda v: [*v[:3], v[3] + [0.0], v[4][:-1], *v[5:]], pa.list_(pa.float32())),
        r"column 'state': .*\(row 3 has 9\), expected shape \(8,\)",
    ),
    "a null in a vector": (
        V30_IMAGE,
        column(DATA, "state", lambda v: [[None, *v[0][1:]], *v[1:]], pa.list_(pa.float32())),
        r"row 0 has 7, some of them null",
    ),
    "texts for numbers": (
        V30_IMAGE,
        column(DATA, "state", lambda v: [["x"] * 8 for _ in v], pa.list_(pa.string())),
        r"column 'state' holds string; expected numbers",
    ),
    "images that are numbers": (
        V30_IMAGE,
        column(DATA, "image", lambda values: [1] * len(values), pa.int64()),
        r"cells of the image column 'image' are int64; expected a struct of 'bytes'",
    ),
    "an image of 16 bits": (
        V30_IMAGE,
        column(DATA, "image", lambda values: [{"bytes": deep_png(), "path": None}] * len(values)),
        r"row 0: a picture with 16 bits a value, such as a depth map",
    ),
    "a path upwards": (
        V30_IMAGE,
        column(DATA, "image", lambda values: ["../secret.png"] * len(values), pa.string()),
        r"leads to '\.\./secret\.png', out of the dataset",
    ),
    "an image that is a program": (
        V30_IMAGE,
        column(DATA, "image", lambda values: [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}] * 90),
        r"row 0: not a readable image \(cannot identify",
    ),
    "an image of floats": (
        V30_IMAGE,
        column(DATA, "image", lambda values: [{"bytes": float_tiff(), "path": None}] * len(values)),
        r"row 0: a picture with values of the kind 'F'",
    ),
    "a table of another episode": (
        V21,
        lambda root: shutil.copy(root / f"{V21_DATA}0.parquet", root / f"{V21_DATA}1.parquet"),
        r"episode_000001\.parquet holds 0 frames of episode 1 .*it has frames of episode 0",
    ),
    "tables of two episodes exchanged": (  # their videos go by the names of the files
        V21,
        lambda root: [
            (root / f"{V21_DATA}{old}.parquet").rename(root / f"{V21_DATA}{new}.parquet")
            for old, new in ((0, 9), (1, 0), (9, 1))
        ],
        r"episode_000000\.parquet holds 0 frames of episode 0 .*it has frames of episode 1",
    ),
    "texts that are numbers": (
        V30_IMAGE,
        together(feature("state", dtype="string"), column(DATA, "state", lambda v: [1] * len(v), pa.int64())),
        r"column 'state' holds int64; expected a text in each row",
    ),
    "an image a pointer": (
        V30_IMAGE,
        column(DATA, "image", lambda values: [{"bytes": POINTER.encode(), "path": None}] * len(values)),
        r"row 0: not a readable image \(it is a Git LFS pointer",
    ),
}


def pages_overwritten(file: Path, name: str) -> None:
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunk = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema == name)
    content = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start + 40 : start + 140] = b"\xff" * 100
    file.write_bytes(content)


def float_tiff() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ones((8, 8), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


def deep_png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def copied(golden, tmp_path):
    """Copies a recorded dataset and spoils it."""

    def copy(name: str, spoil: Spoil = lambda root: None) -> Path:
        root = shutil.copytree(golden / name, tmp_path / "set")
        spoil(root)
        return root

    return copy


@pytest.mark.parametrize("case", BAD_METADATA)
def test_metadata_that_are_wrong_are_refused_with_file_entry_and_what_was_expected(copied, case):
    name, spoil, message = BAD_METADATA[case]
    with pytest.raises(ValueError, match=message):
        LeRobotMetadata.load(copied(name, spoil))


@pytest.mark.parametrize("case", BAD_FILES)
def test_tables_and_videos_that_contradict_the_metadata_are_refused(copied, case):
    name, spoil, message = BAD_FILES[case]
    root = copied(name, spoil)
    with pytest.raises(ValueError, match=message):
        LeRobotDataset(root)[0]


GOOD: dict[str, tuple[str, Spoil]] = {
    "numbers as text": (
        V21,
        together(info(fps="10", chunks_size="1000", total_frames="90"), line(TASKS, 0, task_index="0")),
    ),
    "a byte order mark": (
        V21,
        lambda root: [
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
            for file in (root / "meta").glob("*.json*")
        ],
    ),
    "numbers of pandas": (V30, column(EPISODES, "length", lambda values: [float(v) for v in values], pa.float64())),
    "starts that drift": (V30, column(EPISODES, FROM, lambda values: [0.0, 2.33, 6.06])),
    "starts that drift far": (V30, column(EPISODES, FROM, lambda values: [0.0, 2.26, 5.92])),
    "plain widths": (V21, info(data_path="data/chunk-00{episode_chunk}/episode_{episode_index:06d}.parquet")),
    "features of newer writers": (V21, lambda root: info(features=with_language(root))(root)),
    # As in sets of the hub that people train on.
    "ranges from LeRobot's converter": (V30_IMAGE, ranges([0, 0, 0], [23, 37, 30])),
    "ranges that are not there": (V30_IMAGE, ranges([None] * 3, [None] * 3)),
    "ranges that end early": (V30_IMAGE, ranges([0, 23, 60], [23, 59, 90])),
    "the file before": (
        "lerobot_v30/chunked",
        column(EPISODES, "data/file_index", lambda v: [max(0, f - 1) for f in v]),
    ),
    "no frame_index, as of GR00T": (V21, without_columns("frame_index")),
    "no index": (V21, without_columns("index")),
    "names twice": (V21, feature("observation.state", names={"motors": [*"xyzrpw", "gripper", "gripper"]})),
    "lists of one": (
        V30_IMAGE,
        together(
            *(column(DATA, k, lambda v: [[x] for x in v], pa.list_(pa.int64())) for k in ("episode_index", "index"))
        ),
    ),
    "totals": (V21, info(total_frames=91, total_episodes=2, total_tasks=0, total_videos=0)),
    "a version without v": (V21, info(codebase_version="2.1")),
    "too many names": (V21, feature("action", names=list("abcdefgh"))),
    "scalars without a shape": (V21, lambda root: info(features=without_shapes(root))(root)),
    "a vector of nothing": (
        V21,
        lambda root: info(
            features=with_language(root) | {"observation.base": {"dtype": "float32", "shape": [0], "names": None}}
        )(root),
    ),
    "a camera of height and width": (V21, feature(HIGH, shape=[64, 64], names=None)),
    "RGBA of a simulator": (
        V30_IMAGE,
        together(feature("image", shape=[64, 64, 4]), column(DATA, "image", lambda values: [*map(with_alpha, values)])),
    ),
    "files of macOS": (
        V30,
        lambda root: [
            f.with_name(f"._{f.name}").write_bytes(b"\0\5\x16\7" + bytes(99)) for f in root.rglob("*.parquet")
        ],
    ),
    "videos on another disk": (V30, lambda root: link("videos", root.parent / "disk")(root)),
    "files in the hub's cache": (V21, lambda root: into_the_cache(root)),
}


def with_alpha(cell: dict) -> dict:
    picture, stream = Image.open(io.BytesIO(cell["bytes"])).convert("RGBA"), io.BytesIO()
    picture.putalpha(9)
    picture.save(stream, "PNG")
    return {**cell, "bytes": stream.getvalue()}


def without_shapes(root: Path) -> dict:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    return {key: {k: v for k, v in f.items() if k != "shape" or f["shape"] != [1]} for key, f in features.items()}


def into_the_cache(root: Path) -> None:
    """As `snapshot_download(local_dir=...)` did before huggingface_hub 0.23."""
    blobs = root.parent / "hub/datasets--me--set/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate([path for path in root.rglob("*") if path.is_file()]):
        link(str(file.relative_to(root)), blobs / str(number))(root)


def with_language(root: Path) -> dict:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    return features | {"told": {"dtype": "language", "shape": None, "names": None}}


@pytest.mark.parametrize("case", GOOD)
def test_metadata_that_are_only_unusual_are_read_as_ever(copied, golden, case):
    name, spoil = GOOD[case]
    found, expected = LeRobotDataset(copied(name, spoil)), LeRobotDataset(golden / name)
    assert len(found) == 90
    for index in (0, 22, 23, 45, 60, 89):
        sample = found[index]
        for key, value in expected[index].items():
            np.testing.assert_array_equal(sample[key], value, err_msg=f"{key} of {index}")


def test_an_episode_that_was_taken_out_of_the_table_leaves_the_others_where_they_are(copied, golden):
    root = copied(V30, together(row_gone(EPISODES, 0), info(total_episodes=2, total_frames=67)))
    found, expected = LeRobotDataset(root), LeRobotDataset(golden / V30)
    assert [episode.index for episode in found.episodes] == [1, 2]
    for index in (0, 36, 37, 66):
        for key, value in expected[23 + index].items():
            np.testing.assert_array_equal(found[index][key], value, err_msg=f"{key} of {index}")


@pytest.mark.parametrize("how", ["null", "file gone"])
def test_an_episode_without_a_camera_is_named_and_can_be_left_out(copied, golden, how):
    if how == "null":
        columns = [f"videos/{HIGH}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
        root = copied(V30, together(*(column(EPISODES, name, at(1, None)) for name in columns)))
        error: type[Exception] = ValueError
    else:
        root = copied(V21, lambda root: (root / f"videos/chunk-000/{HIGH}/episode_000001.mp4").unlink())
        error = FileNotFoundError
    with pytest.raises(error, match=r"episode 1.*--data\.exclude-episodes 1 .*, or take the camera out of the recipe"):
        LeRobotDataset(root)
    others = [key for key in LeRobotMetadata.load(root).features if key != HIGH]
    assert len(LeRobotDataset(root, columns=others)) == 90
    found, expected = LeRobotDataset(root, episodes=[0, 2]), LeRobotDataset(golden / (V30 if how == "null" else V21))
    np.testing.assert_array_equal(found[23][HIGH], expected[60][HIGH])
    np.testing.assert_array_equal(found[52][HIGH], expected[89][HIGH])


def test_what_lerobots_converter_got_wrong_is_told_and_a_copy_is_right(copied):
    """Its issues 1919 and 2401: LeRobot/libero and others have it."""
    before = column(EPISODES, "data/file_index", lambda values: [max(0, file - 1) for file in values])
    root = copied(V30_CHUNKED, together(ranges([0, 0, 0], [23, 37, 30]), before))
    found = {finding.code: finding for finding in check_dataset(root, decodes=False).findings}
    assert found.keys() == {"metadata.ranges", "metadata.files"}
    assert found["metadata.files"].found == "its frames are in data/chunk-000/file-001.parquet"
    assert all(finding.fix.startswith("`openpi dataset split DATASET whole=rest`") for finding in found.values())
    metadata = LeRobotMetadata.load(root)
    shaping.split(metadata, {root.with_name("whole"): [0, 1, 2]})
    assert LeRobotMetadata.load(root.with_name("whole")).has_ranges
    assert not check_dataset(root.with_name("whole"), decodes=False).findings


@pytest.mark.parametrize(("more", "is_large"), [(1, False), (40, False), (40, True)])
def test_a_video_that_goes_on_after_its_episode_is_told_and_read(copied, more, is_large, monkeypatch, caplog):
    """Recorders before v3 left takes that were discarded there, too, and their tables do not say where spans end."""
    root = copied(V21, video(f"videos/chunk-000/{HIGH}/episode_000001.mp4", 10, 37 + more))
    dataset = LeRobotDataset(root)
    for index in (23, 59):  # the first and the last one of the episode
        assert abs(int(dataset[index][HIGH].mean()) - (index - 23)) <= 2
    [finding] = check_open(dataset, EVERYTHING)
    assert (finding.code, finding.episode, finding.column) == ("videos.longer", 1, HIGH)
    monkeypatch.setattr(runner, "_MAX_FRAMES", 1 if is_large else 1000)
    dataset_look.warn_of_findings(dataset, DataConfig(), 5)
    assert f"its video goes on for {more} frames after its last row" in caplog.text


def test_what_lerobot_leaves_behind_an_episode_of_a_discarded_take_is_not_read(copied):
    """Its #4104: a third of the episodes of a lab. The table says where spans end, and the file bears it out."""
    spans = [(0.0, 3.0), (3.0, 6.7), (6.7, 10.2)]  # of 23, 37 and 30 frames
    begins, ends = (
        column(EPISODES, FROM, lambda _: [s[0] for s in spans]),
        column(EPISODES, TO, lambda _: [s[1] for s in spans]),
    )
    root = copied(V30, together(begins, ends, video(HIGH_FILE, 10, 102)))
    dataset = LeRobotDataset(root)
    for index, number in ((0, 0), (22, 22), (23, 30), (59, 66), (60, 67), (89, 96)):
        assert abs(int(dataset[index][HIGH].mean()) - number) <= 2
    longer = [f for f in check_dataset(root).findings if f.code == "videos.longer"]
    assert [(f.episode, f.found[:30]) for f in longer] == [
        (0, "its video goes on for 7 frames"),
        (2, "its video goes on for 5 frames"),
    ]
    shaping.split(dataset.metadata, {root.with_name("whole"): [0, 1, 2]})
    assert not LeRobotDataset(root.with_name("whole")).surplus_frames
    column(EPISODES, TO, lambda _: [3.0, 6.7, 10.4])(root)
    with pytest.raises(ValueError, match=r"holds 102 frames .*the table expects 97"):
        LeRobotDataset(root)
    column(EPISODES, TO, lambda _: [2.9, 6.7, 10.2])(root)
    with pytest.raises(ValueError, match=r"episode 1 starts at 3\.000 s .*a gap of 7\.0 frames"):
        LeRobotDataset(root)
    # Of an episode that was taken out, whose frames a tool left where they were: it is in no span.
    together(column(EPISODES, TO, lambda _: [2.3, 6.7, 9.7]), video(HIGH_FILE, 10, 97))(root)
    assert abs(int(LeRobotDataset(root)[23][HIGH].mean()) - 30) <= 2


def test_a_shape_that_is_not_the_videos_costs_nobody_an_episode(copied):
    """Of HIL-SERL's tool for cropping: samples are brought to the model's size anyway."""
    root = copied(V21, feature(HIGH, shape=[480, 640, 3]))
    assert {(f.code, f.severity.value) for f in check_dataset(root).findings} == {("videos.size", "warning")}
    assert len(_dataset_shape.shown(root).episodes) == 3


@pytest.mark.parametrize(
    "names", [[list("abcdefg")], {"parts": ["x"], "motors": list("abcdefg")}, {"a": 0, "c": 2, "b": 1}]
)
def test_names_of_dimensions_are_taken_from_all_forms_that_writers_have(names):
    width = 3 if isinstance(names, dict) and "a" in names else 7
    assert dimension_names({"dtype": "float32", "shape": [width], "names": names}) == tuple("abcdefg"[:width])


def test_a_frame_index_that_numbers_nothing_is_told_and_not_refused(copied):
    root = copied(V30_IMAGE, column(DATA, "frame_index", lambda values: [0] * len(values)))
    assert len(LeRobotDataset(root)) == 90
    assert [f.code for f in check_dataset(root, decodes=False).findings] == ["temporal.frame-index"] * 3


def test_datasets_whose_cameras_only_name_their_axes_otherwise_are_merged(copied, golden):
    root = copied(V21, feature(HIGH, names=["height", "width", "rgb"]))
    shaping.merge([LeRobotMetadata.load(golden / V21), LeRobotMetadata.load(root)], root.with_name("both"))
    assert len(LeRobotMetadata.load(root.with_name("both")).episodes) == 6


@pytest.mark.parametrize(
    "times", [lambda v: [0.0] * len(v), lambda v: [1.7e9 + t for t in v], lambda v: [1000 * t for t in v]]
)
def test_times_that_are_no_clock_are_refused_with_the_command_that_writes_them_anew(copied, times):
    root = copied(V30_IMAGE, column(DATA, "timestamp", times))
    with pytest.raises(ValueError, match=r"its timestamp is .*`openpi dataset check DATASET --fix FOLDER`"):
        LeRobotDataset(root)
    repair(root, fixed := root.with_name("fixed"))
    assert LeRobotDataset(fixed)[45]["timestamp"] == np.float32(2.2)


def test_a_file_with_a_bad_span_is_no_concern_of_other_files(copied):
    root = copied("lerobot_v30/chunked", column(EPISODES, FROM, at(1, 0.5)))
    with pytest.raises(ValueError, match=r"file-001\.mp4: episode 1 starts at 0\.500 s"):
        LeRobotDataset(root)
    assert len(LeRobotDataset(root, episodes=[0, 2])) == 53


def test_files_may_not_lie_behind_a_link_out_of_the_dataset_but_in_the_cache_of_the_hub(copied, golden, tmp_path):
    root = copied(V30, link(HIGH_FILE, tmp_path / "elsewhere.mp4"))
    with pytest.raises(ValueError, match=r"file-000\.mp4 is a link to .*elsewhere\.mp4, outside of the dataset"):
        LeRobotDataset(root)
    snapshot = tmp_path / "datasets--me--set/snapshots/0123"
    blobs = tmp_path / "datasets--me--set/blobs"
    for number, file in enumerate(path for path in (golden / V30).rglob("*") if path.is_file()):
        target = snapshot / file.relative_to(golden / V30)
        target.parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        shutil.copy(file, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "linked"):
        assert LeRobotDataset(folder)[45][HIGH].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "stats.json is not valid JSON: it is a Git LFS pointer"),
        ('{"state": [1, 2]}', r"'state' lacks \['count', 'max', 'mean', 'min', 'std'\]"),
        (
            '{"state": {"min": [0], "max": [1], "mean": [NaN], "std": [1], "count": [9]}}',
            r"'mean' is \[nan\]; expected fin",
        ),
        (
            '{"state": {"min": ["a"], "max": [1], "mean": [0], "std": [1], "count": [9]}}',
            r"'min' is \['a'\]; expected num",
        ),
    ],
)
def test_statistics_that_are_none_are_refused_before_a_dataset_is_appended_to(copied, content, message):
    root = copied(V30_IMAGE, text("meta/stats.json", content))
    with pytest.raises(ValueError, match=message):
        ExistingDataset.load(root)


def test_an_episode_without_frames_costs_nobody_the_dataset(copied):
    """As of a recording that was broken off at once: its table and videos are not there either."""
    root = copied(V21, together(line("meta/episodes.jsonl", 1, length=0, tasks=[]), info(total_frames=53)))
    for file in root.rglob("episode_000001.*"):
        file.unlink()
    dataset = LeRobotDataset(root)
    assert [episode.index for episode in dataset.episodes] == [0, 2] and len(dataset) == 53
    np.testing.assert_array_equal(dataset[23]["episode_index"], 2)
    assert Selection(exclude_episodes=(1,)).kept(dataset.metadata) == [0, 2]
    findings = {finding.code: finding for finding in check_dataset(root, decodes=False).findings}
    assert findings["metadata.empty"].found.startswith("episode 1 ") and "metadata.totals" not in findings
    repair(root, fixed := root.with_name("fixed"))
    assert LeRobotMetadata.load(fixed).empty == (1,)


def test_episodes_are_appended_to_numbers_without_a_gap_only(copied):
    """The next number is that of an episode which is there already."""
    root = copied(V30, together(row_gone(EPISODES, 1), info(total_episodes=2, total_frames=53)))
    with pytest.raises(ValueError, match=r"expected 0, 1, 2, .*openpi dataset split .*whole=rest"):
        ExistingDataset.load(root)


# --- pictures ------------------------------------------------------------------------------------------------


def test_image_cells_are_turned_as_their_exif_data_say(copied, golden):
    def spoil(root: Path) -> None:
        def change(cells: list) -> list:
            exif, turned = Image.Exif(), io.BytesIO()
            exif[0x0112] = 3  # upside down
            Image.open(io.BytesIO(cells[0]["bytes"])).save(turned, "PNG", exif=exif)
            return [{**cells[0], "bytes": turned.getvalue()}, *cells[1:]]

        column(DATA, "image", change)(root)

    found, expected = LeRobotDataset(copied(V30_IMAGE, spoil)), LeRobotDataset(golden / V30_IMAGE)
    np.testing.assert_array_equal(found[0]["image"], expected[0]["image"][::-1, ::-1])


@pytest.mark.parametrize("kind", ["bytes", "path"])
def test_image_cells_may_be_bytes_or_a_path_alone(copied, golden, kind):
    def spoil(root: Path) -> None:
        def change(values: list) -> list:
            if kind == "bytes":
                return [value["bytes"] for value in values]
            (root / "images").mkdir()
            for row, value in enumerate(values):
                (root / f"images/{row}.png").write_bytes(value["bytes"])
            return [f"images/{row}.png" for row in range(len(values))]

        column(DATA, "image", change, pa.binary() if kind == "bytes" else pa.string())(root)

    found, expected = LeRobotDataset(copied(V30_IMAGE, spoil)), LeRobotDataset(golden / V30_IMAGE)
    for index in (0, 45, 89):
        np.testing.assert_array_equal(found[index]["image"], expected[index]["image"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "uint8"}, "is a camera stored as nested lists of uint8"),
        ({"dtype": "uint16"}, "is a picture as numbers of uint16"),
        ({"dtype": "float32", "shape": [3, 64, 64]}, "is a picture as numbers of float32"),
        ({"dtype": "video", "info": {"video.pix_fmt": "gray12le"}}, "has pixels of more than 8 bits"),
        ({"dtype": "video", "info": {"video.is_depth_map": True}}, "is a depth map"),
        ({"dtype": "video", "info": {"video.is_depth_map": False, "is_depth_map": True}}, "is a depth map"),
        ({"dtype": "video", "video_info": {"video.pix_fmt": "yuv420p10le"}}, "has pixels of more than 8 bits"),
        ({"dtype": "image", "shape": [64, 64, 1]}, r"has the shape \[64, 64, 1\]; expected"),
    ],
)
def test_pictures_that_are_not_8_bit_rgb_are_refused_by_name_and_no_camera_for_init(copied, changes, reason):
    root = copied(
        V30_IMAGE, together(feature("wrist_image", **changes), info(video_path="{video_key}/{chunk_index}{file_index}"))
    )
    metadata = LeRobotMetadata.load(root)
    assert metadata.camera_keys == ("image",)
    assert _init_choices.read_features(metadata).cameras == ("image",)
    assert "wrist_image" not in LeRobotDataset(root)[0]
    refused = f"'wrist_image' of .* {reason}.*To go on, take it out of the recipe"
    with pytest.raises(ValueError, match=refused):
        LeRobotDataset(root, columns=["wrist_image"])
    config = recipe(root, ("image", "wrist_image"))
    with pytest.raises(ValueError, match=refused):  # statistics read no pictures, and must not say another thing
        open_frames(config.data.create(config.assets_dirs, config.model), config.model)


@pytest.mark.parametrize(
    ("key", "info", "is_camera"),
    [
        ("observation.images.depth", {"video.is_depth_map": False}, False),  # what writers before 0.6 say of all
        ("top_depth", None, False),
        ("frontDepth2", {}, False),
        ("observation.images.depth", {"is_depth_map": False}, True),  # said on purpose
        ("observation.images.in_depths", {}, True),
    ],
)
def test_a_camera_that_is_called_depth_is_one_only_where_that_is_said(key, info, is_camera):
    read = {"dtype": "video", "shape": [48, 64, 3], "names": None, **({} if info is None else {"info": info})}
    reason = unreadable_picture(key, read)
    assert (reason is None) == is_camera
    assert is_camera or (reason and "set 'is_depth_map' to false" in reason)


def test_a_recipe_that_names_subtasks_and_language_gets_them_and_its_statistics_do_too():
    root = paths.GOLDEN / "lerobot_061/datasets/annotated"
    keys = {"image": "observation.images.top", "state": "observation.state", "actions": "action", "prompt": "subtask"}
    base = DataConfig(
        repack_transforms=repack({**keys, "told": "language_persistent"}), action_sequence_keys=("action",)
    )
    config = dataclasses.replace(recipe(root), data=SimpleDataConfig(repo_id=str(root), base_config=base))
    data_config = config.data.create(config.assets_dirs, config.model)
    sample = data_config.repack_transforms.inputs[0](samples(config)[4])
    assert sample["prompt"] == "carry it"
    assert [row["content"] for row in sample["told"]] == ["reach", "carry"]
    assert norm_stats.compute_norm_stats(open_frames(data_config, config.model))["state"].width == 2
    assert _init_choices.read_features(LeRobotMetadata.load(root)).cameras == ("observation.images.top",)
    spoilt = dataclasses.replace(base, repack_transforms=repack({**keys, "far": "observation.images.far"}))
    with pytest.raises(ValueError, match=r"'observation\.images\.far' of .* is a depth map"):
        samples(dataclasses.replace(config, data=SimpleDataConfig(repo_id=str(root), base_config=spoilt)))


def test_a_camera_that_is_not_there_is_not_taken_for_one_that_the_recipe_reads_already(copied):
    def spoil(root: Path) -> None:
        features = json.loads((root / "meta/info.json").read_text())["features"]
        info(features={key: value for key, value in features.items() if key != "wrist_image"})(root)

    config = recipe(copied(V30_IMAGE, spoil), ("image", "wrist_image"))
    with pytest.raises(KeyError, match="take what is not there out of the recipe") as refused:
        samples(config)
    assert "needs the key 'wrist_image'" in str(refused.value)
    assert "Did you mean" not in str(refused.value)


def test_init_says_why_what_looks_like_the_only_camera_is_none(copied):
    root = copied(V30_IMAGE, together(feature("image", dtype="uint8"), feature("wrist_image", dtype="uint16")))
    with pytest.raises(ValueError, match=r"the cameras nothing .* 'image' is a camera stored as nested lists of uint8"):
        _init_choices.read_features(LeRobotMetadata.load(root))


def test_small_integers_of_several_axes_keep_their_dtype(tmp_path):
    features = {
        "grid": {"dtype": "uint8", "shape": [4, 5], "names": None},
        "count": {"dtype": "uint8", "shape": [2], "names": None},
    }
    with LeRobotWriter(tmp_path / "set", fps=10, features=features) as writer:
        values = np.arange(60, dtype=np.uint8)
        writer.add_episode({"grid": values.reshape(3, 4, 5), "count": values[:6].reshape(3, 2)}, "count")
    sample = LeRobotDataset(tmp_path / "set")[1]
    assert sample["grid"].dtype == np.uint8
    assert sample["count"].dtype == np.int64
    np.testing.assert_array_equal(sample["grid"], np.arange(20, 40).reshape(4, 5))


# --- numbers that are none, and episodes left out --------------------------------------------------------------


def recipe(root: Path, cameras: tuple[str, ...] = ("image",), **changes: Any) -> TrainConfig:
    base = DataConfig(repack_transforms=repack({key: key for key in (*cameras, "state", "actions")}))
    data = SimpleDataConfig(repo_id=str(root), base_config=base, **changes)
    return TrainConfig(name="test", model=Pi0Config(action_horizon=4), data=data, batch_size=2, num_workers=0)


def samples(config: TrainConfig) -> LeRobotDataset:
    dataset = recipe_data.create_dataset(config.data.create(config.assets_dirs, config.model), config.model)
    assert isinstance(dataset, LeRobotDataset)
    return dataset


def spoilt_state(value: float, rows: slice, key: str = "state") -> Spoil:
    def change(values: list) -> None:
        for row in values[rows]:
            row[3] = value

    return column(DATA, key, change)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_where_the_loader_and_the_statistics_are_made(copied, value):
    names = [f"joint_{i}" for i in range(8)]
    root = copied(V30_IMAGE, together(spoilt_state(value, slice(40, 60)), feature("state", names=names)))
    config = recipe(root)
    message = (
        rf"column 'state' of .*, dimension 'joint_3' \(3\) is {value} in the first of 20 frames, frame 17 of episode 1 "
        r".*Repair the column, or leave it out with --data\.exclude-episodes 1"
    )
    with pytest.raises(ValueError, match=message):
        samples(config)
    with pytest.raises(ValueError, match=message):
        open_frames(config.data.create(config.assets_dirs, config.model), config.model)
    without = recipe(root, exclude_episodes=(1,))
    assert len(samples(without)) == 53
    assert len(open_frames(without.data.create(without.assets_dirs, without.model), without.model)) == 53


def test_a_column_that_the_recipe_does_not_read_may_hold_what_it_likes(copied):
    def spoil(root: Path) -> None:
        table = pq.read_table(root / DATA)
        effort = pa.array(np.full(len(table), np.nan, np.float32))
        pq.write_table(table.append_column("effort", effort), root / DATA)
        features = json.loads((root / "meta/info.json").read_text())["features"]
        info(features=features | {"effort": {"dtype": "float32", "shape": [1], "names": None}})(root)

    assert len(samples(recipe(copied(V30_IMAGE, spoil)))) == 90


def test_excluded_episodes_are_in_no_split_and_leave_the_others_where_they_were(copied):
    root = copied(V30_IMAGE)
    metadata = LeRobotMetadata.load(root)
    whole = recipe(root)
    split = holdout.holdout_split(held_out(whole), metadata, whole.data.create(whole.assets_dirs, whole.model))
    dropped = split[0][0]
    fewer = recipe(root, exclude_episodes=(dropped,))
    found = holdout.holdout_split(held_out(fewer), metadata, fewer.data.create(fewer.assets_dirs, fewer.model))
    assert found == (split[0][1:], split[1])
    with pytest.raises(ValueError, match=r"exclude_episodes has \[9\].*no such episodes"):
        samples(recipe(root, exclude_episodes=(9,)))
    with pytest.raises(ValueError, match=r"exclude_episodes leaves none of the 3 episodes"):
        samples(recipe(root, exclude_episodes=(0, 1, 2)))


def held_out(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, holdout_episodes=1)


def test_a_state_that_is_not_finite_is_not_written_into_a_prompt():
    with pytest.raises(ValueError, match=r"the normalised state is nan in dimension 1; expected finite numbers"):
        state_as_text(np.array([0.1, np.nan]))


# --- Git LFS pointers elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("open_file", [open_tensors, load_sentencepiece])
def test_pointers_in_place_of_weights_and_tokenizers_are_recognised(tmp_path, open_file):
    file = tmp_path / "model.safetensors"
    file.write_text(POINTER)
    with pytest.raises(ValueError, match=r"model\.safetensors .*it is a Git LFS pointer.*git lfs pull"):
        open_file(file)
