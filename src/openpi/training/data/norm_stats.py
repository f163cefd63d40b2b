"""Normalisation statistics of a recipe's dataset, from its columns: no image is read.

Statistics are taken of `state` and `actions` as training sees them just before they are normalised: after repacking,
robot conventions and relative actions, over every step of every chunk, the repeated last steps of an episode
included. The datasets of a mixture count by their weights. Source: the training specification, sections 5.3 and 14.

Robot transforms are written for one sample, but most of them are arithmetic on the last axis and work as well on a
block of thousands of samples at once. We do not take that on trust: some rows of every block are computed one by one
as well, and at the first difference (or error) the whole dataset is done sample by sample.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.policy_config import stats_dims
from openpi.shared import download, normalize, stats_check, strict_json, whole_file
from openpi.shared.errors import listed
from openpi.shared.pools import IN_PROCESS, Pool
from openpi.shared.slow import told
from openpi.training.config import TrainConfig
from openpi.training.data.frame_blocks import BLOCK_FRAMES
from openpi.training.data.recipe_data import RecipeData, expanded, open_recipe
from openpi.training.data.tabular_frames import Block, Frames, frames_of
from openpi.training.data_config import DataConfig

logger = logging.getLogger(__name__)

STATS_KEYS = ("state", "actions")
_Stats = dict[str, normalize.RunningStats]
_BLOCKS_PER_JOB = 16  # what comes of a job weighs up to 4 MB a dimension
ROWS_CHECKED_PER_BLOCK = 3
_SEED = 0
_SOURCE_FILE = "dataset.json"  # beside the statistics
_FRAMES_COMPARED = 1000
_SAME = 1e-3  # of a deviation
# The datasets of a mixture are repeated by whole numbers, of which this is the smallest.
_WEIGHT_STEPS = 100
# Of the used range, before a comparison warns.
_FAR_BEYOND = 1.0
_HARDLY = 0.05


@dataclass(frozen=True)
class ComputedStats:
    """What `compute` found and where it put it.

    Attributes:
        stats: by key; widened where `messages` says so.
        path: the file written; as a rule the one that the recipe reads.
        num_frames: that were looked at.
        names: of the dimensions, by key.
        messages: one for each dimension that hardly varies.
    """

    stats: dict[str, normalize.NormStats]
    path: Path
    num_frames: int
    names: dict[str, tuple[str, ...]]
    messages: tuple[str, ...]


def compute(
    config: TrainConfig, *, max_frames: int | None = None, path: Path | None = None, pool: Pool = IN_PROCESS
) -> ComputedStats:
    """Computes the statistics of a recipe and writes them where the recipe reads them.

    Args:
        config: a `TrainConfig`.
        max_frames: look at so many frames, drawn from the whole dataset; None = all.
        path: write them to this file instead.
        pool: whose workers look at parts of a dataset; streams are read here.
    Raises:
        ValueError: the recipe has no dataset, or its statistics lie in a remote folder.
        FileNotFoundError, KeyError: the dataset is missing, or does not fit the recipe.
    """
    path = path or norm_stats_path(config)
    data = open_recipe(config, cameras=False)
    return compute_of(data, config.model.action_horizon, path, max_frames=max_frames, pool=pool)


def compute_of(
    data: RecipeData, horizon: int, path: Path, *, max_frames: int | None = None, pool: Pool = IN_PROCESS
) -> ComputedStats:
    """Computes the statistics of data that are open, and writes them to `path`.

    Args:
        horizon: steps of a chunk.
        max_frames, pool: see `compute`.
    """
    data_config = data.config
    raw, num_frames = _compute(frames_of(data, horizon), max_frames, pool)
    stats, messages, names = {}, [], {}
    for key, value in raw.items():
        names[key] = _labels(data_config, key, value.width)
        labels = [f"{key}/{label}" for label in names[key]]
        stats[key], widened = normalize.floor_degenerate(value, labels, are_commands=key == "actions")
        messages += widened
    for message in messages:
        logger.warning("normalisation statistics: %s", message)
    normalize.save(path.parent, stats)
    _write_source(path.parent, data, horizon)
    return ComputedStats(stats, path, num_frames, names, tuple(messages))


def _write_source(folder: Path, data: RecipeData, horizon: int) -> None:
    """Of what the statistics in a folder are: datasets change, and folders of others may have the same name."""
    if roots := _roots(data):
        source = {"datasets": roots, "of_some_frames": _moments(data, horizon)}
        whole_file.write_text(folder / _SOURCE_FILE, json.dumps(source, indent=2) + "\n")


def check_source(folder: Path | str, data: RecipeData, horizon: int) -> str | None:
    """Whether the statistics in a folder are still those of a recipe's numbers, by some of its frames.

    Args:
        horizon: steps of a chunk.
    Returns:
        what has changed since they were computed; None if nothing has, or if nobody wrote of what they are.
    Raises:
        ValueError: they were computed from a dataset at another place, with other numbers.
    """
    file = Path(folder) / _SOURCE_FILE
    roots = _roots(data)
    if not file.is_file() or not roots:
        return None
    source = strict_json.read(file)
    then = source.get("of_some_frames")
    difference = None if then is None else _difference(then, _moments(data, horizon))
    if difference and source.get("datasets") != roots:
        raise ValueError(
            f"the statistics in {folder} are those of {listed(source.get('datasets', ()))}, and the recipe reads "
            f"{listed(roots)}, with other numbers ({difference}). Give these statistics of their own "
            "(--data.assets.asset-id=NAME), or compute them anew (`openpi stats`), if nothing needs the old ones"
        )
    return difference


def _moments(data: RecipeData, horizon: int) -> dict[str, dict[str, list[float]]]:
    """Mean and deviation of some frames as they are normalized: other than before if numbers or transforms are."""
    found, _ = _compute(frames_of(data, horizon), _FRAMES_COMPARED, IN_PROCESS)
    return {key: {"mean": stats.mean.tolist(), "std": stats.std.tolist()} for key, stats in found.items()}


def _difference(then: Mapping[str, Mapping[str, list[float]]], now: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The first number that is another one; empty if there is none."""
    for key, moments in now.items():
        spread = np.asarray(moments["std"])
        for name, values in moments.items():
            before = then.get(key, {}).get(name, [])
            if len(before) != len(values):
                return f"{key} had {len(before)} dimensions and has {len(values)}"
            is_other = np.abs(np.subtract(before, values)) > _SAME * spread + _SAME**2
            if is_other.any():
                i = int(np.argmax(is_other))
                return f"the {name} of {key}[{i}] in some frames was {before[i]:.4g} and is {values[i]:.4g}"
    return ""


