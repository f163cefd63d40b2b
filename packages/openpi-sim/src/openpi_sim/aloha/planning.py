"""Plans for ALOHA's two arms: way points of the finger tips, turned into joint targets by damped least squares, and
played in a simulation of their own.

Frames: metres; the arms stand at x = -0.469 (left) and 0.469 (right) and face each other, z up, the table at z = 0.
A hand's own x axis points out of the fingers, which close along its y axis.
"""

# The MuJoCo bindings are compiled and ship no type stubs; gym_aloha ships none either.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from openpi_sim import poses
from openpi_sim.kinematics import InverseKinematics

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_SIDES = ("left", "right")
_ARM_WIDTH = 8  # values of an arm in `qpos` and `ctrl`: six joints and two fingers
_STEPS_PER_TICK = 10
_OPEN_M, _CLOSED_M = 0.05800, 0.01844  # of a finger, where the gripper counts 1 and 0
_TIP_M = 0.020  # from the hand's site at its very tip back to the middle of what is gripped
_LEFT_FINGER = "vx300s_left/10_left_gripper_finger"
_TWISTS, _WRIST = [3, 5], 4  # of an arm: forearm and hand turn half round, and the wrist bends the other way
OPEN, CLOSED = 1.0, 0.0


class Stage:
    """The model of `gym_aloha`'s scene with the cube, for kinematics and for trying out."""

    def __init__(self) -> None:
        from gym_aloha.constants import ASSETS_DIR

        self.model = mujoco.MjModel.from_xml_path(str(Path(ASSETS_DIR) / "bimanual_viperx_transfer_cube.xml"))
        self.data = mujoco.MjData(self.model)
        self.arms = {
            side: InverseKinematics(
                self.model, tuple(f"vx300s_{side}/{joint}" for joint in _JOINTS), f"cali_{side}_site1"
            )
            for side in _SIDES
        }

    def cube_pose(self, qpos: np.ndarray | None = None) -> np.ndarray:
        """float64[7], a new array; None = that of now."""
        return (self.data.qpos if qpos is None else qpos)[2 * _ARM_WIDTH :].copy()

    def set(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos, self.data.qvel = qpos, qvel
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: np.ndarray) -> None:
        """One control tick."""
        self.data.ctrl[:] = controls(action)
        mujoco.mj_step(self.model, self.data, nstep=_STEPS_PER_TICK)

    def touching(self, first: str, second: str) -> bool:
        """Whether geoms of these names are in contact."""
        wanted = {self.model.geom(first).id, self.model.geom(second).id}
        return any({int(a), int(b)} == wanted for a, b in self.data.contact.geom[: self.data.ncon])

    def is_solved(self) -> bool:
        """As `gym_aloha` judges it."""
        return self.touching("red_box", _LEFT_FINGER) and not self.touching("red_box", "table")

    def project(self, qpos: np.ndarray, camera: str) -> np.ndarray:
        """(right, down) of the cube in a square picture with a 4:3 view in its middle, 0 to 1."""
        self.data.qpos = qpos
        mujoco.mj_forward(self.model, self.data)
        index = self.model.camera(camera).id
        right, up, back = self.data.cam_xmat[index].reshape(3, 3).T @ (
            self.cube_pose(qpos)[:3] - self.data.cam_xpos[index]
        )
        half_height = np.tan(np.deg2rad(self.model.cam_fovy[index]) / 2)
        x, y = right / -back / half_height, -up / -back / half_height  # of half the picture's height
        return np.array([0.5 + x * 3 / 8, 0.5 + y * 3 / 8])


def robot_state(qpos: np.ndarray) -> np.ndarray:
    """float64[14] of `qpos`: per arm six joints, and the gripper from 0 closed to 1 open."""
    arms = qpos[: 2 * _ARM_WIDTH].reshape(2, _ARM_WIDTH)
    grips = (arms[:, 6:7] - _CLOSED_M) / (_OPEN_M - _CLOSED_M)
    return np.concatenate([arms[:, :6], grips], axis=1).ravel()


def controls(action: np.ndarray) -> np.ndarray:
    """float64[16] of an action float[14]: each finger has its own."""
    arms = np.asarray(action, np.float64).reshape(2, 7)
    fingers = arms[:, 6:] * (_OPEN_M - _CLOSED_M) + _CLOSED_M
    return np.concatenate([arms[:, :6], fingers, -fingers], axis=1).ravel()


