"""Opening a websocket connection to a policy server, whatever is spoken over it."""

import base64
import contextlib
import os
import socket
import ssl
from typing import Dict, FrozenSet, Iterator, Mapping, Optional, Tuple
from urllib.parse import unquote, urlsplit

import websockets.exceptions
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage
from websockets.http11 import Response
from websockets.uri import WebSocketURI, parse_uri

from openpi_client import sockets
from openpi_client.deadline import Deadline
from openpi_client.proxy import find_proxy
from openpi_client.stream import DEFAULT_MAX_MESSAGE_BYTES, MessageStream

# One attempt: name, TCP, proxy, TLS and websocket handshake.
HANDSHAKE_TIMEOUT_S = 10.0

# Names extensions of the protocol: in a request those that the client knows, in the answer those that the server takes.
FEATURES_HEADER = "Openpi-Features"
# Of a client whose world waits for its answers, so that the times of its requests are nobody's rate.
UNTIMED = "untimed"

_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}

# Of servers; those behind a proxy that speaks TLS are reached where that listens.
_USUAL_PORT, _TLS_PORT = 8000, 443

API_KEY_VARIABLE = "OPENPI_API_KEY"

_HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 2**16
_UNAUTHORIZED = 401


class KeyRefused(websockets.exceptions.InvalidStatus):
    """The server wants an API key, or another one."""

    def __init__(self, response: Response, place: str, *, has_key: bool) -> None:
        super().__init__(response)
        self._text = (
            f"{place} does not take this API key (HTTP 401); give the one that the server was started with"
            if has_key
            else f"{place} asks for an API key (HTTP 401); give it as api_key=..., in commands as --api-key KEY or "
            f"{API_KEY_VARIABLE}"
        )

    def __str__(self) -> str:
        return self._text


def uri(host: str, port: Optional[int]) -> str:
    """The address of a server: of a host name, or of a URL of the schemes ws, wss, http (as ws) and https (as wss).

    Args:
        port: where `host` names none: programs that have a usual port take `wss://robot:8443`, too.
    Raises:
        ValueError: a URL of another scheme, or with a port that is none.
    """
    scheme, separator, rest = host.partition("://")
    if separator:
        if scheme not in _SCHEMES:
            raise ValueError(f"the address {host} begins with {scheme}://; expected a host name, ws://... or wss://...")
        host = f"{_SCHEMES[scheme]}://{rest}"
    else:
        is_bare_ipv6 = host.count(":") > 1 and not host.startswith("[")
        host = f"ws://[{host}]" if is_bare_ipv6 else f"ws://{host}"
    place = urlsplit(host)
    try:
        has_port = place.port is not None
    except ValueError as error:
        raise ValueError(f"the address {host} has a port that is none: {error}") from None
    return host if port is None or has_port else place._replace(netloc=f"{place.netloc}:{port}").geturl()


def usual_port(host: str, port: Optional[int] = None) -> int:
    """The port of `uri` in commands and programs, whose users need not name one: 443 of a URL with TLS (wss, https), as
    everywhere; 8000 else. Clients in code take what they are told, as the published ones.

    Args:
        port: what a flag says; None = nothing.
    """
    if port is not None:
        return port
    return _TLS_PORT if host.startswith(("wss://", "https://")) else _USUAL_PORT


def api_key_of(given: Optional[str] = None) -> Optional[str]:
    """The key of commands and programs, of servers and clients alike: one that is given, or else the environment's.
    In a command line, everybody who lists the processes sees it.

    Returns:
        None = there is none.
    Raises:
        ValueError: `check_key`.
    """
    key = os.environ.get(API_KEY_VARIABLE) if given is None else given
    check_key(key)
    return key


def check_key(api_key: Optional[str]) -> None:
    """
    Raises:
        ValueError: a key that would let everybody in, or that no header carries; the key is not repeated.
    """
    if api_key is None:
        return
    if not api_key.strip():
        found = "is empty"
    elif api_key.strip() != api_key:
        found = "has spaces or line ends around it (was it read from a file? use .strip())"
    elif not (api_key.isascii() and api_key.isprintable()):
        # Beyond ASCII, programs differ in the bytes that they send.
        found = "has characters other than printable ASCII"
    else:
        return
    raise ValueError(f"the API key {found}; give another, or none at all (unset {API_KEY_VARIABLE})")


