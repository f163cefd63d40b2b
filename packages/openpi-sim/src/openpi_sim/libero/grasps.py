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
_RIM_DEPTH_M = 0.025
_RIM_ASIDE_M = 0.015  # of the hand from the wall, where one of the fingers has little room, or the arm is stretched
_DROP_M = 0.01  # of a thing above its rest when it is let go
_REST_CLOSING = np.array([0.1, 1.0, 0.0])  # how fingers close at rest; no axis, so that half turns have one sign
_ARM_M = 0.66  # from the shoulder to the wrist; at 0.72 the elbow is straight, and folds to the wrong side
_EASY_ARM_M = 0.63
_HITS_PER_M = 200  # points of the hand that may hit something, to spare the arm a metre of reach
_WRIST_M = (0.088, 0.21)  # of a hand that points down: nearer to the shoulder, and higher
_MARGIN_M = 0.004


def _points(x: Sequence[float], y: Sequence[float], z: Sequence[float]) -> np.ndarray:
    return np.stack(np.meshgrid(x, y, z, indexing="ij"), axis=-1).reshape(-1, 3)


# Points of an open hand in its own frame: both fingers, and what they are fixed to; on its way down as well.
_HAND = np.concatenate(
    [
        _points((-0.06, -0.045, 0.045, 0.06), (-0.01, 0.01), (-0.04, -0.02, 0.0, 0.012)),
        _points((-0.1, -0.075, -0.05, -0.025, 0.0, 0.025, 0.05, 0.075, 0.1), (-0.03, 0.0, 0.03), (-0.06, -0.1)),
    ]
)
_APPROACH = np.concatenate([_HAND - [0.0, 0.0, above] for above in (0.0, 0.03, 0.06)])


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
    arm: np.ndarray
    things: dict[str, Thing]
    parts: dict[str, np.ndarray]
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
            np.asarray(asked.value("arm"), np.float64),
            {name: Thing.of(name, values) for name, values in asked.value("things").items()},
            {name: np.asarray(values, np.float64) for name, values in asked.value("parts").items()},
            asked.vector("camera", 13),
        )

    def next_goal(self) -> Goal | None:
        """The first that is not met, if it is of a kind that is known."""
        for predicate, is_done in zip(self.goals, self.done, strict=True):
            if not is_done and len(predicate) == 3 and predicate[0] in ("on", "in"):
                return Goal(self.things[predicate[1]], self.things[predicate[2]])
        return None

    def goal_of(self, thing: str) -> Goal:
        """Whether it is met or not."""
        destination = next(goal[2] for goal in self.goals if len(goal) == 3 and goal[1] == thing)
        return Goal(self.things[thing], self.things[destination])

    def is_near(self, position: np.ndarray, rotation: np.ndarray, metres: float, radians: float) -> bool:
        turn = rotation_vector(rotation @ self.hand_rotation.T)
        return bool(np.linalg.norm(position - self.hand_position) < metres and np.linalg.norm(turn) < radians)

    def reach(self, position: np.ndarray) -> float:
        """From the shoulder to the wrist, where the hand points down there."""
        level, height = self._wrist(position)
        return float(np.hypot(level, height))

    def within_reach(self, position: np.ndarray, lowest: float) -> np.ndarray:
        """A position of the hand on the way, lower where the arm would be stretched."""
        level, height = self._wrist(position)
        highest = position[2] - height + np.sqrt(max(_ARM_M**2 - level**2, 0.0))
        return np.array([*position[:2], max(min(position[2], highest), lowest)])

    def _wrist(self, position: np.ndarray) -> tuple[float, float]:
        level, height = np.linalg.norm((position - self.arm[0])[:2]), position[2] - self.arm[0, 2]
        return float(level) - _WRIST_M[0], float(height) + _WRIST_M[1]


def choose(goal: Goal, scene: Scene, attempt: int) -> Grasp:
    """How to grip a thing from above: first where the hand has room, and the arm is not stretched here or there."""
    thing = goal.thing
    others = [parts for name, parts in scene.parts.items() if name != thing.name]
    obstacles = np.concatenate([np.zeros((0, 15)), *others])

    def cost(grasp: Grasp) -> float:
        there = goal.destination.placed(thing) + grasp.position - thing.position
        reach = max(scene.reach(grasp.position), scene.reach(there))
        return _num_hits(grasp, obstacles) + _HITS_PER_M * max(round(reach - _EASY_ARM_M, 2), 0.0)

    ways = sorted(_ways(thing), key=cost)
    return ways[attempt % len(ways)]


def _ways(thing: Thing) -> list[Grasp]:
    """The hand turned little comes first."""
    (narrow, width), (long, length) = thing.sides()
    if width <= _WIDEST_M:
        sides = [narrow, long] if length <= _WIDEST_M else [narrow]
        sides.sort(key=lambda side: -abs(side @ _REST_CLOSING))
        middle = [_pinch(thing, side, depth) for depth in (0.0, 0.01, 0.02) for side in sides]
        end = (length / 2 - _FINGER_M) * long
        return [*middle, _pinch(thing, narrow, 0.0, end), _pinch(thing, narrow, 0.0, -end)]
    angles = np.deg2rad([90, 270, 45, 135, 225, 315, 0, 180])
    outwards = [np.array([np.cos(angle), np.sin(angle), 0.0]) for angle in angles]
    return [_rim(thing, way, aside) for aside in (-_RIM_ASIDE_M, _RIM_ASIDE_M) for way in outwards]


def _pinch(thing: Thing, side: np.ndarray, deeper: float, aside: np.ndarray | float = 0.0) -> Grasp:
    """Across the whole thing."""
    position = thing.centre + aside
    position[2] = max(thing.top - _DEPTH_M - deeper, thing.bottom + _FINGER_M)
    return Grasp(position, _turned_little(side))


def _rim(thing: Thing, outwards: np.ndarray, aside: float) -> Grasp:
    """One finger inside, one outside."""
    radius = min(width for _, width in thing.sides()) / 2
    position = thing.centre + (radius + aside) * outwards
    position[2] = max(thing.top - _RIM_DEPTH_M, thing.bottom + _FINGER_M)
    return Grasp(position, _turned_little(outwards))


def _num_hits(grasp: Grasp, obstacles: np.ndarray) -> int:
    """How many points of the hand are within boxes."""
    points = grasp.position + _APPROACH @ grasp.rotation.T
    local = np.einsum("npj,njk->npk", points - obstacles[:, None, :3], obstacles[:, 3:12].reshape(-1, 3, 3))
    return int((np.abs(local) < obstacles[:, None, 12:] + _MARGIN_M).all(-1).any(0).sum())


def _turned_little(closing: np.ndarray) -> np.ndarray:
    return facing_down(closing if closing @ _REST_CLOSING >= 0 else -closing)


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
