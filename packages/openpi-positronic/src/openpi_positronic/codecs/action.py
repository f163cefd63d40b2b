"""The action half of a codec: what a policy gives, as commands for an arm and a gripper.

A pose is x, y, z in metres and a quaternion, scalar first; joints are radians. Which end of the gripper's [0, 1] is
open differs between robots and is never changed here: it is what the training data had.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi.shared.strict_json import Json
from openpi_positronic.codecs.codec import Codec, Column, Decoded, Given, Step
from openpi_positronic.codecs.observation import Vector

COMMAND, GRIP = "robot_command", "target_grip"
ACTION_COLUMN = "action"

_SHORTEST_QUATERNION = 1e-6
_MAX_DELTA_RAD = 0.2  # per step, at 1: what the DROID policies were trained with
_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class ActionCodec(Codec):
    """An arm command of `arm_width` values, then the gripper.

    Attributes:
        signals: name -> width of what a policy is trained to give; empty for inference only.
        arm_width: values of the arm's command.
    """

    signals: Mapping[str, int] = dataclasses.field(default_factory=dict)
    arm_width: int = 7

    @property
    def training_meta(self) -> Json:
        feature = {"dtype": "float32", "shape": [self.arm_width + 1], "names": ["actions"]}
        return {"lerobot_features": {ACTION_COLUMN: feature}} if self.signals else {}

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        """An action is no part of the observation."""
        return {}

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        is_one = isinstance(output, Mapping) or (isinstance(output, np.ndarray) and output.ndim == 1)
        chunk = self._checked(_rows([output] if is_one else output))
        steps = self._steps(chunk)
        return steps[0] if is_one else steps

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        if not self.signals:
            raise ValueError(
                "this codec is for inference only: it has no action to train on. To convert recordings, choose another"
            )
        return {ACTION_COLUMN: Vector(ACTION_COLUMN, self.signals, ACTION_COLUMN).training(signals)}

    @abc.abstractmethod
    def _steps(self, chunk: np.ndarray) -> list[Step]:
        """float[h, arm_width + 1], finite."""

    def _checked(self, chunk: np.ndarray) -> np.ndarray:
        if chunk.ndim != 2 or chunk.shape[-1] != self.arm_width + 1:
            raise ValueError(
                f"an action has shape {chunk.shape[1:]}; expected {self.arm_width} values for the arm and 1 for the "
                "gripper. The model was trained with another codec"
            )
        if not np.isfinite(chunk).all():
            step, value = np.argwhere(~np.isfinite(chunk))[0]
            raise ValueError(
                f"step {step} of the actions has {chunk[step, value]} at {value}; no robot may be sent that"
            )
        return chunk


class CartesianPose(ActionCodec):
    """Absolute poses: `cartesian_pos`, with `pose` = position, then the rotation matrix row by row."""

    def _steps(self, chunk: np.ndarray) -> list[Step]:
        position, quaternion, grip = np.split(chunk.astype(np.float64), (3, 7), axis=1)
        poses = np.concatenate([position, _rotation_matrices(quaternion)], axis=1)
        return [
            {COMMAND: {"type": "cartesian_pos", "pose": pose}, GRIP: value}
            for pose, value in zip(poses, grip[:, 0].tolist(), strict=True)
        ]


class JointPositions(ActionCodec):
    """Absolute joint angles: `joint_pos`, with `positions` in the model's dtype."""

    def _steps(self, chunk: np.ndarray) -> list[Step]:
        return [
            {COMMAND: {"type": "joint_pos", "positions": row[: self.arm_width].copy()}, GRIP: float(row[-1])}
            for row in chunk
        ]


