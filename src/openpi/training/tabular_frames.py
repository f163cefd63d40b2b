"""The frames of a recipe's dataset without their images, in blocks: what statistics are made of."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.data.droid_rlds.episode import IMAGE_SHAPE, Episode, kept_frames
from openpi.data.droid_rlds.in_order import FramesInOrder, episodes
from openpi.data.droid_rlds.stream import MixturePart
from openpi.data.lerobot.features import INDEX_FEATURES
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.model_config import BaseModelConfig
from openpi.training import data_loader
from openpi.training.data_config import DataConfig

logger = logging.getLogger("openpi")

BLOCK_FRAMES = 4096
_SEED = 0
_FILES_AHEAD = 8
_FILES_PER_LINE = 200


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


class Frames(Protocol):
    """The frames of a recipe."""

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        """Per dataset of a mixture its share, and its frames; `max_frames` of them drawn from everywhere, if given."""
        ...

    def evaluate(self, sample: Sample) -> dict[str, np.ndarray]:
        """`state` and `actions` after the recipe's transforms, up to normalisation.

        Raises:
            KeyError: the transforms give none.
        """
        ...


def open_frames(data_config: DataConfig, model_config: BaseModelConfig) -> Frames:
    """Raises what opening the dataset raises."""
    kind = TabularFrames if data_config.rlds_data_dir is None else RldsFrames
    return kind(data_config, model_config)


class _Evaluating:
    """Runs the loader's transforms up to normalisation."""

    def __init__(self, data_config: DataConfig, dataset: LeRobotDataset | FramesInOrder):
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
    """Of a dataset in LeRobot form."""

    def __init__(self, data_config: DataConfig, model_config: BaseModelConfig):
        dataset = _tabular_dataset(data_config)
        super().__init__(data_config, dataset)
        self._horizon = model_config.action_horizon
        self._action_keys = tuple(data_config.action_sequence_keys)
        self._tasks = dataset.metadata.tasks
        self._images = _black_images(dataset, data_config)
        names = [key for key in dataset.keys if key in INDEX_FEATURES or key in dataset.metadata.column_keys]
        self._columns = {name: dataset.column(name) for name in names}
        lengths = np.diff(dataset.episode_bounds, axis=1)[:, 0]
        self._last_rows = np.repeat(dataset.episode_bounds[:, 1] - 1, lengths)

    def __len__(self) -> int:
        return len(self._last_rows)

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        rows = _chosen_rows(len(self), max_frames)
        chosen = (rows[begin : begin + BLOCK_FRAMES] for begin in range(0, len(rows), BLOCK_FRAMES))
        return [(1.0, (self._block(each) for each in chosen))]

    def _block(self, rows: np.ndarray) -> Block:
        episode_of = np.searchsorted(np.unique(self._last_rows), rows)
        return Block(episode_of, lambda chosen, shape: self._build(rows[chosen], shape))

    def _build(self, rows: np.ndarray, shape: Callable[[np.ndarray], Any]) -> Sample:
        sample: Sample = dict(self._images)
        for name, column in self._columns.items():
            if name not in self._action_keys:
                sample[name] = shape(column[rows])
                continue
            steps = rows[:, None] + np.arange(self._horizon)
            inside = np.minimum(steps, self._last_rows[rows][:, None])
            sample[name] = shape(column[inside])
            sample[f"{name}_is_pad"] = shape(steps != inside)
        task_index = self._columns["task_index"][rows[0]]
        sample["task_index"] = np.array(task_index)
        sample["task"] = self._tasks.get(int(task_index), "")
        return sample