def _roots(data: RecipeData) -> list[str]:
    """Where the datasets lie; none if one is not a dataset in LeRobot form."""
    found = [each.metadata.root.resolve() for _, each in data.members if isinstance(each, LeRobotDataset)]
    return [str(root) for root in found] if len(found) == len(data.members) else []


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


def compare(config: TrainConfig, *, max_frames: int | None = None, pool: Pool = IN_PROCESS) -> list[Comparison]:
    """Where a recipe's dataset lies within statistics that come from elsewhere, such as a base's. Writes nothing.

    Raises:
        FileNotFoundError: the recipe has no statistics yet.
        ValueError, KeyError: see `compute`; or the statistics are of another width.
    """
    data_config = expanded(config)
    if data_config.norm_stats is None:
        folder = config.data.stats_dir(config.assets_dirs)
        raise FileNotFoundError(f"recipe '{config.name}' has no statistics in {folder}; compute them first")
    source, use_quantiles = str(config.data.stats_dir(config.assets_dirs)), data_config.use_quantile_norm
    stats_check.check(data_config.norm_stats, source=source, use_quantiles=use_quantiles, dims=stats_dims(data_config))
    opened = open_recipe(config, data_config, cameras=False)
    found, _ = _compute(frames_of(opened, config.model.action_horizon), max_frames, pool)
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


