"""A policy that lives behind a websocket."""

import logging
import socket
import ssl
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple, Type, TypeVar

import websockets.exceptions
from typing_extensions import override

from openpi_client import base_policy, connection, msgpack_numpy, shared_memory, wire_images
from openpi_client.stream import MESSAGE_TOO_BIG, Message, MessageStream, SilenceError, StreamClosed

logger = logging.getLogger(__name__)

# Pause between two attempts to reach a server that is not there yet.
_RETRY_INTERVAL_S = 1.0
# Whoever waits longer is warned, and again every so often: Python shows warnings unless told otherwise.
_FIRST_WARNING_S = 5.0
_WARNING_INTERVAL_S = 30.0
_BEST_JPEG_QUALITY = 95

# Servers give up on a client that leaves a ping unanswered for 20 s.
_ATTEND_INTERVAL_S = 5.0

# What a proxy in front of a starting server answers.
_NOT_READY_STATUSES = (502, 503, 504)

_Self = TypeVar("_Self", bound="WebsocketClientPolicy")


class WebsocketClientPolicy(base_policy.BasePolicy):
    """Sends observations to a policy server and returns what it answers. Safe to use from several threads.

    A server keeps nothing between two requests, so a connection that drops is opened again: a request that
    was under way is sent once more to the new connection.
    """

    def __init__(
        self,
        host: str = "0.0.0.0",
        port: Optional[int] = None,
        api_key: Optional[str] = None,
        *,
        connect_timeout_s: Optional[float] = None,
        request_timeout_s: Optional[float] = None,
        reconnect_timeout_s: float = 60.0,
        resend: bool = True,
        jpeg_quality: Optional[int] = None,
    ) -> None:
        """Blocks until the server is there and ready.

        Args:
            host: a host name or address, or a whole URL that starts with ws:// or wss:// (http:// and https:// mean the
                same).
            port: appended to the host; None for none (a URL that has one, or the default port of its scheme).
            api_key: sent as `Authorization: Api-Key <key>`.
            connect_timeout_s: how long to wait for the server, its model included; None waits without limit.
            request_timeout_s: how long `infer` waits for an answer; None waits without limit. The first
                request to a server that compiles on demand can take minutes.
            reconnect_timeout_s: how long to wait for a server whose connection dropped; 0 never reconnects.
            resend: whether a request that was under way when the connection dropped is sent once more.
            jpeg_quality: 1 to 95: camera images travel as JPEG, a tenth of the bytes, for a slow network; it costs the
                robot about 1 ms for each of 224x224. The policy then sees what compression leaves, so use the quality
                of the training data or better (90). None = as they are; also with servers that take no JPEG.
        Raises:
            TimeoutError: no server, or none that got ready, within `connect_timeout_s`.
            RuntimeError: the server could not load its policy, or has no model of the name asked for.
            websockets.exceptions.InvalidStatus: the server refused the connection; `connection.KeyRefused`: it wants
                an API key, or another one.
            ValueError: an address or `jpeg_quality` that cannot be.
        """
        if jpeg_quality is not None and not 1 <= jpeg_quality <= _BEST_JPEG_QUALITY:
            raise ValueError(f"jpeg_quality is {jpeg_quality}; expected 1 to {_BEST_JPEG_QUALITY}, or None")
        self._uri = connection.uri(host, port)
        self._api_key = api_key
        self._request_timeout_s = request_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._resend = resend
        self._jpeg_quality = jpeg_quality
        self._server_features: FrozenSet[str] = frozenset()
        self._lock = threading.Lock()
        self._shared = shared_memory.SharedArrays()
        # Keeps its buffer between requests: a new one of the size of three images costs up to 0.6 ms of page faults.
        self._packer = msgpack_numpy.Packer(default=self._shared.pack, autoreset=False)
        self._closed = False
        self._stream: Optional[MessageStream] = None
        self._stream, self._server_metadata = self._wait_for_server(connect_timeout_s)
        self._finished = threading.Event()
        attendant = threading.Thread(target=_attend, args=(weakref.ref(self), self._finished), daemon=True)
        attendant.start()

    def get_server_metadata(self) -> Dict:
        """Returns what the server said about its policy when the connection was opened."""
        return self._server_metadata

    @override
    def infer(self, obs: Dict) -> Dict:
        """Returns the server's answer: the policy's result, and `server_timing` in ms. Arrays are read-only.

        Raises:
            RuntimeError: the policy failed; the text holds the server's traceback, and ends with the reason.
                The next call opens a new connection.
            TimeoutError: no answer within `request_timeout_s`. The answer is lost; the next call asks anew.
            ConnectionError: the connection dropped and could not be opened again, or the message is too large for the
                server.
            TypeError, ValueError, OverflowError: the observation is no dict, or holds what cannot be sent.
        """
        if not isinstance(obs, dict):
            raise TypeError(
                f"infer takes one observation, a dict of named values, got {_found(obs)}; several: infer_batch"
            )
        return self._ask(obs)

    def infer_batch(self, observations: Sequence[Dict]) -> List[Dict]:
        """Asks for several worlds at once, which the server's model then runs together.

        Returns:
            for each observation what `infer` returns, without `server_timing`; `{"error": text}` for one that failed.
        Raises:
            NotImplementedError: the server is not one of openpi's.
            RuntimeError, TimeoutError, ConnectionError, TypeError, ValueError, OverflowError: as of `infer`.
        """
        if isinstance(observations, (dict, str, bytes)) or not all(isinstance(obs, dict) for obs in observations):
            raise TypeError(
                f"infer_batch takes a list of observations, dicts of named values, got {_found(observations)}; "
                "one observation: infer"
            )
        if "batch" not in self._server_features:
            raise NotImplementedError(f"{self._uri} takes one observation at a time; call infer for each")
        return self._ask(list(observations))["batch"]

    def _ask(self, content: Any) -> Dict:
        with self._lock:
            answer = self._exchange(content)
            if isinstance(answer, str):
                if answer.startswith("Traceback"):
                    self._drop()  # After a failure of its own the server closes.
                raise RuntimeError(f"Error in inference server:\n{answer}")
            return msgpack_numpy.unpackb(answer)

    def _packed(self, content: Any) -> memoryview:
        """The request for the current connection, in the packer's buffer; to be released before the next."""
        self._packer.reset()
        self._shared.begin_request()
        with msgpack_numpy.named_place(content):
            self._packer.pack(self._compressed(content))
        return self._packer.getbuffer()

    def _compressed(self, content: Any) -> Any:
        """The content with its camera images as JPEG, if that is wanted and the server takes them."""
        if self._jpeg_quality is None or "jpeg" not in self._server_features:
            return content
        return wire_images.with_jpeg(content, self._jpeg_quality)

    @override
    def reset(self) -> None:
        """Nothing to forget: servers keep no state between requests."""

    def close(self) -> None:
        """Closes the connection; further calls of `infer` fail."""
        with self._lock:
            self._closed = True
            self._finished.set()
            self._drop()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        exc_type: Optional[Type[BaseException]],
        exc_value: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()

    def _exchange(self, content: Any) -> Any:
        """Sends a request and returns the answer, over a new connection when the old one is gone."""
        retries = 1 if self._resend and self._reconnect_timeout_s > 0 else 0
        while True:
            stream = self._connection()
            request = self._packed(content)
            try:
                stream.write(request)
                return self._read(stream, self._request_timeout_s, "an answer")
            except SilenceError:
                self._drop()  # Otherwise the late answer would be taken for that of the next request.
                raise TimeoutError(
                    f"{self._uri} gave no answer within {self._request_timeout_s} s (request_timeout_s)"
                ) from None
            except StreamClosed as dropped:
                self._drop()
                if dropped.code == MESSAGE_TOO_BIG:
                    raise ConnectionError(
                        f"{self._uri} does not take a request of this size: {dropped}. Send less, or let the server "
                        "take more (openpi serve --max-message-mib)"
                    ) from dropped
                if retries == 0:
                    raise ConnectionError(f"the connection to {self._uri} dropped: {dropped}") from dropped
                logger.warning("The connection to %s dropped (%s); opening it again", self._uri, dropped)
                retries -= 1
            except BaseException:
                self._drop()  # Interrupted in the middle of a message.
                raise
            finally:
                request.release()

    def _read(self, stream: MessageStream, timeout_s: Optional[float], what: str) -> Message:
        """The next message; warns while it does not come. Raises as `MessageStream.read`."""
        start_s = time.monotonic()
        deadline_s = float("inf") if timeout_s is None else start_s + timeout_s
        warning_s = start_s + _FIRST_WARNING_S
        while True:
            try:
                return stream.read(deadline_s=min(deadline_s, warning_s))
            except SilenceError:
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    raise
                logger.warning("Waiting for %s of %s since %.0f s", what, self._uri, now_s - start_s)
                warning_s = now_s + _WARNING_INTERVAL_S

    def _connection(self) -> MessageStream:
        if self._closed:
            raise ConnectionError(f"this client of {self._uri} was closed")
        self._attend()
        if self._stream is None:
            if self._reconnect_timeout_s <= 0:
                raise ConnectionError(f"the connection to {self._uri} dropped, and reconnect_timeout_s is 0")
            try:
                self._stream, self._server_metadata = self._wait_for_server(self._reconnect_timeout_s)
            except TimeoutError as error:
                raise ConnectionError(str(error)) from error
        return self._stream

    def _attend(self) -> None:
        """Answers the server's pings, and notices when it has left."""
        if self._stream is None:
            return
        try:
            self._stream.attend()
        except StreamClosed as dropped:
            logger.warning("The connection to %s dropped while it was idle (%s)", self._uri, dropped)
            self._drop()

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.hang_up()
        self._stream = None
        self._shared.close()

    def _wait_for_server(self, timeout_s: Optional[float]) -> Tuple[MessageStream, Dict]:
        """Opens a connection and reads the metadata, trying again while there is no server."""
        start_s = time.monotonic()
        deadline_s = float("inf") if timeout_s is None else start_s + timeout_s
        level, next_log_s = logging.INFO, start_s
        while True:
            try:
                return self._connect(deadline_s)
            except Exception as error:
                if not _may_pass(error, is_limited=timeout_s is not None):
                    raise
                now_s = time.monotonic()
                if now_s + _RETRY_INTERVAL_S > deadline_s:
                    reason = str(error) or type(error).__name__
                    raise TimeoutError(
                        f"no policy server at {self._uri} within {timeout_s} s ({reason}); "
                        "is it running, and are host and port right?"
                    ) from error
                if now_s >= next_log_s:
                    waited_s = now_s - start_s
                    logger.log(
                        level, "Waiting for the policy server at %s since %.0f s (%s)", self._uri, waited_s, error
                    )
                    next_log_s = now_s + (_FIRST_WARNING_S if level == logging.INFO else _WARNING_INTERVAL_S)
                    level = logging.WARNING
            time.sleep(_RETRY_INTERVAL_S)

    def _connect(self, deadline_s: float) -> Tuple[MessageStream, Dict]:
        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else {}
        if shared_memory.is_supported():
            headers[connection.FEATURES_HEADER] = shared_memory.FEATURE
        timeout_s = min(connection.HANDSHAKE_TIMEOUT_S, max(0.1, deadline_s - time.monotonic()))
        stream, answered = connection.open_stream(self._uri, headers, timeout_s)
        try:
            self._shared.open(answered.get(shared_memory.HEADER))
            left_s = None if deadline_s == float("inf") else deadline_s - time.monotonic()
            metadata = self._read(stream, left_s, "the model")
            if isinstance(metadata, str):
                raise RuntimeError(f"Error in inference server:\n{metadata}")
            self._server_features = connection.features(answered)
            return stream, msgpack_numpy.unpackb(metadata)
        except BaseException:
            stream.hang_up()
            self._shared.close()
            raise


