"""What a message, a session and a connection may cost the others."""

import contextlib
import io
import logging
import re
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from PIL import Image

from openpi.policies.guards import ObservationError
from openpi.policies.policy import Policy
from openpi.serving import memory, wire
from openpi.serving.access import Limits
from openpi.serving.client_log import ClientLog
from openpi.serving.errors import ModelGoneError, ServerBusyError
from openpi.serving.live import LiveSession
from openpi.serving.long_work import LongWork
from openpi.serving.memory import MemoryBudget, SessionMemory
from openpi.serving.model_thread import Batching, Item, Job, ModelThread
from openpi.serving.recording import SessionRecorder
from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy
from openpi_client.connection import open_stream
from openpi_client.deadline import Deadline
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from plain_values import ORDINARY
from serving_live import PATIENCE_S, TestPolicy, get, raw_connection, server_thread, until

GOOD = msgpack_numpy.packb({"x": np.arange(6.0)})


def array(dtype: str, shape: list[int], data: bytes = b"") -> dict:
    return {"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}}


def jpeg(side: int, **options) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", **options)
    return {b"__jpeg__": True, b"data": buffer.getvalue()}


# Messages

TOO_MUCH = {
    "a list of 100000 observations": b"\xdd" + (100_000).to_bytes(4, "big") + b"\x80" * 100_000,
    "a list of 65 observations": msgpack.packb([{}] * 65),
    "32 levels at most": b"\x91" * 100_000 + b"\x80",
    "65536 at most: send numbers": msgpack.packb({"x": [0] * 70_000}),
    "more than 65536 values": msgpack.packb({"x": [[{}] * 1000] * 100}),
    "a text of 1048576 bytes": msgpack.packb({"k" * 2**20: 1}),
    "a text of 70000 bytes": msgpack.packb({"prompt": "p" * 70_000}),
    "bytes of small values": msgpack.packb({str(i): "p" * 16_000 for i in range(300)}),
    "an array of texts of 80000 bytes": msgpack.packb({"prompt": array("<U20000", [], bytes(80_000))}),
    "an array of texts of 70000 bytes": msgpack.packb({"x": array("|S70000", [2], bytes(140_000))}),
    "an extension of type 5": msgpack.packb({"x": msgpack.ExtType(5, b"abc")}),
    "that are no array": msgpack.packb({"x": bytes(2**24 + 1)}),
    "the key 3, a int; names are text": msgpack.packb({"x": {3: 1}}),
    "JPEG image cannot be decoded: its 3 bytes are none": msgpack.packb({"x": {b"__jpeg__": True, b"data": b"abc"}}),
    "the key 'state' twice": b"\x83\xa5state\x01\xa1x\x02\xa5state\x03",
    "has the key b'data' twice": b"\x82\xc4\x04data\xc4\x00\xc4\x04data\xc4\x01a",
    "more than 33554432 pixels": msgpack.packb({str(i): jpeg(4096, quality=1) for i in range(3)}),
}


@pytest.mark.parametrize("reason", TOO_MUCH)
def test_a_message_over_a_limit_is_refused_with_what_was_found_and_expected(reason):
    with pytest.raises(ObservationError, match=reason):
        wire.decode(TOO_MUCH[reason])


@pytest.mark.parametrize(
    "message",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of four billion
        b"\x81\xa1x\xdd\xff\xff\xff\xff",
        b"\x81\xa1x\xc6\xff\xff\xff\xff",
        b"\x81\xa1x\xdb\x00\xff\xff\xff",
        b"\x81\xa1x\xc9\x00\xff\xff\xff\x01",
        b"\x81\xa1x\xcb\x00",
        b"\x81\xa1x",
        b"\x81\xa1x\xc1",
        b"",
        GOOD + b"\x00",
        GOOD[:-1],
        msgpack.packb({"x": msgpack.ExtType(0x6F, b"\0\0\0\0")}),  # what the decoder itself puts for arrays
        msgpack.packb({"x": bytes(5000), "y": [msgpack.ExtType(0x6F, bytes(4))] * 1000}),  # 5 MB of 12 kB
        msgpack.packb({bytes(5000): 1}),
        msgpack.packb(array("<f4", [2**40, 0])),
        msgpack.packb(array("<f4", [2**20, 2**20, 0])),
        msgpack.packb(array("|S0", [10**9])),
        msgpack.packb(array("<U0", [2**40])),
        msgpack.packb(array("<f4", [2**33], bytes(8))),
        msgpack.packb(array("|u1", [5000], bytes(4999))),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 10**9, b"dtype": "|S1"}}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 10**9, b"dtype": "S"}}),
        msgpack.packb({"x": {b"__npgeneric__": True, b"data": 10**9, b"dtype": "bytes"}}),
    ],
)
def test_what_claims_more_than_it_has_is_an_ordinary_error(message):
    with pytest.raises(ORDINARY):
        wire.decode(message)


