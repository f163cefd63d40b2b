"""What the control loop never does, whatever server, robot and program say: each was done once."""

import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from openpi.policies import request
from openpi_client import realtime
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.freshness import Freshness
from openpi_client.realtime import hanging
from openpi_client.realtime.watch import OPTIONAL, ObservationWatch
from realtime_world import DT, HORIZON, Arm, Walk, World, metadata

FAR = "[range] state 'shoulder': 57.3 is far outside the training range -1..1"


def constant(*values: float) -> Walk:
    """A policy whose n-th answer is the n-th value, or the last one, in all rows and joints."""
    policy = Walk()
    policy.change = lambda number, result: {"actions": np.full((HORIZON, 2), values[min(number, len(values)) - 1])}
    return policy


class DegreeArm(Arm):
    """Measures degrees where the contract has radians."""

    def observe(self) -> dict:
        return {**super().observe(), "state": np.degrees(self.position).astype(np.float32)}


# Before the first answer


@pytest.mark.parametrize("blend_s", [0.0, 5.0])
def test_nothing_is_commanded_before_the_server_was_heard(blend_s):
    """The state came in degrees, and a hold at the measured pose was a command of 57 rad."""
    world = World(
        delays=[8], arm=DegreeArm([1.0, -0.5]), policy=Walk(warnings=[FAR]), safety=realtime.Safety(blend_s=blend_s)
    )
    assert FAR in world.run(100)["end"]
    assert not world.arm.commands


def test_a_server_that_does_not_answer_is_missed_at_the_start_too():
    world = World([10**6])
    assert world.run(300)["rows_played"] == 0
    assert "no answer for 5 s; until there is one the robot stays where it is" in world.warnings


def test_velocities_stand_still_from_the_first_tick_on():
    world = World(delays=[8], told=metadata(hold=["zero", "zero"]), policy=constant(0.3))
    world.run(20)
    assert world.kinds.startswith(8 * "h") and not np.any(world.arm.commands[:8])


def test_a_pose_far_outside_of_the_limits_is_not_started_from():
    told = metadata(low=[-3.0, -3.0], high=[3.0, 3.0])
    world = World(told=told, arm=DegreeArm([1.0, -0.5]), safety=realtime.Safety())
    with pytest.raises(ValueError, match=r"measured pose .*'shoulder' of 57.3 is outside its range.*units"):
        world.run(10)
    assert not world.arm.commands


def test_a_state_in_other_units_than_the_actions_is_no_pose():
    told = metadata(units=["rad", "rad"])
    told["contract"]["state"][0]["units"] = ["deg", "deg"]
    with pytest.raises(ValueError, match=r"names and units.*pose\(\)"):
        World(told=told, safety=realtime.Safety()).run(10)
    told["contract"]["state"][0]["units"] = ["rad", "0 closed .. 1 open"]
    World(told=told, safety=realtime.Safety()).run(10)


@pytest.mark.parametrize(
    ("home", "text"),
    [
        ([9.0, 0.0], "home is no place .*'shoulder' of 9 is outside"),
        ([math.nan, 0.0], "home is .*expected finite"),
        ([0.5], r"shape \(1,\); expected \(2,\)"),
        (0.5, r"shape \(\); expected \(2,\)"),
        ("there", "home is 'there'; expected 2 numbers"),
    ],
)
def test_home_is_a_place_for_this_robot(home, text):
    world = World(told=metadata(low=[-1, -1], high=[1, 1]), safety=realtime.Safety(blend_s=0.2))
    with pytest.raises(ValueError, match=text):
        world.run(20, home=home)
    assert not world.arm.commands


def test_the_way_to_the_start_never_goes_round():
    told = metadata(max_step=[9.4, 0.1])  # it went round in the recordings
    world = World(told=told, arm=Arm([3.1, 0.0]), policy=constant(-3.12), safety=realtime.Safety(blend_s=0.2))
    assert "'shoulder' of 3.1, and -3.12" in world.run(30)["end"] and not world.arm.commands
    for other in (metadata(max_step=[0.1, 0.1]), metadata(), metadata(max_step=[9.4, 0.1], units=["mm", "mm"])):
        world = World(told=other, arm=Arm([3.1, 0.0]), policy=constant(-3.12), safety=realtime.Safety(blend_s=0.2))
        assert world.run(30)["end"] == "time is over" and world.arm.commands


