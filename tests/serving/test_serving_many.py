"""Several models, several clients: who gets which, what runs together, and what one client cannot do to others."""

import contextlib
import dataclasses
import http.client
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client
import websockets.sync.server

from openpi.checkpoints.find import steps_in
from openpi.cli.serving import server
from openpi.serving import connection as server_connection
from openpi.serving.access import Limits, has_key, is_foreign_page
from openpi.serving.catalog import CheckpointCatalog
from openpi.serving.errors import ServerBusyError, UnknownModelError
from openpi.serving.model_thread import Batching, Item, Job, ModelThread
from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy
from openpi_client.positronic_client import PositronicClient
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_positronic.codecs.catalog import get_codec
from serving_live import PATIENCE_S, TestPolicy, get, raw_connection, server_thread, until


@dataclasses.dataclass
class PlacePolicy(BasePolicy):
    """Answers with the place it was loaded from, as a number."""

    place: str

    def infer(self, obs: dict) -> dict:
        return {"actions": np.full((15, 8), float(Path(self.place).name.removeprefix("checkpoint-")), np.float32)}


def make_steps(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name / "params").mkdir(parents=True)
        (folder / name / "params" / "_METADATA").write_text("{}")
    return folder


@pytest.fixture
def experiment(tmp_path):
    return make_steps(tmp_path / "exp", "9000", "10000", "checkpoint-20000")


def checkpoints(experiment: Path, load=PlacePolicy, **options) -> CheckpointCatalog:
    return CheckpointCatalog(load, lambda: steps_in(experiment), description={"config_name": "c"}, **options)


def first_action(client) -> float:
    return float(client.infer({"x": 1.0})["actions"][0, 0])


# Which model


def test_steps_are_listed_by_number_and_matched_by_number(experiment):
    catalog = checkpoints(experiment)
    assert catalog.ids() == ["9000", "10000", "checkpoint-20000"]
    assert catalog.resolve(None) == "checkpoint-20000"
    for requested in ("9000", "009000", "checkpoint-9000"):
        assert catalog.resolve(requested) == "9000"
    for requested in ("777", "latest/../9000", "", "9000x"):
        with pytest.raises(UnknownModelError, match=r"no model .*; there are 9000, 10000, checkpoint-20000"):
            catalog.resolve(requested)


def test_a_single_checkpoint_is_asked_for_by_its_name_and_may_lie_in_a_package():
    models = server.find_models(server.parse(["package:openpi.demo/base"]))
    assert models.ids() == ["base"]
    assert models.resolve("base") == models.resolve(None) == "base"


def test_unfinished_checkpoints_are_no_models(experiment):
    (experiment / "30000").mkdir()
    (experiment / "40000.tmp" / "params").mkdir(parents=True)
    assert checkpoints(experiment).resolve(None) == "checkpoint-20000"


def test_models_are_listed_over_http_and_a_failure_is_an_empty_list(experiment):
    with server_thread(checkpoints(experiment)) as (_, port):
        status, content_type, body = get(port, "/api/v1/models")
        assert (status, content_type) == (200, "application/json")
        assert json.loads(body) == {"models": ["9000", "10000", "checkpoint-20000"]}

    def failing():
        raise OSError("the disk is gone")

    broken = CheckpointCatalog(PlacePolicy, failing, {"a": "1"})
    with pytest.raises(OSError, match="disk is gone"), server_thread(broken) as (_, port):
        pass


def test_each_session_gets_the_checkpoint_it_asked_for_and_the_least_recently_used_goes(experiment):
    loads = []

    def load(place):
        loads.append(Path(place).name)
        return PlacePolicy(place)

    with server_thread(checkpoints(experiment, load), max_models=2) as (_, port):
        for requested, value in ((None, 20000), ("9000", 9000), (None, 20000), ("10000", 10000), ("9000", 9000)):
            client = PositronicClient("127.0.0.1", port, model_id=requested)
            [step, *_] = client.infer({"x": 1})
            assert step["action"][0] == value
            client.close()
    assert loads == ["checkpoint-20000", "9000", "10000", "9000"]


