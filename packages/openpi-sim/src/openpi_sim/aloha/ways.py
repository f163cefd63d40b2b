"""How the cube is handed over: moves of two hands, in variants, the best first, that are tried until one works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from openpi_sim.aloha.planning import CLOSED, OPEN, Move, Stage, Way, hand, square_yaw

_CUBE_HALF_M = 0.02
_ABOVE = np.array([0.0, 0.0, 0.09])
_MEET = np.array([0.0, 0.5, 0.25])
_APART = np.array([0.14, 0.0, 0.0])


def transfer(stage: Stage, *, pitch_deg: float, depth_m: float, patience: int) -> Way:
    """The right hand lifts the cube, the left one takes it from the other side."""
    cube = stage.cube_pose()
    ground = np.array([cube[0], cube[1], _CUBE_HALF_M - depth_m])
    right = partial(hand, "right", pitch_deg=pitch_deg)
    left = partial(hand, "left", pitch_deg=0, roll_deg=90)
    yaw = square_yaw(cube)
    yield Move(40, right=right(ground + _ABOVE, yaw_rad=yaw), left=left(_MEET - _APART))
    yield Move(20, right=right(ground, yaw_rad=yaw), hold=patience)
    yield Move(0, right_grip=CLOSED, hold=12 + patience)
    yield Move(15, right=right(ground + _ABOVE, yaw_rad=yaw), right_grip=CLOSED)
    yield Move(35, right=right(_MEET), right_grip=CLOSED, hold=6 + patience)
    held = stage.cube_pose()  # the arm hangs lower than it was told
    yield Move(10, left=left(held[:3] - _APART), right_grip=CLOSED)
    yield Move(25, left=left(held[:3]), right_grip=CLOSED, hold=patience)
    yield Move(0, left_grip=CLOSED, right_grip=CLOSED, hold=25)
    yield Move(0, left_grip=CLOSED, right_grip=OPEN, hold=12)
    yield Move(25, right=right(_MEET + _APART + 0.5 * _ABOVE), left_grip=CLOSED, hold=10)


TRANSFER: Sequence[Callable[[Stage], Way]] = [
    partial(transfer, pitch_deg=pitch, depth_m=depth, patience=patience)
    for pitch, depth, patience in ((60, 0.0, 4), (60, 0.004, 8), (70, 0.0, 8), (50, 0.0, 8), (60, -0.006, 8))
]
