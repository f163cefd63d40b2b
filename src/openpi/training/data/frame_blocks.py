"""Frames without their images, many at a time: what statistics and action tokenizers are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi.data.dataset import Sample

BLOCK_FRAMES = 4096
SEED = 0  # of which frames are drawn, where not all are


@dataclass(frozen=True)
class Block:
    """Some frames, black where the cameras are.

    Attributes:
        episodes: int[n], the episode that each is of.
        build: (rows of the block, shape) -> a sample whose numbers are `shape(values of these rows)`.
    """

    episodes: np.ndarray
    build: Callable[[np.ndarray, Callable[[np.ndarray], Any]], Sample]

    def __len__(self) -> int:
        return len(self.episodes)

    def together(self) -> Sample:
        """All as one sample whose numbers have a leading axis; images and texts are those of one frame."""
        return self.build(np.arange(len(self)), lambda values: values)

    def alone(self, row: int) -> Sample:
        """One as the loader would hand it to the transforms, images aside."""
        return self.build(np.array([row]), lambda values: np.array(values[0]))


def check_max_frames(max_frames: int | None, all_of_them: str) -> None:
    """Raises ValueError where no frame is asked for."""
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; give at least 1, or None for {all_of_them} frames")
