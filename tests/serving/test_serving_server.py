"""The policy server over real sockets."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client

import paths
from openpi.serving.websocket_policy_server import WebsocketPolicyServer
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import METADATA, PATIENCE_S, ServerProcess, TestPolicy, get, raw_connection, server_thread


@pytest.fixture
def policy():
    return TestPolicy()


@pytest.fixture
def port(policy):
    with server_thread(lambda: policy) as (_, port):
        yield port


@pytest.fixture
def client(port):
    with WebsocketClientPolicy("127.0.0.1", port) as client:
        yield client


def test_an_observation_is_answered_with_actions_and_timing(client):
    result = client.infer({"x": np.arange(4.0), "name": "first"})
    np.testing.assert_array_equal(result["actions"], np.full((4, 2), 6.0, np.float32))
    assert result["name"] == "first"
    assert set(result["server_timing"]) == {"infer_ms"}
    assert set(client.infer({"x": 1.0})["server_timing"]) == {"infer_ms", "prev_total_ms"}


def test_the_first_frame_is_the_policy_s_metadata(client):
    assert client.get_server_metadata() == METADATA


def test_healthz_answers_as_recorded_while_sessions_run(client, port, golden):
    client.infer({"x": 1.0})
    assert get(port, "/healthz") == (200, "text/plain; charset=utf-8", "OK\n")
    assert get(port, "/healthz?verbose")[0] == 200
    assert get(port, "/readyz")[0] == 200


def test_before_the_policy_is_loaded_the_server_is_healthy_but_not_ready(policy):
    loading = threading.Event()

    def load():
        assert loading.wait(PATIENCE_S)
        return policy

    with server_thread(load) as (_, port), ThreadPoolExecutor(1) as pool:
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/readyz")[0] == 503
        early = pool.submit(WebsocketClientPolicy, "127.0.0.1", port)
        with raw_connection(port) as connection:
            assert connection.ping().wait(PATIENCE_S)
            assert not early.done()
            loading.set()
            assert msgpack_numpy.unpackb(connection.recv(PATIENCE_S)) == METADATA
        with early.result(PATIENCE_S) as client:
            assert client.infer({"x": 2.0})["actions"][0, 0] == 2.0
        assert get(port, "/readyz")[0] == 200


def test_a_policy_that_cannot_be_loaded_ends_the_server_and_tells_waiting_clients(policy):
    loading = threading.Event()

    def load():
        assert loading.wait(PATIENCE_S)
        raise FileNotFoundError("no checkpoint here")

    with (
        pytest.raises(FileNotFoundError, match="no checkpoint here"),
        server_thread(load) as (_, port),
        raw_connection(port) as connection,
    ):
        loading.set()
        assert connection.recv(PATIENCE_S).endswith("FileNotFoundError: no checkpoint here\n")


def test_a_slow_inference_stops_neither_pings_nor_health_checks(policy, port):
    with raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(msgpack_numpy.packb({"wait": True}))
        policy.entered.get(timeout=PATIENCE_S)
        assert connection.ping().wait(PATIENCE_S)
        assert get(port, "/healthz")[0] == 200
        policy.gate.set()
        assert "actions" in msgpack_numpy.unpackb(connection.recv(PATIENCE_S))


def test_concurrent_clients_get_their_own_answers_one_inference_at_a_time(port):
    def session(number: int) -> list[float]:
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            return [float(client.infer({"x": number * 1000.0 + i})["actions"][0, 0]) for i in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for number, answers in enumerate(pool.map(session, range(4))):
            assert answers == [number * 1000.0 + i for i in range(20)]


def test_requests_sent_without_waiting_are_answered_in_order(port):
    with raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        for i in range(10):
            connection.send(msgpack_numpy.packb({"x": float(i)}))
        answers = [msgpack_numpy.unpackb(connection.recv(PATIENCE_S)) for _ in range(10)]
        assert [answer["actions"][0, 0] for answer in answers] == list(range(10))


@pytest.mark.parametrize(
    ("request_frame", "reason"),
    [
        (msgpack_numpy.packb({"fail": "deliberate failure"}), "ValueError: deliberate failure"),
        (msgpack_numpy.packb({"reply": "object"}), "TypeError: can not serialize 'object' object"),
        (msgpack_numpy.packb({"reply": "complex"}), "ValueError: Unsupported dtype: complex64"),
        (b"\xc1", "FormatError"),
        ("a text frame", "ValueError: received a text frame"),
    ],
)
def test_a_failed_request_gets_its_traceback_and_close_1011(port, request_frame, reason):
    with raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(request_frame)
        text = connection.recv(PATIENCE_S)
        assert isinstance(text, str) and text.startswith("Traceback (most recent call last):\n")
        assert reason in text.strip().splitlines()[-1]
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
            connection.recv(PATIENCE_S)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
        assert closed.value.rcvd.reason == "Internal server error. Traceback included in previous frame."


def test_the_traceback_of_a_server_in_debug_mode_shows_the_policy_and_not_the_server(policy):
    with server_thread(lambda: policy, debug=True) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(RuntimeError, match="Error in inference server:\nTraceback") as failure:
            client.infer({"fail": "deliberate failure"})
        assert "serving_live.py" in str(failure.value) and "model_thread.py" not in str(failure.value)


def test_other_servers_send_the_reason_and_where_the_log_has_the_rest(client, caplog):
    with pytest.raises(RuntimeError, match="ValueError: deliberate failure") as failure:
        client.infer({"fail": "deliberate failure"})
    assert "serving_live.py" not in str(failure.value)
    [number] = re.findall(r"error ([0-9a-f]{8}) in the server's log", str(failure.value))
    [record] = [record for record in caplog.records if number in record.getMessage()]
    assert "serving_live.py" in record.getMessage()


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"refuse": "'state' has shape (7,)"}, "ObservationError: 'state' has shape (7,)"),
        ({"undecodable": "the tokens hold 4 coefficients"}, "UndecodableActionsError: the tokens hold 4 coefficients"),
    ],
)
def test_what_a_message_explains_comes_without_a_traceback(client, request_, text):
    with pytest.raises(RuntimeError) as failure:
        client.infer(request_)
    assert str(failure.value) == f"Error in inference server:\n{text}"


def test_one_failing_session_does_not_hurt_another(port, client):
    with WebsocketClientPolicy("127.0.0.1", port) as other:
        for _ in range(3):
            with pytest.raises(RuntimeError, match="deliberate failure"):
                other.infer({"fail": "deliberate failure"})
            assert client.infer({"x": 3.0})["actions"][0, 0] == 3.0


def test_messages_may_be_large(client):
    frames = np.arange(12 * 2**20, dtype=np.uint8).reshape(4, 1024, 1024, 3)
    assert client.infer({"x": frames})["actions"][0, 0] == np.float32(frames.sum())


def test_messages_are_not_compressed(port):
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}") as connection:
        assert not connection.protocol.extensions


def test_a_client_that_leaves_before_its_turn_is_not_inferred_for(policy, port, client):
    with ThreadPoolExecutor(1) as pool, raw_connection(port) as leaver:
        slow = pool.submit(client.infer, {"wait": True})
        policy.entered.get(timeout=PATIENCE_S)
        leaver.recv(PATIENCE_S)
        leaver.send(msgpack_numpy.packb({"name": "leaver"}))
        assert leaver.ping().wait(PATIENCE_S)  # The server has read the request before it.
        leaver.close()
        policy.gate.set()
        slow.result(PATIENCE_S)
    assert client.infer({"name": "stayer"})["name"] == "stayer"
    assert [obs.get("name") for obs in policy.seen] == [None, "stayer"]


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_wrong_api_key_is_refused(policy, key):
    with server_thread(lambda: policy, api_key="secret") as (_, port):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            WebsocketClientPolicy("127.0.0.1", port, api_key=key)
        assert refused.value.response.status_code == 401
        assert ("asks for an API key" if key is None else "does not take this API key") in str(refused.value)
        assert get(port, "/healthz")[0] == 200


def test_the_right_api_key_opens_the_server(policy):
    with (
        server_thread(lambda: policy, api_key="secret") as (_, port),
        WebsocketClientPolicy("127.0.0.1", port, api_key="secret") as client,
    ):
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0


def test_stopping_finishes_the_running_inference_and_closes_idle_sessions(policy):
    with ThreadPoolExecutor(1) as pool, server_thread(lambda: policy) as (server, port):
        client = WebsocketClientPolicy("127.0.0.1", port, reconnect_timeout_s=0)
        slow = pool.submit(client.infer, {"wait": True})
        policy.entered.get(timeout=PATIENCE_S)
        with raw_connection(port) as idle:
            idle.recv(PATIENCE_S)
            server.stop()
            with pytest.raises(websockets.exceptions.ConnectionClosedOK) as closed:
                idle.recv(PATIENCE_S)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert not slow.done()
        policy.gate.set()
        assert "actions" in slow.result(PATIENCE_S)
        client.close()


def test_a_signal_that_another_thread_receives_ends_the_process_as_well():
    """As the kernel may choose while threads are born; it wakes the thread that received it, and not the main one."""
    program = """
