"""Positronic: teleoperated or simulated Franka arms, 15 Hz, absolute poses; datasets come from its own converter."""

import dataclasses
from pathlib import Path

from openpi import transforms
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, DataConfigFactory, ModelTransformFactory, repack
from openpi.training.recipes.released import weights
from openpi_positronic.policy import PositronicInputs, PositronicOutputs

_KEYS = {
    "observation/image": "observation.images.side",
    "observation/wrist_image": "observation.images.left",
    "observation/state": "observation.state",
    "actions": "action",
    "prompt": "prompt",
}


@dataclasses.dataclass(frozen=True)
class LeRobotPositronicDataConfig(DataConfigFactory):
    """Output of the converter, with the values of any codec as they are: absolute, not relative to the state."""

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        base = self.create_base_config(assets_dirs, model_config)
        inputs = PositronicInputs(model_config.model_type)
        if base.norm_stats and "state" in base.norm_stats:  # the codec decides the width, and the statistics know it
            inputs = dataclasses.replace(inputs, state_dim=base.norm_stats["state"].width)
        return dataclasses.replace(
            base,
            repack_transforms=repack(_KEYS),
            data_transforms=transforms.Group(inputs=(inputs,), outputs=(PositronicOutputs(),)),
            model_transforms=ModelTransformFactory()(model_config),
            action_sequence_keys=("action",),
            prompt_from_task=True,
        )


_PI05_LORA = Pi0Config(pi05=True, paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")

RECIPES = [
    TrainConfig(
        name="pi05_positronic_lowmem",
        note="Fine-tunes pi0.5 with adapters on the output of positronic-to-lerobot: an exterior (side) and a wrist "
        "(left) camera at 224x224, a state of 8 or 15 values, 8 absolute actions, task texts. openpi-stats and "
        "openpi-train call the dataset `lerobot`, whatever its folder. Actions stay absolute because poses with "
        "quaternions have no meaningful difference to a state. No averaging: it would keep a second copy of all frozen "
        "weights. 30k steps are what its guides train for.",
        model=_PI05_LORA,
        data=LeRobotPositronicDataConfig(repo_id="lerobot"),
        weight_loader=weights("pi05_base"),
        freeze_filter=_PI05_LORA.get_freeze_filter(),
        ema_decay=None,
        num_train_steps=30_000,
    ),
]
