"""LIBERO as it is published for training: four TFDS datasets (RLDS) without idle steps, read without TensorFlow.

    <root>/libero_10_no_noops/1.0.0/dataset_info.json, libero_10-train.tfrecord-00000-of-00032, ...
    a record: steps/observation/{image, wrist_image} (JPEG), steps/observation/state [8], steps/action [7],
              steps/language_instruction

Source: the training specification, section 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, natural, relative
from openpi.data.images import decode_image
from openpi.policies.libero_policy import LIBERO_SPEC
from openpi.shared.errors import listed, missing_key
from openpi_rlds.episode import IS_FIRST, check_one_episode
from openpi_rlds.example import MalformedError, Values, not_an_example, parse_example
from openpi_rlds.folder import open_folder
from openpi_rlds.tfrecord import TFRecordFile

SETS = ("libero_10_no_noops", "libero_goal_no_noops", "libero_object_no_noops", "libero_spatial_no_noops")
_RATE_HZ = 10
_CAMERAS = {"image": "steps/observation/image", "wrist_image": "steps/observation/wrist_image"}
_VECTORS = {
    "state": ("steps/observation/state", LIBERO_SPEC.state_names),
    "actions": ("steps/action", LIBERO_SPEC.actions.names),
}
_INSTRUCTION = "steps/language_instruction"
_ALL = frozenset({*_CAMERAS.values(), *(name for name, _ in _VECTORS.values()), _INSTRUCTION})


@dataclass(frozen=True)
class LiberoRlds:
    """LIBERO's four published TFDS datasets (RLDS), without TensorFlow.

    Attributes:
        root: the folder that holds them.
        sets: names of datasets, comma-separated; default: the four that are published.
    """

    root: Path
    sets: tuple[str, ...] = SETS

    def episodes(self) -> Sequence[EpisodeRef]:
        refs = []
        for name in self.sets:
            folder = open_folder(self.root, name, self._version(name))
            for shard, length in folder.filled:
                where = relative(shard, self.root)
                refs += [EpisodeRef(f"{where}/{number}", (shard,), (number, length)) for number in range(length)]
        return refs

    def read(self, ref: EpisodeRef) -> RawEpisode:
        number, length = (int(place) for place in ref.place)
        features = _record(ref.files[0], number, length)
        columns: dict[str, RawColumn] = {
            column: Numbers(_vector(features, name, len(names)), name, tuple(names))
            for column, (name, names) in _VECTORS.items()
        }
        for column, name in _CAMERAS.items():
            pictures = _strings(features, name)
            height, width, _ = decode_image(bytes(pictures[0]), name).shape
            columns[column] = Camera(len(pictures), (height, width), _decoded(pictures, name), name)
        texts = [bytes(text).decode("utf-8", "replace") for text in _strings(features, _INSTRUCTION)]
        task = texts[0] if len(set(texts)) == 1 else texts
        return RawEpisode(columns, _RATE_HZ, task, "panda")

    def _version(self, name: str) -> str:
        folder = self.root / name
        versions = sorted((path.name for path in folder.glob("*.*.*") if path.is_dir()), key=natural)
        if not versions:
            there = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
            raise FileNotFoundError(
                f"{folder} has no dataset; {self.root} has {listed(there[:10])}. Download it there, or say which sets "
                "to convert with sets (--sets)"
            )
        return versions[-1]


def _record(path: Path, number: int, length: int) -> dict[str, Values]:
    with TFRecordFile(path, length) as file:
        for _ in range(number):
            file.next()
        span = file.next()
        if span is None:
            raise ValueError(f"{path} has no record {number}")
        if number == length - 1:
            file.next()  # tells of more than there should be
        try:
            features = parse_example(file.load(span), _ALL | {IS_FIRST})
        except MalformedError as error:
            raise not_an_example(f"{path}, record {number}", error) from error
    if absent := sorted(_ALL - features.keys()):
        raise missing_key(absent[0], features, wanted_by=f"{path}, record {number}")
    check_one_episode(features, f"{path}, record {number}")
    return features


def _vector(features: dict[str, Values], name: str, width: int) -> np.ndarray:
    values = features[name]
    if not isinstance(values, np.ndarray) or not len(values) or len(values) % width:
        raise ValueError(f"'{name}' holds {len(values)} values; expected {width} numbers per frame")
    return values.astype(np.float64).reshape(-1, width)


def _strings(features: dict[str, Values], name: str) -> Sequence[memoryview]:
    values = features[name]
    if not isinstance(values, list) or not values:
        raise ValueError(f"'{name}' holds numbers or nothing; expected a byte string per frame")
    return values


def _decoded(pictures: Sequence[memoryview], name: str) -> Iterator[np.ndarray]:
    return (decode_image(bytes(picture), name) for picture in pictures)
