"""How a chunk is made to continue the one that a robot is still playing (real-time chunking, RTC). No JAX here.

    tick                  0      d           n            H
    chunk being played    |------|-----------|
                           frozen  overlap
    new chunk             |------|-----------|------------|

While a chunk is inferred, its first d rows are played from the old one (frozen); up to row n, the end of what is left
of the old one, it should not depart from it without need (overlap). Sources: arXiv 2506.07339 (guided at inference),
arXiv 2512.05964 (trained).

In training, half of the samples have no delay d, and the others 1 to `rtc_max_delay`, all alike. Clean actions tell so
much of what follows that a model which nearly always has some learns to go on from them and not to look at the pictures
(decision 18).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

Mode = Literal["guided", "trained"]
Schedule = Literal["exp", "linear", "ones", "zeros"]
Jacobian = Literal["vjp", "identity"]

_CHOICES = (
    ("mode", (None, *get_args(Mode))),
    ("schedule", get_args(Schedule)),
    ("jacobian", get_args(Jacobian)),
)


@dataclasses.dataclass(frozen=True)
class RtcConfig:
    """What does not change from request to request.

    Attributes:
        mode: `guided` works with every flow model; `trained` needs one that was trained with delays
            (`Pi0Config.rtc_max_delay`), keeps the frozen rows exactly, and asks nothing of the overlap. None = a policy
            takes what its model was trained for; a model takes `guided`.
        schedule: of `prefix_weights`; guided only.
        clip: largest weight of the guidance. None = the number of flow steps: with less the frozen rows drift, with
            more it overshoots.
        jacobian: of the predicted chunk by the noisy one: `vjp` as in the paper, one backward pass of the action expert
            per flow step; `identity` takes it for 1, which costs nothing.
    """

    mode: Mode | None = None
    schedule: Schedule = "exp"
    clip: float | None = None
    jacobian: Jacobian = "vjp"

    def __post_init__(self) -> None:
        for field, choices in _CHOICES:
            if getattr(self, field) not in choices:
                expected = ", ".join(map(str, choices))
                raise ValueError(
                    f"{field} of real-time chunking is {getattr(self, field)!r}; expected one of {expected}"
                )
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip of real-time chunking is {self.clip}; expected a positive number")

    @property
    def is_trained(self) -> bool:
        return self.mode == "trained"

    @property
    def needs_gradients(self) -> bool:
        """Whether the velocity is differentiated."""
        return not self.is_trained and self.jacobian == "vjp"


DEFAULT_RTC = RtcConfig()


def prefix_weights(start: int, end: int, total: int, schedule: Schedule) -> np.ndarray:
    """How much each row of a chunk is bound to the chunk before, f32[total] in [0, 1].

    Args:
        start: rows that are frozen: weight 1 (at most `end` of them).
        end: of the overlap: weight 0 from there on. Between, `exp` and `linear` fall, `ones` and `zeros` stay.
        total: rows of a chunk.
    """
    start = min(start, end)
    row = np.arange(total)
    falling = np.clip((start - 1 - row) / (end - start + 1) + 1, 0.0, 1.0)
    weights = {
        "linear": falling,
        "exp": falling * np.expm1(falling) / (np.e - 1),
        "ones": np.ones(total),
        "zeros": (row < start).astype(float),
    }[schedule]
    return np.where(row < end, weights, 0.0).astype(np.float32)
