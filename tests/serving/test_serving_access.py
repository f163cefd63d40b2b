"""Who may look, and what counts as a request."""

import http.client
import socket

import pytest
import websockets.exceptions
import websockets.sync.client

from openpi.cli.serving import _running
from openpi.serving.access import is_known_host, network_of
from openpi.serving.server import PolicyServer
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import PATIENCE_S, TestPolicy, get, server_thread

UPGRADE = (
    "GET / HTTP/1.1\r\nHost: {host}\r\n{more}Upgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def port():
    with server_thread(TestPolicy, allowed_hosts=["robots.example.org"]) as (_, port):
        yield port


def status_of(port: int, request: str) -> int:
    """What a request is answered with; 0 = nothing."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        sock.sendall(request.encode("latin-1"))
        sock.settimeout(PATIENCE_S)
        line = sock.makefile("rb").readline()
    return int(line.split()[1]) if line else 0


def with_host(port: int, path: str, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost", True),
        ("localhost:9000", True),
        ("LOCALHOST.:8000", True),
        ("page.localhost", True),
        ("127.0.0.1:8000", True),
        ("192.168.1.7:8000", True),  # nobody can make an address lead elsewhere
        ("[::1]:8000", True),
        (socket.gethostname(), True),
        ("robots.example.org:443", True),
        ("evil.example.org", False),
        ("localhost.evil.example.org", False),
        ("127.0.0.1.evil.example.org:8000", False),
        ("evil.example.org@localhost", False),
        ("", False),
    ],
)
def test_on_loopback_a_page_of_another_name_sees_nothing(port, host, is_known):
    expected = 200 if is_known else 400 if "@" in host else 403
    assert {with_host(port, path, host) for path in ("/", "/status.json", "/metrics", "/api/v1/models")} == {expected}
    assert with_host(port, "/healthz", host) == (400 if "@" in host else 200)
    origin = f"Origin: http://{host}\r\n"
    assert status_of(port, UPGRADE.format(host=host, more=origin)) == (101 if is_known else expected)
    # Robots have no origin, and reach a tunnel, say, under any name.
    assert status_of(port, UPGRADE.format(host=host, more="")) == (400 if "@" in host else 101)


def test_a_page_that_had_its_name_point_here_opens_no_session(port):
    same = "Origin: http://evil.example.org:8000\r\n"
    assert status_of(port, UPGRADE.format(host="evil.example.org:8000", more=same)) == 403
    # Reached over the network the server does not know its names; a browser has to use one that it does know.
    with server_thread(TestPolicy, host="0.0.0.0") as (_, public):
        assert status_of(public, UPGRADE.format(host="evil.example.org:8000", more=same)) == 403
    for origin, status in (
        (f"http://localhost:{port}", 101),
        ("https://robots.example.org:3000", 101),  # behind a proxy that passes on another name, or on another port
        ("https://example.org", 403),
        ("null", 403),
        ("http://[", 403),
    ):
        more = f"Origin: {origin}\r\n"
        assert status_of(port, UPGRADE.format(host=f"localhost:{port}", more=more)) == status


def test_a_public_server_without_a_key_shows_no_cameras_and_serves_robots():
    with server_thread(TestPolicy, host="0.0.0.0") as (_, port):
        for path in ("/", "/status.json"):
            status, _, text = get(port, path)
            assert status == 403 and "OPENPI_API_KEY" in text
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        assert get(port, "/metrics")[0] == get(port, "/api/v1/models")[0] == get(port, "/readyz")[0] == 200


def test_a_public_server_with_a_key_shows_its_page_to_who_has_it():
    with server_thread(TestPolicy, host="0.0.0.0", api_key="secret") as (_, port):
        assert get(port, "/status.json")[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("GET", "/status.json", headers={"Authorization": "Bearer secret"})
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.parametrize("key", ["", " ", "secret\n", " secret", "se\x00cret", "schl\u00fcssel"])
def test_an_empty_or_unusable_key_is_an_error_and_not_an_open_server(key, monkeypatch):
    with pytest.raises(ValueError, match="the API key") as refused:
        PolicyServer(TestPolicy, api_key=key)
    assert "cret" not in str(refused.value)
    if "\0" not in key:
        monkeypatch.setenv("OPENPI_API_KEY", key)
        with pytest.raises(ValueError, match="unset OPENPI_API_KEY"):
            _running.run_server(TestPolicy, host="127.0.0.1", port=0)
    with pytest.raises(ValueError, match="the API key"):
        _running.run_server(TestPolicy, host="127.0.0.1", port=0, api_key=key)


HOST = "Host: localhost\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (f"GET /healthz HTTP/1.1\r\n{HOST}\r\n", 200),
        ("GET /healthz HTTP/1.0\r\n\r\n", 200),
        (f"GET //[ HTTP/1.1\r\n{HOST}\r\n", 400),
        (f"GET //healthz HTTP/1.1\r\n{HOST}\r\n", 404),
        (f"GET //status.json HTTP/1.1\r\n{HOST}\r\n", 404),  # a proxy that keeps that page back may let this pass
        (UPGRADE.format(host="localhost", more="").replace("GET / ", "GET //policy/ "), 101),  # nginx, with a prefix
        (f"GET http://localhost/healthz HTTP/1.1\r\n{HOST}\r\n", 400),
        (f"GET * HTTP/1.1\r\n{HOST}\r\n", 400),
        (f"GET healthz HTTP/1.1\r\n{HOST}\r\n", 400),
        (f"GET /?model=[ HTTP/1.1\r\n{HOST}\r\n", 200),
        (f"GET /\x80 HTTP/1.1\r\n{HOST}\r\n", 400),
        (f"GET /a b HTTP/1.1\r\n{HOST}\r\n", 400),
        ("GET /healthz HTTP/1.1\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}{HOST}\r\n", 400),
        (f"GET / HTTP/1.1\r\n{HOST}Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\n{HOST}Origin: a\r\nOrigin: b\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Content-Length: 0\r\nContent-Length: 0\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Content-Length: 5\r\n\r\nhello", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Content-Length: -1\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}Transfer-Encoding : chunked\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST} folded: a\r\n\r\n", 400),
        (f"GET /healthz HTTP/1.1\nHost: a\r\n{HOST}\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (f"GET /healthz HTTP/2.0\r\n{HOST}\r\n", 400),
        (f"POST /healthz HTTP/1.1\r\n{HOST}\r\n", (400, 405)),
        (f"GET /healthz HTTP/1.1\r\n{HOST}" + "A: b\r\n" * 200 + "\r\n", 400),
        (f"GET /healthz HTTP/1.1\r\n{HOST}" + "A: b\r\n" * 9000 + "\r\n", 431),
        ("GET /" + "a" * 40_000 + f" HTTP/1.1\r\n{HOST}\r\n", (400, 431)),
        ("\r\n\r\n", 400),
        ("SSH-2.0-probe\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_or_could_be_read_in_two_ways_is_refused(port, request_, status, caplog):
    assert status_of(port, request_) in (status if isinstance(status, tuple) else (status,))
    assert not caplog.records


def test_health_checks_may_ask_for_the_head_alone(port):
    """As `wget --spider` and load balancers do."""
    for path, status in (("/healthz", 200), ("/api/v1/keepalive", 405)):
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
            sock.sendall(f"HEAD {path} HTTP/1.1\r\n{HOST}\r\n".encode())
            head, _, body = b"".join(iter(lambda sock=sock: sock.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode()) and not body
        assert b"Content-Length: 0" not in head
    assert status_of(port, "HEAD " + UPGRADE.format(host="localhost", more="").removeprefix("GET ")) == 405


def test_a_request_behind_an_upgrade_is_part_of_the_session_and_not_answered(port):
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as sock:
        sock.sendall(2 * UPGRADE.format(host="localhost", more="").encode())
        sock.settimeout(PATIENCE_S)
        received = b"".join(iter(lambda: sock.recv(2**16), b""))
    assert received.count(b"HTTP/1.1 101") == 1 and b"\x03\xea" in received  # closed: protocol error


def test_a_foreign_page_is_refused_by_the_library_s_client_as_before(port):
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(f"ws://127.0.0.1:{port}", origin="https://example.org").close()
    assert refused.value.response.status_code == 403


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "reached"), [("::", ["127.0.0.1", "::1"]), ("[::1]", ["::1"])])
def test_addresses_of_ipv6_are_taken_and_told_as_urls_have_them(host, reached, caplog):
    caplog.set_level("INFO")
    with server_thread(TestPolicy, host=host) as (_, port):
        for address in reached:
            with WebsocketClientPolicy(address, port) as client:
                assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        _running.announce(host, None, "ws", port)
    place = f"[{host.strip('[]')}]:{port}"
    assert f"Listening on {place}" in caplog.text and f"status: http://{place};" in caplog.text


def test_names_and_networks():
    assert is_known_host("Robot-7:8000", {"robot-7"}) and not is_known_host("[", {"robot-7"})
    assert network_of("10.0.0.1:5") == network_of("::ffff:10.0.0.1:5") == "10.0.0.1"
    assert network_of("2001:db8::1:5") == network_of("2001:db8::ffff:1:5") != network_of("2001:db9::1:5")
