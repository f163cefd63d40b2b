"""From what a robot's client sends to what a model takes, as its `RobotSpec` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass

import numpy as np

from openpi.models.model_config import IMAGE_KEYS, ModelType
from openpi.policies.images import black_like, to_uint8_hwc
from openpi.policies.robot_spec import RobotSpec, VectorSpec
from openpi.shared.errors import listed, missing_key
from openpi.shared.tree import flatten


def robot_inputs(
    data: Mapping[str, object],
    spec: RobotSpec,
    model_type: ModelType,
    *,
    slots: Sequence[str] = IMAGE_KEYS,
    wanted_by: str = "RobotInputs",
) -> dict[str, object]:
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` and `prompt` pass through.

    Args:
        data: cameras as uint8 or floats in [0, 1], [h, w, 3] or [3, h, w]; the vectors of the state.
        model_type: pi0-FAST was trained with black images visible, the others with them masked.
        slots: image slots of the model; one that no camera fills is black, of the size of the first camera.
        wanted_by: who asks, for messages.
    Returns:
        `image` (uint8[h, w, 3] by slot), `image_mask`, `state`, and what passes through.
    Raises:
        KeyError: a required camera or a vector is missing.
        ValueError: something that is no RGB image, a part of the state of another width, no camera at all, or a spec
            whose slots are not the model's.
    """
    leaves = flatten(data)
    _check_slots(spec, slots)
    for key in (*(camera.key for camera in spec.cameras if camera.required), *(vector.key for vector in spec.state)):
        if key not in leaves:
            raise missing_key(
                key, leaves, wanted_by=wanted_by, fix="Rename it on the client; in a dataset, by the repack transform."
            )
    cameras = [camera for camera in spec.cameras if camera.slot is not None and camera.key in leaves]
    images = {camera.slot: to_uint8_hwc(leaves[camera.key], camera.key) for camera in cameras}
    if not images:
        known = listed(camera.key for camera in spec.cameras if camera.slot is not None)
        raise ValueError(f"{wanted_by} found no camera; expected at least one of {known}")
    black = black_like(next(iter(images.values())))
    is_black_seen = model_type is ModelType.PI0_FAST
    return {
        "state": _state(leaves, spec.state),
        "image": {slot: images.get(slot, black) for slot in slots},
        "image_mask": {slot: np.bool_(slot in images or is_black_seen) for slot in slots},
        **{key: leaves[key] for key in ("actions", "prompt") if key in leaves},
    }


def robot_actions(data: Mapping[str, object], width: int) -> dict[str, object]:
    """The model's padded actions, cut to the robot's: [..., width]."""
    return {"actions": np.asarray(data["actions"])[..., :width]}


@dataclass(frozen=True, kw_only=True)
class PaddedLater:
    """Takes `action_dim`, as recipes written for older versions give it, where states were padded to it: they are after
    they have been normalized, by `PadStatesAndActions`.
    """

    action_dim: InitVar[int | None] = None

    def __post_init__(self, action_dim: int | None) -> None:
        del action_dim


@dataclass(frozen=True)
class RobotInputs:
    """The input transform of any robot that needs no conversion of values; see `robot_inputs`."""

    spec: RobotSpec
    model_type: ModelType

    def __call__(self, data: dict) -> dict:
        return robot_inputs(data, self.spec, self.model_type)


@dataclass(frozen=True)
class RobotOutputs:
    """The output transform that goes with `RobotInputs`."""

    spec: RobotSpec

    def __call__(self, data: dict) -> dict:
        return robot_actions(data, self.spec.actions.width)


def _check_slots(spec: RobotSpec, slots: Sequence[str]) -> None:
    """Raises ValueError for a camera that the model would not see, or would see in another's place."""
    filled: dict[str, str] = {}
    for camera in spec.cameras:
        if camera.slot is None:
            continue
        if camera.slot not in slots:
            raise ValueError(
                f"camera '{camera.key}' of robot '{spec.robot}' has the slot '{camera.slot}'; the model's are "
                f"{listed(slots)}. Correct the slot in the RobotSpec, or set it to None for a camera that is not used"
            )
        if camera.slot in filled:
            raise ValueError(f"cameras '{filled[camera.slot]}' and '{camera.key}' have the same slot '{camera.slot}'")
        filled[camera.slot] = camera.key


def _state(leaves: Mapping[str, object], vectors: Sequence[VectorSpec]) -> np.ndarray:
    """The vectors one after the other, of one frame or of a block of frames.

    A state that is one vector passes as it is: statistics and contract know its width. Parts are checked here, because
    afterwards nobody could tell which of them was wrong.
    """
    parts = [np.asarray(leaves[vector.key]) for vector in vectors]
    if len(parts) == 1:
        return parts[0]
    num_axes = max(1, *(part.ndim for part in parts))
    # A single value may come without an axis of its own.
    pairs = zip(vectors, parts, strict=True)
    parts = [part[..., None] if vector.width == 1 and part.ndim < num_axes else part for vector, part in pairs]
    frames = parts[0].shape[:-1]
    for vector, part in zip(vectors, parts, strict=True):
        if part.shape != (*frames, vector.width):
            raise ValueError(
                f"'{vector.key}' has shape {np.asarray(leaves[vector.key]).shape}; expected {vector.width} values: "
                f"{', '.join(vector.names)}. Is this another robot?"
            )
    return np.concatenate(parts, axis=-1)
