"""The websocket client: recorded servers, servers that are not there, that leave, that are slow."""

import base64
import contextlib
import json
import os
import queue
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.server

from openpi_client import connection, msgpack_numpy, websocket_client_policy
from openpi_client.positronic_client import PositronicClient
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import PATIENCE_S, ServerProcess, TestPolicy, server_thread, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(websocket_client_policy, "_RETRY_INTERVAL_S", 0.02)


@contextlib.contextmanager
def plain_server(handler, **options):
    """Port of a server that is nothing but the websockets library."""
    with websockets.sync.server.serve(handler, "127.0.0.1", 0, compression=None, max_size=None, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


def free_port() -> int:
    with contextlib.closing(websocket_client_policy.socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def test_the_client_understands_the_recorded_server(golden):
    folder = golden / "wire" / "openpi_session"
    recorded = json.loads((folder / "transcript.json").read_text())
    steps = {step["name"]: (folder / step["file"]).read_bytes() for step in recorded["steps"]}
    requests = [msgpack_numpy.unpackb(steps[f"{name}_request"]) for name in ("01", "02")]
    received: list[bytes] = []

    def replay(connection):
        connection.send(steps["00_metadata"])
        for name in ("01", "02"):
            received.append(connection.recv())
            connection.send(steps[f"{name}_response"])
        received.append(connection.recv())
        connection.send(steps["03_error_text_frame"].decode())
        connection.close(**recorded["after_error_close"])

    with plain_server(replay) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        assert client.get_server_metadata() == msgpack_numpy.unpackb(steps["00_metadata"])
        for name, request in zip(("01", "02"), requests, strict=True):
            result = client.infer(request)
            assert 0 <= result.pop("obs_age_s") < PATIENCE_S
            np.testing.assert_equal(result, msgpack_numpy.unpackb(steps[f"{name}_response"]))
        with pytest.raises(RuntimeError) as failure:
            client.infer(msgpack_numpy.unpackb(steps["03_bad_request"]))
    assert str(failure.value) == "Error in inference server:\n" + steps["03_error_text_frame"].decode()
    assert received == [steps["01_request"], steps["02_request"], steps["03_bad_request"]]


@pytest.mark.parametrize(
    ("host", "port", "uri"),
    [
        ("robot.local", 8000, "ws://robot.local:8000"),
        ("0.0.0.0", None, "ws://0.0.0.0"),
        ("ws://host", 9000, "ws://host:9000"),
        ("wss://host:8443", 8000, "wss://host:8443"),
        ("host:8443", 8000, "ws://host:8443"),
        ("[::1]:8443", 8000, "ws://[::1]:8443"),
        ("wss://policy.example.com/pi0", 8443, "wss://policy.example.com:8443/pi0"),
        ("wss://name:word@host", 8443, "wss://name:word@host:8443"),
        ("wss://policy.example.com", None, "wss://policy.example.com"),
        ("wss://policy.example.com/pi0", None, "wss://policy.example.com/pi0"),
        ("::1", 8000, "ws://[::1]:8000"),
        ("wsrobot", 8000, "ws://wsrobot:8000"),
        ("http://robot", 8000, "ws://robot:8000"),
        ("https://policy.example.com", None, "wss://policy.example.com"),
    ],
)
def test_hosts_and_urls_are_understood(host, port, uri):
    assert connection.uri(host, port) == uri


@pytest.mark.parametrize(
    ("host", "port", "uri"),
    [
        ("192.168.1.20", None, "ws://192.168.1.20:8000"),
        ("wss", None, "ws://wss:8000"),
        ("ws://robot", None, "ws://robot:8000"),
        ("robot:8443", None, "ws://robot:8443"),
        ("wss://robot.example/path", None, "wss://robot.example:443/path"),
        ("https://robot.example", None, "wss://robot.example:443"),
        ("wss://robot.example:8000", None, "wss://robot.example:8000"),
        ("wss://robot.example/path", 8000, "wss://robot.example:8000/path"),
    ],
)
def test_commands_without_a_port_ask_a_host_at_8000_and_a_url_with_tls_at_443(host, port, uri):
    assert connection.uri(host, connection.usual_port(host, port)) == uri


def test_the_api_key_travels_in_the_upgrade_request():
    headers: queue.SimpleQueue = queue.SimpleQueue()

    def handler(connection):
        headers.put(connection.request.headers)
        connection.send(msgpack_numpy.packb({}))

    with plain_server(handler) as port:
        WebsocketClientPolicy("127.0.0.1", port, "k3y").close()
        WebsocketClientPolicy("127.0.0.1", port).close()
    assert headers.get(timeout=PATIENCE_S)["Authorization"] == "Api-Key k3y"
    assert "Authorization" not in headers.get(timeout=PATIENCE_S)


@pytest.mark.parametrize("key", ["secr3t\n", " secr3t", "secr3t\r\nX: y", "secr3t\u00fc", "secr3t\u65e5"])
@pytest.mark.parametrize("make", [WebsocketClientPolicy, PositronicClient])
def test_a_key_that_cannot_be_sent_is_refused_at_once_and_never_repeated(make, key):
    with pytest.raises(ValueError, match="the API key has") as refused:
        make("127.0.0.1", 1, api_key=key)
    error: BaseException | None = refused.value
    while error is not None:
        assert "secr3t" not in str(error)
        error = error.__cause__ or error.__context__


def test_a_login_in_the_address_is_sent_and_not_told(caplog):
    caplog.set_level("INFO")
    headers: queue.SimpleQueue = queue.SimpleQueue()

    def handler(connection):
        headers.put(connection.request.headers)
        connection.send(msgpack_numpy.packb({}))

    with plain_server(handler) as port:
        WebsocketClientPolicy(f"ws://robot:s%20cret@127.0.0.1:{port}").close()
    assert headers.get(timeout=PATIENCE_S)["Authorization"] == "Basic " + base64.b64encode(b"robot:s cret").decode()
    with pytest.raises(TimeoutError, match="no policy server at ws://127") as late:
        WebsocketClientPolicy("ws://robot:s%20cret@127.0.0.1:1", connect_timeout_s=0.1)
    assert "cret" not in str(late.value) + caplog.text
    with pytest.raises(ValueError, match="a login, and there is an api_key"):
        WebsocketClientPolicy("ws://robot:s%20cret@127.0.0.1:1", api_key="k3y")


def test_the_client_waits_for_a_server_that_is_not_there_yet(caplog):
    caplog.set_level("INFO")
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(WebsocketClientPolicy, "127.0.0.1", port)
        with ServerProcess(port):
            early.result(PATIENCE_S).close()
    assert f"Waiting for the policy server at ws://127.0.0.1:{port}" in caplog.text


def test_the_client_waits_behind_a_proxy_that_says_503():
    answers = iter([503, 502])

    def not_ready(connection, request):
        status = next(answers, None)
        return None if status is None else connection.respond(status, "starting\n")

    def handler(connection):
        connection.send(msgpack_numpy.packb({"up": True}))

    with (
        plain_server(handler, process_request=not_ready) as port,
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        assert client.get_server_metadata() == {"up": True}


def test_no_server_within_the_limit_is_a_timeout_that_names_the_address():
    port = free_port()
    with pytest.raises(TimeoutError, match=f"no policy server at ws://127.0.0.1:{port} within 0.1 s .*refused"):
        WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=0.1)


def test_a_server_that_is_there_and_still_loads_is_not_told_as_one_that_refused_before():
    statuses = iter([503])

    def not_yet(connection, request):
        return connection.respond(503, "starting\n") if next(statuses, None) else None

    over = threading.Event()
    with (
        plain_server(lambda _: over.wait(PATIENCE_S), process_request=not_yet) as port,
        pytest.raises(TimeoutError, match=r"\(it is there, and its model is not ready\); its log"),
    ):
        try:
            WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=2.0)
        finally:
            over.set()


def test_a_server_that_never_gets_ready_is_a_timeout():
    leave = threading.Event()
    with plain_server(lambda connection: leave.wait(PATIENCE_S)) as port:
        with pytest.raises(TimeoutError, match=r"within 0.3 s"):
            WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=0.3)
        leave.set()


