"""CALVIN: a file per frame, with play that is annotated in parts.

    <split>/episode_<frame>.npz     rgb_static, rgb_gripper, robot_obs [15], actions [7], rel_actions [7], ...
    <split>/ep_start_end_ids.npy    [episodes, 2] first and last frame of each stretch of play
    <split>/lang_annotations/auto_lang_ann.npy    what is done in which frames, a pickle: read as data, never run

Where there are annotations, an episode is an annotated stretch, with its text; else a stretch of play.
Source: the README of CALVIN's dataset; columns as the recipe `pi0_calvin` reads them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode
from openpi.policies.calvin_policy import CALVIN_SPEC
from openpi.shared import plain_pickle
from openpi.shared.budgets import MAX_ARRAYS_BYTES, Budget, read_npy, read_npy_header, read_npz
from openpi.shared.errors import missing_key
from openpi.shared.file_kinds import found_instead

T = TypeVar("T")

_RATE_HZ = 30
_IDS, _ANNOTATIONS = "ep_start_end_ids.npy", "lang_annotations/auto_lang_ann.npy"
_CAMERAS = ("rgb_static", "rgb_gripper")
_FRAME_BYTES = 1 << 26
_MAX_ANNOTATION_BYTES = 1 << 28
_STATE_NAMES, _ACTION_NAMES = tuple(CALVIN_SPEC.state_names), tuple(CALVIN_SPEC.actions.names)
# Those of the recipe are as wide as the state; what lies behind the seven is padding.
_NUM_ACTIONS = 7


@dataclass(frozen=True)
class CalvinNpz:
    """CALVIN's recordings.

    Attributes:
        root: the dataset, or one of its splits.
        split: which split of the dataset.
        absolute: actions are poses in the world, instead of changes.
        unpadded: the 7 actions that were recorded; default: padded with zeros to 15, as the recipe pi0_calvin has them.
        play: stretches of play, annotated or not, instead of the annotated ones; their task is given by task (--task).
    """

    root: Path
    split: str = "training"
    absolute: bool = False
    unpadded: bool = False
    play: bool = False

    def episodes(self) -> Sequence[EpisodeRef]:
        folder = self.root if (self.root / _IDS).is_file() else self.root / self.split
        if not (folder / _IDS).is_file():
            raise FileNotFoundError(f"{folder} has no {_IDS}; expected a split of CALVIN, such as training")
        annotated = (folder / _ANNOTATIONS).is_file() and not self.play
        stretches = _annotated(folder / _ANNOTATIONS) if annotated else _played(folder / _IDS)
        return [_ref(folder, number, *stretch) for number, stretch in enumerate(stretches)]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        # A pose has the names of the state; changes have their own.
        action, pose = ("actions", _STATE_NAMES[:6]) if self.absolute else ("rel_actions", _ACTION_NAMES[:6])
        wanted = ["robot_obs", action]
        frames = [_load(path, wanted) for path in ref.files]
        actions = _vector(ref.files, frames, action, (*pose, _ACTION_NAMES[_NUM_ACTIONS - 1]))
        vectors = {
            "state": _vector(ref.files, frames, "robot_obs", _STATE_NAMES),
            "actions": actions if self.unpadded else _padded(actions),
        }
        columns: dict[str, RawColumn] = {**vectors}
        first = _load(ref.files[0], _CAMERAS)
        for name in _CAMERAS:
            height, width = first[name].shape[:2]
            columns[name] = Camera(len(frames), (height, width), _pictures(ref.files, name), name)
        task = str(ref.place[0]) or None
        return RawEpisode(columns, _RATE_HZ, task, "calvin", _others(ref.files[0], [*wanted, *_CAMERAS]))


def _vector(
    paths: Sequence[Path], frames: Sequence[Mapping[str, np.ndarray]], name: str, dimensions: tuple[str, ...]
) -> Numbers:
    for path, frame in zip(paths, frames, strict=True):
        if frame[name].shape != (len(dimensions),):
            raise ValueError(f"{path}: '{name}' has the shape {frame[name].shape}; expected {len(dimensions)} numbers")
    return Numbers(np.stack([frame[name] for frame in frames]), name, dimensions)


def _padded(actions: Numbers) -> Numbers:
    padding = _ACTION_NAMES[_NUM_ACTIONS:]
    values = np.concatenate([actions.values, np.zeros((len(actions.values), len(padding)))], axis=1)
    return Numbers(values, f"{actions.origin}, padded with zeros", (*actions.names, *padding))


def _ref(folder: Path, number: int, first: int, last: int, task: str) -> EpisodeRef:
    files = tuple(folder / f"episode_{frame:07d}.npz" for frame in range(first, last + 1))
    if absent := next((path for path in (files[0], files[-1]) if not path.is_file()), None):
        raise FileNotFoundError(f"{absent} is missing; episode {number} has the frames {first} to {last}")
    return EpisodeRef(f"{folder.name}/{number}: frames {first} to {last}", files, (task,))


def _played(path: Path) -> list[tuple[int, int, str]]:
    with path.open("rb") as file:
        ids = _within(path, lambda: read_npy(file, Budget(_MAX_ANNOTATION_BYTES), _IDS))
    if ids.ndim != 2 or ids.shape[1] != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {ids.dtype} {ids.shape}; expected first and last frame of each episode")
    return [_stretch(path, first, last, "") for first, last in ids.tolist()]


def _annotated(path: Path) -> list[tuple[int, int, str]]:
    if path.stat().st_size > _MAX_ANNOTATION_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_ANNOTATION_BYTES:,} are expected")
    stream = io.BytesIO(path.read_bytes())

    def content() -> Any:
        read_npy_header(stream)
        return plain_pickle.loads(stream.read(), Budget(MAX_ARRAYS_BYTES))

    told = _within(path, content)
    try:
        texts, stretches = told["language"]["ann"], told["info"]["indx"]
        return [_stretch(path, first, last, str(text)) for text, (first, last) in zip(texts, stretches, strict=True)]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} does not hold language.ann and info.indx ({error!r})") from error


def _stretch(path: Path, first: object, last: object, text: str) -> tuple[int, int, str]:
    begin, end = int(str(first)), int(str(last))
    if not 0 <= begin <= end < 10**7:
        raise ValueError(f"{path}: an episode has the frames {begin} to {end}; expected the smaller number first")
    return begin, end, text


def _within(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"{path}: {found_instead(path, 'NumPy') or error}") from error


def _load(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            arrays = _within(path, lambda: read_npz(file, Budget(_FRAME_BYTES), names))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    for name in names:
        if name not in arrays:
            raise missing_key(name, arrays, wanted_by=str(path))
    return arrays


def _pictures(paths: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    return (_load(path, [name])[name] for path in paths)


def _others(path: Path, used: Sequence[str]) -> tuple[str, ...]:
    with path.open("rb") as file:
        return tuple(name for name in read_npz(file, Budget(_FRAME_BYTES)) if name not in used)
