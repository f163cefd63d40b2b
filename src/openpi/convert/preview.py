"""What a conversion would write, of one episode: for `--dry-run`. Everything of it is read, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openpi.convert.engine import chosen, first_readable
from openpi.convert.episode_work import Options, features_of, rate_of
from openpi.convert.source import Camera, Numbers, RawColumn, Source, Texts
from openpi.shared.errors import listed

_MAX_DIMENSIONS = 20
_MAX_TASK = 100


def preview(source: Source, options: Options) -> Iterator[str]:
    """Lines about the first chosen episode.

    Raises:
        ValueError, KeyError, FileNotFoundError: it cannot be converted; see `engine.convert`.
    """
    refs = chosen(source, options)
    ref = refs[0]
    raw = first_readable(source, refs[:1])
    features, rate = features_of(raw, options.use_videos), rate_of(raw, options)
    length = max(_length(column) for column in raw.columns.values())
    yield f"episode {ref.name}, the first of {len(refs)}: {length} frames at {rate} Hz, {length / rate:.1f} s"
    yield f"robot {raw.robot_type or '(nobody says)'}, {_task(raw.task if options.task is None else options.task)}"
    width = max(map(len, features))
    for key, column in raw.columns.items():
        feature = features[key]
        yield f"  {key:<{width}}  {feature['dtype']} {feature['shape']}  <- {column.origin}"
        yield from _described(column)
    if raw.left_out:
        yield f"  left out: {listed(raw.left_out)}"
    yield from (f"  remark: {remark}" for remark in raw.remarks)


def _length(column: RawColumn) -> int:
    return column.length if isinstance(column, Camera) else len(column.values)


def _task(task: str | Sequence[str] | None) -> str:
    if task is None:
        return "no task: say it with --task"
    texts = [task] if isinstance(task, str) else list(dict.fromkeys(task))
    return f"task {texts[0][:_MAX_TASK]!r}" + (f" and {len(texts) - 1} others" if len(texts) > 1 else "")


def _described(column: RawColumn) -> Iterator[str]:
    if isinstance(column, Camera):
        first = next(iter(column.frames))
        color = first.reshape(-1, 3).mean(axis=0).round().tolist()
        yield f"      first picture {list(first.shape)}, mean color {color}"
        return
    if isinstance(column, Texts):
        yield f"      first {str(column.values[0])[:_MAX_TASK]!r}"
        return
    values = column.values.reshape(len(column.values), -1)
    names = [_name(column, number) for number in range(min(values.shape[1], _MAX_DIMENSIONS))]
    width = max(map(len, names), default=0)
    for number, name in enumerate(names):
        yield f"      {name:<{width}}  {_range(values[:, number])}"
    if values.shape[1] > _MAX_DIMENSIONS:
        yield f"      ... and {values.shape[1] - _MAX_DIMENSIONS} more"


def _name(column: Numbers, number: int) -> str:
    return column.names[number] if number < len(column.names) else f"[{number}]"


def _range(values: np.ndarray) -> str:
    bad = np.flatnonzero(~np.isfinite(values))
    shown = f"{np.nanmin(values):.4g} .. {np.nanmax(values):.4g}" if len(bad) < len(values) else ""
    return f"{shown}  NOT FINITE in {len(bad)} frames, first {bad[0]}" if len(bad) else shown
