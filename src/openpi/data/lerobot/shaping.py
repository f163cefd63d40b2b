"""One dataset into several, and several into one: `split` and `merge`. Each result is there whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.data.lerobot.annotations import SUBTASKS_FILE, copy_subtasks, is_annotation
from openpi.data.lerobot.copying import copy_episodes, differences, kept_features, warn_of_lost
from openpi.data.lerobot.features import Feature
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared import run_metadata

logger = logging.getLogger(__name__)

REST = "rest"
Part = float | Sequence[int] | str
"""A share of the episodes, their numbers, or `rest`."""


def divide(numbers: Sequence[int], parts: Mapping[str, Part], *, seed: int = 0) -> dict[str, list[int]]:
    """Which episodes each part gets, ascending.

    Args:
        parts: lists are taken as they are; shares are of the others, drawn at random; `rest` is what is left then.
    Raises:
        ValueError: an episode that is not there or in two parts, shares of more than 1 in all, or a part without any.
    """
    found: dict[str, list[int]] = {
        name: sorted(part) for name, part in parts.items() if isinstance(part, Sequence) and not isinstance(part, str)
    }
    listed = Counter(number for part in found.values() for number in part)
    if unknown := sorted(listed.keys() - set(numbers)):
        raise ValueError(f"episodes {unknown} are not there or left out; there are {len(numbers)}")
    if twice := sorted(number for number, count in listed.items() if count > 1):
        raise ValueError(f"episodes {twice} are in two parts")
    shares = {name: part for name, part in parts.items() if isinstance(part, float)}
    if sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"the shares are {sum(shares.values()):g} in all; expected at most 1")
    others = [number for number in numbers if number not in listed]
    drawn = np.random.default_rng(seed).permutation(others).tolist()
    begin, total = 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(others))
        found[name], begin = sorted(drawn[begin:end]), end
    found |= {name: sorted(drawn[begin:]) for name, part in parts.items() if part == REST}
    if empty := [name for name in parts if not found[name]]:
        raise ValueError(f"{empty[0]} gets no episode of {len(numbers)}; ask for more, or leave it out")
    return {name: found[name] for name in parts}


def split(
    metadata: LeRobotMetadata,
    parts: Mapping[Path, Sequence[int]],
    on_episode: Callable[[], None] = lambda: None,
    *,
    told: Mapping[str, object] | None = None,
) -> None:
    """Writes some episodes of a dataset each into new ones.

    Args:
        parts: numbers of episodes, by folder; none may be there.
        told: for their provenance.
    Raises:
        FileExistsError: a folder is there.
        ValueError, OSError: the dataset cannot be read.
    """
    for output in parts:
        _check_new(output)
    for output, numbers in parts.items():
        with _writer(output, metadata, kept_features(metadata, numbers)) as writer:
            _copy(metadata, writer, on_episode, numbers)
            run_metadata.write(
                writer.temporary, {"split_from": metadata.root.name, "episodes": list(numbers), **(told or {})}
            )


def merge(
    metadatas: Sequence[LeRobotMetadata],
    output: Path,
    on_episode: Callable[[], None] = lambda: None,
    *,
    common: bool = False,
) -> None:
    """Writes all episodes of several datasets into a new one, in order; tasks are joined by their texts.

    Language columns that not all of them have are left out.

    Args:
        common: leave out whatever else not all of them have, too.
    Raises:
        FileExistsError: `output` is there.
        ValueError: they differ in their rate, robot or features.
    """
    _check_new(output)
    features = _without_odd([kept_features(metadata) for metadata in metadatas], common)
    for other, theirs in zip(metadatas[1:], features[1:], strict=True):
        _check_alike(metadatas[0], other, differences(features[0], theirs))
    with _writer(output, metadatas[0], features[0]) as writer:
        for metadata in metadatas:
            _copy(metadata, writer, on_episode)
        counts = [{"dataset": each.root.name, "episodes": len(each.episodes)} for each in metadatas]
        run_metadata.write(writer.temporary, {"merged_from": counts})


def _check_new(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} exists; name a new folder")


def _without_odd(features: Sequence[dict[str, Feature]], common: bool) -> list[dict[str, Feature]]:
    """Episodes that nobody has annotated are no reason to keep others from them."""
    odd = {key for each in features for key in each if any(key not in other for other in features)}
    if not common:
        odd = {key for each in features for key in odd & each.keys() if is_annotation(each[key])}
    for key in sorted(odd):
        logger.warning("left out: '%s', which not all of these datasets have", key)
    return [{key: feature for key, feature in each.items() if key not in odd} for each in features]


def _check_alike(first: LeRobotMetadata, other: LeRobotMetadata, told: list[str]) -> None:
    if first.fps != other.fps:
        told.append(f"fps is {first.fps:g} and {other.fps:g}")
    if first.robot_type != other.robot_type:
        told.append(f"robot_type is {first.robot_type!r} and {other.robot_type!r}")
    if first.subtasks != other.subtasks:
        told.append(f"subtask_index means other texts in their {SUBTASKS_FILE}")
    if told:
        raise ValueError(
            f"{first.root} and {other.root} cannot be in one dataset: {'; '.join(told)}. Train on them together as a "
            "mixture, or bring them to one form first: `openpi dataset shrink` brings cameras to one size, "
            f"{_slower(first.fps, other.fps)}and `openpi dataset merge --common` leaves out what only some have"
        )


def _slower(*rates: float) -> str:
    """The fastest rate that all have been recorded at, if some of their frames are left out."""
    common = math.gcd(*map(int, rates))
    is_rate = len(set(rates)) > 1 and all(rate == int(rate) for rate in rates) and common > 1
    return f"to one rate by leaving out frames (--fps {common}), " if is_rate else ""


@contextlib.contextmanager
def _writer(output: Path, metadata: LeRobotMetadata, features: Mapping[str, Feature]) -> Iterator[LeRobotWriter]:
    for key, reason in metadata.unreadable.items():
        logger.warning("left out: '%s' %s", key, reason)
    warn_of_lost(metadata)
    fps = int(metadata.fps) if metadata.fps == int(metadata.fps) else metadata.fps
    with LeRobotWriter(output, fps=fps, features=features, robot_type=metadata.robot_type) as writer:
        yield writer
        copy_subtasks(metadata.root, writer.temporary)


def _copy(
    metadata: LeRobotMetadata,
    writer: LeRobotWriter,
    on_episode: Callable[[], None],
    episodes: Sequence[int] | None = None,
) -> None:
    columns = [key for key in writer.features if key not in metadata.annotation_keys]  # these are read when asked for
    dataset = LeRobotDataset(metadata.root, episodes=episodes, columns=columns, metadata=metadata)
    for remark in copy_episodes(dataset, writer):
        if remark is not None:
            logger.warning("%s", remark)
        on_episode()
