"""ALOHA and its relatives: two arms of six joints and a gripper, up to four cameras.

Source: the training specification, section 4.1. "pi space" is the convention of the base models: two joints
of each arm turn the other way, and grippers are angles of their own scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from openpi.policies.images import black_like, to_uint8_hwc
from openpi.policies.robot_inputs import PaddedLater
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared.collected_warnings import Warnings
from openpi.shared.errors import listed, missing_key

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
_UNITS = (*("rad",) * 6, "0 closed .. 1 open") * 2

ALOHA_SPEC = RobotSpec(
    robot="aloha",
    cameras=(
        CameraSpec("images/cam_high", slot="base_0_rgb"),
        CameraSpec("images/cam_left_wrist", slot="left_wrist_0_rgb", required=False),
        CameraSpec("images/cam_right_wrist", slot="right_wrist_0_rgb", required=False),
        CameraSpec("images/cam_low", slot=None, required=False),
    ),
    state=(VectorSpec("state", _NAMES, _UNITS),),
    actions=VectorSpec("actions", _NAMES, _UNITS),
    action_kind="absolute joint positions",
)

_WIDTH = 14
_GRIPPERS = [6, 13]
_JOINT_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)  # shoulders and elbows turn the other way in pi space

# The standard ALOHA gripper, and the range of pi's.
_OPEN_M, _CLOSED_M = 0.05800, 0.01844  # distance of the fingers
_OPEN_RAD, _CLOSED_RAD = 1.4910, -0.6213  # joint
_PI_MIN_RAD, _PI_MAX_RAD = 0.5476, 1.6296
_ARM_M, _HORN_M = 0.036, 0.022  # linkage between joint and fingers

_FAR = 0.5  # of a gripper's range, beyond which it is of another scale
_warn = Warnings()


def make_aloha_example() -> dict:
    """A random observation, as a robot client sends it."""
    rng = np.random.default_rng()
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {
        "state": np.ones(_WIDTH),
        "images": {name: rng.integers(256, size=(3, 224, 224), dtype=np.uint8) for name in cameras},
        "prompt": "do something",
    }


@dataclass(frozen=True)
class AlohaInputs(PaddedLater):
    """Client keys, or a dataset repacked to them, to the model's inputs.

    Takes `images/cam_high` and optionally `cam_left_wrist`, `cam_right_wrist` (a missing one is black and
    masked) and `cam_low` (not used), RGB, uint8 or float in [0, 1], [3, h, w] or [h, w, 3]; `state`
    float[14]; optionally `actions` float[h, 14] and `prompt`.

    Attributes:
        adapt_to_pi: convert joints and grippers to pi space; for robots with the conventions of the standard
            ALOHA.
    """

    adapt_to_pi: bool = True

    spec: ClassVar[RobotSpec] = ALOHA_SPEC

    def __call__(self, data: dict) -> dict:
        images, masks = _camera_slots(data)
        inputs: dict[str, Any] = {"image": images, "image_mask": masks}
        if "state" not in data:
            raise missing_key("state", data, wanted_by="AlohaInputs")
        inputs["state"] = _state_to_pi(data["state"]) if self.adapt_to_pi else np.asarray(data["state"])
        if "actions" in data:
            inputs["actions"] = _actions_to_pi(data["actions"]) if self.adapt_to_pi else np.asarray(data["actions"])
        if "prompt" in data:
            inputs["prompt"] = data["prompt"]
        return inputs


@dataclass(frozen=True)
class AlohaOutputs:
    """Model actions -> float[..., 14] in the robot's conventions; undoes that part of `AlohaInputs`."""

    adapt_to_pi: bool = True

    def __call__(self, data: dict) -> dict:
        actions = np.asarray(data["actions"])[..., :_WIDTH]
        return {"actions": _actions_from_pi(actions) if self.adapt_to_pi else actions}