def test_an_answer_that_takes_too_long_is_a_timeout_and_never_the_answer_of_the_next_request():
    policy = TestPolicy()
    with (
        server_thread(lambda: policy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port, request_timeout_s=1.0) as client,
    ):
        with pytest.raises(TimeoutError, match=r"no answer within 1 s"):
            client.infer({"wait": True, "name": "late"})
        policy.gate.set()
        assert client.infer({"name": "next"})["name"] == "next"


def test_after_a_server_restart_the_client_goes_on():
    with ServerProcess() as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port, max_age_s=None)
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        server.kill()
    with ServerProcess(server.port):
        assert client.infer({"x": 2.0})["actions"][0, 0] == 2.0
        client.close()


def test_a_request_under_way_when_the_server_dies_is_sent_to_the_next_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ServerProcess() as server, ThreadPoolExecutor(1) as pool:
        client = WebsocketClientPolicy("127.0.0.1", server.port, max_age_s=None)
        answer = pool.submit(client.infer, {"wait_for": str(pipe), "x": 7.0})
        assert server.line() == "inferring"
        server.kill()
        with ServerProcess(server.port) as successor:
            assert successor.line() == "inferring"
            pipe.write_text("go on")
            assert answer.result(PATIENCE_S)["actions"][0, 0] == 7.0
            client.close()


