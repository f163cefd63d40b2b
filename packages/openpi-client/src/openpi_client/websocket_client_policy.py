"""A policy that lives behind a websocket."""

import logging
import socket
import ssl
import time
from typing import Dict, FrozenSet, List, Mapping, Optional, Sequence, TypeVar, Union

import websockets.exceptions
from typing_extensions import Literal, override

from openpi_client import base_policy, connection, msgpack_numpy, wire_images
from openpi_client.channel import GOODBYE_S, Channel
from openpi_client.deadline import Deadline, check_seconds
from openpi_client.finite import check_finite
from openpi_client.freshness import Freshness, StaleAnswerError, now_s, with_age
from openpi_client.stream import (
    DEFAULT_MAX_MESSAGE_BYTES,
    MESSAGE_TOO_BIG,
    Message,
    MessageRefused,
    SilenceError,
    StreamClosed,
)

__all__ = ["OtherPolicyError", "StaleAnswerError", "WebsocketClientPolicy"]

logger = logging.getLogger(__name__)

# Pause between two attempts to reach a server that is not there yet.
_RETRY_INTERVAL_S = 1.0
# Whoever waits longer is warned, and again every so often: Python shows warnings unless told otherwise.
_FIRST_WARNING_S = 5.0
_WARNING_INTERVAL_S = 30.0
_BEST_JPEG_QUALITY = 95
# For an answer to one observation, by a server that has answered before, so that all is compiled.
_REQUEST_TIMEOUT_S = 60.0

# What a proxy in front of a starting server answers.
_NOT_READY_STATUSES = (502, 503, 504)

_Self = TypeVar("_Self", bound="WebsocketClientPolicy")


class OtherPolicyError(ConnectionError):
    """The server that came back has another policy: whoever asks it must look at what it says of itself first."""


