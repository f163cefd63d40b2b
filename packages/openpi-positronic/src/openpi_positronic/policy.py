"""Positronic: one arm with a gripper, an exterior and a wrist camera, in the keys of its codecs.

Source: the serving specification, sections 6.3 and 6.7. What the 8 or 15 values of the state are, and the 8 of the
actions, depends on the codec: a pose (x, y, z, then a quaternion, scalar first) or joints, and the gripper. So
dimensions have numbers here, no names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec, numbered

_IMAGE, _WRIST, _STATE = "observation/image", "observation/wrist_image", "observation/state"
_STATE_DIM = 8  # of the default codec
_ACTION_DIM = 8
_UNIT = "as the codec says"


def positronic_spec(state_dim: int) -> RobotSpec:
    """The client keys, with a state of some codec."""
    return RobotSpec(
        robot="positronic",
        cameras=(CameraSpec(_IMAGE, slot="base_0_rgb"), CameraSpec(_WRIST, slot="left_wrist_0_rgb")),
        state=(VectorSpec.uniform(_STATE, numbered(_STATE, state_dim), _UNIT),),
        actions=VectorSpec.uniform("actions", numbered("actions", _ACTION_DIM), _UNIT),
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
    """Client keys, or a dataset repacked to them, to the model's inputs.

    Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h, w]. The third image slot stays black.

    Attributes:
        model_type: pi0-FAST was trained with the black image visible, the others with it masked.
        state_dim: of the codec.
    """

    model_type: ModelType
    state_dim: int = _STATE_DIM

    @property
    def spec(self) -> RobotSpec:
        return positronic_spec(self.state_dim)

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type, wanted_by="PositronicInputs")


@dataclass(frozen=True)
class PositronicOutputs:
    """Cuts the model's padded actions to [..., 8]: a pose or seven joints, and the gripper."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)
