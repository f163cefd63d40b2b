"""The simulated robot with a policy in charge: when it is asked, when commands go out, and what is recorded."""

import os
import pty
import shutil
import subprocess
import sys
import threading
import time
import tty

import numpy as np
import pytest

import paths
from openpi.convert.engine import convert
from openpi.convert.sampling import instants
from openpi.data.lerobot.reader import LeRobotDataset
from openpi_positronic.codecs.action import JointPositions
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.timing import Timing
from openpi_positronic.conversion import PositronicRecordings
from openpi_positronic.franka import stacking
from openpi_positronic.franka.env import CAMERAS
from openpi_positronic.franka.render import make_renderer
from openpi_positronic.franka.world import START_JOINTS, FrankaWorld
from openpi_positronic.raw_episodes import RawDataset, RawDatasetWriter
from openpi_positronic.simulation import drivers
from openpi_positronic.simulation import station as station_module
from openpi_positronic.simulation.drivers import Keyboard, Timed
from openpi_positronic.simulation.policies import ScriptedPolicy
from openpi_positronic.simulation.station import Station
from openpi_sim import poses

S = 1_000_000_000


class Chunks:
    """A policy that gives chunks of joint angles, 15 a second, and keeps what it was asked with."""

    meta = {"type": "remote", "server.checkpoint_id": "10000", "server.image_sizes": [224, 224], "server.none": None}  # noqa: RUF012

    def __init__(self, target=START_JOINTS + 0.1, num_chunks=10**6, timestamps=True):
        codec = JointPositions()
        self.codec = Timing(15, 1.0) | codec if timestamps else codec
        self.chunk = np.tile(np.append(target, 1.0), (15, 1))
        self.num_chunks = num_chunks
        self.asked: list[dict] = []
        self.num_resets = 0

    def reset(self):
        self.num_resets += 1

    def infer(self, observation):
        self.asked.append(dict(observation))
        return self.codec.decode(self.chunk) if len(self.asked) <= self.num_chunks else []


@pytest.fixture(scope="module")
def world() -> FrankaWorld:
    return FrankaWorld()


@pytest.fixture
def station(world, tmp_path):
    def make(policy, **options) -> Station:
        options = {"recordings": RawDatasetWriter(tmp_path / "raw"), "camera_fps": 15.0, **options}
        renderer = make_renderer(world, width=32, height=24)
        return Station(world, policy, renderer=renderer, cameras=CAMERAS, **options)

    return make


def test_the_policy_is_asked_anew_right_after_the_last_step_of_a_chunk(station, world):
    policy = Chunks()
    robot = station(policy, recordings=None)
    robot.start({"task": "stack"})
    began = world.time_ns
    robot.run_for(3.0)
    asked = [request["__inference_time_ns__"] - began for request in policy.asked]
    assert asked[0] == 0
    # 14 of 15 steps later; commands are looked after every 10 ms.
    np.testing.assert_allclose(np.diff(asked) / S, 14 / 15, atol=0.011)
    request = policy.asked[1]
    assert request["task"] == "stack"
    assert {name: np.shape(request[name]) for name in request if not name.startswith("__")} == {
        "robot_state.q": (7,),
        "robot_state.dq": (7,),
        "robot_state.ee_pose": (7,),
        "grip": (),
        "image.wrist": (24, 32, 3),
        "image.exterior": (24, 32, 3),
        "task": (),
    }
    np.testing.assert_allclose(world.q, START_JOINTS + 0.1, atol=5e-3)
    assert world.grip > 0.95
    for name in ("ee", "joints_traj", "droid"):
        get_codec(name).encode(request)


def test_steps_without_times_go_out_at_once(station, world):
    policy = Chunks(timestamps=False)
    robot = station(policy)
    robot.start({})
    began = world.time_ns
    robot.run_for(0.1)
    asked = [request["__inference_time_ns__"] - began for request in policy.asked]
    assert asked == [k * 10_000_000 for k in range(10)]
    robot.save()


def test_time_goes_on_while_the_policy_thinks_only_if_asked_for(station, world, monkeypatch):
    thinking_ns = 200_000_000
    clock = iter(range(0, 10**15, thinking_ns))
    monkeypatch.setattr(station_module.time, "perf_counter_ns", lambda: next(clock))
    for simulate, period_s in ((True, 14 / 15 + 0.2), (False, 14 / 15)):
        policy = Chunks()
        robot = station(policy, recordings=None, simulate_timeout=simulate)
        robot.start({})
        robot.run_for(3.5)
        asked = [request["__inference_time_ns__"] for request in policy.asked]
        np.testing.assert_allclose(np.diff(asked) / S, period_s, atol=0.021)


