"""One port for a robot, behind which one of several servers answers; which one, the robot's side cannot tell."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading

logger = logging.getLogger(__name__)

Address = tuple[str, int]
_BYTES = 2**16
_CONNECT_S = 10.0


class Switchboard:
    """Forwards bytes between whoever connects and the server that is chosen; `with` it around its use.

    Attributes:
        port: that is listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        """
        Args:
            port: 0 = any that is free.
        Raises:
            OSError: the port is taken.
        """
        self._listener = socket.create_server((host, port))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._target: Address | None = None
        self._open: set[socket.socket] = set()
        self.num_connections = 0
        self._thread = threading.Thread(target=self._accept, name="openpi-switchboard", daemon=True)

    def connect(self, target: Address | None) -> None:
        """From here on this one answers; None = nobody. Connections to another one are cut."""
        with self._lock:
            changed, self._target = self._target != target, target
            cut = list(self._open) if changed else []
            self.num_connections = 0
        for each in cut:
            _close(each)

    def __enter__(self) -> Switchboard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.connect(None)
        _close(self._listener)
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                robot, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._forward, args=(robot,), name="openpi-forward", daemon=True).start()

    def _forward(self, robot: socket.socket) -> None:
        with self._lock:
            target = self._target
        if target is None:
            _close(robot)
            return
        try:
            server = socket.create_connection(target, timeout=_CONNECT_S)
        except OSError as error:
            logger.warning("the server of this trial cannot be reached: %s", error.strerror or error)
            _close(robot)
            return
        server.settimeout(None)
        for each in (robot, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            is_current = self._target == target
            if is_current:
                self._open |= {robot, server}
                self.num_connections += 1
        try:
            if is_current:
                _pump(robot, server)
        finally:
            with self._lock:
                self._open -= {robot, server}
            _close(robot)
            _close(server)


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Until either side ends."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(one, selectors.EVENT_READ, other)
        waiting.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in waiting.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                try:
                    part = source.recv(_BYTES)
                    if not part:
                        return
                    key.data.sendall(part)
                except OSError:
                    return


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