def test_a_request_is_not_sent_again_when_that_is_switched_off(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ServerProcess() as server, ThreadPoolExecutor(1) as pool:
        client = WebsocketClientPolicy("127.0.0.1", server.port, resend=False)
        answer = pool.submit(client.infer, {"wait_for": str(pipe)})
        assert server.line() == "inferring"
        server.kill()
        with pytest.raises(ConnectionError, match="dropped"):
            answer.result(PATIENCE_S)
    with ServerProcess(server.port):
        assert client.infer({"x": 2.0})["actions"][0, 0] == 2.0
        client.close()


def test_without_reconnecting_a_lost_server_is_a_connection_error():
    with ServerProcess() as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port, reconnect_timeout_s=0)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        for _ in range(2):
            with pytest.raises(ConnectionError, match="dropped"):
                client.infer({"x": 1.0})


def test_a_server_that_does_not_come_back_is_a_connection_error():
    with ServerProcess() as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port, reconnect_timeout_s=0.1)
        server.kill()
    with pytest.raises(ConnectionError, match=r"within 0.1 s"):
        client.infer({"x": 1.0})


def test_a_failed_request_does_not_end_the_client():
    with server_thread(TestPolicy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(RuntimeError, match="wrong camera"):
            client.infer({"fail": "wrong camera"})
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0


def test_an_observation_that_cannot_be_sent_does_not_end_the_client():
    with server_thread(TestPolicy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(TypeError, match="object"):
            client.infer({"x": object()})
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0


def test_a_closed_client_says_so():
    with server_thread(TestPolicy) as (_, port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        client.close()
        with pytest.raises(ConnectionError, match="was closed"):
            client.infer({})


def test_threads_may_share_a_client():
    with (
        server_thread(TestPolicy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        answers = pool.map(lambda i: client.infer({"x": float(i)})["actions"][0, 0], range(40))
        assert list(answers) == list(range(40))


def test_an_address_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="begins with tcp://; expected a host name, ws://"):
        WebsocketClientPolicy("tcp://robot", 8000)


def test_a_server_that_hangs_up_during_the_handshake_may_speak_tls():
    def hang_up(listening):
        listening.accept()[0].close()

    with (
        contextlib.closing(websocket_client_policy.socket.create_server(("127.0.0.1", 0))) as listening,
        ThreadPoolExecutor(1) as pool,
    ):
        port = listening.getsockname()[1]
        pool.submit(hang_up, listening)
        with pytest.raises(websockets.exceptions.InvalidMessage, match=f"its address is wss://127.0.0.1:{port}"):
            WebsocketClientPolicy("127.0.0.1", port)


def test_who_waits_long_is_warned(monkeypatch, caplog):
    monkeypatch.setattr(websocket_client_policy, "_FIRST_WARNING_S", 0.05)
    policy = TestPolicy()
    port = free_port()
    with pytest.raises(TimeoutError):
        WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=0.3)
    assert f"Waiting for the policy server at ws://127.0.0.1:{port}" in caplog.text
    with (
        server_thread(lambda: policy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.infer, {"wait": True, "name": "late"})
        until(lambda: f"Waiting for an answer of ws://127.0.0.1:{port}" in caplog.text)
        policy.gate.set()
        assert answer.result(PATIENCE_S)["name"] == "late"
    assert all(record.levelname == "WARNING" for record in caplog.records if "Waiting for" in record.getMessage())


def test_what_is_no_observation_is_refused_before_it_is_sent():
    with server_thread(TestPolicy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        for wrong, found in ((None, "NoneType"), ([1], "list of int")):
            with pytest.raises(TypeError, match=f"infer takes one observation, .* got {found}"):
                client.infer(wrong)
        with pytest.raises(TypeError, match=r"infer_batch takes a list of observations, .* got dict"):
            client.infer_batch({"x": 1.0})
        with pytest.raises(TypeError, match="'images/cam_high' cannot be sent: can not serialize 'object'"):
            client.infer({"x": np.zeros(3), "images": {"cam_high": object()}})
        with pytest.raises(ValueError, match="'names/1' cannot be sent: Unsupported dtype: object"):
            client.infer({"names": [1, np.array([object()])]})
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
    with pytest.raises(ValueError, match="jpeg_quality is 500; expected 1 to 95"):
        WebsocketClientPolicy("127.0.0.1", port, jpeg_quality=500)


def test_a_server_that_hangs_up_in_the_handshake_is_tried_again():
    """As one does that is being stopped, or a proxy whose server is away."""
    num_tries = 0

    def hang_up(listener: socket.socket) -> None:
        nonlocal num_tries
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                num_tries += 1
                sock.recv(4096)
                sock.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        with pytest.raises(TimeoutError, match=r"no policy server at .* closed the connection during the handshake"):
            WebsocketClientPolicy("127.0.0.1", listener.getsockname()[1], connect_timeout_s=1.5)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert num_tries >= 2