def test_a_pose_out_of_reach_is_recorded_as_an_error_and_recovered_from(station, world, tmp_path, caplog):
    policy = Chunks()
    out_of_reach = {"type": "cartesian_pos", "pose": np.array([3.0, 0, 0.5, *np.eye(3).ravel()])}
    first = {"robot_command": out_of_reach, "target_grip": 1.0, "timestamp": 0.1}
    fine = policy.codec.decode(policy.chunk)
    answers = iter([[first, *fine], [first, *fine], fine])
    policy.infer = lambda observation: next(answers)
    robot = station(policy)
    robot.start({})
    robot.run_for(0.7)
    robot.save()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("2 times in this episode the arm could not reach")
    (episode,) = RawDataset(tmp_path / "raw")
    failed = episode.signal("robot_state.error")
    assert 2 <= np.sum(failed.values(range(len(failed)))) <= 12  # 10 ms each
    assert len(episode.signal("robot_commands.pose")) == 2
    assert len(episode.signal("robot_commands.joints")) >= 5  # of the next answer: the rest of the first was dropped
    assert not world.has_failed


def test_what_is_recorded_is_what_happened(station, world, tmp_path):
    seen: dict[str, list] = {"q": [], "pose": [], "grip": [], "time": []}

    def watch(world):
        for name, value in zip(seen, (world.q, world.ee_pose, world.grip, world.time_ns), strict=True):
            seen[name].append(value)
        return {"height": float(world.ee_pose[2])}

    policy = Chunks()
    robot = station(policy, observers=(watch, stacking.scores), seed=5)
    robot.start({"task": "stack", "lab": 3}, {"simulation.iteration": "0"})
    robot.run_for(1.5)
    robot.save({"extra": True})
    (episode,) = RawDataset(tmp_path / "raw")
    for name, kept in (("robot_state.q", "q"), ("robot_state.ee_pose", "pose"), ("grip", "grip")):
        signal = episode.signal(name)
        np.testing.assert_array_equal(signal.timestamps, seen["time"])
        np.testing.assert_array_equal(signal.values(range(len(signal))), seen[kept])
    assert len(episode.signal("height")) == 750
    assert {"box_distance", stacking.SUCCESS, f"{stacking.SUCCESS}.xy_aligned"} < set(episode.signals)
    for camera in CAMERAS:
        np.testing.assert_allclose(np.diff(episode.signal(camera).timestamps) / S, 1 / 15, atol=0.0021)
        assert len(episode.signal(camera)) == 23
    joints = episode.signal("robot_commands.joints")
    np.testing.assert_array_equal(joints.values(range(len(joints))), np.tile(policy.chunk[:1, :7], (23, 1)))
    assert episode.static == {
        "task": "stack",
        "inference.context.task": "stack",
        "inference.context.lab": 3,
        "inference.simulate_timeout": False,
        "inference.policy.type": "remote",
        "inference.policy.server.checkpoint_id": "10000",
        "inference.policy.server.image_sizes": [224, 224],
        "simulation.mujoco_model_path": str(world.model_path),
        "simulation.iteration": "0",
        "simulation.seed": "5",
        "simulation.scene": "0",
        "extra": True,
    }


