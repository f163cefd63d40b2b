"""The open port: takes connections, each in a thread of its own, and reads what each one asks for.

Connections that have not said yet what they want cannot shut others out: there is always room for another, since the
one that has been silent for longest goes.
"""

import contextlib
import dataclasses
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable

from openpi.serving.access import Limits, is_loopback, network_of
from openpi.serving.client_log import ClientLog
from openpi.serving.handshake import Handshake, HandshakeError
from openpi.serving.metrics import Metrics
from openpi.shared.errors import first_line

logger = logging.getLogger(__name__)

# How long a client may take to finish its handshake.
_HANDSHAKE_TIMEOUT_S = 10.0
_BACKLOG = 512
_LAST_PORT = 65535

Answer = Callable[[Handshake, socket.socket, str], None]
"""Answers a request, given its socket and the client's address; the connection is over when it returns."""


@dataclasses.dataclass(eq=False)
class _Opening:
    """A connection that has not said yet what it wants."""

    sock: socket.socket
    address: str
    network: str

    def cut(self) -> None:
        with contextlib.suppress(OSError):  # It has left by itself.
            # The `shutdown` of an encrypted socket would take its state away under the thread that reads.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class Listener:
    """The sockets of a server, one for each address of its host. Use as a context manager: at its end they are closed.

    Attributes:
        port: of all of them.
        is_public: whether others than this machine reach it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        limits: Limits,
        metrics: Metrics,
        client_log: ClientLog,
    ) -> None:
        """Opens the port; `start` takes connections.

        Args:
            port: 0 chooses a free one.
        Raises:
            ValueError: there is no such port.
            OSError: the port cannot be opened.
        """
        if not 0 <= port <= _LAST_PORT:  # The system would take some of its bits.
            raise ValueError(f"port is {port}; expected 1 to {_LAST_PORT}, or 0 for any that is free")
        self._sockets = _open(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        self.is_public = not all(is_loopback(sock.getsockname()[0]) for sock in self._sockets)
        self._tls = tls
        self._limits = limits
        self._metrics = metrics
        self._client_log = client_log
        self._is_closed = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._threads: set[threading.Thread] = set()
        self._openings: dict[_Opening, None] = {}  # the oldest first

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
            self._take(sock, _text(address), answer)

    def _take(self, sock: socket.socket, address: str, answer: Answer) -> None:
        opening = _Opening(sock, address, network_of(address))
        thread = threading.Thread(target=self._connected, args=(opening, answer), name="openpi-session", daemon=True)
        with self._lock:
            has_room = len(self._threads) < self._limits.max_connections
            victims = self._make_room(opening) if has_room else []
            if has_room:
                self._openings[opening] = None
                self._threads.add(thread)
        for victim in victims:
            self._metrics.connection_refused("silent")
            victim.cut()
        try:
            if has_room:
                thread.start()
                return
        except RuntimeError:  # The system has no more threads.
            self._forget(opening, thread)
        self._metrics.connection_refused("connections")
        sock.close()

    def _make_room(self, opening: _Opening) -> list[_Opening]:
        """Those that have to go, so that there are not too many of one network, nor in all."""
        same = [each for each in self._openings if each.network == opening.network]
        victims = same[: max(0, len(same) + 1 - self._limits.max_opening_per_network)]
        if not victims and len(self._openings) >= self._limits.max_opening:
            victims = [next(iter(self._openings))]
        for victim in victims:
            del self._openings[victim]
        return victims

    def _forget(self, opening: _Opening, thread: threading.Thread) -> None:
        with self._lock:
            self._openings.pop(opening, None)
            self._threads.discard(thread)

    def _connected(self, opening: _Opening, answer: Answer) -> None:
        deadline_s = time.monotonic() + _HANDSHAKE_TIMEOUT_S
        try:
            with contextlib.suppress(OSError, HandshakeError), contextlib.ExitStack() as stack:
                sock = opening.sock
                stack.callback(sock.close)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(_HANDSHAKE_TIMEOUT_S)
                if self._tls:
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                    stack.callback(sock.close)
                    opening.sock = sock
                    sock.do_handshake()
                handshake = Handshake.read(sock, deadline_s)
                with self._lock:
                    self._openings.pop(opening, None)
                answer(handshake, sock, opening.address)
        except Exception as error:
            text = f"The connection of {opening.address} failed"
            self._client_log.write(logging.ERROR, opening.address, text, error=error)
        finally:
            self._forget(opening, threading.current_thread())


def as_place(host: str, port: int) -> str:
    """As in a URL."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def _open(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the host, all with the same port."""
    sockets: list[socket.socket] = []
    try:
        infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(infos):
            number = sockets[0].getsockname()[1] if sockets else address[1]
            is_any = address[0] == "::" and socket.has_dualstack_ipv6()  # of IPv4, too, as whoever asks for it expects
            place = (address[0], number)
            sockets.append(socket.create_server(place, family=family, backlog=_BACKLOG, dualstack_ipv6=is_any))
        return sockets
    except OSError as error:
        _close_all(sockets)
        hint = "another program listens there; stop it, or choose another port (0 = any that is free)"
        if error.errno != errno.EADDRINUSE:
            hint = first_line(error)
        raise OSError(error.errno, f"cannot listen on {as_place(host, port)}: {hint}") from error


def _close_all(sockets: list[socket.socket]) -> None:
    for listening in sockets:
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # or `accept` goes on waiting
        listening.close()


def _text(address: tuple[object, ...]) -> str:
    return ":".join(str(part) for part in address[:2])
