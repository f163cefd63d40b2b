"""What `openpi convert-checkpoint` knows before it writes a LeRobot folder: whether LeRobot would do the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.shared.normalize import NormStats
    from openpi.training.config import TrainConfig
    from openpi.weights.lerobot_writer import LeRobotRobot

logger = logging.getLogger("openpi")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A folder that LeRobot can use: the robot, the names of the model's sizes, and the statistics if LeRobot shall run
    it as it is.
    """

    robot: LeRobotRobot
    variants: dict[str, str]
    norm_stats: Mapping[str, NormStats] | None

    def write(self, folder: Path, model: Any, *, dtype: str) -> None:
        """Everything but the weights."""
        from openpi.weights import lerobot_writer

        lerobot_writer.write(folder, model, self.robot, self.norm_stats, variants=self.variants, dtype=dtype)


def plan(
    recipe: TrainConfig, checkpoint: Checkpoint, norm_stats: Mapping[str, NormStats] | None, *, any_model: bool
) -> Plan:
    """How a checkpoint is written for LeRobot.

    Args:
        recipe: without adapters.
        norm_stats: None = weights alone, which LeRobot can only be trained from.
        any_model: leave it to the user that his LeRobot builds this model and has its tokenizers.
    Raises:
        ValueError: LeRobot would send other actions or build another model; everything is named.
    """
    from openpi.policies import lerobot_model, lerobot_robot, policy_config
    from openpi.policies.contract import Contract

    data_config = policy_config.data_config_of(recipe, checkpoint)
    described = lerobot_robot.describe(data_config, recipe.model, checkpoint.read(Contract.find))
    losses = () if norm_stats is None else described.losses
    obstacles = () if any_model else tuple(lerobot_model.obstacles(recipe.model))
    if losses or obstacles:
        raise ValueError(_refusal(losses, obstacles))
    if norm_stats is not None:
        for note in described.notes:
            logger.warning("%s", note)
        _check_stats(norm_stats, described.robot)
    robot = described.robot or lerobot_robot.bare_robot(data_config, recipe.model)
    return Plan(robot, lerobot_model.variants(recipe.model), norm_stats)


def _check_stats(norm_stats: Mapping[str, NormStats], robot: LeRobotRobot | None) -> None:
    assert robot is not None  # what cannot be tried was refused
    for key, width in (("state", robot.state_width), ("actions", len(robot.action_names))):
        found = norm_stats[key].width if key in norm_stats else 0
        if found < width:
            raise ValueError(
                f"the statistics of '{key}' have {found} dimensions, and the robot {width}; compute them for "
                "this recipe with `openpi stats`"
            )


def _refusal(losses: tuple[str, ...], obstacles: tuple[str, ...]) -> str:
    lines = []
    if losses:
        lines += ["LeRobot has no place for what this recipe does, and would send its robot other actions:", *losses]
        lines += ["Serve the checkpoint with `openpi serve`, or take its weights alone with --weights-only."]
    if obstacles:
        lines += ["LeRobot 0.6.1 cannot build this model:", *obstacles]
        lines += ["For a LeRobot of your own, which can, there is --any-model."]
    return "\n".join(lines)