def norm_stats_path(config: TrainConfig) -> Path:
    """The file from which the recipe reads its statistics, and to which they are written.

    Raises:
        ValueError: it is remote, or the recipe has neither an asset id nor a dataset.
    """
    return writable_path(config, config.data.stats_dir(config.assets_dirs))


def writable_path(config: TrainConfig, folder: str | None) -> Path:
    """The file in `folder`, where a recipe reads statistics; see `norm_stats_path`."""
    if folder is None:
        raise ValueError(f"recipe '{config.name}' has no dataset and no asset id; set --data.repo-id")
    if download.is_address(folder):
        raise ValueError(
            f"recipe '{config.name}' reads its statistics from {folder}, where they cannot be written; set "
            f"--data.assets.assets-dir to a local folder to compute your own"
        )
    return Path(folder) / normalize.STATS_FILE


def own_path(config: TrainConfig) -> Path:
    """As `norm_stats_path`; of a recipe that reads remote statistics, the same in its own assets folder.

    Raises:
        ValueError: the recipe has neither an asset id nor a dataset.
    """
    folder = config.data.stats_dir(config.assets_dirs)
    if folder is None or not download.is_address(folder):
        return norm_stats_path(config)
    return Path(config.assets_dirs) / str(config.data.asset_id) / normalize.STATS_FILE


def compute_norm_stats(frames: Frames, *, max_frames: int | None = None) -> dict[str, normalize.NormStats]:
    """Statistics of `state` and `actions`, unaltered.

    Raises:
        KeyError: the transforms give no `state` or no `actions`.
    """
    return _compute([(1.0, frames)], max_frames, IN_PROCESS)[0]


def _compute(
    members: Sequence[tuple[float, Frames]], max_frames: int | None, pool: Pool
) -> tuple[dict[str, normalize.NormStats], int]:
    """The statistics, and the number of frames looked at, of datasets with their shares."""
    parts = [part for share, frames in members for part in _weighted(share, frames, max_frames, pool)]
    counts = [part["state"].count for _, part in parts]
    per_frame = [weight / max(1, n) for (weight, _), n in zip(parts, counts, strict=True)]
    total = {key: normalize.RunningStats() for key in STATS_KEYS}
    for (_, part), share in zip(parts, per_frame, strict=True):
        times = 1 if len(parts) == 1 else round(_WEIGHT_STEPS * share / min(per_frame))
        for key, running in part.items():
            _merge(total[key], key, running.repeated(times))
    return {key: running.get_statistics() for key, running in total.items()}, sum(counts)


def _weighted(share: float, frames: Frames, max_frames: int | None, pool: Pool) -> list[tuple[float, _Stats]]:
    if max_frames is not None and share < 1:
        max_frames = max(1, round(max_frames * share))
    parts = frames.parts(max_frames)
    try:
        found = [_in_parts(_together, frames, blocks, pool) for _, blocks in parts]
    except _NotVectorizableError as reason:
        logger.info("computing statistics sample by sample: %s", reason)
        found = [_in_parts(_one_by_one, frames, blocks, pool) for _, blocks in frames.parts(max_frames)]
    return [(share * weight, part) for (weight, _), part in zip(parts, found, strict=True)]


def _merge(total: normalize.RunningStats, key: str, part: normalize.RunningStats) -> None:
    if total.count and total.num_dims != part.num_dims:
        raise ValueError(
            f"'{key}' has {total.num_dims} dimensions in one dataset of the mixture and {part.num_dims} in another, so "
            "they cannot share statistics; set statistics='own' of the mixture, or bring the parts to one width by "
            "their transforms"
        )
    total.merge(part)


