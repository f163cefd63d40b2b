"""Normalisation statistics of a recipe's dataset, from the columns of its tables: no video is opened.

Statistics are taken of `state` and `actions` as training sees them just before they are normalised: after repacking,
robot conventions and relative actions, over every step of every chunk, the repeated last steps of an episode
included. Source: the training specification, sections 5.3 and 14.

Robot transforms are written for one sample, but most of them are arithmetic on the last axis and work as well on a
block of thousands of samples at once. We do not take that on trust: some rows of every block are computed one by one
as well, and at the first difference (or error) the whole dataset is done sample by sample.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.data.lerobot.columns import is_tabular
from openpi.data.lerobot.metadata import INDEX_FEATURES
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.model_config import BaseModelConfig
from openpi.policies.robot_spec import find_spec
from openpi.shared import normalize
from openpi.training import data_loader
from openpi.training.data_config import DataConfig

logger = logging.getLogger("openpi")

STATS_KEYS = ("state", "actions")
BLOCK_FRAMES = 4096
ROWS_CHECKED_PER_BLOCK = 3
_SEED = 0
# Of the used range, before a comparison warns.
_FAR_BEYOND = 1.0
_HARDLY = 0.05


@dataclass(frozen=True)
class ComputedStats:
    """What `compute` found and where it put it.

    Attributes:
        stats: by key; widened where `messages` says so.
        path: the file written, which is the one that the recipe reads.
        num_frames: that were looked at.
        names: of the dimensions, by key.
        messages: one for each dimension that hardly varies.
    """

    stats: dict[str, normalize.NormStats]
    path: Path
    num_frames: int
    names: dict[str, tuple[str, ...]]
    messages: tuple[str, ...]


def compute(config: Any, *, max_frames: int | None = None) -> ComputedStats:
    """Computes the statistics of a recipe and writes them where the recipe reads them.

    Args:
        config: a `TrainConfig`.
        max_frames: look at so many frames, drawn from the whole dataset; None = all.
    Raises:
        ValueError: the recipe has no dataset, or its statistics lie in a remote folder.
        FileNotFoundError, KeyError: the dataset is missing, or does not fit the recipe.
    """
    path = norm_stats_path(config)
    data_config = config.data.create(config.assets_dirs, config.model)
    frames = TabularFrames(data_config, config.model)
    raw = compute_norm_stats(frames, max_frames=max_frames)
    stats, messages, names = {}, [], {}
    for key, value in raw.items():
        names[key] = _labels(data_config, key, value.width)
        stats[key], widened = normalize.floor_degenerate(value, [f"{key}/{label}" for label in names[key]])
        messages += widened
    for message in messages:
        logger.warning("normalisation statistics: %s", message)
    normalize.save(path.parent, stats)
    return ComputedStats(stats, path, min(len(frames), max_frames or len(frames)), names, tuple(messages))


@dataclass(frozen=True)
class Comparison:
    """The range of one dimension, q01 to q99, in a dataset and in the statistics that a recipe uses for it.

    Attributes:
        name: such as `actions/gripper`.
        data, used: (q01, q99).
        message: what to do about it where the two hardly fit; else None.
    """

    name: str
    data: tuple[float, float]
    used: tuple[float, float]
    message: str | None


def compare(config: Any, *, max_frames: int | None = None) -> list[Comparison]:
    """Where a recipe's dataset lies within statistics that come from elsewhere, such as a base's. Writes nothing.

    Raises:
        FileNotFoundError: the recipe has no statistics yet.
        ValueError, KeyError: see `compute`; or the statistics are of another width.
    """
    data_config = config.data.create(config.assets_dirs, config.model)
    if data_config.norm_stats is None:
        folder = config.data.stats_dir(config.assets_dirs)
        raise FileNotFoundError(f"recipe '{config.name}' has no statistics in {folder}; compute them first")
    found = compute_norm_stats(TabularFrames(data_config, config.model), max_frames=max_frames)
    rows = []
    for key, data in found.items():
        used = data_config.norm_stats.get(key)
        if used is None or used.width < data.width:
            has = "none" if used is None else f"{used.width} dimensions"
            raise ValueError(f"'{key}' has {data.width} dimensions in the dataset, and the statistics have {has}")
        for i, label in enumerate(_labels(data_config, key, data.width)):
            rows.append(_compared(f"{key}/{label}", _range(data, i), _range(used, i)))
    return rows


def _range(stats: normalize.NormStats, i: int) -> tuple[float, float]:
    """q01 and q99, or two standard deviations around the mean where there are no quantiles."""
    if stats.q01 is None or stats.q99 is None:
        return float(stats.mean[i] - 2 * stats.std[i]), float(stats.mean[i] + 2 * stats.std[i])
    return float(stats.q01[i]), float(stats.q99[i])


def _compared(name: str, data: tuple[float, float], used: tuple[float, float]) -> Comparison:
    width = max(used[1] - used[0], 1e-9)
    beyond = max(used[0] - data[0], data[1] - used[1]) / width
    message = None
    if beyond > _FAR_BEYOND:
        message = f"reaches {beyond:.1f} ranges beyond; use statistics of your own data, or check units and order"
    elif (data[1] - data[0]) / width < _HARDLY:
        message = "covers hardly any of the range; use statistics of your own data, or check units and order"
    return Comparison(name, data, used, message)


def norm_stats_path(config: Any) -> Path:
    """The file from which the recipe reads its statistics, and to which they are written.

    Raises:
        ValueError: it is remote, or the recipe has neither an asset id nor a dataset.
    """
    folder = config.data.stats_dir(config.assets_dirs)
    if folder is None:
        raise ValueError(f"recipe '{config.name}' has no dataset and no asset id; set --data.repo-id")
    if "://" in folder or folder.startswith("package:"):
        raise ValueError(
            f"recipe '{config.name}' reads its statistics from {folder}, where they cannot be written; set "
            f"--data.assets.assets-dir to a local folder to compute your own"
        )
    return Path(folder) / normalize.STATS_FILE


def compute_norm_stats(frames: "TabularFrames", *, max_frames: int | None = None) -> dict[str, normalize.NormStats]:
    """Statistics of `state` and `actions`, unaltered.

    Raises:
        KeyError: the transforms give no `state` or no `actions`.
    """
    running = {key: normalize.RunningStats() for key in STATS_KEYS}
    rows = _chosen_rows(len(frames), max_frames)
    try:
        for block in _blocks(frames, rows):
            for key in STATS_KEYS:
                _update(running[key], key, block[key])
    except _NotVectorizableError as reason:
        logger.info("computing statistics sample by sample: %s", reason)
        running = {key: normalize.RunningStats() for key in STATS_KEYS}
        for row in rows:
            sample = frames.evaluate(frames.sample(int(row)))
            for key in STATS_KEYS:
                _update(running[key], key, sample[key])
    return {key: stats.get_statistics() for key, stats in running.items()}


def _update(running: normalize.RunningStats, key: str, values: np.ndarray) -> None:
    try:
        running.update(values)
    except ValueError as error:
        raise ValueError(f"'{key}' of the dataset, after the recipe's transforms: {error}") from error


def action_chunks(frames: "TabularFrames", *, max_frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of all frames, or of `max_frames` drawn ones, as training sees them unnormalised.

    Returns:
        float[n, h, d] chunks, and int[n], the episode that each is of.
    """
    rows = _chosen_rows(len(frames), max_frames)
    try:
        chunks = np.concatenate([block["actions"] for block in _blocks(frames, rows)])
    except _NotVectorizableError:
        chunks = np.stack([frames.evaluate(frames.sample(int(row)))["actions"] for row in rows])
    return chunks, frames.episode_of(rows)


