"""The scripted expert: way points for the finger tips, walked at a steady pace, turned into joint targets.

The path is a function of the scene and the goal alone, so its labels are clean even where the executed motion
is disturbed on purpose: the arm strays, the label keeps pointing back to the path, and a policy learns to
recover.
"""

from dataclasses import dataclass

import numpy as np

from openpi_demo.tabletop import arm
from openpi_demo.tabletop.tasks import Goal
from openpi_demo.tabletop.world import BLOCK_HALF_M, PLATE_HEIGHT_M, Scene

STEP_M = 0.035  # per control step of 0.1 s

_HOVER_M = 0.09  # finger tips above the block before the descent
_GRASP_M = BLOCK_HALF_M
_LIFT_M = 0.13
_CARRY_M = 0.12
_RELEASE_M = PLATE_HEIGHT_M + BLOCK_HALF_M + 0.004  # just above rest: not pressed into the plate
_RETREAT_M = 0.11
_POINT_M = 0.05  # finger tips above the table when they show a plate
_LOWEST_TIP_M = 0.016  # disturbed motions stay off the table
_OPEN, _CLOSED = 1.0, 0.0


@dataclass(frozen=True)
class Phase:
    """Go to `tip` (metres) with the gripper at `gripper`, then stay `hold` control steps."""

    name: str
    tip: tuple[float, float, float]
    gripper: float
    hold: int = 0


def phases(scene: Scene, goal: Goal) -> tuple[Phase, ...]:
    """The script for a goal; KeyError when the scene lacks what the goal names."""
    if goal.block is None:
        return _reach(*_centre_of(scene.plates, goal.plate))
    pick = _pick(*_centre_of(scene.blocks, goal.block))
    x, y, _ = pick[-1].tip
    if goal.plate is None:
        return (*pick, Phase("lift", (x, y, _LIFT_M), _CLOSED, hold=4))
    return (*pick, Phase("lift", (x, y, _CARRY_M), _CLOSED), *_release(*_centre_of(scene.plates, goal.plate)))


def _reach(x: float, y: float) -> tuple[Phase, ...]:
    return (
        Phase("reach", (x, y, _CARRY_M), _CLOSED),
        Phase("point", (x, y, _POINT_M), _CLOSED, hold=4),
    )


def _pick(x: float, y: float) -> tuple[Phase, ...]:
    return (
        Phase("reach", (x, y, _HOVER_M), _OPEN),
        Phase("descend", (x, y, _GRASP_M), _OPEN, hold=1),
        Phase("close", (x, y, _GRASP_M), _CLOSED, hold=3),
    )


def _release(x: float, y: float) -> tuple[Phase, ...]:
    return (
        Phase("carry", (x, y, _CARRY_M), _CLOSED, hold=1),
        Phase("lower", (x, y, _RELEASE_M), _CLOSED, hold=1),
        Phase("release", (x, y, _RELEASE_M), _OPEN, hold=2),
        Phase("retreat", (x, y, _RETREAT_M), _OPEN, hold=2),
    )


def plan(scene: Scene, goal: Goal) -> np.ndarray:
    """The whole path, float64[t, 4]: finger tips in metres and gripper, one row per control step."""
    rows = []
    here = np.array(scene.tip)
    for phase in phases(scene, goal):
        target = np.array(phase.tip)
        num_steps = int(np.ceil(np.linalg.norm(target - here) / STEP_M - 1e-9))
        rows += [[*(here + (target - here) * (k + 1) / num_steps), phase.gripper] for k in range(num_steps)]
        rows += [[*target, phase.gripper]] * phase.hold
        here = target
    return np.array(rows)


def actions(path: np.ndarray) -> np.ndarray:
    """Joint targets float32[t, 6] along a path float64[t, 4]."""
    return np.stack([arm.target_for_tip(row[:3], row[3]) for row in path])


def disturbed(path: np.ndarray, rng: np.random.Generator, *, std_m: float = 0.006, memory: float = 0.8) -> np.ndarray:
    """The path with a slowly wandering error on the finger tips: AR(1), `std_m` in the long run."""
    noise = rng.normal(0.0, std_m, (len(path), 3))
    for t in range(1, len(noise)):
        noise[t] = memory * noise[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    tips = path[:, :3] + noise
    tips[:, 2] = np.maximum(tips[:, 2], _LOWEST_TIP_M)
    return np.concatenate([tips, path[:, 3:]], axis=1)


def _centre_of(things: tuple, colour: str | None) -> tuple[float, float]:
    for thing in things:
        if thing.colour == colour:
            return thing.x, thing.y
    found = ", ".join(thing.colour for thing in things) or "none"
    raise KeyError(f"the goal names {colour!r}, which the scene lacks (found: {found}).")
