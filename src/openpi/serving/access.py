"""Who may connect, and how much of the server one client can use."""

import base64
import binascii
import dataclasses
import hmac
import ipaddress
import socket
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from openpi.serving.scan import MessageLimits

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What keeps one client from taking the whole server.

    Attributes:
        max_message_bytes: larger messages end the session.
        max_sessions: open at once; more are answered with 503.
        idle_timeout_s: a session without a request for so long is closed; None = when it has been so for an hour and
            its place is wanted, since all are in use or another model is asked for.
        send_timeout_s: a client that does not take its answer for so long is dropped.
        max_memory_bytes: of the messages of all sessions together; None = 2 GiB, or more where messages may be larger.
        max_opening: connections at once that have not said yet what they want; the oldest makes room for another.
        max_opening_per_network: of them, from one address.
        max_pages: pages that are made or sent at once; more are answered with 503. Health checks are none.
        message: what one message may hold.
        refuses_suspicious: observations that do not look like those of training are refused, not only warned of.
    """

    max_message_bytes: int = 256 * _MIB
    max_sessions: int = 320
    idle_timeout_s: float | None = None
    send_timeout_s: float = 30.0
    max_memory_bytes: int | None = None
    max_opening: int = 512
    max_opening_per_network: int = 384
    max_pages: int = 64
    message: MessageLimits = dataclasses.field(default_factory=MessageLimits)
    refuses_suspicious: bool = False

    @property
    def memory_bytes(self) -> int:
        return self.max_memory_bytes or max(2048 * _MIB, 8 * self.max_message_bytes)

    @property
    def max_connections(self) -> int:
        """With some room for health checks, which take a moment."""
        return self.max_sessions + self.max_opening + self.max_pages + _HEALTH_CHECKS


_HEALTH_CHECKS = 32


def network_of(address: str) -> str:
    """Whom an address belongs to: itself, or its network, since a user of IPv6 has any number of addresses.

    Args:
        address: with the port behind its last colon.
    """
    host = address.rpartition(":")[0]
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    found = getattr(found, "ipv4_mapped", None) or found
    return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


def is_known_host(host: str, own: Collection[str]) -> bool:
    """Whether `Host` is a name that nobody else can make lead here. A page of any other name may have had it point to
    this machine (DNS rebinding), and the browser takes this server for the page's own.

    Args:
        own: further names of this server.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    return _is_address(name) or name == "localhost" or name.endswith(".localhost") or name in own


def own_names(host: str, further: Collection[str] = ()) -> frozenset[str]:
    """Of a server that listens on `host`."""
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    return frozenset({machine, short, f"{short}.local", host.lower(), *(name.lower() for name in further)})


def is_loopback(address: str) -> bool:
    """Whether an IP address is of this machine only."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def has_key(headers: Mapping[str, str], api_key: str) -> bool:
    """Whether `Authorization` carries the key: `Api-Key KEY`, `Bearer KEY`, or, for browsers, Basic with the key as the
    password. Compared in constant time, so that the time of a refusal says nothing about the key.
    """
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        given = _basic_password(given)
    elif scheme.lower() not in ("api-key", "bearer"):
        given = ""
    return hmac.compare_digest(given.strip().encode(), api_key.encode())


def is_foreign_page(headers: Mapping[str, str], allowed_hosts: Collection[str] = ()) -> bool:
    """Whether a browser opens the connection for a page of another server. Most robots' libraries send no `Origin`; a
    page that somebody visits could otherwise talk to the servers of his machine.

    Args:
        allowed_hosts: whose pages may.
    """
    if "Origin" not in headers:
        return False
    try:
        origin = urlsplit(headers["Origin"])
        return origin.netloc.lower() != headers.get("Host", "").lower() and origin.hostname not in allowed_hosts
    except ValueError:
        return True


def _basic_password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
