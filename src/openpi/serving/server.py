"""The socket shell of the policy server: listens, finds each connection its model, and runs its session.

    event loop      accepts, answers pings and pages, moves messages; never computes
    model threads   one per model in memory: load it, decode messages, run batches, encode answers

    /                             websocket: the openpi protocol (also /?model=ID); HTTP: the status page
    /api/v1/session[/ID]          websocket: Positronic's protocol
    /api/v1/models, /healthz, /readyz, /metrics, /status.json

The port is open from the start: `/healthz` says that the process lives, `/readyz` that the default model is warm. A
client that comes early gets its websocket at once and its first message, the metadata, when the policy is warm; every
client of the protocol blocks until then (docs/decisions/0004).
"""

import asyncio
import contextlib
import errno
import functools
import itertools
import logging
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import websockets.asyncio.server as ws
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from openpi.codecs.codec import Codec
from openpi.serving import allocator, pages
from openpi.serving.access import Limits, has_key, is_foreign_page
from openpi.serving.batching import Batching, Job, NotWantedError
from openpi.serving.catalog import Catalog, OnePolicy, unknown_model
from openpi.serving.errors import UnknownModelError, error_number, error_text, is_explained
from openpi.serving.frames import Binary, Close, Frame, Text
from openpi.serving.live import LiveSession
from openpi.serving.metrics import Metrics
from openpi.serving.model_slot import ModelPool, ModelSlot
from openpi.serving.openpi_session import OpenpiSession
from openpi.serving.positronic_session import PositronicSession
from openpi.serving.recording import SessionLog, SessionRecorder
from openpi.serving.wire import FEATURES_HEADER
from openpi.shared.errors import MissingKeyError, first_line
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
FEATURES = "batch, jpeg"
_SESSION_PATH = "/api/v1/session"
_GOING_AWAY = 1001
# How long a client may take to answer our goodbye.
_CLOSE_TIMEOUT_S = 3.0

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
        self._max_models = max_models
        self._recorder = recorder
        self._debug = debug
        self._on_listening = on_listening
        self._metrics = Metrics()
        self._load_error: Exception | None = None
        self._stop = asyncio.Event()
        self._idle: set[ws.ServerConnection] = set()
        self._waiting: set[asyncio.Task] = set()  # sessions without a model yet
        self._num_open = 0
        self._live: dict[ws.ServerConnection, LiveSession] = {}
        self._numbers = itertools.count(1)
        self._pool: ModelPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT; then finishes the requests it has, and closes the sessions.

        Raises:
            OSError: the port cannot be opened.
            Exception: whatever loading the default model raised; waiting clients were told.
        """
        self._loop = asyncio.get_running_loop()
        allocator.keep_freed_memory()
        self._pool = ModelPool(self._catalog, self._batching, self._metrics, max_models=self._max_models)
        server = await self._listen()
        self._port = server.sockets[0].getsockname()[1]
        logger.info("Listening on %s:%d", self._host, self._port)
        if self._on_listening:
            self._on_listening(self._port)
        with _stop_signals(self.stop):
            self._preload()
            await self._stop.wait()
            await self._drain(server)
        if self._recorder:
            await asyncio.to_thread(self._recorder.finish)
        if self._load_error:
            raise self._load_error

    def stop(self) -> None:
        """Asks `run` to end. Safe from any thread, and more than once."""
        assert self._loop is not None, "the server does not run"
        self._loop.call_soon_threadsafe(self._stop.set)

    def finish_thread(self, timeout_s: float) -> bool:
        """Ends the models' threads; false when one is still busy (a compile, say) after `timeout_s`."""
        return self._pool is None or self._pool.finish(timeout_s)

    async def _listen(self) -> ws.Server:
        try:
            return await ws.serve(
                self._connected,
                self._host,
                self._port,
                ssl=self._tls,
                process_request=self._answer_http,
                process_response=_name_features,
                compression=None,
                max_size=self._limits.max_message_bytes,
                close_timeout=_CLOSE_TIMEOUT_S,
                logger=_quiet_logger(),
            )
        except OSError as error:
            hint = "another program listens there; stop it, or choose another port (0 = any that is free)"
            if error.errno != errno.EADDRINUSE:
                hint = first_line(error)
            raise OSError(error.errno, f"cannot listen on {self._host}:{self._port}: {hint}") from error

    def _preload(self) -> None:
        """Loads the default model; a server that has none ends."""
        assert self._pool is not None
        try:
            self._pool.preload().add_done_callback(self._default_is_settled)
        except Exception as error:  # A catalog is anybody's.
            self._load_error = error
            self._stop.set()

    def _default_is_settled(self, loaded: asyncio.Future) -> None:
        error = None if loaded.cancelled() else loaded.exception()
        if error is not None and self._load_error is None:
            assert isinstance(error, Exception)
            self._load_error = error
            self._stop.set()

    async def _drain(self, server: ws.Server) -> None:
        """Closes idle sessions and waits for the busy ones, which close themselves after their reply."""
        logger.info("Stopping")
        server.close(close_connections=False)
        if self._load_error is None:
            for task in self._waiting:
                task.cancel()
            goodbyes = [connection.close(_GOING_AWAY, "server is stopping") for connection in self._idle]
            await asyncio.gather(*goodbyes)
        await server.wait_closed()

    # Requests over HTTP

    async def _answer_http(self, connection: ws.ServerConnection, request: Request) -> Response | None:
        """Pages and refusals; None lets the websocket through."""
        url = urlsplit(request.path)
        is_websocket = request.headers.get("Upgrade", "").lower() == "websocket"
        if url.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if url.path == "/readyz":
            if self._is_ready():
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "The policy is not ready.\n")
        if self._api_key and not has_key(request.headers, self._api_key):
            self._metrics.connection_refused("api key")
            response = connection.respond(HTTPStatus.UNAUTHORIZED, "Missing or wrong API key.\n")
            response.headers["WWW-Authenticate"] = 'Basic realm="openpi: any name, the API key as password"'
            return response
        if not is_websocket:
            return _response(await self._page(url.path))
        if is_foreign_page(request.headers):
            self._metrics.connection_refused("origin")
            return connection.respond(HTTPStatus.FORBIDDEN, "Pages of other servers may not connect.\n")
        if self._num_open >= self._limits.max_sessions:
            self._metrics.connection_refused("sessions")
            text = f"All {self._limits.max_sessions} sessions are in use; try again later.\n"
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    def _is_ready(self) -> bool:
        assert self._pool is not None
        slots = self._pool.slots()
        return not self._stop.is_set() and any(slot.policy is not None for slot in slots)

    async def _page(self, path: str) -> pages.Page:
        assert self._pool is not None
        match path:
            case "/":
                return pages.status_page()
            case "/status.json":
                # Images are resized and compressed: not on the loop, and only while somebody looks.
                return await asyncio.to_thread(
                    pages.status_json, self._pool.slots(), list(self._live.values()), ids=self._catalog.ids
                )
            case "/metrics":
                return pages.metrics_text(self._metrics)
            case "/api/v1/models":
                return await asyncio.to_thread(pages.models_json, self._catalog)
            case _:
                return pages.not_found(path)

    # Sessions

    async def _connected(self, connection: ws.ServerConnection) -> None:
        session, requested = self._session_of(connection)
        self._num_open += 1
        self._idle.add(connection)
        if session:
            self._metrics.session_opened(session.protocol)
        try:
            await self._serve(connection, session, requested)
        except (ConnectionClosed, TimeoutError):
            pass  # A client that leaves, or takes nothing any more, is no error.
        finally:
            self._num_open -= 1
            self._idle.discard(connection)
            self._live.pop(connection, None)
            if session:
                self._metrics.session_closed(session.protocol)

    def _session_of(self, connection: ws.ServerConnection) -> tuple[Session, str | None]:
        """The protocol that a path stands for, and the model it asks for."""
        assert connection.request is not None
        url = urlsplit(connection.request.path)
        if url.path == _SESSION_PATH or url.path.startswith(f"{_SESSION_PATH}/"):
            requested = unquote(url.path.removeprefix(_SESSION_PATH).strip("/")) or None
            return PositronicSession(self._codec, debug=self._debug), requested
        return OpenpiSession(debug=self._debug), parse_qs(url.query).get("model", [None])[0]

    async def _serve(self, connection: ws.ServerConnection, session: Session, requested: str | None) -> None:
        assert self._pool is not None
        task = asyncio.current_task()
        assert task is not None

        async def report(status: str, message: str) -> None:
            await self._send(connection, session.loading(status, message))

        self._waiting.add(task)
        try:
            async with self._pool.lease(self._resolve(requested), report) as slot:
                self._waiting.discard(task)
                await self._converse(connection, session, slot)
        except (ConnectionClosed, TimeoutError):
            raise
        except asyncio.CancelledError:
            if task not in self._waiting:
                raise
            await connection.close(_GOING_AWAY, "server is stopping")
        except Exception as error:
            number = _log_failure(error, _address(connection), "connection")
            await self._send(connection, session.refused(error, number))
        finally:
            self._waiting.discard(task)

    def _resolve(self, requested: str | None) -> str:
        try:
            return self._catalog.resolve(requested)
        except UnknownModelError:
            raise
        except (ValueError, OSError) as error:
            raise unknown_model(requested) from error

    async def _converse(self, connection: ws.ServerConnection, session: Session, slot: ModelSlot) -> None:
        live = LiveSession(next(self._numbers), session.protocol, slot.model_id, _address(connection))
        opening = self._opening_of(session, slot)
        log = self._recorder.open(live, opening) if self._recorder else None
        await self._send(connection, session.opening(opening, time.monotonic()))
        self._live[connection] = live
        while not self._stop.is_set():
            self._idle.add(connection)
            message = await self._next_message(connection)
            self._idle.discard(connection)
            if message is None:
                break
            frames = await self._exchange(connection, session, slot, live, log, message)
            del message
            await self._send(connection, frames)
            session.sent(time.monotonic())
            if frames and isinstance(frames[-1], Close):
                return
        reason = "server is stopping" if self._stop.is_set() else f"no request for {self._limits.idle_timeout_s:g} s"
        await connection.close(_GOING_AWAY, reason)

    async def _next_message(self, connection: ws.ServerConnection) -> bytes | str | None:
        """None = the client was silent for too long."""
        try:
            async with asyncio.timeout(self._limits.idle_timeout_s):
                return await connection.recv()
        except TimeoutError:
            return None

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

    async def _exchange(
        self,
        connection: ws.ServerConnection,
        session: Session,
        slot: ModelSlot,
        live: LiveSession,
        log: SessionLog | None,
        message: bytes | str,
    ) -> list[Frame]:
        """One message -> the frames that answer it, errors included."""
        start_s = time.perf_counter()
        exchange = _Exchange(session, message, lambda: connection.state is State.OPEN)
        answered = functools.partial(self._metrics.answered, slot.model_id, session.protocol, num_bytes=len(message))
        try:
            frames = await slot.thread.run(Job(exchange.decode, exchange.encode, exchange.is_wanted))
        except NotWantedError:
            return []
        except Exception as error:
            number = _log_failure(error, _address(connection), "request")
            live.failed(error_text(error))
            answered(outcome="refused" if is_explained(error) else "failed", seconds=time.perf_counter() - start_s)
            return session.failed(error, number)
        seconds = time.perf_counter() - start_s
        answered(outcome="ok", seconds=seconds)
        live.answered(exchange.observations, exchange.results, seconds)
        if any(isinstance(result, dict) and result.get("warnings") for result in exchange.results):
            self._metrics.warned(slot.model_id)
        if log:
            log.write(session.request, [frame.data for frame in frames if isinstance(frame, Binary)])
        return frames

    async def _send(self, connection: ws.ServerConnection, frames: list[Frame]) -> None:
        """Raises TimeoutError for a client that does not take what it asked for; it is dropped."""
        for frame in frames:
            match frame:
                case Binary(data) | Text(data):
                    try:
                        async with asyncio.timeout(self._limits.send_timeout_s):
                            await connection.send(data)
                    except TimeoutError:
                        connection.transport.abort()
                        raise
                case Close(code, reason, linger_s):
                    if linger_s:
                        await asyncio.wait([asyncio.ensure_future(connection.wait_closed())], timeout=linger_s)
                    await connection.close(code, reason)


