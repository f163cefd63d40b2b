"""A few pictures of every camera of an episode, and what is kept of them."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import attrgetter

import numpy as np
from PIL import Image

from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared.evenly_spaced import evenly_spaced

NUM_FRAMES = 6
GRID = 16
_SPARSE_GOP = 16  # frames between key frames, from which on only those are decoded


@dataclasses.dataclass(frozen=True)
class Look:
    """What is kept of the pictures of one camera in one episode.

    Attributes:
        frames: their numbers in the episode, k of them, ascending.
        size_hw: of a picture.
        means, spreads: f64[k], brightness and its deviation over the picture, of 255.
        changes: f64[k - 1], the largest change of a patch from one to the next, of 255.
        patches: f32[GRID, GRID, 3], the median over all of them, RGB: without what moves.
    """

    frames: tuple[int, ...]
    size_hw: tuple[int, int]
    means: np.ndarray
    spreads: np.ndarray
    changes: np.ndarray
    patches: np.ndarray


@dataclasses.dataclass(frozen=True)
class Looks:
    """Of one episode; `errors` are of cameras that could not be decoded."""

    episode: int
    cameras: Mapping[str, Look]
    errors: Mapping[str, str]


def look(datasets: Mapping[str, LeRobotDataset], episode: int) -> Looks:
    """Decodes pictures of an episode.

    Args:
        datasets: by camera, those that hold the episode.
    """
    cameras, errors = {}, {}
    for key, dataset in datasets.items():
        position = bisect_left(dataset.episodes, episode, key=attrgetter("index"))
        if position == len(dataset.episodes) or dataset.episodes[position].index != episode:
            continue
        frames = choose_frames(dataset, key, position)
        try:
            pictures = dataset.camera_frames(key, position, frames)
        except (ValueError, OSError) as error:
            errors[key] = str(error)
            continue
        cameras[key] = _summary(frames, pictures)
    return Looks(episode, cameras, errors)


def choose_frames(dataset: LeRobotDataset, key: str, position: int) -> list[int]:
    """Spread over the episode; where key frames are far apart, those: others cost the decoding from there on."""
    episode = dataset.episodes[position]
    chosen = evenly_spaced(range(episode.length), NUM_FRAMES)
    keys = dataset.key_frames(key, position)
    if len(keys) > 1 and episode.length / len(keys) > _SPARSE_GOP:
        chosen = np.unique(keys[np.abs(np.subtract.outer(chosen, keys)).argmin(axis=1)]).tolist()
    return chosen


def _summary(frames: Sequence[int], pictures: Sequence[np.ndarray]) -> Look:
    small = np.stack([_patches(picture) for picture in pictures])
    changes = np.abs(np.diff(small, axis=0)).mean(axis=-1).reshape(len(small) - 1, GRID * GRID)
    return Look(
        tuple(frames),
        pictures[0].shape[:2],
        small.mean(axis=(1, 2, 3), dtype=np.float64),
        np.array([picture[::4, ::4].std(axis=(0, 1)).max() for picture in pictures]),
        changes.max(axis=1) if len(small) > 1 else np.zeros(0),
        np.median(small, axis=0),
    )


def _patches(picture: np.ndarray) -> np.ndarray:
    """f32[GRID, GRID, 3]."""
    image = Image.fromarray(picture).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, np.float32)
