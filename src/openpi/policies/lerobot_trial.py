"""A made-up observation, sent through a robot's transforms to see what they do to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi import transforms as _transforms
from openpi.policies.contract import Contract
from openpi.policies.data_half import DataHalf
from openpi.policies.robot_spec import CameraSpec, VectorSpec, find_spec, numbered, relative_dims
from openpi.shared.errors import listed
from openpi.shared.tree import unflatten

if TYPE_CHECKING:
    from openpi.models.model_config import PaliGemmaConfig


_PROMPT = "Put the red_block on the TABLE"


@dataclasses.dataclass(frozen=True)
class Known:
    """What a robot's transforms take and give.

    Attributes:
        mask: per action dimension, whether training sees it relative to the state.
    """

    cameras: tuple[CameraSpec, ...]
    state: tuple[VectorSpec, ...]
    actions: VectorSpec
    mask: tuple[bool, ...]

    @classmethod
    def find(cls, data_config: DataHalf, model_config: PaliGemmaConfig, contract: Contract | None) -> Known | None:
        """From the contract or the spec; None where transforms are there and nothing tells what they take."""
        steps = data_config.data_transforms.inputs
        source = contract or find_spec(steps)
        if source is not None:
            return cls(source.cameras, source.state, source.actions, relative_dims(steps, source.actions.width))
        if any(not isinstance(step, _transforms.DeltaActions) for step in steps):
            return None
        # Without robot transforms, samples are what the model takes.
        width = model_config.action_dim
        state, actions = (VectorSpec.uniform(key, numbered(key, width), "unknown") for key in ("state", "actions"))
        cameras = tuple(CameraSpec(f"image/{key}", key) for key in model_config.image_keys)
        return cls(cameras, (state,), actions, relative_dims(steps, width))

    @property
    def state_names(self) -> list[str]:
        return [name for vector in self.state for name in vector.names]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A made-up observation, and what of it must reach the model.

    Attributes:
        pictures: uint8[h, w, 3] by client key, at the model's resolution unless the robot's is known.
        state: float32[s]; actions: float32[h, d], as the robot has them.
    """

    known: Known
    pictures: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray

    @classmethod
    def make(cls, known: Known, model_config: PaliGemmaConfig, rng: np.random.Generator, scale: float) -> Trial:
        size = model_config.image_resolution
        pictures = {
            camera.key: rng.integers(256, size=(*(camera.shape or size), 3), dtype=np.uint8) for camera in known.cameras
        }
        vectors = {v.key: rng.normal(0, scale, v.width).astype(np.float32) for v in known.state}
        actions = rng.normal(0, scale, (model_config.action_horizon, known.actions.width)).astype(np.float32)
        return cls(known, pictures, vectors, np.concatenate([*vectors.values()]), actions)

    def run(self, steps: Sequence[_transforms.DataTransformFn]) -> _transforms.DataDict:
        """The sample behind the robot's input transforms."""
        layouts = {camera.key: camera.layout for camera in self.known.cameras}
        flat: dict[str, Any] = {
            key: np.moveaxis(picture, -1, 0) if layouts[key] == "chw" else picture
            for key, picture in self.pictures.items()
        }
        flat |= {**self.vectors, "actions": self.actions, "prompt": np.asarray(_PROMPT)}
        # A key such as `images/cam_high` is a nested dict for one robot, and one text key for another.
        run = _transforms.compose(steps)
        try:
            return run(unflatten(flat))
        except KeyError:
            return run(flat)

    def back(self, steps: Sequence[_transforms.DataTransformFn], model_config: PaliGemmaConfig) -> np.ndarray:
        """What the robot's output transforms make of the model's actions."""
        padded = _transforms.pad_to_dim(self.changes, max(model_config.action_dim, self.actions.shape[-1]))
        return np.asarray(_transforms.compose(steps)({"state": self.state, "actions": padded})["actions"])

    @property
    def changes(self) -> np.ndarray:
        """The actions that the model is trained on, if LeRobot says the same."""
        width = self.actions.shape[-1]
        state = _transforms.pad_to_dim(self.state, max(width, len(self.state)))[:width]
        return self.actions - np.where(self.known.mask, state, 0).astype(np.float32)

    def slots_of(self, data: _transforms.DataDict, order: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
        """Slots that the model sees -> client key of the camera, None where it sees black; and what is lost."""
        slots: dict[str, str | None] = {}
        lines = []
        images, masks = data.get("image") or {}, data.get("image_mask") or {}
        for slot in sorted(images, key=lambda name: order.index(name) if name in order else len(order)):
            image, is_seen = np.asarray(images[slot]), bool(np.all(masks.get(slot, True)))
            key = next((key for key, picture in self.pictures.items() if np.array_equal(picture, image)), None)
            if key is None and image.any():
                lines.append(f"image '{slot}' is no camera as the robot sends it: turned, cropped or otherwise changed")
            elif key is not None and not is_seen:
                lines.append(f"camera '{key}' is hidden from the model")
            elif is_seen:
                slots[slot] = key
        if not slots and not lines:
            lines.append("no camera reaches the model")
        return slots, lines

    def input_losses(self, data: Mapping[str, object]) -> list[str]:
        lines = _differences("state", data.get("state"), self.state, self.known.state_names)
        lines += _differences("actions", data.get("actions"), self.changes, self.known.actions.names)
        if "prompt" not in data or str(np.asarray(data["prompt"])) != _PROMPT:
            lines.append(f"the prompt is changed ({data.get('prompt')!r} of {_PROMPT!r})")
        return lines

    def output_losses(self, returned: np.ndarray) -> list[str]:
        return _differences("actions for the robot", returned, self.actions, self.known.actions.names)


def _differences(what: str, found: object, expected: np.ndarray, names: Sequence[str]) -> list[str]:
    if found is None:
        return [f"{what} do not come through"]
    found = np.asarray(found)
    if found.shape != expected.shape:
        return [f"{what} have shape {found.shape}, of {expected.shape}"]
    if found.dtype.kind not in "fiu":
        return [f"{what} become {found.dtype}"]
    is_close = np.isclose(found, expected, rtol=1e-4, atol=1e-5).reshape(-1, expected.shape[-1]).all(axis=0)
    changed = [names[int(place)] for place in np.flatnonzero(~is_close)]
    return [f"{what} are changed in {listed(changed)}"] if changed else []
