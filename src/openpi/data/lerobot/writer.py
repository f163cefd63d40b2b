"""Writes LeRobot datasets, format v3.0, such that the library reads them (spec: 13.2 and 13.4).

writer  ->  .<name>.tmp-xxxx/  data/   one row group per episode, rolled over by size
                               videos/ one file per camera, rolled over by size, each camera on its own
                               meta/   written by finish()
finish  ->  <name>/            one rename: a dataset is there whole or not at all

Appending makes a new dataset of the same name, into which the files of the old one are linked.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError

from openpi.data.lerobot import existing, video_writer
from openpi.data.lerobot import stats as feature_stats
from openpi.data.lerobot.episode_check import FrameStream, complete_features, size_hw
from openpi.data.lerobot.existing import ExistingDataset
from openpi.data.lerobot.features import Feature
from openpi.data.lerobot.prepared import PreparedEpisode, index_stats, prepare_episode
from openpi.data.lerobot.table_writer import DATA_PATH, FILES_PER_CHUNK, TableFiles, to_table

_MB = 2**20


class LeRobotWriter:
    """Writes one dataset, episode by episode. A context manager: leaving it finishes, an exception discards.

    Args:
        root: folder of the dataset, which must not exist unless `overwrite`.
        fps: frames per second of every feature.
        features: by name, `{"dtype", "shape", "names"}`; cameras are `image` or `video` with shape (h, w, 3)
            or (3, h, w). The five index columns are added.
        overwrite: replace an existing dataset once the new one is complete.
        append: put the episodes behind those of an existing dataset, once they are complete; cameras are stored as
            they are there.
        use_videos: store `image` cameras as video.
        video_codec: `av1` or `h264`; None = the first of them that can be written here. Not for `append`.
        data_file_mb, video_file_mb: a file is closed before it would grow beyond this.
        scratch: where the dataset is until it is complete, on the same disk; None = beside `root`.
    Raises:
        FileExistsError: `root` exists.
        FileNotFoundError: there is nothing to append to.
        ValueError: a feature that the format cannot hold, or that is not what the existing dataset has.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        fps: float,
        features: Mapping[str, Feature],
        robot_type: str | None = None,
        overwrite: bool = False,
        append: bool = False,
        use_videos: bool = False,
        video_codec: str | None = None,
        data_file_mb: float = 100,
        video_file_mb: float = 200,
        scratch: Path | None = None,
    ):
        self._root = Path(root).expanduser()
        self._overwrite = overwrite
        if not append:
            existing.check_room(self._root, overwrite=overwrite)
        self._before = ExistingDataset.load(self._root) if append else None
        self._fps = fps
        self._robot_type = robot_type
        features = complete_features(features, use_videos)
        self._features = self._before.fitting(features, fps) if self._before else features
        self._encoder = ""
        if self._video_keys:
            self._encoder = video_writer.choose_encoder(self._before.video_codec if self._before else video_codec)
        for key in self._video_keys:
            video_writer.check_size(key, size_hw(self._features[key]), self._encoder)
        self._limits_mb = (data_file_mb, video_file_mb)
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, feature_stats.FeatureStats]] = []
        self._num_frames = 0
        self._num_episodes_before = 0
        self._root.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self._root.name}.tmp-", dir=scratch or self._root.parent))
        if self._before is not None:
            self._start_behind(self._before)
        self._data = TableFiles(self._temporary, data_file_mb * _MB, self._first_file("data"))
        self._videos = {
            key: video_writer.VideoFiles(
                self._temporary, key, fps, video_file_mb * _MB, self._first_file(f"videos/{key}")
            )
            for key in self._video_keys
        }

    @property
    def features(self) -> Mapping[str, Feature]:
        """As they are stored, index columns included."""
        return self._features

    @property
    def encoder(self) -> str:
        """Of the videos; empty without."""
        return self._encoder

    @property
    def temporary(self) -> Path:
        """Folder of the dataset before it is finished; further files to belong to it may be put there."""
        return self._temporary

    def add_episode(self, frames: Mapping[str, np.ndarray | FrameStream], task: str | Sequence[str]) -> None:
        """Appends one episode.

        Args:
            frames: every feature but the index columns, with a leading time axis of equal length; cameras
                uint8 RGB, [n, h, w, 3] or [n, 3, h, w], and those stored as video also as streams.
            task: one for the episode, or one for each frame.
        Raises:
            KeyError, ValueError: `frames` does not fit the features. The dataset so far is unharmed.
            OSError: the disk is full or the like. The unfinished dataset is removed.
        """
        if not isinstance(task, str) and any(len(values) != len(task) for values in frames.values()):
            lengths = {key: len(values) for key, values in frames.items()} | {"task": len(task)}
            raise ValueError(f"all features of an episode need the same number of frames, above 0; found {lengths}")
        folder = Path(tempfile.mkdtemp(prefix=".episode-", dir=self._temporary))
        try:
            episode = prepare_episode(frames, self._features, folder=folder, fps=self._fps, encoder=self._encoder)
            self.add_prepared(episode, task)
        except (KeyError, ValueError):
            raise
        except BaseException:
            self.discard()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add_prepared(self, episode: PreparedEpisode, task: str | Sequence[str]) -> None:
        """Appends an episode that was prepared for this dataset's `features` and `encoder`; errors as above."""
        try:
            self._write_episode(episode, [task] * episode.length if isinstance(task, str) else list(task))
        except BaseException:
            self.discard()
            raise

    def finish(self) -> Path:
        """Completes the dataset and moves it to its place.

        Raises:
            ValueError: no episode was added.
            FileExistsError: the place was taken in the meantime.
        """
        if not self._episodes:
            self.discard()
            raise ValueError(f"no episode was added to {self._root}; a dataset needs at least one")
        try:
            self._close_files()
            self._write_metadata()
            self._move_into_place()
        except BaseException:
            self.discard()
            raise
        return self._root

    def discard(self) -> None:
        """Removes what was written so far."""
        self._close_files(ignore_errors=True)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.discard()
        elif self._temporary.exists():
            self.finish()

    # --- one episode ----------------------------------------------------------------------------------------

    @property
    def _video_keys(self) -> list[str]:
        return [key for key, feature in self._features.items() if feature["dtype"] == "video"]

    def _start_behind(self, before: ExistingDataset) -> None:
        before.link_into(self._temporary)
        self._tasks = {text: index for index, text in before.metadata.tasks.items()}
        self._num_frames = before.metadata.num_frames
        self._num_episodes_before = len(before.metadata.episodes)
        self._robot_type = before.metadata.robot_type

    def _first_file(self, below: str) -> int:
        return self._before.next_file(below) if self._before else 0

    def _write_episode(self, episode: PreparedEpisode, tasks: Sequence[str]) -> None:
        index_columns = self._index_columns(episode.length, tasks)
        columns = {**episode.columns, **index_columns}
        stats = {**episode.stats, **index_stats(index_columns)}
        table = to_table(columns, self._features)
        row: dict[str, Any] = {
            "episode_index": self._num_episodes_before + len(self._episodes),
            "tasks": list(dict.fromkeys(tasks)),
            "length": episode.length,
            "dataset_from_index": self._num_frames,
            "dataset_to_index": self._num_frames + episode.length,
            **self._data.append(table),
        }
        for key, files in self._videos.items():
            row |= files.append(episode.videos[key])
        chunk, file = divmod(self._first_file("meta/episodes"), FILES_PER_CHUNK)
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        self._episodes.append(row)
        self._stats.append({key: stats[key] for key in self._features if key in stats})
        self._num_frames += episode.length

    def _index_columns(self, length: int, tasks: Sequence[str]) -> dict[str, np.ndarray]:
        frame = np.arange(length)
        return {
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, self._num_episodes_before + len(self._episodes)),
            "index": self._num_frames + frame,
            "task_index": np.array([self._task_index(task) for task in tasks]),
        }

    def _task_index(self, task: str) -> int:
        if task not in self._tasks:  # is asked of every frame, and there may be 30,000
            self._tasks[task] = max(self._tasks.values(), default=-1) + 1
        return self._tasks[task]

    # --- the end --------------------------------------------------------------------------------------------

    def _close_files(self, *, ignore_errors: bool = False) -> None:
        for files in (self._data, *self._videos.values()):
            try:
                files.close()
            except (OSError, FFmpegError, pa.ArrowException):
                if not ignore_errors:
                    raise

    def _write_metadata(self) -> None:
        meta = self._temporary / "meta"
        meta.mkdir(exist_ok=True)
        _write_json(meta / "info.json", self._info())
        stats = feature_stats.merge([*([self._before.stats] if self._before else []), *self._stats])
        _write_json(meta / "stats.json", _to_lists(stats))
        pq.write_table(_tasks_table(self._tasks), meta / "tasks.parquet")
        chunk, file = divmod(self._first_file("meta/episodes"), FILES_PER_CHUNK)
        episodes = meta / f"episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"
        episodes.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | _stats_columns(stats) for row, stats in zip(self._episodes, self._stats, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows), episodes)

    def _info(self) -> dict[str, object]:
        features = {key: dict(feature) for key, feature in self._features.items()}
        for key in self._video_keys:
            found = self._before.info["features"][key].get("info") if self._before else None
            features[key]["info"] = (
                found or features[key].get("info") or _video_info(features[key], self._fps, self._encoder)
            )
        data_mb, video_mb = self._limits_mb
        num_episodes = self._num_episodes_before + len(self._episodes)
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": num_episodes,
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": data_mb,
            "video_files_size_in_mb": video_mb,
            "fps": self._fps,
            "splits": {"train": f"0:{num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": video_writer.VIDEO_PATH if self._video_keys else None,
            "features": features,
        }

    def _move_into_place(self) -> None:
        self._temporary.chmod(0o755)  # mkdtemp makes folders that only their owner may read
        if self._before is None:
            existing.check_room(self._root, overwrite=self._overwrite)
        if not self._root.exists():
            self._temporary.rename(self._root)
            return
        # Beside it, where nothing is ever cleaned up: this is the user's dataset.
        replaced = self._root.with_name(f"{self._temporary.name}{existing.REPLACED}")
        self._root.rename(replaced)
        try:
            self._temporary.rename(self._root)
        except BaseException:
            replaced.rename(self._root)
            raise
        shutil.rmtree(replaced)


def _tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """A pandas table whose index is the task text, which is where the library looks for it."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": "task", "field_name": "task", **text},
        ],
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _video_info(feature: Feature, fps: float, encoder: str) -> dict[str, object]:
    height, width = size_hw(feature)
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": video_writer.codec_name(encoder),
        "video.pix_fmt": video_writer.PIXEL_FORMAT,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }


def _to_lists(stats: Mapping[str, feature_stats.FeatureStats]) -> dict[str, dict[str, list]]:
    return {key: {name: value.tolist() for name, value in stat.items()} for key, stat in stats.items()}


def _stats_columns(stats: Mapping[str, feature_stats.FeatureStats]) -> dict[str, list]:
    """Statistics of one episode as the format's flat columns."""
    return {f"stats/{key}/{name}": value for key, stat in _to_lists(stats).items() for name, value in stat.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")
