"""The frames of a recipe's dataset without their images, in blocks: what statistics are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, overload

import numpy as np

from openpi import transforms
from openpi.data.dataset import Dataset, Sample
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.model_config import BaseModelConfig
from openpi.training import data_loader
from openpi.training.data import frame_blocks, recipe_data
from openpi.training.data.frame_blocks import Block, check_max_frames
from openpi.training.data.recipe_data import FakeDataset, RecipeData
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig


class Frames(Protocol):
    """The frames of a recipe."""

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        """Per dataset of a mixture its share, and its frames; `max_frames` of them drawn from everywhere, if given.

        Blocks in a `Sequence` can be made in other processes.
        """
        ...

    def evaluate(self, sample: Sample) -> dict[str, np.ndarray]:
        """`state` and `actions` after the recipe's transforms, up to normalisation.

        Raises:
            KeyError: the transforms give none.
        """
        ...


def open_frames(data_config: DataConfig, model_config: BaseModelConfig) -> Frames:
    """Raises what opening the dataset raises."""
    dataset = recipe_data.create_dataset(data_config, model_config, cameras=False)
    return _frames(data_config, dataset, model_config.action_horizon)


def frames_of(data: RecipeData, horizon: int) -> list[tuple[float, Frames]]:
    """The datasets of a recipe, each with its share of the samples."""
    shares = [part.share for part in data.config.mixture] or [1.0]
    return [(share, _frames(*member, horizon)) for share, member in zip(shares, data.members, strict=True)]


def _frames(data_config: DataConfig, dataset: Dataset | Stream, horizon: int) -> Frames:
    if isinstance(dataset, LeRobotDataset):
        return TabularFrames(data_config, dataset, horizon)
    if isinstance(dataset, FakeDataset):
        raise ValueError(f"random data (repo_id='{recipe_data.FAKE_REPO_ID}') have no statistics")
    assert isinstance(dataset, Stream)
    return StreamFrames(data_config, dataset)


class _Evaluating:
    """Runs the loader's transforms up to normalisation."""

    def __init__(self, data_config: DataConfig, dataset: LeRobotDataset | Stream):
        chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
        end = next(i for i, transform in enumerate(chain) if isinstance(transform, transforms.Normalize))
        self._chain = transforms.compose(chain[:end])

    def evaluate(self, sample: Sample) -> dict[str, np.ndarray]:
        made = self._chain(sample)
        if missing := [key for key in ("state", "actions") if key not in made]:
            raise KeyError(
                f"the recipe's transforms give no {missing}, of which statistics are needed; they give {list(made)}"
            )
        return {key: np.asarray(made[key]) for key in ("state", "actions")}


class TabularFrames(_Evaluating):
    """Of a dataset in LeRobot form; no picture is read, whether it has some or not."""

    def __init__(self, data_config: DataConfig, dataset: LeRobotDataset, horizon: int):
        super().__init__(data_config, dataset)
        self._horizon = horizon
        self._action_keys = tuple(data_config.action_sequence_keys)
        self._tasks = dataset.metadata.tasks
        self._images = _black_images(dataset, data_config)
        names = [key for key in dataset.keys if key not in dataset.metadata.camera_keys]
        self._columns = {name: dataset.column(name) for name in names}
        self._ends = dataset.episode_bounds[:, 1]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        rows = _chosen_rows(len(self), max_frames)
        size = frame_blocks.BLOCK_FRAMES
        return [(1.0, RowBlocks(self, [rows[begin : begin + size] for begin in range(0, len(rows), size)]))]

    def block(self, rows: np.ndarray) -> Block:
        return Block(self._episode_of(rows), lambda chosen, shape: self._build(rows[chosen], shape))

    def _episode_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, rows, side="right")

    def _build(self, rows: np.ndarray, shape: Callable[[np.ndarray], object]) -> Sample:
        sample: Sample = dict(self._images)
        last_rows = self._ends[self._episode_of(rows)] - 1
        for name, column in self._columns.items():
            if column.dtype.hasobject:  # texts and what else is told: of one frame
                sample[name] = column[rows[0]]
            elif name not in self._action_keys:
                sample[name] = shape(column[rows])
                continue
            steps = rows[:, None] + np.arange(self._horizon)
            inside = np.minimum(steps, last_rows[:, None])
            sample[name] = shape(column[inside])
            sample[f"{name}_is_pad"] = shape(steps != inside)
        task_index = self._columns["task_index"][rows[0]]
        sample["task_index"] = np.array(task_index)
        sample["task"] = self._tasks.get(int(task_index), "")
        return sample


class RowBlocks(Sequence[Block]):
    """Blocks that are made where they are asked for, in any process."""

    def __init__(self, frames: TabularFrames, rows: Sequence[np.ndarray]):
        self._frames, self._rows = frames, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Block: ...
    @overload
    def __getitem__(self, place: slice) -> RowBlocks: ...
    def __getitem__(self, place: int | slice) -> Block | RowBlocks:
        if isinstance(place, slice):
            return RowBlocks(self._frames, self._rows[place])
        return self._frames.block(self._rows[place])


class StreamFrames(_Evaluating):
    """Of a stream: those that training would draw. No image is read."""

    def __init__(self, data_config: DataConfig, stream: Stream):
        self._stream = stream
        super().__init__(data_config, stream)

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        check_max_frames(max_frames, "all")
        return self._stream.blocks(max_frames)


def _chosen_rows(num_frames: int, max_frames: int | None) -> np.ndarray:
    check_max_frames(max_frames, f"all {num_frames}")
    if max_frames is None or max_frames >= num_frames:
        return np.arange(num_frames)
    return np.sort(np.random.default_rng(frame_blocks.SEED).choice(num_frames, max_frames, replace=False))


def _black_images(dataset: LeRobotDataset, data_config: DataConfig) -> dict[str, np.ndarray]:
    """uint8 [h, w, 3] per camera that the recipe reads, as the reader would deliver it."""
    used = recipe_data.features_read(data_config, dataset.metadata)
    images = {}
    for key in dataset.metadata.camera_keys:
        if used is None or key in used:
            shape = tuple(dataset.metadata.features[key]["shape"])
            images[key] = np.zeros(shape if shape[-1] == 3 else (*shape[1:], shape[0]), np.uint8)
    return images
