"""A LeRobot dataset as recordings to convert: its cameras at the size that a model sees, at its rate or a slower one.

Pictures are resized by the function that the loader, the server and the client use, so that a model sees what it would
have seen; what a codec loses comes on top, and is measured by `convert/shrinking.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, Texts
from openpi.data.lerobot.annotations import is_annotation
from openpi.data.lerobot.copying import exact_column, kept_features
from openpi.data.lerobot.episode_check import size_hw
from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names, is_numeric
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi_client.image_tools import resize_with_pad


@dataclass(frozen=True)
class ResizedDataset:
    """A dataset with its cameras letterboxed, of every `stride`th frame.

    Attributes:
        root: its folder.
        size_hw: pixels.
        cameras: which are kept; None = all.
        stride: 1 = every frame; else each that is kept has the action that was recorded with it.
    """

    root: Path
    size_hw: tuple[int, int]
    cameras: tuple[str, ...] | None = None
    stride: int = 1

    def episodes(self) -> list[EpisodeRef]:
        metadata = _metadata(self.root)
        return [
            EpisodeRef(
                f"episode_{episode.index}",
                (episode.data_path, *(span.path for span in episode.videos.values())),
                (episode.index,),
            )
            for episode in metadata.episodes
        ]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        metadata = _metadata(self.root)
        kept = _kept(self.root)
        cameras = [key for key in kept if key in metadata.camera_keys and key in (self.cameras or kept)]
        tabular = [key for key in kept if key not in metadata.camera_keys]
        dataset = LeRobotDataset(
            self.root, episodes=[int(ref.place[0])], columns=[*tabular, *cameras], metadata=metadata
        )
        columns = {key: self._column(dataset, key) for key in tabular}
        columns |= {key: self._camera(dataset, key) for key in cameras}
        tasks = [metadata.tasks[int(index)] for index in dataset.column("task_index")[:: self.stride]]
        left_out = [key for key in metadata.features if key not in columns and key not in INDEX_FEATURES]
        return RawEpisode(
            {key: columns[key] for key in metadata.features if key in columns},
            metadata.fps / self.stride,
            tasks[0] if len(set(tasks)) == 1 else tasks,
            metadata.robot_type,
            tuple(left_out),
        )

    def _camera(self, dataset: LeRobotDataset, key: str) -> Camera:
        height, width = size_hw(dataset.metadata.features[key])
        origin = f"{key}, {height}x{width}"
        is_chw = dataset.metadata.features[key]["shape"][2] != 3
        length = -(-len(dataset) // self.stride)
        return Camera(length, self.size_hw, self._frames(dataset, key), origin, is_chw)

    def _frames(self, dataset: LeRobotDataset, key: str) -> Iterator[np.ndarray]:
        for number in range(0, len(dataset), self.stride):
            yield resize_with_pad(dataset.camera_frames(key, 0, [number])[0], *self.size_hw)

    def _column(self, dataset: LeRobotDataset, key: str) -> RawColumn:
        feature = dataset.metadata.features[key]
        if is_numeric(feature):
            values = exact_column(dataset, key, 0)[:: self.stride]
            return Numbers(values, key, dimension_names(feature), feature["dtype"])
        return Texts(dataset.column(key)[:: self.stride], key, is_annotation(feature))


@functools.lru_cache(maxsize=4)
def _metadata(root: Path) -> LeRobotMetadata:
    """Read once in each process."""
    return LeRobotMetadata.load(root)


@functools.lru_cache(maxsize=4)
def _kept(root: Path) -> Collection[str]:
    return kept_features(_metadata(root))
