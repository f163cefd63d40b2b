"""Recipes in a file of one's own, as users write one: the imports of the published `training/config.py`, a factory in
its manner, and a list of recipes with a `get_config`.
"""

# ruff: noqa: F401, I001 - the head is that of the published file, whether or not all of it is used here
import abc
from collections.abc import Sequence
import dataclasses
import difflib
import logging
import os
import pathlib
from typing import Any, Literal, Protocol, TypeAlias

import etils.epath as epath
from typing_extensions import override
import tyro

import openpi.models.model as _model
import openpi.models.pi0_config as pi0_config
import openpi.models.pi0_fast as pi0_fast
import openpi.models.tokenizer as _tokenizer
import openpi.policies.aloha_policy as aloha_policy
import openpi.policies.droid_policy as droid_policy
import openpi.policies.libero_policy as libero_policy
import openpi.shared.download as _download
import openpi.shared.normalize as _normalize
import openpi.training.droid_rlds_dataset as droid_rlds_dataset
import openpi.training.misc.polaris_config as polaris_config
import openpi.training.misc.roboarena_config as roboarena_config
import openpi.training.optimizer as _optimizer
import openpi.training.weight_loaders as weight_loaders
import openpi.transforms as _transforms
from openpi.training.config import AssetsConfig, DataConfig, DataConfigFactory, ModelTransformFactory, TrainConfig

import their_policy
import tiny_recipe

ModelType: TypeAlias = _model.ModelType


@dataclasses.dataclass(frozen=True)
class LeRobotArmDataConfig(DataConfigFactory):
    use_delta_joint_actions: bool = True
    default_prompt: str | None = None
    repack_transforms: tyro.conf.Suppress[_transforms.Group] = dataclasses.field(
        default=_transforms.Group(
            inputs=[
                _transforms.RepackTransform(
                    {"arm/camera": "front", "arm/joints": "joints", "actions": "actions", "prompt": "prompt"}
                )
            ]
        )
    )
    action_sequence_keys: Sequence[str] = ("actions",)

    @override
    def create(self, assets_dirs: pathlib.Path, model_config: _model.BaseModelConfig) -> DataConfig:
        data_transforms = _transforms.Group(
            inputs=[their_policy.ArmInputs(model_type=model_config.model_type)],
            outputs=[their_policy.ArmOutputs()],
        )
        if self.use_delta_joint_actions:
            mask = _transforms.make_bool_mask(2, -1)
            data_transforms = data_transforms.push(
                inputs=[_transforms.DeltaActions(mask)], outputs=[_transforms.AbsoluteActions(mask)]
            )
        model_transforms = ModelTransformFactory(default_prompt=self.default_prompt)(model_config)
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=self.repack_transforms,
            data_transforms=data_transforms,
            model_transforms=model_transforms,
            action_sequence_keys=self.action_sequence_keys,
        )


_CONFIGS = [
    TrainConfig(
        name="pi0_arm",
        model=dataclasses.replace(tiny_recipe.MODEL, pytorch_compile_mode=None),
        data=LeRobotArmDataConfig(
            repo_id=os.environ.get("THEIR_DATASET", "lab/arm"),
            assets=AssetsConfig(asset_id="arm"),
            base_config=DataConfig(prompt_from_task=True),
            default_prompt="move",
        ),
        weight_loader=weight_loaders.CheckpointWeightLoader(os.environ.get("THEIR_BASE", "gs://lab/base") + "/params"),
        lr_schedule=_optimizer.CosineDecaySchedule(warmup_steps=1, peak_lr=1e-3, decay_steps=10, decay_lr=1e-4),
        optimizer=_optimizer.AdamW(clip_gradient_norm=1.0),
        ema_decay=None,
        batch_size=4,
        num_workers=0,
        num_train_steps=2,
    ),
    *roboarena_config.get_roboarena_configs(),
    *polaris_config.get_polaris_configs(),
]
_CONFIGS_DICT = {config.name: config for config in _CONFIGS}


def get_config(config_name: str) -> TrainConfig:
    if config_name not in _CONFIGS_DICT:
        closest = difflib.get_close_matches(config_name, _CONFIGS_DICT.keys(), n=1, cutoff=0.0)
        raise ValueError(f"Config '{config_name}' not found. Did you mean {closest}?")
    return _CONFIGS_DICT[config_name]
