"""Positronic's `/api/v1/session` of one connection, without sockets: what came in -> the frames to send.

    server                                   client
      | -- status loading | waiting ---------> |      loading, at least every 5 s while there is no model
      | -- status ready, meta ---------------> |      opening
      | <------------- raw observation (bin) - |      received, through the codec
      | -- result: [step, ...] --------------> |      replied, through the codec
      | -- error: text ----------------------> |      failed; the session lives on
      | -- status error, close 1008 ---------> |      refused: there is no model

Source: the serving specification, section 6.4; recorded connections in the golden data. Different from the recording,
as the specification asks: an error always has a text, and a text frame is answered with an error, not with the end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi.codecs.codec import Codec
from openpi.policies.guards import ObservationError
from openpi.serving import wire
from openpi.serving.errors import UnknownModelError, error_text, is_explained
from openpi.serving.frames import Binary, Close, Frame
from openpi_client import msgpack_numpy

REFUSED_CODE = 1008
_REASON_CHARACTERS = 100
_REASON_BYTES = 123  # what a close frame can hold
_LINGER_S = 1.0


class PositronicSession:
    """One connection. Use: `loading` while it has to wait, `opening`, then for every message `received`, `replied` (or
    `failed`); or `refused`.
    """

    protocol = "positronic"

    def __init__(self, codec: Codec | None = None, *, debug: bool = False) -> None:
        """
        Args:
            codec: raw observation -> the policy's, its actions -> robot commands; None = both as they are.
            debug: send the type of an error too.
        """
        self._codec = codec
        self._debug = debug
        self.request: Any = None  # what the last message held, for the log; None = no observation

    def loading(self, status: str, message: str) -> list[Frame]:
        """What the client waits for; `status` is `loading` or `waiting`."""
        return _frames({"status": status, "message": message})

    def opening(self, meta: Mapping[str, Any], now_s: float) -> list[Frame]:
        """The frames that open a session."""
        return _frames({"status": "ready", "meta": dict(meta)})

    def received(self, message: bytes | memoryview | str, decode: wire.Decode = wire.decode) -> list[dict]:
        """The observation in a message, as the policy takes it.

        Args:
            decode: `wire.decode`, with the limits of this session.
        Raises:
            ValueError, TypeError, KeyError, OverflowError: the message is no observation; answer with `failed`.
        """
        if isinstance(message, str):
            raise ValueError("received a text frame; an observation is a binary frame of MessagePack")
        raw = decode(message)
        if not isinstance(raw, dict):
            raise ObservationError(f"received a {type(raw).__name__}; an observation is a map of named values")
        self.request = raw
        return [raw if self._codec is None else self._codec.encode(raw)]

    def replied(self, results: Sequence[Mapping[str, Any] | Exception], infer_s: float) -> list[Frame]:
        """The frames that answer an observation.

        Raises:
            ValueError, TypeError: actions that the codec or the wire cannot take; answer with `failed`.
            Exception: the one result is that.
        """
        [result] = results
        if isinstance(result, Exception):
            raise result
        actions = np.asarray(result["actions"])
        steps = (
            [{"action": row} for row in actions] if self._codec is None else self._codec.decode(actions, self.request)
        )
        warnings = {"warnings": result["warnings"]} if "warnings" in result else {}
        return _frames({"result": steps, **warnings})

    def sent(self, now_s: float) -> None:
        """The reply has left; this protocol tells no times."""

    def failed(self, error: BaseException, number: str = "") -> list[Frame]:
        """The frame that answers a message that failed; the session lives on."""
        text = error_text(error)
        if not is_explained(error):
            text = f"{text} (error {number} in the server's log)" if number else text
            text = f"{type(error).__name__}: {text}" if self._debug else text
        return _frames({"error": text})

    def refused(self, error: BaseException, number: str = "") -> list[Frame]:
        """The frames that end a connection that has no model to talk to."""
        text = error_text(error)
        if isinstance(error, UnknownModelError) and error.requested is not None:
            text = f"Checkpoint not found or invalid ID: {error.requested}."  # as recorded
        reason = text[:_REASON_CHARACTERS].encode()[:_REASON_BYTES].decode(errors="ignore")
        return [*_frames({"status": "error", "error": text}), Close(REFUSED_CODE, reason, linger_s=_LINGER_S)]


def _frames(content: Mapping[str, Any]) -> list[Frame]:
    return [Binary(msgpack_numpy.Packer().pack(content))]