def test_the_openpi_protocol_names_a_model_in_the_query(experiment):
    with server_thread(checkpoints(experiment), max_models=2) as (_, port):
        with WebsocketClientPolicy(f"ws://127.0.0.1:{port}/?model=9000") as client:
            assert first_action(client) == 9000
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            assert first_action(client) == 20000
        with pytest.raises(RuntimeError, match="no model '777'; there are 9000, 10000, checkpoint-20000") as refused:
            WebsocketClientPolicy(f"ws://127.0.0.1:{port}/?model=777")
        assert "Traceback" not in str(refused.value)


def test_a_session_for_another_model_waits_until_the_others_are_done(experiment):
    with server_thread(checkpoints(experiment)) as (_, port), raw_connection(port) as first:
        first.recv(PATIENCE_S)
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/api/v1/session/9000") as second:
            status = msgpack_numpy.unpackb(second.recv(PATIENCE_S))
            assert status["status"] == "waiting"
            assert status["message"].startswith("Waiting for 1 active session(s) to finish...")
            first.close()
            while (status := msgpack_numpy.unpackb(second.recv(PATIENCE_S)))["status"] != "ready":
                assert status["status"] in ("waiting", "loading")
            assert status["meta"]["checkpoint_id"] == "9000"
            assert status["meta"]["config_name"] == "c" and status["meta"]["type"] == "openpi"


def test_a_loaded_model_says_ready_first_and_an_unknown_one_ends_as_recorded(experiment):
    with server_thread(checkpoints(experiment), codec=get_codec("ee")) as (_, port):
        with WebsocketClientPolicy("127.0.0.1", port):
            pass  # It is loaded now.
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/api/v1/session") as connection:
            ready = msgpack_numpy.unpackb(connection.recv(PATIENCE_S))
            assert ready["status"] == "ready"
            assert ready["meta"]["checkpoint_id"] == "checkpoint-20000"
            assert (ready["meta"]["action_fps"], ready["meta"]["image_sizes"]) == (15.0, [224, 224])
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/api/v1/session/777") as connection:
            error = msgpack_numpy.unpackb(connection.recv(PATIENCE_S))
            assert error == {"status": "error", "error": "Checkpoint not found or invalid ID: 777."}
            with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
                connection.recv(PATIENCE_S)
            assert closed.value.rcvd.code == 1008


def test_a_model_that_cannot_be_loaded_is_told_and_tried_again_and_the_others_go_on(experiment):
    attempts = []

    def load(place):
        if place.endswith("9000"):
            attempts.append(place)
            raise ValueError("its params are damaged")
        return PlacePolicy(place)

    with (
        server_thread(checkpoints(experiment, load), max_models=2) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="its params are damaged"):
                PositronicClient("127.0.0.1", port, model_id="9000").reset()
        assert first_action(client) == 20000
    assert len(attempts) == 2


def test_a_newer_positronic_session_begins_and_ends_as_its_client_asks(experiment):
    with server_thread(checkpoints(experiment), codec=get_codec("joints_traj")) as (_, port):
        place = f"ws://127.0.0.1:{port}/api/v1/session"
        with websockets.sync.client.connect(f"{place}?protocol_version=3&codec.fps=10") as connection:
            while (ready := msgpack_numpy.unpackb(connection.recv(PATIENCE_S)))["status"] != "ready":
                pass
            assert ready["meta"]["effective_params"]["codec.fps"] == ready["meta"]["action_fps"] == 10
            connection.send(msgpack_numpy.packb({"x": 1}))
            assert "session_id" in msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["error"]
            goodbye = msgpack_numpy.packb({"session_id": ready["session_id"], "end_session": True})
            connection.send(goodbye)
            assert connection.recv(PATIENCE_S) == goodbye
            with pytest.raises(websockets.exceptions.ConnectionClosedOK):
                connection.recv(PATIENCE_S)
        with websockets.sync.client.connect(f"{place}?codec.speed=10") as connection:
            refusal = msgpack_numpy.unpackb(connection.recv(PATIENCE_S))
            assert refusal["status"] == "error" and "'codec.fps'" in refusal["error"]
            with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
                connection.recv(PATIENCE_S)
            assert closed.value.rcvd.code == 1008


