"""Observations that cannot be trusted: cameras whose thread has died, and numbers that are none."""

import hashlib
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from openpi_client.base_policy import Metadata

# Every so manieth row and column of a picture is compared.
_STRIDE = 8
# How much a value of the state must change to count as motion; in rad and m this much is seen by a camera.
_MOTION = 0.01


class ObservationWatch:
    """Looks at the observations that are to be sent, one after the other."""

    def __init__(self, frozen_after_s: Optional[float]) -> None:
        """
        Args:
            frozen_after_s: how long a picture may stay the same, bit for bit, although the robot has moved; None = for
                ever. (Sensors have noise; a simulator's picture is the same while nothing moves.)
        """
        self._frozen_after_s = frozen_after_s
        self._seen: Dict[str, Tuple[bytes, np.ndarray, float]] = {}

    def problems(self, observation: Metadata, now_s: float) -> List[str]:
        """One line for each."""
        leaves = dict(flat(observation))
        vectors = {key: value for key, value in leaves.items() if _is_array(value) and value.ndim <= 1}
        # A prompt may be left to the server.
        missing = {key for key, value in leaves.items() if value is None and key != "prompt"}
        found = [f"camera '{key}' is missing" for key in self._seen if leaves.get(key) is None]
        found += [f"'{key}' is missing" for key in sorted(missing - set(self._seen))]
        found += [f"'{key}' holds NaN or infinity" for key, value in vectors.items() if not np.isfinite(value).all()]
        state = np.concatenate([np.ravel(value).astype(np.float64) for value in vectors.values()] or [np.zeros(0)])
        for key, value in leaves.items():
            if _is_array(value) and value.ndim >= 3 and self._frozen_after_s is not None:
                frozen_s = self._frozen_s(key, value, state, now_s)
                if frozen_s >= self._frozen_after_s:
                    found.append(f"camera '{key}' sends the same picture as {frozen_s:.1f} s ago; the robot has moved")
        return found

    def _frozen_s(self, key: str, picture: np.ndarray, state: np.ndarray, now_s: float) -> float:
        """For how long a picture has been the same, if the state has changed since; else 0."""
        part = np.ascontiguousarray(picture[..., ::_STRIDE, ::_STRIDE, :])
        digest = hashlib.blake2b(part.tobytes(), digest_size=16).digest()
        seen = self._seen.get(key)
        if seen is None or seen[0] != digest or seen[1].shape != state.shape:
            self._seen[key] = (digest, state, now_s)
            return 0.0
        has_moved = bool((np.abs(state - seen[1]) > _MOTION).any())
        return now_s - seen[2] if has_moved else 0.0


def flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """The leaves of nested dicts, with their '/'-joined keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
