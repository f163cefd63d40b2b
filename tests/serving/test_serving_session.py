"""The protocol of one connection against the recorded one, without sockets."""

import io
import json
import types

import msgpack
import numpy as np
import pytest
from PIL import Image

from openpi.policies.guards import ObservationError
from openpi.serving.frames import Binary, Close, Text
from openpi.serving.openpi_session import OpenpiSession
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.session import PositronicSession
from openpi_positronic.session_parameters import SessionParameters
from serving_live import TestPolicy, server_thread


@pytest.fixture(scope="module")
def transcript(golden):
    """name -> (opcode, direction, bytes), and what the recording says about the end."""
    folder = golden / "wire" / "openpi_session"
    recorded = json.loads((folder / "transcript.json").read_text())
    steps = {step["name"]: (folder / step["file"]).read_bytes() for step in recorded["steps"]}
    return steps, recorded


@pytest.fixture
def session():
    return OpenpiSession()


def test_a_session_opens_with_the_recorded_metadata_frame(session, transcript):
    metadata = msgpack_numpy.unpackb(transcript[0]["00_metadata"])
    assert session.opening(metadata, 0.0) == [Binary(transcript[0]["00_metadata"])]


def test_replies_have_the_recorded_bytes(session, transcript):
    steps, _ = transcript
    session.opening({}, 0.0)
    for name in ("01", "02"):
        session.received(steps[f"{name}_request"])
        recorded = msgpack_numpy.unpackb(steps[f"{name}_response"])
        timing = recorded.pop("server_timing")
        [reply] = session.replied([recorded], timing["infer_ms"] / 1000)
        ours = msgpack_numpy.unpackb(reply.data)
        assert list(ours["server_timing"]) == list(timing)
        # Measurements differ in their last digit; with the recorded ones in place the frame must be the same.
        np.testing.assert_allclose(ours["server_timing"]["infer_ms"], timing["infer_ms"])
        assert msgpack_numpy.packb({**ours, "server_timing": timing}) == steps[f"{name}_response"]
        session.sent(1.0)


def test_requests_decode_to_observations(session, transcript):
    [observation] = session.received(transcript[0]["01_request"])
    assert all(isinstance(key, str) for key in observation)
    arrays = [value for value in observation.values() if isinstance(value, np.ndarray)]
    assert all(not array.flags.writeable for array in arrays)


def test_a_failure_sends_the_traceback_and_closes_as_recorded(session, transcript):
    steps, recorded = transcript
    [observation] = session.received(steps["03_bad_request"])
    try:
        raise ValueError("deliberate failure")
    except ValueError as error:
        text, close = session.failed(error)
    first, last = steps["03_error_text_frame"].decode().splitlines()
    lines = text.text.strip().splitlines()
    assert isinstance(observation, dict)
    assert isinstance(text, Text) and (lines[0], lines[-1]) == (first, last)
    assert close == Close(**recorded["after_error_close"])


def test_the_time_of_the_previous_exchange_comes_with_the_second_reply(session):
    session.opening({}, 10.0)
    timings = []
    for now_s in (11.0, 11.5, 14.0):
        [reply] = session.replied([{"actions": np.zeros(3)}], 0.25)
        timings.append(msgpack_numpy.unpackb(reply.data)["server_timing"])
        session.sent(now_s)
    assert timings == [
        {"infer_ms": 250.0},
        {"infer_ms": 250.0, "prev_total_ms": 1000.0},
        {"infer_ms": 250.0, "prev_total_ms": 500.0},
    ]


def test_a_policy_s_own_result_is_not_changed(session):
    result = {"actions": np.zeros(3)}
    session.replied([result], 0.1)
    assert list(result) == ["actions"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "text frame"),
        (msgpack_numpy.packb([1, 2]), "received a int"),
        (msgpack_numpy.packb(np.zeros(3)), "received a ndarray"),
        (b"", "incomplete"),
    ],
)
def test_messages_that_are_no_observation_are_refused(session, message, reason):
    with pytest.raises(ValueError, match=reason):
        session.received(message)


def test_recorded_bad_messages_are_refused(session, golden):
    manifest = json.loads((golden / "wire" / "openpi" / "manifest.json").read_text())
    for case in manifest["refused_on_decode"]:
        with pytest.raises((ValueError, TypeError, KeyError)):
            session.received((golden / "wire" / "openpi" / case["file"]).read_bytes())


