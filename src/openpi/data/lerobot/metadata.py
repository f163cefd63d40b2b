"""The `meta/` folder of a LeRobot dataset, formats v2.0, v2.1 and v3.0, as one immutable description.

v2 keeps one data file, and one video file per camera, for each episode; v3 packs many episodes into one file
and records where each begins. Here both are the same: an episode knows its data file, and for each camera the
video file and the time at which it starts in there.

Nothing in there is believed: every entry is checked for its type and range when it is read, here, and whether the
entries agree with each other; whether they agree with the data is seen when those are opened (`reader.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from openpi.data.lerobot import home
from openpi.data.lerobot.annotations import SUBTASK, SUBTASK_INDEX, SUBTASKS_FILE, is_annotation, read_subtasks
from openpi.data.lerobot.episode_table import (
    V3_COLUMNS,
    V3_VIDEO_COLUMNS,
    DataPaths,
    Episode,
    check_totals,
    counted,
    episodes_v2,
    episodes_v3,
    follow_one_another,
)
from openpi.data.lerobot.features import Feature, is_tabular, read_features, unreadable_picture
from openpi.data.lerobot.files import parquet_files, read_json, read_jsonl, read_parquet
from openpi.data.lerobot.meta_values import Rows, integer, number, one_line
from openpi.data.lerobot.tasks import read_tasks
from openpi.data.path_template import PathTemplate
from openpi.shared.file_kinds import is_stand_in

_MAX_FPS = 10_000
_CAMERA = "video_key"


@dataclass(frozen=True)
class LeRobotMetadata:
    """Everything known about a dataset without opening its tables and videos.

    Attributes:
        empty: numbers of the episodes that are listed with no frames; `episodes` has the others. A recording that was
            broken off before its first frame costs nobody the dataset.
        has_ranges: whether the table says which frames of the dataset an episode has, in a way that goes with its
            lengths; else they are counted, as in v2.
    """

    root: Path
    version: str
    fps: float
    robot_type: str | None
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    episodes: tuple[Episode, ...] = field(repr=False)
    empty: tuple[int, ...] = ()
    has_ranges: bool = True

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """Cameras of 8-bit RGB, whether stored as images or as video."""
        return self.image_keys + self.video_keys

    @property
    def image_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f["dtype"] == "image" and k not in self.unreadable)

    @property
    def video_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f["dtype"] == "video" and k not in self.unreadable)

    @property
    def column_keys(self) -> tuple[str, ...]:
        """Features that are whole columns of numbers, booleans or texts."""
        return tuple(k for k, f in self.features.items() if is_tabular(f) and k not in self.unreadable)

    @property
    def annotation_keys(self) -> tuple[str, ...]:
        """What is told frame by frame, and read by who asks for it (`annotations.py`): language columns, and `subtask`,
        the text of a column `subtask_index`."""
        found = tuple(key for key, feature in self.features.items() if is_annotation(feature))
        return (*found, SUBTASK) if self._has_subtasks else found

    @property
    def _has_subtasks(self) -> bool:
        is_indexed = SUBTASK_INDEX in self.column_keys and SUBTASK not in self.features
        return is_indexed and (self.root / SUBTASKS_FILE).is_file()

    @cached_property
    def subtasks(self) -> Mapping[int, str]:
        """Texts by `subtask_index`; empty where the dataset has none, or says them in a column of its own.

        Raises:
            ValueError: as `read_subtasks`.
        """
        return read_subtasks(self.root) if self._has_subtasks else {}

    @cached_property
    def unreadable(self) -> Mapping[str, str]:
        """Depth maps and other pictures that are no cameras here, and why."""
        reasons = {key: unreadable_picture(key, feature) for key, feature in self.features.items()}
        return {key: reason for key, reason in reasons.items() if reason is not None}

    def check_readable(self, keys: Iterable[str]) -> None:
        """Raises ValueError for the first of these features that is `unreadable`."""
        for key in keys:
            if key in self.unreadable:
                raise ValueError(f"'{key}' of {self.root} {self.unreadable[key]}. To go on, take it out of the recipe")

    @property
    def num_frames(self) -> int:
        return sum(episode.length for episode in self.episodes)

    @classmethod
    def load(cls, root: Path, *, trust_totals: bool = False) -> "LeRobotMetadata":
        """Reads `root/meta`.

        Args:
            trust_totals: read a table that has fewer episodes than `info.json` says.
        Raises:
            FileNotFoundError: a file of the format is missing.
            ValueError: the format version is unknown, or an entry is not what the format says; the message has the
            file, the entry, what was found and what was expected.
        """
        path = root / home.INFO_FILE
        info = read_json(path)
        version = _require_known_version(path, str(info.get("codebase_version")))
        robot = info.get("robot_type")
        fps = number(_entry(info, "fps", path), f"{path}, 'fps'", 1e-3, _MAX_FPS)
        features = read_features(_entry(info, "features", path), f"{path}, 'features'")
        load = _load_v3 if version.startswith("v3") else _load_v2
        tasks, episodes = load(root, path, info, features)
        has_ranges = follow_one_another(episodes)
        if not has_ranges:
            episodes = counted(episodes)
        if not trust_totals:
            check_totals(episodes, info, path)
        return cls(
            root=root,
            version=version,
            fps=fps,
            robot_type=None if robot is None else one_line(robot, f"{path}, 'robot_type'"),
            features=features,
            tasks=tasks,
            episodes=tuple(episode for episode in episodes if episode.length),
            empty=tuple(episode.index for episode in episodes if not episode.length),
            has_ranges=has_ranges,
        )


def is_whole(root: Path) -> bool:
    """Whether all files that the description of a dataset names are in its folder, and none is a Git LFS pointer."""
    try:
        episodes = LeRobotMetadata.load(root).episodes
    except (OSError, ValueError):
        return False
    files = {path for each in episodes for path in (each.data_path, *(span.path for span in each.videos.values()))}
    return all(path.is_file() and not is_stand_in(path) for path in files)


def _entry(info: Mapping[str, object], name: str, path: Path) -> object:
    if name not in info:
        raise ValueError(f"{path} is incomplete: no entry '{name}' (format {info.get('codebase_version')})")
    return info[name]


def _require_known_version(path: Path, version: str) -> str:
    if (known := f"v{version.removeprefix('v')}") in home.FORMAT_VERSIONS:
        return known
    raise ValueError(
        f"{path} has codebase_version '{version}'; readable are {', '.join(reversed(home.FORMAT_VERSIONS))}. Convert "
        "it with a LeRobot release that reads it"
    )


_Loaded = tuple[dict[int, str], list[Episode]]


def _load_v2(root: Path, path: Path, info: Mapping[str, object], features: Mapping[str, Feature]) -> _Loaded:
    paths = _paths(root, path, info, features, required=("episode_index",), optional=("episode_chunk",))
    chunks_size = integer(_entry(info, "chunks_size", path), f"{path}, 'chunks_size'", 1)
    file = root / "meta/episodes.jsonl"
    episodes = episodes_v2(Rows.of_objects(file, read_jsonl(file)), chunks_size, paths)
    file = root / "meta/tasks.jsonl"
    rows = Rows.of_objects(file, read_jsonl(file))
    return read_tasks(rows, "task", episodes), episodes


def _load_v3(root: Path, path: Path, info: Mapping[str, object], features: Mapping[str, Feature]) -> _Loaded:
    paths = _paths(root, path, info, features, required=("chunk_index", "file_index"))
    episodes = episodes_v3(_episode_rows_v3(root, list(paths.videos)), paths)
    file = root / "meta/tasks.parquet"
    table = read_parquet(file)
    # The text is the pandas index: its column name depends on the versions of the writer, its type does not.
    texts = [f.name for f in table.schema if f.name != "task_index" and not _is_number(f.type)]
    if len(table) and not texts:
        raise ValueError(f"{file} has no text column, found {table.column_names}")
    column = "task" if "task" in texts else next(iter(texts), "")
    return read_tasks(Rows.of_table(file, table), column, episodes), episodes


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _episode_rows_v3(root: Path, video_keys: list[str]) -> list[Rows]:
    files = parquet_files(root / "meta/episodes")
    if not files:
        raise FileNotFoundError(f"{root / 'meta/episodes'} holds no parquet file; copy or download the dataset again")
    # Statistics take most of these files, and nobody here reads them.
    names = [*V3_COLUMNS, *(f"videos/{key}/{part}" for key in video_keys for part in V3_VIDEO_COLUMNS)]
    return [Rows.of_table(file, read_parquet(file, columns=names)) for file in files]


def _paths(
    root: Path,
    path: Path,
    info: Mapping[str, object],
    features: Mapping[str, Feature],
    *,
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> DataPaths:
    data = PathTemplate(_entry(info, "data_path", path), f"{path}, 'data_path'", required=required, optional=optional)
    cameras = [key for key, f in features.items() if f["dtype"] == "video" and unreadable_picture(key, f) is None]
    if not cameras:
        return DataPaths(root, data, {})
    if len(cameras) > 1:  # a single one may do without its name in the path
        required = (*required, _CAMERA)
    video = PathTemplate(
        _entry(info, "video_path", path),
        f"{path}, 'video_path'",
        required=required,
        optional=(*optional, _CAMERA),
        names=(_CAMERA,),
    )
    for key in cameras:
        video.check_name(_CAMERA, key)
    return DataPaths(root, data, dict.fromkeys(cameras, video))