def test_where_a_joint_hardly_moved_in_the_recordings_it_may_start_elsewhere():
    told = metadata(low=[-1.0, -1e-4], high=[1.0, 1e-4])
    world = World(told=told, arm=Arm([0.0, 0.1]), safety=realtime.Safety(blend_s=0.2))
    assert world.run(30)["end"] == "time is over" and world.arm.commands


# Commands


def test_between_two_rows_of_an_angle_that_goes_round_there_is_nothing():
    rows = np.tile([3.10, 0.0], (HORIZON, 1))
    rows[5::2, 0] = -3.12
    policy = Walk()
    policy.change = lambda number, result: {"actions": rows}
    strategies = (realtime.Receding(), realtime.TemporalEnsembling(rate_of_inference=3))
    for strategy, told in itertools.product(strategies, (metadata(), metadata(max_step=[9.4, 0.1]))):
        safety = realtime.Safety(blend_s=0, speed=0.25)
        world = World(delays=[2], policy=policy, arm=Arm([3.1, 0]), safety=safety, strategy=strategy, told=told)
        world.run(100)
        assert set(np.round([command[0] for command in world.arm.commands], 6)) <= {3.10, -3.12}
        assert world.kinds.endswith("r")


def test_no_weights_of_an_ensemble_make_anything_but_numbers():
    world = World(delays=[2], strategy=realtime.TemporalEnsembling(rate_of_inference=1, m=-100.0))
    world.run(60)
    assert np.isfinite(world.arm.commands).all() and world.kinds.endswith("r")
    rows = np.arange(6.0).reshape(3, 2)
    for m, alone in ((1e308, 0), (-1e308, 2)):
        assert realtime.TemporalEnsembling(m=m).combine(rows).tolist() == rows[alone].tolist()


def test_ensembling_takes_no_number_of_rows_that_it_would_not_ask_after():
    with pytest.raises(ValueError, match=r"execution_horizon is 25; .* TemporalEnsembling\(rate_of_inference=25\)"):
        realtime.TemporalEnsembling(25)


def test_what_is_no_number_ends_in_hold_whatever_made_it():
    class Spoilt(realtime.Receding):
        def combine(self, rows: np.ndarray) -> np.ndarray:
            return rows[-1] if rows[-1, 0] < 0.05 else rows[-1] * np.nan

    world = World(delays=[2], strategy=Spoilt(), told=metadata(low=[-1, -1], high=[1, 1]))
    assert "'shoulder' is nan; expected a finite number" in world.run(60)["end"]
    assert np.isfinite(world.arm.commands).all()


@pytest.mark.parametrize(("rate_hz", "speed"), [(50.0, 1.0), (500.0, 1.0), (50.0, 0.25), (25.0, 1.0)])
def test_a_step_per_row_is_a_speed_at_any_rate(rate_hz, speed):
    safety = realtime.Safety(blend_s=0, speed=speed)
    world = World(
        delays=[2], policy=constant(0.0, 3.0), told=metadata(max_step=[0.05, 0.05]), rate_hz=rate_hz, safety=safety
    )
    world.loop.run(max_s=2.0)
    steps = np.abs(np.diff(world.arm.commands, axis=0)).max()
    allowed = speed * 0.05 / DT
    assert allowed / 2 <= steps * rate_hz <= allowed + 1e-9  # at half the rate a seam is caught up with as slowly


def test_limits_that_stop_let_a_seam_of_a_slow_run_pass():
    limits = realtime.Limits(max_step=0.05, on_violation="stop")
    world = World(delays=[2], policy=constant(0.0, 0.04), safety=realtime.Safety(blend_s=0, speed=0.25, limits=limits))
    assert world.run(100)["end"] == "time is over" and world.arm.commands[-1][0] == pytest.approx(0.04)


# When the server is away


def test_a_server_that_goes_while_the_robot_is_on_its_way_is_missed():
    """At the end of the way the robot held for 30 s without a word, and played at once when the server was back."""
    stops = []
    world = World(delays=[2, 1500, 2], safety=realtime.Safety(blend_s=0.5), on_stop=stops.append)
    world.run(25 + 1500 + 100)
    assert len(stops) == 1
    kinds = world.kinds
    assert kinds.index("r") > kinds.index("b", kinds.index("b" + "h"))  # by another blended start
    assert "bh" in kinds and kinds[kinds.rindex("n") + 1] == "b"


def test_a_robot_may_convert_commands_in_place():
    """The next hold, and the next limit, go by what was commanded, and not by what the robot made of it."""

    class Degrees(Arm):
        def apply(self, action):
            super().apply(action)
            action *= 180 / np.pi

    world = World([4, 30, 4], arm=Degrees(), safety=realtime.Safety(blend_s=0.2))
    world.run(100)
    assert "h" * 10 in world.kinds and np.abs(np.diff(world.arm.commands, axis=0)).max() < 0.1
    assert np.array_equal(world.log.commands[-1], world.arm.commands[-1])


