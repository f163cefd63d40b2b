"""DROID: a Franka arm with a parallel gripper, an exterior and a wrist camera.

Source: the training specification, section 4.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from openpi.models.model_config import IMAGE_KEYS, ModelType
from openpi.models.pi0_fast_config import FAST_IMAGE_KEYS
from openpi.policies.robot_inputs import PaddedLater, robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec, random_observation

_EXTERIOR, _WRIST = "observation/exterior_image_1_left", "observation/wrist_image_left"
_JOINTS, _GRIPPER = "observation/joint_position", "observation/gripper_position"
_JOINT_NAMES = tuple(f"joint_{i}" for i in range(1, 8))
_GRIPPER_UNIT = "0 open .. 1 closed"
_ACTION_DIM = 8

DROID_SPEC = RobotSpec(
    robot="droid",
    cameras=(
        CameraSpec(_EXTERIOR, slot="base_0_rgb"),
        CameraSpec(_WRIST, slot="left_wrist_0_rgb"),
        CameraSpec("observation/exterior_image_2_left", slot=None, required=False),
    ),
    state=(
        VectorSpec.uniform(_JOINTS, _JOINT_NAMES, "rad"),
        VectorSpec.uniform(_GRIPPER, ("gripper",), _GRIPPER_UNIT),
    ),
    actions=VectorSpec("actions", (*_JOINT_NAMES, "gripper"), (*("rad, or share of full speed",) * 7, _GRIPPER_UNIT)),
    action_kind="joint velocities (released checkpoints) or absolute joint positions, and absolute gripper",
)


def make_droid_example() -> dict:
    """A random observation, as a robot client sends it."""
    return random_observation(DROID_SPEC)


@dataclass(frozen=True)
class DroidInputs(PaddedLater):
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` pass through.

    Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h, w]; joint positions float[7]; gripper position
    float[1] or scalar; `prompt` as text or UTF-8 bytes.

    Attributes:
        model_type: decides the image slots.
    """

    model_type: ModelType

    @property
    def spec(self) -> RobotSpec:
        if self.model_type is not ModelType.PI0_FAST:
            return DROID_SPEC
        exterior, wrist, *others = DROID_SPEC.cameras
        return dataclasses.replace(
            DROID_SPEC, cameras=(exterior, dataclasses.replace(wrist, slot="wrist_0_rgb"), *others)
        )

    def __call__(self, data: dict) -> dict:
        slots = FAST_IMAGE_KEYS if self.model_type is ModelType.PI0_FAST else IMAGE_KEYS
        inputs = robot_inputs(data, self.spec, self.model_type, slots=slots, wanted_by="DroidInputs")
        return inputs | {"prompt": _as_text(inputs["prompt"])} if "prompt" in inputs else inputs


@dataclass(frozen=True)
class DroidOutputs:
    """Cuts the model's padded actions to [..., 8]: seven joints and the gripper."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)


def _as_text(prompt: object) -> object:
    """RLDS delivers prompts as bytes."""
    value = prompt.item() if isinstance(prompt, (np.ndarray, np.generic)) else prompt
    return value.decode("utf-8") if isinstance(value, bytes) else prompt