def authorized(place: str, scheme: str, api_key: Optional[str]) -> Tuple[str, Dict[str, str]]:
    """An address as it may be told in messages, and the headers that only its server should read.

    Args:
        place: of `uri`; a login in it (wss://name:password@...) goes into the headers.
        scheme: of `Authorization`, for the key.
    Raises:
        ValueError: a key that cannot be sent, or a key and a login.
    """
    netloc = urlsplit(place).netloc
    login, at, server = netloc.rpartition("@")
    place = place.replace(netloc, server, 1)
    check_key(api_key or None)  # Published programs have "" where there is none.
    if api_key and at:
        raise ValueError(f"the address {place} has a login, and there is an api_key; give one of the two")
    if at:
        return place, {"Authorization": f"Basic {base64.b64encode(unquote(login).encode()).decode()}"}
    return place, {"Authorization": f"{scheme} {api_key}"} if api_key else {}


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
        ) from (error.__cause__ or error)


def open_stream(
    place: str,
    headers: Mapping[str, str],
    deadline: Deadline,
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
) -> Tuple[MessageStream, Headers]:
    """Connects to ws://... or wss://..., and returns the connection and the headers of the server's answer.

    Raises:
        OSError: no connection, or no whole answer in time.
        websockets.exceptions.InvalidHandshake: an answer that is no upgrade; InvalidStatus names its status.
        websockets.exceptions.InvalidURI: `place` is no such address.
    """
    target = parse_uri(place)
    with explained(place, headers):
        sock = _open_socket(target, deadline)
        try:
            response, behind = _upgrade(target, sock, headers, deadline)
            return (
                MessageStream(sock, is_client=True, received=behind, max_message_bytes=max_message_bytes),
                response.headers,
            )
        except BaseException:
            sock.close()
            raise


def _open_socket(target: WebSocketURI, deadline: Deadline) -> socket.socket:
    """A socket to the server, by way of the environment's proxy if it names one; encrypted, if that is wanted.

    Raises:
        OSError: server or proxy is out of reach, or silent.
        ValueError: what the environment names is no HTTP proxy.
        openpi_client.proxy.ProxyStatus, websockets.exceptions.InvalidMessage: the proxy opens no tunnel.
    """
    proxy = find_proxy(target.host, target.port, is_secure=target.secure)
    sock = sockets.connect(target.host, target.port, deadline) if proxy is None else proxy.connect(deadline)
    try:
        if proxy is not None:
            sockets.send_all(sock, proxy.tunnel_request(target.host, target.port), deadline)
            proxy.check_answer(_read_head(sock, deadline)[0])
        if target.secure:
            return sockets.encrypt(sock, ssl.create_default_context(), target.host, deadline)
        return sock
    except BaseException:
        sock.close()
        raise


def _upgrade(
    target: WebSocketURI, sock: socket.socket, headers: Mapping[str, str], deadline: Deadline
) -> Tuple[Response, bytes]:
    """The server's answer to the request for a websocket, and what came behind it."""
    protocol = ClientProtocol(target, max_size=None)
    request = protocol.connect()
    request.headers.update(headers)
    protocol.send_request(request)
    sockets.send_all(sock, b"".join(protocol.data_to_send()), deadline)
    head, behind = _read_head(sock, deadline)
    protocol.receive_data(head)
    if not head.startswith(b"HTTP/1.1 101"):
        _read_refusal(protocol, sock, behind, deadline)
    if protocol.handshake_exc is not None:
        raise protocol.handshake_exc
    [response] = protocol.events_received()
    assert isinstance(response, Response)
    return response, behind


def _read_head(sock: socket.socket, deadline: Deadline) -> Tuple[bytes, bytes]:
    """The server's answer up to the empty line, and what came behind it."""
    received = b""
    while _HEAD_END not in received:
        part = sockets.receive(sock, deadline)
        if not part:
            raise InvalidMessage("the server closed the connection during the handshake") from EOFError()
        received += part
        if len(received) > _MAX_HEAD_BYTES:
            raise InvalidMessage("the server's answer is no HTTP response")
    head, end, behind = received.partition(_HEAD_END)
    return head + end, behind


def _read_refusal(protocol: ClientProtocol, sock: socket.socket, received: bytes, deadline: Deadline) -> None:
    """Gives the protocol the body of an answer that is no upgrade; it then knows the status."""
    total = 0
    while protocol.handshake_exc is None:
        if received:
            protocol.receive_data(received)
        total += len(received)
        if protocol.handshake_exc is None:
            received = sockets.receive(sock, deadline) if total < _MAX_HEAD_BYTES else b""
            if not received:
                protocol.receive_eof()


def features(headers: Headers) -> FrozenSet[str]:
    """Extensions of the protocol that the other side names in its handshake; published ones name none."""
    return frozenset(name.strip() for line in headers.get_all(FEATURES_HEADER) for name in line.split(","))
