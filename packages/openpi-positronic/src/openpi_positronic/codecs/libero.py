"""The published LIBERO policies on a robot that reports the pose of its gripper.

Their state is the pose of the hand, as an axis-angle vector, and the two fingers in metres; their images are seen in a
mirror; their actions are shares of the controller's largest step. Source: the specification of what moved upstream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from openpi_positronic.codecs.action import COMMAND, GRIP, ActionCodec
from openpi_positronic.codecs.codec import Codec, Step
from openpi_positronic.codecs.observation import array_of, numbers_of

STATE = "libero.state"
_POSE, _GRIP = "robot_state.ee_pose", "grip"
# Turns the frame of the gripper to that of the hand: 90 degrees about z. Scalar first.
_HAND_IN_GRIPPER_WXYZ = np.array([1.0, 0.0, 0.0, 1.0]) / np.sqrt(2)
_OPEN_M, _CLOSED_M = np.array([0.039683, -0.039682]), np.array([0.0005, -0.0005])
# Of one step: metres, and radians of the rotation vector.
_LARGEST_STEP = np.array([0.05] * 3 + [0.5] * 3)
_SHORTEST = 1e-9


@dataclasses.dataclass(frozen=True)
class LiberoSignals(Codec):
    """Adds the state of LIBERO, float64[8], and mirrors images.

    Attributes:
        cameras: the signals that are images.
    """

    cameras: tuple[str, ...]

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        pose, grip = numbers_of(raw, _POSE, 7).astype(np.float64), numbers_of(raw, _GRIP, 1).astype(np.float64)
        hand = rotation_vector(_product(pose[3:], _HAND_IN_GRIPPER_WXYZ))
        fingers = _OPEN_M + grip * (_CLOSED_M - _OPEN_M)
        mirrored = {name: array_of(raw, name)[..., ::-1, :] for name in self.cameras}
        return {**raw, **mirrored, STATE: np.concatenate([pose[:3], hand, fingers])}


class CartesianDelta(ActionCodec):
    """Steps of the pose: `cartesian_delta`, with `delta` = position in metres, then the rotation matrix row by row, in
    the axes of the robot's base (`frame` is no rotation). The gripper counts -1 open, 1 closed, and becomes 0 to 1.
    """

    def _steps(self, chunk: np.ndarray) -> list[Step]:
        clipped = np.clip(chunk.astype(np.float64), -1, 1)
        moves = clipped[:, : self.arm_width] * _LARGEST_STEP
        return [
            {
                COMMAND: {
                    "type": "cartesian_delta",
                    "delta": np.concatenate([move[:3], rotation_matrix(move[3:]).ravel()]),
                    "frame": np.concatenate([np.zeros(3), np.eye(3).ravel()]),
                },
                GRIP: float((grip + 1) / 2),
            }
            for move, grip in zip(moves, clipped[:, -1], strict=True)
        ]


def rotation_vector(quaternion_wxyz: np.ndarray) -> np.ndarray:
    """Axis times angle, float64[3], at most half a turn, of a quaternion of any length but none.

    Raises:
        ValueError: it is no rotation.
    """
    norm = np.linalg.norm(quaternion_wxyz)
    if not norm > _SHORTEST:
        raise ValueError(f"'{_POSE}' has a quaternion that is no rotation; expected x, y, z, qw, qx, qy, qz")
    w, *rest = quaternion_wxyz / norm
    axis = np.array(rest) if w >= 0 else -np.array(rest)
    sine = np.linalg.norm(axis)
    if sine < _SHORTEST:
        return 2 * axis
    return axis / sine * 2 * np.arctan2(sine, abs(w))


def rotation_matrix(vector: np.ndarray) -> np.ndarray:
    """float64[3, 3] of axis times angle (Rodrigues)."""
    angle = np.linalg.norm(vector)
    if angle < _SHORTEST:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of quaternions, scalar first."""
    scalar = first[0] * second[0] - first[1:] @ second[1:]
    vector = first[0] * second[1:] + second[0] * first[1:] + np.cross(first[1:], second[1:])
    return np.append(scalar, vector)
