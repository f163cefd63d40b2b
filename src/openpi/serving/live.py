"""What is kept of running sessions for the status page and the log: references and a few numbers, nothing computed."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

_KEPT_LATENCIES = 240


@dataclasses.dataclass(eq=False)
class LiveSession:
    """One open session.

    Attributes:
        observation, result: of the last exchange; as the policy takes and gives them.
        latencies_ms: of the last exchanges, from the message's arrival to the answer.
    """

    number: int
    protocol: str
    model_id: str
    address: str
    since_s: float = dataclasses.field(default_factory=time.time)
    num_requests: int = 0
    num_errors: int = 0
    last_error: str = ""
    last_s: float = 0.0
    observation: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    latencies_ms: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_KEPT_LATENCIES)
    )

    def answered(self, observations: Sequence[dict], results: Sequence[Any], seconds: float) -> None:
        self.num_requests += 1
        self.last_s = time.time()
        self.latencies_ms.append(seconds * 1000)
        if observations and isinstance(results[-1], dict):
            self.observation, self.result = observations[-1], results[-1]

    def failed(self, text: str) -> None:
        self.num_requests += 1
        self.num_errors += 1
        self.last_s = time.time()
        self.last_error = text
