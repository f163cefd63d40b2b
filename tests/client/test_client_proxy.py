"""Both clients through HTTP proxies that the environment names."""

import base64
import contextlib
import socket
import threading

import numpy as np
import pytest

from openpi_client.positronic_client import PositronicClient
from openpi_client.proxy import find_proxy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import PATIENCE_S, TestPolicy, server_thread

# A name that only the proxy knows.
FAR_HOST = "policy.test"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Proxy:
    """An HTTP proxy that opens tunnels; `FAR_HOST` is this machine.

    Attributes:
        asked: head of each request.
    """

    def __init__(self, login: str | None = None) -> None:
        self.asked: list[str] = []
        self._login = login
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            self.asked.append(head.decode())
            if self._login and base64.b64encode(self._login.encode()) not in head:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            assert host == FAR_HOST
            try:
                server = socket.create_connection(("127.0.0.1", int(port)))
            except ConnectionRefusedError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                return
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with server:
                back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                back.start()
                _pass_on(client, server)
                back.join(PATIENCE_S)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(2**16):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_client_reaches_the_server_through_the_proxy_of_the_environment(monkeypatch, variable):
    with Proxy() as proxy, server_thread(TestPolicy) as (_, port):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        frames = np.arange(3 * 2**20, dtype=np.uint8)
        with WebsocketClientPolicy(FAR_HOST, port) as client:
            assert client.infer({"x": frames})["actions"][0, 0] == np.float32(frames.sum())
        [asked] = proxy.asked
        assert asked.startswith(f"CONNECT {FAR_HOST}:{port} HTTP/1.1\r\nHost: {FAR_HOST}:{port}\r\n")


def test_positronic_s_client_takes_the_same_way(monkeypatch):
    with Proxy() as proxy, server_thread(TestPolicy) as (_, port):
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")
        with PositronicClient(FAR_HOST, port) as client:
            assert len(client.infer({"x": 2.0})) == 4
        assert len(proxy.asked) == 1


def test_servers_on_this_host_and_in_no_proxy_are_reached_without(monkeypatch):
    with Proxy() as proxy, server_thread(TestPolicy) as (_, port):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            with WebsocketClientPolicy(host, port) as client:
                assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        assert find_proxy("robots.lab", 8000, is_secure=False) is not None
        monkeypatch.setenv("NO_PROXY", ".lab,other.net:9000")
        assert find_proxy("robots.lab", 8000, is_secure=False) is None
        assert find_proxy("other.net", 9000, is_secure=False) is None
        assert find_proxy("other.net", 8000, is_secure=False) is not None
        assert proxy.asked == []


def test_the_proxy_for_https_comes_first_and_the_one_for_http_is_not_for_wss(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://plain:1")
    assert find_proxy("far", 80, is_secure=True) is None
    monkeypatch.setenv("ALL_PROXY", "http://any:3")
    assert find_proxy("far", 80, is_secure=True) == ("any", 3, "")
    monkeypatch.setenv("HTTPS_PROXY", "http://secure")
    for is_secure in (False, True):
        assert find_proxy("far", 80, is_secure=is_secure) == ("secure", 80, "")


def test_a_proxy_with_a_password_gets_it(monkeypatch):
    with Proxy(login="lab:p@ss") as proxy, server_thread(TestPolicy) as (_, port):
        monkeypatch.setenv("HTTPS_PROXY", f"http://lab:p%40ss@127.0.0.1:{proxy.port}")
        WebsocketClientPolicy(FAR_HOST, port).close()
        monkeypatch.setenv("HTTPS_PROXY", f"http://lab:wrong@127.0.0.1:{proxy.port}")
        with pytest.raises(Exception, match="proxy of the environment answered HTTP 407 Proxy Authentication Required"):
            WebsocketClientPolicy(FAR_HOST, port, connect_timeout_s=PATIENCE_S)
        with pytest.raises(ConnectionError, match="HTTP 407"):
            PositronicClient(FAR_HOST, port).reset()


def test_a_server_that_the_proxy_does_not_find_yet_is_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(TimeoutError, match=r"no policy server .* within 0.1 s .*HTTP 502 Bad Gateway"):
            WebsocketClientPolicy(FAR_HOST, port, connect_timeout_s=0.1)


def test_a_proxy_that_is_not_there_or_none_of_http_is_named_at_once(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    with pytest.raises(ConnectionError, match=rf"the proxy 127\.0\.0\.1:{port} of the environment: .*refused"):
        WebsocketClientPolicy(FAR_HOST, 8000)
    for url in ("socks5://me:secret@proxy:1080", "http://me:secret@proxy:port"):
        monkeypatch.setenv("HTTPS_PROXY", url)
        with pytest.raises(ValueError, match=r"names the proxy proxy:.* for policy\.test; expected http") as failure:
            WebsocketClientPolicy(FAR_HOST, 8000)
        assert "secret" not in str(failure.value)
