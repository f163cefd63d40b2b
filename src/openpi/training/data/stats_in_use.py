"""The statistics that a run trains on: checked, wide enough, the same in all processes; on resume those of the run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.data.dataset import Dataset
from openpi.policies import data_half
from openpi.policies.policy_config import stats_dims
from openpi.shared import download, normalize, stats_check
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import first_look, norm_stats, recipe_data
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig
from openpi.training.distributed import processes

logger = logging.getLogger(__name__)

Stats = dict[str, normalize.NormStats]


def read(config: TrainConfig, data: RecipeData, checkpoint: Checkpoint | None = None) -> RecipeData:
    """The data of a recipe with the statistics of process 0, which computes them where there are none.

    All processes of a run call it. They are not checked yet: `with_usable`.

    Args:
        data: with the statistics that this process has found.
        checkpoint: that the run continues from; its statistics are what the weights were trained with.
    Raises:
        ValueError: a process has other statistics than process 0; its number and the first difference are named.
    """
    folders = _folders(config, data.config)
    with processes.together("reading the statistics"):
        found = [
            _of_the_run(member, where, checkpoint) for member, where in zip(data.config.members, folders, strict=True)
        ]
    has_own = found[0] is not None
    if checkpoint is None:
        with processes.together("comparing the statistics with the data"):
            _check_sources(config, data, found, folders)
    processes.on_first("computing the statistics", lambda: _compute_missing(config, data, found, folders))
    stats = [_of_first(own, where) for own, where in zip(found, folders, strict=True)]
    if not has_own and not data.config.mixture:  # transforms may depend on them, as on their width
        expanded = data_half.expanded(config.data, config.assets_dirs, config.model, stats[0])
        data = dataclasses.replace(data, config=expanded)
    return data.with_stats(stats)


def _folders(config: TrainConfig, data_config: DataConfig) -> list[str | None]:
    """Where the statistics of each dataset of a recipe are."""
    return [part.stats_dir for part in data_config.mixture] or [config.data.stats_dir(config.assets_dirs)]


def with_usable(config: TrainConfig, data: RecipeData, checkpoint: Checkpoint | None = None) -> RecipeData:
    """With the statistics to train on: checked against a sample as it is when it is normalised, and wide enough.

    Args:
        checkpoint: that the run continues from: its weights were trained with them, so nothing is widened.
    Raises:
        ValueError: they cannot be used, see `stats_check`; or a transform fails.
    """
    found = []
    for (member, dataset), folder in zip(data.members, _folders(config, data.config), strict=True):
        dims = dataclasses.replace(
            stats_dims(member), widths=_widths(member, dataset), padded_width=config.model.action_dim
        )
        found.append(_usable(member, str(checkpoint or folder), dims, may_widen=checkpoint is None))
    return data.with_stats(found)


def _widths(data_config: DataConfig, dataset: Dataset | Stream) -> dict[str, int]:
    """Of `state` and `actions` of a sample when it is normalised."""
    chain = data_loader.input_transforms(data_config, dataset, skip_norm_stats=True)
    before = tuple(itertools.takewhile(lambda step: not isinstance(step, transforms.Normalize), chain))
    where, sample = first_look.samples_of(dataset, 1)[0]
    raw = first_look.run_chain(sample, before, data_config, where=where)[2]
    return {key: np.shape(raw[key])[-1] for key in ("state", "actions") if np.ndim(raw.get(key, 0))}


def _usable(data_config: DataConfig, source: str, dims: stats_check.Dims, *, may_widen: bool) -> Stats | None:
    found, use_quantiles = data_config.norm_stats, data_config.use_quantile_norm
    if found is None:
        return None
    stats_check.check(found, source=source, use_quantiles=use_quantiles, dims=dims)
    if not may_widen:
        return found
    wide, messages = stats_check.widened(found, use_quantiles=use_quantiles, dims=dims)
    for message in messages:
        logger.warning("normalisation statistics of %s: %s", source, message)
    return wide


def _compute_missing(
    config: TrainConfig, data: RecipeData, found: list[Stats | None], folders: Sequence[str | None]
) -> None:
    """Computes the statistics that nobody has, writes them where the recipe reads them, and puts them into `found`.

    Raises:
        ValueError: they would have to be written to a remote folder.
    """
    if data.config.repo_id == recipe_data.FAKE_REPO_ID:
        return
    for part, positions in _with_statistics_of_their_own(data, folders):
        if any(found[position] is not None for position in positions):
            continue
        logger.info("computing the normalisation statistics of %s, from its columns", part.config.dataset_name)
        path = norm_stats.writable_path(config, folders[positions[0]])
        computed = norm_stats.compute_of(part, config.model.action_horizon, path)
        logger.info("statistics of %d frames written to %s", computed.num_frames, computed.path)
        for position in positions:
            found[position] = computed.stats


def _check_sources(
    config: TrainConfig, data: RecipeData, found: Sequence[Stats | None], folders: Sequence[str | None]
) -> None:
    """Says which statistics are out of date.

    Raises:
        ValueError: some in the recipe's own folder were computed from another dataset of the same name.
    """
    for part, positions in _with_statistics_of_their_own(data, folders):
        folder = folders[positions[0]]
        if found[positions[0]] is not None and folder is not None and not download.is_address(folder):
            try:
                difference = norm_stats.check_source(folder, part, config.model.action_horizon)
            except ValueError as error:
                if Path(folder).resolve().is_relative_to(config.assets_dirs):
                    raise
                # Chosen from elsewhere, as a base's are, so that the weights keep the ranges that they know.
                difference = ""
                if processes.is_first():
                    logger.warning("%s. The recipe names their folder, so it trains with them", error)
            if difference and processes.is_first():
                logger.warning(
                    "the statistics in %s were computed before the data changed, or what the recipe makes of them: %s. "
                    "`openpi stats` computes them anew",
                    folder,
                    difference,
                )


def _with_statistics_of_their_own(
    data: RecipeData, folders: Sequence[str | None]
) -> Iterator[tuple[RecipeData, Sequence[int]]]:
    """The datasets whose statistics are in one folder, together; and which members they are."""
    if len(set(folders)) == 1:
        yield data, range(len(folders))
        return
    for position, (member, dataset) in enumerate(data.members):
        yield RecipeData(member, (dataset,)), [position]


def _stored(data_config: DataConfig, checkpoint: Checkpoint | None) -> Stats | None:
    """Those of a checkpoint; None where there are none."""
    if checkpoint is None or data_config.asset_id is None:
        return None
    for asset_id in (data_config.asset_id, *_only_asset(checkpoint)):
        try:
            found = checkpoint.norm_stats(asset_id, use_quantiles=data_config.use_quantile_norm)
        except FileNotFoundError:
            continue
        if asset_id != data_config.asset_id and processes.is_first():
            logger.warning(
                "%s was trained with the statistics of '%s', and the run goes on with them for the data of '%s'. For "
                "others, start a new run from its weights",
                checkpoint,
                asset_id,
                data_config.asset_id,
            )
        return found
    return None


def _only_asset(checkpoint: Checkpoint) -> list[str]:
    """Of a checkpoint with one set of statistics its id."""
    files = sorted(checkpoint.assets.rglob(normalize.STATS_FILE)) if checkpoint.assets.is_dir() else []
    return [files[0].parent.relative_to(checkpoint.assets).as_posix()] if len(files) == 1 else []


def _of_the_run(data_config: DataConfig, folder: str | None, checkpoint: Checkpoint | None) -> Stats | None:
    stored, current = _stored(data_config, checkpoint), data_config.norm_stats
    if stored is None:
        return current
    if current is not None and (difference := stats_check.first_difference(stored, current)) and processes.is_first():
        logger.warning(
            "the statistics in %s are not those that this run was trained with, in %s (%s): it goes on with its own. "
            "For the others, start a new run from its weights",
            folder,
            checkpoint,
            difference,
        )
    return stored


def _of_first(own: Stats | None, where: str | None) -> Stats | None:
    """Those of process 0, in every process; one that has a file of its own must have the same."""
    texts = processes.exchange("the statistics", None if own is None else normalize.serialize_json(own))
    with processes.together("comparing the statistics"):
        if texts[0] is None:
            return None
        first = normalize.deserialize_json(texts[0])
        for process, text in enumerate(texts):
            if text is not None and (difference := _difference(first, text)) is not None:
                raise ValueError(
                    f"process {process} has other normalisation statistics in {where} than process 0: {difference} "
                    f"(process 0, process {process}). Copy the right file to every node, or remove it everywhere but "
                    "on the node of process 0, whose statistics all get"
                )
    if own is None and not processes.is_first():
        logger.info("no statistics in %s: those of process 0 are used", where)
    return first


def _difference(first: Stats, text: str) -> str | None:
    return stats_check.first_difference(first, normalize.deserialize_json(text))
