"""An episode with the heavy work done: checked, its cameras encoded, its statistics taken; to be joined to a dataset.

Preparing needs no dataset, so other processes can do it, and `save` keeps the result until the dataset is written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpi.data.lerobot import stats as feature_stats
from openpi.data.lerobot import video_writer
from openpi.data.lerobot.episode_check import FrameStream, check_episode
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature, is_numeric

_ARRAYS, _STATS = "columns.npz", "stats.json"  # texts and language, which are objects, are in the latter
_PREFIX = "column/"  # NumPy's function has arguments of its own, such as `file`


@dataclass(frozen=True)
class PreparedEpisode:
    """One episode, ready to be joined.

    Attributes:
        columns: features that are stored in tables, [n, ...] each; cameras stored as images among them.
        videos: encoded cameras, an mp4 each.
        stats: of every feature but texts and index columns.
    """

    length: int
    columns: Mapping[str, np.ndarray]
    videos: Mapping[str, Path]
    stats: Mapping[str, feature_stats.FeatureStats]

    def save(self, folder: Path) -> None:
        """Writes what is not a video; the videos must lie in `folder` already."""
        texts = {key: _runs(values) for key, values in self.columns.items() if values.dtype == object}
        arrays: dict[str, Any] = {f"{_PREFIX}{key}": v for key, v in self.columns.items() if key not in texts}
        np.savez(folder / _ARRAYS, **arrays)
        stats = {key: {name: value.tolist() for name, value in values.items()} for key, values in self.stats.items()}
        videos = {key: path.name for key, path in self.videos.items()}
        content = {"length": self.length, "stats": stats, "videos": videos, "texts": texts}
        (folder / _STATS).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PreparedEpisode:
        """Inverse of `save`."""
        content = json.loads((folder / _STATS).read_text(encoding="utf-8"))
        with np.load(folder / _ARRAYS) as arrays:
            columns = {key.removeprefix(_PREFIX): arrays[key] for key in arrays.files}
        texts = content.get("texts", {})  # which what was prepared before there were any has not
        columns |= {key: _of_runs(runs, content["length"]) for key, runs in texts.items()}
        stats = {
            key: {name: np.asarray(value) for name, value in values.items()} for key, values in content["stats"].items()
        }
        videos = {key: folder / name for key, name in content["videos"].items()}
        return cls(content["length"], columns, videos, stats)


def _runs(values: np.ndarray) -> list[tuple[int, object]]:
    """Frames that say the same once: an episode's language is that of each of its frames."""
    return [(len(list(frames)), value) for value, frames in itertools.groupby(values.tolist())]


def _of_runs(runs: Iterable[tuple[int, object]], length: int) -> np.ndarray:
    values = np.empty(length, object)
    values[:] = [value for count, value in runs for _ in range(count)]
    return values


def prepare_episode(
    frames: Mapping[str, np.ndarray | FrameStream],
    features: Mapping[str, Feature],
    *,
    folder: Path,
    fps: float,
    encoder: str,
    threads: int = 0,
) -> PreparedEpisode:
    """Checks an episode, encodes its videos into `folder` and takes its statistics.

    Args:
        frames: every feature but the index columns, [n, ...]; cameras uint8 RGB, [n, h, w, 3] or [n, 3, h, w], and
            those stored as video also as streams, of which no more than a frame is held.
        features: completed (`complete_features`).
        encoder: from `video_writer.choose_encoder`.
        threads: of the encoder; 0 = as many as it likes.
    Raises:
        KeyError, ValueError: `frames` does not fit the features.
    """
    checked, length = check_episode(frames, features)
    columns, videos, stats = {}, {}, {}
    for key, values in checked.items():
        if features[key]["dtype"] == "video":
            videos[key] = folder / f".{key}.mp4"
            sampler = feature_stats.ImageSampler(length)
            video_writer.encode_video(videos[key], _counted(sampler.watch(values), key, length), fps, encoder, threads)
            stats[key] = sampler.stats()
            continue
        assert isinstance(values, np.ndarray)
        columns[key] = values
        if features[key]["dtype"] in CAMERA_DTYPES:
            stats[key] = feature_stats.image_stats(values)
        elif is_numeric(features[key]):
            stats[key] = feature_stats.vector_stats(values)
    return PreparedEpisode(length, columns, videos, stats)


def index_stats(columns: Mapping[str, np.ndarray]) -> dict[str, feature_stats.FeatureStats]:
    """Of the columns that a dataset adds itself."""
    return {key: feature_stats.vector_stats(columns[key]) for key in INDEX_FEATURES}


def _counted(frames: Iterable[np.ndarray], key: str, length: int) -> Iterator[np.ndarray]:
    num_frames = 0
    for frame in frames:
        num_frames += 1  # counted even where none comes
        yield frame
    if num_frames != length:
        raise ValueError(f"camera '{key}' gave {num_frames} frames; the episode has {length}")
