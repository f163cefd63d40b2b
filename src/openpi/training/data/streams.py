"""Data that come in an order of their own, and what reads them.

A reader is found by the entry point `openpi.streams`: format -> `(data_config, horizon) -> Stream`. What training,
statistics and `openpi explain` need of one is here; which records it reads, and how, is the reader's own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from openpi.data.batch_order import BatchSource
from openpi.data.dataset import Sample
from openpi.shared import plugins
from openpi.training.data.frame_blocks import Block
from openpi.training.data_config import DataConfig

ENTRY_POINTS = "openpi.streams"


class Encoded(Protocol):
    """An item of a stream's batches: small enough to wait in memory and to be sent to a worker process."""

    def decode(self) -> Sample: ...


class Stream(abc.ABC):
    """Samples without random access, epochs or numbered episodes; prompts are in them.

    Attributes:
        control_hz: frames per second.
    """

    control_hz: float

    @abc.abstractmethod
    def batches(self, *, batch_size: int, seed: int, shuffle: bool, part: tuple[int, int] = (0, 1)) -> BatchSource:
        """Batches of `Encoded` without end, as training takes them; `batch_size` is that of all processes together."""

    @abc.abstractmethod
    def blocks(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        """Per dataset of a mixture its share, and its frames; `max_frames` of them drawn from everywhere, if given."""

    @abc.abstractmethod
    def spread(self, num_samples: int) -> list[tuple[str, Sample]]:
        """Samples from all over the data, each with what to call it."""

    @abc.abstractmethod
    def __getitem__(self, index: int, /) -> Sample:
        """Frame `index` in the order of the files.

        Raises:
            IndexError: there are fewer.
        """


def open_stream(data_config: DataConfig, horizon: int) -> Stream:
    """The stream of a recipe that has one.

    Raises:
        ImportError: what reads its format is not installed; the message has the command that installs it.
        FileNotFoundError, ValueError: the data are not there or cannot be used, or the recipe excludes episodes.
    """
    assert data_config.stream_format is not None
    reader: Callable[[DataConfig, int], Stream] = plugins.load(ENTRY_POINTS, data_config.stream_format)
    return reader(data_config, horizon)
