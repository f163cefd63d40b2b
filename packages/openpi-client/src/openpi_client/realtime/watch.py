"""Observations that cannot be trusted: cameras whose thread has died, and numbers that are none."""

import hashlib
from typing import Collection, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
from typing_extensions import TypeGuard

from openpi_client.base_policy import Metadata

# Every so manieth row and column of a picture is compared, until they have not changed for this part of the time that
# makes it a frozen one; then all of it, for what is small may move between them.
_STRIDE, _SUSPICIOUS = 8, 0.5
# How much a value of the state must change to count as motion; in rad and m this much is seen by a camera.
_MOTION = 0.01
# What a request may say beside its observation, where None stands for absent: a prompt may be left to the server, too.
OPTIONAL = frozenset(("prompt", "seed", "noise", "trace", "prev_action_chunk", "inference_delay", "execution_horizon"))


class ObservationWatch:
    """Looks at the observations that are to be sent, one after the other."""

    def __init__(self, frozen_after_s: Optional[float], state_keys: Optional[Collection[str]] = None) -> None:
        """
        Args:
            frozen_after_s: how long a picture may stay the same, bit for bit, although the robot has moved; None = for
                ever. (Sensors have noise; a simulator's picture is the same while nothing moves.)
            state_keys: of what says that the robot has moved; None = all vectors, which time may be among.
        """
        self._frozen_after_s, self._state_keys = frozen_after_s, state_keys
        self._seen: Dict[str, _Picture] = {}

    def problems(self, observation: Metadata, now_s: float) -> List[str]:
        """One line for each."""
        leaves = dict(flat(observation))
        vectors = {key: found for key, value in leaves.items() if (found := _vector(value)) is not None}
        missing = {key for key, value in leaves.items() if value is None} - OPTIONAL
        found = [f"camera '{key}' is missing" for key in self._seen if leaves.get(key) is None]
        found += [f"'{key}' is missing" for key in sorted(missing - set(self._seen))]
        found += [f"'{key}' holds NaN or infinity" for key, value in vectors.items() if not np.isfinite(value).all()]
        for key, frozen_s in self._frozen(leaves, vectors, now_s):
            found.append(f"camera '{key}' sends the same picture as {frozen_s:.1f} s ago; the robot has moved")
        return found

    def frozen(self, observation: Metadata, now_s: float) -> List[Tuple[str, float]]:
        """Of `problems` the frozen cameras: key, and for how many seconds."""
        leaves = dict(flat(observation))
        vectors = {key: found for key, value in leaves.items() if (found := _vector(value)) is not None}
        return list(self._frozen(leaves, vectors, now_s))

    def _frozen(self, leaves: Metadata, vectors: Mapping[str, np.ndarray], now_s: float) -> Iterator[Tuple[str, float]]:
        if self._frozen_after_s is None:
            return
        told = [key for key, value in vectors.items() if value.size > 1 or self._state_keys is not None]
        moving = [key for key in told if self._state_keys is None or key in self._state_keys]
        state = np.concatenate([vectors[key] for key in moving] or [np.zeros(0)])
        for key, value in leaves.items():
            if _is_array(value) and value.ndim >= 3:
                frozen_s = self._frozen_s(key, value, state, now_s)
                if frozen_s >= self._frozen_after_s:
                    yield key, frozen_s

    def _frozen_s(self, key: str, picture: np.ndarray, state: np.ndarray, now_s: float) -> float:
        """For how long a picture has been the same, if the state has changed since; else 0."""
        part = digest(picture[..., ::_STRIDE, ::_STRIDE, :])
        seen = self._seen.get(key)
        if seen is None or seen.part != part or seen.state.shape != state.shape:
            self._seen[key] = _Picture(part, b"", state, now_s)
            return 0.0
        if not (np.abs(state - seen.state) > _MOTION).any():
            return 0.0
        assert self._frozen_after_s is not None
        if now_s - seen.since_s < _SUSPICIOUS * self._frozen_after_s:
            return 0.0
        whole = digest(picture)
        if whole != seen.whole:  # From here on all of it is compared.
            self._seen[key] = _Picture(part, whole, state, now_s if seen.whole else seen.since_s)
            return 0.0
        return now_s - seen.since_s


class _Picture(NamedTuple):
    """The last picture of a camera that was another than the one before.

    Attributes:
        part, whole: digests of some pixels and of all; b"" = not taken yet.
        state: when it came.
        since_s: when it came.
    """

    part: bytes
    whole: bytes
    state: np.ndarray
    since_s: float


def digest(pixels: np.ndarray) -> bytes:
    """The same for the same pixels only."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[Tuple[str, object]]:
    """The leaves of nested dicts, with their '/'-joined keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _vector(value: object) -> Optional[np.ndarray]:
    """float64[n] of numbers that are no picture, lists of them included; None for anything else."""
    try:
        found = np.asarray(value) if isinstance(value, (list, tuple, float, int, np.number)) else value
    except ValueError:  # lists of different lengths
        return None
    # Of two axes it may be a picture: depth has holes that are NaN, and noise.
    if not _is_array(found) or not (found.ndim < 2 or (found.ndim == 2 and 1 in found.shape)):
        return None
    return np.ravel(found).astype(np.float64)


def _is_array(value: object) -> TypeGuard[np.ndarray]:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