_FULL_DISK = """
import pathlib, resource, sys
import numpy as np
from openpi_client import realtime
from realtime_world import World

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)  # a larger file is an OSError, as on a full disk
world = World([4], log_folder=pathlib.Path(sys.argv[1]))
summary = world.run(600)
assert summary["end"] == "time is over" and summary["rows_played"] > 590, summary
assert "is not written any further: File too large" in summary["warnings"][-1], summary["warnings"]
assert np.isfinite(world.log.commands[-1]).all()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
@pytest.mark.parametrize("num_bytes", [2000, 20000], ids=["events", "ticks"])
def test_a_disk_that_is_full_stops_no_robot(tmp_path, num_bytes):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path), str(num_bytes)], check=True, env=environment)


def test_whatever_ends_an_episode_its_picture_can_be_looked_at(tmp_path):
    def fail(number, result):
        raise RuntimeError("\x1b[31mTraceback\x1b[0m\n  <boom>" + 30 * "\n  File 'server.py'")

    policy = Walk()
    policy.change = fail
    world = World([4], policy=policy, log_folder=tmp_path)
    assert "boom" in world.run(100)["end"]
    picture = ElementTree.parse(tmp_path / "episode_0000/timeline.svg").getroot()
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert max(len(text) for text in texts) < 250 and "max 0" in texts  # no tick was late


def test_a_program_that_dies_leaves_what_happened_before(tmp_path):
    world = World([4], log_folder=tmp_path)
    apply = world.arm.apply
    left = []

    def look(action):
        apply(action)
        left.append((tmp_path / "episode_0000/events.jsonl").read_text())  # what a kill would leave here

    world.arm.apply = look
    world.run(30)
    kinds = [json.loads(line)["kind"] for line in left[-1].splitlines()]
    assert kinds.count("ask") >= 2 and "chunk" in kinds


@pytest.mark.parametrize("at", [20, 80], ids=["on its way to the start", "playing"])
def test_a_loop_that_was_suspended_goes_on_from_where_the_robot_is_now(at):
    """SIGSTOP and SIGCONT, or a laptop that was closed: somebody may have moved the arm meanwhile."""
    world = World([4], safety=realtime.Safety(blend_s=1.0, max_age_s=60))
    apply = world.arm.apply

    def suspended(action):
        apply(action)
        if len(world.arm.commands) == at:
            world.clock.advance(10.0)

    world.arm.apply = suspended
    world.run(800)
    [stop] = world.events("stop")
    assert stop["reason"] == "the loop stood still for 10.00 s" and any(stop["reason"] in w for w in world.warnings)
    after = world.kinds[np.searchsorted(world.log.ticks["number"], stop["tick"]) :]
    assert re.fullmatch(r"h+b{50}h+r+", after), after


@pytest.mark.parametrize(("moved", "end"), [([0.4, 0.4], "time is over"), ([9.0, 0.0], "'shoulder' of 9 is outside")])
def test_a_loop_that_was_suspended_on_its_way_home_goes_there_from_where_the_robot_is_now(moved, end):
    measured = [np.zeros(2), np.array(moved)]

    class Moved(Arm):
        def pose(self) -> np.ndarray:
            return measured.pop(0) if measured else self.position

        def apply(self, action: np.ndarray) -> None:
            super().apply(action)
            if len(self.commands) == 20:
                world.clock.advance(10.0)

    world = World([4], arm=Moved(), told=metadata(low=[-1, -1], high=[1, 1]), safety=realtime.Safety(blend_s=1.0))
    assert end in world.run(800, home=np.array([-0.5, 0.0]))["end"]
    assert "the loop stood still for 10.00 s: the robot holds, and goes home from where it is then" in world.warnings
    commands = np.array(world.arm.commands)
    assert world.kinds.startswith("b" * 20 + "h" * 50) and (commands[20:70] == commands[19]).all()
    if end == "time is over":
        assert re.fullmatch(r"b{20}h{50}b{50}n?h+b{50}h+r+", world.kinds), world.kinds
        np.testing.assert_allclose(commands[70], moved, atol=0.01)
        np.testing.assert_allclose(commands[119], [-0.5, 0.0])
        assert np.allclose(world.policy.asked[0]["state"], [-0.5, 0.0])


def test_velocities_of_a_loop_that_was_suspended_become_zero_whoever_stops_it():
    told = metadata(kind="joint velocities", names=["x", "gripper"])
    world = World([4], policy=constant(0.5), told=told, on_stop=lambda reason: None)
    apply = world.arm.apply

    def suspended(action):
        apply(action)
        if len(world.arm.commands) == 40:
            world.clock.advance(10.0)

    world.arm.apply = suspended
    world.run(800)
    assert world.arm.commands[39].tolist() == [0.5, 0.5] and world.arm.commands[40].tolist() == [0.0, 0.5]


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no clock here can be told to have slept")
def test_a_machine_that_slept_makes_what_was_seen_before_older(monkeypatch):
    slept_s, now = 0.0, time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda which: now(which) + slept_s * (which == time.CLOCK_BOOTTIME))
    clock, policy, any_age = realtime.MonotonicClock(), Walk(), Freshness(5.0)
    broker = ActionChunkBroker(policy, HORIZON, max_age_s=5.0)
    before_s, observation = clock.now_s(), Arm().observe()
    broker.infer(observation), broker.infer(observation)
    assert len(policy.asked) == 1 and any_age.left_s(before_s) > 0
    slept_s = 3600.0
    assert clock.now_s() - before_s >= slept_s and any_age.left_s(before_s) == 0
    broker.infer(observation)
    assert len(policy.asked) == 2


def test_after_a_stop_the_hardware_limits_hold_from_where_the_robot_is():
    class Moved(Arm):
        def pose(self) -> np.ndarray:
            return self.position

    arm = Moved()
    arm.limits = realtime.Limits(max_speed=1.0)

    def push(reason: str) -> None:
        arm.position = np.array([-2.0, -2.0])

    world = World(delays=[2, 2, 120, 2], arm=arm, policy=constant(0.0), safety=realtime.Safety(blend_s=0), on_stop=push)
    world.run(300)
    first = next(row for row in world.arm.commands if row[0] < -1)
    assert world.summary["stops"] == 1 and first[0] == pytest.approx(-2.0 + 1.0 / 50)


@pytest.mark.parametrize(("pose", "text"), [(None, "does not tell any more"), (np.zeros(1), "shape (1,)")])
def test_a_pose_that_is_none_after_a_stop_ends_the_episode(pose, text):
    class Forgetful(Arm):
        poses = 0

        def pose(self) -> np.ndarray | None:
            self.poses += 1
            return np.zeros(2) if self.poses <= 2 else pose

    told = metadata()
    told["contract"]["state"] = []
    world = World(delays=[2, 2, 150, 2], arm=Forgetful(), told=told, safety=realtime.Safety(blend_s=0.1))
    assert text in world.run(400)["end"]


def test_a_warning_in_the_middle_of_an_episode_is_told_and_ends_nothing():
    """After an outage a server's first look is at a closed gripper; the robot held something, and dropped out."""
    policy = Walk()
    policy.change = lambda number, result: {**result, "warnings": [FAR] if number >= 4 else []}
    world = World(delays=[2, 2, 150, 2], policy=policy)
    assert world.run(300)["end"] == "time is over"
    assert FAR in world.warnings and world.kinds.endswith("r")


