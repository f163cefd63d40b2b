"""How old an observation may be, and is, when its answer comes."""

import math
import time
from typing import Dict, Mapping, Optional, Union

from typing_extensions import Literal

# Goes on while the machine sleeps, as Python's monotonic clock does not: what was seen before would still be fresh. The
# name of that of macOS stands on Linux for one that stops.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))

# Where the server does not tell how long a chunk lasts. Published ones last 0.5 to 1 s.
_CHUNK_S = 1.0


def now_s() -> float:
    """Seconds that never step back, and that no sleep of the machine stops: what ages are counted in."""
    return time.perf_counter() if _CLOCK is None else time.clock_gettime(_CLOCK)


class StaleAnswerError(TimeoutError):
    """The connection was opened again, and the observation has become too old meanwhile. Ask with a new one."""


class Freshness:
    """Whether an observation is still worth an answer."""

    def __init__(self, max_age_s: Union[float, Literal["chunk"], None]) -> None:
        """
        Args:
            max_age_s: "chunk" = as long as the server's action chunk; None = no limit.
        """
        self._is_chunk = max_age_s == "chunk"
        self._max_age_s = _CHUNK_S if max_age_s == "chunk" else math.inf if max_age_s is None else max_age_s

    def learn(self, metadata: Mapping[str, object]) -> None:
        """Takes the length of a chunk from the server's metadata; those of another server may differ."""
        if self._is_chunk:
            self._max_age_s = chunk_s(metadata) or _CHUNK_S

    def left_s(self, start_s: float) -> float:
        """For how long an observation that came at `start_s` (`now_s`) is fresh; infinity for ever."""
        return max(0.0, start_s + self._max_age_s - now_s())

    def check(self, start_s: float, place: str) -> None:
        """Raises StaleAnswerError when it is not fresh any more."""
        if self.left_s(start_s) <= 0:
            raise StaleAnswerError(
                f"the connection to {place} dropped, and is open again, but the observation is "
                f"{now_s() - start_s:.1f} s old, and answered up to {self._max_age_s:.3g} s (max_age_s): "
                "ask with a new one"
            )


def control_hz(policy: object) -> Optional[float]:
    """Actions per second, if the server of a policy tells."""
    get = getattr(policy, "get_server_metadata", None)
    metadata = None if get is None else get()
    contract = metadata.get("contract") if isinstance(metadata, Mapping) else None
    return _positive(contract.get("control_hz")) if isinstance(contract, Mapping) else None


def chunk_s(metadata: Mapping[str, object]) -> Optional[float]:
    """How long an action chunk lasts, if a server's metadata tell: the contract's horizon / `control_hz`."""
    contract = metadata.get("contract")
    actions = contract.get("actions") if isinstance(contract, Mapping) else None
    if not isinstance(contract, Mapping) or not isinstance(actions, Mapping):
        return None
    horizon, rate_hz = _positive(actions.get("horizon")), _positive(contract.get("control_hz"))
    return None if horizon is None or rate_hz is None else horizon / rate_hz


def with_age(result: Mapping[str, object], start_s: float) -> Dict[str, object]:
    """The result with `obs_age_s`: seconds since `start_s` (`now_s`)."""
    return {**result, "obs_age_s": now_s() - start_s}


def _positive(value: object) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < 1e9 else None
