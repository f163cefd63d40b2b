"""LIBERO: a simulated Franka with four task suites, 10 Hz, 7 relative actions."""

import dataclasses
from typing import Any

from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, LeRobotLiberoDataConfig
from openpi.training.optimizer import AdamW, CosineDecaySchedule
from openpi.training.recipes.released import weights
from openpi.training.recipes.tabletop import FROM_NOTHING, TINY_PI0

_PI0_LORA = Pi0Config(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")
_PI05_LORA = Pi0Config(
    pi05=True,
    action_horizon=10,
    discrete_state_input=False,
    paligemma_variant="gemma_2b_lora",
    action_expert_variant="gemma_300m_lora",
)
_FAST = Pi0FASTConfig(action_dim=7, action_horizon=10, max_token_len=180)
_FAST_LORA = Pi0FASTConfig(action_dim=7, action_horizon=10, max_token_len=180, paligemma_variant="gemma_2b_lora")

# 1.4 M parameters. pi0, so that the state goes in as numbers.
_TINY = dataclasses.replace(
    TINY_PI0,
    image_resolution=(96, 96),
    action_dim=8,
    action_horizon=16,
    max_token_len=48,
)


def _data(*, extra_delta: bool) -> LeRobotLiberoDataConfig:
    """Task texts are the prompts. `extra_delta` is what the pi0 checkpoints were trained with."""
    return LeRobotLiberoDataConfig(
        repo_id="physical-intelligence/libero",
        base_config=DataConfig(prompt_from_task=True),
        extra_delta_transform=extra_delta,
    )


# What all weights of pi0.5 are trained with on one small card.
_SMALL_CARD: dict[str, Any] = {
    "model": Pi0Config(pi05=True, action_horizon=10, discrete_state_input=False),
    "data": _data(extra_delta=False),
    "lr_schedule": CosineDecaySchedule(warmup_steps=1_000, peak_lr=1e-5, decay_steps=100_000, decay_lr=1e-6),
    "num_train_steps": 100_000,
    "optimizer": AdamW(clip_gradient_norm=float("inf"), state_bits=8),
    "weight_loader": weights("pi05_base"),
    "backend": "pytorch",
    "pytorch_free_gradients": True,
}

RECIPES = [
    TrainConfig(
        name="pi0_libero",
        note="Full fine-tuning of pi0 on the four LIBERO suites, defaults throughout. WARNING: the state is subtracted "
        "once more from actions that are relative already, because released pi0 checkpoints were trained so. For a new "
        "run that costs success (see pi0_fast_libero_no_delta_transform): add --data.no-extra-delta-transform.",
        model=Pi0Config(),
        data=_data(extra_delta=True),
        weight_loader=weights("pi0_base"),
    ),
    TrainConfig(
        name="pi0_libero_low_mem_finetune",
        note="As pi0_libero with adapters in both experts, for one 24 GB GPU. No averaging: it would keep a second "
        "copy of all weights. The example to copy for LoRA.",
        model=_PI0_LORA,
        data=_data(extra_delta=True),
        weight_loader=weights("pi0_base"),
        freeze_filter=_PI0_LORA.get_freeze_filter(),
        ema_decay=None,
    ),
    TrainConfig(
        name="pi0_fast_libero",
        note="Full fine-tuning of pi0-FAST. It takes the robot's own action width, 7; 180 tokens hold prompt, state "
        "and ten actions. WARNING: the state is subtracted once more from actions that are relative already, as in "
        "released checkpoints; a new run does better as pi0_fast_libero_no_delta_transform.",
        model=_FAST,
        data=_data(extra_delta=True),
        weight_loader=weights("pi0_fast_base"),
    ),
    TrainConfig(
        name="pi0_fast_libero_no_delta_transform",
        note="As pi0_fast_libero on the actions as they are recorded, which are relative already. Reported upstream "
        "(pull request 1048) on LIBERO-10, three seeds of 500 episodes: 75.1 % become 85.9 % with quantiles, 60.5 % "
        "become 84.7 % with mean and deviation. Statistics of pi0_fast_libero do not fit it.",
        model=_FAST,
        data=_data(extra_delta=False),
        weight_loader=weights("pi0_fast_base"),
    ),
    TrainConfig(
        name="pi0_fast_libero_low_mem_finetune",
        note="As pi0_fast_libero with adapters, for one 24 GB GPU; averaging is off to save memory.",
        model=_FAST_LORA,
        data=_data(extra_delta=True),
        weight_loader=weights("pi0_fast_base"),
        freeze_filter=_FAST_LORA.get_freeze_filter(),
        ema_decay=None,
    ),
    TrainConfig(
        name="pi05_libero",
        note="The published best on LIBERO. It never sees the state: no text bins here, and pi0.5 has no other state "
        "input. The learning rate is constant after the warm-up, and slower averaging takes the place of the decay. "
        "Batch 256 is for several large GPUs; accumulation makes it fit one.",
        model=Pi0Config(pi05=True, action_horizon=10, discrete_state_input=False),
        data=_data(extra_delta=False),
        batch_size=256,
        lr_schedule=CosineDecaySchedule(warmup_steps=10_000, peak_lr=5e-5, decay_steps=1_000_000, decay_lr=5e-5),
        optimizer=AdamW(clip_gradient_norm=1.0),
        ema_decay=0.999,
        weight_loader=weights("pi05_base"),
        pytorch_weight_path="/path/to/your/pytorch_weight_path",
    ),
    TrainConfig(
        name="pi05_libero_24gb",
        note="As pi05_libero, all weights of pi0.5 on one card of 24 GB, with PyTorch: weights in bfloat16, rounded at "
        "random, moments of eight bits, gradients freed in the backward pass, so no clipping; no averaging. By count, "
        "13.5 GB of state for 3.35 billion parameters, and the largest gradient, 1.1 GB. Not measured on a card yet; "
        "if batch 8 does not fit, take 4 and half of the learning rate.",
        **_SMALL_CARD,
        batch_size=8,
        ema_decay=None,
        pytorch_training_precision="pure_bfloat16",
    ),
    TrainConfig(
        name="pi05_libero_48gb",
        note="As pi05_libero_24gb on one card of 48 GB: weights and their average in float32, so only what the step "
        "itself needs is in eight bits. By count, 33.5 GB of state. Not measured on a card yet.",
        **_SMALL_CARD,
        batch_size=16,
        ema_decay=0.999,
    ),
    TrainConfig(
        name="pi05_libero_lora_24gb",
        note="As pi05_libero, adapters of pi0.5 on one card of 24 GB, with PyTorch: over a base in eight bits, which "
        "leaves room for batch 32. By count, 2.9 GB of base, 2.8 GB of what is trained (adapters, image encoder) "
        "with moments of eight bits, 1.9 GB of gradients. Not measured on a card yet; if it does not fit, take "
        "gradient_accumulation_steps=2, which learns the same.",
        model=_PI05_LORA,
        data=_data(extra_delta=False),
        weight_loader=weights("pi05_base"),
        freeze_filter=_PI05_LORA.get_freeze_filter(),
        optimizer=AdamW(state_bits=8),
        ema_decay=None,
        backend="pytorch",
        pytorch_frozen_bits=8,
    ),
    TrainConfig(
        name="pi0_libero_tiny",
        note="One simulated task on a CPU: 1.4 M parameters, learnt from nothing but 20 recordings of `openpi record "
        "libero` in some 15 CPU minutes. 4 of 20 unseen starts (docs/results.md has the commands). Evaluate "
        "with --image-size 96 --resolution 96 --execute-horizon 16.",
        model=_TINY,
        data=_data(extra_delta=False),
        **FROM_NOTHING,
    ),
]
