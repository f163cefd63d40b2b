"""Positronic: one arm with a gripper, an exterior and a wrist camera, in the keys of its codecs.

Source: the serving specification, sections 6.3 and 6.7. The state's width depends on the codec (8 or 15 values); the
spec shows the default codec's, and the contract of a checkpoint has those that it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec

_IMAGE, _WRIST, _STATE = "observation/image", "observation/wrist_image", "observation/state"
_POSE = ("x", "y", "z", "qw", "qx", "qy", "qz")  # scalar first
_POSE_UNITS = (*("m",) * 3, *("quaternion",) * 4)
_GRIP_UNIT = "0 .. 1; which end is open depends on the deployment"
_ACTION_DIM = 8

POSITRONIC_SPEC = RobotSpec(
    robot="positronic",
    cameras=(CameraSpec(_IMAGE, slot="base_0_rgb"), CameraSpec(_WRIST, slot="left_wrist_0_rgb")),
    state=(VectorSpec(_STATE, (*_POSE, "grip"), (*_POSE_UNITS, _GRIP_UNIT)),),
    actions=VectorSpec("actions", (*_POSE, "target_grip"), (*_POSE_UNITS, _GRIP_UNIT)),
    action_kind="absolute: end-effector pose or joints, as the codec says, and gripper",
)


def make_positronic_example() -> dict:
    """A random observation, as the inference server's codec makes it."""
    rng = np.random.default_rng()
    return {
        _STATE: rng.random(8).astype(np.float32),
        _IMAGE: rng.integers(256, size=(224, 224, 3), dtype=np.uint8),
        _WRIST: rng.integers(256, size=(224, 224, 3), dtype=np.uint8),
        "prompt": "do something",
    }


@dataclass(frozen=True)
class PositronicInputs:
    """Client keys, or a dataset repacked to them, to the model's inputs; a state of any width.

    Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h, w]. The third image slot stays black.

    Attributes:
        model_type: pi0-FAST was trained with the black image visible, the others with it masked.
    """

    model_type: ModelType

    spec: ClassVar[RobotSpec] = POSITRONIC_SPEC

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type, wanted_by="PositronicInputs")


@dataclass(frozen=True)
class PositronicOutputs:
    """Cuts the model's padded actions to [..., 8]: a pose or seven joints, and the gripper."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)
