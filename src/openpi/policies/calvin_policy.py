"""CALVIN: a simulated Franka arm at a desk, a static and a gripper camera.

Source: the training specification, section 4.5. Of the 15 values that the first release returned the simulator takes
the first seven, and its client sets the gripper to -1 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec

_STATIC, _WRIST, _STATE = "observation/rgb_static", "observation/rgb_gripper", "observation/state"
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_POSE_UNITS = (*("m",) * 3, *("rad",) * 3)
_JOINTS = tuple(f"joint_{i}" for i in range(1, 8))
_ACTION_DIM = 15

CALVIN_SPEC = RobotSpec(
    robot="calvin",
    cameras=(CameraSpec(_STATIC, slot="base_0_rgb"), CameraSpec(_WRIST, slot="left_wrist_0_rgb")),
    state=(
        VectorSpec(
            _STATE,
            (*_POSE, "gripper_width", *_JOINTS, "gripper"),
            (*_POSE_UNITS, "m", *("rad",) * 7, "-1 closed, 1 open"),
        ),
    ),
    actions=VectorSpec(
        "actions",
        (*(f"d_{name}" for name in _POSE), "gripper", *(f"unused_{i}" for i in range(_ACTION_DIM - 7))),
        (*("share of the controller's step, -1 .. 1",) * 6, "-1 close, 1 open", *("none",) * (_ACTION_DIM - 7)),
    ),
    action_kind="relative end-effector poses, and gripper; the rest is padding",
)


def make_calvin_example() -> dict:
    """A random observation, as a robot client sends it."""
    rng = np.random.default_rng()
    return {
        _STATE: rng.random(15),
        _STATIC: rng.integers(256, size=(200, 200, 3), dtype=np.uint8),
        _WRIST: rng.integers(256, size=(84, 84, 3), dtype=np.uint8),
        "prompt": "do something",
    }


@dataclass(frozen=True)
class CalvinInputs:
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` and `prompt` pass through.

    Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h, w]. The third image slot stays black.

    Attributes:
        model_type: pi0-FAST was trained with the black image visible, the others with it masked.
    """

    model_type: ModelType

    spec: ClassVar[RobotSpec] = CALVIN_SPEC

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type, wanted_by="CalvinInputs")


@dataclass(frozen=True)
class CalvinOutputs:
    """Cuts the model's padded actions to [..., 15]."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)
