"""Which frames of which episodes are used: a JSON file of `{"<recording folder>--<file>": [[start, end), ...]}`."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from openpi.shared import strict_json

Ranges: TypeAlias = Mapping[str, Sequence[Sequence[int]]]


class FrameRanges:
    """The frames to keep, by episode. Without a table every frame is kept; with one, what it does not name is not."""

    def __init__(self, ranges: Ranges | None = None, source: str = "the frame ranges"):
        self._ranges = ranges
        self.source = source

    @classmethod
    def load(cls, path: Path) -> "FrameRanges":
        """Raises ValueError unless the file holds such a table, and FileNotFoundError where there is none."""
        try:
            table = strict_json.read(path)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); expected frame ranges by episode") from error
        if not isinstance(table, dict):
            raise ValueError(f"{path} holds a {type(table).__name__}; expected frame ranges by episode")
        for key, ranges in table.items():
            if not (isinstance(ranges, list) and all(_is_range(pair) for pair in ranges)):
                raise ValueError(
                    f"{path}: {key!r} has {str(ranges)[:80]}; expected [[start, end], ...], 0 <= start <= end"
                )
        return cls(table, str(path))

    @functools.cached_property
    def digest(self) -> str:
        """Of the table, wherever its file lies; '' where every frame is kept."""
        if self._ranges is None:
            return ""
        return hashlib.sha256(json.dumps(self._ranges, sort_keys=True).encode()).hexdigest()[:16]

    def kept(self, key: str, num_frames: int) -> np.ndarray:
        """int64[n], ascending: the frames to use of an episode of `num_frames`."""
        if self._ranges is None:
            return np.arange(num_frames)
        is_kept = np.zeros(num_frames, bool)
        for start, end in self._ranges.get(key, ()):
            is_kept[start:end] = True
        return np.flatnonzero(is_kept)


def episode_key(recording_folder: str, file_path: str) -> str:
    return f"{recording_folder}--{file_path}"


def _is_range(pair: object) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair)
    return is_pair and 0 <= pair[0] <= pair[1]  # type: ignore[index,operator]  # a list, as was just seen
