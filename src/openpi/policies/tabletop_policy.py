"""The embedded table-top robot: its client keys, and the way from them to the model and back.

Two cameras only: the third image slot of larger models is not filled, so use it with a model whose
`image_keys` are `base_0_rgb` and `left_wrist_0_rgb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec

_IMAGE, _WRIST, _STATE = "observation/image", "observation/wrist_image", "observation/state"
_JOINTS = ("base_yaw", "shoulder", "elbow", "wrist_pitch", "wrist_roll")
_NAMES = (*_JOINTS, "gripper")
_UNITS = (*("rad" for _ in _JOINTS), "0 closed .. 1 open")
ACTION_DIM = len(_NAMES)

TABLETOP_SPEC = RobotSpec(
    robot="tabletop",
    cameras=(
        CameraSpec(_IMAGE, slot="base_0_rgb", layout="hwc"),
        CameraSpec(_WRIST, slot="left_wrist_0_rgb", layout="hwc"),
    ),
    state=(VectorSpec(_STATE, _NAMES, _UNITS),),
    actions=VectorSpec("actions", _NAMES, _UNITS),
    action_kind="absolute joint positions, and gripper",
    follows_state=(True,) * ACTION_DIM,
)


def make_tabletop_example() -> dict:
    """A random observation, as a robot client sends it."""
    rng = np.random.default_rng(0)
    return {
        _IMAGE: rng.integers(256, size=(64, 64, 3), dtype=np.uint8),
        _WRIST: rng.integers(256, size=(64, 64, 3), dtype=np.uint8),
        _STATE: rng.random(ACTION_DIM, dtype=np.float32),
        "prompt": "pick up the red block",
    }


@dataclass(frozen=True)
class TabletopInputs:
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` and `prompt` pass through.

    Takes images uint8 HWC or float CHW in [0, 1], state float[6].
    """

    spec: ClassVar[RobotSpec] = TABLETOP_SPEC

    def __call__(self, data: dict) -> dict:
        slots = [camera.slot for camera in self.spec.cameras if camera.slot]
        return robot_inputs(data, self.spec, ModelType.PI05, slots=slots, wanted_by="TabletopInputs")


@dataclass(frozen=True)
class TabletopOutputs:
    """Cuts the model's padded actions to float[..., 6]: joint targets in radians, gripper 0 to 1."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, ACTION_DIM)
