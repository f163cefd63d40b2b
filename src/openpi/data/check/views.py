"""Cameras that look unlike themselves in the other episodes: red and blue exchanged, turned, mirrored, another camera.

The picture of an episode, without what moves in it, is compared with that of the others as it is, and with each mistake
undone: what fits far better then was made by it. Patches count by how little they differ between episodes: the
background, not the objects. Of two equal halves of a dataset one is called usual, and it may be the wrong one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.pictures import Looks
from openpi.data.check.subject import MIN_EPISODES
from openpi.data.lerobot.episode_table import leave_out
from openpi.shared.evenly_spaced import evenly_spaced

_FITS, _EXCHANGED_FITS = 0.8, 0.6  # distance with the mistake undone, of that before; clean sets have 1.2 and more
_OTHER, _FAR = 1.5, 1.8  # distance from which on a picture is another one; clean sets have up to 1.4
_NOISE = 2.0  # of 255
_BRIGHTNESS, _MOST_LIGHT = 100.0, 2.0
_MOST_SPREADS = 2.5  # a patch that an object covers counts no more
_NEAREST = 0.4  # of the episodes make up what is usual: where half of them are at fault, one half
_MISTAKES: Mapping[str, tuple[Callable[[np.ndarray], np.ndarray], str, str]] = {
    "colors": (lambda p: p[..., ::-1], "red and blue are exchanged (BGR for RGB)", "Exchange them: frames[..., ::-1]"),
    "upside-down": (lambda p: p[::-1, ::-1], "the picture is upside down", "Turn it by 180 degrees"),
    "flipped": (lambda p: p[::-1], "top and bottom are exchanged", "Flip it"),
    "mirrored": (lambda p: p[:, ::-1], "left and right are exchanged", "Mirror it"),
}


@dataclasses.dataclass(frozen=True)
class _Usual:
    """What a camera shows in most episodes, and how much that differs: f32[GRID GRID 3] each."""

    picture: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray]) -> _Usual:
        some = np.stack(evenly_spaced(pictures, 200))
        distances = np.array([np.sqrt(((picture - some) ** 2).mean(axis=(1, 2, 3))) for picture in some])
        center = distances[np.argmin(np.quantile(distances, _NEAREST, axis=1))]
        nearest = some[np.argsort(center)[: max(1, int(_NEAREST * len(some)))]]
        picture = np.median(nearest, axis=0)
        return cls(picture, np.abs(nearest - picture).mean(axis=0) + _NOISE)

    def distance(self, picture: np.ndarray) -> float:
        """Root of the mean square, in units of the spread."""
        return float(np.sqrt((np.minimum(np.abs(picture - self.picture) / self.spread, _MOST_SPREADS) ** 2).mean()))


def check(looks: Sequence[Looks], blank: Set[tuple[str, int]]) -> Iterator[Finding]:
    """Compares each camera with itself.

    Args:
        blank: (camera, episode) that show nothing.
    """
    keys = list(dict.fromkeys(key for found in looks for key in found.cameras))
    pictures = {
        key: {
            f.episode: _in_the_same_light(f.cameras[key].patches)
            for f in looks
            if key in f.cameras and (key, f.episode) not in blank
        }
        for key in keys
    }
    pictures = {key: found for key, found in pictures.items() if len(found) >= MIN_EPISODES}
    usual = {key: _Usual.of(list(found.values())) for key, found in pictures.items()}
    for key, found in pictures.items():
        for episode, picture in found.items():
            before = usual[key].distance(picture)
            if before < _OTHER:
                continue
            others = {other: usual[other].distance(picture) for other in usual.keys() - {key}}
            other = min(others, key=others.__getitem__, default="")
            if other and before >= _FAR and others[other] <= _EXCHANGED_FITS * before:
                yield _exchanged(key, episode, other)
                continue
            after = {name: usual[key].distance(undo(picture)) for name, (undo, _, _) in _MISTAKES.items()}
            name = min(after, key=after.__getitem__)
            if after[name] <= _FITS * before:
                yield _mistake(key, episode, name, len(found) - 1)


def _in_the_same_light(picture: np.ndarray) -> np.ndarray:
    """As bright as all others: a lamp changes all of a picture by more than its patches differ."""
    return picture * np.clip(_BRIGHTNESS / max(float(picture.mean()), 1.0), 1 / _MOST_LIGHT, _MOST_LIGHT)


def _mistake(key: str, episode: int, name: str, num_others: int) -> Finding:
    _, what, fix = _MISTAKES[name]
    fix = f"{fix} there, or {leave_out([episode])}"
    expected = f"pictures as in most of the other {num_others} episodes"
    return Finding(f"videos.{name}", Severity.ERROR, what, expected, fix, episode, column=key)


def _exchanged(key: str, episode: int, other: str) -> Finding:
    return Finding(
        "videos.other-camera",
        Severity.ERROR,
        f"it shows what '{other}' shows in the other episodes",
        "the view of the other episodes",
        f"Exchange the two cameras there, or {leave_out([episode])}",
        episode,
        column=key,
    )
