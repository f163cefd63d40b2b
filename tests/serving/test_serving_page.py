"""The status page and its data, seen by a browser."""

import json
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

from browser import BROWSER, MISSING, dom, on_a_telephone
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import PaligemmaTokenizer
from openpi.policies.contract import Contract
from openpi.policies.droid_policy import DroidInputs, DroidOutputs, make_droid_example
from openpi.policies.guards import RangeGuard
from openpi.policies.policy import Policy
from openpi.policies.seen import Seen
from openpi.serving import pages
from openpi.serving.live import LiveSession
from openpi.serving.pages import _last_exchange, status_json, status_page
from openpi.transforms import TokenizePrompt
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from paths import GOLDEN
from serving_live import PATIENCE_S, TestPolicy, get, raw_connection, server_thread


class SwingSampler:
    """Joints that swing; no model, so that pages and recordings have something to show."""

    takes_noise = True
    action_horizon, action_dim = 15, 32

    def sample(self, inputs, noise, **_):
        batch = len(inputs["state"])
        phase = np.linspace(0, 2 * np.pi, self.action_horizon)[None, :, None] + np.arange(32)[None, None] / 3
        return np.broadcast_to(np.sin(phase), (batch, self.action_horizon, 32)).astype(np.float32)


def droid_policy(seen: Seen | None = None) -> Policy:
    spec = DroidInputs(ModelType.PI05).spec
    contract = Contract(
        robot="droid",
        model_type="pi05",
        cameras=spec.cameras,
        state=spec.state,
        actions=spec.actions,
        action_kind=spec.action_kind,
        trained_relative=(),
        action_horizon=15,
        control_hz=15.0,
        state_q01=(-1.0,) * 8,
        state_q99=(1.0,) * 8,
        seen=seen,
    )
    tokenizer = PaligemmaTokenizer(160, GOLDEN / "tokenizers" / "tiny_paligemma_tokenizer.model")
    transforms = [DroidInputs(ModelType.PI05), RangeGuard(contract), TokenizePrompt(tokenizer, True)]
    return Policy(SwingSampler(), transforms=transforms, output_transforms=[DroidOutputs()], contract=contract)


def observation(joint_3: float = 0.5) -> dict:
    example = make_droid_example()
    rows = np.linspace(0, 255, 224, dtype=np.uint8)
    example["observation/exterior_image_1_left"] = np.stack(
        [np.tile(rows, (224, 1)), np.tile(rows, (224, 1)).T, np.full((224, 224), 90, np.uint8)], -1
    )
    example["observation/joint_position"] = np.array([0.1, -0.4, joint_3, -0.9, 0.2, 0.8, 0.0])
    return {**example, "prompt": "put the cup on the plate"}