def _in_parts(
    look: Callable[[Frames, Iterable[Block]], _Stats], frames: Frames, blocks: Iterable[Block], pool: Pool
) -> _Stats:
    """Looks at some blocks at a time, and joins what came of them in order: so the pool does not matter."""
    if not isinstance(blocks, Sequence):
        return look(frames, blocks)
    parts = [range(begin, begin + _BLOCKS_PER_JOB) for begin in range(0, len(blocks), _BLOCKS_PER_JOB)]
    total = {key: normalize.RunningStats() for key in STATS_KEYS}
    waiting: dict[int, _Stats] = {}
    due = 0
    work = pool.each(functools.partial(_look_from, look, frames, blocks), parts)
    for part, found in told(work, f"parts of the statistics, of {_BLOCKS_PER_JOB * BLOCK_FRAMES} frames", len(parts)):
        waiting[part.start] = found
        while due in waiting:
            for key, running in waiting.pop(due).items():
                total[key].merge(running)
            due += _BLOCKS_PER_JOB
    return total


def _look_from(
    look: Callable[[Frames, Iterable[Block]], _Stats], frames: Frames, blocks: Sequence[Block], part: range
) -> _Stats:
    return look(frames, blocks[part.start : part.stop])


def _together(frames: Frames, blocks: Iterable[Block]) -> _Stats:
    running = {key: normalize.RunningStats() for key in STATS_KEYS}
    for found, _ in _evaluated(frames, blocks):
        for key in STATS_KEYS:
            _update(running[key], key, found[key])
    return running


def _one_by_one(frames: Frames, blocks: Iterable[Block]) -> _Stats:
    running = {key: normalize.RunningStats() for key in STATS_KEYS}
    for block in blocks:
        for row in range(len(block)):
            sample = frames.evaluate(block.alone(row))
            for key in STATS_KEYS:
                _update(running[key], key, sample[key])
    return running


def _update(running: normalize.RunningStats, key: str, values: np.ndarray) -> None:
    try:
        running.update(values)
    except ValueError as error:
        raise ValueError(f"'{key}' of the dataset, after the recipe's transforms: {error}") from error


def action_chunks(frames: Frames, *, max_frames: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of all frames, or of `max_frames` drawn ones, as training sees them unnormalised.

    Returns:
        float[n, h, d] chunks, and int[n], the episode that each is of.
    """
    try:
        evaluated = [each for _, blocks in frames.parts(max_frames) for each in _evaluated(frames, blocks)]
        chunks = [found["actions"] for found, _ in evaluated]
        episodes = [block.episodes for _, block in evaluated]
    except _NotVectorizableError:
        blocks = [block for _, blocks in frames.parts(max_frames) for block in blocks]
        chunks = [[frames.evaluate(block.alone(row))["actions"] for row in range(len(block))] for block in blocks]
        episodes = [block.episodes for block in blocks]
    return np.concatenate(chunks), np.concatenate(episodes)


class _NotVectorizableError(Exception):
    """A transform that needs its samples one at a time."""


def _evaluated(frames: Frames, blocks: Iterable[Block]) -> Iterator[tuple[dict[str, np.ndarray], Block]]:
    """`state` and `actions` of whole blocks, some rows of which are done again alone."""
    rng = np.random.default_rng(_SEED)
    for block in blocks:
        try:
            found = frames.evaluate(block.together())
        except Exception as error:
            # Whatever a transform throws at a shape it does not know; a genuine error comes again one by one.
            raise _NotVectorizableError(f"{type(error).__name__}: {error}") from error
        checked = {0, len(block) - 1, *rng.integers(0, len(block), ROWS_CHECKED_PER_BLOCK).tolist()}
        for row in checked:
            _check_row(frames, block, row, found)
        yield found, block


def _check_row(frames: Frames, block: Block, row: int, found: dict[str, np.ndarray]) -> None:
    for key, value in frames.evaluate(block.alone(row)).items():
        same_shape = found[key].shape == (len(block), *value.shape)
        if not same_shape or not np.allclose(found[key][row], value, rtol=1e-6, atol=1e-9, equal_nan=True):
            raise _NotVectorizableError(f"'{key}' of frame {row} of a block differs from that of the frame alone")


def _labels(data_config: DataConfig, key: str, width: int) -> tuple[str, ...]:
    """Names of the dimensions of `state` or `actions`, where the robot's transforms say them; else numbers."""
    names = tuple(stats_dims(data_config).names.get(key, ()))
    return names if len(names) == width else tuple(str(i) for i in range(width))
