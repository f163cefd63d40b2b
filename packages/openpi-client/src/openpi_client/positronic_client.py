"""A policy behind Positronic's `/api/v1/session`: raw robot signals go out, robot commands come back.

    connect                     <- {"status": "loading" | "waiting", "message": text}, until the model is there
                                <- {"status": "ready", "meta": {...}}
    observation map             -> {"result": [step, ...]} or {"error": text}

step = {"robot_command": {"type": ..., ...}, "target_grip": float, "timestamp": seconds from the observation}. A
session is one episode; the encoding is that of `msgpack_numpy`.
"""

import logging
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, TypeVar, Union
from urllib.parse import quote

import numpy as np
import websockets.exceptions
from PIL import Image
from typing_extensions import Literal, Protocol

from openpi_client import connection, msgpack_numpy
from openpi_client.base_policy import Metadata, Reply
from openpi_client.channel import GOODBYE_S, Channel
from openpi_client.deadline import Deadline, check_seconds
from openpi_client.finite import check_finite
from openpi_client.stream import DEFAULT_MAX_MESSAGE_BYTES, Message, SilenceError, StreamClosed

logger = logging.getLogger(__name__)

SESSION_PATH = "/api/v1/session"

# Servers report progress at least every 5 s while they load.
_SILENCE_S = 30.0
# For an answer, in a session that had one.
_REQUEST_TIMEOUT_S = 60.0

_Self = TypeVar("_Self", bound="PositronicClient")


class Codec(Protocol):
    """Raw signals to what the server takes, and its answer back; `openpi_positronic.codecs` has them."""

    def encode(self, raw: Mapping[str, object]) -> Dict[str, object]: ...

    def decode(self, output: Any, context: Optional[Mapping[str, object]] = None) -> Any: ...


