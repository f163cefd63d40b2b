"""The socket shell of the policy server: listens, finds each connection its model, and runs its session.

    session threads  one per connection: handshake and pages, then read messages and answer pings; never compute
    model threads    one per model in memory: load it, decode messages, run batches, encode and send answers

    /                             websocket: the openpi protocol (also /?model=ID); HTTP: the status page
    /api/v1/session[/ID]          websocket: Positronic's protocol
    /api/v1/models, /healthz, /readyz, /metrics, /status.json

The port is open from the start: `/healthz` says that the process lives, `/readyz` that the default model is warm. A
client that comes early gets its websocket at once and its first message, the metadata, when the policy is warm; every
client of the protocol blocks until then (docs/decisions/0004). Why threads, and where the messages are read from the
sockets: docs/decisions/0007.
"""

import contextlib
import dataclasses
import errno
import itertools
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from openpi.codecs.codec import Codec
from openpi.serving import allocator, pages
from openpi.serving.access import Limits, has_key, is_foreign_page
from openpi.serving.batching import Batching, Job, NotWantedError
from openpi.serving.catalog import Catalog, OnePolicy, unknown_model
from openpi.serving.errors import UnknownModelError, error_number, error_text, is_explained
from openpi.serving.frames import Binary, Close, Frame, Text
from openpi.serving.handshake import Handshake, HandshakeError
from openpi.serving.live import LiveSession
from openpi.serving.metrics import Metrics
from openpi.serving.model_slot import ModelPool, ModelSlot, StoppingError
from openpi.serving.openpi_session import OpenpiSession
from openpi.serving.positronic_session import PositronicSession
from openpi.serving.recording import SessionLog, SessionRecorder
from openpi.serving.wire import FEATURES_HEADER
from openpi.shared.errors import MissingKeyError, first_line
from openpi_client import stream as streams
from openpi_client.base_policy import BasePolicy
from openpi_client.stream import MessageStream, SilenceError, StreamClosed

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
FEATURES = "batch, jpeg"
_SESSION_PATH = "/api/v1/session"
_GOING_AWAY = 1001
# How long a client may take to answer our goodbye, and to finish its handshake.
_CLOSE_TIMEOUT_S = 1.0
_HANDSHAKE_TIMEOUT_S = 10.0
_DRAIN_TICK_S = 0.02
# A signal may reach the process in another thread, which does not wake the main one: its handler runs at the next tick.
_SIGNAL_TICK_S = 0.2
# A client that sent nothing for so long is asked for a sign of life, and dropped after as long again.
_PING_INTERVAL_S = 20.0
# While a client waits for its model.
_READ_AHEAD_TICK_S = 0.1
_MAX_EARLY_MESSAGES = 4
# Connections beside the sessions: pages, handshakes, refusals.
_MAX_OTHER_CONNECTIONS = 64
_BACKLOG = 128

Session = OpenpiSession | PositronicSession


