"""A policy behind Positronic's `/api/v1/session`: raw robot signals go out, robot commands come back.

    connect                     <- {"status": "loading" | "waiting", "message": text}, until the model is there
                                <- {"status": "ready", "meta": {...}}
    observation map             -> {"result": [step, ...]} or {"error": text}

step = {"robot_command": {"type": ..., ...}, "target_grip": float, "timestamp": seconds from the observation}. A
session is one episode; the encoding is that of `msgpack_numpy`.
"""

import logging
from types import TracebackType
from typing import Any, Dict, List, Mapping, Optional, Tuple, Type, TypeVar
from urllib.parse import quote

import numpy as np
import websockets.exceptions
import websockets.sync.client
from PIL import Image

from openpi_client import connection, msgpack_numpy

logger = logging.getLogger(__name__)

SESSION_PATH = "/api/v1/session"

# Servers report progress at least every 5 s while they load.
_SILENCE_S = 30.0

_Self = TypeVar("_Self", bound="PositronicClient")


class PositronicClient:
    """One session per episode: `reset` ends it and opens the next. One instance serves one thread."""

    def __init__(
        self,
        host: str = "localhost",
        port: Optional[int] = 8000,
        *,
        resize: Optional[int] = 640,
        model_id: Optional[str] = None,
        horizon_sec: Optional[float] = None,
        codec: Any = None,
        api_key: Optional[str] = None,
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
        """
        path = SESSION_PATH if model_id is None else f"{SESSION_PATH}/{quote(str(model_id), safe='')}"
        self._uri = connection.uri(host, port) + path
        self._resize = resize
        self._horizon_sec = horizon_sec
        self._codec = codec
        self._api_key = api_key
        self._ws: Optional[websockets.sync.client.ClientConnection] = None
        self._server_meta: Dict[str, Any] = {}

    @property
    def meta(self) -> Dict[str, Any]:
        """What is known of the policy, flat: `type`, and `server.<key>` for what the server says of itself."""
        return {"type": "remote", **dict(_flat("server", self._server_meta))}

    def reset(self) -> None:
        """Ends the session and opens a new one.

        Raises:
            ConnectionError: no server there, or it hung up.
            TimeoutError: it said nothing for 30 s while it loaded.
            RuntimeError: it has no such checkpoint, or could not load it; the text is its own.
        """
        self.close()
        ws = self._connect()
        try:
            self._server_meta = self._wait_until_ready(ws)
        except BaseException:
            connection.hang_up(ws)
            raise
        self._ws = ws

    def infer(self, observation: Mapping[str, Any]) -> List[Dict[str, Any]]:
        """The steps to carry out; none when the policy is done.

        Args:
            observation: raw signals: numbers, vectors, uint8 images [h, w, 3], text.
        Raises:
            RuntimeError: the server could not answer; the session goes on.
            ConnectionError: the connection dropped; `reset` opens another.
        """
        if self._ws is None:
            self.reset()
        sent = observation if self._codec is None else self._codec.encode(observation)
        content = {key: self._shrunk(key, value) for key, value in sent.items()}
        with msgpack_numpy.named_place(content):
            request = msgpack_numpy.packb(content)
        reply = self._exchange(request)
        if "error" in reply:
            raise RuntimeError(f"Server error: {reply['error']}")
        if "result" not in reply:
            raise RuntimeError(f"Server error: an answer with the keys {sorted(reply)}; expected 'result' or 'error'")
        result = reply["result"] if self._codec is None else self._codec.decode(reply["result"], observation)
        steps = [result] if isinstance(result, dict) else list(result)
        if self._horizon_sec is None:
            return steps
        return [step for step in steps if step.get("timestamp", 0.0) < self._horizon_sec]

    def close(self) -> None:
        """Ends the session, if there is one."""
        if self._ws is not None:
            connection.hang_up(self._ws)
        self._ws = None

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _connect(self) -> websockets.sync.client.ClientConnection:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            with connection.explained(self._uri, headers):
                ws = websockets.sync.client.connect(
                    self._uri,
                    sock=connection.open_socket(self._uri, connection.HANDSHAKE_TIMEOUT_S),
                    additional_headers=headers,
                    open_timeout=connection.HANDSHAKE_TIMEOUT_S,
                    **connection.CONNECT_OPTIONS,
                )
        except connection.KeyRefused as error:
            raise ConnectionError(str(error)) from error
        except (OSError, websockets.exceptions.InvalidHandshake, websockets.exceptions.InvalidMessage) as error:
            raise ConnectionError(
                f"no inference server at {self._uri} ({error}); is it running, and are host and port right?"
            ) from error
        connection.set_keepalive(ws.socket)
        return ws

    def _wait_until_ready(self, ws: websockets.sync.client.ClientConnection) -> Dict[str, Any]:
        while True:
            try:
                message = _decoded(ws.recv(_SILENCE_S))
            except TimeoutError:
                raise TimeoutError(f"{self._uri} said nothing for {_SILENCE_S:.0f} s while loading its model") from None
            except websockets.exceptions.ConnectionClosed as closed:
                raise ConnectionError(f"{self._uri} closed the session before it began: {closed}") from closed
            status = message.get("status", "ready" if "meta" in message else None)
            if status == "ready":
                return dict(message.get("meta") or {})
            if status in ("loading", "waiting"):
                logger.info("%s: %s", status, message.get("message", ""))
            elif status == "error":
                raise RuntimeError(f"Server error: {message.get('error', '')}")
            else:
                raise RuntimeError(f"Unexpected server response: {message}")

    def _exchange(self, request: Any) -> Dict[str, Any]:
        assert self._ws is not None
        try:
            self._ws.send(request)
            return _decoded(self._ws.recv())
        except websockets.exceptions.ConnectionClosed as closed:
            self.close()
            raise ConnectionError(f"the session with {self._uri} ended: {closed}") from closed

    def _shrunk(self, key: str, value: Any) -> Any:
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


def _decoded(frame: Any) -> Dict[str, Any]:
    if isinstance(frame, str):
        raise RuntimeError(f"Server error: {frame}")
    message = msgpack_numpy.unpackb(frame)
    if not isinstance(message, dict):
        raise RuntimeError(f"Unexpected server response: a {type(message).__name__}; expected a map")
    return message


def _flat(prefix: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}", inner)
    else:
        yield prefix, value