def test_a_list_of_observations_is_answered_as_one_batch(session):
    session.opening({}, 0.0)
    assert len(session.received(msgpack_numpy.packb([{"x": 1}, {"x": 2}]))) == 2
    [frame] = session.replied([{"actions": np.ones(2)}, ObservationError("'x' is odd")], 0.5)
    answer = msgpack_numpy.unpackb(frame.data)
    assert answer["batch"][1] == {"error": "ObservationError: 'x' is odd"}
    np.testing.assert_array_equal(answer["batch"][0]["actions"], np.ones(2))
    assert answer["server_timing"] == {"infer_ms": 500.0}


def test_an_observation_that_does_not_fit_leaves_the_session_open(session):
    assert session.failed(ObservationError("'x' is odd")) == [Text("ObservationError: 'x' is odd")]


def test_only_a_server_in_debug_mode_sends_the_lines_of_a_traceback(transcript):
    try:
        raise ValueError("deliberate failure")
    except ValueError as error:
        short, _ = OpenpiSession().failed(error, "1234abcd")
        whole, _ = OpenpiSession(debug=True).failed(error, "1234abcd")
    assert "1234abcd" in short.text and "test_serving_session.py" not in short.text
    assert "test_serving_session.py" in whole.text


# Positronic's protocol


@pytest.fixture(scope="module")
def positronic(golden):
    """name -> bytes of a recorded frame, and the recording's steps."""
    folder = golden / "wire" / "positronic_session"
    steps = json.loads((folder / "transcript.json").read_text())["steps"]
    return {step["name"]: (folder / step["file"]).read_bytes() for step in steps if "file" in step}, {
        step["name"]: step["closed"] for step in steps if "closed" in step
    }


def test_ready_and_loading_frames_have_the_recorded_bytes(positronic):
    frames, _ = positronic
    session = PositronicSession()
    loading = msgpack_numpy.unpackb(frames["20_load_0"])
    assert session.loading("loading", loading["message"]) == [Binary(frames["20_load_0"])]
    for name in ("00_ready", "20_load_1"):
        assert session.opening(msgpack_numpy.unpackb(frames[name])["meta"], 0.0) == [Binary(frames[name])]


def test_recorded_positronic_requests_are_answered_with_the_recorded_bytes(positronic):
    frames, _ = positronic
    session = PositronicSession(get_codec("ee"))
    for number in ("01", "04"):
        [observation] = session.received(frames["01_request"])
        assert observation["observation/state"].shape == (8,)
        assert observation["observation/image"].shape == (224, 224, 3)
        # What the recorded policy gave: a constant pose, with an identity rotation, and an open gripper.
        answer = frames[f"{number}_response" if number == "01" else "04_response_after_errors"]
        steps = msgpack_numpy.unpackb(answer)["result"]
        row = np.array([*steps[0]["robot_command"]["pose"][:3], 1, 0, 0, 0, steps[0]["target_grip"]], np.float32)
        assert session.replied([{"actions": np.tile(row, (50, 1))}], 0.1) == [Binary(answer)]


def test_positronic_errors_have_the_recorded_form_and_a_text(positronic):
    frames, _ = positronic
    session = PositronicSession(get_codec("ee"))
    with pytest.raises(KeyError, match=r"'grip'.*robot_state\.q"):
        session.received(frames["02_request_missing_grip"])
    recorded = msgpack_numpy.unpackb(frames["02_error_session_stays_open"])["error"]
    # The recorded text is that of a KeyError, with its quotes.
    assert session.failed(KeyError(recorded[1:-1])) == [Binary(frames["02_error_session_stays_open"])]
    for message in (b"\xc1", "a text frame", msgpack_numpy.packb([1])):
        with pytest.raises(ValueError) as failure:
            session.received(message)
        [frame] = session.failed(failure.value)
        assert msgpack_numpy.unpackb(frame.data)["error"]


def test_an_unknown_checkpoint_ends_the_session_as_recorded(positronic):
    frames, closed = positronic
    error = msgpack_numpy.unpackb(frames["10_unknown_checkpoint"])["error"]
    frame, close = PositronicSession().refused(LookupError(error))
    assert frame == Binary(frames["10_unknown_checkpoint"])
    assert (close.code, close.reason) == (closed["10_close"]["code"], closed["10_close"]["reason"])


