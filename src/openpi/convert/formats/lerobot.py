"""A LeRobot dataset as recordings to convert: its cameras at the size that a model sees.

Pictures are resized by the function that the loader, the server and the client use, so that a model sees what it would
have seen; what a codec loses comes on top, and is measured by `convert/shrinking.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, Texts
from openpi.data.lerobot.annotations import is_annotation
from openpi.data.lerobot.copying import exact_column
from openpi.data.lerobot.episode_check import size_hw
from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names, is_numeric
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi_client.image_tools import resize_with_pad


@dataclass(frozen=True)
class ResizedDataset:
    """A dataset with its cameras letterboxed.

    Attributes:
        root: its folder.
        size_hw: pixels.
        cameras: which are kept; None = all.
    """

    root: Path
    size_hw: tuple[int, int]
    cameras: tuple[str, ...] | None = None

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
        cameras = [key for key in metadata.camera_keys if self.cameras is None or key in self.cameras]
        tabular = (*metadata.column_keys, *metadata.annotation_keys)
        tabular = [key for key in metadata.features if key in tabular and key not in INDEX_FEATURES]
        dataset = LeRobotDataset(
            self.root, episodes=[int(ref.place[0])], columns=[*tabular, *cameras], metadata=metadata
        )
        columns = {key: _column(dataset, key) for key in tabular}
        columns |= {key: self._camera(dataset, key) for key in cameras}
        tasks = [metadata.tasks[int(index)] for index in dataset.column("task_index")]
        left_out = [key for key in metadata.features if key not in columns and key not in INDEX_FEATURES]
        return RawEpisode(
            {key: columns[key] for key in metadata.features if key in columns},
            metadata.fps,
            tasks[0] if len(set(tasks)) == 1 else tasks,
            metadata.robot_type,
            tuple(left_out),
        )

    def _camera(self, dataset: LeRobotDataset, key: str) -> Camera:
        height, width = size_hw(dataset.metadata.features[key])
        origin = f"{key}, {height}x{width}"
        is_chw = dataset.metadata.features[key]["shape"][2] != 3
        return Camera(len(dataset), self.size_hw, self._frames(dataset, key), origin, is_chw)

    def _frames(self, dataset: LeRobotDataset, key: str) -> Iterator[np.ndarray]:
        for number in range(len(dataset)):
            yield resize_with_pad(dataset.camera_frames(key, 0, [number])[0], *self.size_hw)


def _column(dataset: LeRobotDataset, key: str) -> RawColumn:
    feature = dataset.metadata.features[key]
    if is_numeric(feature):
        return Numbers(exact_column(dataset, key, 0), key, dimension_names(feature), feature["dtype"])
    return Texts(dataset.column(key), key, is_annotation(feature))


@functools.lru_cache(maxsize=4)
def _metadata(root: Path) -> LeRobotMetadata:
    """Read once in each process."""
    return LeRobotMetadata.load(root)
