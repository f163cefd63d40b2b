"""A scripted expert for LIBERO, served as a policy: relative poses and gripper, under the recipe `pi05_libero`'s keys.

It picks what a goal names and puts it where the goal says, from what only the simulator knows (`facts`). Where the hand
should go is decided anew whenever it is asked; what it is about to do (`Phase`) is remembered per episode.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np

from openpi_client.base_policy import Observation
from openpi_sim.asked import Asked, Episodes
from openpi_sim.libero import grasps
from openpi_sim.libero.grasps import Grasp, Thing
from openpi_sim.libero.observed import Look, check_observation

HORIZON = 10

_STEP_M, _STEP_RAD = 0.05, 0.5  # of the controller, for an action of 1
_GAIN = 2.0
# Shares of an action that are done after one row, measured; the next row begins anew from there.
_RESPONSE, _TURN_RESPONSE = 0.22, 0.13
_NEAR_M, _NEAR_RAD = 0.012, 0.12
_PASSING_M, _PASSING_RAD = 0.025, 0.2  # where it only passes
_OPEN, _CLOSED = -1.0, 1.0
_CLOSE_STEPS, _OPEN_STEPS = 10, 5
_LIFT_M = 0.10
_CLEAR_M = 0.04
_LOST_M = 0.05
_PATIENCE = 70  # steps in one phase, before it is begun again


class Phase(enum.Enum):
    OVER = "over the thing"
    DOWN = "down to it"
    CLOSE = "closing"
    LIFT = "lifting"
    CARRY = "over the destination"
    LOWER = "lowering"
    RELEASE = "opening"
    AWAY = "up again"


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What goes on since `since`; `held` is where the thing is in the hand, as a vector in the world's frame."""

    phase: Phase
    since: int
    thing: str
    attempt: int = 0
    grasp: Grasp | None = None
    held: np.ndarray | None = None

    def to(self, phase: Phase, step: int, **changes: object) -> _Memory:
        return dataclasses.replace(self, phase=phase, since=step, **changes)


class LiberoExpert:
    """See `openpi.envs.world.Expert`. Knows how to put things on and in things; other goals it leaves alone."""

    def __init__(self) -> None:
        self._memories: Episodes[_Memory] = Episodes()
        self._looks: Episodes[Look] = Episodes()

    def infer(self, obs: Observation) -> dict[str, object]:
        """{"actions": float32[10, 7]}.

        Raises:
            ValueError: a key is missing, the state or a picture is not what the simulator says.
        """
        asked = Asked(obs)
        scene = grasps.Scene.of(asked)
        self._looks.put(asked.episode, check_observation(obs, scene, self._looks.get(asked.episode)))
        step = asked.number("step")
        memory = self._memories.get(asked.episode)
        is_letting_go = memory is not None and memory.phase in (Phase.LOWER, Phase.RELEASE, Phase.AWAY)
        goal = scene.goal_of(memory.thing) if memory is not None and is_letting_go else scene.next_goal()
        if goal is None:
            return {"actions": np.tile(np.array([0.0] * 6 + [_OPEN], np.float32), (HORIZON, 1))}
        if memory is None or memory.thing != goal.thing.name:
            memory = _Memory(Phase.OVER, step, goal.thing.name)
        memory = _advanced(memory, scene, goal, step)
        self._memories.put(asked.episode, memory)
        position, rotation, gripper = _wanted(memory, scene, goal)
        return {"actions": rows_towards(scene, position, rotation, gripper)}


def rows_towards(scene: grasps.Scene, position: np.ndarray, rotation: np.ndarray, gripper: float) -> np.ndarray:
    """float32[10, 7] that bring the hand there, as the controller is expected to follow."""
    here, left = scene.hand_position.copy(), grasps.rotation_vector(rotation @ scene.hand_rotation.T)
    rows = []
    for _ in range(HORIZON):
        move = np.clip(_GAIN * (position - here) / _STEP_M, -1, 1)
        turn = np.clip(_GAIN * left / _STEP_RAD, -1, 1)
        here, left = here + _RESPONSE * _STEP_M * move, left - _TURN_RESPONSE * _STEP_RAD * turn
        rows.append([*move, *turn, gripper])
    return np.array(rows, np.float32)


