"""The table-top arm: dimensions, limits and closed-form inverse kinematics.

Five revolute joints and a parallel gripper, all angles in radians:

    base yaw - shoulder - elbow - wrist pitch - wrist roll - gripper

At zero the arm lies stretched out along +x. Shoulder, elbow and wrist pitch turn in one vertical plane,
positive upwards, so the hand's inclination is the sum of the three; -pi/2 points it straight down. World
frame: origin at the foot of the arm on the table, x away from the arm, y to its left, z up, in metres.
"""

import numpy as np

JOINT_NAMES = ("base_yaw", "shoulder", "elbow", "wrist_pitch", "wrist_roll")
STATE_NAMES = (*JOINT_NAMES, "gripper")
NUM_JOINTS = len(JOINT_NAMES)
STATE_DIM = len(STATE_NAMES)

SHOULDER_HEIGHT_M = 0.10
UPPER_ARM_M = 0.20
FOREARM_M = 0.20
HAND_M = 0.13  # wrist to the point between the finger tips
FINGER_TRAVEL_M = 0.042  # each finger; the open gripper is 84 mm wide

# One row per joint, then the gripper: 0 closed, 1 open.
STATE_LOW = np.array([-1.75, -0.6, -2.9, -2.7, -1.75, 0.0], dtype=np.float32)
STATE_HIGH = np.array([1.75, 2.8, 0.2, 1.0, 1.75, 1.0], dtype=np.float32)

_MAX_REACH_M = UPPER_ARM_M + FOREARM_M - 2e-3  # keeps the elbow off the singularity


def joints_for_tip(tip: np.ndarray) -> np.ndarray:
    """Joint angles that put the finger tips at `tip` with the hand pointing straight down; its fingers close along the
    world's y axis.

    Args:
        tip: [3], metres, world frame. A point out of reach is drawn towards the shoulder.
    Returns:
        float64[5], radians, elbow up.
    """
    x, y, z = tip
    yaw = np.arctan2(y, x)
    radius = np.hypot(x, y)
    height = z + HAND_M - SHOULDER_HEIGHT_M  # of the wrist above the shoulder
    distance = np.hypot(radius, height)
    if distance > _MAX_REACH_M:
        distance = _MAX_REACH_M
    cos_elbow = (distance**2 - UPPER_ARM_M**2 - FOREARM_M**2) / (2 * UPPER_ARM_M * FOREARM_M)
    elbow = -np.arccos(np.clip(cos_elbow, -1.0, 1.0))
    above_line = np.arctan2(FOREARM_M * np.sin(-elbow), UPPER_ARM_M + FOREARM_M * np.cos(elbow))
    shoulder = np.arctan2(height, radius) + above_line
    wrist_pitch = -np.pi / 2 - shoulder - elbow
    return np.array([yaw, shoulder, elbow, wrist_pitch, yaw])


def tip_for_joints(joints: np.ndarray) -> np.ndarray:
    """Position of the point between the finger tips, float64[3] in metres; inverse of `joints_for_tip`."""
    yaw, shoulder, elbow, wrist_pitch = np.asarray(joints, dtype=np.float64)[:4]
    inclinations = np.cumsum([shoulder, elbow, wrist_pitch])
    lengths = np.array([UPPER_ARM_M, FOREARM_M, HAND_M])
    radius = lengths @ np.cos(inclinations)
    height = SHOULDER_HEIGHT_M + lengths @ np.sin(inclinations)
    return np.array([radius * np.cos(yaw), radius * np.sin(yaw), height])


def target_for_tip(tip: np.ndarray, gripper: float) -> np.ndarray:
    """Action float32[6] that sends the finger tips to `tip`; `gripper` is 0 closed, 1 open."""
    return np.append(joints_for_tip(tip), gripper).astype(np.float32)