def test_a_policy_that_holds_says_so():
    world = World(policy=Walk(held=True))
    world.run(30)
    assert "the policy made no actions, and holds" in world.warnings and world.events("held by the policy")


def test_after_a_stop_velocities_are_not_commanded_either():
    stops = []
    told = metadata(hold=["zero", "zero"])
    world = World(delays=[2, 2, 150, 2], told=told, policy=constant(0.3), on_stop=stops.append)
    world.run(300)
    kinds = world.kinds
    assert stops and "n" in kinds and "h" not in kinds[kinds.index("n") : kinds.rindex("n")] and kinds.endswith("r")


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_service_that_is_stopped_ends_in_hold(number, code):
    """Velocities of 0.7 were the last that a robot heard of a container that was stopped."""
    world = World(delays=[2], told=metadata(hold=["zero", "zero"]), policy=constant(0.7))
    apply = world.arm.apply

    def stop(action: np.ndarray) -> None:
        apply(action)
        if len(world.arm.commands) == 30:
            signal.raise_signal(number)

    world.arm.apply = stop
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup ignores one of the two, and so does the loop then
    try:
        with pytest.raises(SystemExit) as ended:
            world.run(100)
        assert ended.value.code == code and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert np.array_equal(world.arm.commands[-2], [0.7, 0.7]) and not np.any(world.arm.commands[-1])


