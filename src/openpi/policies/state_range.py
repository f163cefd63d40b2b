"""Where a robot's state was in the training data: a state far outside has other units, or is of another robot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from openpi.policies.robot_spec import numbered

# Values this many widths of q01..q99 beyond it are another robot, another unit, or a broken sensor.
_FAR_OUTSIDE = 0.5


class StateRange:
    """Where a robot's state was in the training data, and what is far outside."""

    def __init__(self, q01: ArrayLike | None, q99: ArrayLike | None, names: Sequence[str]) -> None:
        """
        Args:
            q01, q99: float[s]; None = unknown, so that nothing is far outside.
            names: of the dimensions of a state; where they are not as many, they are numbered.
        """
        self._low, self._high = (np.array([] if q01 is None or q99 is None else q, np.float64) for q in (q01, q99))
        slack = _FAR_OUTSIDE * (self._high - self._low) + 1e-3
        self._least, self._largest = self._low - slack, self._high + slack
        self._names = names

    def warnings(self, state: np.ndarray) -> list[str]:
        """As of `Contract.range_warnings`."""
        state = np.asarray(state, dtype=np.float64)[..., : len(self._low)]
        far = (state < self._least[: len(state)]) | (state > self._largest[: len(state)])
        if not np.logical_or.reduce(far):
            return []
        names = names_for(self._names, len(state))
        return [
            f"state '{names[i]}': {state[i]:.4g} is far outside the training range "
            f"{self._low[i]:.4g}..{self._high[i]:.4g} (q01..q99); expected the units and the robot of the training data"
            for i in np.flatnonzero(far).tolist()
        ]


def names_for(names: Sequence[str], width: int) -> Sequence[str]:
    """These, if they are as many as a state has dimensions; else numbers."""
    return names if len(names) == width else numbered("state", width)
