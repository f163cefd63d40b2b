"""What `meta/` says, against itself and against the tables: `metadata.*`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import Reading, Subject
from openpi.data.lerobot import home
from openpi.data.lerobot.episode_table import named
from openpi.data.lerobot.features import is_depth, listed_names
from openpi.data.lerobot.files import read_json
from openpi.data.lerobot.meta_values import number_of
from openpi.data.lerobot.metadata import LeRobotMetadata

_WRITTEN_ANEW = "`openpi dataset split DATASET whole=rest` writes a dataset with a table that is right"
_FIXED = "`openpi dataset check --fix` writes what the table of episodes has"


def load(root: Path) -> tuple[LeRobotMetadata | None, list[Finding]]:
    """The metadata, and what keeps them from being read; totals that are wrong do not."""
    try:
        return LeRobotMetadata.load(root), []
    except (ValueError, OSError) as error:
        refused = error
    try:
        metadata = LeRobotMetadata.load(root, trust_totals=True)
    except (ValueError, OSError) as error:
        return None, [Finding.of_error("metadata.refused", error)]
    return metadata, [Finding.of_error("metadata.totals", refused)]


def check(metadata: LeRobotMetadata, reading: Reading) -> Iterator[Finding]:
    info = read_json(metadata.root / home.INFO_FILE)
    if metadata.empty:
        yield Finding(
            "metadata.empty",
            Severity.WARNING,
            f"{named(metadata.empty)} of the table of episodes: no frames",
            "a recording",
            "Nothing to do: openpi reads none of them. `openpi dataset split DATASET whole=rest` writes the "
            "dataset without them",
        )
    if not metadata.has_ranges:
        yield Finding(
            "metadata.ranges",
            Severity.WARNING,
            "dataset_from_index and dataset_to_index of meta/episodes do not go with the lengths",
            "ranges that follow one another; openpi reads without them, LeRobot takes wrong frames for the end of an "
            "episode",
            _WRITTEN_ANEW,
        )
    yield from _other_totals(info, metadata)
    yield from _split(info, metadata)
    for key, reason in metadata.unreadable.items():
        is_read = reading.columns is not None and key in reading.columns
        other = Severity.INFO if is_depth(key, metadata.features[key]) else Severity.WARNING
        severity = Severity.ERROR if is_read else other
        yield Finding("metadata.picture", severity, f"it {reason}", "8-bit RGB, to be a camera", column=key)
    for key, feature in metadata.features.items():
        names = listed_names(feature)
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if len(feature["shape"]) != 1 or len(names) < 2:  # one name: of the whole, as in LIBERO
            continue
        fault = None
        if len(names) != feature["shape"][0]:
            fault = f"{len(names)} names for {feature['shape'][0]} dimensions: they are not used", "a name for each"
        elif twice:
            fault = f"several dimensions are called {', '.join(twice)}", "a name of its own for each"
        if fault is not None:
            fix = "Correct features in meta/info.json"
            yield Finding("metadata.names", Severity.WARNING, *fault, fix, column=key)


def check_files(subject: Subject) -> Iterator[Finding]:
    """The files that the table of episodes names hold them."""
    root, told = subject.metadata.root, {episode.index: episode.data_path for episode in subject.metadata.episodes}
    for episode in subject.episodes:
        if episode.data_path != told[episode.index]:
            yield Finding(
                "metadata.files",
                Severity.WARNING,
                f"its frames are in {episode.data_path.relative_to(root)}",
                f"{told[episode.index].relative_to(root)}, which data/file_index of meta/episodes names; openpi and "
                "LeRobot read it all the same, other readers do not",
                _WRITTEN_ANEW,
                episode.index,
            )


def check_tasks(subject: Subject) -> Iterator[Finding]:
    """The tasks that the table of episodes names are those of the frames."""
    texts = subject.metadata.tasks
    for position, episode in enumerate(subject.episodes):
        used = np.unique(subject.columns["task_index"][subject.rows(position)]).tolist()
        found = {texts[task] for task in used if task in texts}
        if episode.tasks and found and set(episode.tasks) != found:
            yield Finding(
                "metadata.tasks",
                Severity.WARNING,
                f"meta/episodes names {sorted(episode.tasks)}, and task_index of the frames says {sorted(found)}",
                "the same; frames are what training reads",
                "Write the table of episodes again, or correct task_index",
                episode.index,
                column="task_index",
            )


def _other_totals(info: dict, metadata: LeRobotMetadata) -> Iterator[Finding]:
    num_episodes = len(metadata.episodes) + len(metadata.empty)
    num_videos = num_episodes * sum(f["dtype"] == "video" for f in metadata.features.values())
    counted = {"total_tasks": len(metadata.tasks)}
    if metadata.version < "v3":
        counted["total_videos"] = num_videos
    if (number_of(info.get("total_episodes")) or 0) <= num_episodes:  # more are refused, and told as that
        counted |= {"total_episodes": num_episodes, "total_frames": metadata.num_frames}
    told = {name: info[name] for name in counted if info.get(name) is not None}
    if wrong := [name for name, found in told.items() if number_of(found) != counted[name]]:
        found = ", ".join(f"{name} {told[name]}" for name in wrong)
        expected = ", ".join(str(counted[name]) for name in wrong)
        yield Finding("metadata.totals", Severity.WARNING, f"meta/info.json has {found}", expected, _FIXED)


def _split(info: dict, metadata: LeRobotMetadata) -> Iterator[Finding]:
    splits = info.get("splits")
    if not isinstance(splits, dict):
        return
    end = max((*(episode.index for episode in metadata.episodes), *metadata.empty), default=-1) + 1
    for name, span in splits.items():
        parts = str(span).split(":")
        if len(parts) == 2 and parts[1].strip().isdigit() and int(parts[1]) > end:
            what = f"split '{name}' in meta/info.json is {span}, and the last episode is {end - 1}"
            yield Finding("metadata.splits", Severity.INFO, what, f"an end of {end} at most", _FIXED)
