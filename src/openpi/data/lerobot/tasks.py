"""The texts of a dataset's tasks, by their number."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from openpi.data.lerobot.episode_table import Episode
from openpi.data.lerobot.files import read_parquet
from openpi.data.lerobot.meta_values import Rows, is_null, wrong

_FILES_SEARCHED = 1000
_PHRASINGS = (
    "Keep one phrasing per task, or give each an index and a line of its own and write it into the task_index of frames"
)


def read_tasks(rows: Rows, column: str, episodes: Sequence[Episode]) -> dict[int, str]:
    """Task index -> text.

    Args:
        column: of the texts.
        episodes: whose frames are counted for the message about a task without a text.
    Raises:
        ValueError: an index or a text is none, or an index has two texts.
    """
    if len(rows) == 0:
        return {}
    tasks: dict[int, str] = {}
    for row, (index, task) in enumerate(zip(rows.integers("task_index"), rows.column(column), strict=True)):
        where = rows.where(row, column)
        if is_null(task):
            raise wrong(
                where,
                None,
                f"the text of task {index}, which {_frames_of(index, episodes)}",
                "Write what the robot is told to do there; an empty text if it is told nothing",
            )
        if isinstance(task, list):
            raise wrong(where, task, f"one text of task {index}, not a list of {len(task)}", _PHRASINGS)
        if not isinstance(task, str):
            raise wrong(where, task, f"the text of task {index}")
        if tasks.setdefault(index, task) != task:
            raise wrong(where, task, f"{tasks[index]!r}, which is the text of task {index} further up", _PHRASINGS)
    return tasks


def _frames_of(index: int, episodes: Sequence[Episode]) -> str:
    """How many frames have a task, and the first: for the error, which is worth reading a column."""
    count, first = 0, ""
    for path in list(dict.fromkeys(episode.data_path for episode in episodes))[:_FILES_SEARCHED]:
        for episode, frame in _rows_with(index, path):
            first = first or f"of which the first is frame {frame} of episode {episode}"
            count += 1
    return f"{count} frames have, {first}" if count else "no frame has"


def _rows_with(index: int, path: Path) -> Iterable[tuple[object, object]]:
    try:
        table = read_parquet(path, columns=["task_index", "episode_index", "frame_index"])
        is_chosen = table["task_index"].to_numpy() == index
        return zip(
            table["episode_index"].to_numpy()[is_chosen], table["frame_index"].to_numpy()[is_chosen], strict=True
        )
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return ()  # the metadata are at fault already; this file has its own error where it is read
