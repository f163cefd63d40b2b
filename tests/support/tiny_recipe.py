"""Recipes of the true architecture, small enough to train on a CPU within seconds; used by path, as users do."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.tree import Tree, flatten, unflatten
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, DataConfigFactory, ModelTransformFactory, repack
from openpi.training.distributed import processes
from openpi.training.freeze import PathRegex
from openpi.training.optimizer import CosineDecaySchedule
from openpi.transforms import Group, pad_to_dim

TOKENIZERS = Path(__file__).parents[1] / "golden" / "tokenizers"
TOKENIZER = TOKENIZERS / "tiny_paligemma_tokenizer.model"
NUM_JOINTS = 3

_EXPERT = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=2048)

MODEL = Pi0Config(
    dtype="float32",
    paligemma_variant=_EXPERT,
    action_expert_variant=_EXPERT,
    action_dim=4,
    action_horizon=3,
    max_token_len=8,
    image_encoder_variant=SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2),
    image_resolution=(28, 28),
    image_keys=("base_0_rgb",),
    tokenizer_path=str(TOKENIZER),
    augmentation=False,
    remat="none",
)


@dataclasses.dataclass(frozen=True)
class ArmInputs:
    """One arm, one camera, `NUM_JOINTS` joints."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {
            "image": {"base_0_rgb": data["camera"]},
            "image_mask": {"base_0_rgb": np.True_},
            "state": np.asarray(data["joints"], np.float32),
            **{key: data[key] for key in ("actions", "prompt") if key in data},
        }


