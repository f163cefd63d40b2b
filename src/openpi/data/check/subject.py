"""What is checked: a dataset as far as it can be opened, and what its vectors are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TypeVar, cast

import numpy as np

from openpi.data.check.findings import Finding
from openpi.data.lerobot.columns import Columns, load_columns
from openpi.data.lerobot.dimension_words import is_gripper, words
from openpi.data.lerobot.episode_table import Episode, leave_out
from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset

T = TypeVar("T")

MIN_EPISODES = 5
"""From here on an episode is compared with the others."""

_MAX_WIDTH = 512  # wider ones are tactile pictures and the like
_NO_STATE_WORDS = frozenset({"next", "reward", "effort", "torque", "current", "velocity", "vel", "force"})


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a recipe makes of a dataset; without one the names in it decide.

    Attributes:
        action_keys: the columns of its actions.
        columns: that it reads; None = all.
        horizon: steps of a chunk.
        excluded: episodes that it leaves out.
        needs_tasks: whether task texts become prompts.
    """

    action_keys: tuple[str, ...] = ()
    columns: Collection[str] | None = None
    horizon: int | None = None
    excluded: frozenset[int] = frozenset()
    needs_tasks: bool = True

    def reads(self, key: str) -> bool:
        return self.columns is None or key in self.columns


EVERYTHING = Reading()
"""Without a recipe."""


@dataclasses.dataclass(frozen=True)
class Vector:
    """A column of floats, [n, d].

    Attributes:
        role: `state`, `action`, or `other`.
        names: of the dimensions; numbered where the dataset names none.
        is_named: whether the dataset does.
        grippers: bool[d].
    """

    key: str
    role: str
    names: tuple[str, ...]
    is_named: bool
    values: np.ndarray
    grippers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """A dimension of the actions and the dimension of the state that it moves.

    Attributes:
        is_sure: that it does; else it only stands at the same place of a vector of another width.
    """

    action: Vector
    action_dim: int
    state: Vector
    state_dim: int
    is_sure: bool = True

    @property
    def is_gripper(self) -> bool:
        return bool(self.action.grippers[self.action_dim] or self.state.grippers[self.state_dim])