class TabularFrames:
    """The frames of a recipe's dataset with black images in place of the cameras, one by one or in blocks."""

    def __init__(self, data_config: DataConfig, model_config: BaseModelConfig):
        dataset = _tabular_dataset(data_config)
        self._chain = transforms.compose(_chain(data_config, dataset))
        self._horizon = model_config.action_horizon
        self._action_keys = tuple(data_config.action_sequence_keys)
        self._tasks = dataset.metadata.tasks
        self._images = _black_images(dataset, data_config)
        features = dataset.metadata.features
        names = [key for key in dataset.keys if key in INDEX_FEATURES or is_tabular(features[key])]
        self._columns = {name: dataset.column(name) for name in names}
        lengths = np.diff(dataset.episode_bounds, axis=1)[:, 0]
        self._last_rows = np.repeat(dataset.episode_bounds[:, 1] - 1, lengths)

    def __len__(self) -> int:
        return len(self._last_rows)

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """int[n]: position of the episode that each row is in."""
        return np.searchsorted(np.unique(self._last_rows), rows)

    def sample(self, row: int) -> Sample:
        """Frame `row` as the loader would hand it to the transforms, images aside."""
        return self._build(np.array([row]), lambda values: np.array(values[0]))

    def block(self, rows: np.ndarray) -> Sample:
        """Many frames as one sample whose numbers have a leading axis; images and texts are those of one frame."""
        return self._build(rows, lambda values: values)

    def evaluate(self, sample: Sample) -> dict[str, np.ndarray]:
        """`state` and `actions` after the recipe's transforms."""
        made = self._chain(sample)
        if missing := [key for key in STATS_KEYS if key not in made]:
            raise KeyError(
                f"the recipe's transforms give no {missing}, of which statistics are needed; they give {list(made)}"
            )
        return {key: np.asarray(made[key]) for key in STATS_KEYS}

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


