"""Signals of an episode as step functions: the value at a time is the newest sample at or before it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openpi.data.lerobot.files import read_parquet
from openpi.data.lerobot.video import VideoFile
from openpi_positronic.raw_episodes import layout

_FRAMES_AT_ONCE = 32  # more would only be waiting in memory


class Signal(abc.ABC):
    """One signal, read when asked.

    Attributes:
        name: such as `robot_state.q`.
        kind: `numeric` or `image`.
    """

    kind: str

    def __init__(self, folder: Path, name: str):
        self.name = name
        self._folder = folder

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype: ...

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""

    @property
    @abc.abstractmethod
    def timestamps(self) -> np.ndarray:
        """int64[n] nanoseconds, ascending."""

    @property
    @abc.abstractmethod
    def timelines(self) -> Mapping[str, np.ndarray]:
        """The same moments by other clocks, int64[n] each."""

    @abc.abstractmethod
    def chunks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The samples of ascending rows, [k, *shape] at a time; none is read or decoded twice."""

    def values(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The samples of any rows, [n, *shape]."""
        wanted, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        if len(wanted) == 0:
            return np.empty((0, *self.shape), self.dtype)
        return np.concatenate(list(self.chunks(wanted)))[back]

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def start_ts(self) -> int:
        return int(self.timestamps[0])

    @property
    def last_ts(self) -> int:
        return int(self.timestamps[-1])

    def rows_at(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """int64[n]: the row that holds at each time.

        Raises:
            KeyError: a time before the first sample.
            TypeError: times that are no numbers.
        """
        times = as_times(times)
        if len(times) and (times < self.timestamps[0]).any():
            raise KeyError(f"'{self.name}' starts at {self.start_ts}; there is no value at {int(times.min())}")
        return np.searchsorted(self.timestamps, times, side="right") - 1

    @property
    def time(self) -> SignalTime:
        """By time: `[t]` a value; `[[t, ...]]`, `[a:b:step]`, `[a:b]` samples."""
        return SignalTime(self)


class Samples:
    """Some samples of a signal with the times they stand for; values are read when asked."""

    def __init__(self, signal: Signal, rows: np.ndarray, timestamps: np.ndarray):
        self._signal, self._rows, self.timestamps = signal, rows, timestamps

    @functools.cached_property
    def values(self) -> np.ndarray:
        """[n, *shape]"""
        return self._signal.values(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


class SignalTime:
    """See `Signal.time`."""

    def __init__(self, signal: Signal):
        self._signal = signal

    def __getitem__(self, key: Any) -> object:
        signal = self._signal
        if isinstance(key, slice):
            return self._window(key) if key.step is None else self._at(stepped_times(key, signal.last_ts))
        if is_time(key):
            return signal.values(signal.rows_at([key]))[0]
        return self._at(as_times(key))

    def _at(self, times: np.ndarray) -> Samples:
        return Samples(self._signal, self._signal.rows_at(times), times)

    def _window(self, window: slice) -> Samples:
        """Samples of [start, stop), the first carried from before where start falls between two."""
        stamps = self._signal.timestamps
        first = 0 if window.start is None else int(np.searchsorted(stamps, as_times([window.start])[0]))
        end = len(stamps) if window.stop is None else int(np.searchsorted(stamps, as_times([window.stop])[0]))
        rows, times = np.arange(first, max(first, end)), stamps[first : max(first, end)]
        is_between = window.start is not None and 0 < first < len(stamps) and stamps[first] != window.start
        if is_between and (window.stop is None or window.start < window.stop):
            rows, times = np.insert(rows, 0, first - 1), np.insert(times, 0, as_times([window.start]))
        return Samples(self._signal, rows, times)


class NumericSignal(Signal):
    """Numbers in a table, scalars or vectors."""

    kind = "numeric"

    @property
    def dtype(self) -> np.dtype:
        return self._table[1].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._table[1].shape[1:]

    @property
    def timestamps(self) -> np.ndarray:
        return self._table[0]

    @property
    def timelines(self) -> Mapping[str, np.ndarray]:
        return self._table[2]

    def chunks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        yield self._table[1][rows]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        path = self._folder / f"{self.name}{layout.TABLE}"
        table = read_parquet(path)
        stamps, timelines = _times(table, layout.TIMESTAMP, path)
        if layout.VALUE not in table.column_names:
            raise ValueError(f"{path} has the columns {table.column_names}; expected '{layout.VALUE}'")
        return stamps, _to_array(table[layout.VALUE].combine_chunks(), path), timelines


class ImageSignal(Signal):
    """RGB images in a video, their times in a table."""

    kind = "image"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self._video.size_hw, 3)

    @property
    def timestamps(self) -> np.ndarray:
        return self._index[0]

    @property
    def timelines(self) -> Mapping[str, np.ndarray]:
        return self._index[1]

    def chunks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, len(rows), _FRAMES_AT_ONCE):
            part = rows[begin : begin + _FRAMES_AT_ONCE].tolist()
            yield np.stack([self._video.frame(row) for row in part])

    @functools.cached_property
    def _index(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        path = self._folder / f"{self.name}{layout.VIDEO_INDEX}"
        return _times(read_parquet(path), layout.FRAME_TIMESTAMP, path)

    @functools.cached_property
    def _video(self) -> VideoFile:
        path = self._folder / f"{self.name}{layout.VIDEO}"
        video = VideoFile(path, gop_frames=layout.KEY_FRAME_INTERVAL)
        if video.is_counted and video.num_frames != len(self.timestamps):
            raise ValueError(
                f"{path} holds {video.num_frames} frames, and the table of their times beside it has "
                f"{len(self.timestamps)} rows; expected the same. Bring the episode again, or delete its folder"
            )
        if video.bits > 8:
            raise ValueError(f"{path} has pixels of {video.bits} bits ({video.pixel_format}); expected 8-bit RGB")
        return video


def open_signals(folder: Path) -> dict[str, Signal]:
    """The signals of an episode by name."""
    videos = {path.name.removesuffix(layout.VIDEO) for path in folder.glob(f"*{layout.VIDEO}")}
    signals: dict[str, Signal] = {name: ImageSignal(folder, name) for name in videos}
    for path in folder.glob(f"*{layout.TABLE}"):
        is_index = path.name.removesuffix(layout.VIDEO_INDEX) in videos
        if not is_index:
            name = path.name.removesuffix(layout.TABLE)
            signals[name] = NumericSignal(folder, name)
    return dict(sorted(signals.items()))


def is_time(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def as_times(times: object) -> np.ndarray:
    """int64[n]; fractions of a nanosecond are dropped."""
    if isinstance(times, str) or not isinstance(times, Sequence | np.ndarray):
        raise TypeError(f"times are nanoseconds, a list of them or a slice; found {type(times).__name__}")
    array = np.asarray(times)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise TypeError(f"times are a flat list of nanoseconds; found {array.dtype} of shape {array.shape}")
    return np.floor(array).astype(np.int64) if array.dtype.kind == "f" else array.astype(np.int64)


def stepped_times(window: slice, last_ts: int) -> np.ndarray:
    """start, start + step, ... before the stop; without a stop, up to and including `last_ts`.

    Raises:
        KeyError: no start, or a step that is not above 0.
    """
    if window.start is None or not window.step > 0:
        raise KeyError(f"[{window.start}:{window.stop}:{window.step}] needs a start and a step above 0")
    stop = last_ts + 1 if window.stop is None else window.stop
    return as_times(np.arange(window.start, stop, window.step))


def _times(table: pa.Table, column: str, path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if column not in table.column_names or len(table) == 0:
        found = "no rows" if column in table.column_names else f"the columns {table.column_names}"
        raise ValueError(f"{path} has {found}; expected at least one '{column}'")
    if table[column].null_count or not pa.types.is_integer(table[column].type):
        raise ValueError(
            f"{path}: '{column}' holds {table[column].type}; expected whole nanoseconds, none of them null"
        )
    stamps = table[column].to_numpy().astype(np.int64)  # differences of unsigned ones are never negative
    if (np.diff(stamps) <= 0).any():
        row = int(np.argmax(np.diff(stamps) <= 0)) + 1
        raise ValueError(f"{path}: '{column}' does not increase at row {row} ({stamps[row - 1]}, then {stamps[row]})")
    names = [name for name in table.column_names if name.startswith(layout.TIMELINE_PREFIX)]
    return stamps, {name.removeprefix(layout.TIMELINE_PREFIX): table[name].to_numpy() for name in names}


def _to_array(values: pa.Array | pa.ChunkedArray, path: Path) -> np.ndarray:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    is_nested = pa.types.is_nested(values.type)
    flat = values.flatten() if is_nested else values
    if values.null_count or flat.null_count:
        raise ValueError(f"{path}: '{layout.VALUE}' has nulls; expected numbers in every row")
    numbers = flat.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in "fiub":
        raise ValueError(f"{path}: '{layout.VALUE}' holds {values.type}; expected numbers or vectors of them")
    if not is_nested:
        return numbers
    width = len(numbers) // max(1, len(values))
    lengths = np.unique(np.array([len(row) for row in values]))
    if lengths.tolist() != [width]:
        raise ValueError(f"{path}: the vectors in '{layout.VALUE}' have {lengths.tolist()} values; expected one width")
    return numbers.reshape(len(values), width)
