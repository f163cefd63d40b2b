"""What `openpi dataset check` would say about a recipe's dataset from its columns, said when training starts."""

from __future__ import annotations

import logging
from pathlib import Path

from openpi.data.check import videos
from openpi.data.check.findings import Severity, by_kind
from openpi.data.check.runner import check_open, takes_long
from openpi.data.check.subject import Reading
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.training.config import TrainConfig
from openpi.training.data import recipe_data
from openpi.training.data_config import DataConfig

logger = logging.getLogger(__name__)

_MAX_LINES = 20


def reading_of(config: TrainConfig) -> tuple[Path, Reading]:
    """The folder of a recipe's dataset, and what the recipe makes of it.

    Raises:
        ValueError: it names no dataset in LeRobot form, or several.
    """
    data_config = config.data.create(config.assets_dirs, config.model)
    if data_config.mixture:
        raise ValueError(
            f"recipe '{config.name}' has a mixture; check its datasets one by one: "
            f"{', '.join(str(member.repo_id) for member in data_config.members)}"
        )
    metadata_root = recipe_data.open_root(data_config)
    return metadata_root, _reading(data_config, config.model.action_horizon, _metadata_or_none(metadata_root))


def warn_of_findings(dataset: object, data_config: DataConfig, horizon: int) -> None:
    """Logs one line for each kind of finding that is an error or a warning; nothing is refused for it."""
    if not isinstance(dataset, LeRobotDataset):
        return
    if takes_long(len(dataset), len(dataset.episodes)):
        logger.info(
            "dataset: not looked at, for its %d frames in %d episodes; `openpi dataset check %s` does",
            len(dataset),
            len(dataset.episodes),
            dataset.metadata.root,
        )
        found = videos.longer(dataset)  # known since it was opened
    else:
        found = check_open(dataset, _reading(data_config, horizon, dataset.metadata))
    kinds = [kind for kind in by_kind(found) if kind.first.severity is not Severity.INFO]
    for kind in kinds[:_MAX_LINES]:
        logger.warning("dataset: %s", kind.line)
    if kinds:
        more = f"{len(kinds) - _MAX_LINES} more; " if len(kinds) > _MAX_LINES else ""
        logger.warning("%s`openpi dataset check %s --report report.html` shows them", more, dataset.metadata.root)


def _reading(data_config: DataConfig, horizon: int, metadata: LeRobotMetadata | None) -> Reading:
    columns = None if metadata is None else recipe_data.features_read(data_config, metadata)
    numbered = data_config.exclude_episodes
    excluded = numbered if metadata is None else data_config.selection.excluded(metadata)
    return Reading(
        action_keys=tuple(data_config.action_sequence_keys),
        columns=columns,
        horizon=horizon,
        excluded=frozenset(excluded),
        needs_tasks=data_config.prompt_from_task,
    )


def _metadata_or_none(root: Path) -> LeRobotMetadata | None:
    """What cannot be read is for the check to say."""
    try:
        return LeRobotMetadata.load(root, trust_totals=True)
    except (ValueError, OSError):
        return None
