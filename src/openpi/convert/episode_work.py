"""One episode of a conversion, in whichever process: read, compared with the first, checked, encoded, kept.

`<work folder>/<digest>/` is an episode that is done; the digest is of all that it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from openpi.convert.origin import FileGroup, code_of, groups
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, Source, Texts
from openpi.data.lerobot.annotations import LANGUAGE
from openpi.data.lerobot.episode_check import FrameStream
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature
from openpi.data.lerobot.prepared import prepare_episode
from openpi.shared.errors import listed

TOLD = "episode.json"  # beside what is prepared: task and remarks
_NAME = re.compile(r"[^\W\d][\w.\- ]*")  # a folder is called so, too
_COARSE_FROM, _MOST_LOST = 1e4, 0.01  # in the unit of the numbers; of their changes


@dataclasses.dataclass(frozen=True)
class Options:
    """What holds for every format.

    Attributes:
        task: for all episodes; None = what each recording says.
        fps: None = what the recordings say.
        use_videos: cameras as video; else as images, without any loss.
        video_codec: `av1` or `h264`; None = the first of them that can be written here.
        swap_colors: the pictures are BGR, whatever the recording says.
        episodes: places in the list of episodes, from 0; None = all.
    """

    task: str | None = None
    fps: float | None = None
    use_videos: bool = True
    swap_colors: bool = False
    episodes: tuple[int, ...] | None = None
    video_codec: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
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

    def jobs(self, refs: Sequence[EpisodeRef], folder: Path) -> list[Job]:
        """One for each episode, with a folder called by all that its preparation depends on."""
        options = dataclasses.replace(self.options, episodes=None)
        code = (metadata.version("openpi"), code_of(self.source))
        common = (self.source, options, self.stored, self.fps, self.robot, self.encoder, code)
        stamps = {group: group.stamp() for group in groups(self.source.root, [ref.files for ref in refs])}
        depends = [(*common, ref, stamps[FileGroup(self.source.root, ref.files)]) for ref in refs]
        names = [hashlib.sha256(repr(parts).encode()).hexdigest()[:20] for parts in depends]
        return [Job(ref, folder / name, self) for ref, name in zip(refs, names, strict=True)]


@dataclasses.dataclass(frozen=True)
class Job:
    ref: EpisodeRef
    folder: Path
    plan: Plan
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class Flaw:
    """Why an episode cannot be used; `is_unlike`: by itself it may be as good as the first."""

    reason: str
    is_unlike: bool = False


class UnlikeFirstError(ValueError):
    """An episode has other columns, another robot or another rate than the first."""


def prepare(job: Job) -> Flaw | None:
    """Prepares an episode, if it is not; says why if it cannot be used."""
    if job.folder.is_dir():
        return None
    try:
        _prepare_anew(job)
    except (ValueError, KeyError) as error:  # damaged, or holding what no dataset may hold
        return Flaw(str(error), isinstance(error, UnlikeFirstError))
    return None


def _prepare_anew(job: Job) -> None:
    plan = job.plan
    raw = plan.source.read(job.ref)
    _check_like_first(raw, plan)
    task = task_of(raw, plan.options)
    # A name of its own: a process whose conversion was killed may still be busy with the same episode.
    partial = Path(tempfile.mkdtemp(prefix=f"{job.folder.name}.", dir=job.folder.parent))
    try:
        frames = {key: _values(key, column, plan) for key, column in raw.columns.items()}
        prepared = prepare_episode(
            frames, plan.stored, folder=partial, fps=plan.fps, encoder=plan.encoder, threads=job.threads
        )
        prepared.save(partial)
        told = {"task": task, "remarks": [*raw.remarks, *_coarse(raw, plan)]}
        (partial / TOLD).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
        partial.rename(job.folder)
    except OSError:
        if not job.folder.is_dir():  # else somebody was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_like_first(raw: RawEpisode, plan: Plan) -> None:
    features = features_of(raw, plan.options.use_videos)
    if missing := [key for key in plan.features if key not in features]:
        raise UnlikeFirstError(f"it lacks {listed(missing)}, which the first episode has; it has {listed(features)}")
    if more := [key for key in features if key not in plan.features]:
        raise UnlikeFirstError(f"it has {listed(more)}, which the first episode has not")
    for key, feature in plan.features.items():
        for name, value in feature.items():
            if features[key][name] != value:
                found = features[key][name]
                raise UnlikeFirstError(f"{name} of '{key}' is {found}; in the first episode it is {value}")
    if raw.robot_type != plan.robot:
        raise UnlikeFirstError(f"its robot is {raw.robot_type!r}, in the first episode {plan.robot!r}")
    if (rate := rate_of(raw, plan.options)) != plan.fps:
        told = f"it has {rate} frames per second, the first episode {plan.fps}; say one with fps (--fps)"
        raise UnlikeFirstError(told)
    lengths = {key: _length(column) for key, column in raw.columns.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"all columns of an episode need one number of frames, above 0; found {lengths}")


def _length(column: RawColumn) -> int:
    return column.length if isinstance(column, Camera) else len(column.values)


def task_of(raw: RawEpisode, options: Options) -> str | list[str]:
    task = raw.task if options.task is None else options.task
    if task is None:
        told = "the recording says no task; a policy is told what to do, so say it with task (--task)"
        raise ValueError("; ".join((told, *raw.remarks)))
    length = _length(next(iter(raw.columns.values())))
    if not isinstance(task, str) and len(task) != length:
        raise ValueError(f"{len(task)} texts of tasks for {length} frames")
    return task if isinstance(task, str) else list(task)


def _values(key: str, column: RawColumn, plan: Plan) -> np.ndarray | FrameStream:
    feature = plan.stored[key]
    if isinstance(column, Numbers):
        fits = np.can_cast(column.values.dtype, feature["dtype"], "same_kind")  # else it is told, not cut
        with np.errstate(over="ignore"):  # what float32 cannot hold is found as infinite
            return column.values.astype(feature["dtype"]) if fits else column.values
    if isinstance(column, Texts):
        return column.values
    assert feature["dtype"] in CAMERA_DTYPES
    frames = _watched(key, column, plan.options.swap_colors)
    return FrameStream(column.length, frames) if feature["dtype"] == "video" else np.stack(list(frames))


def _coarse(raw: RawEpisode, plan: Plan) -> Iterator[str]:
    """Dimensions whose changes are lost in the dtype of the dataset: times since 1970 are 128 s apart in float32."""
    for key, column in raw.columns.items():
        if (
            not isinstance(column, Numbers)
            or column.values.dtype != np.float64
            or plan.stored[key]["dtype"] != "float32"
        ):
            continue
        values = column.values.reshape(len(column.values), -1)
        with np.errstate(over="ignore"):
            lost = np.abs(values.astype(np.float32) - values).max(0)
        spread = np.ptp(values, axis=0)
        for dim in np.flatnonzero((np.abs(values).max(0) > _COARSE_FROM) & (lost > _MOST_LOST * spread) & (spread > 0)):
            name = column.names[dim] if dim < len(column.names) else str(dim)
            yield (
                f"'{key}', {name}: it changes by {spread[dim]:.3g} around {values[0, dim]:.6g}, and float32 is off by "
                f"{lost[dim]:.2g} there; take its beginning off, or leave it out"
            )


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


# --- what the dataset will be, by an episode


def features_of(raw: RawEpisode, use_videos: bool) -> dict[str, Feature]:
    """The columns as the dataset describes them."""
    if wrong := [key for key in raw.columns if key in INDEX_FEATURES or not _NAME.fullmatch(key)]:
        raise ValueError(
            f"columns cannot be called {listed(wrong)}: expected letters, digits, '_', '-' and '.', beginning with a "
            f"letter, and none of {listed(INDEX_FEATURES)}"
        )
    return {key: _feature(column, raw.features.get(key), use_videos) for key, column in raw.columns.items()}


def _feature(column: RawColumn, told: Feature | None, use_videos: bool) -> Feature:
    if told is not None:
        return told if use_videos or told["dtype"] != "video" else {**told, "dtype": "image"}
    if isinstance(column, Numbers):
        shape = list(column.values.shape[1:]) or [1]
        return {"dtype": column.dtype or _dtype(column.values), "shape": shape, "names": list(column.names) or None}
    if isinstance(column, Texts):
        return {"dtype": LANGUAGE if column.is_language else "string", "shape": [1], "names": None}
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
