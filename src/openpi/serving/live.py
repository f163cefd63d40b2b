"""What is kept of running sessions for the status page: references, and of idle sessions thumbnails. Nothing is
computed while a robot waits.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openpi.policies.drift import Moved
from openpi_client.base_policy import Observation

_KEPT_LATENCIES = 240
# More of an observation is not kept as it is. Three images of 224x224 are 450 kB.
_KEPT_BYTES = 2**20
_KEPT_SIDE = 256
_KEPT_ITEMS = 1000
_SHOWN_OF_RESULT = ("actions",)
_KEPT_WARNINGS = 32


@dataclasses.dataclass(frozen=True)
class Told:
    """A warning, and when it was given last.

    Attributes:
        count: of the answers with it.
    """

    text: str
    last_s: float
    count: int


class Parts(NamedTuple):
    """Where the time of an exchange went, in ms: `prepare`, until the model could have it; `model`, in its batch;
    `wait`, for the model's turn and to be sent.
    """

    prepare: float
    wait: float
    model: float


@dataclasses.dataclass(eq=False)
class LiveSession:
    """One open session.

    Attributes:
        averages: of what was received, beside those of training.
        observation, result: of the last exchange; as the policy takes and gives them.
        previous: actions of the exchange before.
        asked_s: Unix times of the last two requests that were answered.
        told: warnings of this session by subject, the last one last.
        latencies_ms: of the last exchanges, from the message's arrival to the answer; `parts` the same, split up.
    """

    number: int
    protocol: str
    model_id: str
    address: str
    averages: Callable[[], Sequence[Moved]] = tuple
    since_s: float = dataclasses.field(default_factory=time.time)
    num_requests: int = 0
    num_errors: int = 0
    last_error: str = ""
    last_s: float = 0.0
    observation: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    previous: Any = None
    asked_s: tuple[float, float] = (0.0, 0.0)
    told: dict[str, Told] = dataclasses.field(default_factory=dict)
    latencies_ms: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_KEPT_LATENCIES)
    )
    parts: collections.deque[Parts] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_KEPT_LATENCIES)
    )
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # guards `observation` and what follows
    _release: Callable[[], None] | None = None  # of the memory that a large observation holds

    def answered(
        self,
        observations: Sequence[dict],
        results: Sequence[object],
        seconds: float,
        *,
        prepare_s: float = 0.0,
        infer_s: float = 0.0,
        num_bytes: int = 0,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            seconds: from the message's arrival until now; `prepare_s` and `infer_s` of them in preparing and the model.
            num_bytes: of the message, and of all that was made of it.
            release: called once, when nothing of it is held any more; at once if nothing large is.
        """
        self.num_requests += 1
        self.last_s = time.time()
        self.latencies_ms.append(seconds * 1000)
        wait_s = max(0.0, seconds - prepare_s - infer_s)
        self.parts.append(Parts(prepare_s * 1000, wait_s * 1000, infer_s * 1000))
        if not (observations and isinstance(results[-1], dict)):
            release()
            return
        self.asked_s = (self.asked_s[1], self.last_s - seconds)
        self.previous = None if self.result is None else self.result.get("actions")
        self._note(results[-1].get("warnings") or ())
        self.result = {key: results[-1][key] for key in _SHOWN_OF_RESULT if key in results[-1]}
        is_large = num_bytes > _KEPT_BYTES
        self._keep(observations[-1], release if is_large else None)
        if not is_large:
            release()

    def _note(self, warnings: Sequence[object]) -> None:
        if not warnings:
            return
        told = dict(self.told)  # a new one: the page may read the other
        for text in map(str, warnings):
            subject = text.partition(":")[0]
            before = told.pop(subject, None)
            told[subject] = Told(text, self.last_s, 1 if before is None else before.count + 1)
        self.told = dict(list(told.items())[-_KEPT_WARNINGS:])

    def rest(self, idle_s: float) -> bool:
        """Makes a thumbnail of a large observation, if nothing was asked for so long; true if so."""
        with self._lock:
            if self._release is None or self.observation is None or time.time() - self.last_s < idle_s:
                return False
            observation = self.observation
            release, self._release = self._release, None
            self.observation = thumbnail(observation)
        release()
        return True

    def close(self) -> None:
        """Nothing is kept any more."""
        self._keep(None, None)

    def _keep(self, observation: Observation | None, release: Callable[[], None] | None) -> None:
        with self._lock:
            self.observation = observation
            before, self._release = self._release, release
        if before is not None:
            before()

    def failed(self, text: str) -> None:
        self.num_requests += 1
        self.num_errors += 1
        self.last_s = time.time()
        self.last_error = text


def thumbnail(observation: Mapping[str, object]) -> dict[str, object]:
    """An observation to look at: large images with rows and columns left out, nothing else that is large."""
    left = _KEPT_BYTES
    kept: dict[str, Any] = {}
    for key, value in observation.items():
        small = _thumbnail(value)
        left -= _num_bytes(small)
        if small is None or left < 0:
            continue
        kept[key] = small
    return kept


def _thumbnail(value: object) -> object:
    """A copy of its own, so that it does not keep the message; None for what is too large."""
    match value:
        case np.ndarray():
            steps = tuple(slice(None, None, -(-side // _KEPT_SIDE)) for side in value.shape)
            small = value[steps]
            return small.copy() if small.nbytes <= _KEPT_BYTES else None
        case dict() if len(value) <= _KEPT_ITEMS:
            return thumbnail(value)
        case list() | str() | bytes():
            return value if len(value) <= _KEPT_ITEMS and _num_bytes(value) <= _KEPT_BYTES else None
    return value


def _num_bytes(value: object) -> int:
    match value:
        case np.ndarray():
            return value.nbytes
        case dict():
            return sum(_num_bytes(each) for each in value.values())
        case list():
            return sum(_num_bytes(each) for each in value)
        case str() | bytes():
            return len(value)
    return 8