class _NotVectorizableError(Exception):
    """A transform that needs its samples one at a time."""


def _blocks(frames: TabularFrames, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(_SEED)
    for begin in range(0, len(rows), BLOCK_FRAMES):
        chosen = rows[begin : begin + BLOCK_FRAMES]
        try:
            block = frames.evaluate(frames.block(chosen))
        except Exception as error:
            # Whatever a transform throws at a shape it does not know; a genuine error comes again one by one.
            raise _NotVectorizableError(f"{type(error).__name__}: {error}") from error
        checked = {0, len(chosen) - 1, *rng.integers(0, len(chosen), ROWS_CHECKED_PER_BLOCK).tolist()}
        for position in checked:
            _check_row(frames, int(chosen[position]), {key: block[key][position] for key in block}, block, len(chosen))
        yield block


def _check_row(
    frames: TabularFrames, row: int, found: dict[str, np.ndarray], block: dict[str, np.ndarray], num_rows: int
) -> None:
    expected = frames.evaluate(frames.sample(row))
    for key, value in expected.items():
        same_shape = block[key].shape == (num_rows, *value.shape)
        if not same_shape or not np.allclose(found[key], value, rtol=1e-6, atol=1e-9, equal_nan=True):
            raise _NotVectorizableError(f"'{key}' of frame {row} differs between a block and the frame alone")


def _chosen_rows(num_frames: int, max_frames: int | None) -> np.ndarray:
    if max_frames is None or max_frames >= num_frames:
        return np.arange(num_frames)
    if max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; give at least 1, or None for all {num_frames} frames")
    return np.sort(np.random.default_rng(_SEED).choice(num_frames, max_frames, replace=False))


def _tabular_dataset(data_config: DataConfig) -> LeRobotDataset:
    """The recipe's dataset without its cameras."""
    metadata = data_loader.open_metadata(data_config)
    used = data_loader.features_read(data_config, metadata)
    columns = [
        key
        for key, feature in metadata.features.items()
        if is_tabular(feature) and (used is None or key in used or key in data_config.action_sequence_keys)
    ]
    return LeRobotDataset(metadata.root, columns=[*columns, *data_config.action_sequence_keys], metadata=metadata)


def _chain(data_config: DataConfig, dataset: LeRobotDataset) -> Sequence[Callable[[Sample], Sample]]:
    """The loader's transforms up to normalisation."""
    chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
    end = next(i for i, transform in enumerate(chain) if isinstance(transform, transforms.Normalize))
    return chain[:end]


def _black_images(dataset: LeRobotDataset, data_config: DataConfig) -> dict[str, np.ndarray]:
    """uint8 [h, w, 3] per camera that the recipe reads, as the reader would deliver it."""
    used = data_loader.features_read(data_config, dataset.metadata)
    images = {}
    for key in dataset.metadata.camera_keys:
        if used is None or key in used:
            shape = tuple(dataset.metadata.features[key]["shape"])
            images[key] = np.zeros(shape if shape[-1] == 3 else (*shape[1:], shape[0]), np.uint8)
    return images


def _labels(data_config: DataConfig, key: str, width: int) -> tuple[str, ...]:
    """Names of the dimensions of `state` or `actions`, where the robot's transforms say them; else numbers."""
    spec = find_spec(data_config.data_transforms.inputs)
    names = () if spec is None else {"state": spec.state_names, "actions": spec.actions.names}[key]
    return names if len(names) == width else tuple(str(i) for i in range(width))


def camera_channel_means(dataset: LeRobotDataset, n: int = 32) -> dict[str, np.ndarray]:
    """Mean of each colour channel per camera, float64[3] in RGB order and [0, 255]; decodes `n` frames spread evenly.

    A robot that sends BGR, or another camera under the same name, differs from it.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, n).round().astype(int))
    means: dict[str, list[np.ndarray]] = {key: [] for key in dataset.metadata.camera_keys if key in dataset.keys}
    for row in rows:
        sample = dataset[int(row)]
        for key, found in means.items():
            found.append(sample[key].reshape(-1, 3).mean(axis=0))
    return {key: np.mean(found, axis=0) for key, found in means.items()}
