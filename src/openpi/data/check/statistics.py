"""Stored statistics against the numbers: `statistics.*`. Not those of training, which `openpi stats` computes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import Subject
from openpi.data.lerobot.files import parquet_files, read_json, read_jsonl, read_parquet
from openpi.data.lerobot.meta_values import number_of

COMPARED = ("min", "max", "mean", "std")
_TOLERANCE = 1e-3  # of the range of a dimension
_QUANTILE_TOLERANCE = 0.01  # likewise: LeRobot counts bins
_FIXED = "`openpi dataset check --fix` computes them anew"
_EPISODE_STATS_V21 = "meta/episodes_stats.jsonl"


def check(subject: Subject) -> Iterator[Finding]:
    root = subject.metadata.root
    if len(subject.episodes) == len(subject.metadata.episodes) and (root / "meta/stats.json").is_file():
        yield from _of_dataset(root / "meta/stats.json", subject)
    try:
        stored = list(episode_stats(root, subject.metadata.version))
    except (ValueError, OSError) as error:
        yield Finding.of_error("statistics.unreadable", error)
        return
    positions = {episode.index: position for position, episode in enumerate(subject.episodes)}
    for index, stats in stored:
        if index in positions:
            rows = subject.rows(positions[index])
            for key in _compared(subject):
                if key in stats:
                    yield from _differences(key, stats[key], subject.columns[key][rows], index)


def episode_stats(root: Path, version: str) -> Iterator[tuple[int, Mapping[str, Mapping[str, object]]]]:
    """Those stored with each episode: lines of their own in v2.1, flat columns of the table of episodes in v3.0."""
    if version == "v2.1" and (root / _EPISODE_STATS_V21).is_file():
        for _, line in read_jsonl(root / _EPISODE_STATS_V21):
            if isinstance(line.get("stats"), dict) and isinstance(line.get("episode_index"), int):
                yield line["episode_index"], line["stats"]
    if version.startswith("v3"):
        for file in parquet_files(root / "meta/episodes"):
            yield from _flat_stats(file)


def _flat_stats(file: Path) -> Iterator[tuple[int, Mapping[str, Mapping[str, object]]]]:
    table = read_parquet(file)
    names = [name for name in table.column_names if name.startswith("stats/") and name.rsplit("/", 1)[1] in COMPARED]
    columns = {name: table[name].to_pylist() for name in names}
    for row, index in enumerate(table["episode_index"].to_pylist()):
        stats: dict[str, dict[str, Any]] = {}
        for name, values in columns.items():
            key, stat = name.removeprefix("stats/").rsplit("/", 1)
            stats.setdefault(key, {})[stat] = values[row]
        yield index, stats


def _of_dataset(path: Path, subject: Subject) -> Iterator[Finding]:
    try:
        stored = read_json(path)
    except (ValueError, OSError) as error:
        yield Finding.of_error("statistics.unreadable", error)
        return
    for key in _compared(subject):
        if isinstance(stored.get(key), dict):
            yield from _differences(key, stored[key], subject.columns[key], None)
            yield from _conservative(key, stored[key], subject.columns[key])
        else:
            yield Finding(
                "statistics.missing", Severity.INFO, "meta/stats.json has no statistics of it", "", _FIXED, column=key
            )


def _compared(subject: Subject) -> Sequence[str]:
    return [vector.key for vector in subject.vectors]


def _differences(key: str, stored: Mapping[str, object], values: np.ndarray, episode: int | None) -> Iterator[Finding]:
    rows = values.reshape(len(values), -1).astype(np.float64)
    if not np.isfinite(rows).all():
        return
    low, high = rows.min(axis=0), rows.max(axis=0)
    real = {"min": low, "max": high, "mean": rows.mean(axis=0), "std": rows.std(axis=0)}
    slack = _TOLERANCE * (high - low) + 1e-5 * np.maximum(np.abs(low), np.abs(high)) + 1e-6
    for name in COMPARED:
        found = _numbers(stored.get(name))
        if found is None or found.shape != low.shape:
            continue
        if (off := ~(np.abs(found - real[name]) <= slack)).any():
            dim = int(np.argmax(off))
            yield Finding(
                "statistics.stale",
                Severity.WARNING,
                f"the stored {name} of dimension {dim} is {found[dim]:.6g}",
                f"{real[name][dim]:.6g}, which the frames have",
                _FIXED,
                episode,
                column=key,
            )
            return


def _conservative(key: str, stored: Mapping[str, object], values: np.ndarray) -> Iterator[Finding]:
    if (dim := widened(stored, values)) is None:
        return
    low, high = (_numbers(stored[name]) for name in ("q01", "q99"))
    assert low is not None and high is not None
    exact = np.quantile(values.reshape(len(values), -1)[:, dim], (0.01, 0.99))
    yield Finding(
        "statistics.conservative",
        Severity.INFO,
        f"the stored q01 and q99 are conservative, the outermost of what was merged, as LeRobot writes since August "
        f"2026: of dimension {dim} {low[dim]:.6g} and {high[dim]:.6g}",
        f"{exact[0]:.6g} and {exact[1]:.6g}, which the frames have",
        f"Training here takes statistics of its own (`openpi stats`); for others {_FIXED}",
        column=key,
    )


def widened(stored: Mapping[str, object], values: np.ndarray) -> int | None:
    """The dimension whose stored q01 and q99 lie furthest beyond those of the frames, if no dimension's lie inside.

    None too where the frames have numbers that are none.
    """
    low, high = _numbers(stored.get("q01")), _numbers(stored.get("q99"))
    rows = values.reshape(len(values), -1).astype(np.float64)
    if low is None or high is None or low.shape != high.shape or low.shape != rows.shape[1:]:
        return None
    if not np.isfinite(rows).all():
        return None
    exact_low, exact_high = np.quantile(rows, (0.01, 0.99), axis=0)
    slack = _QUANTILE_TOLERANCE * np.ptp(rows, axis=0) + 1e-6
    beyond = np.maximum(exact_low - low, high - exact_high) - slack
    is_inside = (low > exact_low + slack) | (high < exact_high - slack)
    return None if is_inside.any() or not (beyond > 0).any() else int(np.argmax(beyond))


def _numbers(value: object) -> np.ndarray | None:
    try:
        return np.asarray(value, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None if number_of(value) is None else np.array([number_of(value)], np.float64)
