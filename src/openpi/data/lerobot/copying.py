"""Episodes of datasets into a new one, as they are: nothing is decoded that need not be.

Tables are read and written, encoded images and packets of videos are taken over. Only an episode whose packets cannot
be had alone is encoded again, and that is told.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from openpi.data.lerobot import stats as feature_stats
from openpi.data.lerobot import video_writer
from openpi.data.lerobot.columns import numbers_of_rows, read_rows_of
from openpi.data.lerobot.episode_table import V3_COLUMNS
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature, is_numeric, named_alike
from openpi.data.lerobot.files import open_parquet, parquet_files
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.prepared import PreparedEpisode
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.video_cut import VideoPackets
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.shared.errors import listed
from openpi.shared.evenly_spaced import evenly_spaced

logger = logging.getLogger(__name__)

_LOOKED_AT = 10  # pictures of a camera of an episode, for its statistics


def kept_features(metadata: LeRobotMetadata, episodes: Collection[int] | None = None) -> dict[str, Feature]:
    """Those that are copied: all but what is no camera here, such as depth, and what a file lacks, which is told.

    Args:
        episodes: numbers of those that are copied; None = all.
    """
    kept = {*metadata.camera_keys, *metadata.column_keys, *metadata.annotation_keys} - _lacking(metadata, episodes)
    features = {k: f for k, f in metadata.features.items() if k in kept and k not in INDEX_FEATURES}
    return {key: {name: value for name, value in f.items() if name != "video_info"} for key, f in features.items()}


def _lacking(metadata: LeRobotMetadata, episodes: Collection[int] | None) -> set[str]:
    """Columns that not all files have, as of sets that were merged by hand: who reads others trains on such a set."""
    chosen = [e for e in metadata.episodes if episodes is None or e.index in episodes]
    files = dict.fromkeys(episode.data_path for episode in chosen)
    stored = {key for key, f in metadata.features.items() if f["dtype"] != "video" and key not in INDEX_FEATURES}
    lacking: dict[str, list[Path]] = {}
    for path in files:
        with contextlib.suppress(OSError, ValueError), open_parquet(path) as file:  # its fault is told where it is read
            for key in stored.difference(file.schema_arrow.names):
                lacking.setdefault(key, []).append(path)
    for key, paths in sorted(lacking.items()):
        logger.warning(
            "left out: '%s', a column that %d of the %d data files lack, the first %s; meta/info.json promises it",
            key,
            len(paths),
            len(files),
            paths[0],
        )
    return set(lacking)


def warn_of_lost(metadata: LeRobotMetadata) -> None:
    """Says what a new dataset will not have: what somebody else has written of each episode."""
    first = next(iter(parquet_files(metadata.root / "meta/episodes")), None)
    if first is None:  # before version 3
        return
    own = ("videos/", "stats/", "meta/episodes/", "data/")
    lost = [name for name in pq.read_schema(first).names if name not in V3_COLUMNS and not name.startswith(own)]
    if lost:
        logger.warning(
            "left out: %s of meta/episodes, which is not carried over; the new dataset numbers its episodes anew, and "
            "says in meta/ which ones they were",
            listed(lost),
        )


def differences(features: Mapping[str, Feature], others: Mapping[str, Feature]) -> list[str]:
    """In words, what of two sets of features is not alike, so that they cannot be in one dataset."""
    told = [f"'{key}' is only in one of them" for key in sorted(features.keys() ^ others.keys())]
    for key in features.keys() & others.keys():
        for name in ("dtype", "shape"):
            here, there = features[key].get(name), others[key].get(name)
            if here != there:
                told.append(f"{name} of '{key}' is {here} and {there}")
        if (here := named_alike(features[key])) != (there := named_alike(others[key])):
            told.append(f"names of '{key}' are {list(here)} and {list(there)}")
    return told


def copy_episodes(dataset: LeRobotDataset, writer: LeRobotWriter) -> Iterator[str | None]:
    """Appends all episodes of an opened dataset; after each, what should be known about it, or None."""
    for position in range(len(dataset.episodes)):
        with tempfile.TemporaryDirectory(prefix=".episode-", dir=writer.temporary) as folder:
            episode, remark = _prepared(dataset, position, writer, Path(folder))
            writer.add_prepared(episode, _tasks(dataset, position))
        yield remark


def _tasks(dataset: LeRobotDataset, position: int) -> list[str]:
    begin, end = dataset.episode_bounds[position]
    return [dataset.metadata.tasks[int(index)] for index in dataset.column("task_index")[begin:end]]


def _prepared(
    dataset: LeRobotDataset, position: int, writer: LeRobotWriter, folder: Path
) -> tuple[PreparedEpisode, str | None]:
    length = dataset.episodes[position].length
    columns: dict[str, np.ndarray] = {}
    videos, stats, encoded_again = {}, {}, []
    for key, feature in writer.features.items():
        if key in INDEX_FEATURES:
            continue
        if feature["dtype"] in CAMERA_DTYPES:
            frames = evenly_spaced(range(length), _LOOKED_AT)
            stats[key] = feature_stats.image_stats(np.stack(dataset.camera_frames(key, position, frames)))
        if feature["dtype"] == "image":
            columns[key] = np.array([*dataset.encoded_images(key, position), None], object)[:-1]
        elif feature["dtype"] == "video":
            videos[key] = folder / f".{key}.mp4"
            if not _cut(dataset, key, position, videos[key]):
                _encode(dataset, key, position, videos[key], writer)
                encoded_again.append(key)
        else:
            columns[key] = exact_column(dataset, key, position)
            if is_numeric(feature):
                stats[key] = feature_stats.vector_stats(columns[key])
    number = dataset.episodes[position].index
    remark = f"episode {number}: {', '.join(encoded_again)} encoded again, because its video begins with no key frame"
    return PreparedEpisode(length, columns, videos, stats), remark if encoded_again else None


def exact_column(dataset: LeRobotDataset, key: str, position: int) -> np.ndarray:
    """A column of an episode, with all its digits: the reader gives float32 whatever is stored."""
    begin, end = dataset.episode_bounds[position]
    if dataset.metadata.features[key]["dtype"] != "float64":
        return dataset.column(key)[begin:end]
    episode = dataset.episodes[position]
    table, _ = read_rows_of(episode.data_path, [episode.index], [key, "episode_index"])
    is_of = numbers_of_rows(table) == episode.index
    return np.array(table[key].filter(is_of).to_pylist(), np.float64)


@lru_cache(maxsize=16)
def _packets(path: Path, stamp: tuple[object, ...]) -> VideoPackets:
    del stamp  # of the file, which may be another one of that name
    return VideoPackets.read(path)


def _cut(dataset: LeRobotDataset, key: str, position: int, target: Path) -> bool:
    path, first = dataset.video_place(key, position)
    state = path.stat()
    packets = _packets(path, (state.st_mtime_ns, state.st_size))
    place = packets.place(first, dataset.episodes[position].length)
    if place is None:
        return False
    packets.cut(place, target, dataset.metadata.fps)
    return True


def _encode(dataset: LeRobotDataset, key: str, position: int, target: Path, writer: LeRobotWriter) -> None:
    frames = (dataset.camera_frames(key, position, [i])[0] for i in range(dataset.episodes[position].length))
    video_writer.encode_video(target, frames, dataset.metadata.fps, writer.encoder)
