"""What the loop reads: a recipe's data with their statistics, looked at, as batches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.data.batch_loader import SourceLoader
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.contract import Contract
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import first_look, holdout, recipe_data, seen, stats_in_use
from openpi.training.data.contract_of_data import action_names
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data_config import DataConfig
from openpi.training.distributed import processes

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What the loop reads.

    Attributes:
        config: with statistics.
        train: endless batches of the training episodes, resumable.
        holdout: batches of the episodes kept out; None when there are none.
        contract: what a policy trained on this data expects and gives; None for random data, and as of `contract_of`.
        action_names: of the robot's action dimensions; empty when unknown.
        content: a digest of the recorded numbers, see `LeRobotDataset.content`; '' of a stream.
        held: of each dataset how many episodes it has, and the numbers of those kept out.
    """

    config: DataConfig
    train: Any
    holdout: Any | None
    contract: Contract | None
    action_names: tuple[str, ...] = ()
    content: str = ""
    held: tuple[tuple[int, list[int]], ...] = ()


def prepare(
    config: TrainConfig, data: RecipeData, *, num_devices: int, checkpoint: Checkpoint | None = None
) -> TrainingData:
    """Computes the statistics if there are none, and runs samples through everything.

    Called by all processes of a run; the first computes the statistics.

    Args:
        data: of the recipe.
        num_devices: of all processes together; every batch is a multiple of it.
        checkpoint: that the run continues from, and whose statistics it goes on with.
    Raises:
        ValueError, KeyError: the dataset does not fit the recipe; or it, or its statistics, are not the same in all
            processes.
    """
    data = stats_in_use.read(config, data, checkpoint)
    with processes.together("preparing the data"):
        prepared = _prepared(config, data, num_devices, checkpoint)
    processes.check_same("the data differ", {**prepared.train.identity, "numbers": prepared.content})
    return prepared


def _prepared(config: TrainConfig, data: RecipeData, num_devices: int, checkpoint: Checkpoint | None) -> TrainingData:
    if config.data.repo_id == recipe_data.FAKE_REPO_ID:
        return TrainingData(data.config, _loader(config, data), holdout=None, contract=None)
    data = stats_in_use.with_usable(config, data, checkpoint)
    contract = first_look.check_samples(config, data)
    data_config, dataset = data.members[0]
    recorded = [each for each in data.datasets if isinstance(each, LeRobotDataset)]  # a stream has no episodes
    splits = [holdout.split_dataset(config, *each) for each in zip(data.config.members, recorded, strict=False)]
    if contract is not None and recorded and processes.is_first():  # only who writes it
        contract = dataclasses.replace(contract, seen=seen.look(config, data_config, recorded[0], splits[0][0]))
    return TrainingData(
        data.config,
        train=_loader(config, data),
        holdout=_open_holdout(config, data, recorded, [held for _, held in splits], num_devices),
        contract=contract,
        action_names=() if contract is None else action_names(data_config, dataset, contract),
        content=" ".join(each.content for each in recorded),
        held=tuple((len(each.metadata.episodes), held) for each, (_, held) in zip(recorded, splits, strict=True)),
    )


def _loader(config: TrainConfig, data: RecipeData, **options: Any) -> SourceLoader:
    """Of this process's rows of every batch."""
    part = (processes.index(), processes.count())
    return data_loader.create_batch_loader(config, data=data, part=part, **options)


def _open_holdout(
    config: TrainConfig,
    data: RecipeData,
    recorded: Sequence[LeRobotDataset],
    held: Sequence[list[int]],
    num_devices: int,
) -> SourceLoader | None:
    """At most one pass over the episodes held out, in batches that fit however few frames there are."""
    shares = [part.share for part in data.config.mixture] or [1.0]
    used = [
        (share, len(numbers), holdout.num_frames(dataset, numbers))
        for share, dataset, numbers in zip(shares, recorded, held, strict=False)
        if numbers
    ]
    if not used:
        return None
    total_share = sum(share for share, _, _ in used)
    # Of a mixture: until the first of its parts has been passed through.
    num_episodes = sum(episodes for _, episodes, _ in used)
    num_frames = min(int(frames * total_share / share) for share, _, frames in used)
    batch_size = min(config.batch_size, num_frames // num_devices * num_devices)
    if batch_size == 0:
        found = (
            f"{num_episodes} episodes held out give {num_frames} frames, fewer than there are devices ({num_devices})"
        )
        if not config.resume:  # what was held out once stays out of training, on whatever machine
            raise ValueError(f"the {found}; hold out more")
        logger.warning("the %s: this run is not validated any more", found)
        return None
    small = dataclasses.replace(config, batch_size=batch_size, gradient_accumulation_steps=1)
    num_batches = min(config.eval_batches, num_frames // batch_size)
    logger.info("held out for validation: %d episodes, %d frames", num_episodes, num_frames)
    return _loader(small, data, split="val", num_batches=num_batches)
