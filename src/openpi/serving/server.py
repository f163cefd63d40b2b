"""The socket shell of the policy server: listens, loads the policy, runs one session per connection.

    event loop          accepts, answers pings, /healthz and /readyz, moves messages; never computes
    inference thread    loads the policy, warms it up, then one inference at a time in the order of arrival

The port is open from the start: `/healthz` says that the process lives, `/readyz` that the policy is warm. A
client that comes early gets its websocket at once and its first message, the metadata, when the policy is
warm; every client of the protocol blocks until then (docs/decisions/0004).
"""

import asyncio
import contextlib
import errno
import functools
import hmac
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import websockets.asyncio.server as ws
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from openpi.serving import allocator, openpi_session
from openpi.serving.inference_thread import InferenceThread
from openpi.shared.errors import MissingKeyError, first_line
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
_GOING_AWAY = 1001
# How long a client may take to answer our goodbye.
_CLOSE_TIMEOUT_S = 3.0


class PolicyServer:
    """Serves one policy to any number of clients. `run` once; `stop` from any thread."""

    def __init__(
        self,
        load: Callable[[], BasePolicy],
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        metadata: Mapping[str, Any] | None = None,
        api_key: str | None = None,
        on_listening: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            load: makes the policy, warm: after it returns, inference is as fast as it will be. Runs in the
                thread that inference runs in.
            port: 0 chooses a free one.
            metadata: first message of every session; None takes the policy's `metadata`.
            api_key: when set, clients must send `Authorization: Api-Key <key>`. Health checks need none.
            on_listening: called with the port once it is open, before the policy is loaded.
        """
        self._load = load
        self._host = host
        self._port = port
        self._metadata = metadata
        self._api_key = api_key
        self._on_listening = on_listening
        self._policy: BasePolicy | None = None
        self._load_error: Exception | None = None
        self._settled = asyncio.Event()  # the policy is loaded, or never will be
        self._stop = asyncio.Event()
        self._idle: set[ws.ServerConnection] = set()
        self._inference = InferenceThread()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT; then finishes the requests it has, and closes the sessions.

        Raises:
            OSError: the port cannot be opened.
            Exception: whatever `load` raised; waiting clients were told.
        """
        self._loop = asyncio.get_running_loop()
        allocator.keep_freed_memory()
        server = await self._listen()
        port = server.sockets[0].getsockname()[1]
        logger.info("Listening on %s:%d", self._host, port)
        if self._on_listening:
            self._on_listening(port)
        with _stop_signals(self.stop):
            loading = asyncio.create_task(self._load_policy())
            await self._stop.wait()
            loading.cancel()
            await self._drain(server)
        if self._load_error:
            raise self._load_error

    def stop(self) -> None:
        """Asks `run` to end. Safe from any thread, and more than once."""
        assert self._loop is not None, "the server does not run"
        self._loop.call_soon_threadsafe(self._stop.set)

    def finish_thread(self, timeout_s: float) -> bool:
        """Ends the inference thread; false when it is still busy (a compile, say) after `timeout_s`."""
        return self._inference.finish(timeout_s)

    async def _listen(self) -> ws.Server:
        try:
            return await ws.serve(
                self._session,
                self._host,
                self._port,
                process_request=self._answer_http,
                compression=None,
                max_size=None,
                close_timeout=_CLOSE_TIMEOUT_S,
                logger=_quiet_logger(),
            )
        except OSError as error:
            hint = "another program listens there; stop it, or choose another port (0 = any that is free)"
            if error.errno != errno.EADDRINUSE:
                hint = first_line(error)
            raise OSError(error.errno, f"cannot listen on {self._host}:{self._port}: {hint}") from error

    async def _load_policy(self) -> None:
        start_s = time.monotonic()
        try:
            self._policy = await self._inference.call(self._load)
            logger.info("The policy is ready after %.1f s", time.monotonic() - start_s)
        except Exception as error:
            self._load_error = error
            self._stop.set()
        finally:
            self._settled.set()

    async def _drain(self, server: ws.Server) -> None:
        """Closes idle sessions and waits for the busy ones, which close themselves after their reply."""
        logger.info("Stopping")
        self._settled.set()
        server.close(close_connections=False)
        if self._load_error is None:
            goodbyes = [connection.close(_GOING_AWAY, "server is stopping") for connection in self._idle]
            await asyncio.gather(*goodbyes)
        await server.wait_closed()

    def _answer_http(self, connection: ws.ServerConnection, request: Request) -> Response | None:
        """Health checks and refusals; None lets the websocket through."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            if self._policy is not None and not self._stop.is_set():
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "The policy is not ready.\n")
        if self._api_key and not _has_key(request, self._api_key):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "Missing or wrong API key.\n")
        return None

    async def _session(self, connection: ws.ServerConnection) -> None:
        self._idle.add(connection)
        try:
            await self._settled.wait()
            await self._converse(connection)
        except ConnectionClosed:
            pass  # A client that leaves is no error.
        finally:
            self._idle.discard(connection)

    async def _converse(self, connection: ws.ServerConnection) -> None:
        if self._policy is None:
            if self._load_error:
                await _send(connection, openpi_session.OpenpiSession({}).failed(self._load_error))
            return
        metadata = getattr(self._policy, "metadata", {}) if self._metadata is None else self._metadata
        session = openpi_session.OpenpiSession(metadata)
        await _send(connection, session.opening(time.monotonic()))
        while not self._stop.is_set():
            self._idle.add(connection)
            message = await connection.recv()
            self._idle.discard(connection)
            frames = await self._exchange(session, connection, message)
            await _send(connection, frames)
            session.sent(time.monotonic())
        await connection.close(_GOING_AWAY, "server is stopping")

    async def _exchange(
        self, session: openpi_session.OpenpiSession, connection: ws.ServerConnection, message: bytes | str
    ) -> list[openpi_session.Frame]:
        """One observation -> the frames that answer it, errors included."""
        assert self._policy is not None
        try:
            observation = session.received(message)
            is_wanted = functools.partial(_is_open, connection)
            result, infer_s = await self._inference.call(_infer, self._policy, observation, is_wanted)
            return session.replied(result, infer_s)
        except _NotWanted:
            return []
        except Exception as error:
            _log_failure(error, _address(connection))
            return session.failed(error)


class _NotWanted(Exception):
    """The client left before its turn came."""


def _infer(policy: BasePolicy, observation: dict, is_wanted: Callable[[], bool]) -> tuple[dict, float]:
    """The policy's result and the seconds it took. Runs in the inference thread."""
    if not is_wanted():
        raise _NotWanted
    start_s = time.perf_counter()
    result = policy.infer(observation)
    return result, time.perf_counter() - start_s


def _is_open(connection: ws.ServerConnection) -> bool:
    return connection.state is State.OPEN


async def _send(connection: ws.ServerConnection, frames: list[openpi_session.Frame]) -> None:
    for frame in frames:
        match frame:
            case openpi_session.Binary(data):
                await connection.send(data)
            case openpi_session.Text(text):
                await connection.send(text)
            case openpi_session.Close(code, reason):
                await connection.close(code, reason)


def _has_key(request: Request, api_key: str) -> bool:
    """Compares in constant time, so that the time of a refusal says nothing about the key."""
    given = request.headers.get("Authorization", "")
    return hmac.compare_digest(given.encode(), f"Api-Key {api_key}".encode())


def _log_failure(error: Exception, address: str) -> None:
    if openpi_session.is_explained(error) and not isinstance(error, MissingKeyError):
        logger.error("A request of %s was refused: %s", address, error)
        logger.debug("", exc_info=error)
    else:  # a missing key may be the recipe's fault as well
        logger.error("A request of %s failed", address, exc_info=error)


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
