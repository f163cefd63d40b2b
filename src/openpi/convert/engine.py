"""Recordings of any format -> a LeRobot dataset v3.0.

```
plan       the episodes, and what the first one looks like: all others are compared with it
prepare    each episode on its own, in several processes: read, check, encode, statistics
           -> .<name>.converting/<digest>/    kept until the dataset is there, so that a stopped run goes on
assemble   in order, in this process: joins what is prepared; no frame is touched again
```

The dataset appears whole or not at all, with the provenance of every episode in `run_metadata_<UTC>.yaml`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from openpi.convert import jobs as work
from openpi.convert.origin import FileGroup, groups
from openpi.convert.progress import Progress
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, Source
from openpi.convert.work_folder import WorkFolder
from openpi.data.lerobot.episode_check import FrameStream
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature
from openpi.data.lerobot.prepared import PreparedEpisode, prepare_episode
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared import run_metadata
from openpi.shared.errors import listed

logger = logging.getLogger("openpi")

_TOLD = "episode.json"
_SHOWN = 10
_NAME = re.compile(r"[^\W\d][\w.\- ]*")  # a folder is called so, too


@dataclasses.dataclass(frozen=True)
class Options:
    """What holds for every format.

    Attributes:
        task: for all episodes; None = what each recording says.
        fps: None = what the recordings say.
        use_videos: cameras as video; else as images, without any loss.
        swap_colors: the pictures are BGR, whatever the recording says.
        episodes: places in the list of episodes, from 0; None = all.
    """

    task: str | None = None
    fps: float | None = None
    use_videos: bool = True
    swap_colors: bool = False
    episodes: tuple[int, ...] | None = None


def convert(
    source: Source,
    output: Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    skip_unusable: bool = False,
    num_workers: int | None = None,
) -> Path:
    """Converts recordings. What a stopped run has prepared is used by the next one with the same options.

    Args:
        output: folder of the dataset; new, unless `overwrite`.
        skip_unusable: leave out episodes that are damaged or unlike the first; else, or if they are more than half,
            that is an error.
        num_workers: processes; 0 = this one, None = one for each processor. A script that calls this with processes
            guards itself with `if __name__ == "__main__"`.
    Returns:
        `output`.
    Raises:
        ValueError: there is no rate or task, episodes are unusable, or another conversion writes the same dataset.
        FileExistsError: `output` is there.
        FileNotFoundError: there are no recordings.
        ImportError: a package for this format is missing; its extra is named.
    """
    refs = chosen(source, options)
    first = first_readable(source, refs, skip_unusable=skip_unusable)
    features, rate, robot = features_of(first, options.use_videos), rate_of(first, options), first.robot_type
    _task(first, options)  # nobody waits for hours to be told that there is none
    with (
        WorkFolder(output) as scratch,
        LeRobotWriter(
            output, fps=rate, features=features, robot_type=robot, overwrite=overwrite, scratch=scratch.path
        ) as writer,
    ):
        plan = _Plan(source, options, features, dict(writer.features), rate, robot, writer.encoder)
        jobs = plan.jobs(refs, scratch.path)
        unusable = _prepare_all(jobs, num_workers)
        if unusable and (not skip_unusable or 2 * len(unusable) > len(jobs)):
            raise ValueError(_unusable_message(unusable, len(jobs)))
        used = [job for job in jobs if job.ref.name not in unusable]
        for name, reason in unusable.items():
            logger.warning("left out: %s: %s", name, reason)
        remarks = _assemble(used, writer)
        told = {"remarks": remarks, "left_out": unusable}
        content = _provenance(source, options, [job.ref for job in used], scratch.path, num_workers)
        run_metadata.write(writer.temporary, {**content, "fps": rate, **told})
    return output


def chosen(source: Source, options: Options) -> list[EpisodeRef]:
    """The episodes that are asked for.

    Raises:
        ValueError: one that is not there, or two of one name.
    """
    refs = list(source.episodes())
    if len({ref.name for ref in refs}) != len(refs):
        raise ValueError(f"{source.root}: two episodes have one name")
    if options.episodes is None:
        return refs
    if absent := [number for number in options.episodes if not 0 <= number < len(refs)]:
        raise ValueError(f"episodes: {absent} are not there; {source.root} has {len(refs)}, from 0 to {len(refs) - 1}")
    return [refs[number] for number in options.episodes]


def first_readable(source: Source, refs: Sequence[EpisodeRef], *, skip_unusable: bool = False) -> RawEpisode:
    """The first episode, or with `skip_unusable` the first that can be read: what all are compared with.

    Raises:
        ValueError: it cannot be read.
    """
    reason: Exception | None = None
    for ref in refs:
        try:
            return source.read(ref)
        except (ValueError, KeyError) as error:
            if not skip_unusable:
                raise ValueError(f"{ref.name}: {error}") from error
            reason = error
    raise ValueError(f"no episode of {source.root} can be read, the last for this reason: {reason}")


def features_of(raw: RawEpisode, use_videos: bool) -> dict[str, Feature]:
    """The columns as the dataset describes them."""
    if wrong := [key for key in raw.columns if key in INDEX_FEATURES or not _NAME.fullmatch(key)]:
        raise ValueError(
            f"columns cannot be called {listed(wrong)}: expected letters, digits, '_', '-' and '.', beginning with a "
            f"letter, and none of {listed(INDEX_FEATURES)}"
        )
    return {key: _feature(column, use_videos) for key, column in raw.columns.items()}


def _feature(column: RawColumn, use_videos: bool) -> Feature:
    if isinstance(column, Numbers):
        shape = list(column.values.shape[1:]) or [1]
        return {"dtype": _dtype(column.values), "shape": shape, "names": list(column.names) or None}
    shape, names = [*column.size_hw, 3], ["height", "width", "channel"]
    if column.is_chw:
        shape, names = [3, *column.size_hw], ["channels", "height", "width"]
    return {"dtype": "video" if use_videos else "image", "shape": shape, "names": names}


def _dtype(values: np.ndarray) -> str:
    kinds = {"f": "float32", "i": "int64", "u": "int64", "b": "bool"}
    if values.dtype.kind not in kinds:
        raise ValueError(f"values of the dtype {values.dtype}; expected numbers")
    return kinds[values.dtype.kind]


def rate_of(raw: RawEpisode, options: Options) -> float:
    """Frames per second that the dataset will have."""
    rate = raw.fps if options.fps is None else options.fps
    if rate is None:
        raise ValueError("these recordings do not say how many frames a second has; say it with fps (--fps)")
    if not 0 < rate < 10_000:
        raise ValueError(f"fps is {rate}; expected frames per second, above 0")
    return int(rate) if rate == int(rate) else float(rate)


# --- one episode, in whichever process ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What all episodes have in common.

    Attributes:
        features: of the first episode; `stored`: completed by the writer.
    """

    source: Source
    options: Options
    features: Mapping[str, Feature]
    stored: Mapping[str, Feature]
    fps: float
    robot: str | None
    encoder: str

    def jobs(self, refs: Sequence[EpisodeRef], folder: Path) -> list[_Job]:
        """One for each episode, with a folder called by all that its preparation depends on."""
        options = dataclasses.replace(self.options, episodes=None)
        common = (self.source, options, self.features, self.fps, self.robot, self.encoder, metadata.version("openpi"))
        stamps = {group: group.stamp() for group in groups(self.source.root, [ref.files for ref in refs])}
        depends = [(*common, ref, stamps[FileGroup(self.source.root, ref.files)]) for ref in refs]
        names = [hashlib.sha256(repr(parts).encode()).hexdigest()[:20] for parts in depends]
        return [_Job(ref, folder / name, self) for ref, name in zip(refs, names, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Job:
    ref: EpisodeRef
    folder: Path
    plan: _Plan
    threads: int = 0


def _prepare(job: _Job) -> str | None:
    """Prepares an episode, if it is not; says why if it cannot be used."""
    if job.folder.is_dir():
        return None
    try:
        _prepare_anew(job)
    except (ValueError, KeyError) as error:  # damaged, or holding what no dataset may hold
        return str(error)
    return None


def _prepare_anew(job: _Job) -> None:
    plan = job.plan
    raw = plan.source.read(job.ref)
    _check_like_first(raw, plan)
    task = _task(raw, plan.options)
    # A name of its own: a process whose conversion was killed may still be busy with the same episode.
    partial = Path(tempfile.mkdtemp(prefix=f"{job.folder.name}.", dir=job.folder.parent))
    try:
        frames = {key: _values(key, column, plan) for key, column in raw.columns.items()}
        prepared = prepare_episode(
            frames, plan.stored, folder=partial, fps=plan.fps, encoder=plan.encoder, threads=job.threads
        )
        prepared.save(partial)
        told = {"task": task, "remarks": list(raw.remarks)}
        (partial / _TOLD).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
        partial.rename(job.folder)
    except OSError:
        if not job.folder.is_dir():  # else somebody was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_like_first(raw: RawEpisode, plan: _Plan) -> None:
    features = features_of(raw, plan.options.use_videos)
    if missing := [key for key in plan.features if key not in features]:
        raise ValueError(f"it lacks {listed(missing)}, which the first episode has; it has {listed(features)}")
    if more := [key for key in features if key not in plan.features]:
        raise ValueError(f"it has {listed(more)}, which the first episode has not")
    for key, feature in plan.features.items():
        for name, value in feature.items():
            if features[key][name] != value:
                raise ValueError(f"{name} of '{key}' is {features[key][name]}; in the first episode it is {value}")
    if raw.robot_type != plan.robot:
        raise ValueError(f"its robot is {raw.robot_type!r}, in the first episode {plan.robot!r}")
    if (rate := rate_of(raw, plan.options)) != plan.fps:
        raise ValueError(f"it has {rate} frames per second, the first episode {plan.fps}; say one with fps (--fps)")
    lengths = {key: _length(column) for key, column in raw.columns.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"all columns of an episode need one number of frames, above 0; found {lengths}")


def _length(column: RawColumn) -> int:
    return column.length if isinstance(column, Camera) else len(column.values)


def _task(raw: RawEpisode, options: Options) -> str | list[str]:
    task = raw.task if options.task is None else options.task
    texts = [task or ""] if isinstance(task, str) or task is None else list(task)
    if not all(text.strip() for text in texts):
        raise ValueError("the recording says no task; a policy is told what to do, so say it with task (--task)")
    length = _length(next(iter(raw.columns.values())))
    if not isinstance(task, str) and len(texts) != length:
        raise ValueError(f"{len(texts)} texts of tasks for {length} frames")
    return texts[0] if isinstance(task, str) else texts


def _values(key: str, column: RawColumn, plan: _Plan) -> np.ndarray | FrameStream:
    feature = plan.stored[key]
    if isinstance(column, Numbers):
        with np.errstate(over="ignore"):  # what float32 cannot hold is found as infinite
            return column.values.astype(feature["dtype"])
    assert feature["dtype"] in CAMERA_DTYPES
    frames = _watched(key, column, plan.options.swap_colors)
    return FrameStream(column.length, frames) if feature["dtype"] == "video" else np.stack(list(frames))


def _watched(key: str, camera: Camera, swap_colors: bool) -> Iterator[np.ndarray]:
    """The pictures; what is wrong with one is told with its number."""
    frames = iter(camera.frames)
    number = 0
    while True:
        try:
            frame = next(frames, None)
        except ValueError as error:
            raise ValueError(f"camera '{key}' ({camera.origin}), frame {number}: {error}") from error
        if frame is None:
            return
        if frame.shape != (*camera.size_hw, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"camera '{key}' ({camera.origin}), frame {number}: {frame.dtype} {list(frame.shape)}; expected uint8 "
                f"{[*camera.size_hw, 3]}, as the first"
            )
        yield np.ascontiguousarray(frame[..., ::-1]) if swap_colors else frame
        number += 1


# --- all of them --------------------------------------------------------------------------------------------


def _prepare_all(jobs: Sequence[_Job], num_workers: int | None) -> dict[str, str]:
    """Prepares what is not; returns the unusable ones with the reason."""
    if done := sum(job.folder.is_dir() for job in jobs):
        logger.info("going on with %d prepared episodes", done)
    processes = work.num_processes(num_workers, len(jobs))
    threads = max(1, (os.cpu_count() or 1) // max(1, processes))
    jobs = [dataclasses.replace(job, threads=threads) for job in jobs]
    unusable: dict[str, str] = {}
    with Progress("episodes", len(jobs)) as progress:
        for job, reason in work.each(_prepare, jobs, processes):
            if reason is not None:
                unusable[job.ref.name] = reason
            progress.advance()
    return {job.ref.name: unusable[job.ref.name] for job in jobs if job.ref.name in unusable}


def _assemble(used: Sequence[_Job], writer: LeRobotWriter) -> dict[str, list[str]]:
    """Joins what is prepared; returns remarks by episode."""
    remarks = {}
    for job in used:
        told = json.loads((job.folder / _TOLD).read_text(encoding="utf-8"))
        writer.add_prepared(PreparedEpisode.load(job.folder), told["task"])
        if told["remarks"]:
            remarks[job.ref.name] = told["remarks"]
            logger.warning("%s: %s", job.ref.name, "; ".join(told["remarks"]))
    return remarks


def _unusable_message(reasons: Mapping[str, str], num_episodes: int) -> str:
    shown = "\n".join(f"  {name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN])
    more = f"\n  ... and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    if 2 * len(reasons) > num_episodes > 1:
        return (
            f"{len(reasons)} of {num_episodes} episodes cannot be converted:\n{shown}{more}\nThat is most of them. If "
            "the first one is the odd one out, leave it out with episodes (--episodes)"
        )
    return (
        f"{len(reasons)} of {num_episodes} episodes cannot be converted:\n{shown}{more}\nRepair them, or leave them "
        "out with skip_unusable (--skip-unusable)"
    )


def _provenance(
    source: Source, options: Options, refs: Sequence[EpisodeRef], folder: Path, num_workers: int | None
) -> dict[str, Any]:
    """Source, options, files with their hashes, and which episode comes from which of them."""
    files = groups(source.root, [ref.files for ref in refs])
    described: dict[FileGroup, dict[str, Any]] = dict(
        work.each(_Hashing(folder), files, work.num_processes(num_workers, len(files)))
    )
    numbers = {group: number for number, group in enumerate(files)}
    return {
        "format": type(source).__name__,
        "source": source.root.name,
        "options": {**_plain(source), **dataclasses.asdict(options)},
        "sources": [described[group] for group in files],
        "episodes": [{"name": ref.name, "source": numbers[FileGroup(source.root, ref.files)]} for ref in refs],
    }


@dataclasses.dataclass(frozen=True)
class _Hashing:
    """Hashes files, and remembers it for a run that goes on after this one was stopped."""

    folder: Path

    def __call__(self, group: FileGroup) -> dict[str, Any]:
        digest = hashlib.sha256(repr(group.stamp()).encode()).hexdigest()[:20]
        kept = self.folder / f"{digest}.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        described = group.described()
        partial = self.folder / f"{digest}.{os.getpid()}.partial"
        partial.write_text(json.dumps(described), encoding="utf-8")
        partial.rename(kept)
        return described


def _plain(source: Source) -> dict[str, Any]:
    """The options of a format, as the provenance has them; the folder is a name there."""
    assert dataclasses.is_dataclass(source)
    fields = [field.name for field in dataclasses.fields(source) if field.repr and field.name != "root"]
    return {name: _json_value(getattr(source, name)) for name in fields}


def _json_value(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_json_value(item) for item in value] if isinstance(value, tuple) else str(value)
