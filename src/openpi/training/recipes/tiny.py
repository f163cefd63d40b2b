"""Worlds that others built, learnt on one core of a laptop: tiny pi0 models, trained from nothing."""

from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.training.config import TrainConfig
from openpi.training.data_config import LeRobotAlohaDataConfig
from openpi.training.optimizer import CosineDecaySchedule, Muon
from openpi.training.recipes.tabletop import BASE

_VOCAB_SIZE = 656  # of the table-top's tokenizer, rounded up


def _tiny_pi0(
    *, image_px: int, cameras: tuple[str, ...], action_dim: int, action_horizon: int, max_token_len: int
) -> Pi0Config:
    """pi0, not pi0.5: the state goes in as numbers. Otherwise as `tabletop.TINY_PI05`."""
    return Pi0Config(
        dtype="float32",
        paligemma_variant=GemmaConfig(
            width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=_VOCAB_SIZE
        ),
        action_expert_variant=GemmaConfig(
            width=96, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=_VOCAB_SIZE
        ),
        image_encoder_variant=SiglipConfig(width=128, depth=3, mlp_dim=256, num_heads=4, patch_size=16),
        image_resolution=(image_px, image_px),
        image_keys=cameras,
        action_dim=action_dim,
        action_horizon=action_horizon,
        max_token_len=max_token_len,
        tokenizer_path=f"{BASE}/assets/tokenizer.model",
        augmentation=False,
        remat="none",
        loss_draws=4,
    )


RECIPES = [
    TrainConfig(
        name="pi0_aloha_sim_tiny",
        note="TODO",
        model=_tiny_pi0(image_px=112, cameras=("base_0_rgb",), action_dim=14, action_horizon=50, max_token_len=16),
        data=LeRobotAlohaDataConfig(
            repo_id="openpi/aloha_transfer", default_prompt="Transfer cube", use_delta_joint_actions=False
        ),
        lr_schedule=CosineDecaySchedule(warmup_steps=100, peak_lr=2e-3, decay_steps=1200, decay_lr=2e-5),
        optimizer=Muon(),
        ema_decay=0.997,
        batch_size=16,
        num_workers=0,
        num_train_steps=1200,
        log_interval=50,
        save_interval=400,
        keep_period=None,
        holdout_episodes=4,
        eval_batches=4,
    ),
]