@dataclasses.dataclass(frozen=True)
class ArmOutputs:
    """Without the padding."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.asarray(data["actions"])[..., :NUM_JOINTS]}


@dataclasses.dataclass(frozen=True)
class ArmData(DataConfigFactory):
    """A robot of the user's own."""

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        keys = {"camera": "front", "joints": "joints", "actions": "actions", "prompt": "prompt"}
        return dataclasses.replace(
            self.create_base_config(assets_dirs, model_config),
            repack_transforms=repack(keys),
            data_transforms=Group(inputs=(ArmInputs(),), outputs=(ArmOutputs(),)),
            model_transforms=ModelTransformFactory()(model_config),
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

# Recorded data; name it with --data.repo-id.
arm = dataclasses.replace(
    tiny, name="arm", data=ArmData(base_config=DataConfig(prompt_from_task=True)), holdout_episodes=0
)


def drawn_params(params: Tree, seed: int = 0) -> dict[str, Any]:
    """A tree like this one, of NumPy's random numbers: JAX takes seconds to compile a model's initialisation."""
    rng = np.random.default_rng(seed)
    leaves = sorted(flatten(params).items())
    return unflatten({path: 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in leaves})


@dataclasses.dataclass(frozen=True)
class DrawnWeights:
    """What every process of a run draws alike, and none has to compile."""

    def load(self, params: dict[str, Any]) -> dict[str, Any]:
        return drawn_params(params)


drawn = dataclasses.replace(arm, weight_loader=DrawnWeights())
# The image encoder and PaliGemma's expert stay as they are: half as much to compile where what learns is all the same.
expert_only = dataclasses.replace(drawn, freeze_filter=PathRegex("PaliGemma/(img|llm/(?!.*_1)).*"))

# pi0-FAST, whose tokens are an action tokenizer's.
fast = dataclasses.replace(
    arm,
    name="fast",
    model=Pi0FASTConfig(
        dtype="float32",
        paligemma_variant=_EXPERT,
        action_dim=NUM_JOINTS,
        action_horizon=3,
        max_token_len=64,
        image_encoder_variant=MODEL.image_encoder_variant,
        image_resolution=MODEL.image_resolution,
        image_keys=MODEL.image_keys,
        tokenizer_path=str(TOKENIZER),
        action_tokenizer_path=str(TOKENIZERS / "fast"),
        augmentation=False,
        remat="none",
    ),
)


def _vectors(state: int, actions: int) -> RobotSpec:
    return RobotSpec(
        robot=f"arm_of_{state}_and_{actions}",
        cameras=(CameraSpec("camera", slot="base_0_rgb"),),
        state=(VectorSpec.uniform("joints", [f"joint_{i}" for i in range(state)], "rad"),),
        actions=VectorSpec.uniform("actions", [f"joint_{i}" for i in range(actions)], "rad"),
    )


@dataclasses.dataclass(frozen=True)
class InputsOfWiderState(ArmInputs):
    spec: ClassVar[RobotSpec] = _vectors(4, 3)


@dataclasses.dataclass(frozen=True)
class InputsOfFewerActions(ArmInputs):
    spec: ClassVar[RobotSpec] = _vectors(3, 2)


@dataclasses.dataclass(frozen=True)
class InputsAsRecorded(ArmInputs):
    spec: ClassVar[RobotSpec] = _vectors(3, 3)


@dataclasses.dataclass(frozen=True)
class OutputsOfPadding(ArmOutputs):
    """The robot would get the model's padding as a fourth joint."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.asarray(data["actions"])[..., : NUM_JOINTS + 1]}


@dataclasses.dataclass(frozen=True)
class InputsThatPad(ArmInputs):
    """As published for robots of one's own before pi0.5: the padding is made here."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        made = super().__call__(data)
        return made | {key: pad_to_dim(made[key], MODEL.action_dim) for key in ("state", "actions") if key in made}


@dataclasses.dataclass(frozen=True)
class InputsThatTurn(ArmInputs):
    """As published for two arms: images have their channels first, and are not looked at."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return super().__call__(data) | {"image": {"base_0_rgb": np.asarray(data["camera"]).transpose(1, 2, 0)}}


_calls = itertools.count()


@dataclasses.dataclass(frozen=True)
class InputsThatEnd(ArmInputs):
    """The second of several processes cannot read a sample any more, after a while."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        if processes.index() == 1 and next(_calls) > 30:
            raise OSError("the disk is gone")
        return super().__call__(data)


@dataclasses.dataclass(frozen=True)
class OutputsOfFewer(ArmOutputs):
    """Written for a robot with a joint less."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.asarray(data["actions"])[..., : NUM_JOINTS - 1]}


@dataclasses.dataclass(frozen=True)
class OtherArmData(ArmData):
    """The same dataset, read for another robot."""

    inputs: ArmInputs = InputsAsRecorded()
    outputs: ArmOutputs = ArmOutputs()

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        group = Group(inputs=(self.inputs,), outputs=(self.outputs,))
        return dataclasses.replace(super().create(assets_dirs, model_config), data_transforms=group)


_PROMPTS = DataConfig(prompt_from_task=True)
as_recorded = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS))
wider_state = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, inputs=InputsOfWiderState()))
fewer_actions = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, inputs=InputsOfFewerActions()))
padding_returned = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, outputs=OutputsOfPadding()))
padded_inputs = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, inputs=InputsThatPad()))
turning_inputs = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, inputs=InputsThatTurn()))
data_end = dataclasses.replace(arm, data=OtherArmData(base_config=_PROMPTS, inputs=InputsThatEnd()), save_interval=0)
dimension_lost = dataclasses.replace(
    arm, data=OtherArmData(base_config=_PROMPTS, inputs=ArmInputs(), outputs=OutputsOfFewer())
)

# Adapters on a frozen transformer.
_ADAPTED = dataclasses.replace(_EXPERT, attn_lora=LoRAConfig(rank=2, alpha=2.0), ffn_lora=LoRAConfig(rank=2, alpha=2.0))
_LORA = dataclasses.replace(MODEL, paligemma_variant=_ADAPTED, action_expert_variant=_ADAPTED)
lora = dataclasses.replace(
    arm, name="lora", model=_LORA, freeze_filter=_LORA.get_freeze_filter(), ema_decay=None, num_train_steps=4
)


def everything_but_the_head(path: str) -> bool:
    return not path.startswith("action_out_proj")


def everything_but_adapters(path: str) -> bool:
    return "lora" not in path