class PositronicClient:
    """One session per episode: `reset` ends it and opens the next. One instance serves one thread; any may close it."""

    def __init__(
        self,
        host: str = "localhost",
        port: Optional[int] = 8000,
        *,
        resize: Optional[int] = 640,
        model_id: Optional[str] = None,
        horizon_sec: Optional[float] = None,
        codec: Optional[Codec] = None,
        api_key: Optional[str] = None,
        connect_timeout_s: Optional[float] = None,
        request_timeout_s: Union[float, Literal["default"], None] = "default",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Connects on the first `reset` or `infer`.

        Args:
            host: a name or address, or a URL that starts with ws:// or wss:// (http:// and https:// mean the same).
            port: appended to the host; None for none.
            resize: images are shrunk to fit a square of this size where the server names none; None leaves them.
            model_id: which checkpoint to ask for; None = the server's default.
            horizon_sec: steps due at or after it are dropped; None keeps what the server sends.
            codec: has `encode` and `decode`, for a server without a codec of its own.
            api_key: sent as `Authorization: Bearer <key>`.
            connect_timeout_s: how long `reset` takes at most; None: as long as the server reports that it loads, every
                30 s at least.
            request_timeout_s: for sending an observation and receiving the answer. None waits without limit.
                "default": 60 s, and no limit for the first answer of a session.
            max_message_bytes: of an answer; a larger one ends the session.
        Raises:
            ValueError: an address, a key, or a number of seconds that cannot be.
        """
        path = SESSION_PATH if model_id is None else f"{SESSION_PATH}/{quote(str(model_id), safe='')}"
        self._uri, self._headers = connection.authorized(connection.uri(host, port) + path, "Bearer", api_key)
        self._resize = resize
        self._horizon_sec = horizon_sec
        self._codec = codec
        check_seconds("connect_timeout_s", connect_timeout_s)
        check_seconds("request_timeout_s", request_timeout_s, "default")
        self._connect_timeout_s = connect_timeout_s
        self._request_timeout_s: Union[float, Literal["default"], None] = request_timeout_s
        self._max_message_bytes = max_message_bytes
        self._has_answered = False  # in this session
        self._channel: Optional[Channel] = None  # of the session
        self._server_meta: Dict[str, Any] = {}

    @property
    def meta(self) -> Dict[str, object]:
        """What is known of the policy, flat: `type`, and `server.<key>` for what the server says of itself."""
        return {"type": "remote", **dict(_flat("server", self._server_meta))}

    def reset(self) -> None:
        """Ends the session and opens a new one.

        Raises:
            ConnectionError: no server there, or it hung up.
            TimeoutError: it said nothing for 30 s while it loaded, or was not ready within `connect_timeout_s`.
            RuntimeError: it has no such checkpoint, or could not load it; the text is its own.
        """
        limit = Deadline(self._connect_timeout_s)
        if self._channel is not None:
            self._channel.close(limit.sooner(GOODBYE_S).left_s())
        channel = self._channel = Channel(self._uri)
        limit.stop = channel.closed
        try:
            with channel.lock:
                self._open(channel, limit)
        except BaseException:
            self._abandon(channel)
            raise

    def infer(self, observation: Metadata) -> List[Reply]:
        """The steps to carry out; none when the policy is done.

        Args:
            observation: raw signals: numbers, vectors, uint8 images [h, w, 3], text.
        Raises:
            RuntimeError: the server could not answer; the session goes on.
            ConnectionError: the connection dropped; `reset` opens another. Another thread closed the client.
            TimeoutError: no answer within `request_timeout_s`, which ends the session.
            ValueError: the answer is damaged, would unpack to more than answers hold, or has steps that are none or not
                finite.
        """
        if self._channel is None:
            self.reset()
        sent = observation if self._codec is None else self._codec.encode(observation)
        content = {key: self._shrunk(key, value) for key, value in sent.items()}
        with msgpack_numpy.named_place(content):
            request = msgpack_numpy.packb(content)
        reply = _decoded(self._exchange(request))
        if "error" in reply:
            raise RuntimeError(f"Server error: {reply['error']}")
        if "result" not in reply:
            raise RuntimeError(f"Server error: an answer with the keys {sorted(reply)}; expected 'result' or 'error'")
        check_finite(reply["result"], "result")
        result = reply["result"] if self._codec is None else self._codec.decode(reply["result"], observation)
        steps = [result] if isinstance(result, dict) else result
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise ValueError(f"{self._uri} answered with {reply['result']!r:.200}; expected steps, a list of maps")
        if self._horizon_sec is None:
            return steps
        return [step for step in steps if _is_due(step, self._horizon_sec)]

    def close(self) -> None:
        """Ends the session, if there is one; a thread that waits in `reset` or `infer` fails at once."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, channel: Channel, deadline: Deadline) -> None:
        try:
            stream, _ = connection.open_stream(
                self._uri,
                self._headers,
                deadline.sooner(connection.HANDSHAKE_TIMEOUT_S),
                max_message_bytes=self._max_message_bytes,
            )
        except connection.KeyRefused as error:
            raise ConnectionError(str(error)) from error
        except (OSError, websockets.exceptions.InvalidHandshake, websockets.exceptions.InvalidMessage) as error:
            channel.check()
            raise ConnectionError(
                f"no inference server at {self._uri} ({error}); is it running, and are host and port right?"
            ) from error
        channel.use(stream)
        self._has_answered = False
        self._server_meta = self._wait_until_ready(channel, deadline)

    def _wait_until_ready(self, channel: Channel, deadline: Deadline) -> Reply:
        while True:
            message = _decoded(self._greeting(channel, deadline))
            status = message.get("status", "ready" if "meta" in message else None)
            if status == "ready":
                return dict(_checked_meta(message.get("meta") or {}))
            if status in ("loading", "waiting"):
                logger.info("%s: %.200r", status, message.get("message", ""))
            elif status == "error":
                raise RuntimeError(f"Server error: {message.get('error', '')}")
            else:
                raise RuntimeError(f"Unexpected server response: {message!r:.200}")

    def _greeting(self, channel: Channel, deadline: Deadline) -> Message:
        try:
            return channel.open_stream().read(min(_SILENCE_S, deadline.left_s()))
        except SilenceError:
            if deadline.is_over():
                raise TimeoutError(
                    f"{self._uri} was not ready within {deadline.timeout_s:g} s (connect_timeout_s)"
                ) from None
            raise TimeoutError(f"{self._uri} said nothing for {_SILENCE_S:.0f} s while loading its model") from None
        except StreamClosed as closed:
            channel.check()
            raise ConnectionError(f"{self._uri} closed the session before it began: {closed}") from closed

    def _exchange(self, request: Any) -> Message:
        """Sends an observation and returns the answer; without one, the session is over."""
        channel = self._channel
        if channel is None:
            raise ConnectionError(f"this client of {self._uri} was closed")
        limit_s = self._request_timeout_s
        if limit_s == "default":
            limit_s = _REQUEST_TIMEOUT_S if self._has_answered else None
        deadline = Deadline(limit_s)
        try:
            with channel.lock:
                channel.check()
                channel.attend()
                stream = channel.open_stream()
                stream.write(request, timeout_s=deadline.left_s())
                answer = stream.read(deadline.left_s())
        except BaseException as error:
            was_closed = channel.closed.is_set()
            self._abandon(channel)  # The late answer would be taken for that of the next request.
            if not isinstance(error, (SilenceError, StreamClosed)):
                raise
            if was_closed:
                raise ConnectionError(f"this client of {self._uri} was closed") from None
            if deadline.is_over():
                raise TimeoutError(
                    f"{self._uri} gave no answer within {deadline.timeout_s:g} s (request_timeout_s)"
                ) from None
            raise ConnectionError(f"the session with {self._uri} ended: {error}") from error
        self._has_answered = True
        return answer

    def _abandon(self, channel: Channel) -> None:
        channel.close(goodbye_s=0.0)
        if self._channel is channel:
            self._channel = None

    def _shrunk(self, key: str, value: object) -> object:
        """An image made to fit what the server wants, aspect kept; never enlarged."""
        if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[-1] != 3:
            return value
        target = self._target(key)
        if target is None:
            return value
        height, width = value.shape[:2]
        scale = min(1.0, target[0] / width, target[1] / height)
        if scale == 1.0:
            return value
        size = max(1, int(width * scale)), max(1, int(height * scale))
        return np.asarray(Image.fromarray(value).resize(size, resample=Image.Resampling.BILINEAR))

    def _target(self, key: str) -> Optional[Tuple[int, int]]:
        """(width, height)."""
        sizes = self._server_meta.get("image_sizes")
        wanted = sizes.get(key) if isinstance(sizes, Mapping) else sizes
        if wanted:
            return wanted[0], wanted[1]
        return None if self._resize is None else (self._resize, self._resize)


def _decoded(frame: Message) -> Reply:
    if isinstance(frame, str):
        raise RuntimeError(f"Server error: {frame}")
    message = msgpack_numpy.unpackb(frame)
    if not isinstance(message, dict):
        raise RuntimeError(f"Unexpected server response: a {type(message).__name__}; expected a map")
    return message


def _checked_meta(meta: object) -> Metadata:
    sizes = meta.get("image_sizes") if isinstance(meta, dict) else None
    wanted = list(sizes.values()) if isinstance(sizes, Mapping) else [sizes]
    if not isinstance(meta, dict) or not all(size is None or _is_size(size) for size in wanted):
        raise RuntimeError(
            f"Unexpected server response: its meta is {meta!r:.200}; expected a map, its image_sizes [width, height]"
        )
    return meta


def _is_size(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(isinstance(side, (int, np.integer)) and side > 0 for side in value)


def _is_due(step: Mapping[str, object], horizon_sec: float) -> bool:
    timestamp = step.get("timestamp", 0.0)
    if not isinstance(timestamp, (int, float)):
        raise ValueError(f"a step has the timestamp {timestamp!r:.80}; expected seconds")
    return timestamp < horizon_sec


def _flat(prefix: str, value: object) -> Iterator[Tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    else:
        yield prefix, value
