"""`openpi dataset check --fix`: a new dataset in which only what is certain is corrected.

    timestamp = frame_index / fps     frame_index, index: one by one     totals and splits: of the table of episodes
    statistics of numbers: of the frames

Nothing else is touched: pictures, numbers, tasks and files are those of the dataset, linked where the disk allows it.
The description (`meta/`) is copied: it is small, and what people and tools change in place, which a link would pass on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi.data.check.statistics import COMPARED, widened
from openpi.data.check.subject import EVERYTHING, Subject, open_subject
from openpi.data.lerobot import home
from openpi.data.lerobot.columns import to_numpy
from openpi.data.lerobot.features import INDEX_FEATURES
from openpi.data.lerobot.files import link_or_copy, mirrored, parquet_files, read_json, read_jsonl, read_parquet
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.stats import QUANTILES, vector_stats
from openpi.shared import whole_file
from openpi.shared.strict_json import Json

_INDEX_COLUMNS: tuple[str, ...] = ("timestamp", "frame_index", "index")


def repair(root: Path, output: Path) -> list[str]:
    """Writes the corrected dataset, whole or not at all.

    Returns:
        what was changed, in words.
    Raises:
        FileExistsError: `output` is there.
        ValueError, OSError: an episode cannot be read, or `fps` and times contradict; that is not for us to mend.
    """
    metadata = LeRobotMetadata.load(root, trust_totals=True)
    subject, unreadable = open_subject(metadata, EVERYTHING)
    if unreadable:
        raise ValueError(f"{unreadable[0].place} cannot be read: {unreadable[0].found}. Mend or leave out that first")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
    try:
        for source, target in mirrored(root, temporary):
            (shutil.copy2 if root / "meta" in source.parents else link_or_copy)(source, target)
        changed = [*_rows(subject, temporary), *_totals(metadata, temporary)]
        fixed, _ = open_subject(LeRobotMetadata.load(temporary), EVERYTHING)
        changed += _statistics(fixed, temporary)
        LeRobotMetadata.load(temporary)
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner may read
        if output.exists():
            raise FileExistsError(f"{output} has appeared in the meantime; name a new folder")
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return changed


def _rows(subject: Subject, folder: Path) -> list[str]:
    """Times and numbers of the rows of every file; rows are found by their episode, as everywhere."""
    fps, begins = subject.metadata.fps, {e.index: e.dataset_from for e in subject.episodes}
    if not _runs_at(subject, fps):
        raise ValueError(
            f"most timestamps do not run at fps {fps:g} of meta/info.json; which of the two is right is not certain. "
            "Correct 'fps' there, or write the timestamps again"
        )
    changed = dict.fromkeys(_INDEX_COLUMNS, 0)
    for path in dict.fromkeys(episode.data_path for episode in subject.episodes):
        file = folder / path.relative_to(subject.metadata.root)
        table = read_parquet(file)
        episodes = _numbers(table, "episode_index")
        starts = np.flatnonzero(np.diff(episodes, prepend=episodes[0] - 1))
        frames = np.arange(len(episodes)) - np.repeat(starts, np.diff(np.append(starts, len(episodes))))
        first = np.array([begins.get(int(number), 0) for number in episodes])
        right = {"timestamp": frames / fps, "frame_index": frames, "index": first + frames}
        wrong = {name: values for name, values in right.items() if not _is_right(table, name, values, fps)}
        for name, values in wrong.items():
            changed[name] += 1
            kind = table.field(name).type
            kind = kind.value_type if pa.types.is_nested(kind) else kind
            table = table.set_column(table.column_names.index(name), pa.field(name, kind), pa.array(values).cast(kind))
        if wrong:
            _write_table(table, file)
    return [f"{name} of {count} files written anew" for name, count in changed.items() if count]


def _runs_at(subject: Subject, fps: float) -> bool:
    """Whether the typical step of time is that of `fps`, or none: else it may be `fps` that is wrong.

    Times that stand still, as zeros or seconds since 1970 in float32 do, are no clock; and milliseconds are one.
    """
    is_step = np.diff(subject.columns["episode_index"]) == 0
    steps = np.diff(subject.columns["timestamp"].astype(np.float64))[is_step]
    frames = float(np.median(steps)) * fps if len(steps) else 0.0
    return not frames or any(abs(frames / per_s - 1) < 0.1 for per_s in (1, 1000))


def _is_right(table: pa.Table, name: str, values: np.ndarray, fps: float) -> bool:
    """Times that a recorder measured are right within half a frame: they are information."""
    if name not in table.column_names:
        return True
    slack = 0.5 / fps if name == "timestamp" else 0
    return bool((np.abs(_numbers(table, name) - values) <= slack).all())


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """[n] of an index column; some writers have lists of one in it."""
    return to_numpy(table[name], {"dtype": INDEX_FEATURES[name], "shape": [1]}, name)


def _totals(metadata: LeRobotMetadata, folder: Path) -> list[str]:
    path = folder / home.INFO_FILE
    info = read_json(path)
    num_episodes = len(metadata.episodes) + len(metadata.empty)
    num_videos = num_episodes * sum(f["dtype"] == "video" for f in metadata.features.values())
    right: dict[str, Any] = {
        "total_episodes": num_episodes,
        "total_frames": metadata.num_frames,
        "total_tasks": len(metadata.tasks),
    }
    if metadata.version < "v3" and "total_videos" in info:
        right["total_videos"] = num_videos
    end = max((*(episode.index for episode in metadata.episodes), *metadata.empty), default=-1) + 1
    if isinstance(info.get("splits"), dict) and set(info["splits"]) == {"train"}:
        right["splits"] = {"train": f"0:{end}"}
    wrong = {name: value for name, value in right.items() if info.get(name) != value}
    if wrong:
        whole_file.write_text(path, json.dumps({**info, **wrong}, indent=4, ensure_ascii=False))
    return [f"{name} {info.get(name)} is {value} now" for name, value in wrong.items()]


def _statistics(subject: Subject, folder: Path) -> list[str]:
    """Of columns of numbers; those of pictures stay."""
    keys = [vector.key for vector in subject.vectors] + ["timestamp", "frame_index", "index"]
    changed = []
    path = folder / "meta/stats.json"
    if path.is_file():
        stored = read_json(path)
        fresh = {key: _corrected(stored[key], subject.columns[key]) for key in keys if key in stored}
        if any(fresh[key] != stored[key] for key in fresh):
            whole_file.write_text(path, json.dumps({**stored, **fresh}, indent=4, ensure_ascii=False))
            changed.append("meta/stats.json computed anew")
    if _episode_lines(subject, folder / "meta/episodes_stats.jsonl", keys):
        changed.append("meta/episodes_stats.jsonl computed anew")
    tables = parquet_files(folder / "meta/episodes")
    if sum(_episode_table(subject, file, keys) for file in tables):
        changed.append("statistics in the table of episodes computed anew")
    return changed


def _corrected(stored: object, values: np.ndarray) -> Any:
    """The statistics, with those that differ from the numbers replaced."""
    if not isinstance(stored, dict) or not np.isfinite(values).all():
        return stored
    fresh = vector_stats(values)
    spread = float(np.ptp(values)) or 1.0
    corrected = dict(stored)
    if widened(stored, values) is not None:
        corrected |= {name: fresh[name].reshape(-1).tolist() for name in QUANTILES if name in stored}
    for name in (*COMPARED, "count"):
        if name not in stored:
            continue
        found = np.asarray(stored[name], np.float64).reshape(-1)
        right = fresh[name].reshape(-1)
        if found.shape != right.shape or not (np.abs(found - right) <= 1e-3 * spread).all():
            corrected[name] = right.tolist()
    return corrected


def _episode_lines(subject: Subject, path: Path, keys: list[str]) -> bool:
    if not path.is_file():
        return False
    rows = {episode.index: subject.rows(position) for position, episode in enumerate(subject.episodes)}
    lines = [line for _, line in read_jsonl(path)]
    fresh = [_corrected_line(line, subject, rows, keys) for line in lines]
    if fresh != lines:
        whole_file.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in fresh))
    return fresh != lines


def _corrected_line(line: Json, subject: Subject, rows: Mapping[int, slice], keys: list[str]) -> dict[str, object]:
    stats = dict(line["stats"])
    if line["episode_index"] in rows:
        span = rows[line["episode_index"]]
        stats |= {key: _corrected(stats[key], subject.columns[key][span]) for key in keys if key in stats}
    return {**line, "stats": stats}


def _episode_table(subject: Subject, file: Path, keys: list[str]) -> bool:
    """Flat columns `stats/KEY/NAME` of the table of episodes of v3.0."""
    table = read_parquet(file)
    rows = {episode.index: subject.rows(position) for position, episode in enumerate(subject.episodes)}
    indices = table["episode_index"].to_pylist()
    is_changed = False
    for key in keys:
        names = [name for name in (*COMPARED, "count") if f"stats/{key}/{name}" in table.column_names]
        columns = {name: table[f"stats/{key}/{name}"].to_pylist() for name in names}
        stored = [{name: columns[name][row] for name in names} for row in range(len(table))]
        fresh = [
            _corrected(old, subject.columns[key][rows[index]]) if index in rows else old
            for index, old in zip(indices, stored, strict=True)
        ]
        for name in names if fresh != stored else ():
            field = table.field(f"stats/{key}/{name}")
            values = pa.array([row[name] for row in fresh]).cast(field.type)
            table = table.set_column(table.column_names.index(field.name), field, values)
            is_changed = True
    if is_changed:
        _write_table(table, file)
    return is_changed


def _write_table(table: pa.Table, path: Path) -> None:
    """In place of a link, never through it: the dataset it leads to stays as it is."""
    with pq.ParquetFile(path) as file:
        group_rows = max((file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)), default=1)
    with whole_file.replacing(path) as partial:
        pq.write_table(table, partial, row_group_size=max(1, group_rows))
