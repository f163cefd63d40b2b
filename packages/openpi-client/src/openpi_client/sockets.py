"""TCP and TLS connections that are made, and read and written before their handshake, by a deadline."""

import contextlib
import errno
import os
import queue
import socket
import ssl
import threading
from typing import Any, List, Tuple

from openpi_client.deadline import Deadline, wait

# The kernel probes an idle peer, and gives up one that acknowledges nothing, or takes nothing: so a computer that lost
# power is noticed. Websocket pings would do the same, but a server that runs inference on its event loop leaves them
# unanswered, and the connection would be dropped. Nor does such a server read meanwhile: less than this is too short.
_KEEPALIVE_S = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_UNACKNOWLEDGED_MS = 60_000


def set_keepalive(sock: socket.socket) -> None:
    """Has the kernel notice a peer that is gone without a word, within about a minute."""
    with contextlib.suppress(OSError):  # no TCP; or closed by the other side already, as whoever reads next will hear
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (*_KEEPALIVE_S, ("TCP_USER_TIMEOUT", _UNACKNOWLEDGED_MS)):
            if hasattr(socket, name):  # not on every operating system
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A TCP connection; the socket does not block.

    Raises:
        OSError: none of the host's addresses answers; of several, the last one's reason. socket.gaierror: there is no
            such host.
    """
    infos = _resolve(host, port, deadline)
    for index, (family, kind, protocol, _, address) in enumerate(infos):
        # One that is out of reach leaves the others their time.
        own = deadline.sooner(deadline.left_s() / (len(infos) - index))
        sock = socket.socket(family, kind, protocol)
        try:
            _connect(sock, address, own)
        except BaseException as error:
            sock.close()
            if index == len(infos) - 1 or not isinstance(error, OSError) or _is_stopped(deadline):
                raise
        else:
            with contextlib.suppress(OSError):  # reset already, as whoever reads next will hear
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            set_keepalive(sock)
            return sock
    raise OSError(f"the host {host} has no address")


def encrypt(sock: socket.socket, context: ssl.SSLContext, host: str, deadline: Deadline) -> ssl.SSLSocket:
    """Begins TLS with the server `host` on a socket that does not block."""
    encrypted = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                encrypted.do_handshake()
                return encrypted
            except ssl.SSLWantReadError:
                wait(encrypted, deadline)
            except ssl.SSLWantWriteError:
                wait(encrypted, deadline, to_write=True)
    except BaseException:
        encrypted.close()
        raise


def send_all(sock: socket.socket, data: bytes, deadline: Deadline) -> None:
    """Raises OSError when it cannot, or not in time."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            wait(sock, deadline, to_write=True)


def receive(sock: socket.socket, deadline: Deadline, size: int = 2**13) -> bytes:
    """Some bytes; none at the end. Raises OSError when none come in time."""
    while True:
        deadline.tick_s()
        try:
            return sock.recv(size)
        except (BlockingIOError, ssl.SSLWantReadError):
            wait(sock, deadline)
        except ssl.SSLWantWriteError:
            wait(sock, deadline, to_write=True)


def _is_stopped(deadline: Deadline) -> bool:
    return deadline.is_over() or (deadline.stop is not None and deadline.stop.is_set())


def _connect(sock: socket.socket, address: Tuple[object, ...], deadline: Deadline) -> None:
    sock.setblocking(False)
    number = sock.connect_ex(address)
    if number in (errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0)):
        wait(sock, deadline, to_write=True)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _resolve(host: str, port: int, deadline: Deadline) -> List[Any]:
    """The host's addresses. A name is looked up in a thread: the system's resolver takes its own time."""
    with contextlib.suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    outcome: "queue.SimpleQueue[Any]" = queue.SimpleQueue()

    def look_up() -> None:
        try:
            outcome.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=look_up, name="openpi-resolver", daemon=True).start()
    while True:
        try:
            found = outcome.get(timeout=deadline.tick_s())
        except queue.Empty:
            continue
        if isinstance(found, Exception):
            raise found
        return found
