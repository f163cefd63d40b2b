"""Order and time of the rows: `temporal.*`."""

from collections.abc import Iterator

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import Subject
from openpi.data.lerobot.row_checks import RowsError, check_rows

REFUSED = "temporal.refused"
LEROBOT_TOLERANCE_S = 1e-4
_WRITE_TIMES = "`openpi dataset check --fix` writes frame_index / fps"


def check(subject: Subject) -> Iterator[Finding]:
    refused = list(_refused(subject))
    yield from refused
    spoilt = {finding.episode for finding in refused}
    for position, episode in enumerate(subject.episodes):
        rows = subject.rows(position)
        if episode.index not in spoilt:
            yield from _times(subject.columns["timestamp"][rows], episode.index, subject.metadata.fps)
        yield from _numbers(subject, rows, episode.index, episode.dataset_from)


def _refused(subject: Subject) -> Iterator[Finding]:
    """What training would refuse, for each episode."""
    columns, metadata = subject.columns, subject.metadata
    try:
        check_rows(columns, subject.bounds, subject.episodes, metadata)
        return
    except RowsError:
        pass
    names = ("frame_index", "timestamp", "task_index")
    for position, episode in enumerate(subject.episodes):
        rows = subject.rows(position)
        part = {name: columns[name][rows] for name in names}
        try:
            check_rows(part, np.array([[0, episode.length]]), [episode], metadata)
        except RowsError as error:
            yield Finding.of_error(REFUSED, error, episode=error.episode, frames=error.frames)


def _times(timestamps: np.ndarray, episode: int, fps: float) -> Iterator[Finding]:
    times = timestamps.astype(np.float64)
    if abs(times[0]) > 0.5 / fps:
        yield Finding(
            "temporal.start",
            Severity.WARNING,
            f"the first timestamp is {times[0]:.3f} s",
            "0, seconds count from the start of the episode",
            _WRITE_TIMES,
            episode,
            (0, 0),
            "timestamp",
        )
    off = np.abs(times - times[0] - np.arange(len(times)) / fps)
    late = np.flatnonzero(off > LEROBOT_TOLERANCE_S + np.spacing(np.float32(times[-1])))
    if len(late):
        yield Finding(
            "temporal.jitter",
            Severity.INFO,
            f"timestamps are up to {off.max() * 1000:.2f} ms beside the grid of fps {fps:g}",
            f"at most {LEROBOT_TOLERANCE_S * 1000:g} ms; LeRobot's own loader refuses more, openpi does not",
            _WRITE_TIMES,
            episode,
            (int(late[0]), int(late[-1])),
            "timestamp",
        )


def _numbers(subject: Subject, rows: slice, episode: int, begin: int) -> Iterator[Finding]:
    frames = subject.columns["frame_index"][rows]
    if (frames != np.arange(len(frames))).any():
        row = int(np.argmax(frames != np.arange(len(frames))))
        yield Finding(
            "temporal.frame-index",
            Severity.WARNING,
            f"frame_index is {frames[row]} in row {row} of the episode",
            f"{row}, one by one from 0",
            "Frames are missing, or numbered otherwise. `openpi dataset check --fix` numbers them anew",
            episode,
            (row, row),
            "frame_index",
        )
    index = subject.columns["index"][rows]
    expected = np.arange(len(index)) + begin
    if (index != expected).any():
        row = int(np.argmax(index != expected))
        yield Finding(
            "temporal.index",
            Severity.WARNING,
            f"index is {index[row]} in row {row} of the episode",
            f"{expected[row]}, counted over the whole dataset",
            "`openpi dataset check --fix` numbers them anew",
            episode,
            (row, row),
            "index",
        )
