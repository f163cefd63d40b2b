"""How ALOHA's tasks are done: moves of two hands, in variants that are tried until one works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from openpi.envs.aloha.planning import CLOSED, OPEN, Move, Stage, Way, hand, square_yaw

_CUBE_HALF_M = 0.02
_ABOVE = np.array([0.0, 0.0, 0.09])
_MEET = np.array([0.0, 0.5, 0.25])
_APART = np.array([0.14, 0.0, 0.0])


def ways(task: str) -> Sequence[Callable[[Stage], Way]]:
    """Of `transfer_cube` or `insertion`, the best first."""
    return {"transfer_cube": _TRANSFER, "insertion": _INSERTION}[task]


def transfer(stage: Stage, *, pitch_deg: float, depth_m: float, patience: int) -> Way:
    """The right hand lifts the cube, the left one takes it from the other side."""
    (cube,) = stage.object_poses()
    ground = np.array([cube[0], cube[1], _CUBE_HALF_M - depth_m])
    right = partial(hand, "right", pitch_deg=pitch_deg)
    left = partial(hand, "left", pitch_deg=0, roll_deg=90)
    yaw = square_yaw(cube)
    yield Move(40, right=right(ground + _ABOVE, yaw_rad=yaw), left=left(_MEET - _APART))
    yield Move(20, right=right(ground, yaw_rad=yaw), hold=patience)
    yield Move(0, right_grip=CLOSED, hold=12 + patience)
    yield Move(15, right=right(ground + _ABOVE, yaw_rad=yaw), right_grip=CLOSED)
    yield Move(35, right=right(_MEET), right_grip=CLOSED, hold=6 + patience)
    (held,) = stage.object_poses()  # the arm hangs lower than it was told
    yield Move(10, left=left(held[:3] - _APART), right_grip=CLOSED)
    yield Move(25, left=left(held[:3]), right_grip=CLOSED, hold=patience)
    yield Move(0, left_grip=CLOSED, right_grip=CLOSED, hold=25)
    yield Move(0, left_grip=CLOSED, right_grip=OPEN, hold=12)
    yield Move(25, right=right(_MEET + _APART + 0.5 * _ABOVE), left_grip=CLOSED, hold=10)


_TRANSFER = [
    partial(transfer, pitch_deg=pitch, depth_m=depth, patience=patience)
    for pitch, depth, patience in ((60, 0.0, 4), (60, 0.004, 8), (70, 0.0, 8), (50, 0.0, 8), (60, -0.006, 8))
]


_PEG_HALF_M, _SOCKET_HALF_M, _PIN_HALF_M = 0.06, 0.06, 0.04  # along x
_PEG_Z_M, _SOCKET_Z_M = 0.01, 0.022  # of their centres on the table
_PEG_SPOT, _SOCKET_SPOT = np.array([0.13, 0.5, 0.15]), np.array([-0.07, 0.5, 0.15])


def insertion(stage: Stage, *, pitch_deg: float, off_m: float, patience: int) -> Way:
    """Each hand lifts one; the right one is brought into line with where the socket then is, and pushes."""
    peg, socket = stage.object_poses()
    right = partial(hand, "right", pitch_deg=pitch_deg)
    left = partial(hand, "left", pitch_deg=pitch_deg)
    grip = np.array([off_m, 0.0, 0.0])  # away from the middle, so that the hands do not meet
    peg_grip = np.array([peg[0], peg[1], _PEG_Z_M]) + grip
    socket_grip = np.array([socket[0], socket[1], _SOCKET_Z_M]) - grip
    yaws = (square_yaw(socket, np.pi), square_yaw(peg, np.pi))

    def both(up: np.ndarray, ticks: int, grips: float, hold: int = 0) -> Move:
        poses = left(socket_grip + up, yaw_rad=yaws[0]), right(peg_grip + up, yaw_rad=yaws[1])
        return Move(ticks, *poses, grips, grips, hold)

    yield both(_ABOVE, 40, OPEN)
    yield both(0 * _ABOVE, 20, OPEN, patience)
    yield both(0 * _ABOVE, 0, CLOSED, 14 + patience)
    yield both(_ABOVE, 20, CLOSED)
    spots = left(_SOCKET_SPOT - grip), right(_PEG_SPOT + grip)
    yield Move(35, *spots, CLOSED, CLOSED, 10 + patience)
    shift = np.zeros(3)
    for ticks, gap in ((15, 0.03), (10, 0.01), (30, 0.01 - (_SOCKET_HALF_M - _PIN_HALF_M) - 0.02)):
        peg, socket = stage.object_poses()
        wanted = socket[:3] + np.array([_SOCKET_HALF_M + gap + _PEG_HALF_M, 0, 0])
        shift = shift + wanted - peg[:3]
        yield Move(ticks, spots[0], right(_PEG_SPOT + grip + shift), CLOSED, CLOSED, 6 + patience)


_INSERTION = [
    partial(insertion, pitch_deg=pitch, off_m=off, patience=patience)
    for pitch, off, patience in ((60, 0.015, 2), (60, 0.005, 6), (50, 0.015, 6), (70, 0.015, 6), (60, 0.025, 6))
]
