"""Positronic's `/api/v1/session` of one connection, without sockets: what came in -> the frames to send.

    server                                   client
      | -- status loading | waiting ---------> |      loading, at least every 5 s while there is no model
      | -- status ready, meta ---------------> |      opening
      | <------------- raw observation (bin) - |      received, through the codec
      | -- result: [step, ...] --------------> |      replied, through the codec
      | -- error: text ----------------------> |      failed; the session lives on
      | -- status error, close 1008 ---------> |      refused: there is no model

Clients do not say which version they speak, so a session is of version 1, which all of them know, unless its address
asks for another (`?protocol_version=3`):

    2   `ready` names a session_id, which every request repeats: {session_id, observation}; the answer has `timing`;
        {session_id, end_session: true} ends the session, and is answered with the same; commands are marked as such:
        {b"__cmd__": {type, ...}}
    3   the same, commands not marked: clients carry out what they make of the result by themselves

Source: the serving specification, section 6.4, and its drift; recorded connections in the golden data. Different from
the recording, as the specification asks: an error always has a text, and a text frame is answered with an error, not
with the end.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi.policies.guards import ObservationError
from openpi.serving import wire
from openpi.serving.errors import UnknownModelError, error_text, is_explained
from openpi.serving.frames import Binary, Close, Frame
from openpi.serving.protocols import Served
from openpi_client import msgpack_numpy
from openpi_client.base_policy import Metadata
from openpi_positronic.codecs.action import COMMAND
from openpi_positronic.codecs.codec import Codec, Step
from openpi_positronic.codecs.timing import TIMESTAMP
from openpi_positronic.session_parameters import SessionParameters

REFUSED_CODE, NORMAL_CODE = 1008, 1000
_WITH_MARKED_COMMANDS = _FIRST_WITH_IDS = 2
_NEWEST_SCHEDULE = 2
_REASON_CHARACTERS = 100
_REASON_BYTES = 123  # what a close frame can hold
_LINGER_S = 1.0


class PositronicSession:
    """See `openpi.serving.protocols.Session`."""

    protocol = "positronic"

    def __init__(
        self, codec: Codec | None = None, parameters: SessionParameters | None = None, *, debug: bool = False
    ) -> None:
        """
        Args:
            codec: raw observation -> the policy's, its actions -> robot commands; None = both as they are.
            parameters: what the client set for this session.
            debug: send the type of an error too.
        Raises:
            ObservationError: a parameter that cannot be.
        """
        self._parameters = parameters or SessionParameters()
        self._codec = self._parameters.applied_to(codec)
        self._version = self._parameters.protocol_version
        self._id = secrets.token_hex(16)
        self._is_ending = False
        self._debug = debug
        self.request: Any = None  # what the last message held, for the log; None = no observation

    def told(self, served: Served) -> dict[str, object]:
        """The `meta`: of the server and the checkpoint, and of this session."""
        where = {"type": "openpi", "host": served.host, "port": served.port}
        return {**where, **served.description, "checkpoint_id": served.model_id, **self.meta}

    def loading(self, status: str, message: str) -> list[Frame]:
        return _frames({"status": status, "message": message})

    def opening(self, metadata: Mapping[str, object], now_s: float) -> list[Frame]:
        version = {} if self._version == 1 else {"protocol_version": self._version}
        named = {"session_id": self._id} if self._version >= _FIRST_WITH_IDS else {}
        return _frames({"status": "ready", **version, **named, "meta": dict(metadata)})

    @property
    def meta(self) -> dict[str, object]:
        """What a client is told of the codec, and of what it set itself.

        `local_stack` is what clients from 0.3 on do with the steps and the images by themselves; they refuse a server
        without.
        """
        served = {} if self._codec is None else self._codec.served_meta
        return {**served, "local_stack": _local_stack(served, self._version), **self._parameters.told(self._codec)}

    def received(self, message: bytes | memoryview | str, decode: wire.Decode = wire.decode) -> list[dict]:
        """One observation; none in a goodbye."""
        if isinstance(message, str):
            raise ValueError("received a text frame; an observation is a binary frame of MessagePack")
        raw = decode(message)
        if not isinstance(raw, dict):
            raise ObservationError(f"received a {type(raw).__name__}; an observation is a map of named values")
        if self._version >= _FIRST_WITH_IDS:
            raw = self._content(raw)
            if raw is None:
                self._is_ending = True
                return []
        self.request = raw
        return [raw if self._codec is None else self._codec.encode(raw)]

    def _content(self, message: Mapping[str, object]) -> dict[str, object] | None:
        """The observation in a message of version 2 or 3; None = the client leaves."""
        if message.get("session_id") != self._id:
            raise ObservationError(
                "a request has not the session_id of this session, which its first message told; open a session for "
                "each connection, and send {session_id, observation}"
            )
        if message.get("end_session"):
            return None
        observation = message.get("observation")
        if not isinstance(observation, dict):
            raise ObservationError(
                f"the observation of a request is a {type(observation).__name__}; expected a map of named values"
            )
        return observation

    def replied(
        self,
        results: Sequence[Mapping[str, object] | Exception],
        infer_s: float,
        prepare_s: float = 0.0,
        served_s: float = 0.0,
    ) -> list[Frame]:
        """The answer to an observation, or to a goodbye.

        Raises:
            ValueError, TypeError: actions that the codec or the wire cannot take; answer with `failed`.
            Exception: the one result is that.
        """
        if self._is_ending:
            return [*_frames({"session_id": self._id, "end_session": True}), Close(NORMAL_CODE, "")]
        [result] = results
        if isinstance(result, Exception):
            raise result
        actions = np.asarray(result["actions"])
        steps = (
            [{"action": row} for row in actions] if self._codec is None else self._codec.decode(actions, self.request)
        )
        warnings = {"warnings": result["warnings"]} if "warnings" in result else {}
        if self._version == 1:
            return _frames({"result": steps, **warnings})
        steps = [_newer(step, self._version == _WITH_MARKED_COMMANDS) for step in steps]
        return _frames({"result": steps, **warnings, "timing": _timing(infer_s, prepare_s, served_s)})

    def sent(self, now_s: float) -> None:
        """This protocol tells no times."""

    def failed(self, error: BaseException, number: str = "", *, is_of_transform: bool = False) -> list[Frame]:
        """The session lives on."""
        text = error_text(error)
        if not is_explained(error):
            text = f"{text} (error {number} in the server's log)" if number else text
            text = f"{type(error).__name__}: {text}" if self._debug else text
        return _frames({"error": text})

    def refused(self, error: BaseException, number: str = "") -> list[Frame]:
        text = error_text(error)
        if isinstance(error, UnknownModelError) and error.requested is not None:
            text = f"Checkpoint not found or invalid ID: {error.requested}."  # as recorded
        reason = text[:_REASON_CHARACTERS].encode()[:_REASON_BYTES].decode(errors="ignore")
        return [*_frames({"status": "error", "error": text}), Close(REFUSED_CODE, reason, linger_s=_LINGER_S)]


def _frames(content: Mapping[str, object]) -> list[Frame]:
    return [Binary(msgpack_numpy.Packer().pack(content))]


def _newer(step: Mapping[str, object], is_marked: bool) -> Step:
    """Without its time: newer clients count the steps, and take whatever else is in one for a command."""
    newer = {key: value for key, value in step.items() if key != TIMESTAMP}
    return {**newer, COMMAND: {b"__cmd__": step[COMMAND]}} if is_marked and COMMAND in step else newer


def _timing(infer_s: float, prepare_s: float, served_s: float) -> dict[str, float]:
    queued_s = max(0.0, served_s - prepare_s - infer_s)
    seconds = {"served": served_s, "decode": prepare_s, "queued": queued_s, "infer": infer_s, "model": infer_s}
    return {f"{name}_ms": 1000 * value for name, value in seconds.items()}


def _local_stack(served: Metadata, version: int) -> dict[str, object]:
    """Steps one after the other, and images of the size that the codec wants."""
    stack = []
    if "action_fps" in served:
        horizon = {"horizon_sec": served["action_horizon_sec"]} if "action_horizon_sec" in served else {}
        schedule = min(version, _NEWEST_SCHEDULE)  # clients take the first only in sessions of the first protocol
        stack.append(
            {"name": "chunked_schedule", "version": schedule, "args": {"fps": served["action_fps"], **horizon}}
        )
    if "image_sizes" in served:
        width, height = served["image_sizes"]
        stack.append({"name": "restrict_image_size", "version": 1, "args": {"width": width, "height": height}})
    return {"seq": stack}