@dataclass(frozen=True)
class Move:
    """Where both hands go in `ticks`, and then stay `hold` ticks; None = where they are. Grips are set at once."""

    ticks: int
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    left_grip: float = OPEN
    right_grip: float = OPEN
    hold: int = 0


Way = Iterator[Move]
"""Moves one after the other; each is asked for when those before it have been played, and may look at the stage."""


@dataclass(frozen=True)
class Plan:
    """What was played, or is to be.

    Attributes:
        rows: targets float32[n, 14].
        cube: where it is before each row, float64[n, 3].
        has_succeeded: whether the task was solved.
    """

    rows: np.ndarray
    cube: np.ndarray
    has_succeeded: bool


def plan(stage: Stage, ways: Sequence[Callable[[Stage], Way]], qpos: np.ndarray, qvel: np.ndarray) -> Plan:
    """The first way that succeeds when it is played from this state, else the last."""
    tried = Plan(np.empty((0, 14), np.float32), stage.cube_pose(qpos)[None, :3], has_succeeded=False)
    for way in ways:
        stage.set(qpos, qvel)
        tried = play(stage, way(stage))
        if tried.has_succeeded:
            break
    return tried


def play(stage: Stage, way: Way) -> Plan:
    """Plays each move in joint space; an arm that cannot reach its goal stays.

    Straight lines of the hands would pass where the wrist is stretched, and there its other joints turn half round.
    """
    arms = {side: stage.data.qpos[i * _ARM_WIDTH :][:6].copy() for i, side in enumerate(_SIDES)}
    rows, cube, has_succeeded = [], [], False
    for move in way:
        goals, grips = {"left": move.left, "right": move.right}, {"left": move.left_grip, "right": move.right_grip}
        ends = {side: _joints_at(stage.arms[side], goals[side], arms[side]) for side in _SIDES}
        for share in [*_smooth(move.ticks), *[1.0] * move.hold]:
            joints = {side: arms[side] + share * (ends[side] - arms[side]) for side in _SIDES}
            rows.append(np.concatenate([[*joints[side], grips[side]] for side in _SIDES]).astype(np.float32))
            cube.append(stage.cube_pose()[:3])
            stage.step(rows[-1])
            has_succeeded |= stage.is_solved()
        arms = ends
    return Plan(np.array(rows), np.array(cube), has_succeeded)


def _joints_at(arm: InverseKinematics, goal: np.ndarray | None, here: np.ndarray) -> np.ndarray:
    """Of the two ways in which a wrist can reach a pose, the one with less to turn; `here` if there is none."""
    if goal is None or (found := arm.joints(goal, here)) is None:
        return here
    flipped = found.copy()
    flipped[_TWISTS] -= np.pi * np.sign(found[_TWISTS])
    flipped[_WRIST] *= -1
    other = arm.joints(goal, flipped)
    return min([found] if other is None else [found, other], key=lambda joints: np.abs(joints - here).max())


def _smooth(ticks: int) -> np.ndarray:
    """Shares of a way, ending with 1, slow at both ends."""
    time = np.arange(1, ticks + 1) / max(ticks, 1)
    return time**2 * (3 - 2 * time)


# --- hands --------------------------------------------------------------------------------------------------


def hand(
    side: str, gripped: np.ndarray, *, pitch_deg: float, yaw_rad: float = 0.0, roll_deg: float = 0.0
) -> np.ndarray:
    """Pose of a hand that has the point `gripped` between its fingers.

    Args:
        pitch_deg: downwards; 0 = level. yaw_rad: about the vertical. roll_deg: about the hand's own x axis.
    """
    facing = _about(2, 0.0 if side == "left" else np.pi)
    rotation = _about(2, yaw_rad) @ facing @ _about(1, np.deg2rad(pitch_deg)) @ _about(0, np.deg2rad(roll_deg))
    return poses.pose_of(gripped + _TIP_M * rotation[:, 0], rotation)


def _about(axis: int, angle_rad: float) -> np.ndarray:
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    matrix = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def square_yaw(pose: np.ndarray) -> float:
    """How a box is turned about the vertical, to the nearest of its alike sides."""
    rotation = poses.rotation_of(pose)
    yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
    return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)
