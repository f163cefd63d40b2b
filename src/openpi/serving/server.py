"""The policy server: opens its port, gives each connection a page or a session, and ends without losing a request.

    session threads  one per connection: handshake and pages, then read messages, decode and check them, answer pings
    model threads    one per model in memory: load it, run batches, encode and send answers

    /                             websocket: the openpi protocol (also /?model=ID); HTTP: the status page
    other paths                   websocket: the protocols that are installed (protocols.py)
    POST /api/v1/keepalive        how long the server stays, for who waits for it
    /api/v1/models, /healthz, /readyz, /metrics, /status.json

The port is open from the start: `/healthz` says that the process lives, `/readyz` that the default model is warm. A
client that comes early gets its websocket at once and its first message, the metadata, when the policy is warm; every
client of the protocol blocks until then (docs/decisions/0004). Why threads, and where the messages are read from the
sockets: docs/decisions/0007. What a client may cost the others: docs/decisions/0010.
"""

import contextlib
import dataclasses
import itertools
import logging
import signal
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, unquote

from openpi.policies.guards import ObservationError
from openpi.serving import memory, pages
from openpi.serving.access import (
    Limits,
    has_key,
    is_foreign_page,
    is_known_host,
    is_loopback,
    own_names,
)
from openpi.serving.catalog import Catalog, OnePolicy
from openpi.serving.client_log import ClientLog
from openpi.serving.connection import Connection
from openpi.serving.conversation import Conversation
from openpi.serving.handshake import Handshake
from openpi.serving.listener import Listener, as_place
from openpi.serving.memory import MemoryBudget, SessionMemory
from openpi.serving.metrics import Metrics
from openpi.serving.model_slot import ModelPool, ModelSlot
from openpi.serving.model_thread import Batching
from openpi.serving.openpi_session import OpenpiSession
from openpi.serving.protocols import Served, ServerProtocol, Session, installed
from openpi.serving.recording import SessionRecorder
from openpi_client.base_policy import BasePolicy
from openpi_client.connection import FEATURES_HEADER, UNTIMED, check_key, features
from openpi_client.stream import MessageStream

if TYPE_CHECKING:
    from concurrent.futures import Future


logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
FEATURES = "batch, jpeg, trace"
_OTHER_PROTOCOLS = "/api/"  # where openpi's own is never spoken
_KEEPALIVE_PATH = "/api/v1/keepalive"
_MOST_CHOSEN = 4
_DRAIN_TICK_S = 0.02
# A signal may reach the process in another thread, which does not wake the main one: its handler runs at the next tick.
_SIGNAL_TICK_S = 0.2
# How long a client may take to take a page.
_PAGE_TIMEOUT_S = 10.0
# A short message takes its turns between those of threads that decode long ones; Python's own interval is 5 ms.
_SWITCH_INTERVAL_S = 0.001
# A session that asked for nothing for so long is idle.
_IDLE_S = 1.0
_HEALTH = ("/healthz", "/readyz")


