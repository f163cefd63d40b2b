"""Positronic: teleoperated or simulated Franka arms, 15 Hz, absolute poses; datasets come from its own converter."""

from openpi import transforms
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.policies.positronic_policy import PositronicInputs, PositronicOutputs
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, SimpleDataConfig, repack
from openpi.training.recipes.released import weights


def positronic_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """The codec's values as they are: absolute, not relative to the state."""
    return transforms.Group(
        inputs=(PositronicInputs(model_type=model_config.model_type),), outputs=(PositronicOutputs(),)
    )


_KEYS = {
    "observation/image": "observation.images.side",
    "observation/wrist_image": "observation.images.left",
    "observation/state": "observation.state",
    "actions": "action",
    "prompt": "prompt",
}
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
        data=SimpleDataConfig(
            repo_id="lerobot",
            base_config=DataConfig(
                repack_transforms=repack(_KEYS), prompt_from_task=True, action_sequence_keys=("action",)
            ),
            data_transforms=positronic_transforms,
        ),
        weight_loader=weights("pi05_base"),
        freeze_filter=_PI05_LORA.get_freeze_filter(),
        ema_decay=None,
        num_train_steps=30_000,
    ),
]
