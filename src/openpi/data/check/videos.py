"""Files of the cameras and what is in the pictures: `videos.*`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np

from openpi.data.check import views
from openpi.data.check.findings import Finding, Severity
from openpi.data.check.pictures import Look, Looks
from openpi.data.check.subject import Subject
from openpi.data.lerobot.episode_check import size_hw
from openpi.data.lerobot.episode_table import leave_out
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.video import VideoFile
from openpi.data.lerobot.video_layout import VideoLayout

_DARK, _FLAT = 4.0, 2.0  # of 255
_FROZEN = 1.0  # change of a patch: what re-encoding a still picture makes
_ALIVE = 5.0
_MOVES = 0.1  # of the range of a joint, between two pictures


def open_cameras(subject: Subject, refused: Set[int]) -> tuple[dict[str, LeRobotDataset], list[Finding]]:
    """Each camera with the episodes whose files are what the tables say; the others are findings.

    Args:
        refused: episodes that cannot be opened for what is in their tables.
    """
    datasets: dict[str, LeRobotDataset] = {}
    findings: list[Finding] = []
    for key in subject.metadata.camera_keys:
        if not subject.reading.reads(key):
            continue
        good = {episode.index for episode in subject.episodes} - refused
        if subject.metadata.features[key]["dtype"] == "video":
            for members, error in _faults(key, subject):
                good -= set(members)
                findings += [_fault(key, index, error) for index in members]
        if not good:
            continue
        try:
            datasets[key] = LeRobotDataset(
                subject.metadata.root, episodes=sorted(good), columns=[key], metadata=subject.metadata
            )
        except (ValueError, OSError) as error:
            findings.append(Finding.of_error("videos.unreadable", error, column=key))
    return datasets, findings


def check(subject: Subject, looks: Sequence[Looks]) -> Iterator[Finding]:
    """What the pictures show."""
    for found in looks:
        for key, error in found.errors.items():
            yield Finding("videos.unreadable", Severity.ERROR, error, episode=found.episode, column=key)
    positions = {episode.index: position for position, episode in enumerate(subject.episodes)}
    blank: set[tuple[str, int]] = set()
    for key in subject.metadata.camera_keys:
        seen = {found.episode: found.cameras[key] for found in looks if key in found.cameras}
        for episode, look in seen.items():
            yield from _size(subject, key, episode, look)
            for finding in _blank(key, episode, look):
                blank.add((key, episode))
                yield finding
        shown = {episode: look for episode, look in seen.items() if (key, episode) not in blank}
        yield from _frozen(subject, key, shown, positions)
    yield from views.check(looks, blank)


def _faults(key: str, subject: Subject) -> Iterator[tuple[Sequence[int], Exception]]:
    """Episodes of files that are not what the tables say, and why."""
    chosen = [episode.index for episode in subject.episodes]
    are_chosen, layouts = set(chosen), []
    try:
        layouts.append(_layout(key, subject, chosen))
    except ValueError:  # of one of the files: looked at one by one
        for members in _by_file(key, subject):
            try:
                layouts.append(_layout(key, subject, members))
            except ValueError as error:
                yield members, error
    for layout in layouts:
        for path in layout.paths:
            try:
                _check_file(path, layout, subject)
            except (ValueError, OSError) as error:
                yield [index for index in layout.layout(path).episodes if index in are_chosen], error


def _layout(key: str, subject: Subject, chosen: Sequence[int]) -> VideoLayout:
    return VideoLayout(subject.metadata.episodes, chosen, [key], subject.metadata.fps)


def _by_file(key: str, subject: Subject) -> list[list[int]]:
    files: dict[Path | None, list[int]] = {}
    for episode in subject.episodes:
        span = episode.videos.get(key)
        files.setdefault(None if span is None else span.path, []).append(episode.index)
    return list(files.values())


def _check_file(path: Path, layout: VideoLayout, subject: Subject) -> None:
    video = VideoFile(path, subject.metadata.fps)
    try:
        layout.check(video)
    finally:
        video.close()


def _fault(key: str, episode: int, error: Exception) -> Finding:
    code = "missing" if isinstance(error, FileNotFoundError) else "layout"
    return Finding.of_error(f"videos.{code}", error, episode=episode, column=key)


def longer(dataset: LeRobotDataset) -> Iterator[Finding]:
    """Videos that go on after the last row of their episode."""
    for key in dataset.keys:
        for episode in dataset.episodes if key in dataset.metadata.video_keys else ():
            surplus = dataset.surplus_frames.get((episode.videos[key].path, episode.index))
            if surplus is not None:
                yield Finding(
                    "videos.longer",
                    Severity.WARNING,
                    f"its video goes on for {surplus} frames after its last row; they are not read",
                    "as many frames as rows",
                    "Nothing to do if the camera stopped last, or if LeRobot (up to 0.6) left the end of a discarded "
                    "take behind it; if the camera began first, every picture is late by them, and if rows were taken "
                    "out or the video is another episode's, pictures and rows do not belong together",
                    episode.index,
                    column=key,
                )


def _size(subject: Subject, key: str, episode: int, look: Look) -> Iterator[Finding]:
    expected = size_hw(subject.metadata.features[key])
    if look.size_hw != expected:
        yield Finding(
            "videos.size",
            Severity.WARNING,  # samples are brought to the size of the model
            "its pictures are {} x {} (height x width)".format(*look.size_hw),
            "{} x {}, the shape in meta/info.json".format(*expected),
            "Correct the shape, or write the camera again",
            episode,
            column=key,
        )


def _blank(key: str, episode: int, look: Look) -> Iterator[Finding]:
    is_flat = look.spreads < _FLAT
    if not is_flat.any():
        return
    rows = np.flatnonzero(is_flat)
    is_black = bool((look.means[rows] < _DARK).all())
    share = "all" if is_flat.all() else f"{len(rows)} of the {len(look.frames)}"
    yield Finding(
        "videos.black" if is_black else "videos.one-color",
        Severity.ERROR,
        f"{share} pictures that were looked at are {'black' if is_black else 'of one color'}",
        "a scene",
        f"The camera was off or covered: {leave_out([episode])}",
        episode,
        (look.frames[int(rows[0])], look.frames[int(rows[-1])]),
        key,
    )


def _frozen(subject: Subject, key: str, seen: Mapping[int, Look], positions: Mapping[int, int]) -> Iterator[Finding]:
    """Pictures that stay the same while the robot moves, of a camera that shows it move elsewhere."""
    units = {vector.key: subject.unit_of(vector) for vector in subject.vectors}
    moved = {episode: _movement(subject, units, positions[episode], look.frames) for episode, look in seen.items()}
    with_movement = [look.changes[moved[e] > _MOVES] for e, look in seen.items()]
    changes = np.concatenate(with_movement) if with_movement else np.zeros(0)
    if len(seen) < 3 or not len(changes) or np.quantile(changes, 0.75) < _ALIVE:
        return
    for episode, look in seen.items():
        is_still = (look.changes < _FROZEN) & (moved[episode] > _MOVES)
        # One pair may be the robot out of sight.
        if is_still.sum() >= min(2, len(is_still)) and is_still.any():
            first, last = np.flatnonzero(is_still)[[0, -1]]
            yield Finding(
                "videos.frozen",
                Severity.ERROR,
                "the picture stands still while the robot moves",
                f"changes of {np.median(changes):.0f} of 255 somewhere in it, as in the other episodes",
                f"The camera stopped: {leave_out([episode])}",
                episode,
                (look.frames[int(first)], look.frames[int(last) + 1]),
                key,
            )


def _movement(subject: Subject, units: Mapping[str, np.ndarray], position: int, frames: Sequence[int]) -> np.ndarray:
    """f64[k - 1]: how far the joint that moves most goes from one picture to the next, in units of its range."""
    rows = subject.rows(position)
    most = np.zeros(max(0, len(frames) - 1))
    for vector in subject.of_role("state") or subject.of_role("action"):
        values = np.nan_to_num(vector.values[rows][list(frames)].astype(np.float64))
        steps = np.abs(np.diff(values, axis=0)) / units[vector.key]
        most = np.maximum(most, steps.max(axis=1, initial=0.0))
    return most
