"""Positronic's raw recordings -> a LeRobot dataset v3.0, by a codec.

```
prepare    each episode on its own, in several processes: sample, resize, encode, statistics
           -> .<name>.converting/<digest>/    kept until the dataset is there, so that a stopped run goes on
assemble   in order, in this process: joins what is prepared; no frame is touched again
```

Every column is sampled at start, start + 1/fps, ...: the newest sample of each signal so far. An episode starts when
every signal of its columns has a value. Source: the serving specification, section 6.6.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.convert.origin import code_of
from openpi.convert.progress import Progress
from openpi.convert.sampling import instants, silent_before, stillness
from openpi.convert.work_folder import WorkFolder
from openpi.data.lerobot.episode_check import FrameStream
from openpi.data.lerobot.features import CAMERA_DTYPES, Feature
from openpi.data.lerobot.prepared import PreparedEpisode, prepare_episode
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared.pools import Pool, Processes, WorkerLostError
from openpi_positronic import provenance
from openpi_positronic.codecs.codec import Codec, Column
from openpi_positronic.raw_episodes import Episode, RawDataset
from openpi_positronic.raw_episodes.signals import Signal

logger = logging.getLogger(__name__)

ROBOT_TYPE = "positronic"
_REMARKS = "remarks.json"  # beside what is prepared, for people


def convert(
    source: Sequence[Path] | RawDataset,
    output: Path,
    codec: Codec,
    *,
    fps: float | None = None,
    task: str | None = None,
    use_videos: bool = True,
    append: bool = False,
    overwrite: bool = False,
    repeat: bool = False,
    skip_unusable: bool = False,
    num_workers: int | None = None,
    pool: Pool | None = None,
) -> Path:
    """Converts recordings. What a stopped run has prepared is used by the next one with the same options.

    Args:
        source: a raw dataset, or folders of its episodes.
        output: folder of the dataset; new, unless `append` or `overwrite`.
        codec: which signals become which columns.
        fps: whole frames per second; None = those of the codec.
        task: for all episodes; None = what each recording says, or nothing.
        use_videos: cameras as video; else as images. When appending, as they are in the dataset.
        append: behind the episodes that are in the dataset.
        repeat: append recordings again that are in the dataset already.
        skip_unusable: leave out episodes that lack a signal, are too short or cannot be read; else they are an error.
        num_workers: processes; 0 = this one, None = one for each processor. A script that calls this with processes
            guards itself with `if __name__ == "__main__"`.
        pool: instead of these; its workers see the recordings and `output` at the same paths.
    Returns:
        `output`.
    Raises:
        ValueError: the codec is for inference only, a rate is missing, episodes are unusable or in the dataset already,
            or another conversion writes the same dataset.
        FileExistsError, FileNotFoundError: see `LeRobotWriter`.
    """
    paths = list(source.paths) if isinstance(source, RawDataset) else list(source)
    columns = codec.training_columns()
    features = _features(codec)
    rate = _rate(fps, codec)
    paths = _usable(paths, codec, columns, task, skip_unusable)
    provenance.warn_of_copies(paths)
    if append:
        provenance.warn_of_other_codec(output, codec)
    if append and not repeat:
        provenance.refuse_repeats(output, paths)
    with (
        WorkFolder(output) as work,
        LeRobotWriter(
            output,
            fps=rate,
            features=features if use_videos else _as_images(features),
            robot_type=ROBOT_TYPE,
            append=append,
            overwrite=overwrite,
            scratch=work.path,
        ) as writer,
    ):
        options = (codec, dict(writer.features), rate, writer.encoder)
        code = code_of(codec)
        jobs = [_Job(path, work.path / _digest(path, code, options), *options) for path in paths]
        unusable = _prepare_all(jobs, pool or Processes(num_workers))
        if unusable and not skip_unusable:
            raise ValueError(_unusable_message(unusable))
        for path, reason in unusable.items():
            logger.warning("left out: %s: %s", path, reason)
        used = [job for job in jobs if job.path not in unusable]
        num_untold = 0
        for job in used:
            said = _task_of(Episode(job.path), codec, task)
            num_untold += not said
            for remark in json.loads((job.folder / _REMARKS).read_text(encoding="utf-8")):
                logger.warning("%s: %s", job.path, remark)
            writer.add_prepared(PreparedEpisode.load(job.folder), said or "")
        if num_untold:
            logger.warning(
                "%d of %d recordings say no task, and theirs is empty; say it with task", num_untold, len(used)
            )
        provenance.record(
            writer.temporary, [job.path for job in used], is_append=append, codec=codec, fps=rate, task=task
        )
    return output


def frame_times(episode: Episode, columns: Mapping[str, Column], fps: float) -> np.ndarray:
    """int64[n] nanoseconds: from when all columns have a value until one of them changes for the last time.

    Raises:
        ValueError: there are none, or a signal is of another clock.
    """
    stamps = {name: _signal(episode, name).timestamps for name in _signal_names(columns)}
    times = instants(stamps.values(), fps)
    if late := silent_before(stamps, times):
        raise ValueError(f"{late}. If its times are of another clock, record it by that of the others")
    return times


def sampled(
    episode: Episode, columns: Mapping[str, Column], features: Mapping[str, Feature], times: np.ndarray
) -> dict[str, np.ndarray | FrameStream]:
    """The columns at ascending times, [n, ...] each; cameras as streams, in which no frame is decoded twice."""
    frames: dict[str, np.ndarray | FrameStream] = {}
    for key, column in columns.items():
        signals = {name: _signal(episode, name) for name in column.signals}
        if features[key]["dtype"] in CAMERA_DTYPES:
            (signal,) = signals.values()
            stream = FrameStream(len(times), _images(column, signal, signal.rows_at(times)))
            is_video = features[key]["dtype"] == "video"
            frames[key] = stream if is_video else np.stack(list(stream))
        else:
            frames[key] = column.derive(
                {name: signal.values(signal.rows_at(times)) for name, signal in signals.items()}
            )
    return frames


def _images(column: Column, signal: Signal, rows: np.ndarray) -> Iterator[np.ndarray]:
    wanted, counts = np.unique(rows, return_counts=True)
    repeats = iter(counts.tolist())
    for chunk in signal.chunks(wanted):
        for image in column.derive({signal.name: chunk}):
            for _ in range(next(repeats)):
                yield image


# --- one episode, in a process of its own -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    path: Path
    folder: Path
    codec: Codec
    features: dict[str, Feature]
    fps: float
    encoder: str
    threads: int = 0


def _prepare(job: _Job) -> str | None:
    """Prepares an episode, if it is not; says why if it cannot be used."""
    try:
        if not job.folder.is_dir():
            _prepare_anew(job)
    except ValueError as error:  # damaged, or holding what no dataset may hold
        return str(error)
    return None


def _prepare_anew(job: _Job) -> None:
    episode, columns = Episode(job.path), job.codec.training_columns()
    times = frame_times(episode, columns, job.fps)
    # A name of its own: a process whose conversion was killed may still be busy with the same episode.
    partial = Path(tempfile.mkdtemp(prefix=f"{job.folder.name}.", dir=job.folder.parent))
    try:
        signals = [_signal(episode, name) for name in _signal_names(columns)]
        remarks = [stillness(s.name, s.timestamps, times, is_camera=s.kind == "image") for s in signals]
        (partial / _REMARKS).write_text(json.dumps([remark for remark in remarks if remark]), encoding="utf-8")
        frames = sampled(episode, columns, job.features, times)
        prepared = prepare_episode(
            frames, job.features, folder=partial, fps=job.fps, encoder=job.encoder, threads=job.threads
        )
        prepared.save(partial)
        partial.rename(job.folder)
    except OSError:
        if not job.folder.is_dir():  # else somebody was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prepare_all(jobs: Sequence[_Job], pool: Pool) -> dict[Path, str]:
    """Prepares what is not; returns the unusable ones with the reason."""
    if done := sum(job.folder.is_dir() for job in jobs):
        logger.info("going on with %d prepared episodes", done)
    jobs = [dataclasses.replace(job, threads=pool.threads(len(jobs))) for job in jobs]
    unusable: dict[Path, str] = {}
    try:
        with Progress("episodes", len(jobs)) as progress:
            for job, reason in pool.each(_prepare, jobs):
                if reason is not None:
                    unusable[job.path] = reason
                progress.advance()
    except WorkerLostError as error:
        raise WorkerLostError(f"{error}: what is prepared is kept") from error
    return unusable


# --- before work starts -------------------------------------------------------------------------------------


def _rate(fps: float | None, codec: Codec) -> int:
    rate = codec.training_meta.get("action_fps") if fps is None else fps
    if rate is None:
        raise ValueError("this codec has no rate of its own; name one with fps (--fps), such as 15")
    if rate != int(rate) or rate < 1:
        raise ValueError(f"fps is {rate}; expected a whole number above 0, which is what datasets have")
    return int(rate)


def _features(codec: Codec) -> dict[str, Feature]:
    features = codec.training_meta["lerobot_features"]
    if slashed := [key for key in features if "/" in key]:
        raise ValueError(
            f"this codec calls columns {slashed}, and LeRobot datasets allow no '/' in names; convert with 'ee' or "
            "'eepose_absolute', which have the same values under 'observation.state' and so on"
        )
    return features


def _as_images(features: Mapping[str, Feature]) -> dict[str, Feature]:
    return {key: {**f, "dtype": "image"} if f["dtype"] == "video" else f for key, f in features.items()}


def _usable(
    paths: Sequence[Path], codec: Codec, columns: Mapping[str, Column], task: str | None, skip_unusable: bool
) -> list[Path]:
    """Those that have all signals, and a task that is a text."""
    names = _signal_names(columns)
    lacking = {}
    for path in paths:
        episode = Episode(path)
        there = episode.signals
        if missing := [name for name in names if name not in there and _newer_name(name) not in there]:
            lacking[path] = f"it lacks {', '.join(missing)}"
        try:
            _task_of(episode, codec, task)
        except ValueError as error:
            lacking[path] = str(error)
    if lacking and (not skip_unusable or len(lacking) == len(paths)):
        raise ValueError(_unusable_message(lacking))
    for path, reason in lacking.items():
        logger.warning("left out: %s: %s", path, reason)
    return [path for path in paths if path not in lacking]


def _task_of(episode: Episode, codec: Codec, task: str | None) -> str | None:
    return codec.training_task(episode.static) if task is None else task


def _unusable_message(reasons: Mapping[Path, str]) -> str:
    shown = "\n".join(f"  {path}: {reason}" for path, reason in list(reasons.items())[:10])
    return (
        f"{len(reasons)} episodes cannot be converted with this codec:\n{shown}\nRepair them, choose another codec, or "
        "leave them out with skip_unusable (--skip-unusable)"
    )


def _signal(episode: Episode, name: str) -> Signal:
    newer = _newer_name(name)
    return episode.signal(newer if name not in episode.signals and newer in episode.signals else name)


def _newer_name(name: str) -> str:
    """What Positronic calls a signal since it records one command at a time."""
    return name.replace("robot_commands.", "robot_command.", 1)


def _signal_names(columns: Mapping[str, Column]) -> list[str]:
    return list(dict.fromkeys(name for column in columns.values() for name in column.signals))


def _digest(path: Path, code: str, options: tuple[object, ...]) -> str:
    """Of an episode's files, and of the code and the options that its preparation depends on."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir())
    return hashlib.sha256(repr((str(path.absolute()), files, code, options)).encode()).hexdigest()[:20]