class _Exchange:
    """One message on its way through the model, and what is kept of it for the log and the status page."""

    def __init__(self, session: Session, message: bytes | str, is_wanted: Callable[[], bool]) -> None:
        self._session = session
        self._message = message
        self.is_wanted = is_wanted
        self.observations: list[dict] = []
        self.results: list[Any] = []

    def decode(self) -> list[dict]:
        self.observations = self._session.received(self._message)
        return self.observations

    def encode(self, results: Any, infer_s: float) -> list[Frame]:
        self.results = results
        return self._session.replied(results, infer_s)


def _name_features(connection: ws.ServerConnection, request: Request, response: Response) -> None:
    if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
        response.headers[FEATURES_HEADER] = FEATURES


def _response(page: pages.Page) -> Response:
    headers = Headers([("Content-Type", page.content_type), ("Content-Length", str(len(page.body)))])
    headers["Connection"] = "close"
    headers["Cache-Control"] = "no-store"
    headers.update(page.headers)
    return Response(page.status, HTTPStatus(page.status).phrase, headers, page.body)


def _log_failure(error: Exception, address: str, what: str) -> str:
    """Logs what a client was not told; returns the number that it was told."""
    if is_explained(error) and not isinstance(error, MissingKeyError):
        logger.error("A %s of %s was refused: %s", what, address, error)
        logger.debug("", exc_info=error)
        return ""
    number = error_number()
    # A missing key may be the recipe's fault as well.
    logger.error("A %s of %s failed (error %s)", what, address, number, exc_info=error)
    return number


def _address(connection: ws.ServerConnection) -> str:
    return ":".join(str(part) for part in connection.remote_address[:2])


@contextlib.contextmanager
def _stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` on the first SIGTERM or SIGINT; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Signals belong to the main thread, and to whoever runs it.
        return
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop()

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _quiet_logger() -> logging.Logger:
    """Keeps websockets from logging every port probe of an orchestrator as an error with a traceback."""
    quiet = logging.getLogger("openpi.serving.websockets")
    if not quiet.filters:
        quiet.setLevel(logging.WARNING)
        quiet.addFilter(lambda record: not record.getMessage().startswith("opening handshake failed"))
    return quiet
