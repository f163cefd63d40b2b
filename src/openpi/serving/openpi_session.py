"""The openpi protocol of one connection, without sockets: what came in -> the frames to send.

    server                                   client
      | -- metadata (binary) ----------------> |      opening
      | <----------------- observation (bin) - |      received
      | -- result + server_timing (binary) --> |      replied
      |                 ...                    |
      | -- reason (text), close 1011 --------> |      failed, whatever went wrong in an exchange

Clocks stay outside: every time is an argument, in seconds of any monotonic clock.
Source: spec, "openpi websocket protocol"; recorded connection in the golden data.
"""

import dataclasses
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from openpi.models.fast_codec import UndecodableActionsError
from openpi.policies.guards import ObservationError
from openpi.policies.policy import ActionsError
from openpi.shared.errors import MissingKeyError
from openpi_client import msgpack_numpy

ERROR_CODE = 1011
# Clients of the published protocol look at the text frame before this, so the wording is part of the
# protocol.
ERROR_REASON = "Internal server error. Traceback included in previous frame."


@dataclasses.dataclass(frozen=True)
class Binary:
    """A binary frame."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Text:
    """A text frame."""

    text: str


@dataclasses.dataclass(frozen=True)
class Close:
    """The end of the connection, from our side."""

    code: int
    reason: str


Frame = Binary | Text | Close


class OpenpiSession:
    """One connection. Use: `opening`, then for every message `received`, `replied` (or `failed`), `sent`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = dict(metadata)
        self._packer = msgpack_numpy.Packer()
        self._exchange_start_s = 0.0
        self._prev_total_ms: float | None = None

    def opening(self, now_s: float) -> list[Frame]:
        """The frames that open a session."""
        self._exchange_start_s = now_s
        return [Binary(self._packer.pack(self._metadata))]

    def received(self, message: bytes | str) -> dict:
        """The observation in a message; arrays are read-only views of it.

        Raises:
            ValueError, TypeError, KeyError, OverflowError: the message is not an observation; answer with
            `failed`.
        """
        if isinstance(message, str):
            raise ValueError("received a text frame; an observation is a binary frame of MessagePack")
        observation = msgpack_numpy.unpackb(message)
        if not isinstance(observation, dict):
            found = type(observation).__name__
            raise ValueError(f"received a {found}; an observation is a map of named values")
        return observation

    def replied(self, result: Mapping[str, Any], infer_s: float) -> list[Frame]:
        """The frames that answer an observation; `result` is left as it is.

        Raises:
            ValueError, TypeError: a value that the wire cannot carry (bfloat16, JAX array); answer with
            `failed`.
        """
        timing = {"infer_ms": infer_s * 1000}
        if self._prev_total_ms is not None:
            timing["prev_total_ms"] = self._prev_total_ms
        return [Binary(self._packer.pack({**result, "server_timing": timing}))]

    def sent(self, now_s: float) -> None:
        """The reply has left. All the time since the last one counts, the client's thinking included."""
        self._prev_total_ms = (now_s - self._exchange_start_s) * 1000
        self._exchange_start_s = now_s

    def failed(self, error: BaseException) -> list[Frame]:
        """The frames that end the session because an exchange failed. The text ends with the reason.

        What a client can correct by itself, an observation that does not fit, is said without a traceback.
        """
        if is_explained(error):
            text = f"{type(error).__name__}: {error}"
        else:
            text = "".join(traceback.format_exception(type(error), error, _from_policy(error)))
        return [Text(text), Close(ERROR_CODE, ERROR_REASON)]


def is_explained(error: BaseException) -> bool:
    """Whether the message alone says what happened and what to do."""
    return isinstance(error, (ObservationError, MissingKeyError, ActionsError, UndecodableActionsError))


def _from_policy(error: BaseException) -> TracebackType | None:
    """The traceback without the server's own frames, which tell a robot's programmer nothing."""
    frame = error.__traceback__
    while frame and frame.tb_frame.f_globals.get("__name__", "").startswith(__package__):
        frame = frame.tb_next
    return frame or error.__traceback__
