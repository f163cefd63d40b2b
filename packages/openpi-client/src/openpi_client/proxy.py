"""HTTP proxies of the environment: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, or the system's settings.

A websocket takes the proxy for HTTPS, or failing that the one for HTTP (RFC 6455, section 4.1), as a tunnel (CONNECT).
"""

import base64
import contextlib
import ipaddress
import re
import socket
import urllib.request
from typing import NamedTuple, Optional
from urllib.parse import unquote, urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.http11 import Response

from openpi_client import sockets
from openpi_client.deadline import Deadline

_DEFAULT_PORT = 80
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) ?([^\r\n]*)")


class ProxyStatus(InvalidStatus):
    """The proxy opens no tunnel. `response.status_code` says why: 407 wants a password, 502 to 504 found no server."""

    def __str__(self) -> str:
        status, reason = self.response.status_code, self.response.reason_phrase
        return f"the proxy of the environment answered HTTP {status} {reason}; NO_PROXY names servers to reach directly"


class Proxy(NamedTuple):
    host: str
    port: int
    authorization: str  # a header line, or nothing

    def connect(self, deadline: Deadline) -> socket.socket:
        """Raises ConnectionError when it is out of reach: it is not on its way up, as a server may be."""
        try:
            return sockets.connect(self.host, self.port, deadline)
        except OSError as error:
            raise ConnectionError(f"the proxy {self.host}:{self.port} of the environment: {error}") from error

    def tunnel_request(self, host: str, port: int) -> bytes:
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{self.authorization}\r\n".encode()

    def check_answer(self, head: bytes) -> None:
        """Raises ProxyStatus or InvalidMessage unless the tunnel is open."""
        match = _STATUS_LINE.match(head)
        if match is None:
            raise InvalidMessage(f"the proxy {self.host}:{self.port} of the environment does not speak HTTP")
        status, reason = int(match.group(1)), match.group(2).decode("latin-1")
        if not 200 <= status < 300:
            raise ProxyStatus(Response(status, reason, Headers()))


def find_proxy(host: str, port: int, *, is_secure: bool) -> Optional[Proxy]:
    """The proxy that the environment names for a server; None = reach it directly, as always one on this host.

    Raises:
        ValueError: it names one that is no HTTP proxy.
    """
    if _is_this_host(host) or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    named = urllib.request.getproxies()
    schemes = ("https", "all") if is_secure else ("https", "http", "all")
    url = next((named[scheme] for scheme in schemes if named.get(scheme)), None)
    if url is None:
        return None
    with contextlib.suppress(ValueError):  # a port that is no number
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme == "http" and parts.hostname:
            return Proxy(parts.hostname, parts.port or _DEFAULT_PORT, _authorization(parts.username, parts.password))
    raise ValueError(
        f"the environment names the proxy {url.rpartition('@')[2]} for {host}; expected http://HOST:PORT. Correct "
        f"HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, or add {host} to NO_PROXY"
    )


def _authorization(username: Optional[str], password: Optional[str]) -> str:
    if username is None:
        return ""
    login = f"{unquote(username)}:{unquote(password or '')}".encode()
    return f"Proxy-Authorization: Basic {base64.b64encode(login).decode()}\r\n"


def _is_this_host(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
