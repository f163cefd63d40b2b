"""UR5: one arm with a parallel gripper, a scene and a wrist camera. Source: the training specification, section 4.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import PaddedLater, robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec, random_observation

_BASE, _WRIST, _JOINTS, _GRIPPER = "base_rgb", "wrist_rgb", "joints", "gripper"
_JOINT_NAMES = ("base", "shoulder", "elbow", "wrist_1", "wrist_2", "wrist_3")
_UNITS = (*("rad",) * 6, "0 open .. 1 closed")
_ACTION_DIM = 7

UR5_SPEC = RobotSpec(
    robot="ur5",
    cameras=(CameraSpec(_BASE, slot="base_0_rgb"), CameraSpec(_WRIST, slot="left_wrist_0_rgb")),
    state=(
        VectorSpec.uniform(_JOINTS, _JOINT_NAMES, "rad"),
        VectorSpec.uniform(_GRIPPER, ("gripper",), "0 open .. 1 closed"),
    ),
    actions=VectorSpec("actions", (*_JOINT_NAMES, "gripper"), _UNITS),
    action_kind="absolute joint positions, and gripper",
    follows_state=(True,) * _ACTION_DIM,
)


def make_ur5_example() -> dict:
    """A random observation, as a robot client sends it."""
    return random_observation(UR5_SPEC)


@dataclass(frozen=True)
class UR5Inputs(PaddedLater):
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` and `prompt` pass through.

    Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h, w]. The third image slot stays black.

    Attributes:
        model_type: pi0-FAST was trained with the black image visible, the others with it masked.
    """

    model_type: ModelType

    spec: ClassVar[RobotSpec] = UR5_SPEC

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type, wanted_by="UR5Inputs")


@dataclass(frozen=True)
class UR5Outputs:
    """Cuts the model's padded actions to [..., 7]: six joints and the gripper."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)
