"""Who may connect, and how much of the server one client can use."""

import base64
import binascii
import dataclasses
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What keeps one client from taking the whole server.

    Attributes:
        max_message_bytes: larger messages end the session.
        max_sessions: open at once; more are answered with 503.
        idle_timeout_s: a session without a request for so long is closed; None = never.
        send_timeout_s: a client that does not take its answer for so long is dropped.
    """

    max_message_bytes: int = 256 * _MIB
    max_sessions: int = 128
    idle_timeout_s: float | None = 3600.0
    send_timeout_s: float = 30.0


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


def is_foreign_page(headers: Mapping[str, str]) -> bool:
    """Whether a browser opens the connection for a page of another server. Robots send no `Origin`; a page that
    somebody visits could otherwise talk to the servers of his machine.
    """
    origin = headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("Host")


def _basic_password(encoded: str) -> str:
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