def test_a_second_signal_at_once_lets_the_robot_hold():
    """A terminal that is closed may send two."""
    world, held = World(delays=[2]), []

    def hold() -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        held.append(True)

    apply = world.arm.apply
    world.arm.hold = hold
    world.arm.apply = lambda action: (apply(action), len(world.arm.commands) == 20 and signal.raise_signal(2))
    with pytest.raises(KeyboardInterrupt):
        world.run(100)
    assert held


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_what_a_program_ignores_or_handles_itself_is_left_to_it(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        world = World(delays=[2])
        apply = world.arm.apply

        def hang_up(action: np.ndarray) -> None:
            apply(action)
            signal.raise_signal(signal.SIGHUP)

        world.arm.apply = hang_up
        assert world.run(30)["end"] == "time is over"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("is_program", [False, True])
def test_a_driver_that_never_returns_is_told_with_its_place_and_a_program_ends_all_the_same(
    is_program, monkeypatch, caplog
):
    """`disconnect` of ur-rtde connects anew for ever where its cable is out."""
    world, codes, told = World(delays=[2]), [], threading.Event()

    def hold() -> None:
        assert told.wait(30)

    world.arm.hold = hold
    monkeypatch.setattr(hanging, "PATIENCE_S", 0.01)
    monkeypatch.setattr(hanging, "LONGEST_S", 0.02)
    monkeypatch.setattr(hanging, "_is_program", is_program)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), told.set()))
    monkeypatch.setattr(hanging.logger, "error", lambda *args: (logging.error(*args), is_program or told.set()))
    monkeypatch.setattr(hanging.faulthandler, "dump_traceback_later", lambda *args, **options: None)
    world.run(10)
    assert codes == [1] * is_program
    assert "the robot's hold() has not returned for 0.01 s, " in caplog.text and "> hold (test_" in caplog.text


# Observations


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [[math.nan, 0.0]], np.array([[0.0, math.inf]]), math.nan])
def test_numbers_are_looked_at_whatever_holds_them(bad):
    watch = ObservationWatch(0.5)
    assert watch.problems({"state": bad, "prompt": "go", "tags": ["a", "b"], "odd": [[1], [2, 3]]}, 0.0) == [
        "'state' holds NaN or infinity"
    ]


def test_keys_of_a_request_may_be_none_and_those_of_an_observation_may_not():
    assert {"prompt", *request.KEYS} == OPTIONAL
    watch = ObservationWatch(0.5)
    assert watch.problems({"state": np.zeros(2), **dict.fromkeys(OPTIONAL)}, 0.0) == []
    assert watch.problems({"state": None, "images": {"wrist": None}, "seed": None}, 0.0) == [
        "'images/wrist' is missing",
        "'state' is missing",
    ]


def test_holes_in_a_depth_picture_are_no_fault():
    depth = np.full((48, 64), np.nan, np.float32)
    assert ObservationWatch(0.5).problems({"state": np.zeros(2), "depth": depth}, 0.0) == []


def test_a_camera_is_frozen_although_the_state_is_a_list():
    watch, picture = ObservationWatch(0.5, {"state"}), np.zeros((48, 64, 3), np.uint8)
    told = [watch.problems({"state": [0.1 * i, 0.0], "image": picture}, 0.1 * i) for i in range(10)]
    assert not any(told[:5]) and "'image' sends the same picture" in told[-1][0]


def test_what_moves_between_the_pixels_that_are_compared_is_seen():
    watch = ObservationWatch(0.5, {"state"})
    for i in range(40):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[5, 3 + i % 4] = 255  # no multiple of eight
        assert not watch.problems({"state": np.array([0.1 * i]), "image": picture}, 0.1 * i)


def test_time_is_no_motion():
    watch, picture = ObservationWatch(0.5), np.zeros((48, 64, 3), np.uint8)
    for i in range(40):
        assert not watch.problems({"state": np.zeros(2), "timestamp": 0.1 * i, "image": picture}, 0.1 * i)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_after_s": None},
        {"blend_s": None},
        {"max_age_s": math.inf},
        {"stop_after_s": math.inf},
        {"blend_s": math.nan},
        {"hold_after_ticks": math.nan},
        {"max_failures": 0},
    ],
)
def test_safety_that_cannot_be_is_refused_when_it_is_made(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        realtime.Safety(**options)


def test_a_rate_of_zero_is_no_rate():
    with pytest.raises(ValueError, match="rate_hz is 0"):
        World(rate_hz=0)
