"""Records raw episodes, sample by sample; what is not finished is marked so, and what is aborted is gone."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.stream import VideoStream

from openpi_positronic.raw_episodes import layout

_ROWS_PER_GROUP = 4096
_ENCODER = "libx264"
# No B-frames: frames leave the encoder in the order in which they came, and soon. 18 is visually lossless.
_ENCODER_OPTIONS = {"g": str(layout.KEY_FRAME_INTERVAL), "bf": "0", "crf": "18", "preset": "veryfast"}


class RawDatasetWriter:
    """Adds episodes to a dataset, which is made if it is not there."""

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser()

    def new_episode(self) -> EpisodeWriter:
        """Starts the episode after the last; several processes may record into one dataset."""
        number = self._next_number()
        while True:
            path = layout.episode_path(self.root, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return EpisodeWriter(path)
            except FileExistsError:  # another process took it in the meantime
                number += 1

    def _next_number(self) -> int:
        blocks = layout.numbered_folders(self.root) if self.root.is_dir() else []
        for block in reversed(blocks):
            if episodes := layout.numbered_folders(block):
                return int(episodes[-1].name) + 1
        return 0


class EpisodeWriter:
    """Records one episode. A context manager: leaving it finishes, an exception aborts.

    Attributes:
        path: the episode's folder.
    Raises:
        FileExistsError: there is one of that number.
    """

    def __init__(self, path: Path):
        path.mkdir()
        (path / layout.UNFINISHED).touch()
        self.path = path
        self._created_ts_ns = time.time_ns()
        self._sinks: dict[str, _TableSink | _VideoSink] = {}
        self._static: dict[str, Any] = {}

    def append(self, name: str, value: object, ts_ns: int, timelines: Mapping[str, int] | None = None) -> None:
        """Adds one sample of a signal.

        Args:
            value: a number or a vector; or an image, uint8 RGB [h, w, 3], which goes to a video.
            ts_ns: later than the signal's sample before.
            timelines: the same moment by other clocks; the same ones for every sample of a signal.
        Raises:
            ValueError: a time that is not later, another dtype or shape than before, or a name that cannot be.
        """
        value = np.asarray(value)
        if name not in self._sinks:
            self._sinks[name] = self._new_sink(name, value, timelines or {})
        self._sinks[name].append(value, ts_ns, timelines or {})

    def set_static(self, name: str, value: object) -> None:
        """Sets a constant of the episode: text, number, boolean, list or map.

        Raises:
            ValueError: None, something that JSON does not hold, or the name of a signal.
        """
        if value is None:
            raise ValueError(f"constant '{name}' is None; leave it out")
        if name in self._sinks:
            raise ValueError(f"'{name}' is a signal of this episode; a constant needs another name")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"constant '{name}' cannot be stored as JSON: {error}") from error
        self._static[name] = value

    def finish(self) -> Path:
        """Completes the episode. Without a sample there is nothing to keep, and the folder is removed.

        Raises:
            ValueError: no sample was added.
            OSError: the disk is full or the like; what is there stays, marked as unfinished.
        """
        if not self._sinks:
            self.abort()
            raise ValueError(f"no sample was added to {self.path}; an episode needs at least one signal")
        for sink in self._sinks.values():
            sink.close()
        _write_json(self.path / layout.STATIC_FILE, self._static)
        _write_json(self.path / layout.META_FILE, self._meta())
        (self.path / layout.UNFINISHED).unlink()
        return self.path

    def abort(self) -> None:
        """Removes the episode."""
        for sink in self._sinks.values():
            sink.discard()
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abort()
        elif not layout.is_finished(self.path):
            self.finish()

    def _new_sink(self, name: str, value: np.ndarray, timelines: Mapping[str, int]) -> _TableSink | _VideoSink:
        if not name or "/" in name or name.startswith(".") or name.endswith(".frames"):
            raise ValueError(f"'{name}' cannot name a signal: no '/', no '.' in front and no '.frames' at the end")
        if name in self._static:
            raise ValueError(f"'{name}' is a constant of this episode; a signal needs another name")
        is_image = value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
        return (
            _VideoSink(self.path, name, value, timelines) if is_image else _TableSink(self.path, name, value, timelines)
        )

    def _meta(self) -> dict[str, object]:
        first = max(sink.first_ts for sink in self._sinks.values())
        last = max(sink.last_ts for sink in self._sinks.values())
        return {
            "schema_version": layout.SCHEMA_VERSION,
            "created_ts_ns": self._created_ts_ns,
            "writer": {
                "name": f"{__name__}.{type(self).__name__}",
                "version": metadata.version("openpi"),
                "python": platform.python_version(),
                "platform": sys.platform,
            },
            "path": str(self.path.absolute()),
            "duration_ns": last - first,
        }


class _Rows:
    """Rows of a table, written in groups."""

    def __init__(self, path: Path, time_column: str, timelines: Mapping[str, int], value_type: pa.DataType | None):
        columns = [(time_column, pa.int64())]
        columns += [] if value_type is None else [(layout.VALUE, value_type)]
        columns += [(f"{layout.TIMELINE_PREFIX}{name}", pa.int64()) for name in timelines]
        self._schema = pa.schema(columns)
        self._timelines = tuple(timelines)
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[list[Any]] = []

    def append(self, ts_ns: int, timelines: Mapping[str, int], *value: object) -> None:
        self._rows.append([ts_ns, *value, *(timelines[name] for name in self._timelines)])
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._rows = []


class _Sink:
    """What tables and videos have in common: one dtype and shape, rising times, the same timelines."""

    def __init__(self, name: str, value: np.ndarray, timelines: Mapping[str, int]):
        self._name, self._dtype, self._shape, self._timelines = name, value.dtype, value.shape, set(timelines)
        self.first_ts = self.last_ts = 0
        self._is_empty = True

    def check(self, value: np.ndarray, ts_ns: int, timelines: Mapping[str, int]) -> None:
        if (value.dtype, value.shape) != (self._dtype, self._shape):
            raise ValueError(
                f"'{self._name}' is {value.dtype} {value.shape} at {ts_ns}; it was {self._dtype} {self._shape} before"
            )
        if not self._is_empty and ts_ns <= self.last_ts:
            raise ValueError(f"'{self._name}' has a sample at {self.last_ts}; the next, at {ts_ns}, must be later")
        if set(timelines) != self._timelines:
            raise ValueError(
                f"'{self._name}' has the timelines {sorted(timelines)} at {ts_ns}; before {sorted(self._timelines)}"
            )

    def accept(self, ts_ns: int) -> None:
        self.first_ts = ts_ns if self._is_empty else self.first_ts
        self.last_ts, self._is_empty = ts_ns, False


class _TableSink(_Sink):
    def __init__(self, folder: Path, name: str, value: np.ndarray, timelines: Mapping[str, int]):
        super().__init__(name, value, timelines)
        if value.ndim > 1 or value.size == 0 or value.dtype.kind not in "iufb":
            raise ValueError(
                f"'{name}' is {value.dtype} {value.shape}; expected a number, a vector, or an image, uint8 [h, w, 3]"
            )
        element = pa.from_numpy_dtype(value.dtype)
        kind = element if value.ndim == 0 else pa.list_(element)
        self._rows = _Rows(folder / f"{name}{layout.TABLE}", layout.TIMESTAMP, timelines, kind)

    def append(self, value: np.ndarray, ts_ns: int, timelines: Mapping[str, int]) -> None:
        self.check(value, ts_ns, timelines)
        self._rows.append(ts_ns, timelines, value.tolist())
        self.accept(ts_ns)

    def close(self) -> None:
        self._rows.close()

    discard = close


class _VideoSink(_Sink):
    def __init__(self, folder: Path, name: str, value: np.ndarray, timelines: Mapping[str, int]):
        super().__init__(name, value, timelines)
        height, width = value.shape[:2]
        if height % 2 or width % 2:
            raise ValueError(f"'{name}' is {height} x {width} pixels; video needs an even height and width")
        self._container = av.open(f"file:{folder / name}{layout.VIDEO}", "w")
        stream = self._container.add_stream(_ENCODER, rate=layout.VIDEO_FPS, options=dict(_ENCODER_OPTIONS))
        assert isinstance(stream, VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        self._stream = stream
        self._rows = _Rows(folder / f"{name}{layout.VIDEO_INDEX}", layout.FRAME_TIMESTAMP, timelines, None)

    def append(self, value: np.ndarray, ts_ns: int, timelines: Mapping[str, int]) -> None:
        self.check(value, ts_ns, timelines)
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(value))))
        self._rows.append(ts_ns, timelines)
        self.accept(ts_ns)

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
        self._rows.close()

    def discard(self) -> None:
        self._container.close()
        self._rows.close()


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
