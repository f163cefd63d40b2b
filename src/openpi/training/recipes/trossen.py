"""Trossen AI kits: two WidowX AI arms in ALOHA's joint order, with their own joint conventions (no adapting to pi).

Absolute actions throughout. The pi0.5 recipes freeze both language models without giving them adapters, as
published: only the vision tower and the projections learn. `*_lora` are the same runs with adapters.
"""

import dataclasses

from openpi import transforms
from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, LeRobotAlohaDataConfig, repack
from openpi.training.freeze import All, Not, PathRegex
from openpi.training.recipes.released import assets, weights

_PI0_LORA = Pi0Config(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")
_PI05 = Pi0Config(pi05=True)
_PI05_LORA = Pi0Config(pi05=True, paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")

_LANGUAGE_MODELS_FROZEN = All(PathRegex(".*llm.*"), Not(PathRegex(".*lora.*")))

_HANDOVER = "TrossenRoboticsCommunity/bimanual-widowxai-handover-cube"
_ORGANIZE = "TrossenRoboticsCommunity/trossen_ai_stationary_organize_tools"


def _cameras(names: dict[str, str], **more: str) -> transforms.Group:
    images = {slot: f"observation.images.{name}" for slot, name in names.items()}
    return repack({"images": images, "state": "observation.state", "actions": "action", **more})


_HANDOVER_CAMERAS = {"cam_high": "top", "cam_left_wrist": "left", "cam_right_wrist": "right"}
_ORGANIZE_CAMERAS = {name: name for name in ("cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low")}


def _recipe(
    name: str,
    model: Pi0Config,
    repo_id: str,
    cameras: transforms.Group,
    *,
    steps: int,
    batch_size: int,
    save_interval: int,
    prompt: str | None = None,
    note: str,
) -> TrainConfig:
    """One run; without `prompt` the task texts of the dataset are the prompts."""
    base = "pi05_base" if model.pi05 else "pi0_base"
    return TrainConfig(
        name=name,
        note=note,
        model=model,
        data=LeRobotAlohaDataConfig(
            repo_id=repo_id,
            assets=assets(base, "trossen"),
            base_config=None if prompt else DataConfig(prompt_from_task=True),
            use_delta_joint_actions=False,
            adapt_to_pi=False,
            default_prompt=prompt,
            repack_transforms=cameras,
        ),
        weight_loader=weights(base),
        freeze_filter=_LANGUAGE_MODELS_FROZEN,
        ema_decay=None,
        num_train_steps=steps,
        batch_size=batch_size,
        save_interval=save_interval,
    )


def _with_adapters(recipe: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}_lora",
        note=f"{recipe.name} as it was probably meant: with adapters in both language models, which then learn too.",
        model=_PI05_LORA,
        freeze_filter=_PI05_LORA.get_freeze_filter(),
    )


_HANDOVER_PROMPT = "grab and handover the red cube"
_ORGANIZE_PROMPT = "Put all tools on table into the pen holder"

_PI05_RECIPES = [
    _recipe(
        "pi05_trossen_transfer_block",
        _PI05,
        _HANDOVER,
        _cameras(_HANDOVER_CAMERAS),
        prompt=_HANDOVER_PROMPT,
        steps=80_000,
        batch_size=8,
        save_interval=1000,
        note="pi0.5 on the handover of a cube, three cameras. Both language models are frozen without adapters, as "
        "published: only the vision tower and the projections learn. 80k steps of batch 8 as published.",
    ),
    _recipe(
        "pi05_trossen_organize_tools",
        _PI05,
        _ORGANIZE,
        _cameras(_ORGANIZE_CAMERAS),
        prompt=_ORGANIZE_PROMPT,
        steps=100_000,
        batch_size=8,
        save_interval=5000,
        note="pi0.5 on tidying tools, four cameras of which the low one is not used. Both language models are "
        "frozen without adapters, as published: only the vision tower and the projections learn. 100k "
        "steps of batch 8 as published.",
    ),
    _recipe(
        "pi05_trossen_multitask_training",
        _PI05,
        _ORGANIZE,
        _cameras(_ORGANIZE_CAMERAS, prompt="prompt"),
        steps=100_000,
        batch_size=2,
        save_interval=5000,
        note="As pi05_trossen_organize_tools with the task texts of the dataset as prompts, so `prompt` has to "
        "survive the repack. Both language models are frozen without adapters, as published: only the vision "
        "tower and the projections learn. Batch 2 as published.",
    ),
]

RECIPES = [
    _recipe(
        "pi0_trossen_transfer_block",
        _PI0_LORA,
        _HANDOVER,
        _cameras(_HANDOVER_CAMERAS),
        prompt=_HANDOVER_PROMPT,
        steps=20_000,
        batch_size=2,
        save_interval=1000,
        note="pi0 with adapters on the handover of a cube. Batch 2 fits a 24 GB card; the published tutorial "
        "trains with 8. Statistics `trossen` of the base, although these arms keep their own joint signs.",
    ),
    _recipe(
        "pi0_trossen_organize_tools",
        _PI0_LORA,
        _ORGANIZE,
        _cameras(_ORGANIZE_CAMERAS),
        prompt=_ORGANIZE_PROMPT,
        steps=150_000,
        batch_size=8,
        save_interval=1000,
        note="pi0 with adapters on tidying tools, four cameras of which the low one is not used. 150k steps of "
        "batch 8 as published.",
    ),
    *_PI05_RECIPES,
    *map(_with_adapters, _PI05_RECIPES),
]
