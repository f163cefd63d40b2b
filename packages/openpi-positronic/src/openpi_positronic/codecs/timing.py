"""When each step of a chunk is due, and how much of the chunk is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from openpi.shared.strict_json import Json
from openpi_client.base_policy import Metadata
from openpi_positronic.codecs.codec import Codec, Decoded, Given

TIMESTAMP = "timestamp"
_HIGHEST_FPS = 1000  # no arm is commanded faster
_LONGEST_S = 86_400  # and no chunk lasts longer


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
        if not _is_within(self.fps, _HIGHEST_FPS):
            raise ValueError(f"fps is {self.fps!r}; expected a rate above 0, and {_HIGHEST_FPS} at most")
        if self.horizon_s is not None and not _is_within(self.horizon_s, _LONGEST_S):
            raise ValueError(
                f"horizon_s is {self.horizon_s!r}; expected seconds, {_LONGEST_S} at most, or None for whole chunks"
            )

    @property
    def served_meta(self) -> dict[str, object]:
        meta: dict[str, Any] = {"action_fps": self.fps}
        return meta if self.horizon_s is None else {**meta, "action_horizon_sec": self.horizon_s}

    @property
    def training_meta(self) -> Json:
        return self.served_meta

    @property
    def parameters(self) -> dict[str, object]:
        return {"fps": self.fps, "horizon_sec": self.horizon_s}

    def with_parameters(self, values: Metadata) -> Codec:
        return Timing(values.get("fps", self.fps), values.get("horizon_sec", self.horizon_s))

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        if isinstance(output, Mapping):
            return {**output, TIMESTAMP: 0.0}
        stamped = ({**step, TIMESTAMP: i / self.fps} for i, step in enumerate(output))
        return [step for step in stamped if self.horizon_s is None or step[TIMESTAMP] < self.horizon_s]


def _is_within(value: object, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most