class PolicyServer:
    """Serves models to any number of clients. `run` once; `stop` from any thread."""

    def __init__(
        self,
        models: Catalog | Callable[[], BasePolicy],
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        metadata: Mapping[str, object] | None = None,
        api_key: str | None = None,
        tls: ssl.SSLContext | None = None,
        protocols: Sequence[ServerProtocol] | None = None,
        batching: Batching | None = None,
        limits: Limits | None = None,
        max_models: int = 1,
        recorder: SessionRecorder | None = None,
        debug: bool = False,
        allowed_hosts: Collection[str] = (),
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
            protocols: beside openpi's own; None = those that are installed.
            max_models: in memory at once.
            recorder: writes what sessions ask and get.
            debug: send whole tracebacks to clients.
            allowed_hosts: names of this server beside those of this machine, such as that of a proxy before it.
            on_listening: called with the port once it is open, before the policy is loaded.
        Raises:
            ValueError: the key is empty, or cannot be sent.
        """
        check_key(api_key)
        self._catalog: Catalog = OnePolicy(models) if callable(models) else models
        self._host = host
        self._port = port
        self._metadata = metadata
        self._api_key = api_key
        self._tls = tls
        self._protocols = installed() if protocols is None else protocols
        self._limits = limits or Limits()
        batching = batching or Batching()
        self._batching = dataclasses.replace(batching, max_queue=max(batching.max_queue, self._limits.max_sessions))
        self._recorder = recorder
        self._debug = debug
        self._names = own_names(host, allowed_hosts)
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self._on_listening = on_listening
        self._metrics = Metrics()
        self._client_log = ClientLog()
        self._memory = MemoryBudget(self._limits.memory_bytes, self._limits.max_sessions)
        self._pages = threading.BoundedSemaphore(self._limits.max_pages)
        self._chosen: deque[int] = deque(maxlen=_MOST_CHOSEN)  # sessions that people look at
        self._status = pages.SharedPage(self._status_json)
        self._metrics_text = pages.SharedPage(lambda: pages.metrics_text(self._metrics))
        self._models = pages.SharedPage(lambda: pages.models_json(self._catalog))
        self._is_public = False
        self._load_error: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._sessions: dict[int, Connection] = {}
        self._numbers = itertools.count(1)
        self._pool = ModelPool(self._catalog, self._batching, self._metrics, max_models=max_models)

    def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT; then finishes the requests it has, and closes the sessions.

        Raises:
            OSError: the port cannot be opened.
            Exception: whatever loading the default model raised; waiting clients were told.
        """
        memory.keep_freed_memory()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        with Listener(
            self._host,
            self._port,
            tls=self._tls,
            limits=self._limits,
            metrics=self._metrics,
            client_log=self._client_log,
        ) as listener:
            self._port = listener.port
            self._is_public = listener.is_public
            logger.info("Listening on %s", as_place(self._host, self._port))
            listener.start(self._answer)
            if self._on_listening:
                self._on_listening(self._port)
            with _stop_signals(self.stop):
                self._preload()
                while not self._stop.wait(_SIGNAL_TICK_S):
                    self._let_rest()
                self._drain(listener)
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

    def _preload(self) -> None:
        """Loads the default model; a server that has none ends."""
        try:
            self._pool.preload().add_done_callback(self._default_is_settled)
        except Exception as error:  # A catalog is anybody's.
            self._load_error = error
            self._stop.set()

    def _default_is_settled(self, loaded: "Future[BasePolicy]") -> None:
        if (error := loaded.exception()) is not None:
            self._load_error = error
            self._stop.set()

    def _let_rest(self) -> None:
        """Idle sessions keep only what the page shows."""
        with self._lock:
            live = [connection.live for connection in self._sessions.values() if connection.live]
        rested = [session.rest(_IDLE_S) for session in live]
        if any(rested):
            memory.give_freed_back()

    def _drain(self, listener: Listener) -> None:
        """Closes idle sessions and waits for the busy ones, which close themselves after their reply."""
        logger.info("Stopping")
        listener.close()
        if self._load_error is None:
            self._pool.stop_waiting()
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if session.live:  # the others wait for a model, and are told what becomes of it
                session.say_goodbye()
        for thread in listener.threads():
            while thread.is_alive():
                thread.join(_DRAIN_TICK_S)
                for session in sessions:
                    session.abort_if_silent()

    # One connection

    def _answer(self, handshake: Handshake, sock: socket.socket, address: str) -> None:
        """Pages and refusals over HTTP, or a session."""
        path = handshake.url.path
        expected = ("POST",) if path == _KEEPALIVE_PATH else ("GET", "HEAD")  # HEAD is what some health checks send
        if handshake.method not in expected or (handshake.is_websocket and handshake.method == "HEAD"):
            handshake.respond(pages.wrong_method(expected[0]), _PAGE_TIMEOUT_S)
            return
        if path in _HEALTH:
            handshake.respond(self._health(path), _PAGE_TIMEOUT_S)
            return
        refusal = self._refusal(handshake, path, is_local=is_loopback(sock.getsockname()[0]))
        if refusal is not None:
            handshake.respond(refusal, _PAGE_TIMEOUT_S)
        elif handshake.is_websocket and path != _KEEPALIVE_PATH:
            if self._protocol_of(path) is None and path.startswith(_OTHER_PROTOCOLS):
                handshake.respond(pages.not_found(path), _PAGE_TIMEOUT_S)
                return
            self._open_session(handshake, sock, address)
        elif self._pages.acquire(blocking=False):
            try:
                handshake.respond(self._page(path, handshake.url.query), _PAGE_TIMEOUT_S)
            finally:
                self._pages.release()
        else:
            self._metrics.connection_refused("pages")
            text = f"{self._limits.max_pages} pages are being sent already; try again later.\n"
            handshake.respond(pages.text(text, HTTPStatus.SERVICE_UNAVAILABLE), _PAGE_TIMEOUT_S)

    def _open_session(self, handshake: Handshake, sock: socket.socket, address: str) -> None:
        number = next(self._numbers)
        connection = Connection(number, address, self._limits, self._stop, self._is_room_wanted)
        with self._lock:
            is_full = len(self._sessions) >= self._limits.max_sessions
            if not is_full:
                self._sessions[number] = connection
        if is_full:
            self._metrics.connection_refused("sessions")
            text = f"All {self._limits.max_sessions} sessions are in use; try again later.\n"
            handshake.respond(pages.text(text, HTTPStatus.SERVICE_UNAVAILABLE), _PAGE_TIMEOUT_S)
            return
        memory = SessionMemory(self._memory)
        try:
            if not handshake.accept({FEATURES_HEADER: FEATURES}):
                return
            connection.stream = MessageStream(
                sock,
                is_client=False,
                received=handshake.behind,
                max_message_bytes=self._limits.max_message_bytes,
                admit=memory.admit,
            )
            url = handshake.url
            protocol = self._protocol_of(url.path)
            try:
                session, requested = self._session_of(url, protocol)
            except ObservationError as error:
                assert protocol is not None
                connection.send(protocol.refused(error))
                connection.wait_closed()
                return
            self._metrics.session_opened(session.protocol)
            try:
                Conversation(
                    connection,
                    session,
                    self._pool,
                    self._metrics,
                    self._opening_of,
                    self._recorder,
                    self._limits,
                    memory,
                    self._client_log,
                    # Other protocols tell their clients when each action is due.
                    keeps_time=protocol is None and UNTIMED not in features(handshake.headers),
                ).run(requested)
            finally:
                self._metrics.session_closed(session.protocol)
        finally:
            memory.close()
            with self._lock:
                del self._sessions[number]

    def _is_room_wanted(self) -> bool:
        with self._lock:
            is_full = len(self._sessions) >= self._limits.max_sessions
        return is_full or self._pool.num_waiting > 0

    def _health(self, path: str) -> pages.Page:
        is_ready = not self._stop.is_set() and any(
            slot.policy is not None and slot.thread.is_alive() for slot in self._pool.slots()
        )
        if path == "/healthz" or is_ready:
            return pages.text("OK\n")
        return pages.text("The policy is not ready.\n", HTTPStatus.SERVICE_UNAVAILABLE)

    def _refusal(self, handshake: Handshake, path: str, *, is_local: bool) -> pages.Page | None:
        """Why this client gets nothing; None = it does."""
        headers = handshake.headers
        # A browser names the host of the page, and the origin of one that opens a websocket; a robot's program has no
        # origin, and may call this machine as it likes.
        is_page = "Origin" in headers or (is_local and not handshake.is_websocket)
        host = headers.get("Host")
        if host is not None and is_page and not is_known_host(host, self._names):
            self._metrics.connection_refused("host")
            return pages.foreign_host(host)
        if self._api_key and not has_key(headers, self._api_key):
            self._metrics.connection_refused("api key")
            return pages.wrong_key()
        if is_foreign_page(headers, self._allowed_hosts):
            self._metrics.connection_refused("origin")
            return pages.foreign_page(headers["Origin"])
        if not handshake.is_websocket and path in ("/", "/status.json") and self._is_public and not self._api_key:
            return pages.off()
        return None

    def _page(self, path: str, query: str) -> pages.Page:
        match path:
            case "/":
                return pages.status_page()
            case "/status.json":
                [number] = parse_qs(query).get("session", [""])[-1:]
                if number.isdecimal() and len(number) < 10:
                    self._chosen.append(int(number))
                return self._status.get()
            case "/metrics":
                return self._metrics_text.get()
            case "/api/v1/models":
                return self._models.get()
            case path if path == _KEEPALIVE_PATH:
                return pages.keepalive()
        return pages.not_found(path)

    def _status_json(self) -> pages.Page:
        with self._lock:
            live = [connection.live for connection in self._sessions.values() if connection.live]
        return pages.status_json(self._pool.slots(), live, ids=self._catalog.ids, chosen=list(self._chosen))

    # Sessions

    def _protocol_of(self, path: str) -> ServerProtocol | None:
        """The one that a path stands for; None = openpi's own."""
        return next((each for each in self._protocols if path == each.path or path.startswith(f"{each.path}/")), None)

    def _session_of(self, url: SplitResult, protocol: ServerProtocol | None) -> tuple[Session, str | None]:
        """A session, and the model it asks for.

        Raises:
            ObservationError: a session cannot be as its client wants it.
        """
        if protocol is not None:
            requested = unquote(url.path.removeprefix(protocol.path).strip("/")) or None
            return protocol.session(url.query, debug=self._debug), requested
        return OpenpiSession(debug=self._debug), parse_qs(url.query).get("model", [None])[0]

    def _opening_of(self, session: Session, slot: ModelSlot) -> dict[str, object]:
        described = self._catalog.describe(slot.model_id)
        return session.told(Served(self._host, self._port, slot.model_id, described, self._metadata_of(slot.policy)))

    def _metadata_of(self, policy: BasePolicy | None) -> dict[str, object]:
        """What clients of openpi are told of a policy."""
        if self._metadata is not None:
            return dict(self._metadata)
        contract = getattr(policy, "contract", None)
        told = {} if contract is None else {"contract": contract.as_metadata()}
        rtc = getattr(policy, "rtc_metadata", None)
        told |= {} if rtc is None else {"rtc": rtc}
        checkpoint = getattr(policy, "checkpoint", None)
        told |= {} if checkpoint is None else {"checkpoint": checkpoint}
        return {**getattr(policy, "metadata", {}), **told}


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on the first SIGTERM or SIGINT; a second one ends the process at once. What is ignored stays so, as
    SIGINT for a command that a script has started in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals belong to the main thread, and to whoever runs it.
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]

    def on_signal(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        stop()

    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