def test_without_a_codec_observations_and_actions_pass_as_they_are():
    session = PositronicSession()
    assert session.received(msgpack_numpy.packb({"x": 1})) == [{"x": 1}]
    [frame] = session.replied([{"actions": np.arange(4.0).reshape(2, 2), "warnings": ["far"]}], 0.1)
    answer = msgpack_numpy.unpackb(frame.data)
    assert [step["action"].tolist() for step in answer["result"]] == [[0.0, 1.0], [2.0, 3.0]]
    assert answer["warnings"] == ["far"]


def of_query(query, codec=None):
    return PositronicSession(codec, SessionParameters.of_query(query))


def opened(session):
    return msgpack_numpy.unpackb(session.opening(session.meta, 0.0)[0].data)


def test_clients_that_plan_by_themselves_are_told_rate_horizon_and_image_size():
    meta = opened(PositronicSession(get_codec("ee")))["meta"]
    assert meta["local_stack"]["seq"] == [
        {"name": "chunked_schedule", "version": 1, "args": {"fps": 15.0, "horizon_sec": 1.0}},
        {"name": "restrict_image_size", "version": 1, "args": {"width": 224, "height": 224}},
    ]
    assert "session_params" not in meta
    assert opened(PositronicSession())["meta"] == {"local_stack": {"seq": []}}


@pytest.mark.parametrize("version", [2, 3])
def test_newer_sessions_have_an_id_times_and_a_goodbye(positronic, version):
    raw = msgpack_numpy.unpackb(positronic[0]["01_request"])
    session = of_query(f"protocol_version={version}", get_codec("ee"))
    ready = opened(session)
    assert (ready["status"], ready["protocol_version"]) == ("ready", version)
    assert ready["meta"]["local_stack"]["seq"][0]["version"] == 2
    identity = ready["session_id"]
    [observation] = session.received(msgpack_numpy.packb({"session_id": identity, "observation": raw}))
    assert observation["observation/state"].shape == (8,)
    assert session.request.keys() == raw.keys()
    row = np.array([0.4, 0.1, 0.3, 1, 0, 0, 0, 0.5], np.float32)
    [frame] = session.replied([{"actions": np.tile(row, (50, 1))}], 0.1, 0.02, 0.15)
    answer = msgpack_numpy.unpackb(frame.data)
    times = {"served_ms": 150, "decode_ms": 20, "queued_ms": 30, "infer_ms": 100, "model_ms": 100}
    assert answer["timing"] == pytest.approx(times)
    step = answer["result"][0]
    command = step["robot_command"][b"__cmd__"] if version == 2 else step["robot_command"]
    assert command["type"] == "cartesian_pos" and "timestamp" not in step
    for wrong, said in (
        (raw, "session_id"),
        ({"session_id": "another", "observation": raw}, "session_id"),
        ({"session_id": identity, "observation": 3}, "a int"),
        ({"session_id": identity}, "a NoneType"),
    ):
        with pytest.raises(ObservationError, match=said):
            session.received(msgpack_numpy.packb(wrong))
    goodbye = msgpack_numpy.packb({"session_id": identity, "end_session": True})
    assert session.received(goodbye) == []
    assert session.replied([], 0.0) == [Binary(goodbye), Close(1000, "")]


def test_a_session_has_the_rate_and_horizon_that_its_address_asks_for():
    session = of_query("codec.fps=10&codec.horizon_sec=0.5", get_codec("ee"))
    meta = opened(session)["meta"]
    assert (meta["action_fps"], meta["action_horizon_sec"]) == (10, 0.5)
    assert meta["session_params"] == {"codec.fps": 10, "codec.horizon_sec": 0.5}
    assert meta["effective_params"] == {**meta["session_params"], "protocol_version": 1}
    [frame] = session.replied([{"actions": np.ones((50, 8), np.float32)}], 0.1)
    assert [step["timestamp"] for step in msgpack_numpy.unpackb(frame.data)["result"]] == [0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("nothing=1", "no session parameter 'nothing'; there are 'protocol_version', 'codec.fps', 'codec.horizon_sec'"),
        ("fps=10", "no session parameter 'fps'"),
        ("codec.codec.fps=10", "no session parameter"),
        ("codec.fps=0", "fps is 0; expected a rate above 0"),
        ("codec.fps=NaN", "fps is nan"),
        ("codec.fps=" + "[" * 9000, "fps is"),
        ("codec.fps=1&codec.fps=2", "'codec.fps' is given twice"),
        ("protocol_version=4", "protocol_version is 4; there are '1', '2', '3'"),
        ("protocol_version=true", "protocol_version is True"),
    ],
)
def test_what_a_session_cannot_be_is_refused_with_what_there_is(query, text):
    with pytest.raises(ObservationError) as refused:
        of_query(query, get_codec("ee"))
    assert text in str(refused.value) and len(str(refused.value)) < 600


