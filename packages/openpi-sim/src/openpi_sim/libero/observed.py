"""Whether an observation is what the simulator says: the state, and that the picture from outside is upright."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openpi_client.base_policy import Observation
from openpi_sim.libero.grasps import Scene

_TOLERANCE = 5e-3
_MIN_CHANGE = 12  # of 255, before a pixel has changed
_ARM_WIDTH = 0.08  # of the picture's width, to either side of the line through the joints
_MIN_EVIDENCE = 0.01  # of the picture's pixels
_MIN_ODDS = 2.0
# What may have been done to a picture that is upright: its axes (0: rows, 1: columns) that run backwards.
_WRONG = {(0, 1): "turned by 180 degrees", (0,): "upside down", (1,): "mirrored"}


@dataclass(frozen=True)
class Look:
    """The last picture from outside, gray, and what has been seen since the episode began.

    Attributes:
        arm: which pixels the arm may cover, bool[n, n].
        evidence: shares of the picture that changed where the arm was and the arm in a picture of each wrong kind was
            not, and the other way round; float64[3, 2].
    """

    gray: np.ndarray
    arm: np.ndarray
    evidence: np.ndarray


def check_observation(obs: Observation, scene: Scene, before: Look | None) -> Look:
    """
    Raises:
        ValueError: the state is not that of the simulator, an image has another form, or what moves in the picture is
            where the arm would be if the picture were turned or mirrored, and not where it is.
    """
    _check_state(np.asarray(obs["observation/state"], np.float64), scene)
    for key in ("observation/image", "observation/wrist_image"):
        image = np.asarray(obs[key])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
            raise ValueError(f"'{key}' is {image.dtype}{list(image.shape)}; expected uint8[n, n, 3]")
    gray = np.asarray(obs["observation/image"]).mean(-1)
    return look(gray, _near_line(_projected(scene), gray.shape[0]), before)


def look(gray: np.ndarray, arm: np.ndarray, before: Look | None) -> Look:
    """What is seen with one more picture, float64[n, n], and the arm's pixels bool[n, n] in it if it is upright.

    Raises:
        ValueError: it is not, by all that has been seen.
    """
    if before is None or before.gray.shape != gray.shape:
        return Look(gray, arm, np.zeros((len(_WRONG), 2)))
    changed, expected = np.abs(gray - before.gray) > _MIN_CHANGE, arm | before.arm
    evidence = before.evidence.copy()
    for row, (axes, wrong) in zip(evidence, _WRONG.items(), strict=True):
        otherwise = np.flip(expected, axes)
        row += [(changed & expected & ~otherwise).mean(), (changed & otherwise & ~expected).mean()]
        if row[1] > _MIN_EVIDENCE and row[1] > _MIN_ODDS * row[0]:
            raise ValueError(
                f"'observation/image' is {wrong}: {row[1]:.1%} of it changed where the arm would then be, and "
                f"{row[0]:.1%} where the simulator has it. LIBERO's pictures are sent turned by 180 degrees"
            )
    return Look(gray, arm, evidence)


def _near_line(corners: np.ndarray, size: int) -> np.ndarray:
    """bool[size, size]: which pixels are near the line through corners (right, down), 0 to 1."""
    pixels = np.stack(np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2), axis=-1)[..., None, :]
    start, along = corners[:-1], np.diff(corners, axis=0)
    share = ((pixels - start) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
    nearest = start + np.clip(share, 0, 1)[..., None] * along
    return (np.linalg.norm(pixels - nearest, axis=-1) < _ARM_WIDTH).any(-1)


def _projected(scene: Scene) -> np.ndarray:
    """(right, down) of the arm's joints, 0 to 1, float64[7, 2], in the picture as it is published.

    robosuite's pictures have their first row at the bottom; turned by 180 degrees they are upright, and mirrored.
    """
    position, rotation, fovy = scene.camera[:3], scene.camera[3:12].reshape(3, 3), scene.camera[12]
    right, up, back = ((scene.arm - position) @ rotation).T
    scale = 2 * np.tan(fovy / 2) * -back
    return np.stack([0.5 - right / scale, 0.5 - up / scale], axis=-1)


def _check_state(state: np.ndarray, scene: Scene) -> None:
    if state.shape != (8,):
        raise ValueError(f"'observation/state' has the shape {state.shape}; expected (8,)")
    if not np.allclose(state[:3], scene.hand_position, atol=_TOLERANCE):
        raise ValueError(f"'observation/state' has the hand at {state[:3]}; the simulator at {scene.hand_position}")
    if not np.allclose(state[6:], scene.fingers, atol=_TOLERANCE):
        raise ValueError(f"'observation/state' has fingers at {state[6:]}; the simulator at {scene.fingers}")
