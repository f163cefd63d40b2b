"""Recordings of any format -> a LeRobot dataset v3.0.

```
plan       the episodes, and what the first one looks like: all others are compared with it
prepare    each episode on its own, in a pool of workers: read, check, encode, statistics
           -> .<name>.converting/<digest>/    kept until the dataset is there, so that a stopped run goes on
assemble   in order, in this process: joins what is prepared; no frame is touched again
```

The dataset appears whole or not at all, with the provenance of every episode in `run_metadata_<UTC>.yaml`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from openpi.convert import appending
from openpi.convert.episode_work import TOLD, Flaw, Job, Options, Plan, features_of, prepare, rate_of, task_of
from openpi.convert.origin import provenance
from openpi.convert.progress import Progress
from openpi.convert.source import EpisodeRef, RawEpisode, Source
from openpi.convert.work_folder import WorkFolder
from openpi.data.lerobot.prepared import PreparedEpisode
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared import run_metadata
from openpi.shared.errors import listed
from openpi.shared.pools import Pool, Processes, WorkerLostError

logger = logging.getLogger(__name__)

_SHOWN = 10


def convert(
    source: Source,
    output: Path,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    append: bool = False,
    repeat: bool = False,
    skip_unusable: bool = False,
    num_workers: int | None = None,
    pool: Pool | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Converts recordings. What a stopped run has prepared is used by the next one with the same options.

    Args:
        output: folder of the dataset; new, unless `append` or `overwrite`.
        append: behind the episodes that are in the dataset; cameras are stored as they are there.
        repeat: append recordings again that are in the dataset already.
        skip_unusable: leave out episodes that are damaged or unlike the first; else, or if most are unlike it, that is
            an error.
        num_workers: processes; 0 = this one, None = one for each processor. A script that calls this with processes
            guards itself with `if __name__ == "__main__"`.
        pool: instead of these; its workers see the recordings and `output` at the same paths.
        beside: puts further files into the folder of the dataset, before that is there.
    Returns:
        `output`.
    Raises:
        ValueError: there is no rate or task, episodes are unusable or in the dataset already, or another conversion
            writes the same dataset.
        FileExistsError: `output` is there.
        FileNotFoundError: there are no recordings, or no dataset to append to.
        ImportError: a package for this format is missing; its extra is named.
    """
    options, pool = options or Options(), pool or Processes(num_workers)
    all_refs = chosen(source, options)
    unusable = {ref.name: Flaw(ref.flaw) for ref in all_refs if ref.flaw}
    _check_few(unusable, len(all_refs), skip_unusable)
    refs = [ref for ref in all_refs if not ref.flaw]
    first = first_readable(source, refs, skip_unusable=skip_unusable)
    features, rate, robot = features_of(first, options.use_videos), rate_of(first, options), first.robot_type
    if first.fps is not None and rate != first.fps:
        logger.warning(
            "the recordings have %g frames per second, and the dataset will say %g: no frame is left out or repeated, "
            "so everything in it moves %.3g times as fast",
            *(first.fps, rate, rate / first.fps),
        )
    task_of(first, options)  # nobody waits for hours to be told that there is none
    with (
        WorkFolder(output) as scratch,
        LeRobotWriter(
            output,
            fps=rate,
            features=features,
            robot_type=robot,
            overwrite=overwrite,
            append=append,
            video_codec=options.video_codec,
            scratch=scratch.path,
        ) as writer,
    ):
        if append:
            new = provenance(source, options, refs, scratch.path, pool)
            appending.check(output, new, repeat=repeat)
        plan = Plan(source, options, features, dict(writer.features), rate, robot, writer.encoder)
        jobs = plan.jobs(refs, scratch.path)
        unusable |= _prepare_all(jobs, pool)
        _check_few(unusable, len(all_refs), skip_unusable)
        used = [job for job in jobs if job.ref.name not in unusable]
        left_out = {name: flaw.reason for name, flaw in unusable.items()}
        for name, reason in left_out.items():
            logger.warning("left out: %s: %s", name, reason)
        told = {"remarks": _assemble(used, writer), "left_out": left_out}
        content = provenance(source, options, [job.ref for job in used], scratch.path, pool)
        appending.warn_of_copies(content)
        if beside is not None:
            beside(writer.temporary)
        kind = appending.KINDS[append]
        run_metadata.write(writer.temporary, {**content, "fps": rate, **told}, kind=kind)
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


# --- all of them --------------------------------------------------------------------------------------------


def _prepare_all(jobs: Sequence[Job], pool: Pool) -> dict[str, Flaw]:
    """Prepares what is not; returns the unusable ones with the reason."""
    if done := sum(job.folder.is_dir() for job in jobs):
        logger.info("going on with %d prepared episodes", done)
    jobs = [dataclasses.replace(job, threads=pool.threads(len(jobs))) for job in jobs]
    unusable: dict[str, Flaw] = {}
    left = {job.ref.name: job for job in jobs}
    try:
        with Progress("episodes", len(jobs)) as progress:
            for job, flaw in pool.each(prepare, jobs):
                if flaw is not None:
                    unusable[job.ref.name] = flaw
                del left[job.ref.name]
                progress.advance()
    except WorkerLostError as error:
        raise WorkerLostError(
            f"{error}: what is prepared is kept. A damaged recording may end one, too: if it happens again, look at "
            f"{listed(list(left)[:_SHOWN])}, the first that are not done"
        ) from error
    return {job.ref.name: unusable[job.ref.name] for job in jobs if job.ref.name in unusable}


def _assemble(used: Sequence[Job], writer: LeRobotWriter) -> dict[str, list[str]]:
    """Joins what is prepared; returns remarks by episode."""
    remarks, num_untold = {}, 0
    for job in used:
        told = json.loads((job.folder / TOLD).read_text(encoding="utf-8"))
        texts = [told["task"]] if isinstance(told["task"], str) else told["task"]
        num_untold += not all(text.strip() for text in texts)
        writer.add_prepared(PreparedEpisode.load(job.folder), told["task"])
        if told["remarks"]:
            remarks[job.ref.name] = told["remarks"]
            logger.warning("%s: %s", job.ref.name, "; ".join(told["remarks"]))
    if num_untold:
        logger.warning(
            "%d of %d recordings say no task, and theirs is empty; say it with task (--task)", num_untold, len(used)
        )
    return remarks


def _check_few(flaws: Mapping[str, Flaw], num_episodes: int, skip_unusable: bool) -> None:
    """
    Raises:
        ValueError: episodes cannot be used, and are not to be left out; or none can, or most are unlike the first.
    """
    is_first_odd = 2 * sum(flaw.is_unlike for flaw in flaws.values()) > num_episodes
    if not flaws or (skip_unusable and len(flaws) < num_episodes and not is_first_odd):
        return
    shown = "\n".join(f"  {name}: {flaw.reason}" for name, flaw in list(flaws.items())[:_SHOWN])
    more = f"\n  ... and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else ""
    raise ValueError(
        f"{len(flaws)} of {num_episodes} episodes cannot be converted:\n{shown}{more}\n"
        + (
            "That is most of them. If the first one is the odd one out, leave it out with episodes (--episodes)"
            if is_first_odd
            else "Repair them, or leave them out with skip_unusable (--skip-unusable)"
        )
    )