def test_pixels_are_counted_before_an_image_is_decoded_and_each_further_pass_over_them_too():
    asked: list[int] = []
    with pytest.raises(ObservationError, match="pixels"):
        wire.decode(msgpack.packb({"a": jpeg(4096), "b": jpeg(4096), "c": jpeg(16)}), reserve=asked.append)
    assert asked == [3 * 4096**2] * 2
    image = jpeg(1024)
    image[b"data"] += b"\xff\xda" * 400  # as many passes as a progressive image may ask for
    with pytest.raises(ObservationError, match="pixels"):
        wire.decode(msgpack.packb({"a": image}))


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    # Large bytes and arrays are not copied when the message is decoded.
    | st.sampled_from([b"y" * 5000, np.arange(2000, dtype="<f8"), np.zeros((3, 0), "<i2"), np.float32(1.5)])
    | st.sampled_from([np.array(7), np.zeros((40, 50, 3), np.uint8), np.array("2026-11-28", "<M8[D]")]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.dictionaries(st.text(max_size=20), trees, max_size=5), st.data())
def test_messages_mean_the_same_as_to_the_client_s_decoder_whole_or_damaged(content, data):
    message = bytearray(msgpack_numpy.packb(content))
    assert msgpack_numpy.packb(wire.decode(bytes(message))) == bytes(message)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=3)):
        if place < len(message):
            message[place] = byte
    try:
        ours = msgpack_numpy.packb(wire.decode(bytes(message)))
    except ORDINARY:
        return
    assert ours == msgpack_numpy.packb(with_text_keys(msgpack_numpy.unpackb(bytes(message), timestamp=1)))


def test_times_of_messagepack_are_numbers():
    assert wire.decode(msgpack.packb({"t": msgpack.Timestamp(3, 500_000_000)})) == {"t": 3.5}


def with_text_keys(value):
    """As a server reads them: other libraries write names as bytes."""
    if isinstance(value, dict):
        names = {key: key.decode() if isinstance(key, bytes) else key for key in value}
        return {names[key]: with_text_keys(item) for key, item in value.items()}
    return [with_text_keys(item) for item in value] if isinstance(value, list) else value


def test_arrays_are_views_of_the_message_in_memory_that_their_dtype_can_be_read_from():
    message = memoryview(
        msgpack_numpy.packb({"image": np.ones((64, 64, 3), np.uint8), "a": 1, "state": np.arange(9.0)})
    )
    content = wire.decode(message)
    assert np.shares_memory(content["image"], np.frombuffer(message, np.uint8))
    assert content["state"].flags.aligned and not content["state"].flags.writeable
    np.testing.assert_array_equal(content["state"], np.arange(9.0))


# Sessions


def test_a_refused_message_is_answered_in_a_sentence_and_the_session_lives_on():
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        for reason, message in TOO_MUCH.items():
            connection.send(message)
            text = connection.recv(PATIENCE_S)
            assert text.startswith("ObservationError: ") and reason in text and len(text) < 300
        connection.send(GOOD)
        assert msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["actions"][0, 0] == 15.0


