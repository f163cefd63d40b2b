"""The table of episodes in `meta/`: which file holds an episode, how long it is, and whether the entries agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

from openpi.data.lerobot.meta_values import MAX_INDEX, Rows, check_unique, integer, is_null, number, wrong
from openpi.data.path_template import PathTemplate

V3_COLUMNS = (
    *("episode_index", "tasks", "length", "data/chunk_index", "data/file_index"),
    *("dataset_from_index", "dataset_to_index"),
)
V3_VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")

_NAMED = 5  # of many episodes in a message


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """Where the frames of one episode and one camera lie.

    Attributes:
        end_s: as the table says; None where it does not, as before v3.
    """

    path: Path
    start_s: float
    end_s: float | None = None


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
class DataPaths:
    """Where the files of a dataset lie.

    Attributes:
        videos: by camera.
    """

    root: Path
    data: PathTemplate
    videos: Mapping[str, PathTemplate] = field(default_factory=dict)


def episodes_v2(rows: Rows, chunks_size: int, paths: DataPaths) -> list[Episode]:
    """In the order of their numbers."""
    indices, lengths = rows.integers("episode_index"), rows.integers("length")
    check_unique(indices, rows, "episode_index")
    tasks = _tasks(rows)
    episodes, begin = [], 0
    for index, row in sorted(zip(indices, range(len(rows)), strict=True)):
        place = {"episode_index": index, "episode_chunk": index // chunks_size}
        videos = {
            key: VideoSpan(paths.root / template.format(video_key=key, **place), 0.0)
            for key, template in paths.videos.items()
        }
        data = paths.root / paths.data.format(**place)
        episodes.append(Episode(index, lengths[row], tasks[row], begin, data, videos))
        begin += lengths[row]
    return episodes


def episodes_v3(tables: Sequence[Rows], paths: DataPaths) -> list[Episode]:
    """In the order of their numbers."""
    data_path = lru_cache(None)(lambda chunk, file: paths.root / paths.data.format(chunk_index=chunk, file_index=file))
    episodes: list[Episode] = []
    places: dict[int, str] = {}
    for rows in tables:
        indices, lengths = rows.integers("episode_index"), rows.integers("length")
        check_unique(indices, rows, "episode_index")
        begins, tasks = _begins(rows, lengths), _tasks(rows)
        chunks, files = rows.integers("data/chunk_index"), rows.integers("data/file_index")
        videos = {key: _spans(rows, key, paths) for key in paths.videos}
        for row, index in enumerate(indices):
            if index in places:
                raise wrong(rows.where(row, "episode_index"), index, f"a number that {places[index]} has not already")
            spans = {key: span for key, column in videos.items() if (span := column[row]) is not None}
            data = data_path(chunks[row], files[row])
            episodes.append(Episode(index, lengths[row], tasks[row], begins[row], data, spans))
        places |= dict.fromkeys(indices, str(rows.file))
    return sorted(episodes, key=lambda episode: episode.index)


def _begins(rows: Rows, lengths: Sequence[int]) -> list[int]:
    """First frames in the dataset; -1 where the table does not say, or says another end than the length makes."""
    begins, ends = rows.optional("dataset_from_index"), rows.optional("dataset_to_index")
    if begins is None:
        return [-1] * len(rows)
    return [
        begin if type(begin) is int and (ends is None or ends[row] == begin + lengths[row]) else -1
        for row, begin in enumerate(begins)
    ]


def _spans(rows: Rows, camera: str, paths: DataPaths) -> list[VideoSpan | None]:
    """None where an episode was recorded without the camera."""
    template = paths.videos[camera]
    path = lru_cache(None)(
        lambda chunk, file: paths.root / template.format(video_key=camera, chunk_index=chunk, file_index=file)
    )
    *names, end = (f"videos/{camera}/{part}" for part in V3_VIDEO_COLUMNS)
    columns = [rows.optional(name) for name in names]
    found = [column for column in columns if column is not None]
    ends = rows.optional(end) or [None] * len(rows)
    spans: list[VideoSpan | None] = []
    for row in range(len(rows)):
        if all(is_null(column[row]) for column in found):
            spans.append(None)
            continue
        chunk, file, start_s = (None if column is None else column[row] for column in columns)
        if type(chunk) is not int or not 0 <= chunk <= MAX_INDEX:
            chunk = integer(chunk, rows.where(row, names[0]))
        if type(file) is not int or not 0 <= file <= MAX_INDEX:
            file = integer(file, rows.where(row, names[1]))
        if type(start_s) is not float or not 0 <= start_s <= MAX_INDEX:
            start_s = number(start_s, rows.where(row, names[2]), 0, MAX_INDEX, "a second in the video, from 0")
        end_s = ends[row]
        spans.append(VideoSpan(path(chunk, file), start_s, end_s if isinstance(end_s, float) else None))
    return spans


def _tasks(rows: Rows) -> list[tuple[str, ...]]:
    """What frames are told is their `task_index`; these are a summary."""
    values = rows.optional("tasks")
    if values is None:
        return [()] * len(rows)
    known: dict[str, tuple[str, ...]] = {}
    tasks = []
    for row, value in enumerate(values):
        texts = [value] if isinstance(value, str) else [] if is_null(value) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise wrong(rows.where(row, "tasks"), value, "a list of texts")
        tasks.append(known.setdefault(texts[0], (texts[0],)) if len(texts) == 1 else tuple(texts))
    return tasks


def follow_one_another(episodes: Sequence[Episode]) -> bool:
    """Whether the ranges of frames that a table gives its episodes do, with gaps only where an episode is missing.

    Nothing here is found by them: an episode's rows are those that carry its number. LeRobot's converter from v2.1 has
    scrambled them in sets whose cameras are images (its #1919), which many train on all the same.
    """
    return all(episode.dataset_from >= 0 for episode in episodes) and all(
        after.dataset_from == before.dataset_to
        or (after.dataset_from > before.dataset_to and after.index != before.index + 1)
        for before, after in pairwise(episodes)
    )


def counted(episodes: Sequence[Episode]) -> list[Episode]:
    """With ranges of frames that follow from the lengths."""
    begins = accumulate((episode.length for episode in episodes), initial=0)
    return [replace(episode, dataset_from=begin) for episode, begin in zip(episodes, begins, strict=False)]


def check_totals(episodes: Sequence[Episode], info: Mapping[str, object], path: Path) -> None:
    """Are all there that `info.json` counts?

    Raises:
        ValueError: no.
    """
    if info.get("total_episodes") is None:
        return
    promised = integer(info["total_episodes"], f"{path}, 'total_episodes'")
    if promised > len(episodes):
        raise ValueError(
            f"{path}, 'total_episodes' is {promised}, and the table of episodes beside it has {len(episodes)}"
            f"{_lacking(episodes, promised)}. Bring back what is missing, or, to go on without it, set total_episodes "
            f"to {len(episodes)} and total_frames to {sum(episode.length for episode in episodes)}, as `openpi dataset "
            "check DATASET --fix FOLDER` does"
        )


def _lacking(episodes: Sequence[Episode], total: int) -> str:
    if total > len(episodes) + MAX_INDEX // 1000:
        return ""
    listed = {episode.index for episode in episodes}
    lacking = [index for index in range(total) if index not in listed]
    return f": no row of {named(lacking)}" if lacking else ""


def named(episodes: Sequence[int]) -> str:
    """`episode 3`, `episodes 3, 4, 5`, with the number of those that are not named."""
    more = f" and {len(episodes) - _NAMED} more" if len(episodes) > _NAMED else ""
    numbers = ", ".join(map(str, episodes[:_NAMED]))
    return f"episode{'s' if len(episodes) > 1 else ''} {numbers}{more}"


def leave_out(episodes: Sequence[int]) -> str:
    """The clause that says how to go on without some episodes."""
    if len(episodes) > 20:
        return (
            f"leave these {len(episodes)} episodes out (exclude_episodes of the data config, --data.exclude-episodes, "
            "`openpi dataset split`)"
        )
    these = "it" if len(episodes) == 1 else "them"
    numbers = " ".join(map(str, episodes))
    return f"leave {these} out with --data.exclude-episodes {numbers} (of training, or `openpi dataset split`)"