class RldsFrames(_Evaluating):
    """Of DROID in RLDS form: those that training would draw. No image is read."""

    def __init__(self, data_config: DataConfig, model_config: BaseModelConfig):
        self._mixture = data_loader.open_mixture(data_config, model_config.action_horizon)
        super().__init__(data_config, FramesInOrder(self._mixture))
        black = np.zeros(IMAGE_SHAPE, np.uint8)
        self._images = {"image": black, "wrist_image": black}

    def parts(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        _check_max_frames(max_frames, "all")
        parts = self._mixture.parts
        limits = [None if max_frames is None else max(1, round(part.weight * max_frames)) for part in parts]
        return [(part.weight, self._blocks(part, limit)) for part, limit in zip(parts, limits, strict=True)]

    def _blocks(self, part: MixturePart, limit: int | None) -> Iterator[Block]:
        waiting: list[tuple[int, Episode, np.ndarray]] = []
        count = total = 0
        for number, episode in enumerate(self._episodes(part, is_drawn=limit is not None)):
            kept = kept_frames(episode, part.ranges)[: None if limit is None else limit - total]
            waiting.append((number, episode, kept))
            count, total = count + len(kept), total + len(kept)
            if count >= BLOCK_FRAMES:
                yield self._block(waiting)
                waiting, count = [], 0
            if total == limit:
                break
        if count:
            yield self._block(waiting)

    def _block(self, chosen: list[tuple[int, Episode, np.ndarray]]) -> Block:
        chunks = [episode.chunks(kept, self._mixture.horizon) for _, episode, kept in chosen]
        columns = {
            "actions": np.concatenate([actions for actions, _ in chunks]),
            "actions_is_pad": np.concatenate([is_pad for _, is_pad in chunks]),
            "joint_position": np.concatenate([episode.joints[kept] for _, episode, kept in chosen]),
            "gripper_position": np.concatenate([episode.gripper[kept] for _, episode, kept in chosen]),
        }
        numbers = np.concatenate([np.full(len(kept), number) for number, _, kept in chosen])
        _, episode, _ = chosen[0]
        texts = {"prompt": episode.instructions[0][0], "step_id": episode.key.encode()}

        def build(rows: np.ndarray, shape: Callable[[np.ndarray], Any]) -> Sample:
            values = {name: shape(column[rows]) for name, column in columns.items()}
            measured = {name: values.pop(name) for name in ("joint_position", "gripper_position")}
            return {**values, "observation": {**self._images, **measured}, **texts}

        return Block(numbers, build)

    def _episodes(self, part: MixturePart, *, is_drawn: bool) -> Iterator[Episode]:
        """Files are read a few ahead: what takes time on a network disk is waiting."""
        shards = part.folder.filled
        if is_drawn:
            shards = [shards[i] for i in np.random.default_rng(_SEED).permutation(len(shards))]
        ahead: deque[Future[list[Episode]]] = deque()
        with ThreadPoolExecutor(_FILES_AHEAD, thread_name_prefix="columns") as readers:
            try:
                for i, shard in enumerate(shards):
                    if i and i % _FILES_PER_LINE == 0:
                        logger.info("columns of %d of %d files of %s read", i, len(shards), part.folder.root)
                    ahead.append(readers.submit(self._episodes_of, shard))
                    if len(ahead) == _FILES_AHEAD:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _episodes_of(self, shard: tuple[Path, int]) -> list[Episode]:
        path, num_records = shard
        return [episode for _, _, episode in episodes(path, self._mixture.arm_action, num_records)]


def _chosen_rows(num_frames: int, max_frames: int | None) -> np.ndarray:
    _check_max_frames(max_frames, f"all {num_frames}")
    if max_frames is None or max_frames >= num_frames:
        return np.arange(num_frames)
    return np.sort(np.random.default_rng(_SEED).choice(num_frames, max_frames, replace=False))


def _check_max_frames(max_frames: int | None, all_of_them: str) -> None:
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; give at least 1, or None for {all_of_them} frames")


def _tabular_dataset(data_config: DataConfig) -> LeRobotDataset:
    """The recipe's dataset without its cameras."""
    metadata = data_loader.open_metadata(data_config)
    used = data_loader.features_read(data_config, metadata)
    columns = [
        key for key in metadata.column_keys if used is None or key in used or key in data_config.action_sequence_keys
    ]
    dataset = LeRobotDataset(
        metadata.root,
        episodes=data_loader.kept_episodes(data_config, metadata),
        columns=[*columns, *data_config.action_sequence_keys],
        metadata=metadata,
    )
    dataset.check_finite()
    return dataset


def _black_images(dataset: LeRobotDataset, data_config: DataConfig) -> dict[str, np.ndarray]:
    """uint8 [h, w, 3] per camera that the recipe reads, as the reader would deliver it."""
    used = data_loader.features_read(data_config, dataset.metadata)
    images = {}
    for key in dataset.metadata.camera_keys:
        if used is None or key in used:
            shape = tuple(dataset.metadata.features[key]["shape"])
            images[key] = np.zeros(shape if shape[-1] == 3 else (*shape[1:], shape[0]), np.uint8)
    return images
