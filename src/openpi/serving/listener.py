"""The open port: takes connections, each in a thread of its own, and reads what each one asks for."""

import contextlib
import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from openpi.serving.handshake import Handshake, HandshakeError
from openpi.serving.metrics import Metrics
from openpi.shared.errors import first_line

logger = logging.getLogger("openpi")

# How long a client may take to finish its handshake.
_HANDSHAKE_TIMEOUT_S = 10.0
_BACKLOG = 128
_LAST_PORT = 65535

Answer = Callable[[Handshake, socket.socket, str], None]
"""Answers a request, given its socket and the client's address; the connection is over when it returns."""


class Listener:
    """The sockets of a server, one for each address of its host. Use as a context manager: at its end they are closed.

    Attributes:
        port: of all of them.
    """

    def __init__(
        self, host: str, port: int, *, tls: ssl.SSLContext | None, max_connections: int, metrics: Metrics
    ) -> None:
        """Opens the port; `start` takes connections.

        Args:
            port: 0 chooses a free one.
            max_connections: open at once; more are dropped.
        Raises:
            ValueError: there is no such port.
            OSError: the port cannot be opened.
        """
        if not 0 <= port <= _LAST_PORT:  # The system would take some of its bits.
            raise ValueError(f"port is {port}; expected 1 to {_LAST_PORT}, or 0 for any that is free")
        self._sockets = _open(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        self._tls = tls
        self._max_connections = max_connections
        self._metrics = metrics
        self._is_closed = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._threads: set[threading.Thread] = set()

    def start(self, answer: Answer) -> None:
        """Answers every connection from now on."""
        for listening in self._sockets:
            threading.Thread(target=self._accept, args=(listening, answer), name="openpi-accept", daemon=True).start()

    def threads(self) -> list[threading.Thread]:
        """Those of the open connections."""
        with self._lock:
            return list(self._threads)

    def close(self) -> None:
        """Takes no further connections; the open ones go on."""
        self._is_closed.set()
        _close_all(self._sockets)

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listening: socket.socket, answer: Answer) -> None:
        while not self._is_closed.is_set():
            try:
                sock, address = listening.accept()
            except OSError:  # The listener is closed; or the system has no more sockets, and then has some again.
                if self._is_closed.wait(0.05):
                    return
                continue
            with self._lock:
                is_full = len(self._threads) >= self._max_connections
            if is_full:
                self._metrics.connection_refused("connections")
                sock.close()
                continue
            thread = threading.Thread(
                target=self._connected, args=(sock, _text(address), answer), name="openpi-session", daemon=True
            )
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _connected(self, sock: socket.socket, address: str, answer: Answer) -> None:
        try:
            with contextlib.suppress(OSError, HandshakeError), contextlib.ExitStack() as stack:
                stack.callback(sock.close)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(_HANDSHAKE_TIMEOUT_S)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_side=True)
                    stack.callback(sock.close)
                answer(Handshake.read(sock, _HANDSHAKE_TIMEOUT_S), sock, address)
        except Exception:
            logger.exception("The connection of %s failed", address)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())


def _open(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the host, all with the same port."""
    sockets: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(infos):
            number = sockets[0].getsockname()[1] if sockets else address[1]
            sockets.append(socket.create_server((address[0], number), family=family, backlog=_BACKLOG))
        return sockets
    except OSError as error:
        _close_all(sockets)
        hint = "another program listens there; stop it, or choose another port (0 = any that is free)"
        if error.errno != errno.EADDRINUSE:
            hint = first_line(error)
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {hint}") from error


def _close_all(sockets: list[socket.socket]) -> None:
    for listening in sockets:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # or `accept` goes on waiting
        listening.close()


def _text(address: Any) -> str:
    return ":".join(str(part) for part in address[:2])
