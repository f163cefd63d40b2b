"""The loop with a real policy server, through the process that asks it."""

import os
import signal

import numpy as np
import pytest

from openpi_client import realtime
from openpi_client.realtime.arena import Arena, memory_file
from openpi_client.websocket_client_policy import OtherPolicyError, WebsocketClientPolicy
from realtime_world import PICTURE, Arm, Walk, metadata
from serving_live import PATIENCE_S, server_thread

PLAY = realtime.Safety(blend_s=0, stop_after_s=PATIENCE_S, max_age_s=PATIENCE_S, frozen_after_s=None)


class Served(Walk):
    """A walk behind a server."""

    def __init__(self, told: dict | None = None) -> None:
        super().__init__()
        self.metadata = told or metadata()


def requester(port: int, **options) -> realtime.ProcessRequester:
    return realtime.ProcessRequester("127.0.0.1", port, connect_timeout_s=PATIENCE_S, **options)


def played_to(policy: realtime.ProcessRequester, arm: Arm, **options) -> dict:
    """An episode until 30 rows were played, or it ends by itself."""
    loop = realtime.ControlLoop(arm, policy, safety=PLAY, **options)
    return loop.run(max_s=PATIENCE_S, until=lambda: (loop.last_log.ticks["kind"] == 3).sum() >= 30)


def test_pictures_are_resized_on_the_way_and_rows_come_back():
    served = Served()
    with server_thread(lambda: served) as (_, port), requester(port) as policy:
        summary = played_to(policy, Arm())
        assert summary["end"] == "complete" and summary["rows_played"] == 30
        assert summary["latency_ms"]["round_trip_ms"]["p50"] > 0
    assert {obs["image"].shape for obs in served.asked} == {(224, 224, 3)}
    assert served.asked[0]["prompt"] == "go" and served.asked[0]["state"].dtype == np.float32


def test_cameras_of_a_certain_size_are_resized_to_it():
    told = metadata()
    told["contract"]["cameras"] = [{"key": "image", "shape": [32, 32, 3], "layout": "hwc"}]
    served = Served(told)
    with server_thread(lambda: served) as (_, port), requester(port, image_size=None) as policy:
        played_to(policy, Arm())
    assert served.asked[0]["image"].shape == (32, 32, 3)


def test_a_server_that_comes_back_is_used_and_one_with_another_contract_is_not():
    with server_thread(Served) as (_, port):
        policy = requester(port)
        arm = Arm()
        assert played_to(policy, arm)["end"] == "complete"
    with server_thread(Served, port=port):
        assert played_to(policy, arm)["end"] == "complete"
    for told, text in (
        (metadata(horizon=10), "another policy now"),
        (metadata(kind="absolute joint positions, and gripper"), "another robot now"),
        ({**metadata(), "checkpoint": {"name": "run/200"}}, "another policy now"),
    ):
        with server_thread(lambda told=told: Served(told), port=port):
            summary = played_to(policy, arm)
        assert text in summary["end"] and summary["rows_played"] == 0
    policy.close()


def test_without_a_contract_all_that_a_server_says_tells_which_policy_it_has():
    def told(robot: str) -> Served:
        return Served({"robot": robot, "reset_pose": [0, 0]})

    def played(policy: realtime.ProcessRequester) -> dict:
        return played_to(policy, Arm(), rate_hz=50.0, action_width=2, hold="stay")

    with server_thread(lambda: told("aloha")) as (_, port):
        policy = requester(port)
        assert played(policy)["end"] == "complete"
    with server_thread(lambda: told("droid"), port=port):
        summary = played(policy)
    assert "another policy now" in summary["end"] and summary["rows_played"] == 0
    policy.close()


def test_a_client_does_not_ask_another_policy_than_it_was_told_of():
    observation = {"state": np.zeros(2, np.float32), "image": np.zeros((8, 8, 3), np.uint8)}
    with server_thread(Served) as (_, port):
        policy = WebsocketClientPolicy("127.0.0.1", port, reconnect_timeout_s=PATIENCE_S)
        policy.infer(observation)
    served = Served(metadata(kind="relative joint positions", names=["elbow", "shoulder"]))
    with server_thread(lambda: served, port=port):
        for _ in range(2):
            with pytest.raises(OtherPolicyError, match=r"another robot now.*says of actions has changed"):
                policy.infer(observation)
    assert not served.asked
    with server_thread(lambda: Served(metadata(horizon=10, low=[-1, -1], high=[1, 1])), port=port):
        assert policy.infer(observation)["actions"].shape == (20, 2)  # another checkpoint for the same robot
    policy.close()


def test_a_picture_that_cannot_be_resized_is_one_answer_of_no_use():
    class Torn(Arm):
        def observe(self) -> dict:
            observation = super().observe()
            return {**observation, "image": observation["image"][:0]} if self.observed == 2 else observation

    with server_thread(Served) as (_, port), requester(port) as policy:
        summary = played_to(policy, Torn())
    assert summary["end"] == "complete" and summary["failed"] == 1


def test_a_process_that_dies_ends_the_episode_in_hold():
    with server_thread(Served) as (_, port), requester(port) as policy:
        os.kill(policy._process.pid, signal.SIGKILL)
        summary = played_to(policy, Arm())
    assert "exit code -9" in summary["end"]


def test_a_server_that_is_not_there_is_said():
    with pytest.raises(ConnectionError, match=r"no policy server at ws://127\.0\.0\.1:9"):
        realtime.ProcessRequester("127.0.0.1", 9, connect_timeout_s=0.1)


def test_observations_arrive_as_they_were_and_too_large_ones_are_refused():
    with memory_file(2**20) as file:
        arena, other = Arena(file.fileno()), Arena(file.fileno())
    observation = {"a": {"image": PICTURE, "small": np.arange(3)}, "turned": PICTURE.T[..., ::2], "text": "go", "n": 3}
    read = other.read(*arena.write(observation))
    assert np.array_equal(read["a"]["image"], PICTURE) and np.array_equal(read["turned"], PICTURE.T[..., ::2])
    assert read["text"] == "go" and read["n"] == 3 and read["a"]["small"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="more than 1 MiB; give ProcessRequester more"):
        arena.write({"image": np.zeros(2**20, np.uint8)})
    with pytest.raises(TypeError, match="'a/thing' cannot be sent"):
        arena.write({"a": {"thing": object()}})