def test_who_waits_for_the_server_asks_how_long_it_stays(experiment):
    with server_thread(checkpoints(experiment), api_key="secret") as (_, port):

        def ask(method, path, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Allow"), answer.read()

        key = {"Authorization": "Bearer secret"}
        assert ask("POST", "/api/v1/keepalive", **key) == (200, None, b'{"alive_seconds":null}')
        assert ask("POST", "/api/v1/keepalive")[0] == 401
        assert ask("GET", "/api/v1/keepalive", **key)[:2] == (405, "POST")
        assert ask("POST", "/api/v1/models", **key)[:2] == ask("POST", "/healthz")[:2] == (405, "GET")


def test_positronic_sessions_survive_bad_messages(experiment):
    with (
        server_thread(checkpoints(experiment), codec=get_codec("joints_traj")) as (_, port),
        websockets.sync.client.connect(f"ws://127.0.0.1:{port}/api/v1/session") as connection,
    ):
        while msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["status"] != "ready":
            pass
        image = np.zeros((48, 64, 3), np.uint8)
        good = {"robot_state.q": np.zeros(7), "grip": 0.0, "image.wrist": image, "image.exterior": image}
        bad = {key: value for key, value in good.items() if key != "grip"}
        for message, text in ((msgpack_numpy.packb(bad), "'grip'"), (b"\xc1", ""), ("a text frame", "text frame")):
            connection.send(message)
            answer = msgpack_numpy.unpackb(connection.recv(PATIENCE_S))
            assert answer["error"] and text in answer["error"]
        connection.send(msgpack_numpy.packb(good))
        steps = msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["result"]
        assert len(steps) == 15
        assert steps[0]["robot_command"]["type"] == "joint_pos" and steps[1]["timestamp"] == pytest.approx(1 / 15)


# Batches


class CountingPolicy(BasePolicy):
    """Remembers the sizes of its batches; answers with each observation's `x`. The first call waits for the gate."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.entered, self.gate = threading.Event(), threading.Event()

    def infer(self, obs: dict) -> dict:
        [result] = self.infer_batch([obs])
        return result

    def infer_batch(self, observations):
        self.sizes.append(len(observations))
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return [ValueError("no x") if "x" not in obs else {"actions": np.array([obs["x"]])} for obs in observations]


def test_requests_that_wait_together_run_as_one_batch_and_one_that_fails_hurts_no_other():
    policy = CountingPolicy()
    with server_thread(lambda: policy) as (_, port), ThreadPoolExecutor(6) as pool, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(WebsocketClientPolicy("127.0.0.1", port)) for _ in range(6)]
        first = pool.submit(clients[0].infer, {"x": 0.0})
        assert policy.entered.wait(PATIENCE_S)
        others = [pool.submit(client.infer, {"x": float(i)}) for i, client in enumerate(clients[1:5], 1)]
        broken = pool.submit(clients[5].infer, {"y": 1.0})
        until(lambda: 'openpi_queue_length{model="default"} 5.0' in get(port, "/metrics")[2])
        policy.gate.set()
        assert first.result(PATIENCE_S)["actions"][0] == 0.0
        assert [answer.result(PATIENCE_S)["actions"][0] for answer in others] == [1.0, 2.0, 3.0, 4.0]
        with pytest.raises(RuntimeError, match="ValueError: no x"):
            broken.result(PATIENCE_S)
        assert policy.sizes == [1, 5]
        assert 'openpi_batch_size_bucket{le="8.0",model="default"} 2.0' in get(port, "/metrics")[2]


def test_a_simulator_asks_for_many_worlds_in_one_message():
    policy = CountingPolicy()
    policy.gate.set()
    with server_thread(lambda: policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        answers = client.infer_batch([{"x": float(i)} if i != 3 else {} for i in range(10)])
        assert [answer["actions"][0] for answer in answers if "actions" in answer] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        assert answers[3] == {"error": "ValueError: no x"}
        assert policy.sizes == [8, 2]  # bounded
        assert client.infer({"x": 5.0})["actions"][0] == 5.0


def test_a_server_without_batches_is_not_sent_any():
    def session(connection):
        connection.send(msgpack_numpy.packb({}))
        connection.recv()

    with websockets.sync.server.serve(session, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.socket.getsockname()[1]
        with (
            WebsocketClientPolicy("127.0.0.1", port) as client,
            pytest.raises(NotImplementedError, match="one observation at a time"),
        ):
            client.infer_batch([{}])
        server.shutdown()
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def model_thread(policy, batching=None):
    thread = ModelThread(batching)
    thread.load(lambda: policy).result(PATIENCE_S)
    yield thread
    assert thread.finish(PATIENCE_S)


def submitted(thread, *xs: float) -> Future:
    """The results for a message with these observations."""
    outcome: Future = Future()

    def done(answer, error):
        outcome.set_result(answer.results) if error is None else outcome.set_exception(error)

    thread.submit(Job([Item({"x": x}) for x in xs]), done)
    return outcome


def test_a_lone_client_never_waits_for_others():
    """However long a batch may wait: nothing comes here, so waiting would never end in time."""
    policy = CountingPolicy()
    policy.gate.set()
    with model_thread(policy, Batching(max_wait_s=1e6)) as thread:
        answers = [submitted(thread, float(i)).result(PATIENCE_S) for i in range(5)]
    assert [answer[0]["actions"][0] for answer in answers] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_full_queue_is_an_error_that_says_so():
    policy = CountingPolicy()
    with model_thread(policy, Batching(max_queue=2)) as thread:
        waiting = [submitted(thread, 0.0)]
        assert policy.entered.wait(PATIENCE_S)
        waiting += [submitted(thread, 1.0), submitted(thread, 1.0)]
        with pytest.raises(ServerBusyError, match="2 requests are waiting already"):
            submitted(thread, 2.0)
        policy.gate.set()
        assert [answer.result(PATIENCE_S)[0]["actions"][0] for answer in waiting] == [0.0, 1.0, 1.0]


class CompilingPolicy(CountingPolicy):
    """Says, as a compiled policy does, which sizes run without compiling."""

    batch_sizes = (1,)
    warms_up_beside = True

    def warm_up(self, obs, *, batch_size):
        self.batch_sizes = (1, batch_size)


def test_larger_batches_are_compiled_when_they_are_first_needed_and_not_before():
    policy = CompilingPolicy()
    policy.gate.set()
    with model_thread(policy) as thread:
        submitted(thread, 1.0).result(PATIENCE_S)
        assert policy.batch_sizes == (1,)
        submitted(thread, 1.0, 2.0, 3.0).result(PATIENCE_S)
    assert policy.batch_sizes == (1, 4)


# What one client cannot do to others


@pytest.mark.parametrize(
    ("header", "opens"),
    [
        ("Api-Key secret", True),
        ("Bearer secret", True),
        ("bearer secret", True),
        ("Basic bGFiOnNlY3JldA==", True),  # lab:secret
        ("Basic bGFiOnNlY3Jl", False),
        ("Basic ???", False),
        ("secret", False),
        ("Digest secret", False),
        ("Api-Key secret2", False),
        ("", False),
    ],
)
def test_keys_are_taken_in_the_forms_of_both_protocols_and_of_browsers(header, opens):
    assert has_key({"Authorization": header}, "secret") is opens


def test_pages_of_other_servers_may_not_connect():
    assert not is_foreign_page({"Host": "robot:8000"})
    assert not is_foreign_page({"Host": "robot:8000", "Origin": "http://robot:8000"})
    assert is_foreign_page({"Host": "robot:8000", "Origin": "https://example.org"})
    assert not is_foreign_page({"Host": "robot:8000", "Origin": "https://example.org:444"}, {"example.org"})
    with server_thread(TestPolicy) as (_, port), pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(f"ws://127.0.0.1:{port}", origin="https://example.org").close()
    assert refused.value.response.status_code == 403


def test_every_page_but_the_health_checks_needs_the_key():
    with server_thread(TestPolicy, api_key="secret") as (_, port):
        for path in ("/", "/status.json", "/metrics", "/api/v1/models", "/nothing"):
            assert get(port, path)[0] == 401
        assert get(port, "/healthz")[0] == 200
        client = PositronicClient("127.0.0.1", port, api_key="secret")
        assert len(client.infer({"x": 1.0})) == 4
        client.close()


def test_too_large_a_message_ends_its_session_only():
    with (
        server_thread(TestPolicy, limits=Limits(max_message_bytes=2**20)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        raw_connection(port) as greedy,
    ):
        greedy.recv(PATIENCE_S)
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            greedy.send(bytes(2**20 + 1))
            greedy.recv(PATIENCE_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        assert first_action(client) == 1.0


def test_more_sessions_than_allowed_are_told_to_come_back():
    with server_thread(TestPolicy, limits=Limits(max_sessions=1)) as (_, port):
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            with pytest.raises(websockets.exceptions.InvalidStatus) as refused, raw_connection(port):
                pass
            assert refused.value.response.status_code == 503
            assert first_action(client) == 1.0
        with WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=PATIENCE_S) as client:
            assert first_action(client) == 1.0


def test_a_silent_session_keeps_its_place_while_nobody_wants_it(monkeypatch):
    monkeypatch.setattr(server_connection, "_KEEPS_PLACE_S", 0.05)
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as silent:
        silent.recv(PATIENCE_S)
        with pytest.raises(TimeoutError):
            silent.recv(0.3)
        silent.send(msgpack_numpy.packb({"x": 1.0}))
        assert msgpack_numpy.unpackb(silent.recv(PATIENCE_S))["actions"][0, 0] == 1.0


def test_a_silent_session_makes_room_for_another_model(experiment, monkeypatch):
    monkeypatch.setattr(server_connection, "_PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(server_connection, "_KEEPS_PLACE_S", 0.05)
    with server_thread(checkpoints(experiment)) as (_, port), raw_connection(port) as silent:
        silent.recv(PATIENCE_S)
        with WebsocketClientPolicy(f"ws://127.0.0.1:{port}/?model=9000") as client:
            assert first_action(client) == 9000
        with pytest.raises(websockets.exceptions.ConnectionClosedOK):
            silent.recv(PATIENCE_S)


@pytest.mark.parametrize("limits", [Limits(idle_timeout_s=0.1), Limits(max_sessions=2)])
def test_a_silent_session_is_closed_by_a_limit_or_for_others_and_our_client_comes_back_by_itself(limits, monkeypatch):
    monkeypatch.setattr(server_connection, "_KEEPS_PLACE_S", 0.1)
    with (
        server_thread(TestPolicy, limits=limits) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        raw_connection(port) as silent,
    ):
        silent.recv(PATIENCE_S)
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as closed:
            silent.recv(PATIENCE_S)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert first_action(client) == 1.0


def test_a_client_that_takes_no_answers_is_dropped_and_others_go_on():
    class LargeAnswers(BasePolicy):
        def infer(self, obs):
            return {"actions": np.zeros((32, 2**20), np.uint8) if "large" in obs else np.ones((1, 1))}

    with (
        server_thread(LargeAnswers, limits=Limits(send_timeout_s=0.2)) as (_, port),
        raw_connection(port, max_queue=1, close_timeout=0.1) as slow,
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for _ in range(8):
            slow.send(msgpack_numpy.packb({"large": True}))
        until(lambda: 'openpi_sessions{protocol="openpi"} 1.0' in get(port, "/metrics")[2])
        assert first_action(client) == 1.0


def test_an_observation_that_does_not_fit_leaves_the_session_open():
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(msgpack_numpy.packb({"refuse": "'state' has shape (7,)"}))
        assert connection.recv(PATIENCE_S) == "ObservationError: 'state' has shape (7,)"
        connection.send(msgpack_numpy.packb({"x": 3.0}))
        assert msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["actions"][0, 0] == 3.0
        assert (
            'openpi_requests_total{model="default",outcome="refused",protocol="openpi"} 1.0' in get(port, "/metrics")[2]
        )


def test_too_large_a_message_is_told_to_our_client_and_in_the_log_and_sent_only_once(caplog):
    with (
        server_thread(TestPolicy, limits=Limits(max_message_bytes=2**20)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        with pytest.raises(ConnectionError, match=r"1009 message of .* bytes; at most 1048576 are taken"):
            client.infer({"x": np.zeros(2**26, np.uint8)})
        assert first_action(client) == 1.0
    assert caplog.text.count("1009 message of") == 1
