"""When each step of a chunk is due, and how much of the chunk is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from openpi.codecs.codec import Codec


@dataclasses.dataclass(frozen=True)
class Timing(Codec):
    """Stamps decoded steps, and drops those beyond the horizon.

    Attributes:
        fps: of the training data; step i is due i / fps seconds after the observation.
        horizon_s: steps due at or after it are dropped; None = all are kept.
    """

    fps: float = 15.0
    horizon_s: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; expected a rate above 0")
        if self.horizon_s is not None and not self.horizon_s > 0:
            raise ValueError(f"horizon_s is {self.horizon_s}; expected a time above 0, or None for whole chunks")

    @property
    def served_meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"action_fps": self.fps}
        return meta if self.horizon_s is None else {**meta, "action_horizon_sec": self.horizon_s}

    @property
    def training_meta(self) -> dict[str, Any]:
        return self.served_meta

    def decode(self, output: Any, context: Mapping[str, Any] | None = None) -> Any:
        if isinstance(output, Mapping):
            return {**output, "timestamp": 0.0}
        stamped = ({**step, "timestamp": i / self.fps} for i, step in enumerate(output))
        return [step for step in stamped if self.horizon_s is None or step["timestamp"] < self.horizon_s]
