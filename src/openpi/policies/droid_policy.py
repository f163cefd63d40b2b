"""DROID: a Franka arm with a parallel gripper, an exterior and a wrist camera.

Source: the training specification, section 4.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi.models.model_config import ModelType
from openpi.policies.images import to_uint8_hwc
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.errors import missing_key
from openpi.shared.tree import flatten

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
    rng = np.random.default_rng()
    return {
        _EXTERIOR: rng.integers(256, size=(224, 224, 3), dtype=np.uint8),
        _WRIST: rng.integers(256, size=(224, 224, 3), dtype=np.uint8),
        _JOINTS: rng.random(7),
        _GRIPPER: rng.random(1),
        "prompt": "do something",
    }


@dataclass(frozen=True)
class DroidInputs:
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
        leaves = flatten(data)
        for key in (_EXTERIOR, _WRIST, _JOINTS, _GRIPPER):
            if key not in leaves:
                raise missing_key(key, leaves, wanted_by="DroidInputs", fix="Rename it on the client, or repack it.")
        base, wrist = to_uint8_hwc(leaves[_EXTERIOR], _EXTERIOR), to_uint8_hwc(leaves[_WRIST], _WRIST)
        images, masks = _slots(base, wrist, self.model_type)
        inputs: dict[str, Any] = {"state": _state(leaves), "image": images, "image_mask": masks}
        if "actions" in leaves:
            inputs["actions"] = np.asarray(leaves["actions"])
        if "prompt" in leaves:
            inputs["prompt"] = _as_text(leaves["prompt"])
        return inputs


@dataclass(frozen=True)
class DroidOutputs:
    """Cuts the model's padded actions to [..., 8]: seven joints and the gripper."""

    def __call__(self, data: dict) -> dict:
        return {"actions": np.asarray(data["actions"])[..., :_ACTION_DIM]}


def _state(leaves: dict[str, Any]) -> np.ndarray:
    joints, gripper = np.asarray(leaves[_JOINTS]), np.asarray(leaves[_GRIPPER])
    column = gripper[..., None] if gripper.ndim < joints.ndim else gripper
    if joints.shape[-1:] != (7,) or column.shape != (*joints.shape[:-1], 1):
        raise ValueError(
            f"'{_JOINTS}' has shape {joints.shape} and '{_GRIPPER}' {gripper.shape}; expected 7 joints in radians and "
            "1 gripper value"
        )
    return np.concatenate([joints, column], axis=-1)


def _slots(
    base: np.ndarray, wrist: np.ndarray, model_type: ModelType
) -> tuple[dict[str, np.ndarray], dict[str, np.bool_]]:
    black = np.zeros_like(base)
    if model_type is ModelType.PI0_FAST:  # trained with the black image visible
        images = {"base_0_rgb": base, "base_1_rgb": black, "wrist_0_rgb": wrist}
        return images, dict.fromkeys(images, np.True_)
    images = {"base_0_rgb": base, "left_wrist_0_rgb": wrist, "right_wrist_0_rgb": black}
    return images, {"base_0_rgb": np.True_, "left_wrist_0_rgb": np.True_, "right_wrist_0_rgb": np.False_}


def _as_text(prompt: Any) -> Any:
    """RLDS delivers prompts as bytes."""
    value = prompt.item() if isinstance(prompt, (np.ndarray, np.generic)) else prompt
    return value.decode("utf-8") if isinstance(value, bytes) else prompt
