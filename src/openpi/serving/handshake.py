"""The first bytes of a connection: an HTTP request, which is answered with a page or becomes a websocket.

Parsing and the rules of the upgrade are those of the websockets library, without its sockets.
"""

import socket
import time
from collections.abc import Mapping
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from openpi.serving.pages import Page

_MAX_HEAD_BYTES = 2**15
_END = b"\r\n\r\n"


class HandshakeError(ConnectionError):
    """What came is no request: a port probe, say."""


class Handshake:
    """A request that waits for its answer.

    Attributes:
        path: with the query.
        behind: bytes that came behind the request already.
    """

    def __init__(self, sock: socket.socket, protocol: ServerProtocol, request: Request, behind: bytes) -> None:
        self._socket = sock
        self._protocol = protocol
        self._request = request
        self.behind = behind

    @classmethod
    def read(cls, sock: socket.socket, timeout_s: float) -> "Handshake":
        """Reads a request, however slowly it comes, within `timeout_s`.

        Raises:
            HandshakeError: what comes is none, or too long.
            OSError: nothing comes.
        """
        received = b""
        deadline_s = time.monotonic() + timeout_s
        while _END not in received:
            sock.settimeout(max(0.001, deadline_s - time.monotonic()))
            part = sock.recv(2**13)
            if not part or len(received) > _MAX_HEAD_BYTES:
                raise HandshakeError("no HTTP request")
            received += part
        head, _, behind = received.partition(_END)
        protocol = ServerProtocol(max_size=None)
        protocol.receive_data(head + _END)
        events = protocol.events_received()
        if not events or not isinstance(events[0], Request):
            sock.sendall(Response(400, "Bad Request", Headers([("Connection", "close")]), b"").serialize())
            raise HandshakeError("no GET request of HTTP/1.1")
        return cls(sock, protocol, events[0], behind)

    @property
    def path(self) -> str:
        return self._request.path

    @property
    def headers(self) -> Headers:
        return self._request.headers

    @property
    def is_websocket(self) -> bool:
        return self.headers.get("Upgrade", "").lower() == "websocket"

    def respond(self, page: Page) -> None:
        """Answers with a page; the connection is over then."""
        headers = Headers([("Content-Type", page.content_type), ("Content-Length", str(len(page.body)))])
        headers["Connection"] = "close"
        headers["Cache-Control"] = "no-store"
        headers.update(page.headers)
        response = Response(page.status, HTTPStatus(page.status).phrase, headers, page.body)
        self._socket.sendall(response.serialize())

    def accept(self, headers: Mapping[str, str]) -> bool:
        """Makes the connection a websocket; false when the request does not fit, which is answered.

        Args:
            headers: to add to the answer.
        """
        try:
            response = self._protocol.accept(self._request)
        except InvalidHandshake as error:
            response = self._protocol.reject(HTTPStatus.BAD_REQUEST, f"{error}\n")
        is_accepted = response.status_code == HTTPStatus.SWITCHING_PROTOCOLS
        if is_accepted:
            response.headers.update(headers)
        self._socket.sendall(response.serialize())
        return is_accepted
