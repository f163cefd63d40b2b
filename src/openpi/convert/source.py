"""What a format of recordings is to the conversion: a cheap list of episodes, and a pure function from one to frames.

A format is a frozen dataclass of its options, so that it travels to other processes and says what a result depends on.
Reading tells nothing about the dataset that is written: names, rate and task come with the episode, and the conversion
compares episodes with each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from openpi.data.lerobot.features import Feature


@dataclass(frozen=True)
class EpisodeRef:
    """Where an episode lies.

    Attributes:
        name: one of a kind in its source, for people, such as `put_the_bowl_demo.hdf5/demo_7`.
        files: what it is read from; files or folders.
        place: what a format needs to find it in there.
        identity: the same wherever the recording lies; '' = by the hash of its files, and `place`.
        flaw: why it cannot be used, if that is seen without reading it.
    """

    name: str
    files: tuple[Path, ...]
    place: tuple[str | int, ...] = ()
    identity: str = ""
    flaw: str = ""


@dataclass(frozen=True)
class Numbers:
    """A column of numbers.

    Attributes:
        values: [n, ...].
        origin: where they come from, for people.
        names: of the dimensions; empty where nobody says.
        dtype: in the dataset; '' = float32, int64 or bool, whichever holds such numbers.
    """

    values: np.ndarray
    origin: str
    names: tuple[str, ...] = ()
    dtype: str = ""


@dataclass(frozen=True)
class Texts:
    """A column of texts, or of rows of language as LeRobot 0.6 has them.

    Attributes:
        values: objects [n]: a str each, or a list of rows.
        origin: where they come from, for people.
        is_language: these are rows.
    """

    values: np.ndarray
    origin: str
    is_language: bool = False


@dataclass(frozen=True)
class Camera:
    """A column of pictures.

    Attributes:
        length: how many there are.
        size_hw: of each, in pixels.
        frames: uint8 RGB [h, w, 3]; can be walked once, and need not be walked at all.
        origin: where they come from, for people.
        is_chw: whether the dataset says [3, h, w]; the pixels are the same.
    """

    length: int
    size_hw: tuple[int, int]
    frames: Iterable[np.ndarray]
    origin: str
    is_chw: bool = False


RawColumn: TypeAlias = Numbers | Texts | Camera


@dataclass(frozen=True)
class RawEpisode:
    """An episode as it was recorded, under the names of the dataset.

    Attributes:
        columns: of one length.
        fps: frames per second; None where the recording does not say.
        task: for the episode, or one text for each frame; None where the recording does not say. Empty ones are taken,
            and told.
        robot_type: for the dataset's metadata.
        left_out: what the recording has besides, for people.
        remarks: what somebody should know who trains on it.
        features: how the dataset describes columns, where that is known; others are described by their values.
    """

    columns: Mapping[str, RawColumn]
    fps: float | None
    task: str | Sequence[str] | None
    robot_type: str | None = None
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    features: Mapping[str, Feature] = field(default_factory=dict)


class Source(Protocol):
    """Recordings of one format. `repr` says all that the result depends on, but for the files' content."""

    @property
    def root(self) -> Path:
        """What the names of files are relative to."""
        ...

    def episodes(self) -> Sequence[EpisodeRef]:
        """In order; without reading any.

        Raises:
            FileNotFoundError: there are none.
            ValueError: these are no such recordings.
        """
        ...

    def read(self, ref: EpisodeRef) -> RawEpisode:
        """One episode; pictures are read when they are walked.

        Raises:
            ValueError, KeyError: damaged, or not in this format; the message says where. Also while pictures are
                walked.
        """
        ...


def natural(name: str) -> list[tuple[int, str]]:
    """A key for sorting in which `episode_10` comes behind `episode_9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_order(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: [natural(part) for part in path.parts])


def found(root: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """Files and folders below a folder, or the file itself, in natural order.

    Raises:
        FileNotFoundError: there are none.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; expected {what}")
    if root.is_file():
        return [root]
    # Some systems put a hidden file of their own beside each.
    paths = in_order({path for pattern in patterns for path in root.glob(pattern) if not path.name.startswith(".")})
    if not paths:
        raise FileNotFoundError(f"{root} holds no {' or '.join(patterns)}; expected {what}")
    return paths


def relative(path: Path, root: Path) -> str:
    """For names: from the source's folder, or the file's own name where it is the source."""
    return path.name if path == root else path.relative_to(root).as_posix()


def joined(parts: Mapping[str, np.ndarray], where: str) -> np.ndarray:
    """float64[n, d]: columns [n] or [n, k] side by side.

    Raises:
        ValueError: they have another number of frames or axes.
    """
    lengths = {name: len(values) for name, values in parts.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{where}: one number of frames is expected of all, found {lengths}")
    if deep := [name for name, values in parts.items() if values.ndim not in (1, 2)]:
        raise ValueError(f"{where}: '{deep[0]}' has the shape {parts[deep[0]].shape}; expected a vector per frame")
    flat = [values.reshape(len(values), -1).astype(np.float64) for values in parts.values()]
    return np.concatenate(flat, axis=1)
