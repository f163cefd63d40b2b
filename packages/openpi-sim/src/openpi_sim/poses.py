"""Poses of the end effector: x, y, z in metres and a unit quaternion, scalar first. Source: the spec, section 6.1."""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np


def pose_of(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """float64[7] of a position float64[3] and a rotation matrix float64[3, 3] (or its nine values row by row)."""
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation, np.float64).reshape(9))
    return np.concatenate([np.asarray(position, np.float64), quaternion])


def pose_of_command(values: np.ndarray) -> np.ndarray:
    """float64[7] of the 12 values of a `cartesian_pos` command: position, then the matrix row by row.

    Raises:
        ValueError: another number of values, values that are not finite, or no rotation.
    """
    values = checked(values, 12, "pose")
    rotation = values[3:].reshape(3, 3)
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise ValueError(f"pose has {values[3:].tolist()} where a 3x3 rotation matrix belongs, row by row")
    return pose_of(values[:3], rotation)


def checked(values: np.ndarray, width: int, name: str) -> np.ndarray:
    """float64[width], finite, or ValueError."""
    values = np.asarray(values, np.float64)
    if values.shape != (width,):
        raise ValueError(f"{name} has shape {values.shape}; expected ({width},)")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite: {values.tolist()}")
    return values


def difference(target: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """float64[6] from `pose` to `target`: metres, then a rotation vector in radians, both in the world's frame."""
    inverse, between, local = np.empty(4), np.empty(4), np.empty(3)
    mujoco.mju_negQuat(inverse, pose[3:])
    mujoco.mju_mulQuat(between, target[3:] / np.linalg.norm(target[3:]), inverse)
    mujoco.mju_quat2Vel(local, between, 1.0)
    return np.concatenate([target[:3] - pose[:3], local])


def rotation_of(pose: np.ndarray) -> np.ndarray:
    """Rotation matrix float64[3, 3]."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, pose[3:] / np.linalg.norm(pose[3:]))
    return matrix.reshape(3, 3)
