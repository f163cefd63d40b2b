"""Sessions that `openpi serve --record` has kept, as a dataset: what the robot saw, and what it was told.

A session has a row whenever the robot asked, and a chunk of actions for the time until it asked again. Sampled at the
rate of the robot's control loop, each frame has the newest observation and the action of the chunk that was due then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from openpi.convert.sampling import NS_PER_S, instants, longest_wait, newest
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, found, relative
from openpi.shared.errors import listed
from openpi.shared.tree import Tree, flatten
from openpi_client.base_policy import Observation

_PROMPT, _ACTIONS = "prompt", "actions"
_LONG_WAIT_S = 1.0  # beyond a chunk


class Exchange(Protocol):
    """A request and its answer, as `openpi.serving.recorded` has it."""

    @property
    def inputs(self) -> object: ...
    @property
    def outputs(self) -> object: ...
    @property
    def received_ns(self) -> int | None: ...


@dataclass(frozen=True)
class Sessions:
    """Recorded sessions.

    Attributes:
        root: a session's MCAP file, or a folder of them.
        read_session: the exchanges of a file, in order.
        fps: rate of the robot's control loop; default: as often as it asked, with the first action of a chunk.
    """

    root: Path
    read_session: Callable[[Path], Iterable[Exchange]] = field(repr=False)
    fps: float | None = None

    def episodes(self) -> Sequence[EpisodeRef]:
        paths = found(self.root, ["**/*.mcap"], "sessions that were recorded as MCAP")
        return [EpisodeRef(relative(path, self.root), (path,)) for path in paths]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        path = ref.files[0]
        log = _Log.read(path, self._answered(path))
        named = [_column_name(key) for key in (*log.vectors, *log.cameras)] + [_ACTIONS]
        if len(set(named)) != len(named):
            raise ValueError(f"{path}: two of its keys would be one column: {listed(named)}")
        fps = _asking_rate(log.times_ns) if self.fps is None else self.fps
        at = instants([log.times_ns], fps)
        rows = newest(log.times_ns, at)
        columns: dict[str, RawColumn] = {
            _column_name(key): Numbers(np.stack(values)[rows], f"inputs/{key}") for key, values in log.vectors.items()
        }
        for key, size_hw in log.cameras.items():
            frames = _repeated(self._pictures(path, key), rows)
            columns[_column_name(key)] = Camera(len(rows), size_hw, frames, f"inputs/{key}")
        columns[_ACTIONS] = Numbers(_due(log, rows, at, fps), f"outputs/{_ACTIONS}, the row that was due")
        remarks = [f"{log.num_refused} requests got no actions, and are left out"] if log.num_refused else []
        begin_s, wait_s = longest_wait(log.times_ns, at)
        chunk_s = max(map(len, log.chunks)) / fps
        if wait_s > chunk_s + _LONG_WAIT_S:
            remarks.append(
                f"the robot did not ask for {wait_s:.1f} s from {begin_s:.1f} s on; its last chunk ends there after "
                f"{chunk_s:.1f} s, and is held"
            )
        tasks = [log.prompts[row] for row in rows] if log.prompts else None
        return RawEpisode(columns, fps, tasks, None, tuple(f"inputs/{key}" for key in log.others), tuple(remarks))

    def _answered(self, path: Path) -> Iterator[tuple[Observation, np.ndarray | None, int]]:
        """Observation, actions (None = refused) and time of each exchange."""
        for exchange in self.read_session(path):
            if not isinstance(exchange.inputs, Mapping) or exchange.received_ns is None:
                raise ValueError(f"{path} has requests that are no single observation with a time")
            outputs = exchange.outputs if isinstance(exchange.outputs, Mapping) else {}
            actions = outputs.get(_ACTIONS)
            usable = (
                isinstance(actions, np.ndarray) and actions.ndim == 2 and actions.dtype.kind in "fiu" and len(actions)
            )
            yield flatten(exchange.inputs), actions if usable else None, exchange.received_ns

    def _pictures(self, path: Path, key: str) -> Iterator[np.ndarray]:
        return (_hwc(inputs[key]) for inputs, actions, _ in self._answered(path) if actions is not None)


@dataclass
class _Log:
    """A session but for its pictures."""

    times_ns: np.ndarray
    chunks: list[np.ndarray]
    vectors: dict[str, list[np.ndarray]]
    cameras: dict[str, tuple[int, int]]
    prompts: list[str]
    others: tuple[str, ...]
    num_refused: int

    @classmethod
    def read(cls, path: Path, exchanges: Iterable[tuple[Mapping[str, object], np.ndarray | None, int]]) -> _Log:
        times: list[int] = []
        log = cls(np.zeros(0, np.int64), [], {}, {}, [], (), 0)
        for inputs, actions, time_ns in exchanges:
            if actions is None:
                log.num_refused += 1
                continue
            if not times:
                log._begin(inputs)
            log._add(path, len(times), inputs, actions)
            times.append(time_ns)
        if not times:
            raise ValueError(f"{path} has no request that got actions [h, d]; found {log.num_refused} others")
        log.times_ns = np.array(times, np.int64)
        if np.any(np.diff(log.times_ns) < 0):
            raise ValueError(f"{path}: its clock went back during the session")
        return log

    def _begin(self, inputs: Tree) -> None:
        for key, value in inputs.items():
            if _is_picture(value):
                self.cameras[key] = _hwc(value).shape[:2]
            elif _is_vector(value):
                self.vectors[key] = []
            elif key != _PROMPT:
                self.others = (*self.others, key)

    def _add(self, path: Path, number: int, inputs: Mapping[str, object], actions: np.ndarray) -> None:
        for key, values in self.vectors.items():
            value = np.atleast_1d(np.asarray(inputs.get(key)))
            if not _is_vector(inputs.get(key)) or (values and values[0].shape != value.shape):
                raise ValueError(f"{path}, request {number}: '{key}' is not as in the first; it has {listed(inputs)}")
            values.append(value)
        if any(not _is_picture(inputs.get(key)) for key in self.cameras):
            raise ValueError(
                f"{path}, request {number}: it lacks a picture that the first has; it has {listed(inputs)}"
            )
        prompt = inputs.get(_PROMPT)
        if prompt is not None:
            self.prompts.append(prompt.decode("utf-8", "replace") if isinstance(prompt, bytes) else str(prompt))
        if len(self.prompts) not in (0, number + 1) or (self.chunks and self.chunks[0].shape[1:] != actions.shape[1:]):
            raise ValueError(f"{path}, request {number}: its prompt or the width of its actions is not as in the first")
        self.chunks.append(actions)


def _column_name(key: str) -> str:
    """Datasets allow no slashes."""
    return key.replace("/", ".")


def _due(log: _Log, rows: np.ndarray, at_ns: np.ndarray, fps: float) -> np.ndarray:
    """float64[n d], of the newest chunk the row for the time that has passed; its last one from then on."""
    passed = (at_ns - log.times_ns[rows]) / NS_PER_S * fps
    # Not below the row that is due by a rounding of the clock.
    places = np.floor(passed + 1e-3).astype(int)
    return np.stack(
        [log.chunks[row][min(place, len(log.chunks[row]) - 1)] for row, place in zip(rows, places, strict=True)]
    )


def _asking_rate(times_ns: np.ndarray) -> float:
    """Whole requests per second, at least one."""
    if len(times_ns) < 2:
        raise ValueError("it has one request only, which is no episode")
    return float(max(1, round(NS_PER_S / max(1.0, float(np.median(np.diff(times_ns)))))))


def _repeated(frames: Iterator[np.ndarray], rows: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of ascending rows, which may repeat or be left out."""
    at, frame = -1, np.zeros(0)
    for row in rows:
        while at < row:
            at, frame = at + 1, next(frames)
        yield frame


def _is_picture(value: object) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3:
        return False
    return 3 in (value.shape[0], value.shape[-1])


def _hwc(value: np.ndarray) -> np.ndarray:
    return value if value.shape[-1] == 3 else np.moveaxis(value, 0, -1)


def _is_vector(value: object) -> bool:
    if isinstance(value, bool | int | float):
        return True
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf" and value.ndim <= 1
