"""LeRobot datasets, formats v2.0, v2.1 and v3.0, read natively: pyarrow for tables, PyAV for video.

The values equal those of the library's `LeRobotDataset`, except that cameras are uint8 [h, w, 3] rather than
float32 [3, h, w] in [0, 1]. A sample costs what is asked for: tables are held as NumPy arrays, cameras are
decoded one frame at a time. Datasets pickle small: worker processes map the columns of the first.
"""

import contextlib
import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from openpi.data.dataset import Sample
from openpi.data.lerobot.annotations import SUBTASK, SUBTASK_INDEX, subtask_texts
from openpi.data.lerobot.columns import load_columns
from openpi.data.lerobot.episode_table import Episode, leave_out, named
from openpi.data.lerobot.features import INDEX_FEATURES
from openpi.data.lerobot.files import check_inside
from openpi.data.lerobot.home import locate_dataset
from openpi.data.lerobot.images import ImageColumns
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.row_checks import check_finite, check_rows
from openpi.data.lerobot.video import VideoCache, VideoFile
from openpi.data.lerobot.video_layout import VideoLayout
from openpi.data.shared_arrays import SharedArrays
from openpi.shared.slow import told

DELTA_TOLERANCE_S = 1e-4
_MOST_DIGESTED = 1_000_000  # rows
MAX_VIDEOS_CHECKED_AT_LOAD = 2000  # opening one takes 0.4 ms from a warm disk; the others are checked on first use