def test_the_handshake_tells_the_contract_and_an_answer_what_is_far_outside_of_it():
    with server_thread(droid_policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        contract = client.get_server_metadata()["contract"]
        required = [camera["key"] for camera in contract["cameras"] if camera["required"]]
        assert "observation/exterior_image_1_left" in required
        assert contract["actions"]["width"] == 8 and contract["actions"]["horizon"] == 15
        assert contract["control_hz"] == 15.0
        assert {"key", "width", "names", "units"} == contract["state"][0].keys()
        assert "warnings" not in client.infer(observation())
        [warning] = client.infer(observation(joint_3=9.0))["warnings"]
        assert "9 is far outside the training range -1..1" in warning
        assert 'openpi_warned_total{model="default"} 1.0' in get(port, "/metrics")[2]
        [warning] = client.infer({**observation(), "prompt": 40 * "put the cup on the plate "})["warnings"]
        assert "is cut to 160" in warning and "nor the state behind it" in warning
        assert 'openpi_warned_total{model="default"} 2.0' in get(port, "/metrics")[2]
        for key, value, text in (
            ("observation/joint_position", np.zeros(6), "has shape (6,)"),
            ("observation/joint_position", np.full(7, np.nan), "NaN"),
        ):
            with pytest.raises(RuntimeError, match="ObservationError") as failure:
                client.infer({**observation(), key: value})
            assert text in str(failure.value) and "expected" in str(failure.value)


def test_what_a_robot_sends_beside_its_observation_is_said_once_in_the_log_and_not_to_the_robot(caplog):
    camera, more = "observation/exterior_image_1_left", {"side": np.zeros((8, 9, 3), np.uint8), "t": 1.5}
    with server_thread(droid_policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        actions = client.infer(observation())["actions"]
        for changes in (more, {camera: observation()[camera] / np.float32(255)}, {"prompt": [observation()["prompt"]]}):
            for _ in range(2):
                answer = client.infer({**observation(), **changes})
                np.testing.assert_array_equal(answer["actions"], actions)
                assert "warnings" not in answer
    assert [record.getMessage() for record in caplog.records if "is not looked at" in record.getMessage()] == [
        "'side', which robots send, is not looked at: the policy was not trained with it"
    ]


def test_a_float_image_beyond_0_to_1_is_refused_with_field_found_expected_and_fix_and_the_session_lives_on():
    camera = "observation/exterior_image_1_left"
    with server_thread(droid_policy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        for image, found in (
            (np.full((224, 224, 3), 2, np.float32), "dtype float32 and values from 2 to 2"),
            (np.full((224, 224, 3), np.nan), "dtype float64 and values from nan to nan"),
        ):
            connection.send(msgpack_numpy.packb({**observation(), camera: image}))
            text = connection.recv(PATIENCE_S)
            assert text.startswith(
                f"ObservationError: image '{camera}' has {found}; expected uint8 in 0..255, or floats in 0..1. "
            )
        connection.send(msgpack_numpy.packb(observation()))
        assert msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["actions"].shape == (15, 8)


def test_the_status_tells_what_is_served_and_what_the_model_sees():
    with server_thread(droid_policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        for _ in range(3):
            client.infer(observation(joint_3=9.0))
        status = json.loads(get(port, "/status.json")[2])
        assert status["models"][0]["state"] == "ready" and "droid" in status["models"][0]["contract"]
        [session] = status["sessions"]
        assert session["num_requests"] == 3 and len(session["latencies_ms"]) == 3
        assert session["prompt"] == "put the cup on the plate"
        assert set(session["cameras"]) == {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}
        third = session["state"][2]
        assert (third["value"], third["low"], third["high"]) == (9.0, -1.0, 1.0) and third["name"] == "joint_3"
        assert np.shape(session["actions"]) == (15, 8) and session["warnings"]


@pytest.mark.parametrize(
    "odd",
    [
        {"images": [[1], [2, 3]]},
        {"image": np.zeros((0, 4, 3), np.uint8)},
        {"image": np.full((4, 4, 3), "text")},
        {"image": np.zeros((4, 4, 3), "M8[ns]")},
        {"image": np.zeros((70_000, 1, 3), np.uint8)},
    ],
)
def test_what_one_robot_sends_hides_no_other_robot_s_session(odd):
    with (
        server_thread(TestPolicy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        WebsocketClientPolicy("127.0.0.1", port) as other,
    ):
        client.infer({"image": np.zeros((4, 4, 3), np.uint8), "prompt": "fold"})
        other.infer(odd)
        first, second = json.loads(get(port, "/status.json")[2])["sessions"]
    assert first["prompt"] == "fold" and list(first["cameras"]) == ["image"]
    assert second["num_requests"] == 1


def test_the_page_shows_nothing_from_elsewhere():
    with server_thread(TestPolicy) as (_, port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE_S) as answer:
            page = answer.read().decode()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert 'src="http' not in page and "@import" not in page and "//cdn" not in page


def test_the_status_keeps_warnings_of_a_moment_and_tells_drift_parts_of_the_latency_and_the_chunk_before():
    seen = Seen.of([(n, True, observation()) for n in range(3)], [])
    with (
        server_thread(lambda: droid_policy(seen=seen)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        client.infer(observation(joint_3=9.0))
        for _ in range(2):
            client.infer(observation())
        [session] = json.loads(get(port, "/status.json")[2])["sessions"]
        [warning] = session["warnings"]
        assert warning["count"] == 1 and "9 is far outside the training range" in warning["text"]
        assert np.shape(session["previous"]) == (15, 8) and 0 <= session["rows_since"] <= 15
        assert set(session["parts_ms"]) == {"prepare", "wait", "model"}
        assert sum(session["parts_ms"].values()) <= 2 * max(session["latencies_ms"])
        averages = {each["name"]: each for each in session["averages"]}
        assert averages["joint_3"]["count"] > 0 and averages["observation/exterior_image_1_left: blue"]["mean"] == 90


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[str, str]:
    """What a browser shows of a session in which much is wrong; and a telephone, with the width of it."""
    folder = tmp_path_factory.mktemp("page")
    seen = Seen.of([(n, True, observation()) for n in range(3)], ["open the drawer"])
    with (
        server_thread(lambda: droid_policy(seen=seen)) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for i in range(20):
            client.infer(observation(joint_3=9.0 if i == 19 else 0.5))
        live = dom(folder, f"http://127.0.0.1:{port}/")
        return live, on_a_telephone(folder, get(port, "/")[2], status=get(port, "/status.json")[2])


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_a_browser_shows_warnings_cameras_state_drift_chunk_and_latency_and_a_telephone_need_not_scroll_sideways(shown):
    live, telephone = shown
    assert "<title>width 390 of 390</title>" in telephone
    for text in (
        "put the cup on the plate",
        "base_0_rgb",
        "data:image/jpeg",
        "Last chunk, 15 steps; dashed: the one before",
        "Average of the last",
        "polyline",
        "p50",
        "prepare ",
        "20 requests",
        "far outside the training range",
        "<b>prompt</b>",
    ):
        assert text in live and text in telephone


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_a_session_that_cannot_be_drawn_hides_no_other_and_of_many_there_is_an_overview(tmp_path):
    with (
        server_thread(droid_policy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        WebsocketClientPolicy("127.0.0.1", port) as other,
    ):
        for _ in range(2):
            client.infer(observation())
            other.infer(observation())
        page, status = get(port, "/")[2], json.loads(get(port, "/status.json")[2])
    status["sessions"][0]["state"] = None
    shown = on_a_telephone(tmp_path, page, status=json.dumps(status))
    assert "cannot be shown: TypeError" in shown and shown.count("Last chunk, 15 steps") == 1
    assert "<title>width 390 of 390</title>" in shown
    assert shown.count('<a href="#session-') == 2


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_what_a_page_has_of_a_server_that_is_gone_looks_old(tmp_path):
    (tmp_path / "page.html").write_bytes(status_page().body)
    gone = dom(tmp_path, f"file://{tmp_path}/page.html")
    assert 'id="sessions" class="stale"' in gone and "no answer from the server for " in gone


def test_of_three_hundred_sessions_a_few_are_shown_in_full_those_that_were_told_something_or_are_looked_at_first():
    policy, sessions = TestPolicy(), []
    for number in range(1, 301):
        live = LiveSession(number, "openpi", "default", "robot")
        result = {"actions": np.zeros((15, 8)), **({"warnings": ["[blank] image: black"]} if number == 200 else {})}
        live.answered([{"image": np.zeros((4, 4, 3), np.uint8)}], [result], 0.01)
        sessions.append(live)
    slot = SimpleNamespace(
        model_id="default", policy=policy, num_sessions=300, thread=SimpleNamespace(num_waiting=lambda: 0)
    )
    status = json.loads(status_json([slot], sessions, ids=list, chosen=[300]).body)
    shown = [each["number"] for each in status["sessions"] if "cameras" in each]
    assert len(status["sessions"]) == 300 and shown == [1, 2, 3, 4, 5, 6, 200, 300]
    assert "latencies_ms" not in status["sessions"][100] and status["sessions"][100]["num_requests"] == 1


def test_the_session_that_somebody_clicked_is_among_those_that_are_shown(monkeypatch):
    monkeypatch.setattr(pages, "_MOST_SHOWN", 1)
    with (
        server_thread(TestPolicy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        WebsocketClientPolicy("127.0.0.1", port) as other,
    ):
        for each in (client, other):
            each.infer({"image": np.zeros((4, 4, 3), np.uint8)})
        for query in ("?session=2", f"?session={'9' * 6000}", "?session=x"):  # the last one that was asked for stays
            first, second = json.loads(get(port, f"/status.json{query}")[2])["sessions"]
            assert "cameras" in second and "cameras" not in first


def test_a_clock_that_is_set_back_takes_no_chunk_from_the_page():
    policy, live = droid_policy(), LiveSession(1, "openpi", "default", "robot")
    for asked_s in ((0.0, 100.0), (100.0, 40.0)):
        live.answered([observation()], [{"actions": np.zeros((15, 8))}], 0.01)
        live.asked_s = asked_s
    assert _last_exchange(live, policy)["rows_since"] == 0
