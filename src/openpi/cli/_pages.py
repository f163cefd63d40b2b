"""Small pages that commands show while they run: who may see them, and what is answered to a browser.

They hold themselves to what the policy server does (`serving.access`): names that nobody else can make lead here, no
pages of others, a key for other machines.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from openpi.serving.access import has_key, is_foreign_page, is_known_host, is_loopback, own_names
from openpi_client.connection import check_key

LOOPBACK = "127.0.0.1"
Answer = tuple[HTTPStatus, str, bytes]
NONE: Answer = (HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such page")
_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)
_MOST_BYTES = 2**16  # of what a form sends
_TIMEOUT_S = 10.0


class Site(Protocol):
    """What is shown, without sockets. Called from several threads."""

    def get(self, path: str) -> Answer: ...

    def post(self, path: str, body: bytes) -> Answer: ...


def open_server(site: Site, host: str = LOOPBACK, port: int = 0, *, api_key: str | None = None) -> ThreadingHTTPServer:
    """Listens, and answers when `serve_forever` is called.

    Args:
        port: 0 = a free one.
        api_key: that browsers ask for: any name, the key as password; None = only this machine is answered.
    Raises:
        ValueError: others could reach it, and there is no key; or the key is none.
        OSError: the port is taken, or the address is not of this machine.
    """
    check_key(api_key)
    names = own_names(host)

    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            if self._is_welcome():
                self._send(site.get(self.path.partition("?")[0]))

        def do_POST(self) -> None:
            if not self._is_welcome():
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > len(str(_MOST_BYTES)) or int(length) > _MOST_BYTES:
                self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                return
            self._send(site.post(self.path.partition("?")[0], self.rfile.read(int(length))))

        def _is_welcome(self) -> bool:
            """Whether this browser gets an answer; else it has got its refusal."""
            given = {name: self.headers.get_all(name) or [] for name in ("Host", "Origin", "Authorization")}
            headers = {name: values[0] for name, values in given.items() if values}
            is_clear = max(map(len, given.values())) == 1
            if not is_clear or not is_known_host(headers.get("Host", ""), names) or is_foreign_page(headers):
                self.send_error(HTTPStatus.FORBIDDEN)
                return False
            if api_key and not has_key(headers, api_key):
                self._send((HTTPStatus.UNAUTHORIZED, "text/plain", b"missing or wrong API key"), wants_key=True)
                return False
            return True

        def _send(self, answer: Answer, *, wants_key: bool = False) -> None:
            status, kind, body = answer
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": _POLICY}
            headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
            if wants_key:
                headers["WWW-Authenticate"] = 'Basic realm="openpi: any name, the API key as password"'
            self.send_response(status)
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a line for each request helps nobody."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: browsers leave as they like."""

    server = Server((host, port), Handler)
    if api_key is None and not is_loopback(str(server.server_address[0])):
        server.server_close()
        raise ValueError(
            f"the page at {host} could be reached from other machines, and there is no key; give one with --api-key or "
            "OPENPI_API_KEY, or stay on 127.0.0.1"
        )
    return server


@contextlib.contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[str]:
    """Answers in a thread meanwhile; the address is given."""
    thread = threading.Thread(target=server.serve_forever, name="openpi-page", daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    try:
        yield f"http://[{host}]:{port}/" if ":" in str(host) else f"http://{host}:{port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