def test_long_messages_wait_for_each_other_and_short_ones_for_none():
    long_message = msgpack.packb({"x": [0.5] * 10_000})
    with (
        server_thread(TestPolicy) as (_, port),
        raw_connection(port) as sender,
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        sender.recv(PATIENCE_S)
        with LongWork() as work:
            work.begin()
            sender.send(long_message)
            for _ in range(3):
                assert client.infer({"x": 2.0})["actions"][0, 0] == 2.0
            assert get(port, "/metrics")[2].count('openpi_requests_total{model="default",outcome="ok"') == 1
        assert msgpack_numpy.unpackb(sender.recv(PATIENCE_S))["actions"][0, 0] == 5000.0


class PreparingPolicy(Policy):
    """Notes which threads prepare."""

    def __init__(self) -> None:
        super().__init__(self.Sampler(self), transforms=[self._note])
        self.threads: list[str] = []

    class Sampler:
        takes_noise, action_horizon, action_dim = True, 4, 2

        def __init__(self, policy) -> None:
            self._policy = policy

        def sample(self, inputs, noise, **_):
            self._policy.threads.append(threading.current_thread().name)
            return np.ones((len(inputs["state"]), 4, 2), np.float32)

    def _note(self, data):
        self.threads.append(threading.current_thread().name)
        if "bad" in data:
            raise ObservationError("'bad' is there")
        if "odd" in data:
            raise ValueError(data["odd"])
        return data


def test_observations_are_checked_and_prepared_in_the_session_s_thread():
    policy = PreparingPolicy()
    with server_thread(lambda: policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        client.infer({"state": np.zeros(2)})
        assert policy.threads == ["openpi-session", "openpi-model"]
        with pytest.raises(RuntimeError, match="ObservationError: 'bad' is there"):
            client.infer({"state": np.zeros(2), "bad": 1})
        assert policy.threads[2:] == ["openpi-session"]
        answers = client.infer_batch([{"state": np.zeros(2)}, {"bad": 1}, {"state": np.zeros(2)}])
        assert answers[1] == {"error": "ObservationError: 'bad' is there"} and "actions" in answers[2]


def test_what_a_transform_raises_for_an_observation_is_answered_and_the_session_lives_on(caplog):
    with server_thread(PreparingPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        odd = {"odd": "the image is too small"}
        for message in (odd, [odd, odd]):
            connection.send(msgpack_numpy.packb(message))
            text = connection.recv(PATIENCE_S)
            assert text.startswith("Traceback") and text.rstrip().endswith("ValueError: the image is too small")
            assert re.search("error [0-9a-f]{8} in the server's log", text)[0][6:14] in caplog.text
        connection.send(msgpack_numpy.packb({"state": np.zeros(2)}))
        assert "actions" in msgpack_numpy.unpackb(connection.recv(PATIENCE_S))


def test_an_infer_of_a_subclass_s_own_gets_the_observation():
    class Own(PreparingPolicy):
        def infer(self, obs, *, noise=None):
            return {"actions": np.full((1, 1), obs["state"].sum())}

    with server_thread(Own) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        assert client.infer({"state": np.full(2, 4.0)})["actions"][0, 0] == 8.0


def test_a_list_of_which_nothing_fits_gets_one_answer():
    with server_thread(PreparingPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(msgpack_numpy.packb([{"bad": 1}] * 64))
        assert connection.recv(PATIENCE_S) == "ObservationError: 'bad' is there"
        connection.send(msgpack_numpy.packb([{"state": np.zeros(2)}, {"bad": 1}]))
        assert len(msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["batch"]) == 2


def test_errors_tell_no_more_than_a_few_lines_of_what_was_sent():
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(msgpack_numpy.packb({"refuse": "long " * 10_000}))
        assert len(connection.recv(PATIENCE_S)) < 2100


# The model's thread


class GatedPolicy(BasePolicy):
    """Batches of numbers; each call waits for the gate."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.entered, self.gate = threading.Event(), threading.Event()

    def infer(self, obs):
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations):
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if any("end" in obs for obs in observations):
            raise SystemExit("the policy wants to leave")
        self.batches.append([obs["x"] for obs in observations])
        return [{"actions": np.array([obs["x"]])} for obs in observations]


def submitted(thread: ModelThread, *observations: dict) -> Future:
    outcome: Future = Future()

    def done(answers, error) -> None:
        outcome.set_result(answers) if error is None else outcome.set_exception(error)

    thread.submit(Job([Item(obs) for obs in observations]), done)
    return outcome


def test_the_rest_of_a_long_list_waits_behind_what_has_come_meanwhile():
    policy = GatedPolicy()
    thread = ModelThread(Batching(max_batch=4))
    thread.load(lambda: policy).result(PATIENCE_S)
    long = submitted(thread, *({"x": float(i)} for i in range(10)))
    assert policy.entered.wait(PATIENCE_S)
    short = submitted(thread, {"x": 100.0})
    policy.gate.set()
    assert short.result(PATIENCE_S).results[0]["actions"][0] == 100.0
    assert [result["actions"][0] for result in long.result(PATIENCE_S).results] == list(range(10))
    assert policy.batches[:2] == [[0.0, 1.0, 2.0, 3.0], [100.0, 4.0, 5.0, 6.0]]
    assert thread.finish(PATIENCE_S)


def test_long_lists_of_many_sessions_leave_room_for_a_robot_in_the_next_batch_but_one():
    policy = GatedPolicy()
    thread = ModelThread(Batching(max_batch=4))
    thread.load(lambda: policy).result(PATIENCE_S)
    first = submitted(thread, {"x": 0.0})
    assert policy.entered.wait(PATIENCE_S)
    long = [submitted(thread, *({"x": float(i)} for i in range(8))) for _ in range(6)]
    short = submitted(thread, {"x": 100.0})
    policy.gate.set()
    short.result(PATIENCE_S)
    assert first.result(PATIENCE_S).results[0]["actions"][0] == 0.0
    for each in long:
        assert [result["actions"][0] for result in each.result(PATIENCE_S).results] == list(range(8))
    assert thread.finish(PATIENCE_S)
    assert [100.0 in batch for batch in policy.batches].index(True) == 2
    assert all(len(batch) == 4 for batch in policy.batches[1:-1])


def test_callbacks_and_policies_that_raise_do_not_end_the_model_s_thread():
    def failing(*_) -> None:
        raise RuntimeError("a callback failed")

    policy = GatedPolicy()
    policy.gate.set()
    thread = ModelThread(on_batch=failing)
    thread.load(lambda: policy).result(PATIENCE_S)
    thread.submit(Job([Item({"x": 1.0})]), failing)
    left = submitted(thread, {"end": 1}).result(PATIENCE_S).results[0]
    assert isinstance(left, RuntimeError) and "SystemExit: the policy wants to leave" in str(left)
    assert submitted(thread, {"x": 2.0}).result(PATIENCE_S).results[0]["actions"][0] == 2.0
    thread.end()  # twice is no harm
    assert thread.finish(PATIENCE_S)


class BrokenPolicy(GatedPolicy):
    """Not even its attributes can be read, once it runs."""

    @property
    def batch_sizes(self):
        if self.batches:
            raise RuntimeError("no sizes")
        return None


def test_a_policy_whose_attributes_raise_costs_answers_and_not_the_thread():
    policy = BrokenPolicy()
    policy.gate.set()
    thread = ModelThread()
    thread.load(lambda: policy).result(PATIENCE_S)
    submitted(thread, {"x": 1.0}).result(PATIENCE_S)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no sizes"):
            submitted(thread, {"x": 1.0}).result(PATIENCE_S)
    assert thread.is_alive() and thread.finish(PATIENCE_S)


def test_a_model_thread_that_is_over_answers_and_the_server_is_not_ready():
    policy = GatedPolicy()
    with server_thread(lambda: policy) as (server, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        [slot] = server._pool.slots()
        policy.gate.set()
        assert client.infer({"x": 1.0})["actions"][0] == 1.0
        assert get(port, "/readyz")[0] == 200
        assert slot.thread.finish(PATIENCE_S)
        assert get(port, "/readyz")[0] == 503 and get(port, "/healthz")[0] == 200
        with pytest.raises(RuntimeError, match="the model's thread has ended"):
            client.infer({"x": 1.0})
    with pytest.raises(ModelGoneError):
        submitted(slot.thread, {"x": 1.0}).result(PATIENCE_S)


# Memory


def test_a_session_s_share_cannot_be_taken_by_others_and_the_pool_comes_back(monkeypatch):
    monkeypatch.setattr(memory, "_PATIENCE_S", 0.01)
    budget = MemoryBudget(1000, max_sessions=5)  # 100 each, 500 for all
    greedy, robot = SessionMemory(budget), SessionMemory(budget)
    greedy.reserve(600)
    with pytest.raises(ServerBusyError, match="ask again later"):
        greedy.reserve(1)
    robot.reserve(100)
    with pytest.raises(ServerBusyError):
        robot.reserve(1)
    greedy.release(50)
    robot.reserve(50)
    greedy.close()
    robot.reserve(450)
    robot.close()
    SessionMemory(budget).reserve(600)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.integers(-300, 300)), max_size=40))
def test_the_pool_is_never_exceeded_and_nothing_is_lost(steps):
    budget = MemoryBudget(1000, max_sessions=3)
    sessions, held = [SessionMemory(budget) for _ in range(3)], [0, 0, 0]
    for who, change in steps:
        if change < 0:
            change = max(change, -held[who])
            sessions[who].release(-change)
        elif sum(max(0, each + change * (i == who) - 166) for i, each in enumerate(held)) <= 502:
            sessions[who].reserve(change)
        else:
            continue
        held[who] += change
    for session in sessions:
        session.close()
    assert budget._taken_bytes == 0


def test_a_half_message_holds_memory_and_its_end_gives_it_back(monkeypatch):
    monkeypatch.setattr(memory, "_PATIENCE_S", 0.05)
    limits = Limits(max_sessions=2, max_message_bytes=2**20, max_memory_bytes=2**21)  # half a MiB each, one for all
    large = msgpack_numpy.packb({"x": np.ones(2**20 - 200, np.uint8)})
    with server_thread(TestPolicy, limits=limits) as (_, port), contextlib.ExitStack() as stack:
        half = stack.enter_context(raw_connection(port))
        half.recv(PATIENCE_S)
        half.socket.sendall(bytes([0x82, 0xFF]) + (2**20).to_bytes(8, "big") + bytes(1000))
        client = stack.enter_context(WebsocketClientPolicy("127.0.0.1", port))
        assert client.infer({"x": np.ones(1000)})["actions"][0, 0] == 1000.0
        for _ in range(5):  # What is answered takes no memory.
            assert client.infer({"x": np.ones(2**20 - 200, np.uint8)})["actions"][0, 0] == 2**20 - 200
        with contextlib.suppress(OSError):
            half.socket.shutdown(socket.SHUT_RDWR)
        assert len(large) <= 2**20


def test_messages_that_only_claim_their_size_hold_no_memory(monkeypatch):
    monkeypatch.setattr(memory, "_PATIENCE_S", 0.05)
    limits = Limits(max_sessions=8, max_message_bytes=2**23, max_memory_bytes=2**24)  # a MiB each, eight for all
    with server_thread(TestPolicy, limits=limits) as (_, port), contextlib.ExitStack() as stack:
        for _ in range(4):
            claiming = stack.enter_context(raw_connection(port))
            claiming.recv(PATIENCE_S)
            claiming.socket.sendall(bytes([0x82, 0xFF]) + (2**23).to_bytes(8, "big") + bytes(1000))
            stack.callback(claiming.socket.shutdown, socket.SHUT_RDWR)
        client = stack.enter_context(WebsocketClientPolicy("127.0.0.1", port))
        assert client.infer({"x": np.ones(2**23 - 200, np.uint8)})["actions"][0, 0] == 2**23 - 200


class LargeAnswers(TestPolicy):
    def _answer(self, obs: dict) -> dict:
        return {**super()._answer(obs), "large": np.zeros(obs.get("answer_bytes", 0), np.uint8)}


def test_answers_that_nobody_reads_take_memory_that_others_may_not():
    limits = Limits(max_sessions=8, max_message_bytes=2**23, max_memory_bytes=2**27)  # 8 MiB each, 64 for all
    question = {"answer_bytes": 40 * 2**20}
    with server_thread(LargeAnswers, limits=limits) as (_, port), contextlib.ExitStack() as stack:
        client = stack.enter_context(WebsocketClientPolicy("127.0.0.1", port))
        for _ in range(5):  # What was read takes none.
            assert client.infer(question)["large"].nbytes == 40 * 2**20
        for _ in range(2):
            deaf, _ = open_stream(f"ws://127.0.0.1:{port}", {}, Deadline(PATIENCE_S))
            stack.callback(deaf.hang_up, 0.0)
            deaf.read(PATIENCE_S)
            deaf.write(msgpack_numpy.packb(question))
            until(deaf._io.is_readable)  # the beginning of the answer
        with pytest.raises(RuntimeError, match="ServerBusyError: the messages of other sessions fill the server's"):
            client.infer(question)
        assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0


def test_stages_are_told_of_one_observation_at_a_time():
    with server_thread(TestPolicy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(RuntimeError, match="'trace' is asked for in a list"):
            client.infer_batch([{"x": 1.0}, {"x": 1.0, "trace": True}])
        for other in (False, np.zeros(0), np.ones(2)):
            assert len(client.infer_batch([{"x": 1.0}, {"x": 1.0, "trace": other}])) == 2
        assert client.infer({"x": 1.0, "trace": True})["actions"][0, 0] == 1.0


def test_an_idle_session_keeps_a_thumbnail_of_a_large_observation():
    observation = {
        "image": np.arange(1080 * 1920 * 3, dtype=np.uint8).reshape(1080, 1920, 3),
        "chw": np.zeros((3, 480, 640), np.uint8),
        "state": np.arange(7.0),
        "prompt": "x",
        "blob": bytes(2**22),
        "volume": np.zeros((300, 300, 300)),
        "nested": {"image": np.zeros((512, 512, 3), np.uint8)},
    }
    session, released = LiveSession(1, "openpi", "default", "127.0.0.1:1"), []
    result = {"actions": np.zeros((2, 2)), "hidden": np.zeros(10**6)}
    for _ in range(2):  # While it asks, the last one is kept as it is, and its memory counts.
        session.answered([observation], [result], 0.1, num_bytes=2**23, release=lambda: released.append(2**23))
    assert session.observation is observation and released == [2**23] and not session.rest(3600.0)
    assert session.rest(0.0) and released == [2**23] * 2 and not session.rest(0.0)
    kept = session.observation
    assert kept is not None and list(kept) == ["image", "chw", "state", "prompt", "nested"]
    np.testing.assert_array_equal(kept["image"], observation["image"][::5, ::8])
    assert kept["chw"].shape == (3, 240, 214) and kept["nested"]["image"].shape == (256, 256, 3)
    assert all(each.base is None for each in (kept["image"], kept["chw"], kept["state"]))
    assert session.result is not None and list(session.result) == ["actions"]


def test_exchanges_that_wait_for_the_disk_are_bounded_in_bytes(tmp_path):
    recorder, gate, written = SessionRecorder(tmp_path), threading.Event(), []
    recorder.put(lambda: gate.wait(PATIENCE_S))
    for number in range(4):
        recorder.put_exchange(lambda number=number: written.append(number), 2**27)
    gate.set()
    recorder.finish()
    assert written == [0, 1] and recorder.num_lost == 2


# The log


def test_log_lines_about_a_client_are_bounded_and_the_rest_is_counted(caplog):
    now_s = 0.0
    log = ClientLog(lambda: now_s)
    for port in range(500):
        log.write(logging.ERROR, f"10.0.0.1:{port}", f"request {port} failed\nERROR forged \x1b[2J" + "x" * 10_000)
    log.write(logging.ERROR, "10.0.0.2:1", "another robot's line")
    assert len(caplog.records) == 21 and "another robot's line" in caplog.text
    assert all("\n" not in record.message and "\x1b" not in record.message for record in caplog.records)
    assert max(len(record.message) for record in caplog.records) < 2200
    now_s = 61.0
    log.write(logging.ERROR, "10.0.0.1:9", "later")
    assert caplog.messages[-2:] == ["480 further lines about 10.0.0.1 were left out", "later"]


def test_a_traceback_is_written_once_for_an_error_that_comes_with_each_request(caplog):
    with server_thread(TestPolicy) as (_, port):
        for text in ("no such key", "no such key", "another"):
            with raw_connection(port) as connection:
                connection.recv(PATIENCE_S)
                connection.send(msgpack_numpy.packb({"fail": text}))
                connection.recv(PATIENCE_S)
    first, second, third = (record.message for record in caplog.records if "failed" in record.message)
    assert first.count("no such key") == 1 and "Traceback" in first and "Traceback" in third
    assert second.splitlines()[1:] == ["    again: no such key"]


def test_an_error_that_quotes_a_client_forges_no_line_of_the_log(caplog):
    forged = "12:00:00 ERROR   forged"
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        connection.send(msgpack_numpy.packb({"fail": f"\x1b[2J\n{forged}\n" * 500}))
        assert "error" in connection.recv(PATIENCE_S)
    failed = caplog.handler.stream.getvalue()
    assert "ValueError: \\x1b[2J" in failed and "serving_live.py" in failed and "\x1b" not in failed
    assert forged in failed and not any(line.startswith(forged) for line in failed.splitlines())
    assert len(failed.splitlines()) < 400


def test_a_network_of_many_addresses_is_one_client(caplog):
    log = ClientLog(lambda: 0.0)
    for number in range(100):
        log.write(logging.ERROR, f"2001:db8::{number:x}:4711", "x")
    assert len(caplog.records) == 20


def test_a_session_that_fails_again_and_again_does_not_fill_the_log(caplog):
    with server_thread(TestPolicy) as (_, port), raw_connection(port) as connection:
        connection.recv(PATIENCE_S)
        for _ in range(60):
            connection.send(msgpack_numpy.packb({"refuse": "no"}))
            assert connection.recv(PATIENCE_S) == "ObservationError: no"
    assert sum("was refused" in record.message for record in caplog.records) == 20


# Connections


def silent_connections(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for _ in range(count)]


def test_silent_connections_make_room_for_health_checks_and_robots():
    limits = Limits(max_opening=8, max_opening_per_network=6, max_sessions=2)
    with server_thread(TestPolicy, limits=limits) as (_, port), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(sock) for sock in silent_connections(port, 60)]
        assert get(port, "/healthz")[0] == get(port, "/readyz")[0] == 200
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        for sock in silent[:40]:  # those that waited for longest were cut
            sock.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert 'openpi_refused_connections_total{reason="silent"}' in get(port, "/metrics")[2]


def test_pages_are_made_once_for_all_who_ask_at_the_same_time():
    class Slow(TestPolicy):
        num_views = 0

        def view(self, obs):
            type(self).num_views += 1
            self.entered.put(None)
            assert self.gate.wait(PATIENCE_S)
            return {"image": {}}

    policy = Slow()
    limits = Limits(max_pages=6)
    with (
        server_thread(lambda: policy, limits=limits) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        client.infer({"x": 1.0})
        asked = [pool.submit(get, port, "/status.json") for _ in range(12)]
        policy.entered.get(timeout=PATIENCE_S)
        assert client.infer({"x": 2.0})["actions"][0, 0] == 2.0
        while sum(each.done() for each in asked) < 6:  # so many are told to come back
            assert get(port, "/healthz")[0] == 200
        policy.gate.set()
        statuses = sorted(each.result(PATIENCE_S)[0] for each in asked)
    assert statuses == [200] * 6 + [503] * 6 and Slow.num_views <= 2
