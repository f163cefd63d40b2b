"""The `meta/` folder of a LeRobot dataset, formats v2.0, v2.1 and v3.0, as one immutable description.

v2 keeps one data file, and one video file per camera, for each episode; v3 packs many episodes into one file
and records where each begins. Here both are the same: an episode knows its data file, and for each camera the
video file and the time at which it starts in there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openpi.data.lerobot import home

Feature = dict[str, Any]
"""`{"dtype": "image" | "video" | "string" | numpy name, "shape": [...], "names": [...] | None, ...}`"""

INDEX_FEATURES: Mapping[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Scalar columns of every LeRobot table. `timestamp` is in seconds from the start of the episode."""

CAMERA_DTYPES = ("image", "video")


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """Where the frames of one episode and one camera lie."""

    path: Path
    start_s: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One recording. `[dataset_from, dataset_to)` are frame numbers in the whole dataset."""

    index: int
    length: int
    tasks: tuple[str, ...]
    dataset_from: int
    data_path: Path
    videos: Mapping[str, VideoSpan]

    @property
    def dataset_to(self) -> int:
        return self.dataset_from + self.length


@dataclass(frozen=True)
class LeRobotMetadata:
    """Everything known about a dataset without opening its tables and videos."""

    root: Path
    version: str
    fps: float
    robot_type: str | None
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...] = field(repr=False)

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """Colour cameras, whether stored as images or as video. Depth maps are not among them."""
        return self.image_keys + self.video_keys

    @property
    def image_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f["dtype"] == "image" and not is_depth(f))

    @property
    def video_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f["dtype"] == "video" and not is_depth(f))

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    @classmethod
    def load(cls, root: Path) -> "LeRobotMetadata":
        """Reads `root/meta`.

        Raises:
            FileNotFoundError: a file of the format is missing.
            ValueError: the format version is unknown, or a file does not hold what the format says.
        """
        info = _read_json(root / home.INFO_FILE)
        version = _require_known_version(root, str(info.get("codebase_version")))
        try:
            load = _load_v3 if version.startswith("v3") else _load_v2
            tasks, episodes = load(root, info)
            return cls(
                root=root,
                version=version,
                fps=info["fps"],
                robot_type=info.get("robot_type"),
                features=info["features"],
                tasks=tasks,
                episodes=tuple(episodes),
            )
        except KeyError as error:
            raise ValueError(f"{root / 'meta'} is incomplete: no entry {error} (format {version})") from error


def is_depth(feature: Feature) -> bool:
    """True for depth video, whose frames are 12-bit grey and not an RGB camera."""
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(info.get("video.is_depth_map", info.get("is_depth_map", False)))


def _require_known_version(root: Path, version: str) -> str:
    if version in home.FORMAT_VERSIONS:
        return version
    raise ValueError(
        f"{root / home.INFO_FILE} has codebase_version '{version}'; readable are "
        f"{', '.join(reversed(home.FORMAT_VERSIONS))}. Convert it with a LeRobot release that reads it"
    )


# --- v2.0, v2.1 ---------------------------------------------------------------------------------------------


def _load_v2(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[Episode]]:
    tasks = {row["task_index"]: row["task"] for row in _read_jsonl(root / "meta/tasks.jsonl")}
    rows = sorted(_read_jsonl(root / "meta/episodes.jsonl"), key=lambda row: row["episode_index"])
    video_keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    episodes, begin = [], 0
    for row in rows:
        place = {
            "episode_index": row["episode_index"],
            "episode_chunk": row["episode_index"] // info["chunks_size"],
        }
        videos = {key: VideoSpan(root / info["video_path"].format(video_key=key, **place), 0.0) for key in video_keys}
        episodes.append(
            Episode(
                index=row["episode_index"],
                length=row["length"],
                tasks=tuple(row.get("tasks", ())),
                dataset_from=begin,
                data_path=root / info["data_path"].format(**place),
                videos=videos,
            )
        )
        begin += row["length"]
    return tasks, episodes


# --- v3.0 ---------------------------------------------------------------------------------------------------


def _load_v3(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[Episode]]:
    video_keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    rows = sorted(_episode_rows_v3(root, video_keys), key=lambda row: row["episode_index"])
    return _tasks_v3(root), [_episode_v3(root, info, row, video_keys) for row in rows]


def _tasks_v3(root: Path) -> dict[int, str]:
    path = root / "meta/tasks.parquet"
    table = read_parquet(path)
    # The text is the pandas index: its column name depends on the versions of the writer, its type does not.
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if len(table) == 0:
        return {}
    if not texts:
        raise ValueError(f"{path} has no text column, found {table.column_names}")
    name = "task" if "task" in texts else texts[0]
    return dict(zip(table["task_index"].to_pylist(), table[name].to_pylist(), strict=True))


def _episode_rows_v3(root: Path, video_keys: list[str]) -> Iterator[dict[str, Any]]:
    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{root / 'meta/episodes'} holds no parquet file")
    names = ["episode_index", "tasks", "length", "dataset_from_index", "data/chunk_index", "data/file_index"]
    for key in video_keys:
        names += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    for path in paths:
        # Statistics take most of these files, and nobody here reads them.
        yield from read_parquet(path, columns=names).to_pylist()


def _episode_v3(root: Path, info: Mapping[str, Any], row: Mapping[str, Any], video_keys: list[str]) -> Episode:
    videos = {}
    for key in video_keys:
        prefix = f"videos/{key}/"
        if row.get(prefix + "file_index") is None:  # a camera that this episode was recorded without
            continue
        path = info["video_path"].format(
            video_key=key, chunk_index=row[prefix + "chunk_index"], file_index=row[prefix + "file_index"]
        )
        videos[key] = VideoSpan(root / path, row[prefix + "from_timestamp"])
    data_path = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    return Episode(
        index=row["episode_index"],
        length=row["length"],
        tasks=tuple(row.get("tasks") or ()),
        dataset_from=row["dataset_from_index"],
        data_path=root / data_path,
        videos=videos,
    )


# --- files --------------------------------------------------------------------------------------------------


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a table for partial reads, with errors that say what to do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no footer, which a writer adds last.
    """
    if not path.is_file():
        raise FileNotFoundError(f"dataset file {path} is missing; copy or download the dataset again")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is not a finished parquet file: the recording stopped before its writer was finalised. "
            f"Finish it with the writer's finalize(), or remove the episodes of this file ({error})"
        ) from error


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads the columns named that exist in the file; None = all."""
    with open_parquet(path) as file:
        present = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        return file.read(columns=present)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"dataset file {path} is missing; copy or download the dataset again")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"dataset file {path} is missing; copy or download the dataset again")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON lines: {error}") from error
