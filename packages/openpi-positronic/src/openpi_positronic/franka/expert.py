"""The scripted expert: puts the green cube on the red one, as commanded poses at a steady rate.

It knows where the cubes are. One plan is made from what is there when it is asked, open loop; asked again it looks
again, so a cube that slipped is fetched once more.
"""

from dataclasses import dataclass

import numpy as np

from openpi_positronic.franka import stacking
from openpi_positronic.franka.world import GREEN, RED, FrankaWorld
from openpi_sim import poses

RATE_HZ = 15.0

_SPEED_M_S = 0.25
_SETTLE_S = 0.2  # at each way point: the arm follows its commands by some 50 ms
_TIP_M = 0.0536  # of the fingers beyond the end effector's frame
_CUBE_HALF_M = 0.01
_GRASP_M = _TIP_M - 0.006  # the frame above a cube's centre when it is gripped
_CLEAR_M = 0.13  # ... before and after
_RELEASE_M = 0.002  # the cube above its rest when it is let go: not pressed on the other
_MAX_TILT_STEP_RAD = 0.08
_OPEN, _CLOSED = 1.0, 0.0
_DOWN = np.diag([1.0, -1.0, -1.0])  # the fingers point down and close along the world's y axis


@dataclass(frozen=True)
class Waypoint:
    """Go to `position` (metres), come to rest, then set the gripper and stay `hold_s` seconds."""

    position: np.ndarray
    grip: float
    hold_s: float = 0.0


def waypoints(red: np.ndarray, green: np.ndarray) -> list[Waypoint]:
    """From where the arm is to the stacked cube, and clear of it; the cubes' centres float64[3]."""
    grasp = green + _up(_GRASP_M)
    place = red + _up(2 * _CUBE_HALF_M + _RELEASE_M + _GRASP_M)
    lift = _up(_CLEAR_M - _GRASP_M)
    return [
        Waypoint(grasp + lift, _OPEN),
        Waypoint(grasp, _CLOSED, 0.4),
        Waypoint(grasp + lift, _CLOSED),
        Waypoint(place + lift, _CLOSED),
        Waypoint(place, _OPEN, 0.4),
        Waypoint(place + lift, _OPEN, 0.3),
    ]


def plan(world: FrankaWorld) -> tuple[np.ndarray, np.ndarray]:
    """Commanded poses float64[n, 7] and grips float64[n], one row per 1 / `RATE_HZ` seconds; empty when it is done."""
    if stacking.is_stacked(world):
        return np.empty((0, 7)), np.empty(0)
    return plan_from(world.ee_pose, world.cube_position(RED), world.cube_position(GREEN))


def plan_from(here: np.ndarray, red: np.ndarray, green: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `plan`, from the pose of the end effector, float64[7], and the cubes' centres, float64[3]."""
    grip = _OPEN
    rows: list[np.ndarray] = []
    grips: list[float] = []
    for point in waypoints(red, green):
        target = poses.pose_of(point.position, _DOWN)
        path = _straight(here, target)
        rows += path
        grips += [grip] * len(path)
        for held_grip, seconds in ((grip, _SETTLE_S), (point.grip, point.hold_s)):
            rows += [target] * round(seconds * RATE_HZ)
            grips += [held_grip] * round(seconds * RATE_HZ)
        here, grip = target, point.grip
    return np.array(rows), np.array(grips)


def _straight(start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
    """Poses from after `start` to `end`, at speed; a turn is spread over the way."""
    between = poses.difference(end, start)
    count = max(
        np.linalg.norm(between[:3]) * RATE_HZ / _SPEED_M_S, np.linalg.norm(between[3:]) / _MAX_TILT_STEP_RAD, 1.0
    )
    shares = np.arange(1, int(np.ceil(count)) + 1) / int(np.ceil(count))
    # Quaternions q and -q are one rotation; the way between those with the same sign is the short one.
    last = end[3:] if end[3:] @ start[3:] >= 0 else -end[3:]
    return [np.concatenate([start[:3] + s * between[:3], _unit(start[3:] + s * (last - start[3:]))]) for s in shares]


def _up(height_m: float) -> np.ndarray:
    return np.array([0.0, 0.0, height_m])


def _unit(quaternion: np.ndarray) -> np.ndarray:
    return quaternion / np.linalg.norm(quaternion)
