"""Whether an observation is what the simulator says: the state, and that the picture from outside is upright."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from openpi_client.base_policy import Observation
from openpi_sim.libero.grasps import Scene

_TOLERANCE = 5e-3
_MIN_DISTANCE = 0.12  # of the hand from the middle of the picture, before its side can be told; of the picture's width
_MIN_CHANGE = 12  # of 255, before a pixel has changed
_MIN_PIXELS = 30


@dataclass(frozen=True)
class Look:
    """The last picture from outside, gray, and where the hand was in it, (right, down), 0 to 1.

    Attributes:
        known: directions (0: right, 1: down) in which pictures of the episode have moved where the hand was. From then
            on another part of the arm may move more than the hand does.
    """

    gray: np.ndarray
    hand: np.ndarray
    known: frozenset[int] = frozenset()


def check_observation(obs: Observation, scene: Scene, before: Look | None) -> Look:
    """
    Raises:
        ValueError: the state is not that of the simulator, an image has another form, or what moved in the picture is
            on another side of it than the hand: it is turned or mirrored.
    """
    _check_state(np.asarray(obs["observation/state"], np.float64), scene)
    for key in ("observation/image", "observation/wrist_image"):
        image = np.asarray(obs[key])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
            raise ValueError(f"'{key}' is {image.dtype}{list(image.shape)}; expected uint8[n, n, 3]")
    now = Look(np.asarray(obs["observation/image"]).mean(-1), _projected(scene))
    if before is not None and before.gray.shape == now.gray.shape:
        return replace(now, known=before.known | _sides_agreed(before, now))
    return now


def _sides_agreed(before: Look, now: Look) -> frozenset[int]:
    """What changes between two moments is the arm and what it holds, which are on the hand's side of the picture.

    Returns: in which directions that can be told.
    """
    rows, columns = np.nonzero(np.abs(now.gray - before.gray) > _MIN_CHANGE)
    if len(rows) < _MIN_PIXELS or np.linalg.norm(now.hand - before.hand) > _MIN_DISTANCE:
        return frozenset()
    size = now.gray.shape[0]
    moved = (np.array([np.median(columns), np.median(rows)]) + 0.5) / size - 0.5
    hand = (now.hand + before.hand) / 2 - 0.5
    agreed = set()
    for side, name in ((0, "right and left"), (1, "up and down")):
        if abs(hand[side]) <= _MIN_DISTANCE or abs(moved[side]) <= _MIN_DISTANCE:
            continue
        if hand[side] * moved[side] > 0:
            agreed.add(side)
        elif side not in before.known:
            raise ValueError(
                f"'observation/image' moves at {(moved + 0.5).round(2)} (right, down; 0 to 1) where the simulator has "
                f"the hand at {now.hand.round(2)}: {name} are swapped. LIBERO's pictures are turned by 180 degrees"
            )
    return frozenset(agreed)


def _projected(scene: Scene) -> np.ndarray:
    """(right, down) of the hand, 0 to 1, in the picture as it is published.

    robosuite's pictures have their first row at the bottom; turned by 180 degrees they are upright, and mirrored.
    """
    position, rotation, fovy = scene.camera[:3], scene.camera[3:12].reshape(3, 3), scene.camera[12]
    right, up, back = rotation.T @ (scene.hand_position - position)
    scale = 2 * np.tan(fovy / 2) * -back
    return np.array([0.5 - right / scale, 0.5 - up / scale])


def _check_state(state: np.ndarray, scene: Scene) -> None:
    if state.shape != (8,):
        raise ValueError(f"'observation/state' has the shape {state.shape}; expected (8,)")
    if not np.allclose(state[:3], scene.hand_position, atol=_TOLERANCE):
        raise ValueError(f"'observation/state' has the hand at {state[:3]}; the simulator at {scene.hand_position}")
    if not np.allclose(state[6:], scene.fingers, atol=_TOLERANCE):
        raise ValueError(f"'observation/state' has fingers at {state[6:]}; the simulator at {scene.fingers}")