class PolicyServer:
    """Serves models to any number of clients. `run` once; `stop` from any thread."""

    def __init__(
        self,
        models: Catalog | Callable[[], BasePolicy],
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        metadata: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        codec: Codec | None = None,
        batching: Batching | None = None,
        limits: Limits | None = None,
        max_models: int = 1,
        recorder: SessionRecorder | None = None,
        debug: bool = False,
        on_listening: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            models: what there is to serve; or a function that makes the only policy, warm: after it returns, inference
                is as fast as it will be. Runs in the thread that inference runs in.
            port: 0 chooses a free one.
            metadata: first message of every openpi session; None takes the policy's `metadata`, and its contract.
            api_key: when set, clients must send it (`access.has_key`). Health checks need none.
            tls: certificate and key; None = no encryption.
            codec: of Positronic sessions; None = observations and actions as they are.
            max_models: in memory at once.
            recorder: writes what sessions ask and get.
            debug: send whole tracebacks to clients.
            on_listening: called with the port once it is open, before the policy is loaded.
        """
        self._catalog: Catalog = OnePolicy(models) if callable(models) else models
        self._host = host
        self._port = port
        self._metadata = metadata
        self._api_key = api_key
        self._tls = tls
        self._codec = codec
        self._batching = batching or Batching()
        self._limits = limits or Limits()
        self._recorder = recorder
        self._debug = debug
        self._on_listening = on_listening
        self._metrics = Metrics()
        self._load_error: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._connections: set[threading.Thread] = set()
        self._sessions: dict[int, _Connection] = {}
        self._numbers = itertools.count(1)
        self._pool = ModelPool(self._catalog, self._batching, self._metrics, max_models=max_models)

    def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT; then finishes the requests it has, and closes the sessions.

        Raises:
            OSError: the port cannot be opened.
            Exception: whatever loading the default model raised; waiting clients were told.
        """
        allocator.keep_freed_memory()
        listeners = self._listen()
        try:
            self._port = listeners[0].getsockname()[1]
            logger.info("Listening on %s:%d", self._host, self._port)
            for listener in listeners:
                threading.Thread(target=self._accept, args=(listener,), name="openpi-accept", daemon=True).start()
            if self._on_listening:
                self._on_listening(self._port)
            with _stop_signals(self.stop):
                self._preload()
                while not self._stop.wait(_SIGNAL_TICK_S):
                    pass
                self._drain(listeners)
        finally:
            _close_all(listeners)
        if self._recorder:
            self._recorder.finish()
        if self._load_error:
            raise self._load_error

    def stop(self) -> None:
        """Asks `run` to end. Safe from any thread, and more than once."""
        self._stop.set()

    def finish_thread(self, timeout_s: float) -> bool:
        """Ends the models' threads; false when one is still busy (a compile, say) after `timeout_s`."""
        return self._pool.finish(timeout_s)

    def _listen(self) -> list[socket.socket]:
        """One socket for each address of the host, all with the same port."""
        listeners: list[socket.socket] = []
        try:
            infos = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, *_, address in dict.fromkeys(infos):
                port = listeners[0].getsockname()[1] if listeners else address[1]
                listener = socket.create_server((address[0], port), family=family, backlog=_BACKLOG)
                listeners.append(listener)
            return listeners
        except OSError as error:
            _close_all(listeners)
            hint = "another program listens there; stop it, or choose another port (0 = any that is free)"
            if error.errno != errno.EADDRINUSE:
                hint = first_line(error)
            raise OSError(error.errno, f"cannot listen on {self._host}:{self._port}: {hint}") from error

    def _preload(self) -> None:
        """Loads the default model; a server that has none ends."""
        try:
            self._pool.preload().add_done_callback(self._default_is_settled)
        except Exception as error:  # A catalog is anybody's.
            self._load_error = error
            self._stop.set()

    def _default_is_settled(self, loaded: Any) -> None:
        if (error := loaded.exception()) is not None:
            self._load_error = error
            self._stop.set()

    def _accept(self, listener: socket.socket) -> None:
        limit = self._limits.max_sessions + _MAX_OTHER_CONNECTIONS
        while not self._stop.is_set():
            try:
                sock, address = listener.accept()
            except OSError:  # The listener is closed; or the system has no more sockets, and then has some again.
                if self._stop.wait(0.05):
                    return
                continue
            with self._lock:
                is_full = len(self._connections) >= limit
            if is_full:
                self._metrics.connection_refused("connections")
                sock.close()
                continue
            thread = threading.Thread(
                target=self._connected, args=(sock, _text(address)), name="openpi-session", daemon=True
            )
            with self._lock:
                self._connections.add(thread)
            thread.start()

    def _drain(self, listeners: list[socket.socket]) -> None:
        """Closes idle sessions and waits for the busy ones, which close themselves after their reply."""
        logger.info("Stopping")
        _close_all(listeners)
        if self._load_error is None:
            self._pool.stop_waiting()
        with self._lock:
            sessions, threads = list(self._sessions.values()), list(self._connections)
        for session in sessions:
            if session.live:  # the others wait for a model, and are told what becomes of it
                session.say_goodbye()
        for thread in threads:
            while thread.is_alive():
                thread.join(_DRAIN_TICK_S)
                for session in sessions:
                    session.abort_if_silent()

    # One connection

    def _connected(self, sock: socket.socket, address: str) -> None:
        try:
            with contextlib.suppress(OSError, HandshakeError), contextlib.ExitStack() as stack:
                stack.callback(sock.close)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(_HANDSHAKE_TIMEOUT_S)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_side=True)
                    stack.callback(sock.close)
                self._answer(Handshake.read(sock, _HANDSHAKE_TIMEOUT_S), sock, address)
        except Exception:
            logger.exception("The connection of %s failed", address)
        finally:
            with self._lock:
                self._connections.discard(threading.current_thread())

    def _answer(self, handshake: Handshake, sock: socket.socket, address: str) -> None:
        """Pages and refusals over HTTP, or a session."""
        page = self._page(handshake)
        if page is not None:
            handshake.respond(page)
            return
        number = next(self._numbers)
        connection = _Connection(number, address, self._limits, self._stop)
        with self._lock:
            is_full = len(self._sessions) >= self._limits.max_sessions
            if not is_full:
                self._sessions[number] = connection
        if is_full:
            self._metrics.connection_refused("sessions")
            text = f"All {self._limits.max_sessions} sessions are in use; try again later.\n"
            handshake.respond(pages.text(text, HTTPStatus.SERVICE_UNAVAILABLE))
            return
        try:
            if not handshake.accept({FEATURES_HEADER: FEATURES}):
                return
            connection.stream = MessageStream(
                sock,
                is_client=False,
                received=handshake.behind,
                max_message_bytes=self._limits.max_message_bytes,
            )
            session, requested = self._session_of(handshake.path)
            self._metrics.session_opened(session.protocol)
            try:
                self._serve(connection, session, requested)
            finally:
                self._metrics.session_closed(session.protocol)
        finally:
            with self._lock:
                del self._sessions[number]

    def _page(self, handshake: Handshake) -> pages.Page | None:
        """What to answer over HTTP; None lets the websocket through."""
        path = urlsplit(handshake.path).path
        if path == "/healthz":
            return pages.text("OK\n")
        if path == "/readyz":
            is_ready = not self._stop.is_set() and any(slot.policy is not None for slot in self._pool.slots())
            return pages.text("OK\n") if is_ready else pages.text("The policy is not ready.\n", 503)
        if self._api_key and not has_key(handshake.headers, self._api_key):
            self._metrics.connection_refused("api key")
            return pages.wrong_key()
        if handshake.is_websocket:
            if not is_foreign_page(handshake.headers):
                return None
            self._metrics.connection_refused("origin")
            return pages.text("Pages of other servers may not connect.\n", HTTPStatus.FORBIDDEN)
        match path:
            case "/":
                return pages.status_page()
            case "/status.json":
                with self._lock:
                    live = [connection.live for connection in self._sessions.values() if connection.live]
                return pages.status_json(self._pool.slots(), live, ids=self._catalog.ids)
            case "/metrics":
                return pages.metrics_text(self._metrics)
            case "/api/v1/models":
                return pages.models_json(self._catalog)
        return pages.not_found(path)

    # Sessions

    def _session_of(self, path: str) -> tuple[Session, str | None]:
        """The protocol that a path stands for, and the model it asks for."""
        url = urlsplit(path)
        if url.path == _SESSION_PATH or url.path.startswith(f"{_SESSION_PATH}/"):
            requested = unquote(url.path.removeprefix(_SESSION_PATH).strip("/")) or None
            return PositronicSession(self._codec, debug=self._debug), requested
        return OpenpiSession(debug=self._debug), parse_qs(url.query).get("model", [None])[0]

    def _serve(self, connection: "_Connection", session: Session, requested: str | None) -> None:
        def report(status: str, message: str) -> None:
            connection.read_ahead()
            connection.send(session.loading(status, message))

        try:
            with self._pool.lease(self._resolve(requested), report) as slot:
                connection.stop_reading_ahead()
                self._converse(connection, session, slot)
        except StreamClosed:
            pass  # A client that leaves, or takes nothing any more, is no error.
        except StoppingError:
            connection.stop_reading_ahead()
            connection.say_goodbye()
        except Exception as error:
            connection.stop_reading_ahead()
            number = _log_failure(error, connection.address, "connection")
            with contextlib.suppress(StreamClosed):
                connection.send(session.refused(error, number))
        finally:
            connection.stop_reading_ahead()
        connection.wait_closed()

    def _resolve(self, requested: str | None) -> str:
        try:
            return self._catalog.resolve(requested)
        except UnknownModelError:
            raise
        except (ValueError, OSError) as error:
            raise unknown_model(requested) from error

    def _converse(self, connection: "_Connection", session: Session, slot: ModelSlot) -> None:
        live = LiveSession(connection.number, session.protocol, slot.model_id, connection.address)
        opening = self._opening_of(session, slot)
        log = self._recorder.open(live, opening) if self._recorder else None
        connection.live = live
        if self._stop.is_set():
            raise StoppingError
        connection.send(session.opening(opening, time.monotonic()))
        while True:
            message = connection.next_message()
            # One exchange at a time: a client that does not wait is answered in order.
            connection.turn.acquire()
            if connection.is_over:
                connection.turn.release()
                return
            self._begin_exchange(_Exchange(self._metrics, connection, session, slot, live, log, message))
            del message

    def _begin_exchange(self, exchange: "_Exchange") -> None:
        job = Job(exchange.decode, exchange.encode, exchange.is_wanted)
        try:
            exchange.slot.thread.submit(job, exchange.done)
        except Exception as error:
            exchange.done(None, error)

    def _opening_of(self, session: Session, slot: ModelSlot) -> dict[str, Any]:
        """The metadata of an openpi session, the `meta` of a Positronic one."""
        if isinstance(session, PositronicSession):
            served = {} if self._codec is None else self._codec.served_meta
            where = {"type": "openpi", "host": self._host, "port": self._port}
            return {**where, **self._catalog.describe(slot.model_id), "checkpoint_id": slot.model_id, **served}
        if self._metadata is not None:
            return dict(self._metadata)
        contract = getattr(slot.policy, "contract", None)
        told = {} if contract is None else {"contract": contract.as_metadata()}
        return {**getattr(slot.policy, "metadata", {}), **told}


