"""The openpi protocol of one connection, without sockets: what came in -> the frames to send.

    server                                   client
      | -- metadata (binary) ----------------> |      opening
      | <----------------- observation (bin) - |      received
      | -- result + server_timing (binary) --> |      replied
      | <--- list of observations (binary) --- |      received: worlds that are stepped together
      | -- batch + server_timing (binary) ---> |      replied, unless all of them failed
      |                 ...                    |
      | -- reason (text) --------------------> |      failed: the observation does not fit, the session lives on
      | -- traceback (text), close 1011 -----> |      failed: anything else

Clocks stay outside: every time is an argument, in seconds of any monotonic clock.
Source: spec, "openpi websocket protocol"; recorded connection in the golden data. Lists are an extension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi.policies.guards import ObservationError
from openpi.policies.request import TRACE
from openpi.serving import wire
from openpi.serving.errors import error_text, is_explained, traceback_text
from openpi.serving.frames import Binary, Close, Frame, Text
from openpi.serving.protocols import Served
from openpi_client import msgpack_numpy

REFUSED_CODE, ERROR_CODE = 1008, 1011
REFUSED_REASON = "Refused. Reason included in previous frame."
# Clients of the published protocol look at the text frame before this, so the wording is part of the
# protocol.
ERROR_REASON = "Internal server error. Traceback included in previous frame."


class OpenpiSession:
    """See `protocols.Session`."""

    protocol = "openpi"

    def __init__(self, *, debug: bool = False) -> None:
        """
        Args:
            debug: send whole tracebacks.
        """
        self._debug = debug
        self._packer = msgpack_numpy.Packer()
        self.request: Any = None  # what the last message held, for the log; None = no observations
        self._exchange_start_s = 0.0
        self._prev_total_ms: float | None = None

    def told(self, served: Served) -> dict[str, object]:
        """The policy's own metadata."""
        return dict(served.metadata)

    def loading(self, status: str, message: str) -> list[Frame]:
        """Nothing: clients of this protocol wait for the metadata, however long."""
        return []

    def opening(self, metadata: Mapping[str, object], now_s: float) -> list[Frame]:
        self._exchange_start_s = now_s
        return [Binary(self._packer.pack(dict(metadata)))]

    def received(self, message: bytes | memoryview | str, decode: wire.Decode = wire.decode) -> list[dict]:
        """One observation, or those of a list. Arrays are read-only views of the message."""
        if isinstance(message, str):
            raise ValueError("received a text frame; an observation is a binary frame of MessagePack")
        content = decode(message)
        observations = content if isinstance(content, list) else [content]
        for observation in observations:
            if not isinstance(observation, dict):
                found = type(observation).__name__
                raise ObservationError(
                    f"received a {found}; an observation is a map of named values, and a message one or a list"
                )
            is_traced = observation.get(TRACE)
            if len(observations) > 1 and isinstance(is_traced, (bool, np.bool_)) and is_traced:
                raise ObservationError(
                    f"'{TRACE}' is asked for in a list; ask for the stages of one observation at a time"
                )
        self.request = content
        return observations

    def replied(
        self,
        results: Sequence[Mapping[str, object] | Exception],
        infer_s: float,
        prepare_s: float = 0.0,
        served_s: float = 0.0,
    ) -> list[Frame]:
        """`results` are left as they are. This protocol tells of the model's time only.

        Raises:
            ValueError, TypeError: a value that the wire cannot carry (bfloat16, JAX array); answer with `failed`.
            Exception: the one result is that, or all of them are.
        """
        timing = {"infer_ms": infer_s * 1000}
        if self._prev_total_ms is not None:
            timing["prev_total_ms"] = self._prev_total_ms
        answer = results[0] if results else {}
        if isinstance(answer, Exception) and all(isinstance(result, Exception) for result in results):
            raise answer  # One is enough where nothing fits.
        if isinstance(self.request, list) or isinstance(answer, Exception):
            answer = {"batch": [_item(result) for result in results]}
        return [Binary(self._packer.pack({**answer, "server_timing": timing}))]

    def sent(self, now_s: float) -> None:
        """All the time since the last one counts, the client's thinking included."""
        self._prev_total_ms = (now_s - self._exchange_start_s) * 1000
        self._exchange_start_s = now_s

    def failed(self, error: BaseException, number: str = "", *, is_of_transform: bool = False) -> list[Frame]:
        """The text ends with the reason.

        What a client can correct by itself, an observation that does not fit, is said without a traceback, and the
        session lives on; so it does when a transform takes no such observation, since the next one may do. Anything
        else ends it, as recorded.
        """
        if is_explained(error):
            return [Text(f"{type(error).__name__}: {error_text(error)}")]
        text = Text(traceback_text(error, number, whole=self._debug))
        return [text] if is_of_transform else [text, Close(ERROR_CODE, ERROR_REASON)]

    def refused(self, error: BaseException, number: str = "") -> list[Frame]:
        if is_explained(error):
            return [Text(f"{type(error).__name__}: {error_text(error)}"), Close(REFUSED_CODE, REFUSED_REASON)]
        return [Text(traceback_text(error, number, whole=self._debug)), Close(ERROR_CODE, ERROR_REASON)]


def _item(result: Mapping[str, object] | Exception) -> Mapping[str, object]:
    return {"error": f"{type(result).__name__}: {error_text(result)}"} if isinstance(result, Exception) else result