class WebsocketClientPolicy(base_policy.BasePolicy):
    """Sends observations to a policy server and returns what it answers. Safe to use from several threads.

    A server keeps nothing between two requests, so a connection that drops is opened again: a request that
    was under way is sent once more to the new connection, unless its observation is too old by then. A server whose
    contract is for another robot when it is back (other names, units or kinds of state and actions, another rate) is
    not asked: OtherPolicyError.
    """

    def __init__(
        self,
        host: str = "0.0.0.0",
        port: Optional[int] = None,
        api_key: Optional[str] = None,
        *,
        connect_timeout_s: Optional[float] = None,
        request_timeout_s: Union[float, Literal["default"], None] = "default",
        reconnect_timeout_s: float = 60.0,
        resend: bool = True,
        max_age_s: Union[float, Literal["chunk"], None] = "chunk",
        jpeg_quality: Optional[int] = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Blocks until the server is there and ready.

        Args:
            host: a host name or address, or a whole URL that starts with ws:// or wss:// (http:// and https:// mean the
                same).
            port: appended to the host; None for none (a URL that has one, or the default port of its scheme).
            api_key: sent as `Authorization: Api-Key <key>`.
            connect_timeout_s: how long to wait for the server, its model included; None waits without limit.
            request_timeout_s: how long `infer` takes at most, whatever happens: other threads' turns, connecting again,
                sending and receiving included. None waits without limit. "default": 60 s from when a request is sent
                (`infer_batch`: for each observation), but no limit for the first one on a connection, since some
                servers compile then.
            reconnect_timeout_s: how long to wait for a server whose connection dropped; 0 never reconnects.
            resend: whether a request that was under way when the connection dropped is sent once more.
            max_age_s: an observation that is older when the connection has been opened again, or when the answer comes
                then, raises StaleAnswerError: the world has moved on. "chunk": as long as an action chunk lasts, if
                the server's metadata tell (the contract's horizon / `control_hz`), else 1 s. None = any age: the world
                waits, as a simulated one may, and the server does not mind when it asks.
            jpeg_quality: 1 to 95: camera images travel as JPEG, a tenth of the bytes, for a slow network; it costs the
                robot about 1 ms for each of 224x224. The policy then sees what compression leaves, so use the quality
                of the training data or better (90). None = as they are; also with servers that take no JPEG.
            max_message_bytes: of an answer; a larger one ends the connection.
        Raises:
            TimeoutError: no server, or none that got ready, within `connect_timeout_s`.
            RuntimeError: the server could not load its policy, or has no model of the name asked for.
            websockets.exceptions.InvalidStatus: the server refused the connection; `connection.KeyRefused`: it wants
                an API key, or another one.
            ValueError: an address, a key, a number of seconds, or `jpeg_quality` that cannot be.
        """
        if jpeg_quality is not None and not 1 <= jpeg_quality <= _BEST_JPEG_QUALITY:
            raise ValueError(f"jpeg_quality is {jpeg_quality}; expected 1 to {_BEST_JPEG_QUALITY}, or None")
        check_seconds("connect_timeout_s", connect_timeout_s)
        check_seconds("reconnect_timeout_s", reconnect_timeout_s)
        check_seconds("request_timeout_s", request_timeout_s, "default")
        check_seconds("max_age_s", max_age_s, "chunk")
        self._uri, self._headers = connection.authorized(connection.uri(host, port), "Api-Key", api_key)
        self._request_timeout_s: Union[float, Literal["default"], None] = request_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._resend = resend
        self._jpeg_quality = jpeg_quality
        self._max_message_bytes = max_message_bytes
        self._freshness = Freshness(max_age_s)
        self._is_untimed = max_age_s is None
        self._server_features: FrozenSet[str] = frozenset()
        self._server_metadata: Optional[Dict] = None
        self._has_answered = False  # on this connection
        # Keeps its buffer between requests: a new one of the size of three images costs up to 0.6 ms of page faults.
        self._packer = msgpack_numpy.Packer(autoreset=False)
        self._channel = Channel(self._uri)
        try:
            with self._channel.lock:
                self._wait_for_server(Deadline(connect_timeout_s, self._channel.closed))
        except BaseException:
            self._channel.close()
            raise

    def get_server_metadata(self) -> Dict:
        """Returns what the server said about its policy when the connection was opened."""
        return self._server_metadata or {}

    @property
    def server_features(self) -> FrozenSet[str]:
        """What the server offers beyond the published protocol, such as `batch`; empty = it is not one of openpi's."""
        return self._server_features

    @override
    def infer(self, obs: Dict) -> Dict:
        """Returns the server's answer: the policy's result, `server_timing` in ms, and `obs_age_s`, the seconds from
        this call to its return. Arrays are read-only.

        Raises:
            RuntimeError: the policy failed; the text holds the server's traceback, and ends with the reason.
                The next call opens a new connection.
            TimeoutError: no answer within `request_timeout_s`. The answer is lost; the next call asks anew.
            StaleAnswerError: a TimeoutError; the connection dropped, and the observation was older than `max_age_s`
                when it was open again, or when the answer came then. The next call uses the new connection.
            ConnectionError: the connection dropped and could not be opened again; the client was closed, by another
                thread maybe; or the message is too large for the server.
            ValueError: the answer is damaged, would unpack to more than answers hold, or its actions are not finite.
            TypeError, ValueError, OverflowError: the observation is no dict, or holds what cannot be sent.
        """
        if not isinstance(obs, Mapping):
            raise TypeError(
                f"infer takes one observation, a dict of named values, got {_found(obs)}; several: infer_batch"
            )
        start_s = now_s()
        result = self._ask(obs, 1, start_s)
        check_finite(result.get("actions"), "actions")
        return with_age(result, start_s)

    def infer_batch(self, observations: Sequence[Dict]) -> List[Dict]:
        """Asks for several worlds at once, which the server's model then runs together.

        Returns:
            for each observation what `infer` returns, without `server_timing`; `{"error": text}` for one that failed.
        Raises:
            NotImplementedError: the server is not one of openpi's.
            RuntimeError, TimeoutError, ConnectionError, TypeError, ValueError, OverflowError: as of `infer`.
        """
        if isinstance(observations, (Mapping, str, bytes)) or not all(isinstance(obs, Mapping) for obs in observations):
            raise TypeError(
                f"infer_batch takes a list of observations, dicts of named values, got {_found(observations)}; "
                "one observation: infer"
            )
        if "batch" not in self._server_features:
            raise NotImplementedError(f"{self._uri} takes one observation at a time; call infer for each")
        start_s = now_s()
        results = self._ask(list(observations), len(observations), start_s).get("batch")
        if not isinstance(results, list) or [type(result) for result in results] != [dict] * len(observations):
            raise ValueError(f"{self._uri} did not answer {len(observations)} observations with as many results")
        for number, result in enumerate(results):
            check_finite(result.get("actions"), f"actions of observation {number}")
        return [result if "error" in result else with_age(result, start_s) for result in results]

    @override
    def reset(self) -> None:
        """Nothing to forget: servers keep no state between requests."""

    def close(self) -> None:
        """Closes the connection. Further calls of `infer` fail, and so does one that waits in another thread."""
        self._channel.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Asking

    def _ask(self, content: object, num_observations: int, start_s: float) -> Dict:
        """The answer to one observation or to several, which came at `start_s`."""
        limit_s = None if self._request_timeout_s == "default" else self._request_timeout_s
        deadline = Deadline(limit_s, self._channel.closed)
        try:
            deadline.acquire(self._channel.lock)
        except (SilenceError, ConnectionAbortedError) as error:
            self._channel.check()
            raise self._timeout(deadline) from error
        try:
            answer = self._exchange(content, num_observations, start_s, deadline)
            if isinstance(answer, str):
                if answer.startswith("Traceback"):
                    # After a failure of its own the server closes.
                    self._channel.drop(deadline.sooner(GOODBYE_S).left_s())
                raise RuntimeError(f"Error in inference server:\n{answer}")
        finally:
            self._channel.lock.release()
        return self._unpacked(answer)

    def _exchange(self, content: object, num_observations: int, start_s: float, deadline: Deadline) -> Message:
        """Sends a request and returns the answer, over a new connection when the old one is gone."""
        may_resend = self._resend and self._reconnect_timeout_s > 0
        was_new = False
        while True:
            was_new = self._ensure_connection(deadline) or was_new
            limit = fresh = self._answer_deadline(num_observations, deadline)
            if was_new:
                self._freshness.check(start_s, self._uri)
                fresh = limit.sooner(self._freshness.left_s(start_s))
            try:
                return self._send_and_receive(content, fresh)
            except StreamClosed as dropped:
                self._channel.drop()
                self._channel.check()
                if fresh.is_over():
                    if was_new:
                        self._freshness.check(start_s, self._uri)
                    raise self._timeout(limit) from None
                self._check_may_resend(dropped, may_resend=may_resend)
                logger.warning("The connection to %s dropped (%s); opening it again", self._uri, dropped)
                may_resend = False

    def _answer_deadline(self, num_observations: int, deadline: Deadline) -> Deadline:
        if self._request_timeout_s == "default" and self._has_answered:
            return Deadline(_REQUEST_TIMEOUT_S * max(1, num_observations))
        return deadline

    def _send_and_receive(self, content: object, deadline: Deadline) -> Message:
        """Raises StreamClosed when there is no answer, also because the deadline is over."""
        stream = self._channel.open_stream()
        request = self._packed(content)
        try:
            stream.write(request, timeout_s=deadline.left_s())
            answer = self._read(deadline, "an answer")
        except SilenceError as error:
            # The connection is over: the late answer would be taken for that of the next request.
            raise StreamClosed(1006, str(error)) from None
        except StreamClosed:
            raise
        except BaseException:
            self._channel.drop()  # Interrupted in the middle of a message.
            raise
        finally:
            request.release()
        self._has_answered = True
        return answer

    def _check_may_resend(self, dropped: StreamClosed, *, may_resend: bool) -> None:
        if isinstance(dropped, MessageRefused):
            raise ConnectionError(f"the answer of {self._uri} was refused: {dropped}") from dropped
        if dropped.code == MESSAGE_TOO_BIG:
            raise ConnectionError(
                f"{self._uri} does not take a request of this size: {dropped}. Send less, or let the server "
                "take more (openpi serve --max-message-mib)"
            ) from dropped
        if not may_resend:
            raise ConnectionError(f"the connection to {self._uri} dropped: {dropped}") from dropped

    def _packed(self, content: object) -> memoryview:
        """The request for the current connection, in the packer's buffer; to be released before the next."""
        self._packer.reset()
        with msgpack_numpy.named_place(content):
            self._packer.pack(self._compressed(content))
        return self._packer.getbuffer()

    def _compressed(self, content: object) -> object:
        """The content with its camera images as JPEG, if that is wanted and the server takes them."""
        if self._jpeg_quality is None or "jpeg" not in self._server_features:
            return content
        return wire_images.with_jpeg(content, self._jpeg_quality)

    def _read(self, deadline: Deadline, what: str) -> Message:
        """The next message; warns while it does not come. Raises as `MessageStream.read`."""
        stream = self._channel.open_stream()
        start_s, warning = time.monotonic(), Deadline(_FIRST_WARNING_S)
        while True:
            try:
                return stream.read(min(deadline.left_s(), warning.left_s()))
            except SilenceError:
                if deadline.is_over():
                    raise
                waited_s = time.monotonic() - start_s
                logger.warning("Waiting for %s of %s since %.0f s", what, self._uri, waited_s)
                warning = Deadline(_WARNING_INTERVAL_S)

    def _unpacked(self, message: Message) -> Dict:
        content = msgpack_numpy.unpackb(message)
        if not isinstance(content, dict):
            raise ValueError(f"{self._uri} sent a {_found(content)}; expected a map of named values")
        return content

    def _timeout(self, deadline: Deadline) -> TimeoutError:
        return TimeoutError(f"{self._uri} gave no answer within {deadline.timeout_s:g} s (request_timeout_s)")

    # Connecting

    def _ensure_connection(self, deadline: Deadline) -> bool:
        """Opens the connection when there is none; returns whether it did."""
        self._channel.check()
        self._channel.attend()
        if self._channel.stream is not None:
            return False
        if self._reconnect_timeout_s <= 0:
            raise ConnectionError(f"the connection to {self._uri} dropped, and reconnect_timeout_s is 0")
        try:
            self._wait_for_server(deadline.sooner(self._reconnect_timeout_s))
        except TimeoutError as error:
            if deadline.is_over():
                raise self._timeout(deadline) from error
            raise ConnectionError(str(error)) from error
        return True

    def _wait_for_server(self, deadline: Deadline) -> None:
        """Opens a connection and reads the metadata, trying again while there is no server."""
        start_s = next_log_s = time.monotonic()
        level, reason = logging.INFO, ""
        while True:
            try:
                return self._connect(deadline)
            except Exception as error:
                self._channel.check()
                if not _may_pass(error, is_limited=deadline.is_limited()):
                    raise
                now_s = time.monotonic()
                if not reason or type(error) is not SilenceError:  # one cut short tells nothing
                    reason = str(error) or type(error).__name__
                if deadline.left_s() < _RETRY_INTERVAL_S:
                    fix = "is it running, and are host and port right?"
                    raise TimeoutError(
                        f"no policy server at {self._uri} within {deadline.timeout_s:.3g} s ({reason}); "
                        + ("its log says what it does" if isinstance(error, _NoModelError) else fix)
                    ) from error
                if now_s >= next_log_s:
                    waited_s = now_s - start_s
                    logger.log(
                        level, "Waiting for the policy server at %s since %.0f s (%s)", self._uri, waited_s, error
                    )
                    next_log_s = now_s + (_FIRST_WARNING_S if level == logging.INFO else _WARNING_INTERVAL_S)
                    level = logging.WARNING
            self._channel.closed.wait(_RETRY_INTERVAL_S)

    def _connect(self, deadline: Deadline) -> None:
        headers = self._headers
        if self._is_untimed:
            headers = {**headers, connection.FEATURES_HEADER: connection.UNTIMED}
        handshake = deadline.sooner(connection.HANDSHAKE_TIMEOUT_S)
        stream, answered = connection.open_stream(
            self._uri, headers, handshake, max_message_bytes=self._max_message_bytes
        )
        self._channel.use(stream)
        self._has_answered = False
        try:
            try:
                metadata = self._read(deadline, "the model")
            except SilenceError as silence:
                raise _NoModelError("it is there, and its model is not ready") from silence
            if isinstance(metadata, str):
                raise RuntimeError(f"Error in inference server:\n{metadata}")
            told, before = self._unpacked(metadata), self._server_metadata
            if before is not None and (changed := _changed_for_a_robot(before, told)):
                raise OtherPolicyError(
                    f"{self._uri} has a policy for another robot now (was it restarted with another checkpoint?): what "
                    f"its contract says of {', '.join(changed)} has changed. Start anew, with a new client"
                )
            self._server_metadata = told
            self._server_features = connection.features(answered)
            self._freshness.learn(told)
        except BaseException:
            self._channel.drop()
            raise


