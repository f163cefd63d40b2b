"""All checks of a dataset, one after the other: `check_dataset`; and the fast half, of a dataset that is open."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from openpi.data.check import (
    actions,
    anomalies,
    consistency,
    episodes,
    metadata,
    portability,
    statistics,
    temporal,
    training,
    videos,
)
from openpi.data.check.findings import Finding, Report, in_order
from openpi.data.check.pictures import Looks, look
from openpi.data.check.subject import EVERYTHING, Reading, Subject, open_subject, subject_of
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared.pools import IN_PROCESS, Pool

_WORTH_PROCESSES = 400  # cameras of episodes, looked at in about two seconds; starting processes takes one

_MAX_FRAMES, _MAX_EPISODES = 2_000_000, 10_000  # half a minute

OnEpisode = Callable[[int, int], None]


def takes_long(num_frames: int, num_episodes: int) -> bool:
    """Whether even the fast half is a job of its own, and nothing to be done on the way to something else."""
    return num_frames > _MAX_FRAMES or num_episodes > _MAX_EPISODES


def check_dataset(
    root: Path,
    reading: Reading = EVERYTHING,
    *,
    pool: Pool = IN_PROCESS,
    decodes: bool = True,
    on_episode: OnEpisode = lambda done, total: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Looks at everything.

    Args:
        reading: what a recipe makes of it.
        pool: whose workers decode pictures.
        decodes: whether any are; without, this takes seconds.
        on_episode: is told how many of all episodes have been looked at.
        on_stage: is told what comes next.
    """
    started = time.monotonic()
    on_stage("metadata and files")
    description, findings = metadata.load(root)
    findings += portability.check(root)
    if description is None:
        return Report(str(root), in_order(findings), {}, seconds=time.monotonic() - started)
    findings += metadata.check(description, reading)
    on_stage("columns")
    subject, unreadable = open_subject(description, reading)
    findings += unreadable
    num_pictures = 0
    if subject.episodes:
        findings += [*metadata.check_files(subject), *metadata.check_tasks(subject)]
        findings += [*temporal.check(subject), *statistics.check(subject)]
        findings += check_signals(subject)
        if decodes:
            on_stage("pictures of episodes")
            refused = {f.episode for f in findings if f.code == temporal.REFUSED and f.episode is not None}
            datasets, faults = videos.open_cameras(subject, refused)
            looks = _look(datasets, subject, pool, on_episode)
            num_pictures = sum(len(camera.frames) for found in looks for camera in found.cameras.values())
            findings += [*faults, *videos.check(subject, looks)]
            findings += [finding for dataset in datasets.values() for finding in videos.longer(dataset)]
    lengths = {episode.index: episode.length for episode in description.episodes}
    return Report(str(root), in_order(findings), lengths, num_pictures, time.monotonic() - started)


def readable(description: LeRobotMetadata) -> tuple[list[int], list[Finding]]:
    """Numbers of the episodes whose tables and cameras can be opened, and what is the matter with the others. Of the
    videos their headers are read, of the tables all.
    """
    subject, findings = open_subject(description, EVERYTHING)
    refused = [finding for finding in temporal.check(subject) if finding.code == temporal.REFUSED]
    findings += refused
    findings += videos.open_cameras(subject, {f.episode for f in refused if f.episode is not None})[1]
    bad = {finding.episode for finding in findings}
    return [episode.index for episode in subject.episodes if episode.index not in bad], findings


def check_signals(subject: Subject) -> list[Finding]:
    """The fast half: what the columns say. In this order, for each leaves out what those before it have found."""
    checks = (anomalies.not_finite, consistency.check, anomalies.check, actions.check, episodes.check, training.check)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is not finite is a finding already
        return [finding for check in checks for finding in check(subject)]


def check_open(dataset: LeRobotDataset, reading: Reading) -> tuple[Finding, ...]:
    """The fast half of a dataset that was opened for training."""
    return in_order([*check_signals(subject_of(dataset, reading)), *videos.longer(dataset)])


def _look(
    datasets: Mapping[str, LeRobotDataset], subject: Subject, pool: Pool, on_episode: OnEpisode
) -> Sequence[Looks]:
    numbers = [episode.index for episode in subject.episodes] if datasets else []
    if len(numbers) * len(datasets) < _WORTH_PROCESSES:
        pool = IN_PROCESS
    looks: dict[int, Looks] = {}
    for number, found in pool.each(functools.partial(_looked, datasets), numbers):
        looks[number] = found
        on_episode(len(looks), len(numbers))
    return [looks[number] for number in numbers]


def _looked(datasets: Mapping[str, LeRobotDataset], number: int) -> Looks:
    _quiet_decoders()
    return look(datasets, number)


def _quiet_decoders() -> None:
    """What is broken becomes a finding; FFmpeg would print the same to the terminal."""
    logging.getLogger("libav").setLevel(logging.CRITICAL)
