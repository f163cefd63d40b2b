"""Everything openpi has to know about one robot: its keys, its conventions, and two recipes.

`my_robot.py:tiny` trains from nothing within minutes on a CPU, to try the pipeline out. `my_robot.py:recipe`
fine-tunes pi0.5 with adapters (LoRA), for real.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from openpi import transforms
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.policies.images import to_uint8_hwc
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.training.config import AssetsConfig, DataConfig, SimpleDataConfig, TrainConfig
from openpi.training.optimizer import CosineDecaySchedule
from openpi.training.recipes.tabletop import TINY_PI05
from openpi.training.weight_loaders import CheckpointWeightLoader

CAMERA, STATE = "observation/front", "observation/state"
JOINTS = ("base", "shoulder", "elbow", "gripper")
UNITS = ("rad", "rad", "rad", "0 open .. 1 closed")

SPEC = RobotSpec(
    robot="four_joint_arm",
    cameras=(CameraSpec(CAMERA, slot="base_0_rgb"),),
    state=(VectorSpec(STATE, JOINTS, UNITS),),
    actions=VectorSpec("actions", JOINTS, UNITS),
    action_kind="absolute joint targets",
    follows_state=(True,) * len(JOINTS),  # an action equal to the state keeps the arm where it is
)


@dataclasses.dataclass(frozen=True)
class ArmInputs:
    """What the robot sends, or a frame of the dataset under the same keys, to what the model takes."""

    spec: ClassVar[RobotSpec] = SPEC  # names and units: checked when serving, shown by `openpi explain`

    def __call__(self, data: dict) -> dict:
        leaves = transforms.flatten_dict(data)
        image = to_uint8_hwc(leaves[CAMERA], CAMERA)
        empty = np.zeros_like(image)
        return {
            "state": np.asarray(leaves[STATE]),
            "image": {"base_0_rgb": image, "left_wrist_0_rgb": empty, "right_wrist_0_rgb": empty},
            # False: the model does not look at this camera, because the robot has none there.
            "image_mask": {"base_0_rgb": np.True_, "left_wrist_0_rgb": np.False_, "right_wrist_0_rgb": np.False_},
        } | {key: leaves[key] for key in ("actions", "prompt") if key in leaves}


@dataclasses.dataclass(frozen=True)
class ArmOutputs:
    """The model's padded actions to the robot's four joints."""

    def __call__(self, data: dict) -> dict:
        return {"actions": np.asarray(data["actions"])[..., : len(JOINTS)]}


def arm_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """Joints are trained relative to the state, the gripper absolute; the policy returns absolute targets again."""
    group = transforms.Group(inputs=(ArmInputs(),), outputs=(ArmOutputs(),))
    relative = transforms.make_bool_mask(3, -1)
    return group.push(inputs=(transforms.DeltaActions(relative),), outputs=(transforms.AbsoluteActions(relative),))


DATA = SimpleDataConfig(
    repo_id="my_dataset",  # a folder, or user/name on the Hugging Face hub
    assets=AssetsConfig(asset_id="four_joint_arm"),
    base_config=DataConfig(
        # client key <- dataset feature; training only
        repack_transforms=transforms.Group(
            inputs=(
                transforms.RepackTransform({CAMERA: "front", STATE: "state", "actions": "actions", "prompt": "prompt"}),
            )
        ),
        prompt_from_task=True,
    ),
    data_transforms=arm_transforms,
)

tiny = TrainConfig(
    name="my_robot_tiny",
    model=dataclasses.replace(
        TINY_PI05,
        image_keys=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
        max_token_len=40,
        action_horizon=10,
    ),
    data=DATA,
    lr_schedule=CosineDecaySchedule(warmup_steps=20, peak_lr=1e-3, decay_steps=400, decay_lr=1e-5),
    batch_size=16,
    num_workers=0,
    num_train_steps=400,
    log_interval=20,
    save_interval=200,
    holdout_episodes=1,
    eval_batches=2,
)

_LORA = Pi0Config(
    pi05=True, action_horizon=16, paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora"
)

recipe = TrainConfig(
    name="my_robot",
    model=_LORA,
    data=DATA,
    weight_loader=CheckpointWeightLoader("gs://openpi-assets/checkpoints/pi05_base/params"),
    freeze_filter=_LORA.get_freeze_filter(),
    ema_decay=None,  # an average would keep a second copy of all frozen weights
    num_train_steps=20_000,
)
