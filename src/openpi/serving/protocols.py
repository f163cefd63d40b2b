"""What the server speaks: openpi's own protocol, and others by the path that their clients open.

Others are found by the entry point `openpi.protocols`: name -> a function that makes a `ServerProtocol`, with the codec
that `openpi serve --codec` names or None. A protocol has no sockets: messages in, frames out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openpi.serving import wire
from openpi.serving.frames import Frame
from openpi.shared import plugins

ENTRY_POINTS = "openpi.protocols"


@dataclass(frozen=True)
class Served:
    """What a session may tell its client.

    Attributes:
        host, port: of the server.
        model_id: that the session has.
        description: of the catalog, of this model.
        metadata: of the policy, as clients of openpi get it.
    """

    host: str
    port: int
    model_id: str
    description: Mapping[str, Any]
    metadata: Mapping[str, Any]


class Session(Protocol):
    """One connection. Use: `loading` while it has to wait, `opening`, then for every message `received`, `replied` (or
    `failed`), `sent`; or `refused`.

    Attributes:
        protocol: its name, for the status page and metrics.
        request: what the last message held, for the log; None = nothing to log.
    """

    protocol: str
    request: Any

    def told(self, served: Served) -> dict[str, object]:
        """What the client is told at the start; given to `opening`, and logged."""
        ...

    def loading(self, status: str, message: str) -> list[Frame]:
        """What the client waits for; `status` is `loading` or `waiting`."""
        ...

    def opening(self, metadata: Mapping[str, object], now_s: float) -> list[Frame]:
        """The frames that open a session."""
        ...

    def received(self, message: bytes | memoryview | str, decode: wire.Decode = wire.decode) -> list[dict]:
        """The observations in a message, as the policy takes them.

        Args:
            decode: `wire.decode`, with the limits of this session.
        Raises:
            ValueError, TypeError, KeyError, OverflowError: the message holds none; answer with `failed`.
        """
        ...

    def replied(
        self,
        results: Sequence[Mapping[str, object] | Exception],
        infer_s: float,
        prepare_s: float = 0.0,
        served_s: float = 0.0,
    ) -> list[Frame]:
        """The frames that answer the observations.

        Args:
            infer_s: that the model took.
            prepare_s: that decoding and checking took before.
            served_s: since the message came.
        """
        ...

    def sent(self, now_s: float) -> None:
        """The reply has left."""
        ...

    def failed(self, error: BaseException, number: str = "", *, is_of_transform: bool = False) -> list[Frame]:
        """The frames that answer a message that failed.

        Args:
            number: under which the log has it.
            is_of_transform: a transform of the policy raised it for the observation, which no model was asked about.
        """
        ...

    def refused(self, error: BaseException, number: str = "") -> list[Frame]:
        """The frames that end a connection that has no model to talk to."""
        ...


class ServerProtocol(Protocol):
    """One that clients ask for by its path."""

    @property
    def path(self) -> str:
        """`PATH` is for the default model, `PATH/ID` for another."""
        ...

    def session(self, query: str, *, debug: bool) -> Session:
        """One more connection.

        Args:
            query: of the address.
            debug: tell the client more about errors.
        Raises:
            ObservationError: a session cannot be as its client wants it; answer with `refused`.
        """
        ...

    def refused(self, error: BaseException) -> list[Frame]:
        """The frames that end a connection before it is a session."""
        ...


def installed(codec: str | None = None) -> list[ServerProtocol]:
    """Those beside openpi's own.

    Args:
        codec: between a robot's signals and the policy's keys; each protocol looks it up.
    Raises:
        ValueError: a codec is named, and there is no such, or no protocol that could use it.
        OSError, ImportError: the codec's file or module cannot be read.
    """
    names = plugins.names(ENTRY_POINTS)
    if codec is not None and not names:
        hint = plugins.hint(ENTRY_POINTS, "positronic")
        raise ValueError(f"--codec is {codec}, and no protocol that takes one is installed{hint}")
    makers: list[Callable[[str | None], ServerProtocol]] = [plugins.load(ENTRY_POINTS, name) for name in names]
    return [make(codec) for make in makers]
