"""A LIBERO scene as the expert sees it, and where a hand should grip things in it.

A hand's z axis points out of the fingers, which close along its x axis. World frame: z up, metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openpi_sim.asked import Asked

_WIDEST_M = 0.072  # what fits between open fingers, which are 8 cm apart, with room for an error
_FINGER_M = 0.012  # of a finger beyond the point between the fingers
_DEPTH_M = 0.035  # how far below its top a thing is gripped
_RIM_DEPTH_M = 0.015
_WALL_M = 0.004
_DROP_M = 0.01  # of a thing above its rest when it is let go


@dataclass(frozen=True)
class Thing:
    """A box, or a region.

    Attributes:
        rotation: of its box, float64[3, 3].
        position: of what goals judge, its own origin.
        centre: of the box, in the world.
        half: of the box along its own axes.
    """

    name: str
    position: np.ndarray
    rotation: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    is_region: bool

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> Thing:
        """See `facts.look`."""
        values = np.asarray(values, np.float64)
        rotation = values[3:12].reshape(3, 3)
        centre = values[:3] + rotation @ values[12:15]
        return cls(name, values[:3], rotation, centre, np.abs(values[15:18]), bool(values[18]))

    @property
    def half_height(self) -> float:
        return float(np.abs(self.rotation[2]) @ self.half)

    @property
    def top(self) -> float:
        return float(self.centre[2] + self.half_height)

    @property
    def bottom(self) -> float:
        return float(self.centre[2] - self.half_height)

    @property
    def rest_height(self) -> float:
        """Where the bottom of a thing is that is put on or in this one."""
        return self.top + _DROP_M

    def placed(self, thing: Thing) -> np.ndarray:
        """Where the origin of a thing is whose box is over this box, at the height of the thing."""
        middle = self.centre + (thing.position - thing.centre)
        return np.array([*middle[:2], thing.position[2]])

    def sides(self) -> list[tuple[np.ndarray, float]]:
        """The two level axes of the box, unit vectors, and its whole width along them; the narrower one first."""
        upright = int(np.argmax(np.abs(self.rotation[2])))
        found = []
        for axis in (i for i in range(3) if i != upright):
            level = self.rotation[:, axis] * [1, 1, 0]
            found.append((level / max(np.linalg.norm(level), 1e-9), 2 * float(self.half[axis])))
        return sorted(found, key=lambda side: side[1])


@dataclass(frozen=True)
class Goal:
    """Put `thing` on or in `destination`."""

    thing: Thing
    destination: Thing


@dataclass(frozen=True)
class Grasp:
    """Where the hand closes: the point between its fingers, and its rotation matrix."""

    position: np.ndarray
    rotation: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One moment of an episode."""

    hand_position: np.ndarray
    hand_rotation: np.ndarray
    fingers: np.ndarray
    goals: Sequence[Sequence[str]]
    done: Sequence[bool]
    things: dict[str, Thing]
    camera: np.ndarray

    @classmethod
    def of(cls, asked: Asked) -> Scene:
        """
        Raises:
            KeyError, ValueError: what is privileged is not what LIBERO's world sends.
        """
        hand = asked.vector("hand", 12)
        return cls(
            hand[:3],
            hand[3:].reshape(3, 3),
            asked.vector("fingers", 2),
            asked.value("goal"),
            asked.value("done"),
            {name: Thing.of(name, values) for name, values in asked.value("things").items()},
            asked.vector("camera", 13),
        )

    def next_goal(self) -> Goal | None:
        """The first that is not met, if it is of a kind that is known."""
        for predicate, is_done in zip(self.goals, self.done, strict=True):
            if not is_done and len(predicate) == 3 and predicate[0] in ("on", "in"):
                return Goal(self.things[predicate[1]], self.things[predicate[2]])
        return None

    def is_near(self, position: np.ndarray, rotation: np.ndarray, metres: float, radians: float) -> bool:
        turn = rotation_vector(rotation @ self.hand_rotation.T)
        return bool(np.linalg.norm(position - self.hand_position) < metres and np.linalg.norm(turn) < radians)


def choose(thing: Thing, scene: Scene, attempt: int) -> Grasp:
    """How to grip a thing from above; other ways in later attempts."""
    closing = scene.hand_rotation[:, 0] * [1, 1, 0]
    closing /= max(np.linalg.norm(closing), 1e-9)
    fitting = [side for side, width in thing.sides() if width <= _WIDEST_M]
    depth = _DEPTH_M + 0.01 * (attempt % 3)
    if fitting:
        along = max(fitting, key=lambda side: abs(side @ closing)) if attempt % 2 == 0 else fitting[0]
        height = max(thing.top - depth, thing.bottom + _FINGER_M)
        return Grasp(np.array([*thing.centre[:2], height]), facing_down(along if along @ closing >= 0 else -along))
    return _rim(thing, closing, attempt)


def _rim(thing: Thing, closing: np.ndarray, attempt: int) -> Grasp:
    """One finger inside, one outside: at one of four places around."""
    across = np.array([-closing[1], closing[0], 0.0])
    outwards = [closing, -closing, across, -across][attempt % 4]
    radius = min(width for _, width in thing.sides()) / 2 - _WALL_M
    position = thing.centre + radius * outwards
    position[2] = thing.top - _RIM_DEPTH_M
    return Grasp(position, facing_down(outwards if outwards @ closing >= 0 else -outwards))


def facing_down(closing: np.ndarray) -> np.ndarray:
    """Rotation matrix of a hand that points down and closes along a level unit vector."""
    down = np.array([0.0, 0.0, -1.0])
    return np.stack([closing, np.cross(down, closing), down], axis=1)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """float64[3], rad, of a rotation matrix."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    length = np.linalg.norm(axis)
    return np.zeros(3) if length < 1e-9 else axis / length * angle