def test_images_of_positronic_s_clients_may_be_jpeg():
    picture = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), 99, np.uint8)).save(picture, "JPEG")
    data = picture.getvalue()

    def read(**marker):
        message = {b"__jpeg__": True, **{key.encode(): value for key, value in marker.items()}}
        return PositronicSession().received(msgpack.packb({"image": message}))[0]["image"]

    assert read(frames=[data], ndim=3).shape == (8, 6, 3) and (read(frames=[data], ndim=3) == 99).all()
    assert read(frames=[data] * 2, ndim=4).shape == (2, 8, 6, 3)
    assert read(frames=[data] * 4, shape=[2, 2, 8, 6, 3]).shape == (2, 2, 8, 6, 3)
    for wrong in ({"frames": []}, {"frames": 3}, {"frames": [data] * 2, "ndim": 3}, {"frames": [data], "ndim": 10**12}):
        with pytest.raises((ValueError, TypeError)):
            read(**wrong)
    for shape in ([3, 8, 6, 3], [-1, -4, 8, 6, 3], [0, 8, 6, 3], "abcd", 4):
        with pytest.raises((ValueError, TypeError)):
            read(frames=[data] * 4, shape=shape)


# What other programs pack


def test_names_that_are_bytes_and_arrays_of_msgpack_numpy_are_read():
    pose = np.arange(3.0)
    array = {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": [3], b"data": pose.tobytes()}
    [observation] = OpenpiSession().received(msgpack.packb({b"state": {b"pose": array}, b"prompt": "go"}))
    np.testing.assert_equal(observation, {"state": {"pose": pose}, "prompt": "go"})


def test_arrays_of_programs_whose_maps_have_text_keys_only_are_read():
    """JavaScript, C++: to published servers they are maps."""
    image, number = np.arange(24, dtype=np.uint8).reshape(2, 4, 3), {"__npgeneric__": True, "data": 1.5, "dtype": "<f4"}
    array = {"__ndarray__": True, "data": image.tobytes(), "dtype": "|u1", "shape": [2, 4, 3]}
    plain = {"__ndarray__": "a name", "data": 3}
    Image.fromarray(np.full((8, 6, 3), 90, np.uint8)).save(picture := io.BytesIO(), "JPEG")
    wrist = {"__jpeg__": True, "data": picture.getvalue()}
    sent = {"image": array, "wrist": wrist, "gripper": number, "notes": plain}
    [observation] = OpenpiSession().received(msgpack.packb(sent))
    assert observation.pop("wrist").shape == (8, 6, 3)
    np.testing.assert_equal(observation, {"image": image, "gripper": np.float32(1.5), "notes": plain})


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({b"\xff": 1}, "the key b'\\xff' is no text"),
        ({b"a": 1, "a": 2}, "a key twice"),
        ({"a": {b"nd": True, b"type": "|O", b"kind": b"O", b"data": b""}}, "an array of objects"),
        ({"a": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [1]}}, "holds 2 in all"),
        ({"a": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f4"}}, "an array lacks its b'shape'"),
    ],
)
def test_what_of_them_cannot_be_read_is_told_in_a_sentence_and_the_session_lives_on(observation, text):
    session = OpenpiSession()
    with pytest.raises(ObservationError) as refused:
        session.received(msgpack.packb(observation))
    assert text in str(refused.value)
    assert [type(frame) for frame in session.failed(refused.value)] == [Text]


def test_a_read_only_mapping_is_an_observation():
    policy = TestPolicy()
    with server_thread(lambda: policy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        observation = types.MappingProxyType({"x": 2.0, "state": types.MappingProxyType({"joints": np.ones(3)})})
        assert client.infer(observation)["actions"][0, 0] == 2.0
        assert len(client.infer_batch([observation, observation])) == 2
    np.testing.assert_array_equal(policy.seen[0]["state"]["joints"], np.ones(3))