def _found(value: Any) -> str:
    """A type for people, such as `list of int`."""
    inner = sorted({type(item).__name__ for item in value}) if isinstance(value, (list, tuple)) else []
    return " of ".join([type(value).__name__, *([", ".join(inner)] if inner else [])])


def _attend(policy: "weakref.ref[WebsocketClientPolicy]", finished: threading.Event) -> None:
    """Keeps the connection of a robot that does not ask for anything alive. While it asks, it attends by itself."""
    while not finished.wait(_ATTEND_INTERVAL_S):
        client = policy()
        if client is None:
            return
        if client._lock.acquire(blocking=False):
            try:
                client._attend()
            finally:
                client._lock.release()
        del client


def _may_pass(error: Exception, *, is_limited: bool) -> bool:
    """Whether waiting can help against a failed attempt to connect.

    Without a limit only what a server on its way up explains is waited for; a wrong address should not wait
    for ever. With a limit also what a server or machine on its way down explains.
    """
    if isinstance(error, websockets.exceptions.InvalidStatus):
        return error.response.status_code in _NOT_READY_STATUSES
    if isinstance(error, ConnectionRefusedError):
        return True
    if not is_limited or isinstance(error, (socket.gaierror, ssl.SSLError)):
        return False
    if isinstance(error, websockets.exceptions.InvalidMessage):
        return isinstance(error.__cause__, (EOFError, OSError))
    return isinstance(error, (OSError, EOFError))
