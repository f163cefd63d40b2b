"""What the rows of a dataset's tables say about time, order and task, compared with its metadata; and its numbers."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from openpi.data.lerobot.episode_table import Episode, leave_out, named
from openpi.data.lerobot.features import dimension_names
from openpi.data.lerobot.metadata import LeRobotMetadata

_JITTER_FRAMES = 0.75  # clocks of recorders wander; a frame that is missing makes a whole one
_DRIFT = 0.01  # of a clock: 29.97 for 30


class RowsError(ValueError):
    """Rows that cannot be used, with the first of them.

    Attributes:
        episode: its number.
        frames: first and last, numbers in the episode.
    """

    def __init__(self, message: str, episode: int, frames: tuple[int, int]):
        super().__init__(message)
        self.episode = episode
        self.frames = frames

    def __reduce__(self) -> tuple[type["RowsError"], tuple[str, int, tuple[int, int]]]:
        return RowsError, (str(self), self.episode, self.frames)  # it crosses from worker processes


def check_rows(
    columns: Mapping[str, np.ndarray], bounds: np.ndarray, episodes: Sequence[Episode], metadata: LeRobotMetadata
) -> None:
    """Looks at the index columns.

    Args:
        columns: of `INDEX_FEATURES`, [n] each.
        bounds: int64[episodes 2], the rows of each episode.
    Raises:
        RowsError: rows out of order, times that do not go with `fps`, or a task that is not listed.
    """
    frames = columns["frame_index"]
    is_inside = np.ones(len(frames), bool)
    is_inside[bounds[:, 0]] = False
    steps = np.diff(frames, prepend=0)
    if (bad := is_inside & (steps < 0)).any():  # one number for all is none; times tell of a row that is there twice
        row = int(np.argmax(bad))
        raise _rows_error(
            row,
            bounds,
            episodes,
            f"{_place(row, bounds, episodes)}: frame_index is {frames[row]} after {frames[row - 1]}; expected rows in "
            "the order of time. Sort the rows; or, if it is the numbers that are wrong, `openpi dataset check DATASET "
            "--fix FOLDER` numbers them anew",
        )
    _check_times(columns["timestamp"].astype(np.float64), is_inside, bounds, episodes, metadata)
    _check_tasks(columns["task_index"], bounds, episodes, metadata)


def _check_times(
    times: np.ndarray,
    is_inside: np.ndarray,
    bounds: np.ndarray,
    episodes: Sequence[Episode],
    metadata: LeRobotMetadata,
) -> None:
    fps = metadata.fps
    fix = (
        f"Correct 'fps' in meta/info.json, or write timestamp = frame_index / {fps:g}, as `openpi dataset check "
        "DATASET --fix FOLDER` does"
    )
    steps = np.diff(times, prepend=0.0)
    if (bad := is_inside & ~(np.abs(steps * fps - 1) <= _JITTER_FRAMES)).any():
        row = int(np.argmax(bad))
        index = episodes[int(np.searchsorted(bounds[:, 1], row, side="right"))].index
        raise _rows_error(
            row,
            bounds,
            episodes,
            f"{_place(row, bounds, episodes)}: its timestamp is {times[row]:.4f} s, and {times[row - 1]:.4f} s the one "
            f"before; expected {1 / fps:.4f} s between two, since meta/info.json says fps {fps:g}. {fix}; or "
            f"{leave_out([index])}",
        )
    taken = times[bounds[:, 1] - 1] - times[bounds[:, 0]]
    expected = (np.diff(bounds, axis=1)[:, 0] - 1) / fps
    if (bad := np.abs(taken - expected) > _JITTER_FRAMES / fps + _DRIFT * expected).any():
        number = int(np.argmax(bad))
        episode = episodes[number]
        rate = f", {(episode.length - 1) / taken[number]:.4g} frames per second" if taken[number] > 0 else ""
        raise RowsError(
            f"{episode.data_path}: the {episode.length} timestamps of episode {episode.index} take "
            f"{taken[number]:.3f} s{rate}; expected {expected[number]:.3f} s, since meta/info.json says fps {fps:g}. "
            f"{fix}; or {leave_out([episode.index])}",
            episode.index,
            (0, episode.length - 1),
        )


def _check_tasks(tasks: np.ndarray, bounds: np.ndarray, episodes: Sequence[Episode], metadata: LeRobotMetadata) -> None:
    known = metadata.tasks.keys()
    for task in np.unique(tasks).tolist():
        if task not in known:
            rows = np.flatnonzero(tasks == task)
            raise _rows_error(
                int(rows[0]),
                bounds,
                episodes,
                f"{metadata.root}: {len(rows)} frames have task_index {task}, the first is "
                f"{_place(int(rows[0]), bounds, episodes)}; known are {sorted(known)[:20]}. The tasks file in meta/ is "
                "incomplete: bring it again, or add the task",
            )


def check_finite(
    columns: Mapping[str, np.ndarray], bounds: np.ndarray, episodes: Sequence[Episode], metadata: LeRobotMetadata
) -> None:
    """Refuses numbers that are none, whoever computed the statistics: no policy can learn from them.

    Args:
        columns: [n, ...] each; only floats can fail.
    Raises:
        ValueError: with the column, the dimension by name, how many frames, which is the first, and the way out.
    """
    for key, values in columns.items():
        if values.dtype.kind != "f":
            continue
        rows = values.reshape(len(values), -1)
        if np.isfinite(rows.sum(dtype=np.float64)):  # one pass without a mask of the same size
            continue
        is_bad = ~np.isfinite(rows)
        if not is_bad.any():
            continue
        dims = np.flatnonzero(is_bad.any(axis=0)).tolist()
        frames = np.flatnonzero(is_bad.any(axis=1))
        spoilt = _episodes_of(frames, bounds, episodes)
        out = "" if len(spoilt) == len(episodes) else f", or {leave_out(spoilt)}"
        first = _place(int(frames[0]), bounds, episodes)
        where = first if len(frames) == 1 else f"the first of {len(frames)} frames, {first} (in {named(spoilt)})"
        raise ValueError(
            f"column '{key}' of {metadata.root}, {_dimensions(key, dims, metadata)} is {rows[frames[0]][dims[0]]} "
            f"in {where}; expected finite numbers. Repair the column{out}"
        )


def _dimensions(key: str, dims: Sequence[int], metadata: LeRobotMetadata) -> str:
    feature = metadata.features.get(key, {})
    names = dimension_names(feature)
    is_named = len(names) > 1 and [len(names)] == list(feature["shape"])
    told = [f"'{names[dim]}' ({dim})" if is_named else str(dim) for dim in dims]
    return f"dimension{'s' if len(told) > 1 else ''} {', '.join(told[:8])}{' ...' if len(told) > 8 else ''}"


def _episodes_of(rows: Collection[int] | np.ndarray, bounds: np.ndarray, episodes: Sequence[Episode]) -> list[int]:
    positions = np.unique(np.searchsorted(bounds[:, 1], np.asarray(rows), side="right"))
    return [episodes[int(position)].index for position in positions]


def _place(row: int, bounds: np.ndarray, episodes: Sequence[Episode]) -> str:
    position = int(np.searchsorted(bounds[:, 1], row, side="right"))
    episode = episodes[position]
    return f"frame {row - int(bounds[position, 0])} of episode {episode.index} ({episode.data_path.name})"


def _rows_error(row: int, bounds: np.ndarray, episodes: Sequence[Episode], message: str) -> RowsError:
    position = int(np.searchsorted(bounds[:, 1], row, side="right"))
    frame = row - int(bounds[position, 0])
    return RowsError(message, episodes[position].index, (frame, frame))
