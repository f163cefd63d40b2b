"""Peers that do not play along, over raw sockets: servers that do what they are told to, and websockets by hand."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from openpi_client import msgpack_numpy
from serving_live import PATIENCE_S

Behave = Callable[[socket.socket, threading.Event], None]
"""What a server does with a connection; the event says that the test is over."""


@contextlib.contextmanager
def bad_server(behave: Behave) -> Iterator[int]:
    """The port of a server that does so with each connection, in a thread."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            behave(sock, over)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listening.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listening.getsockname()[1]
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)
            for thread in [accepting, *threads]:
                thread.join(PATIENCE_S)


def upgrade(sock: socket.socket) -> None:
    """Answers the request for a websocket."""
    protocol = ServerProtocol()
    while not (events := protocol.events_received()):
        protocol.receive_data(sock.recv(4096))
    request = events[0]
    assert isinstance(request, Request)
    protocol.send_response(protocol.accept(request))
    sock.sendall(b"".join(protocol.data_to_send()))


def greet(sock: socket.socket, metadata: dict | None = None) -> None:
    """Opens a session of the openpi protocol."""
    upgrade(sock)
    sock.sendall(binary(msgpack_numpy.packb(metadata or {})))


def binary(content: bytes, *, is_last: bool = True) -> bytes:
    """The frame of a server."""
    return Frame(Opcode.BINARY, content, is_last).serialize(mask=False)


def read_message(sock: socket.socket) -> bytes:
    """The payload of a client's message, which masks with zeros. b"" at the end."""
    head = _exactly(sock, 2)
    length = head[1] & 0x7F
    if length == 126:
        length = int.from_bytes(_exactly(sock, 2), "big")
    elif length == 127:
        length = int.from_bytes(_exactly(sock, 8), "big")
    _exactly(sock, 4)
    return _exactly(sock, length)


def trickle(sock: socket.socket, data: bytes, over: threading.Event, interval_s: float = 0.05) -> None:
    for byte in data:
        if over.wait(interval_s):
            return
        sock.sendall(bytes([byte]))


def raw_session(port: int) -> socket.socket:
    """A client's websocket by hand, behind the metadata."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.settimeout(PATIENCE_S)
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _exactly(sock, 1)
    length = _exactly(sock, 2)[1]
    _exactly(sock, length if length < 126 else int.from_bytes(_exactly(sock, 2), "big"))
    return sock


def masked(opcode: Opcode, content: bytes, *, is_last: bool = True) -> bytes:
    """The frame of a client."""
    return Frame(opcode, content, is_last).serialize(mask=True)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data
