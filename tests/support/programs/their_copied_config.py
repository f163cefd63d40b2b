"""A whole `config.py` of one's own: every class in it is the program's, as in a fork of the published system."""

import abc
import dataclasses
import os
import pathlib

import tyro
from typing_extensions import override

import openpi.models.model as _model
import openpi.models.tokenizer as _tokenizer
import openpi.shared.download as _download
import openpi.shared.normalize as _normalize
import openpi.training.optimizer as _optimizer
import openpi.training.weight_loaders as weight_loaders
import openpi.transforms as _transforms
import their_policy
import tiny_recipe


@dataclasses.dataclass(frozen=True)
class AssetsConfig:
    assets_dir: str | None = None
    asset_id: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    repo_id: str | None = None
    asset_id: str | None = None
    norm_stats: dict[str, _transforms.NormStats] | None = None
    repack_transforms: _transforms.Group = dataclasses.field(default_factory=_transforms.Group)
    data_transforms: _transforms.Group = dataclasses.field(default_factory=_transforms.Group)
    model_transforms: _transforms.Group = dataclasses.field(default_factory=_transforms.Group)
    use_quantile_norm: bool = False
    action_sequence_keys: tuple[str, ...] = ("actions",)
    prompt_from_task: bool = False
    rlds_data_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfigFactory(abc.ABC):
    repo_id: str = tyro.MISSING
    assets: AssetsConfig = dataclasses.field(default_factory=AssetsConfig)

    @abc.abstractmethod
    def create(self, assets_dirs: pathlib.Path, model_config: _model.BaseModelConfig) -> DataConfig: ...


@dataclasses.dataclass(frozen=True)
class ArmDataConfig(DataConfigFactory):
    @override
    def create(self, assets_dirs: pathlib.Path, model_config: _model.BaseModelConfig) -> DataConfig:
        asset_id = self.assets.asset_id or self.repo_id
        folder = _download.maybe_download(str(pathlib.Path(self.assets.assets_dir or assets_dirs) / asset_id))
        tokenizer = _tokenizer.PaligemmaTokenizer(model_config.max_token_len, model_config.tokenizer_path)
        repack = {"arm/camera": "front", "arm/joints": "joints", "actions": "actions", "prompt": "prompt"}
        return DataConfig(
            repo_id=self.repo_id,
            asset_id=asset_id,
            norm_stats=_normalize.load(folder),
            repack_transforms=_transforms.Group(inputs=[_transforms.RepackTransform(repack)]),
            data_transforms=_transforms.Group(inputs=[their_policy.ArmInputs()], outputs=[their_policy.ArmOutputs()]),
            model_transforms=_transforms.Group(
                inputs=[
                    _transforms.ResizeImages(*model_config.image_resolution),
                    _transforms.TokenizePrompt(tokenizer),
                    _transforms.PadStatesAndActions(model_config.action_dim),
                ]
            ),
            prompt_from_task=True,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    name: tyro.conf.Suppress[str]
    project_name: str = "theirs"
    exp_name: str = tyro.MISSING
    model: _model.BaseModelConfig = tiny_recipe.MODEL
    weight_loader: weight_loaders.WeightLoader = dataclasses.field(default_factory=weight_loaders.NoOpWeightLoader)
    lr_schedule: _optimizer.LRScheduleConfig = dataclasses.field(default_factory=_optimizer.CosineDecaySchedule)
    optimizer: _optimizer.OptimizerConfig = dataclasses.field(default_factory=_optimizer.AdamW)
    ema_decay: float | None = None
    data: DataConfigFactory = dataclasses.field(default_factory=ArmDataConfig)
    assets_base_dir: str = "./assets"
    checkpoint_base_dir: str = "./checkpoints"
    seed: int = 42
    batch_size: int = 4
    num_workers: int = 0
    num_train_steps: int = 1
    log_interval: int = 100
    save_interval: int = 1000
    keep_period: int | None = 5000
    overwrite: bool = False
    resume: bool = False
    wandb_enabled: bool = False
    fsdp_devices: int = 1

    @property
    def assets_dirs(self) -> pathlib.Path:
        return (pathlib.Path(self.assets_base_dir) / self.name).resolve()


arm = TrainConfig(
    name="pi0_arm",
    exp_name="copied",
    model=dataclasses.replace(tiny_recipe.MODEL, pytorch_compile_mode=None),
    data=ArmDataConfig(repo_id=os.environ.get("THEIR_DATASET", "lab/arm"), assets=AssetsConfig(asset_id="arm")),
)
