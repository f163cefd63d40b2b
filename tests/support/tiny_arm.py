"""Recipes of one robot arm on a recorded dataset, with models of the true architecture that run within milliseconds.

Named by path, as users name theirs. Statistics are read from `./assets/tiny_arm/arm`.
"""

import dataclasses
from pathlib import Path

from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.training.config import AssetsConfig, DataConfig, LeRobotLiberoDataConfig, TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden"

_EXPERT = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=1105)

MODEL = Pi0Config(
    pi05=True,
    dtype="float32",
    paligemma_variant=_EXPERT,
    action_expert_variant=_EXPERT,
    action_dim=10,
    action_horizon=5,
    max_token_len=96,
    image_encoder_variant=SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2),
    image_resolution=(28, 28),
    remat="none",
    tokenizer_path=str(GOLDEN / "tokenizers" / "tiny_paligemma_tokenizer.model"),
)

recipe = TrainConfig(
    name="tiny_arm",
    model=MODEL,
    data=LeRobotLiberoDataConfig(
        repo_id=str(GOLDEN / "lerobot_v30" / "image"),
        assets=AssetsConfig(asset_id="arm"),
        base_config=DataConfig(prompt_from_task=True),
        extra_delta_transform=True,
    ),
    holdout_episodes=0,
)

# Episodes of the dataset have 23 to 37 frames.
long_chunks = dataclasses.replace(recipe, model=dataclasses.replace(MODEL, action_horizon=40))
short_prompts = dataclasses.replace(recipe, model=dataclasses.replace(MODEL, max_token_len=12))
narrow_model = dataclasses.replace(recipe, model=dataclasses.replace(MODEL, action_dim=6))