class _NoModelError(SilenceError):
    """A server has taken the connection, and said nothing of its policy in time."""


# What a robot's program goes by; limits, horizons and statistics may be another checkpoint's.
_FACTS = {"state": ("key", "names", "units"), "actions": ("names", "units", "kind", "hold")}


def _changed_for_a_robot(before: Mapping[str, object], now: Mapping[str, object]) -> List[str]:
    """In what a contract is for another robot than the one before; nothing where one of the two has none."""
    told = [metadata.get("contract") for metadata in (before, now)]
    contracts = [contract for contract in told if isinstance(contract, Mapping)]
    if len(contracts) < len(told):
        return []
    old, new = ({**_robot_facts(contract), "control_hz": contract.get("control_hz")} for contract in contracts)
    return sorted(key for key in old if old[key] != new[key])


def _robot_facts(contract: Mapping[str, object]) -> Dict[str, object]:
    facts = {}
    for key, names in _FACTS.items():
        told = contract.get(key)
        vectors = told if isinstance(told, (list, tuple)) else [told]
        facts[key] = [[vector.get(name) for name in names] for vector in vectors if isinstance(vector, Mapping)]
    return facts


def _found(value: object) -> str:
    """A type for people, such as `list of int`."""
    inner = sorted({type(item).__name__ for item in value}) if isinstance(value, (list, tuple)) else []
    return " of ".join([type(value).__name__, *([", ".join(inner)] if inner else [])])


def _may_pass(error: Exception, *, is_limited: bool) -> bool:
    """Whether waiting can help against a failed attempt to connect.

    Without a limit only what a server on its way up explains is waited for; a wrong address should not wait
    for ever. With a limit also what a server or machine on its way down explains.
    """
    if isinstance(error, websockets.exceptions.InvalidStatus):
        return error.response.status_code in _NOT_READY_STATUSES
    if isinstance(error, ConnectionRefusedError):
        return True
    if not is_limited or isinstance(error, (socket.gaierror, ssl.SSLError, OtherPolicyError)):
        return False
    if isinstance(error, websockets.exceptions.InvalidMessage):
        return isinstance(error.__cause__, (EOFError, OSError))
    return isinstance(error, (OSError, EOFError))
