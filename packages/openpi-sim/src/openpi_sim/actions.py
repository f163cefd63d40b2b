"""Actions that a simulator takes: of the right width, and finite."""

from __future__ import annotations

import numpy as np


def checked_action(action: np.ndarray, width: int) -> np.ndarray:
    """float64[width], a new array.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    action = np.array(action, dtype=np.float64)
    if action.shape != (width,):
        raise ValueError(f"the action has the shape {action.shape}; expected ({width},)")
    if not np.isfinite(action).all():
        raise ValueError(f"the action holds values that are not finite: {action}")
    return action
