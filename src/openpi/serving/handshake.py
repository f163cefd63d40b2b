"""The first bytes of a connection: an HTTP request, which is answered with a page or becomes a websocket.

Parsing and the rules of the upgrade are those of the websockets library, without its sockets. What could be read in two
ways is refused: a proxy in front of this server may have read it in the other.
"""

import contextlib
import re
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import SplitResult

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from openpi.serving.pages import Page, text

_MAX_HEAD_BYTES = 2**15
_END = b"\r\n\r\n"
# Of these a request has one at most.
_ONLY_ONCE = (
    *("Host", "Authorization", "Origin", "Upgrade", "Content-Length", "Transfer-Encoding"),
    *("Sec-WebSocket-Key", "Sec-WebSocket-Version"),
)
# A path of this server; not the address of another, as proxies are asked for. Proxies that take a prefix away leave two
# slashes, which are no host's name here; `//[` would be the beginning of an address.
_TARGET = re.compile(r"/(?!/\[)[!-~]*")
_HOST = re.compile(r"[\w.:\[\]%-]*", re.ASCII)
_SHORTEST_S = 0.001
# How long a client may take to read why it is refused, and how much of what it still sends is dropped meanwhile.
_LINGER_S, _LINGER_BYTES = 1.0, 2**20


class HandshakeError(ConnectionError):
    """What came is no request: a port probe, say."""


class Handshake:
    """A request that waits for its answer.

    Attributes:
        behind: bytes that came behind the request already.
        method: GET, HEAD or POST.
    """

    def __init__(
        self, sock: socket.socket, protocol: ServerProtocol, request: Request, behind: bytes, method: str
    ) -> None:
        self._socket = sock
        self._protocol = protocol
        self._request = request
        self.behind = behind
        self.method = method

    @classmethod
    def read(cls, sock: socket.socket, deadline_s: float) -> "Handshake":
        """Reads a request, however slowly it comes, until `deadline_s` on the clock of `time.monotonic`.

        Raises:
            HandshakeError: what comes is none that is taken; the client is told, if it sent anything.
            OSError: nothing comes.
        """
        received = bytearray()
        end = -1
        while end < 0:
            sock.settimeout(max(_SHORTEST_S, deadline_s - time.monotonic()))
            part = sock.recv(2**13)
            if not part:
                raise HandshakeError("no HTTP request")
            searched = max(0, len(received) - len(_END))
            received += part
            end = received.find(_END, searched)
            if end < 0 and len(received) > _MAX_HEAD_BYTES:
                raise _refused(sock, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request's head is too long")
        head, behind = bytes(received[: end + len(_END)]), bytes(received[end + len(_END) :])
        method, _, rest = head.partition(b" ")
        protocol = ServerProtocol(max_size=None)
        # The library knows no other method than GET.
        protocol.receive_data(b"GET " + rest if method in (b"POST", b"HEAD") else head)
        events = protocol.events_received()
        if not events or not isinstance(events[0], Request):
            raise _refused(sock, HTTPStatus.BAD_REQUEST, "no GET or POST request of HTTP/1.1 without a body")
        if getattr(events[0], "method", "GET") != "GET":
            raise _refused(
                sock,
                HTTPStatus.METHOD_NOT_ALLOWED,
                "only GET, HEAD and POST are answered",
                {"Allow": "GET, HEAD, POST"},
            )
        if problem := _ambiguity(events[0]):
            raise _refused(sock, HTTPStatus.BAD_REQUEST, problem)
        return cls(sock, protocol, events[0], behind, method.decode())

    @property
    def url(self) -> SplitResult:
        """Path and query, as they came."""
        path, _, query = self._request.path.partition("?")
        return SplitResult("", "", path, query, "")

    @property
    def headers(self) -> Headers:
        return self._request.headers

    @property
    def is_websocket(self) -> bool:
        return self.headers.get("Upgrade", "").lower() == "websocket"

    def respond(self, page: Page, timeout_s: float) -> None:
        """Answers with a page, or with what is said of it; the connection is over then."""
        self._socket.settimeout(timeout_s)
        _send(self._socket, page, has_body=self.method != "HEAD")

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


def _ambiguity(request: Request) -> str:
    """Why the request is not taken; empty = it is."""
    headers = request.headers
    for name in _ONLY_ONCE:
        if len(headers.get_all(name)) > 1:
            return f"more than one {name}"
    if not _TARGET.fullmatch(request.path):
        return "the target is not a path of this server"
    host = headers.get("Host")
    if host is None and getattr(request, "protocol", "HTTP/1.1") != "HTTP/1.0":
        return "no Host"
    return "" if _HOST.fullmatch(host or "") else "Host is not a name and a port"


def _refused(sock: socket.socket, status: int, reason: str, headers: Mapping[str, str] | None = None) -> HandshakeError:
    """Tells the client; what it still sends is dropped, or its system would drop our answer."""
    page = text(f"{reason}\n", status)
    sock.settimeout(_LINGER_S)
    with contextlib.suppress(OSError):
        _send(sock, page, headers)
        sock.shutdown(socket.SHUT_WR)
        deadline_s, left = time.monotonic() + _LINGER_S, _LINGER_BYTES
        while left > 0 and (left_s := deadline_s - time.monotonic()) > 0:
            sock.settimeout(left_s)
            part = sock.recv(2**16)
            if not part:
                break
            left -= len(part)
    return HandshakeError(reason)


def _send(sock: socket.socket, page: Page, more: Mapping[str, str] | None = None, *, has_body: bool = True) -> None:
    headers = Headers([("Content-Type", page.content_type), ("Content-Length", str(len(page.body)))])
    headers["Connection"] = "close"
    headers["Cache-Control"] = "no-store"
    headers["X-Content-Type-Options"] = "nosniff"
    headers.update({**page.headers, **(more or {})})
    sock.sendall(
        Response(page.status, HTTPStatus(page.status).phrase, headers, page.body if has_body else b"").serialize()
    )
