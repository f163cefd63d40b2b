"""Opening and closing websocket connections to a policy server, whatever is spoken over them."""

import contextlib
import inspect
import logging
import socket
import ssl
import time
from typing import Any, Dict, FrozenSet, Iterator, Mapping, Optional, Tuple

import websockets.exceptions
import websockets.sync.client
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage
from websockets.http11 import Response
from websockets.uri import WebSocketURI, parse_uri

from openpi_client.proxy import find_proxy
from openpi_client.stream import MessageStream

logger = logging.getLogger(__name__)

# One attempt: TCP, TLS and websocket handshake.
HANDSHAKE_TIMEOUT_S = 10.0

# Names extensions of the protocol: in a request those that the client knows, in the answer those that the server takes.
FEATURES_HEADER = "Openpi-Features"

_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}

_HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 2**16
_SHORTEST_S = 0.001
_UNAUTHORIZED = 401

# The kernel probes an idle peer, so a robot notices a server that lost power. Websocket pings would do the
# same, but a server that runs inference on its event loop leaves them unanswered, and the connection would be
# dropped.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class KeyRefused(websockets.exceptions.InvalidStatus):
    """The server wants an API key, or another one."""

    def __init__(self, response: Any, place: str, *, has_key: bool) -> None:
        super().__init__(response)
        self._text = (
            f"{place} does not take this API key (HTTP 401); give the one that the server was started with"
            if has_key
            else f"{place} asks for an API key (HTTP 401); give it with api_key=..."
        )

    def __str__(self) -> str:
        return self._text


def uri(host: str, port: Optional[int]) -> str:
    """The address of a server: of a host name, or of a URL of the schemes ws, wss, http (as ws) and https (as wss).

    Raises:
        ValueError: a URL of another scheme.
    """
    scheme, separator, rest = host.partition("://")
    if separator:
        if scheme not in _SCHEMES:
            raise ValueError(f"the address {host} begins with {scheme}://; expected a host name, ws://... or wss://...")
        host = f"{_SCHEMES[scheme]}://{rest}"
    else:
        is_bare_ipv6 = host.count(":") > 1 and not host.startswith("[")
        host = f"ws://[{host}]" if is_bare_ipv6 else f"ws://{host}"
    return host if port is None else f"{host}:{port}"


def _connect_options() -> Dict[str, Any]:
    """Options of `connect`, as far as the installed version of websockets has them."""
    known = inspect.signature(websockets.sync.client.connect).parameters
    # Pings: see _KEEPALIVE. `legacy` keeps `connect` returning a connection.
    by_version = {"ping_interval": None, "legacy": True}
    wanted = {name: value for name, value in by_version.items() if name in known}
    return {"compression": None, "max_size": None, "close_timeout": 1.0, **wanted}


CONNECT_OPTIONS = _connect_options()


def set_keepalive(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the other side already, as whoever reads next will hear
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):  # not on every operating system
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@contextlib.contextmanager
def explained(place: str, headers: Mapping[str, str]) -> Iterator[None]:
    """Errors of connecting to `place` with these headers stay what they are, and say what to do."""
    target = parse_uri(place)
    try:
        yield
    except websockets.exceptions.InvalidStatus as error:
        if error.response.status_code != _UNAUTHORIZED:
            raise
        raise KeyRefused(error.response, place, has_key="Authorization" in headers) from error
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"{error.strerror} (looking for the host '{target.host}')") from error
    except ssl.SSLCertVerificationError as error:
        raise ssl.SSLCertVerificationError(
            error.errno,
            f"the certificate of {target.host} is not trusted: {error.verify_message}. If it is one of your own, "
            "name its file, or that of the authority that signed it, in the environment variable SSL_CERT_FILE",
        ) from error
    except (ConnectionResetError, InvalidMessage) as error:
        if target.secure or not isinstance(error.__cause__ or error, (OSError, EOFError)):
            raise
        raise InvalidMessage(
            "the server closed the connection during the handshake; if it speaks TLS, its address is "
            f"wss://{place[len('ws://') :]}"
        ) from error