def _advanced(memory: _Memory, scene: grasps.Scene, goal: grasps.Goal, step: int) -> _Memory:
    """The next phase, where this one is done."""
    thing, spent = goal.thing, step - memory.since
    if memory.grasp is None or memory.phase is Phase.OVER:
        memory = dataclasses.replace(memory, grasp=grasps.choose(goal, scene, memory.attempt))
    if memory.held is not None and memory.phase in (Phase.CARRY, Phase.LOWER) and _is_lost(memory, thing, scene):
        return memory.to(Phase.OVER, step, attempt=memory.attempt + 1, held=None)
    position, rotation, _ = _wanted(memory, scene, goal)
    is_there = scene.is_near(position, rotation, _NEAR_M, _NEAR_RAD)
    is_passing = scene.is_near(position, rotation, _PASSING_M, _PASSING_RAD)
    match memory.phase:
        case Phase.OVER if is_passing:
            return memory.to(Phase.DOWN, step)
        case Phase.DOWN if is_there or (spent > 15 and is_passing):
            return memory.to(Phase.CLOSE, step)
        case Phase.DOWN if spent > 25:
            return memory.to(Phase.OVER, step, attempt=memory.attempt + 1)
        case Phase.CLOSE if spent >= _CLOSE_STEPS:
            return memory.to(Phase.LIFT, step, held=thing.position - scene.hand_position)
        case Phase.LIFT if is_passing or spent > 15:
            if _is_lost(memory, thing, scene):
                return memory.to(Phase.OVER, step, attempt=memory.attempt + 1, held=None)
            return memory.to(Phase.CARRY, step, held=thing.position - scene.hand_position)
        case Phase.CARRY if is_passing:
            return memory.to(Phase.LOWER, step)
        case Phase.LOWER if is_there or spent > 25:
            return memory.to(Phase.RELEASE, step)
        case Phase.RELEASE if spent >= _OPEN_STEPS:
            return memory.to(Phase.AWAY, step)
        case Phase.AWAY if spent >= 15:
            return memory.to(Phase.OVER, step, attempt=memory.attempt + 1, held=None)
        case _ if spent > _PATIENCE:
            return memory.to(Phase.OVER, step, attempt=memory.attempt + 1, held=None)
    return memory


def _is_lost(memory: _Memory, thing: Thing, scene: grasps.Scene) -> bool:
    assert memory.held is not None
    return bool(np.linalg.norm(thing.position - scene.hand_position - memory.held) > _LOST_M)


def _wanted(memory: _Memory, scene: grasps.Scene, goal: grasps.Goal) -> tuple[np.ndarray, np.ndarray, float]:
    """Where the hand should be in this phase: position, rotation matrix, gripper."""
    grasp, thing = memory.grasp, goal.thing
    assert grasp is not None
    up = np.array([0.0, 0.0, 1.0])
    match memory.phase:
        case Phase.OVER:
            over = grasp.position + max(_LIFT_M, thing.top + _CLEAR_M - grasp.position[2]) * up
            return scene.within_reach(over, thing.top + _CLEAR_M / 2), grasp.rotation, _OPEN
        case Phase.DOWN:
            return grasp.position, grasp.rotation, _OPEN
        case Phase.CLOSE:
            return grasp.position, grasp.rotation, _CLOSED
        case Phase.LIFT:
            above = scene.within_reach(grasp.position + _LIFT_M * up, grasp.position[2] + _CLEAR_M)
            return above, grasp.rotation, _CLOSED
        case Phase.RELEASE:
            return scene.hand_position, grasp.rotation, _OPEN
        case Phase.AWAY:
            return scene.hand_position + _LIFT_M * up, grasp.rotation, _OPEN
    place = goal.destination.placed(thing) + scene.hand_position - thing.position
    place[2] = goal.destination.rest_height + max(scene.hand_position[2] - thing.bottom, 0.0)
    if memory.phase is Phase.LOWER:
        return place, grasp.rotation, _CLOSED
    height = max(place[2] + _CLEAR_M, grasp.position[2] + _LIFT_M)
    return scene.within_reach(np.array([*place[:2], height]), place[2] + _CLEAR_M / 2), grasp.rotation, _CLOSED
