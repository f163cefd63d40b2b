"""The protocol of one connection against the recorded one, without sockets."""

import json

import numpy as np
import pytest

from openpi.serving.openpi_session import Binary, Close, OpenpiSession, Text
from openpi_client import msgpack_numpy


@pytest.fixture(scope="module")
def transcript(golden):
    """name -> (opcode, direction, bytes), and what the recording says about the end."""
    folder = golden / "wire" / "openpi_session"
    recorded = json.loads((folder / "transcript.json").read_text())
    steps = {step["name"]: (folder / step["file"]).read_bytes() for step in recorded["steps"]}
    return steps, recorded


@pytest.fixture
def session(transcript):
    steps, _ = transcript
    return OpenpiSession(msgpack_numpy.unpackb(steps["00_metadata"]))


def test_a_session_opens_with_the_recorded_metadata_frame(session, transcript):
    assert session.opening(0.0) == [Binary(transcript[0]["00_metadata"])]


def test_replies_have_the_recorded_bytes(session, transcript):
    steps, _ = transcript
    session.opening(0.0)
    for name in ("01", "02"):
        session.received(steps[f"{name}_request"])
        recorded = msgpack_numpy.unpackb(steps[f"{name}_response"])
        timing = recorded.pop("server_timing")
        [reply] = session.replied(recorded, timing["infer_ms"] / 1000)
        ours = msgpack_numpy.unpackb(reply.data)
        assert list(ours["server_timing"]) == list(timing)
        # Measurements differ in their last digit; with the recorded ones in place the frame must be the same.
        np.testing.assert_allclose(ours["server_timing"]["infer_ms"], timing["infer_ms"])
        assert msgpack_numpy.packb({**ours, "server_timing": timing}) == steps[f"{name}_response"]
        session.sent(1.0)


def test_requests_decode_to_observations(session, transcript):
    observation = session.received(transcript[0]["01_request"])
    assert all(isinstance(key, str) for key in observation)
    arrays = [value for value in observation.values() if isinstance(value, np.ndarray)]
    assert all(not array.flags.writeable for array in arrays)


def test_a_failure_sends_the_traceback_and_closes_as_recorded(session, transcript):
    steps, recorded = transcript
    observation = session.received(steps["03_bad_request"])
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
    session.opening(10.0)
    timings = []
    for now_s in (11.0, 11.5, 14.0):
        [reply] = session.replied({"actions": np.zeros(3)}, 0.25)
        timings.append(msgpack_numpy.unpackb(reply.data)["server_timing"])
        session.sent(now_s)
    assert timings == [
        {"infer_ms": 250.0},
        {"infer_ms": 250.0, "prev_total_ms": 1000.0},
        {"infer_ms": 250.0, "prev_total_ms": 500.0},
    ]


def test_a_policy_s_own_result_is_not_changed(session):
    result = {"actions": np.zeros(3)}
    session.replied(result, 0.1)
    assert list(result) == ["actions"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", "text frame"),
        (msgpack_numpy.packb([1, 2]), "received a list"),
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
