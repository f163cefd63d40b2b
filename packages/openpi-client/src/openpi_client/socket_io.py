"""A connected socket as a stream of messages uses it: bytes in by a deadline, bytes out without waiting."""

import socket
import ssl
import threading
from typing import List

from openpi_client.deadline import Deadline, is_ready, wait


class SocketIo:
    """A TCP socket. One thread reads; one at a time writes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        """Returns how many bytes came, at least one.

        Raises:
            SilenceError: none came in time.
            OSError: the connection is over.
        """
        while True:
            deadline.check()
            try:
                count = self._receive(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                wait(self._socket, deadline)
            except ssl.SSLWantWriteError:
                self.wait_writable(deadline)
            else:
                if count == 0:
                    raise ConnectionResetError("the peer went away")
                return count

    def send_now(self, parts: List[memoryview]) -> int:
        """Returns how many bytes the socket took."""
        try:
            return self._socket.sendmsg(parts)
        except BlockingIOError:
            return 0

    def wait_writable(self, deadline: Deadline) -> None:
        wait(self._socket, deadline, to_write=True)

    def wait_readable(self, deadline: Deadline) -> None:
        """Before a message that is hardly there yet: cheaper than to try and fail."""
        wait(self._socket, deadline)

    def is_readable(self) -> bool:
        return is_ready(self._socket, 0)

    def _receive(self, view: memoryview) -> int:
        return self._socket.recv_into(view)


class LockedSocketIo(SocketIo):
    """An encrypted socket: OpenSSL lets one thread at a time use it. Also any socket of a system without `sendmsg`
    (Windows).
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._lock = threading.Lock()

    def send_now(self, parts: List[memoryview]) -> int:
        try:
            with self._lock:
                return self._socket.send(parts[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return 0

    def wait_readable(self, deadline: Deadline) -> None:
        """Nothing: what is there may lie inside of OpenSSL."""

    def is_readable(self) -> bool:
        waits_inside = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        return waits_inside or super().is_readable()

    def _receive(self, view: memoryview) -> int:
        with self._lock:
            return self._socket.recv_into(view)


def socket_io(sock: socket.socket) -> SocketIo:
    """The way to use this socket, which does not block from now on."""
    is_plain = hasattr(sock, "sendmsg") and not isinstance(sock, ssl.SSLSocket)
    return SocketIo(sock) if is_plain else LockedSocketIo(sock)