import signal, threading
from openpi.serving.server import PolicyServer
from serving_live import TestPolicy

def interrupt(port):
    accepting = next(thread for thread in threading.enumerate() if thread.name == "openpi-accept")
    threading.Timer(1.0, signal.pthread_kill, (accepting.ident, signal.SIGTERM)).start()

PolicyServer(TestPolicy, port=0, on_listening=interrupt).run()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=paths.SUPPORT, timeout=PATIENCE_S)
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_after_the_running_inference_with_exit_code_0(tmp_path, number):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ServerProcess() as server, ThreadPoolExecutor(1) as pool:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        slow = pool.submit(client.infer, {"wait_for": str(pipe), "x": 5.0})
        assert server.line() == "inferring"
        server.signal(number)
        pipe.write_text("go on")
        assert slow.result(PATIENCE_S)["actions"][0, 0] == 5.0
        assert server.wait() == 0
        client.close()


def test_a_port_in_use_is_refused_with_an_os_error(policy, port):
    server = WebsocketPolicyServer(policy, "127.0.0.1", port)
    with pytest.raises(
        OSError, match=rf"cannot listen on 127.0.0.1:{port}: another program listens there; stop it, or"
    ):
        server.serve_forever()


def test_the_documented_server_serves_a_policy_of_one_s_own(policy):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = WebsocketPolicyServer(policy, "127.0.0.1", port, metadata={"robot": "r1"})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with WebsocketClientPolicy("127.0.0.1", port) as client:
        assert client.get_server_metadata() == {"robot": "r1"}
        assert client.infer({"x": 4.0})["actions"][0, 0] == 4.0
    server.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_port_probes_do_not_disturb_the_server(client, port, caplog):
    with socket.create_connection(("127.0.0.1", port)):
        pass
    assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
    assert "opening handshake failed" not in caplog.text
