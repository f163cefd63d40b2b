"""The embedded table-top: a tiny pi0.5 that a laptop trains in minutes. The base and its own
recipe are in the package of `openpi demo`.
"""

import dataclasses
from typing import Any

from openpi import transforms
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.tabletop_policy import TabletopInputs, TabletopOutputs
from openpi.training.config import TrainConfig
from openpi.training.data_config import AssetsConfig, DataConfig, SimpleDataConfig, repack, with_delta_actions
from openpi.training.optimizer import CosineDecaySchedule, Muon
from openpi.training.weight_loaders import CheckpointWeightLoader

ASSET_ID = "tabletop"
BASE = "package:openpi.demo/base"
DELTA_MASK = transforms.make_bool_mask(5, -1)  # joints move relative to the state, the gripper is absolute

CLIENT_KEYS = {
    "observation/image": "image",
    "observation/wrist_image": "wrist_image",
    "observation/state": "state",
    "actions": "actions",
    "prompt": "prompt",
}

_VOCAB_SIZE = 656  # of the base's own tokenizer, rounded up

# 1.5 M parameters. float32, because that is faster than bfloat16 on a CPU; no augmentation, because every scene is
# drawn anew; two cameras, because the robot has two.
TINY_PI05 = Pi0Config(
    dtype="float32",
    pi05=True,
    paligemma_variant=GemmaConfig(
        width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=_VOCAB_SIZE
    ),
    action_expert_variant=GemmaConfig(
        width=96, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=_VOCAB_SIZE
    ),
    image_encoder_variant=SiglipConfig(width=128, depth=3, mlp_dim=256, num_heads=4, patch_size=16),
    image_resolution=(64, 64),
    image_keys=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=6,
    action_horizon=12,
    max_token_len=28,
    tokenizer_path=f"{BASE}/assets/tokenizer.model",
    augmentation=False,
    remat="none",
)

# For worlds of others: pi0, so that the state goes in as numbers; from nothing but recordings, in minutes on a CPU.
TINY_PI0 = dataclasses.replace(TINY_PI05, pi05=False, discrete_state_input=False, loss_draws=4)
FROM_NOTHING: dict[str, Any] = {
    "lr_schedule": CosineDecaySchedule(warmup_steps=100, peak_lr=2e-3, decay_steps=1000, decay_lr=2e-5),
    "optimizer": Muon(),
    "batch_size": 16,
    "num_workers": 0,
    "num_train_steps": 1000,
    "log_interval": 25,
    "save_interval": 250,
    "keep_period": None,
}


def tabletop_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """The robot's transforms with joint targets relative to the state."""
    del model_config
    group = transforms.Group(inputs=(TabletopInputs(),), outputs=(TabletopOutputs(),))
    return with_delta_actions(group, DELTA_MASK)


_DATA = SimpleDataConfig(
    repo_id="openpi/tabletop",
    assets=AssetsConfig(asset_id=ASSET_ID),
    base_config=DataConfig(repack_transforms=repack(CLIENT_KEYS), prompt_from_task=True),
    data_transforms=tabletop_transforms,
)

RECIPES = [
    TrainConfig(
        name="tabletop_pick",
        note='What the base shipped for `openpi demo` is served with: "pick up the red block", "move to the white '
        "plate\". 1.5 M parameters, for any laptop; the base itself was made by base_recipe of the demo's package.",
        model=TINY_PI05,
        data=_DATA,
        num_workers=0,
    ),
    TrainConfig(
        name="tabletop_place",
        note='The demo: "put the red block on the white plate", which the base has never seen, learnt on a laptop from '
        "recordings of `openpi demo record`. The base's statistics, so that the states and actions it knows keep their "
        "meaning. Many small steps: at equal cost, batches of 32 with four draws reach 94 % of held-out scenes "
        "in 1000 steps, batches of 64 with two 87 %.",
        model=dataclasses.replace(TINY_PI05, loss_draws=4),
        data=dataclasses.replace(_DATA, assets=AssetsConfig(assets_dir=f"{BASE}/assets", asset_id=ASSET_ID)),
        weight_loader=CheckpointWeightLoader(f"{BASE}/params"),
        lr_schedule=CosineDecaySchedule(warmup_steps=50, peak_lr=1e-3, decay_steps=900, decay_lr=1e-5),
        optimizer=Muon(),
        ema_decay=0.99,
        batch_size=32,
        num_workers=0,
        cpu_devices=2,
        num_train_steps=900,
        log_interval=20,
        save_interval=450,
        keep_period=None,
        holdout_episodes=8,
        eval_batches=4,
    ),
]