class _Connection:
    """One websocket and what is known about it.

    Attributes:
        turn: held while a message is being answered, and for good once the end is said.
    """

    def __init__(self, number: int, address: str, limits: Limits, stop: threading.Event) -> None:
        self.number = number
        self.address = address
        self.live: LiveSession | None = None
        self.turn = threading.Lock()
        self.is_over = False
        self.stream: MessageStream | None = None
        self._limits = limits
        self._stop = stop
        self._answer_by_s = 0.0
        self._early: list[memoryview | str] = []
        self._reader: threading.Thread | None = None
        self._has_model = threading.Event()

    @property
    def is_open(self) -> bool:
        return self.stream is not None and self.stream.is_open and not self.is_over

    def abort_if_silent(self) -> None:
        """Drops a client that has not answered the goodbye in time."""
        if self.is_over and time.monotonic() > self._answer_by_s and self.stream is not None:
            self.stream.abort()

    def next_message(self) -> memoryview | str:
        """The next message. A peer that is silent is asked for a sign of life; one without requests is sent away.

        Raises:
            StreamClosed: it left, or was dropped.
        """
        assert self.stream is not None
        if self._early:
            return self._early.pop(0)
        limit_s = self._limits.idle_timeout_s
        tick_s = _PING_INTERVAL_S if limit_s is None else min(_PING_INTERVAL_S, limit_s)
        start_s, num_silent = time.monotonic(), 0
        while True:
            try:
                return self.stream.read(tick_s)
            except SilenceError:
                num_silent += 1
                is_idle = limit_s is not None and time.monotonic() - start_s >= limit_s
                if is_idle and self.turn.acquire(blocking=False):
                    self._end(_GOING_AWAY, f"no request for {limit_s:g} s")
                    self.turn.release()
                    raise StreamClosed(_GOING_AWAY) from None
                if num_silent * tick_s >= 2 * _PING_INTERVAL_S and not self.stream.has_answered():
                    self.stream.abort()
                    raise StreamClosed(1006, "no sign of life") from None
                self.stream.ping()

    def read_ahead(self) -> None:
        """Lets another thread answer pings while this one waits for a model."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_ahead, name="openpi-waiting", daemon=True)
            self._reader.start()

    def stop_reading_ahead(self) -> None:
        self._has_model.set()
        if self._reader is not None:
            self._reader.join()

    def _read_ahead(self) -> None:
        assert self.stream is not None
        with contextlib.suppress(StreamClosed):
            while not self._has_model.is_set() and len(self._early) < _MAX_EARLY_MESSAGES:
                with contextlib.suppress(SilenceError):
                    self._early.append(self.stream.read(_READ_AHEAD_TICK_S))

    def send(self, frames: list[Frame]) -> None:
        """Waits for a slow client, not for long. For the session's own thread."""
        assert self.stream is not None
        for frame in frames:
            match frame:
                case Binary(data):
                    self.stream.write(data, timeout_s=self._limits.send_timeout_s)
                case Text(text):
                    self.stream.write(text.encode(), streams.TEXT, self._limits.send_timeout_s)
                case Close(code, reason, linger_s):
                    if linger_s:
                        self.wait_closed(linger_s)
                    self._end(code, reason)

    def send_soon(self, frames: list[Frame]) -> None:
        """Sends an answer without waiting for a slow client; the turn ends when it has left. For the model's thread."""
        for i, frame in enumerate(frames):
            rest = self._start(frame)
            if rest is not None:
                work = (rest, frames[i + 1 :])
                threading.Thread(target=self._send_rest, args=work, name="openpi-slow-client", daemon=True).start()
                return
        self.end_turn()

    def _start(self, frame: Frame) -> Callable[[float], None] | None:
        assert self.stream is not None
        match frame:
            case Binary(data):
                return self.stream.start_write(data)
            case Text(text):
                return self.stream.start_write(text.encode(), streams.TEXT)
            case Close(code, reason, _):
                self._end(code, reason)
        return None

    def _send_rest(self, rest: Callable[[float], None], frames: list[Frame]) -> None:
        try:
            with contextlib.suppress(StreamClosed):  # The session's thread notices.
                rest(self._limits.send_timeout_s)
                self.send(frames)
        finally:
            self.end_turn()

    def say_goodbye(self) -> None:
        """Ends the session, unless a message is being answered: then it ends after that."""
        if self.turn.acquire(blocking=False):
            self._end(_GOING_AWAY, "server is stopping")
            self.turn.release()

    def end_turn(self) -> None:
        """The message is answered; the next may come, unless the server stops."""
        if self._stop.is_set() and not self.is_over:
            self._end(_GOING_AWAY, "server is stopping")
        self.turn.release()

    def wait_closed(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Reads until the client has closed too, for so long at most."""
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(StreamClosed, SilenceError):
            while self.stream is not None and self.stream.is_open and (left_s := deadline_s - time.monotonic()) > 0:
                self.stream.read(left_s)

    def _end(self, code: int, reason: str) -> None:
        self._answer_by_s = time.monotonic() + _CLOSE_TIMEOUT_S
        self.is_over = True
        if self.stream is not None:
            self.stream.close(code, reason)


@dataclasses.dataclass
class _Exchange:
    """One message on its way through the model, and back to the client. Its methods run in the model's thread."""

    metrics: Metrics
    connection: _Connection
    session: Session
    slot: ModelSlot
    live: LiveSession
    log: SessionLog | None
    message: memoryview | str
    observations: list[dict] = dataclasses.field(default_factory=list)
    results: Any = ()
    start_s: float = dataclasses.field(default_factory=time.perf_counter)

    def is_wanted(self) -> bool:
        return self.connection.is_open

    def decode(self) -> list[dict]:
        self.observations = self.session.received(self.message)
        return self.observations

    def encode(self, results: Any, infer_s: float) -> list[Frame]:
        self.results = results
        return self.session.replied(results, infer_s)

    def done(self, frames: list[Frame] | None, error: BaseException | None) -> None:
        """Sends the answer, errors included."""
        try:
            if error is not None:
                frames = [] if isinstance(error, NotWantedError) else self._failed(error)
            else:
                self._note(frames or [])
            self.session.sent(time.monotonic())
        except Exception:
            logger.exception("A request of %s cannot be noted", self.connection.address)
        try:
            self.connection.send_soon(frames or [])
        except StreamClosed:
            self.connection.end_turn()

    def _failed(self, error: BaseException) -> list[Frame]:
        number = _log_failure(error, self.connection.address, "request")
        self.live.failed(error_text(error))
        self._count("refused" if is_explained(error) else "failed")
        return self.session.failed(error, number)

    def _note(self, frames: list[Frame]) -> None:
        seconds = self._count("ok")
        self.live.answered(self.observations, self.results, seconds)
        if any(isinstance(result, dict) and result.get("warnings") for result in self.results):
            self.metrics.warned(self.slot.model_id)
        if self.log:
            self.log.write(self.session.request, [frame.data for frame in frames if isinstance(frame, Binary)])

    def _count(self, outcome: str) -> float:
        seconds = time.perf_counter() - self.start_s
        self.metrics.answered(
            self.slot.model_id, self.session.protocol, outcome, num_bytes=len(self.message), seconds=seconds
        )
        return seconds


def _log_failure(error: BaseException, address: str, what: str) -> str:
    """Logs what a client was not told; returns the number that it was told."""
    if is_explained(error) and not isinstance(error, MissingKeyError):
        logger.error("A %s of %s was refused: %s", what, address, error)
        logger.debug("", exc_info=error)
        return ""
    number = error_number()
    # A missing key may be the recipe's fault as well.
    logger.error("A %s of %s failed (error %s)", what, address, number, exc_info=error)
    return number


def _text(address: Any) -> str:
    return ":".join(str(part) for part in address[:2])


def _close_all(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # or `accept` goes on waiting
        listener.close()


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on the first SIGTERM or SIGINT; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals belong to the main thread, and to whoever runs it.
        return
    numbers = (signal.SIGTERM, signal.SIGINT)

    def on_signal(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        stop()

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