def _camera_slots(data: dict) -> tuple[dict[str, np.ndarray], dict[str, np.bool_]]:
    known = {camera.key.removeprefix("images/"): camera.slot for camera in ALOHA_SPEC.cameras}
    # Under one key, as published, or each under its own, as a contract names them.
    images = {key.removeprefix("images/"): data[key] for key in data if key.startswith("images/")}
    images |= data.get("images", {})
    unknown = [name for name in images if name not in known]
    if unknown:
        raise ValueError(
            f"unknown ALOHA cameras {listed(unknown)}; expected some of {listed(known)}. Rename them on the "
            "client; in a dataset, by the repack transform"
        )
    if "cam_high" not in images:
        fix = "Send it; from a dataset, map a camera to it in the repack transform."
        raise missing_key("images/cam_high", [f"images/{n}" for n in images], wanted_by="AlohaInputs", fix=fix)
    parsed = {slot: to_uint8_hwc(images[n], f"images/{n}") for n, slot in known.items() if slot and n in images}
    black = black_like(parsed["base_0_rgb"])
    slots = [slot for slot in known.values() if slot]
    return {s: parsed.get(s, black) for s in slots}, {s: np.bool_(s in parsed) for s in slots}


def _state_to_pi(state: np.ndarray) -> np.ndarray:
    adapted = _JOINT_SIGNS * _check_width(state, "state")
    adapted = adapted.astype(np.float64)
    _warn(_of_grippers(adapted[..., _GRIPPERS]))
    adapted[..., _GRIPPERS] = _gripper_position_to_pi(adapted[..., _GRIPPERS])
    return adapted


def _of_grippers(opening: np.ndarray) -> Iterator[str]:
    """The linkage ends where the gripper does: of another scale, all positions would look alike to the policy."""
    for i, dim in enumerate(_GRIPPERS):
        found = opening[..., i]
        if ((found < -_FAR) | (found > 1 + _FAR)).any():
            yield (
                f"[units] state '{_NAMES[dim]}': {np.ravel(found)[0]:.4g}; expected 0 closed to 1 open, which bytes, "
                "percent and millimetres are not. Convert it in the robot's program"
            )


def _actions_to_pi(actions: np.ndarray) -> np.ndarray:
    adapted = (_JOINT_SIGNS * _check_width(actions, "actions")).astype(np.float64)
    adapted[..., _GRIPPERS] = adapted[..., _GRIPPERS] * (_OPEN_RAD - _CLOSED_RAD) + _CLOSED_RAD - _PI_MIN_RAD
    return adapted


def _actions_from_pi(actions: np.ndarray) -> np.ndarray:
    """Inverse of `_actions_to_pi`."""
    adapted = (_JOINT_SIGNS * _check_width(actions, "actions")).astype(np.float64)
    adapted[..., _GRIPPERS] = (adapted[..., _GRIPPERS] + _PI_MIN_RAD - _CLOSED_RAD) / (_OPEN_RAD - _CLOSED_RAD)
    return adapted


def _gripper_position_to_pi(opening: np.ndarray) -> np.ndarray:
    """Measured opening, 0 closed to 1 open, -> pi's gripper scale, through the angle of the linkage.

    Only for the state: actions are commanded joint angles, for which another, linear map holds.
    """
    distance = opening * (_OPEN_M - _CLOSED_M) + _CLOSED_M
    sine = (_HORN_M**2 + distance**2 - _ARM_M**2) / (2 * _HORN_M * distance)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    return (angle - _PI_MIN_RAD) / (_PI_MAX_RAD - _PI_MIN_RAD)


def _check_width(values: np.ndarray, key: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim == 0 or values.shape[-1] != _WIDTH:
        raise ValueError(
            f"'{key}' has shape {values.shape}; expected {_WIDTH} values: left arm 6 joints, left gripper, "
            "right arm 6 joints, right gripper. For another robot turn adapt_to_pi off"
        )
    return values
