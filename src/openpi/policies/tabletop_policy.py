"""The embedded table-top robot: its client keys, and the way from them to the model and back.

Two cameras only: the third image slot of larger models is not filled, so use it with a model whose
`image_keys` are `base_0_rgb` and `left_wrist_0_rgb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from openpi.policies.images import to_uint8_hwc
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.errors import missing_key
from openpi.shared.tree import flatten

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
        leaves = flatten(data)
        for key in (_IMAGE, _WRIST, _STATE):
            if key not in leaves:
                raise missing_key(key, leaves, wanted_by="TabletopInputs", fix="Rename it on the client, or repack it.")
        inputs: dict[str, Any] = {
            "state": np.asarray(leaves[_STATE]),
            "image": {
                "base_0_rgb": to_uint8_hwc(leaves[_IMAGE], _IMAGE),
                "left_wrist_0_rgb": to_uint8_hwc(leaves[_WRIST], _WRIST),
            },
            "image_mask": {"base_0_rgb": np.True_, "left_wrist_0_rgb": np.True_},
        }
        return inputs | {key: leaves[key] for key in ("actions", "prompt") if key in leaves}


@dataclass(frozen=True)
class TabletopOutputs:
    """Cuts the model's padded actions to float[..., 6]: joint targets in radians, gripper 0 to 1."""

    def __call__(self, data: dict) -> dict:
        return {"actions": np.asarray(data["actions"])[..., :ACTION_DIM]}
