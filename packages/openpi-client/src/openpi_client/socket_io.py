"""A connected socket as a stream of messages uses it: bytes in by a deadline, bytes out without waiting."""

import socket
import ssl
import threading
from typing import List

from openpi_client.deadline import Deadline, is_ready, wait

_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class SocketIo:
    """A TCP or TLS socket, which does not block from now on. One thread reads; one at a time writes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._is_encrypted = isinstance(sock, ssl.SSLSocket)
        turn = threading.Lock()  # OpenSSL lets one thread at a time use a socket

        def receive(view: memoryview) -> int:
            with turn:
                return sock.recv_into(view)

        def send(parts: List[memoryview]) -> int:
            with turn:
                return sock.send(parts[0])

        is_plain = hasattr(sock, "sendmsg") and not self._is_encrypted  # not on Windows
        self._receive, self._send = (sock.recv_into, sock.sendmsg) if is_plain else (receive, send)

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
            except _LATER as error:
                wait(self._socket, deadline, to_write=isinstance(error, ssl.SSLWantWriteError))
            else:
                if count == 0:
                    raise ConnectionResetError("the peer went away")
                return count

    def send_now(self, parts: List[memoryview]) -> List[memoryview]:
        """Sends what the socket takes; returns what it does not."""
        while parts:
            try:
                sent = self._send(parts)
            except _LATER:
                break
            while parts and sent >= len(parts[0]):
                sent -= len(parts[0])
                parts = parts[1:]
            if sent:
                parts = [parts[0][sent:], *parts[1:]]
        return parts

    def wait_writable(self, deadline: Deadline) -> None:
        wait(self._socket, deadline, to_write=True)

    def wait_readable(self, deadline: Deadline) -> None:
        """Before a message that is hardly there yet: cheaper than to try and fail."""
        if not self._is_encrypted:  # where it may lie inside of OpenSSL
            wait(self._socket, deadline)

    def is_readable(self) -> bool:
        waits_inside = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        return waits_inside or is_ready(self._socket, 0)
