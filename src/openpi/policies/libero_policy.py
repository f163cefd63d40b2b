"""LIBERO: a simulated Franka arm, a scene and a wrist camera; also the usual start for a robot of your own.

Source: the training specification, section 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from openpi.models.model_config import ModelType
from openpi.policies.robot_inputs import PaddedLater, robot_actions, robot_inputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec, random_observation

_IMAGE, _WRIST, _STATE = "observation/image", "observation/wrist_image", "observation/state"
_ACTION_DIM = 7

LIBERO_SPEC = RobotSpec(
    robot="libero",
    cameras=(CameraSpec(_IMAGE, slot="base_0_rgb"), CameraSpec(_WRIST, slot="left_wrist_0_rgb")),
    state=(
        VectorSpec(
            _STATE,
            ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
            ("m", "m", "m", "rad", "rad", "rad", "m", "m"),
        ),
    ),
    actions=VectorSpec(
        "actions",
        ("dx", "dy", "dz", "d_axis_angle_x", "d_axis_angle_y", "d_axis_angle_z", "gripper"),
        (*("share of the controller's step, -1 .. 1",) * 6, "-1 open .. 1 close"),
    ),
    action_kind="relative end-effector poses, and gripper",
    follows_state=(False,) * 7,
    takes_any_state=True,
)


def make_libero_example() -> dict:
    """A random observation, as a robot client sends it."""
    return random_observation(LIBERO_SPEC)


@dataclass(frozen=True)
class LiberoInputs(PaddedLater):
    """Client keys, or a dataset repacked to them, to the model's inputs.

    `state`, `actions` and `prompt` pass through. Takes images uint8 or float in [0, 1], [h, w, 3] or [3, h,
    w]. The third image slot stays black.

    Attributes:
        model_type: pi0-FAST was trained with the black image visible, the others with it masked.
    """

    model_type: ModelType

    spec: ClassVar[RobotSpec] = LIBERO_SPEC

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type, wanted_by="LiberoInputs")


@dataclass(frozen=True)
class LiberoOutputs:
    """Cuts the model's padded actions to [..., 7]: a relative pose and the gripper."""

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, _ACTION_DIM)
