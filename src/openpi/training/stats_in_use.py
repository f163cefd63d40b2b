"""The statistics that a run trains on: checked, wide enough, the same in all processes; on resume those of the run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.policies.policy_config import stats_dims
from openpi.shared import normalize, stats_check
from openpi.training import data_loader, norm_stats, processes
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig

logger = logging.getLogger("openpi")

Stats = dict[str, normalize.NormStats]


def read(config: TrainConfig, checkpoint: Checkpoint | None = None) -> DataConfig:
    """The data half of a recipe with its statistics, which process 0 computes where there are none.

    All processes of a run call it and get those of process 0. They are not checked yet: `usable`.

    Args:
        checkpoint: that the run continues from; its statistics are what the weights were trained with.
    Raises:
        ValueError: a process has other statistics than process 0; its number and the first difference are named.
    """
    processes.on_first("computing the statistics", lambda: _ensure(config, checkpoint))
    with processes.together("reading the statistics"):
        data_config = config.data.create(config.assets_dirs, config.model)
        folder = config.data.stats_dir(config.assets_dirs)
        folders = [part.stats_dir for part in data_config.mixture] or [folder]
        found = [
            _of_the_run(member, where, checkpoint) for member, where in zip(data_config.members, folders, strict=True)
        ]
    return with_stats(data_config, [_of_first(own, where) for own, where in zip(found, folders, strict=True)])


def with_stats(data_config: DataConfig, stats: Sequence[Stats | None]) -> DataConfig:
    """The data half with other statistics, one for each of its members."""
    parts = [
        dataclasses.replace(part, config=dataclasses.replace(part.config, norm_stats=own))
        for part, own in zip(data_config.mixture, stats if data_config.mixture else (), strict=True)
    ]
    return dataclasses.replace(data_config, norm_stats=stats[0], mixture=tuple(parts))


def usable(
    data_config: DataConfig,
    folder: str | None,
    widths: dict[str, int],
    checkpoint: Checkpoint | None = None,
    *,
    padded_width: int,
) -> Stats | None:
    """The statistics to train on.

    Args:
        data_config: of one dataset.
        folder: where its statistics are.
        widths: of `state` and `actions`, as they are normalised.
        padded_width: that of the model.
        checkpoint: that the run continues from: its weights were trained with them, so nothing is widened.
    Raises:
        ValueError: they cannot be used; see `stats_check`.
    """
    found = data_config.norm_stats
    if found is None:
        return None
    source = str(folder if checkpoint is None else checkpoint)
    use_quantiles = data_config.use_quantile_norm
    dims = dataclasses.replace(stats_dims(data_config), widths=widths, padded_width=padded_width)
    stats_check.check(found, source=source, use_quantiles=use_quantiles, dims=dims)
    if checkpoint is not None:
        return found
    wide, messages = stats_check.widened(found, use_quantiles=use_quantiles, dims=dims)
    for message in messages:
        logger.warning("normalisation statistics of %s: %s", source, message)
    return wide


def _ensure(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Computes and writes the statistics of the dataset where the recipe reads them, unless they are there."""
    if config.data.repo_id == data_loader.FAKE_REPO_ID:
        return
    for data in config.data.with_own_statistics:
        data_config = data.create(config.assets_dirs, config.model)
        if data_config.norm_stats is not None or _stored(data_config, checkpoint) is not None:
            continue
        logger.info("computing the normalisation statistics of %s, from its columns", data_config.dataset_name)
        computed = norm_stats.compute(dataclasses.replace(config, data=data))
        logger.info("statistics of %d frames written to %s", computed.num_frames, computed.path)


def _stored(data_config: DataConfig, checkpoint: Checkpoint | None) -> Stats | None:
    """Those of a checkpoint; None where there are none."""
    if checkpoint is None or data_config.asset_id is None:
        return None
    try:
        return checkpoint.norm_stats(data_config.asset_id, use_quantiles=data_config.use_quantile_norm)
    except FileNotFoundError:
        return None


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
