"""The mixture of a recipe, as training, statistics and `openpi explain` use it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openpi.data.dataset import Sample
from openpi.shared import download
from openpi.training.data import frame_blocks
from openpi.training.data.frame_blocks import Block
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig
from openpi.training.droid_rlds_dataset import DroidActionSpace
from openpi_rlds.episode import CONTROL_HZ, IMAGE_SHAPE, Episode, kept_frames
from openpi_rlds.folder import open_folder
from openpi_rlds.frame_ranges import FrameRanges
from openpi_rlds.in_order import FramesInOrder, episodes
from openpi_rlds.stream import Mixture, MixturePart, MixtureSource

logger = logging.getLogger(__name__)

_FILES_AHEAD = 8
_FILES_PER_LINE = 200


def open_mixture(data_config: DataConfig, horizon: int) -> Mixture:
    """The datasets of a recipe, opened, with their frame ranges fetched.

    Raises:
        FileNotFoundError, ValueError: a dataset or its ranges are not there or cannot be used; or the weights do not
            add up to 1; or the recipe excludes episodes.
    """
    assert data_config.rlds_data_dir is not None
    if data_config.selection:
        raise ValueError(
            f"{data_config.selection} is set, but data in RLDS form are a stream without numbered episodes; leave them "
            "out in the file of frame ranges (filter_dict_path)"
        )
    parts = []
    for dataset in data_config.datasets:
        folder = open_folder(data_config.rlds_data_dir, dataset.name, dataset.version)
        ranges = FrameRanges()
        if dataset.filter_dict_path is not None:
            ranges = FrameRanges.load(download.maybe_download(dataset.filter_dict_path))
        parts.append(MixturePart(folder, dataset.weight, ranges))
    is_velocity = data_config.action_space is DroidActionSpace.JOINT_VELOCITY
    return Mixture(tuple(parts), "joint_velocity" if is_velocity else "joint_position", horizon)


class DroidStream(Stream):
    """DROID, or a mixture with it.

    Args:
        horizon: steps of an action chunk.
    Raises:
        FileNotFoundError, ValueError: as `open_mixture`.
    """

    control_hz = CONTROL_HZ

    def __init__(self, data_config: DataConfig, horizon: int) -> None:
        self._mixture = open_mixture(data_config, horizon)
        self._in_order = FramesInOrder(self._mixture)
        self._buffer_size = data_config.shuffle_buffer_size
        black = np.zeros(IMAGE_SHAPE, np.uint8)
        self._images = {"image": black, "wrist_image": black}

    def batches(self, *, batch_size: int, seed: int, shuffle: bool, part: tuple[int, int] = (0, 1)) -> MixtureSource:
        return MixtureSource(
            self._mixture,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            buffer_size=self._buffer_size,
            part=part,
        )

    def spread(self, num_samples: int) -> list[tuple[str, Sample]]:
        return [(f"frame {sample['step_id'].decode()}", sample) for sample in self._in_order.spread(num_samples)]

    def __getitem__(self, index: int, /) -> Sample:
        return self._in_order[index]

    def blocks(self, max_frames: int | None) -> Sequence[tuple[float, Iterable[Block]]]:
        parts = self._mixture.parts
        limits = [None if max_frames is None else max(1, round(part.weight * max_frames)) for part in parts]
        return [(part.weight, self._blocks(part, limit)) for part, limit in zip(parts, limits, strict=True)]

    def _blocks(self, part: MixturePart, limit: int | None) -> Iterator[Block]:
        waiting: list[tuple[int, Episode, np.ndarray]] = []
        count = total = 0
        for number, episode in enumerate(self._episodes(part, is_drawn=limit is not None)):
            kept = kept_frames(episode, part.ranges)[: None if limit is None else limit - total]
            if not len(kept):
                continue
            waiting.append((number, episode, kept))
            count, total = count + len(kept), total + len(kept)
            if count >= frame_blocks.BLOCK_FRAMES:
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

        def build(rows: np.ndarray, shape: Callable[[np.ndarray], object]) -> Sample:
            values = {name: shape(column[rows]) for name, column in columns.items()}
            measured = {name: values.pop(name) for name in ("joint_position", "gripper_position")}
            return {**values, "observation": {**self._images, **measured}, **texts}

        return Block(numbers, build)

    def _episodes(self, part: MixturePart, *, is_drawn: bool) -> Iterator[Episode]:
        """Files are read a few ahead: what takes time on a network disk is waiting."""
        shards = part.folder.filled
        if is_drawn:
            shards = [shards[i] for i in np.random.default_rng(frame_blocks.SEED).permutation(len(shards))]
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