def test_the_experts_episodes_are_recorded_converted_and_played_again(station, world, tmp_path):
    robot = station(ScriptedPolicy(), observers=(stacking.scores,), seed=11)
    Timed(num_iterations=2).run(robot)
    episodes = RawDataset(tmp_path / "raw")
    assert [episode.static["simulation.iteration"] for episode in episodes] == ["0", "1"]
    assert episodes[1].start_ts > episodes[0].last_ts  # simulated time never goes back
    for episode in episodes:
        assert 4 < episode.duration_ns / S < 9  # it ends when the expert is done
        success = episode.signal(stacking.SUCCESS)
        assert success.values([0])[0] == 0 and success.values([len(success) - 1])[0] > 0.9

    source = PositronicRecordings(tmp_path / "raw")
    dataset = LeRobotDataset(convert(source, tmp_path / "set", num_workers=0))
    begin, end = dataset.episode_bounds[0]
    episode = episodes[0]
    times = instants([signal.timestamps for signal in episode.signals.values()], 15)
    assert end - begin == len(times)
    at = {name: episode.signal(name).time[times].values for name in ("robot_state.ee_pose", "grip", "target_grip")}
    state = np.concatenate([at["robot_state.ee_pose"], at["grip"][:, None]], axis=1).astype(np.float32)
    np.testing.assert_array_equal(dataset.column("observation.state")[begin:end], state)
    np.testing.assert_array_equal(dataset.column("action")[begin:end, 7], at["target_grip"].astype(np.float32))
    assert dataset[0]["task"] == stacking.TASK

    replayed = FrankaWorld()
    replayed.reset(np.random.default_rng([11, 0]))
    commands, grips = episode.signal("robot_commands.pose"), episode.signal("target_grip")
    replayed.time_ns = episode.start_ts
    for time_ns, pose, grip in zip(
        commands.timestamps, commands.values(range(len(commands))), grips.values(range(len(grips))), strict=True
    ):
        replayed.step((time_ns - replayed.time_ns) // replayed.step_ns or 1)
        replayed.move_to_pose(pose)
        replayed.set_gripper(grip)
    assert stacking.scores(replayed)[stacking.SUCCESS] > 0.9
    error = poses.difference(episode.signal("robot_state.ee_pose").time[episode.last_ts], replayed.ee_pose)
    assert np.linalg.norm(error[:3]) < 5e-3


def test_a_driver_runs_episodes_of_its_length_and_resets_between(station, world, tmp_path):
    policy = Chunks()
    robot = station(policy)
    scene = world.data.qpos.copy()
    Timed(simulation_time=0.3, num_iterations=3, task="wave").run(robot)
    assert policy.num_resets == 2
    episodes = RawDataset(tmp_path / "raw")
    assert len(episodes) == 3
    assert all(episode.duration_ns <= 0.3 * S for episode in episodes)
    assert not np.allclose(world.data.qpos[-14:], scene[-14:])  # other cubes


def test_a_policy_that_fails_keeps_what_was_recorded(station, tmp_path):
    policy = Chunks(num_chunks=1)
    answer = policy.infer

    def infer(observation):
        if policy.asked:
            raise RuntimeError("Server error: out of memory")
        return answer(observation)

    policy.infer = infer
    with pytest.raises(RuntimeError, match="out of memory"):
        Timed(num_iterations=5).run(station(policy))
    (episode,) = RawDataset(tmp_path / "raw")
    assert episode.static["inference.error"] == "Server error: out of memory"
    assert 0.9 < episode.duration_ns / S < 1.0


def test_a_long_episode_says_how_far_it_is(station, monkeypatch, caplog):
    monkeypatch.setattr(drivers, "_TELL_EVERY_S", 0.0)
    caplog.set_level("INFO")
    robot = station(Chunks())
    began = robot.world.time_ns
    Timed(simulation_time=1.1).run(robot)
    assert robot.world.time_ns - began == 1.1 * S
    assert "episode 1 of 1: 0 of 1.1 simulated seconds" in caplog.messages
    assert "episode 1 of 1: 1 of 1.1 simulated seconds" in caplog.messages


def test_ctrl_c_drops_the_episode_under_way(station, tmp_path):
    policy = Chunks()

    def infer(observation):
        raise KeyboardInterrupt

    policy.infer = infer
    with pytest.raises(KeyboardInterrupt):
        Timed().run(station(policy))
    assert list((tmp_path / "raw").glob("*/*")) == []


def test_steps_that_no_robot_understands_say_what_to_do(station):
    policy = Chunks()
    policy.infer = lambda observation: [{"action": np.zeros(8)}]
    robot = station(policy)
    robot.start({})
    with pytest.raises(ValueError, match=r"lacks 'robot_command', 'target_grip'.*--policy\.codec"):
        robot.run_for(0.1)
    robot.discard()


def test_keys_start_save_reset_and_quit(station, tmp_path, monkeypatch, capsys):
    ours, theirs = pty.openpty()
    tty.setcbreak(theirs)  # keys that wait in line mode are not there yet
    with open(theirs, closefd=True) as terminal:  # noqa: PTH123  a file descriptor
        monkeypatch.setattr(sys, "stdin", terminal)
        policy = Chunks()
        driver = Keyboard(task="wave")
        driver.check()
        os.write(ours, b"spsrspq")  # saved, dropped, saved
        driver.run(station(policy))
    os.close(ours)
    episodes = RawDataset(tmp_path / "raw")
    assert [episode.static["simulation.iteration"] for episode in episodes] == ["0", "1"]
    assert episodes.unfinished == []
    assert episodes[0].static["task"] == "wave"
    assert policy.num_resets == 3
    assert "q quit" in capsys.readouterr().out


def test_the_world_does_not_run_ahead_of_those_who_watch(station, world, monkeypatch):
    clock = [10**9]
    slept: list[float] = []
    others_sleep, this_thread = time.sleep, threading.get_ident()

    def sleep(seconds):
        if threading.get_ident() != this_thread:  # what an earlier test has left running
            others_sleep(seconds)
            return
        slept.append(seconds)
        clock[0] += round(seconds * S)

    monkeypatch.setattr(station_module.time, "monotonic_ns", lambda: clock[0])
    monkeypatch.setattr(station_module.time, "sleep", sleep)
    robot = station(Chunks(), recordings=None, is_real_time=True)
    robot.run_for(1.0)
    assert 0.97 < sum(slept) < 1.01


@pytest.mark.parametrize("check", ["cameras", "judging"])
def test_windows_work_on_a_screen(check, tmp_path):
    """In a process of its own: one that has used a screen ends when the screen does."""
    if (program := shutil.which("Xvfb")) is None:
        pytest.skip("Xvfb is not installed")
    read, write = os.pipe()
    arguments = ["-displayfd", str(write), "-screen", "0", "1280x800x24", "-nolisten", "tcp"]
    with subprocess.Popen([program, *arguments], pass_fds=[write], stderr=subprocess.DEVNULL) as screen:
        os.close(write)
        with open(read) as numbers:  # noqa: PTH123  a file descriptor
            environment = {**os.environ, "DISPLAY": f":{numbers.readline().strip()}"}
        script = [sys.executable, "-W", "error", paths.SUPPORT / "windows_live.py", check, tmp_path]
        try:
            done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120)
        finally:
            screen.terminate()
    assert done.returncode == 0, done.stderr
