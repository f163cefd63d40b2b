"""Recipes of the true architecture, small enough to train on a CPU within seconds; used by path, as users do."""

from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.training.config import TrainConfig
from openpi.training.optimizer import CosineDecaySchedule

_EXPERT = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=2048)

MODEL = Pi0Config(
    dtype="float32",
    paligemma_variant=_EXPERT,
    action_expert_variant=_EXPERT,
    action_dim=4,
    action_horizon=3,
    max_token_len=4,
    image_encoder_variant=SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2),
    image_resolution=(28, 28),
    image_keys=("base_0_rgb",),
    augmentation=False,
    remat="none",
)

# Random data.
tiny = TrainConfig(
    name="tiny",
    model=MODEL,
    batch_size=4,
    num_workers=0,
    num_train_steps=6,
    log_interval=1,
    save_interval=2,
    keep_period=None,
    lr_schedule=CosineDecaySchedule(warmup_steps=2, peak_lr=1e-3, decay_steps=100, decay_lr=1e-4),
)
