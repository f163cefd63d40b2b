"""A scripted expert for ALOHA, served as a policy: absolute joint targets under the keys of the recipe `pi0_aloha_sim`.

When it is first asked in an episode, it makes a plan (`planning`) from what only the simulator knows, plays it in a
simulation of its own, and answers from there: row t of the plan belongs to step t. It plans anew when what it is told
is no longer what it played.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openpi_client.base_policy import Observation
from openpi_sim.aloha import planning, ways
from openpi_sim.aloha.config import TRANSFER
from openpi_sim.asked import Asked, Episodes

HORIZON = 50

_STATE_TOLERANCE = 1e-5
_CUBE_TOLERANCE_M = 0.03
_MIN_STEPS_BETWEEN_PLANS = 25  # a plan takes as long to make as some steps to play
_MIN_RED_PIXELS = 4
_RED_TOLERANCE = 0.06  # of the picture's width; fingers hide a part of the cube
_CAMERA = "top"


@dataclass(frozen=True)
class _Plan:
    """From `first_step` on."""

    first_step: int
    made: planning.Plan

    def row_of(self, step: int) -> int:
        return min(step - self.first_step, len(self.made.rows) - 1)


class AlohaExpert:
    """See `openpi.envs.world.Expert`."""

    def __init__(self) -> None:
        self._stage = planning.Stage()
        self._plans: Episodes[_Plan] = Episodes()

    def infer(self, obs: Observation) -> dict[str, object]:
        """{"actions": float32[50, 14]}: what to do from this step on, if nothing comes in between.

        Raises:
            ValueError: a key is missing, the state or the picture is not what the simulator says.
        """
        asked = Asked(obs)
        stage = self._stage
        if asked.text("task") != TRANSFER:
            raise ValueError(f"the expert is asked to do {asked.text('task')!r}; it knows {TRANSFER}")
        qpos, qvel, step = (
            asked.vector("qpos", stage.model.nq),
            asked.vector("qvel", stage.model.nv),
            asked.number("step"),
        )
        check_observation(obs, stage, qpos)
        plan = self._plans.get(asked.episode)
        if plan is None or _has_strayed(plan, step, stage.cube_pose(qpos)[:3]):
            plan = _Plan(step, planning.plan(stage, ways.TRANSFER, qpos, qvel))
            self._plans.put(asked.episode, plan)
        first = plan.row_of(step)
        rows = plan.made.rows[first : first + HORIZON]
        return {"actions": np.concatenate([rows, np.repeat(rows[-1:], HORIZON - len(rows), axis=0)])}


def check_observation(obs: Observation, stage: planning.Stage, qpos: np.ndarray) -> None:
    """
    Raises:
        ValueError: the state is not that of the joints, or what is red is not where the simulator has it.
    """
    state = np.asarray(obs["state"], np.float64)
    expected = planning.robot_state(qpos)
    if state.shape != expected.shape or not np.allclose(state, expected, atol=_STATE_TOLERANCE):
        raise ValueError(f"'state' is {state}; the simulator's joints say {expected}")
    seen = _red_centre(np.asarray(obs["images"]["cam_high"]))
    where = stage.project(qpos, _CAMERA)
    if seen is not None and np.abs(seen - where).max() > _RED_TOLERANCE:
        raise ValueError(
            f"'images/cam_high' has what is red at {seen.round(2)} (right, down; 0 to 1); the simulator has it at "
            f"{where.round(2)}: the picture is turned, mirrored or of another moment, or its colours are swapped"
        )


def _red_centre(image: np.ndarray) -> np.ndarray | None:
    """(right, down) of what is red, 0 to 1 of the picture; None if there is (almost) nothing."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"'images/cam_high' is {image.dtype}{list(image.shape)}; expected uint8[3, n, n]")
    red, green, blue = image.astype(np.int32)
    rows, columns = np.nonzero((red > 90) & (red > 2 * green) & (red > 2 * blue))
    if len(rows) < _MIN_RED_PIXELS:
        return None
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / image.shape[1]


def _has_strayed(plan: _Plan, step: int, cube: np.ndarray) -> bool:
    if 0 <= step - plan.first_step < _MIN_STEPS_BETWEEN_PLANS:
        return False
    expected = plan.made.cube[plan.row_of(step)]
    return step < plan.first_step or bool(np.abs(cube - expected).max() > _CUBE_TOLERANCE_M)
