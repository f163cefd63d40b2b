"""What is recorded of a session: values, the same in every form that they are written in."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class SessionInfo:
    """What is known of a session when it begins.

    Attributes:
        start_s: Unix time.
        opening: what the client was told first.
    """

    model: str
    protocol: str
    client: str
    start_s: float
    opening: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whom a recorded session talked to.

    Attributes:
        protocol: `openpi` or `positronic`.
        model: None where the recording does not say.
    """

    protocol: str = "openpi"
    model: str | None = None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A request and its answer.

    Attributes:
        step: counts the session's exchanges from 0; one that was too many to write is counted, too.
        inputs: what the client's message held: an observation, or a list of them.
        outputs: what it got; `{"error": text}` for a request that was refused or failed.
        received_ns, answered_ns: Unix time; None where the form does not keep it.
    """

    step: int
    inputs: Any
    outputs: Any
    received_ns: int | None = None
    answered_ns: int | None = None