@dataclasses.dataclass
class Subject:
    """A dataset's tables, whole.

    Attributes:
        episodes: those that could be read, in order.
        columns: [n, ...] of these.
        bounds: int64[episodes 2], their rows.
        odd: (column, episode) that a check has found unlike the others in all it holds; the checks after it compare
            without them.
    """

    metadata: LeRobotMetadata
    reading: Reading
    episodes: tuple[Episode, ...]
    columns: Mapping[str, np.ndarray]
    bounds: np.ndarray
    odd: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    _ranges: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict, init=False)
    _measured: dict[Callable, object] = dataclasses.field(default_factory=dict, init=False)

    @cached_property
    def vectors(self) -> tuple[Vector, ...]:
        return tuple(self._vectors())

    def of_role(self, role: str) -> list[Vector]:
        return [vector for vector in self.vectors if vector.role == role]

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Actions and the state that they move: by the names of dimensions, or else by place."""
        states = [(vector, dim) for vector in self.of_role("state") for dim in range(len(vector.names))]
        actions = [(vector, dim) for vector in self.of_role("action") for dim in range(len(vector.names))]
        by_name = {_plain(v.names[dim]): (v, dim) for v, dim in states if v.is_named}
        named = [(a, by_name.get(_plain(a[0].names[a[1]]))) for a in actions if a[0].is_named]
        found = [Pair(*action, *state) for action, state in named if state is not None]
        if not found:
            is_sure = len(states) == len(actions)
            found = [Pair(*action, *state, is_sure) for action, state in zip(actions, states, strict=False)]
        return tuple(found)

    def range_of(self, vector: Vector) -> np.ndarray:
        """f64[d]: width of what the middle 98% of the frames take, in episodes that are like the others."""
        odd = sorted(number for key, number in self.odd if key == vector.key)
        if (vector.key, len(odd)) not in self._ranges:
            is_like = ~np.isin(self.columns["episode_index"], odd)
            values = vector.values[is_like] if is_like.any() else vector.values
            low, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), [0.01, 0.99], axis=0)
            self._ranges[vector.key, len(odd)] = np.nan_to_num(high - low)
        return self._ranges[vector.key, len(odd)]

    def unit_of(self, vector: Vector) -> np.ndarray:
        """f64[d]: the range to divide by; infinite where nothing changes."""
        wide = self.range_of(vector)
        return np.where(wide > 0, wide, np.inf)

    def once(self, measure: Callable[[Subject], T]) -> T:
        """What several checks ask for and what takes a while, measured for the first of them."""
        if measure not in self._measured:
            self._measured[measure] = measure(self)
        return cast(T, self._measured[measure])

    def rows(self, position: int) -> slice:
        """Of an episode."""
        begin, end = self.bounds[position]
        return slice(int(begin), int(end))

    def each(self, vector: Vector) -> Iterator[tuple[int, int, np.ndarray]]:
        """(position, number, f64[n, d]) of the episodes that are like the others in this column."""
        for position, episode in enumerate(self.episodes):
            if (vector.key, episode.index) not in self.odd:
                yield position, episode.index, vector.values[self.rows(position)].astype(np.float64)

    def _vectors(self) -> Iterator[Vector]:
        keys = [key for key in self.columns if self._is_vector(key)]
        actions = self.reading.action_keys or _named_so(keys, ("action", "actions"))
        states = _named_so([key for key in keys if key not in actions], ("observation.state", "state"))
        for key in keys:
            feature = self.metadata.features[key]
            width = feature["shape"][0]
            names = dimension_names(feature)
            is_named = len(names) == width == len(set(names))
            values = self.columns[key].reshape(len(self.columns[key]), width)
            labels = names if is_named else tuple(str(dim) for dim in range(width))
            role = "action" if key in actions else "state" if key in states else "other"
            whole = [key if width == 1 else label for label in labels]
            grippers = np.array([is_gripper(f"{name}" if is_named else "") for name in whole])
            if width == 1:
                grippers |= is_gripper(key)
            if role == "action" and not grippers.any():  # unnamed, or motor_6 as in sets of the hub
                grippers |= _has_two_values(values)
            yield Vector(key, role, tuple(labels), is_named, values, grippers)

    def _is_vector(self, key: str) -> bool:
        feature = self.metadata.features.get(key)
        if feature is None or key in INDEX_FEATURES or self.columns[key].dtype.kind != "f":
            return False
        return len(feature["shape"]) == 1 and feature["shape"][0] <= _MAX_WIDTH and self.reading.reads(key)


def open_subject(metadata: LeRobotMetadata, reading: Reading) -> tuple[Subject, list[Finding]]:
    """Reads all tables; episodes that cannot be read are findings, and left out."""
    kept = [episode for episode in metadata.episodes if episode.index not in reading.excluded]
    names = [key for key in metadata.column_keys if np.prod(metadata.features[key]["shape"]) <= _MAX_WIDTH]
    names = list(dict.fromkeys([*names, *INDEX_FEATURES]))
    findings: list[Finding] = []
    usable: list[Episode] = []
    try:
        loaded = load_columns(kept, metadata, names) if kept else Columns({}, {}, ())
        columns: Mapping[str, np.ndarray] = loaded.values
        usable += loaded.episodes
    except (ValueError, OSError):  # file by file, to tell which
        parts: list[Mapping[str, np.ndarray]] = []
        for _, group in groupby(kept, key=lambda episode: episode.data_path):
            _load(list(group), metadata, names, usable, parts, findings)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in names} if parts else {}
    ends = np.cumsum([episode.length for episode in usable], dtype=np.int64)
    bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1) if usable else np.zeros((0, 2), np.int64)
    return Subject(metadata, reading, tuple(usable), columns, bounds), findings


def subject_of(dataset: LeRobotDataset, reading: Reading) -> Subject:
    """Of a dataset that is open already, and so has passed what is asked then."""
    columns = {key: dataset.column(key) for key in dataset.keys if key not in dataset.metadata.camera_keys}
    return Subject(dataset.metadata, reading, dataset.episodes, columns, dataset.episode_bounds)


def _load(
    episodes: Sequence[Episode],
    metadata: LeRobotMetadata,
    names: Sequence[str],
    usable: list[Episode],
    parts: list[Mapping[str, np.ndarray]],
    findings: list[Finding],
) -> None:
    """Episodes of one file; if it cannot be read for all of them, halves tell which are at fault."""
    try:
        loaded = load_columns(episodes, metadata, names)
        parts.append(loaded.values)
        usable.extend(loaded.episodes)
    except (ValueError, OSError) as error:
        if len(episodes) == 1 or isinstance(error, FileNotFoundError):
            findings.extend(unreadable(error, [episode.index for episode in episodes]))
            return
        half = len(episodes) // 2
        if all(_fails(part, metadata, names) == str(error) for part in (episodes[:half], episodes[half:])):
            findings.extend(unreadable(error, [episode.index for episode in episodes]))
            return
        _load(episodes[:half], metadata, names, usable, parts, findings)
        _load(episodes[half:], metadata, names, usable, parts, findings)


def unreadable(error: BaseException, episodes: Sequence[int]) -> Iterator[Finding]:
    """One finding for each episode."""
    for index in episodes:
        finding = Finding.of_error("episodes.unreadable", error, episode=index)
        yield finding if finding.fix or finding.expected else dataclasses.replace(finding, fix=leave_out(episodes))


def _fails(episodes: Sequence[Episode], metadata: LeRobotMetadata, names: Sequence[str]) -> str | None:
    try:
        load_columns(episodes, metadata, names)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _named_so(keys: Sequence[str], exact: tuple[str, ...]) -> tuple[str, ...]:
    """The column of an exact name, or those whose names have the word; of states, all that are of nothing else."""
    found = [key for key in keys if key in exact]
    if found:
        return tuple(found)
    if "action" in exact:
        return tuple(key for key in keys if {"action", "actions"} & set(words(key)))
    return tuple(key for key in keys if not (_NO_STATE_WORDS | {"action", "actions"}) & set(words(key)))


def _plain(name: str) -> str:
    """Without the words that say what is measured: `left_elbow.pos` moves `left_elbow_position`."""
    kept = [part for part in name.lower().replace(".", "_").split("_") if part not in ("pos", "position", "target", "")]
    return "_".join(kept)


def _has_two_values(values: np.ndarray) -> np.ndarray:
    """bool[d]: dimensions that are one of two values nearly always, as open and close."""
    with np.errstate(invalid="ignore"):
        low, high = np.nanmin(values, axis=0, initial=np.inf), np.nanmax(values, axis=0, initial=-np.inf)
        near = np.minimum(np.abs(values - low), np.abs(values - high)) < 0.05 * (high - low)
    return (high > low) & (near.mean(axis=0) > 0.95) if len(values) else np.zeros(values.shape[1], bool)