class LeRobotDataset:
    """Frames of a LeRobot dataset by index.

    A sample holds, under the dataset's own feature names: cameras uint8 [h, w, 3]; vectors float32 (integers
    int64, booleans bool), shape (1,) as 0-d; `timestamp` float32 and `frame_index`, `episode_index`, `index`,
    `task_index` int64, 0-d; `task` str. Annotations (`annotations.py`) are lists of dicts, `subtask` a str. A key
    in `delta_timestamps` gets a leading time axis and a bool mask `<key>_is_pad`, true where the step lies outside
    the episode and the nearest frame inside is repeated.

    Attributes:
        surplus_frames: by file and episode, frames of a video behind the last row of the episode; nobody reads them.

    Args:
        repo_id_or_path: see `locate_dataset`.
        root: the dataset's folder, whatever the id.
        episodes: numbers of the episodes to use; None = all. The order of the dataset is kept.
        delta_timestamps: seconds relative to the frame, multiples of 1/fps, by feature.
        columns: features that samples hold, besides the index columns and `task`; None = all but annotations.
            Cameras that are not listed are never decoded.
        metadata: of this dataset, if it was read before.
    Raises:
        FileNotFoundError: the dataset or one of its files is missing.
        ValueError: an unknown format, a file that contradicts the metadata, or a delta that is no frame
        offset.
        KeyError: an unknown feature.
        IndexError: an unknown episode.
    """

    def __init__(
        self,
        repo_id_or_path: str | Path,
        *,
        root: str | Path | None = None,
        episodes: Sequence[int] | None = None,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        columns: Collection[str] | None = None,
        metadata: LeRobotMetadata | None = None,
    ):
        self.metadata = metadata or LeRobotMetadata.load(locate_dataset(repo_id_or_path, root))
        self._episodes = _select_episodes(self.metadata, episodes)
        self._keys = _select_features(self.metadata, columns, delta_timestamps or {})
        self._deltas = {
            key: _frame_offsets(key, seconds, self.metadata.fps) for key, seconds in (delta_timestamps or {}).items()
        }
        self.episode_bounds = _bounds(self._episodes)
        self._images = ImageColumns(self.metadata.root)
        videos = [key for key in self._keys if key in self.metadata.video_keys]
        chosen = [episode.index for episode in self._episodes]
        self._layout = VideoLayout(self.metadata.episodes, chosen, videos, self.metadata.fps)
        self._videos = VideoCache(self.metadata.fps, self._layout.check)
        self.surplus_frames: dict[tuple[Path, int], int] = {}
        self._first_rows: Mapping[int, int] = {}
        # Of `select`: whose columns these are, and where in them an episode begins, relative to its place here.
        self._origin: LeRobotDataset | None = None
        self._shifts = np.zeros(len(self._episodes), np.int64)
        self._check_files()

    def select(self, episodes: Sequence[int]) -> "LeRobotDataset":
        """Some of its episodes, by number, in the order of the dataset. Nothing is read, copied or checked again.

        Raises:
            IndexError: an episode that is not among these.
        """
        position_of = {episode.index: position for position, episode in enumerate(self._episodes)}
        if unknown := sorted(set(episodes) - position_of.keys()):
            raise IndexError(f"episodes {unknown} are not among the {len(position_of)} that are read")
        positions = sorted(position_of[number] for number in set(episodes))
        chosen = tuple(self._episodes[position] for position in positions)
        if not chosen:
            raise ValueError(f"no episodes selected from {self.metadata.root} ({len(position_of)} are read)")
        bounds = _bounds(chosen)
        rows = self.episode_bounds[positions, 0] + self._shifts[positions]
        selected = object.__new__(LeRobotDataset)
        selected.__dict__ = {
            **self.__dict__,
            "_episodes": chosen,
            "episode_bounds": bounds,
            "_columns": self._columns,
            "_origin": self._origin or self,
            "_shifts": rows - bounds[:, 0],
            "_videos": VideoCache(self.metadata.fps, self._layout.check),
        }
        selected.__dict__.pop("_shared", None)
        return selected

    def __len__(self) -> int:
        return int(self.episode_bounds[-1, 1])

    def __getitem__(self, index: int, /) -> Sample:
        frame = self._normalise_index(index)
        position = self._position_of(frame)
        begin, end = self.episode_bounds[position]
        sample: Sample = {}
        for key in self._keys:
            sample[key], is_pad = self._read(key, frame, position, int(begin), int(end))
            if is_pad is not None:
                sample[f"{key}_is_pad"] = is_pad
        sample["task"] = self.metadata.tasks[int(self._columns["task_index"][frame + self._shifts[position]])]
        return sample

    def place_of(self, index: int) -> str:
        """What to call a sample in messages: its episode, the frame in it, and the dataset."""
        frame = self._normalise_index(index)
        position = self._position_of(frame)
        number, begin = self._episodes[position].index, int(self.episode_bounds[position, 0])
        return f"frame {frame - begin} of episode {number} of {self.metadata.root}"

    @property
    def episodes(self) -> tuple[Episode, ...]:
        """The selected episodes, in the order of `episode_bounds`."""
        return self._episodes

    @property
    def keys(self) -> tuple[str, ...]:
        """Features that samples hold."""
        return self._keys

    def column(self, name: str) -> np.ndarray:
        """A whole tabular feature of the selected episodes, `[n, *shape]`, read-only. No video is touched.

        Raises:
            KeyError: no such feature, or it is a camera.
        """
        if name in self._columns:
            return self._selected(self._columns[name])
        columns = [*self.metadata.column_keys, *self.metadata.annotation_keys]
        if name not in columns:
            raise KeyError(f"'{name}' is not a column of {self.metadata.root}; columns are {columns}")
        return self._load([name])[name]

    def camera_frames(self, key: str, position: int, offsets: Sequence[int]) -> list[np.ndarray]:
        """Frames of one camera of an episode, uint8 [h, w, 3] each.

        Args:
            position: of the episode in `episodes`.
            offsets: numbers of the frames in the episode.
        Raises:
            FileNotFoundError, ValueError: they cannot be decoded.
        """
        episode = self._episodes[position]
        if self.metadata.features[key]["dtype"] == "image":
            row = self._first_rows[episode.index]
            return [self._images.image_at(episode.data_path, key, row + offset) for offset in offsets]
        # By number, not by the float32 timestamp column, which is off by more than a frame beyond some hours.
        first = self._layout.first_frame(key, episode.index)
        return self._videos.frames(episode.videos[key].path, [first + offset for offset in offsets])

    def encoded_images(self, key: str, position: int) -> list[bytes]:
        """All pictures of a camera of an episode that is stored as images, as they are stored."""
        episode = self._episodes[position]
        rows = self._first_rows[episode.index] + np.arange(episode.length)
        return [self._images.encoded_at(episode.data_path, key, row) for row in rows.tolist()]

    def video_place(self, key: str, position: int) -> tuple[Path, int]:
        """The file of a camera of an episode that is stored as video, and the number of its first frame in there."""
        episode = self._episodes[position]
        return episode.videos[key].path, self._layout.first_frame(key, episode.index)

    def key_frames(self, key: str, position: int) -> np.ndarray:
        """Numbers of the frames of a camera of an episode that decode alone; all of those stored as images, and none
        where the video has no index."""
        episode = self._episodes[position]
        if self.metadata.features[key]["dtype"] == "image":
            return np.arange(episode.length)
        first = self._layout.first_frame(key, episode.index)
        numbers = self._videos.key_frames(episode.videos[key].path) - first
        return numbers[(numbers >= 0) & (numbers < episode.length)]

    def key_frame_interval(self) -> int:
        """How far apart frames lie that decode alone, in the first episode of the cameras stored as video; 1 where
        there are none, or no index of them."""
        videos = [key for key in self._keys if key in self.metadata.video_keys]
        intervals = [1]
        for key in videos:
            numbers = self.key_frames(key, 0)
            if len(numbers):
                intervals.append(int(np.diff([*numbers, self._episodes[0].length]).max()))
        return max(intervals)

    def check_finite(self) -> None:
        """Refuses numbers that no policy can learn from, in any column that samples carry.

        Raises:
            ValueError: with the column, the dimension, the episodes and frames, and the way out.
        """
        columns = {name: self._selected(column) for name, column in self._columns.items()}
        check_finite(columns, self.episode_bounds, self._episodes, self.metadata)

    # --- one sample -----------------------------------------------------------------------------------------

    def _read(self, key: str, frame: int, position: int, begin: int, end: int) -> tuple[object, np.ndarray | None]:
        """The value of one feature at `frame`, and its padding mask if the feature has a time window."""
        if key not in self._deltas:
            if key in self._columns:
                return _item(self._columns[key][frame + self._shifts[position]]), None
            return self.camera_frames(key, position, [frame - begin])[0], None
        steps = frame + self._deltas[key]
        inside = np.clip(steps, begin, end - 1)
        is_pad = steps != inside
        if key in self._columns:
            return self._columns[key][inside + self._shifts[position]], is_pad
        return np.stack(self.camera_frames(key, position, (inside - begin).tolist())), is_pad

    def _selected(self, column: np.ndarray) -> np.ndarray:
        """The rows of the selected episodes, of a column of all."""
        if len(column) == len(self) and not self._shifts.any():
            return column
        lengths = np.diff(self.episode_bounds, axis=1)[:, 0]
        rows = column[np.arange(len(self)) + np.repeat(self._shifts, lengths)]
        rows.flags.writeable = False
        return rows

    def _position_of(self, frame: int) -> int:
        """Of its episode among the selected ones."""
        return int(np.searchsorted(self.episode_bounds[:, 1], frame, side="right"))

    def _normalise_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of a dataset of {len(self)} frames")
        return int(index) % len(self)

    @cached_property
    def content(self) -> str:
        """A digest of the numbers in at most a million rows; pictures are not in it, they would have to be read."""
        found = hashlib.blake2b(digest_size=16)
        for _, column in sorted(self._columns.items()):
            if column.dtype.kind in "fiub":
                some = self._selected(column)[:: 1 + len(self) // _MOST_DIGESTED]
                found.update(np.ascontiguousarray(some).tobytes())
        return found.hexdigest()

    # --- loading --------------------------------------------------------------------------------------------

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return self._load([key for key in self._keys if key not in self.metadata.camera_keys])

    def _load(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        has_texts = SUBTASK in names and SUBTASK in self.metadata.annotation_keys
        stored = dict.fromkeys(SUBTASK_INDEX if has_texts and name == SUBTASK else name for name in names)
        loaded = load_columns(self._episodes, self.metadata, stored)
        self._first_rows, self._episodes = loaded.first_rows, loaded.episodes
        if has_texts:
            indices = loaded.values[SUBTASK_INDEX]
            loaded.values[SUBTASK] = subtask_texts(indices, self.metadata.subtasks, self.metadata.root)
        return {name: loaded.values[name] for name in names}

    def _check_files(self) -> None:
        """Finds when loading what would otherwise end a training run, or be trained on unnoticed."""
        for path in dict.fromkeys([*(episode.data_path for episode in self._episodes), *self._layout.paths]):
            check_inside(self.metadata.root, path)
        columns = self._columns
        for path in dict.fromkeys(episode.data_path for episode in self._episodes):  # the reader may have found others
            check_inside(self.metadata.root, path)
        check_rows(columns, self.episode_bounds, self._episodes, self.metadata)
        videos = self._layout.paths[:MAX_VIDEOS_CHECKED_AT_LOAD]
        for path in told(videos, f"videos of {self.metadata.root} opened", len(videos)):
            self._check_video(path)

    def _check_video(self, path: Path) -> None:
        try:
            video = VideoFile(path, self.metadata.fps)
        except (FileNotFoundError, ValueError) as error:
            indices = self._layout.layout(path).episodes
            out = f"It holds {named(indices)}: or {leave_out(indices)}, or take the camera out of the recipe"
            raise type(error)(f"{error}. {out}") from error
        try:
            surplus = self._layout.check(video)
            self.surplus_frames |= {(path, episode): frames for episode, frames in surplus.items()}
        finally:
            video.close()

    @cached_property
    def _shared(self) -> SharedArrays | None:
        """The columns for worker processes; None = there is no room for that, and each reads its own."""
        if self._origin is not None:
            return self._origin._shared
        with contextlib.suppress(OSError):
            return SharedArrays(self._columns)
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_columns": self._shared, "_shared": None, "_origin": None}

    def __setstate__(self, state: Sample) -> None:
        del state["_shared"]
        if state["_columns"] is None:
            del state["_columns"]
            state["_shifts"] = np.zeros_like(state["_shifts"])
        self.__dict__.update(state)


def _bounds(episodes: Sequence[Episode]) -> np.ndarray:
    """int64 [episodes, 2]: the first row of each, and the one behind its last."""
    ends = np.cumsum([episode.length for episode in episodes], dtype=np.int64)
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)


def _select_episodes(metadata: LeRobotMetadata, wanted: Sequence[int] | None) -> tuple[Episode, ...]:
    if wanted is None:
        chosen = metadata.episodes
    else:
        by_index = {episode.index: episode for episode in metadata.episodes}
        if unknown := sorted(set(wanted) - by_index.keys()):
            raise IndexError(
                f"episodes {unknown} are not in {metadata.root}, which has {len(by_index)} episodes "
                f"numbered {min(by_index, default=0)} to {max(by_index, default=0)}"
            )
        chosen = tuple(by_index[index] for index in sorted(set(wanted)))
    if not chosen:
        raise ValueError(f"no episodes selected from {metadata.root} ({len(metadata.episodes)} in the dataset)")
    return chosen


def _select_features(
    metadata: LeRobotMetadata, columns: Collection[str] | None, deltas: Mapping[str, Sequence[float]]
) -> tuple[str, ...]:
    """Features that samples hold, in the order of the dataset."""
    usable = {*metadata.camera_keys, *metadata.column_keys}
    readable = [key for key in metadata.features if key in usable]
    readable += [key for key in INDEX_FEATURES if key not in readable]
    asked = {*deltas, *(readable if columns is None else columns)}
    readable += metadata.annotation_keys
    if unknown := sorted(asked - set(readable)):
        metadata.check_readable(unknown)
        raise KeyError(f"{metadata.root} has no features {unknown}; it has {readable}")
    return tuple(key for key in readable if key in asked or key in INDEX_FEATURES)


def _frame_offsets(key: str, seconds: Sequence[float], fps: float) -> np.ndarray:
    exact = np.asarray(seconds, np.float64) * fps
    offsets = np.rint(exact).astype(np.int64)
    if (np.abs(exact - offsets) / fps > DELTA_TOLERANCE_S).any():
        off = [second for second, x, n in zip(seconds, exact, offsets, strict=True) if abs(x - n) / fps > 1e-4]
        raise ValueError(
            f"delta_timestamps['{key}'] has {off} s, which are no multiples of 1/fps = {1 / fps:.6g} s "
            f"(within {DELTA_TOLERANCE_S} s); write them as k/{fps:g}"
        )
    return offsets


def _item(value: object) -> object:
    """One row as a caller may own it: arrays copied out of the shared column, numbers as 0-d arrays."""
    if isinstance(value, str):
        return value
    return copy.deepcopy(value) if isinstance(value, list) else np.array(value)
