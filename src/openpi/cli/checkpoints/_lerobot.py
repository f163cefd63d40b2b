"""What `openpi convert-checkpoint` knows before it writes a LeRobot folder: whether LeRobot would do the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openpi.models import gemma_config, siglip_config
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import FASTTokenizer, load_sentencepiece
from openpi.shared.errors import listed

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models.gemma_config import GemmaConfig
    from openpi.models.model_config import PaliGemmaConfig
    from openpi.shared.normalize import NormStats
    from openpi.training.config import TrainConfig
    from openpi.weights.lerobot_writer import LeRobotRobot

logger = logging.getLogger(__name__)

# Its PaliGemma projects pictures to 2048 values, whatever the language model takes: that is gemma_2b.
_SIZES = {"paligemma_variant": ("gemma_2b",), "action_expert_variant": ("gemma_2b", "gemma_300m")}
_IMAGE_ENCODER = "So400m/14"
_RESOLUTION = (224, 224)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A folder that LeRobot can use: the robot, the names of the model's sizes, and the statistics if LeRobot shall run
    it as it is.
    """

    robot: LeRobotRobot
    variants: dict[str, str]
    norm_stats: Mapping[str, NormStats] | None

    def write(self, folder: Path, model: PaliGemmaConfig, *, dtype: str) -> None:
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
    from openpi.policies import lerobot_robot, policy_config
    from openpi.policies.contract import Contract

    data_config = policy_config.data_config_of(recipe, checkpoint)
    model = cast("PaliGemmaConfig", recipe.model)
    described = lerobot_robot.describe(data_config, model, checkpoint.read(Contract.find))
    losses = () if norm_stats is None else described.losses
    found = () if any_model else tuple(obstacles(model))
    if losses or found:
        raise ValueError(_refusal(losses, found))
    if norm_stats is not None:
        for note in described.notes:
            logger.warning("%s", note)
        _check_stats(norm_stats, described.robot)
    robot = described.robot or lerobot_robot.bare_robot(data_config, model)
    return Plan(robot, variants(model), norm_stats)


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


def variants(model_config: PaliGemmaConfig) -> dict[str, str]:
    """The fields of LeRobot's config that name the sizes; those that it has no name for are left out."""
    found = {field: _name(field, size) for field, size in zip(_SIZES, model_config.experts, strict=False)}
    return {field: name for field, name in found.items() if name is not None}


def obstacles(model_config: PaliGemmaConfig) -> Iterator[str]:
    """Why LeRobot cannot build this model, or would build another one; nothing if it can."""
    for field, size in zip(_SIZES, model_config.experts, strict=False):
        if _name(field, size) is None:
            yield f"{field}={getattr(model_config, field)!r}: it builds {listed(_SIZES[field])} only"
    if model_config.image_encoder != siglip_config.get_config(_IMAGE_ENCODER):
        yield f"image_encoder_variant={model_config.image_encoder_variant!r}: it builds '{_IMAGE_ENCODER}' only"
    yield from _image_obstacles(model_config)
    yield from _prompt_obstacles(model_config)


def _image_obstacles(model_config: PaliGemmaConfig) -> Iterator[str]:
    height, width = model_config.image_resolution
    if model_config.model_type is ModelType.PI0_FAST and (height, width) != _RESOLUTION:
        yield f"image_resolution={(height, width)}: it builds pi0-FAST for {_RESOLUTION} only"
    elif height != width:
        yield f"image_resolution={(height, width)}: it takes square images only"


def _prompt_obstacles(model_config: Any) -> Iterator[str]:
    kind = model_config.model_type
    states = {ModelType.PI0: False, ModelType.PI05: True}
    if kind in states and model_config.discrete_state_input is not states[kind]:
        yield f"discrete_state_input={model_config.discrete_state_input}: its {kind.value} has {states[kind]}"
    path = model_config.tokenizer_path
    if path is not None and load_sentencepiece(path).vocab_size() != gemma_config.PALIGEMMA_VOCAB_SIZE:
        yield f"tokenizer_path={path}: it uses PaliGemma's own tokenizer, of {gemma_config.PALIGEMMA_VOCAB_SIZE} tokens"
    if kind is not ModelType.PI0_FAST:
        return
    if model_config.fast_model_tokenizer not in (None, FASTTokenizer):
        yield f"fast_model_tokenizer={model_config.fast_model_tokenizer.__name__}: it has FAST only"
    path = model_config.tokenizer_arguments().get("fast_tokenizer_path")
    if path is not None and Path(path).exists():
        yield f"action_tokenizer_path={path}: it fetches action tokenizers by their name on the hub"


def _name(field: str, size: GemmaConfig) -> str | None:
    return next((name for name in _SIZES[field] if gemma_config.get_config(name) == size), None)