class JointDelta(ActionCodec):
    """Normalised joint velocities: `joint_delta`, cut to [-1, 1] and scaled to radians per step; a binary gripper."""

    def _steps(self, chunk: np.ndarray) -> list[Step]:
        clipped = np.clip(chunk.astype(np.float64), -1, 1)
        deltas = _MAX_DELTA_RAD * clipped[:, : self.arm_width]
        return [
            {COMMAND: {"type": "joint_delta", "velocities": delta}, GRIP: _binary(float(grip))}
            for delta, grip in zip(deltas, clipped[:, -1], strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class BinariseGrip(Codec):
    """The gripper open or closed, nothing between: in training data, and in commands.

    Attributes:
        signals: that become 0 or 1 in training, before observation and action are made of them.
        observed: also in the observation of a served policy. The published codecs do not, although their training data
            are binary.
    """

    signals: tuple[str, ...] = ("grip", "target_grip")
    observed: bool = False

    @property
    def parameters(self) -> dict[str, object]:
        return {"binarise_observation": self.observed}

    def with_parameters(self, values: Mapping[str, object]) -> Codec:
        observed = values.get("binarise_observation", self.observed)
        if not isinstance(observed, bool):
            raise ValueError(f"binarise_observation is {observed!r}; expected true or false")
        return dataclasses.replace(self, observed=observed)

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        names = self.signals if self.observed else ()
        return {key: _binary_array(value) if key in names else value for key, value in raw.items()}

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        if isinstance(output, Mapping):
            return {**output, GRIP: _binary(output[GRIP])}
        return [{**step, GRIP: _binary(step[GRIP])} for step in output]

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        return _Overlaid(signals, {name: signals[name].map(_binary_array) for name in self.signals})


@dataclasses.dataclass(frozen=True)
class FlipGrip(Codec):
    """Turns the gripper's range round, for a policy that was trained with its other end open: in observations and
    commands, and in training data alike.
    """

    signals: tuple[str, ...] = ("grip", "target_grip")

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        return {key: 1 - np.asarray(value) if key in self.signals else value for key, value in raw.items()}

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        if isinstance(output, Mapping):
            return {**output, GRIP: 1 - output[GRIP]}
        return [{**step, GRIP: 1 - step[GRIP]} for step in output]

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        return _Overlaid(signals, {name: signals[name].map(lambda values: 1 - values) for name in self.signals})


@dataclasses.dataclass(frozen=True)
class ControlMode(Codec):
    """How the arm is to carry out its commands: `mode` of each.

    Attributes:
        mode: `type`, and the gains where it has some.
    """

    mode: Mapping[str, Any]

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        if isinstance(output, Mapping):
            return {**output, COMMAND: {**output[COMMAND], "mode": dict(self.mode)}}
        return [{**step, COMMAND: {**step[COMMAND], "mode": dict(self.mode)}} for step in output]


class _Overlaid(Mapping[str, Column]):
    """A mapping with some entries replaced; the one below may know any name."""

    def __init__(self, below: Mapping[str, Column], above: Mapping[str, Column]):
        self._below, self._above = below, above

    def __getitem__(self, name: str) -> Column:
        return self._above[name] if name in self._above else self._below[name]

    def __iter__(self):
        return iter(self._below)

    def __len__(self) -> int:
        return len(self._below)


def _rows(output: object) -> np.ndarray:
    rows = [_action_of(step) for step in output] if isinstance(output, list) else output
    return np.asarray(rows)


def _action_of(step: object) -> object:
    if not isinstance(step, Mapping):
        return step
    if "action" not in step:
        raise ValueError(f"a step of the policy's output has the keys {list(step)}; expected 'action'")
    return step["action"]


def _rotation_matrices(quaternions_wxyz: np.ndarray) -> np.ndarray:
    """float64[h, 9], row by row, of quaternions of any length but none."""
    norms = np.linalg.norm(quaternions_wxyz, axis=1, keepdims=True)
    if (norms < _SHORTEST_QUATERNION).any():
        step = int(np.argmin(norms))
        raise ValueError(
            f"step {step} of the actions has the quaternion {quaternions_wxyz[step]}, which is no rotation"
        )
    w, x, y, z = (quaternions_wxyz / norms).T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([entry for row in rows for entry in row], axis=1)


def _binary(grip: float) -> float:
    return 1.0 if grip > _THRESHOLD else 0.0


def _binary_array(values: object) -> np.ndarray:
    return np.heaviside(np.asarray(values) - _THRESHOLD, 0).astype(np.float32)  # what is no number stays none