def open_stream(place: str, headers: Dict[str, str], timeout_s: float) -> Tuple[MessageStream, Headers]:
    """Connects to ws://... or wss://..., and returns the connection and the headers of the server's answer.

    Raises:
        OSError: no connection, or no answer within `timeout_s`.
        websockets.exceptions.InvalidHandshake: an answer that is no upgrade; InvalidStatus names its status.
        websockets.exceptions.InvalidURI: `place` is no such address.
    """
    target = parse_uri(place)
    deadline_s = time.monotonic() + timeout_s
    with explained(place, headers):
        return _open_stream(target, place, headers, deadline_s)


def _open_stream(
    target: WebSocketURI, place: str, headers: Dict[str, str], deadline_s: float
) -> Tuple[MessageStream, Headers]:
    sock = open_socket(place, max(_SHORTEST_S, deadline_s - time.monotonic()))
    try:
        sock.settimeout(max(_SHORTEST_S, deadline_s - time.monotonic()))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_keepalive(sock)
        if target.secure:
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=target.host)
        protocol = ClientProtocol(target, max_size=None)
        request = protocol.connect()
        request.headers.update(headers)
        protocol.send_request(request)
        sock.sendall(b"".join(protocol.data_to_send()))
        head, behind = _read_head(sock, deadline_s)
        protocol.receive_data(head)
        if not head.startswith(b"HTTP/1.1 101"):
            _read_refusal(protocol, sock, behind)
        if protocol.handshake_exc is not None:
            raise protocol.handshake_exc
        [response] = protocol.events_received()
        assert isinstance(response, Response)
        return MessageStream(sock, is_client=True, received=behind), response.headers
    except BaseException:
        sock.close()
        raise


def open_socket(place: str, timeout_s: float) -> socket.socket:
    """A socket to the server at ws://... or wss://..., blocking, by way of the environment's proxy if it names one.

    Raises:
        OSError: server or proxy is out of reach, or says nothing within `timeout_s`.
        ValueError: what the environment names is no HTTP proxy.
        openpi_client.proxy.ProxyStatus, websockets.exceptions.InvalidMessage: the proxy opens no tunnel.
    """
    target = parse_uri(place)
    deadline_s = time.monotonic() + timeout_s
    proxy = find_proxy(target.host, target.port, is_secure=target.secure)
    if proxy is None:
        sock = socket.create_connection((target.host, target.port), timeout_s)
    else:
        sock = proxy.connect(timeout_s)
        try:
            proxy.ask_for_tunnel(sock, target.host, target.port)
            proxy.check_answer(_read_head(sock, deadline_s)[0])
        except BaseException:
            sock.close()
            raise
    sock.settimeout(None)
    return sock


def _read_head(sock: socket.socket, deadline_s: float) -> Tuple[bytes, bytes]:
    """The server's answer up to the empty line, and what came behind it."""
    received = b""
    while _HEAD_END not in received:
        sock.settimeout(max(_SHORTEST_S, deadline_s - time.monotonic()))
        part = sock.recv(2**13)
        if not part:
            raise InvalidMessage("the server closed the connection during the handshake") from EOFError()
        received += part
        if len(received) > _MAX_HEAD_BYTES:
            raise InvalidMessage("the server's answer is no HTTP response")
    head, end, behind = received.partition(_HEAD_END)
    return head + end, behind


def _read_refusal(protocol: ClientProtocol, sock: socket.socket, received: bytes) -> None:
    """Gives the protocol the body of an answer that is no upgrade; it then knows the status."""
    total = 0
    while protocol.handshake_exc is None:
        if received:
            protocol.receive_data(received)
        total += len(received)
        if protocol.handshake_exc is None:
            received = sock.recv(2**13) if total < _MAX_HEAD_BYTES else b""
            if not received:
                protocol.receive_eof()


def features(headers: Headers) -> FrozenSet[str]:
    """Extensions of the protocol that the other side names in its handshake; published ones name none."""
    return frozenset(name.strip() for line in headers.get_all(FEATURES_HEADER) for name in line.split(","))


def hang_up(ws: websockets.sync.client.ClientConnection) -> None:
    """Closes without complaint: the other side may be gone already."""
    try:
        ws.close()
    except (OSError, websockets.exceptions.WebSocketException) as error:
        logger.debug("closing the connection failed: %s", error)
