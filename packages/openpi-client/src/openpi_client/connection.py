"""Opening and closing websocket connections to a policy server, whatever is spoken over them."""

import inspect
import logging
import socket
from typing import Any, Dict, FrozenSet, Optional

import websockets.exceptions
import websockets.sync.client

logger = logging.getLogger(__name__)

# One attempt: TCP, TLS and websocket handshake.
HANDSHAKE_TIMEOUT_S = 10.0

# The kernel probes an idle peer, so a robot notices a server that lost power. Websocket pings would do the
# same, but a server that runs inference on its event loop leaves them unanswered, and the connection would be
# dropped.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


def uri(host: str, port: Optional[int]) -> str:
    if not host.startswith(("ws://", "wss://")):
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
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):  # not on every operating system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def features(ws: websockets.sync.client.ClientConnection) -> FrozenSet[str]:
    """Extensions of the protocol that the server names in its handshake; none of the published servers does."""
    response = ws.response
    named = "" if response is None else response.headers.get("Openpi-Features", "")
    return frozenset(name.strip() for name in named.split(","))


def hang_up(ws: websockets.sync.client.ClientConnection) -> None:
    """Closes without complaint: the other side may be gone already."""
    try:
        ws.close()
    except (OSError, websockets.exceptions.WebSocketException) as error:
        logger.debug("closing the connection failed: %s", error)
