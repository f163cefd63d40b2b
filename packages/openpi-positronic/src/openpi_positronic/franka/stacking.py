"""How well the green cube stands on the red one: what is recorded beside the robot's own signals.

Every part is 0 to 1 and falls off softly at its limit, so that near misses can be told from far ones. Source: the
spec, section 6.8.
"""

import numpy as np

from openpi_positronic.franka.world import GREEN, RED, SITE, FrankaWorld

TASK = "Pick up the green cube and place it on the red cube."
SUCCESS = "stacking_success"
SOLVED_SCORE = 0.5  # every part within its limit

_CUBE_HEIGHT_M = 0.02


def scores(world: FrankaWorld) -> dict[str, float]:
    """`box_distance` in metres, `stacking_success`, and the parts that it is the least of."""
    red, green = world.cube_position(RED), world.cube_position(GREEN)
    hand = world.data.site(SITE).xpos
    red_moved = _length(red - world.cube_starts[RED])
    parts = {
        "red_stable": _below(red_moved, 0.04),
        "red_on_table": _below(abs(red[2] - world.cube_starts[RED][2]), 0.05),
        "xy_aligned": _below(_length((green - red)[:2]), 0.04),
        "z_stacked": _below(abs(green[2] - red[2] - _CUBE_HEIGHT_M), 0.02),
        "green_stable": _below(world.cube_speed(GREEN), 0.02),
        "gripper_clear": _soft(0.08, _length(hand - green), 0.04),
    }
    return {
        "box_distance": _length(green - red),
        SUCCESS: min(parts.values()),
        **{f"{SUCCESS}.{name}": value for name, value in parts.items()},
    }


def is_stacked(world: FrankaWorld) -> bool:
    return scores(world)[SUCCESS] >= SOLVED_SCORE


def _length(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))


def _below(value: float, limit: float) -> float:
    return _soft(value, limit, limit / 2)


def _soft(lower: float, upper: float, width: float) -> float:
    """1 where `lower` is well below `upper`, 0.5 where they are equal, 0 where it is well above."""
    return float(np.clip((upper - lower + width / 2) / width, 0.0, 1.0))
