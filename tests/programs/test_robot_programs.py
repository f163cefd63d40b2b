"""The programs of `examples/` against counterparts of their robots, and what they are made of.

Each is a process of its own, with a real server (`openpi serve --dummy RECIPE`, in this process) and real sockets.
"""

import inspect
import re
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openpi.policies import aloha_policy, calvin_policy, droid_policy, libero_policy, ur5_policy
from openpi_client import realtime
from openpi_client.realtime.limits import Limiter
from openpi_client.robots import aloha, calvin, cameras, droid, flags, libero, pictures, robotiq, ros1, trossen, ur5
from openpi_client.robots.cameras import Camera, open_camera
from openpi_client.robots.dry_run import DryRun
from openpi_client.robots.fit import check_fit
from openpi_client.robots.libraries import need
from openpi_client.robots.motion import follow
from robot_programs import COUNTERPARTS, ROOT, Program, contract_of, serving, summaries
from ur_controller import SERVO_STOP, Controller

HERE = "127.0.0.1"

# Flags and defaults as they are published; the port, which is 8000 there, depends on the host.
PUBLISHED = {
    "aloha_sim/main.py": {
        "--args.out-dir": Path("data/aloha_sim/videos"),
        "--args.task": "gym_aloha/AlohaTransferCube-v0",
        "--args.seed": 0,
        "--args.action-horizon": 10,
        "--args.host": "0.0.0.0",
        "--args.port": None,
        "--args.display": False,
    },
    "aloha_real/main.py": {
        "--args.host": "0.0.0.0",
        "--args.port": None,
        "--args.action-horizon": 25,
        "--args.num-episodes": 1,
        "--args.max-episode-steps": 1000,
    },
    "droid/main.py": {
        **{f"--{name}_camera_id": "<your_camera_id>" for name in ("left", "right", "wrist")},
        "--external_camera": None,
        "--max_timesteps": 600,
        "--open_loop_horizon": 8,
        "--remote_host": "0.0.0.0",
        "--remote_port": None,
    },
    "libero/main.py": {
        "--args.host": "0.0.0.0",
        "--args.port": None,
        "--args.resize-size": 224,
        "--args.replan-steps": 5,
        "--args.task-suite-name": "libero_spatial",
        "--args.num-steps-wait": 10,
        "--args.num-trials-per-task": 50,
        "--args.video-out-path": Path("data/libero/videos"),
        "--args.seed": 7,
    },
    "trossen_ai/main.py": {
        "--policy_host": "localhost",
        "--policy_port": None,
        "--control_freq": 30,
        "--mode": "autonomous",
        "--task_prompt": "move the arm to the left",
        "--max_steps": 1000,
        "--rate_of_inference": 50,
        "--temporal_ensemble_coefficient": None,
        "--cam_high": "218622270304",
        "--left_arm": "192.168.1.5",
    },
    "calvin/main.py": {"--args.replan-steps": 5, "--args.max-subtask-steps": 360, "--args.seed": 7},
    "ur5/main.py": {"--host": "0.0.0.0", "--port": None},
}
PROGRAMS = [*PUBLISHED, "aloha_real/main_ros2.py"]


@pytest.fixture(scope="module")
def aloha_server():
    with serving("pi0_aloha", np.full(14, 0.002), rate_hz=50) as (policy, port):
        policy.metadata = {"reset_pose": [0, -1.1, 1.1, 0, 0, 0]}
        yield policy, port


def loaded(file: str, monkeypatch) -> dict:
    """What a program defines, without running it."""
    monkeypatch.syspath_prepend(str((ROOT / "examples" / file).parent))
    sys.modules.pop("main", None)
    return runpy.run_path(str(ROOT / "examples" / file))


@pytest.mark.parametrize("file", PROGRAMS)
def test_programs_explain_themselves_where_no_robot_s_library_is(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    monkeypatch.syspath_prepend(str((ROOT / "examples" / file).parent))
    sys.modules.pop("main", None)
    libraries = {"rospy", "rclpy", "droid", "rtde_control", "trossen_arm", "pyrealsense2", "cv2", "libero", "gym_aloha"}
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / file), run_name="__main__")
    assert end.value.code == 0 and not libraries & set(sys.modules)
    text = capsys.readouterr().out
    assert "dry-run" in text and "print what would be commanded" in text


@pytest.mark.parametrize("file", PUBLISHED)
def test_flags_and_defaults_are_the_published_ones(file, monkeypatch):
    kind = loaded(file, monkeypatch)["Args"]
    prefix = "args." if any(flag.startswith("--args.") for flag in PUBLISHED[file]) else ""
    defaults = flags.parse(kind, [], prefix=prefix)
    for flag, value in PUBLISHED[file].items():
        name = flag.removeprefix("--").removeprefix("args.").replace("-", "_")
        assert getattr(defaults, name) == value, flag
        word = {Path: "there", int: "3", float: "2.5"}.get(type(value), "x")
        if isinstance(value, (int, float, Path)) and not isinstance(value, bool):
            for spelling in (f"{flag}={word}", f"{flag.replace('-', '_').replace('__', '--', 1)}={word}"):
                assert getattr(flags.parse(kind, [spelling], prefix=prefix), name) == type(value)(word)


def test_an_aloha_is_moved_through_ros_1_topics_until_ctrl_c(tmp_path, aloha_server):
    policy, port = aloha_server
    policy.asked.clear()
    words = ["--args.host", HERE, "--args.port", port, "--args.blend-s", 0.2, "--args.prompt", "go"]
    program = Program(tmp_path, "aloha_real/main.py", *words)
    program.wait_until(
        lambda: max([joints[0] for joints in program.commands("right/commands/joint_group")] or [0]) > 0.01
    )
    program.interrupt()
    assert "the robot holds" in program.end(130)
    services = [(entry["service"], entry["field_name"]) for entry in program.told("service")]
    assert services[0] == ("/puppet_left/reboot_motors", "gripper") and len(services) == 10
    joints = np.array(program.commands("/puppet_right/commands/joint_group"))
    np.testing.assert_allclose(joints[0], [0, -1, 1, 0, 0, 0], atol=0.01)  # from where it is
    assert np.abs(np.diff(joints, axis=0)).max() <= np.pi / 50 + 1e-6
    assert np.isclose(joints, [0, -1.1, 1.1, 0, 0, 0], atol=1e-6).all(1).any()  # the server's reset pose
    assert (joints[-1] == joints[-2]).all()
    gripper = program.commands("/puppet_right/commands/joint_single")
    assert min(gripper) == pytest.approx(-0.6213) and max(gripper) == pytest.approx(1.4910)
    (first, *_) = policy.asked
    assert first["state"].shape == (14,) and first["state"][6] == pytest.approx((0.04 - 0.01844) / (0.05800 - 0.01844))
    wrist = first["images"]["cam_left_wrist"]
    assert wrist.shape == (3, 224, 224) and wrist[0, 112, 112] == 90 and wrist[2].max() == 0 and wrist[:, 0].max() == 0
    assert set(first["images"]) == set(aloha.CAMERAS) and first["prompt"] == "go"
    (summary,) = summaries(tmp_path)
    assert summary["end"] == "interrupted" and summary["rows_played"] > 0


def test_a_dry_run_under_ros_2_moves_nothing(tmp_path, aloha_server):
    options = ["--args.blend-s", 0, "--args.prompt", "go", "--args.max-episode-steps", 5, "--args.dry-run"]
    port = aloha_server[1]
    program = Program(tmp_path, "aloha_real/main_ros2.py", "--args.host", HERE, "--args.port", port, *options)
    output = program.end(0)
    assert "would command left_waist 0.00" in output and "would hold" in output
    assert {entry["kind"] for entry in program.told()} == {"shutdown"}


def test_an_arm_under_ros_2_is_that_of_aloha_2_and_its_reset_can_be_interrupted(tmp_path, aloha_server):
    words = ["--args.host", HERE, "--args.port", aloha_server[1], "--args.prompt", "go"]
    (tmp_path / "terminated").mkdir()
    program = Program(tmp_path, "aloha_real/main_ros2.py", *words)
    program.wait_for("command", 8)
    program.interrupt()
    program.end(130)
    terminated = Program(tmp_path / "terminated", "aloha_real/main_ros2.py", *words)
    terminated.wait_for("command", 8)
    terminated.interrupt(signal.SIGTERM)
    terminated.end(143)
    assert terminated.told()[-1]["kind"] == program.told()[-1]["kind"] == "shutdown"
    assert program.told("service")[0]["service"] == "/follower_left/reboot_motors"
    assert {entry["arm"] for entry in program.told("command")} == {"follower_left", "follower_right"}
    # Of ALOHA 2: the finger is at 0.05 m of 0.0440 to 0.0579, and its motor goes from 0.6197 to 1.6214.
    opening = (0.05 - 0.0440) / (0.0579 - 0.0440)
    first = program.commands("left/commands/joint_single")[0]
    assert first == pytest.approx(0.6197 + opening * (1.6214 - 0.6197), abs=0.01)


def test_a_camera_that_dies_is_noticed_and_the_robot_holds(tmp_path, aloha_server):
    policy, port = aloha_server
    policy.asked.clear()
    words = ["--args.host", HERE, "--args.port", port, "--args.prompt", "go", "--args.blend-s", 0]
    more = ["--args.max-episode-steps", 100, "--args.strategy", "receding", "--args.action-horizon", 5]
    program = Program(tmp_path, "aloha_real/main.py", *words, *more, faults="camera dies")
    assert "the newest from '/cam_high' is " in program.end(0)
    (summary,) = summaries(tmp_path)
    assert any("'images/cam_high' is missing" in text for text in summary["warnings"])
    assert all(observation["images"]["cam_high"] is not None for observation in policy.asked)


def test_a_service_that_fails_is_said_and_nothing_moves(tmp_path, aloha_server):
    words = ["--args.host", HERE, "--args.port", aloha_server[1], "--args.prompt", "go"]
    program = Program(tmp_path, "aloha_real/main.py", *words, faults="service fails")
    output = program.end(1)
    assert "the service '/puppet_left/reboot_motors' failed: transport error" in output and "Traceback" not in output
    assert not program.told("command")


def test_a_service_that_takes_a_call_and_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(COUNTERPARTS)
    monkeypatch.setenv("COUNTERPART_LOG", str(tmp_path / "told"))
    monkeypatch.setattr(ros1, "_ANSWER_S", 0.05)
    topics = ros1.Ros1Topics()
    with pytest.raises(ValueError, match="reset_pose"):
        aloha.AlohaRobot(topics, reset_pose=(9, 9, 9, 9, 9, 9))
    assert "shutdown" in (tmp_path / "told").read_text()  # a robot that cannot be made leaves no node behind
    monkeypatch.setenv("COUNTERPART_FAULTS", "service is silent")
    with pytest.raises(TimeoutError, match=r"'/puppet_left/reboot_motors' has not answered for 0\.05 s"):
        topics.call("/puppet_left/reboot_motors", "interbotix_xs_msgs/Reboot")


def test_a_ros_master_that_is_missing_is_said(tmp_path, aloha_server):
    words = ["--args.host", HERE, "--args.port", aloha_server[1], "--args.prompt", "go"]
    program = Program(tmp_path, "aloha_real/main.py", *words, faults="no master")
    assert "no ROS master answers (ROS_MASTER_URI is " in program.end(1) and program.told("command") == []


def test_a_robot_does_not_start_with_a_policy_of_another(tmp_path):
    with serving("pi0_ur5", np.zeros(7)) as (policy, port):
        program = Program(tmp_path, "aloha_real/main.py", "--args.host", HERE, "--args.port", port)
        output = program.end(1)
    assert "an action has 7 dimensions (base, shoulder" in output and "it needs the camera 'base_rgb'" in output
    assert program.told("command") == program.told("service") == policy.asked == []


def test_a_droid_station_plays_rollouts_and_keeps_their_scores(tmp_path):
    move = np.array([0.1] * 6 + [1.7, 0.9])
    with serving("pi05_droid", move, rate_hz=15, is_relative=True) as (policy, port):
        ids = ["--left_camera_id", "11111111", "--right_camera_id", "22222222", "--wrist_camera_id", "33333333"]
        words = [*ids, "--external_camera", "right", "--remote_host", HERE, "--remote_port", port]
        answers = "pick up the can\n50\ny\nput it down\nwhat\ny\nn\n"
        program = Program(tmp_path, "droid/main.py", *words, answers=answers)
        program.wait_for("step", 12)
        program.interrupt()
        program.wait_for("reset", 2)
        program.wait_for("step", len(program.told("step")) + 6)
        program.interrupt()
        program.end(0)
    assert program.told("made")[0] | {"kind": ""} == {
        "kind": "",
        "action_space": "joint_velocity",
        "gripper_action_space": "position",
    }
    steps = np.array([entry["action"] for entry in program.told("step")])
    assert set(steps[:, 7]) <= {0.0, 1.0} and steps[:, 6].max() == 1.0 and (steps[-1, :7] == 0).all()
    first, last = policy.asked[0], policy.asked[-1]
    assert (first["prompt"], last["prompt"]) == ("pick up the can", "put it down")
    scene, wrist = first["observation/exterior_image_1_left"], first["observation/wrist_image_left"]
    assert scene.shape == wrist.shape == (224, 224, 3)
    assert scene[112, 113].tolist() == [100, 200, 0] and wrist[112, 113].tolist() == [150, 200, 0]
    assert first["observation/gripper_position"].shape == (1,)
    (table,) = (tmp_path / "results").glob("eval_*.csv")
    header, *rows = [line.split(",") for line in table.read_text().split()]
    assert header == ["success", "duration", "video_filename"] and [row[0] for row in rows] == ["0.5", "1.0"]
    assert [int(row[1]) for row in rows] == [summary["ticks"] - 1 for summary in summaries(tmp_path)]
    assert (tmp_path / rows[0][2]).stat().st_size > 0 and (tmp_path / "robot_camera_views.png").is_file()


def test_a_ur5_is_servoed_through_the_real_library(tmp_path):
    pytest.importorskip("rtde_control", reason="ur-rtde has no wheel for this Python")
    controller = Controller("127.0.0.31")
    try:
        with serving("pi0_ur5", np.full(7, 0.004), rate_hz=20) as (policy, port):
            words = ["--host", HERE, "--port", port, "--robot_host", controller.host, "--prompt", "go"]
            Program(tmp_path, "ur5/main.py", *words, "--blend_s", 0, "--max_seconds", 0.3, "--dry_run").end(0)
            controller.heard_out()
            assert not controller.servoed and not controller.is_running and not controller.positions
            program = Program(tmp_path, "ur5/main.py", *words, "--blend_s", 0.2)
            program.wait_until(lambda: bool(controller.servoed) and controller.servoed[-1][0][0] > 0.03)
            program.interrupt()
            program.end(130)
            targets = np.array([joints for joints, _ in controller.heard_out().servoed])
            np.testing.assert_allclose(targets[0], [0.0, -1.5, 1.5, 0.0, 0.5, 0.0], atol=0.01)
            assert {seconds for _, seconds in controller.servoed} == {0.05} and targets[-1, 0] > 0.02
            assert np.abs(np.diff(targets, axis=0)).max() <= np.pi / 20
            assert controller.commands[0] == SERVO_STOP and not controller.is_running
            assert controller.gripper["GTO"] == 1 and max(controller.positions) > 3
            joints, gripper = policy.asked[-1]["joints"], policy.asked[-1]["gripper"]
            assert (
                joints.shape == (6,)
                and gripper.shape == (1,)
                and policy.asked[-1]["base_rgb"][112, 112].tolist()[:2] == [100, 0]
            )
            before = len(controller.servoed)
            program = Program(tmp_path, "ur5/main.py", *words, "--blend_s", 0)
            program.wait_until(lambda: len(controller.servoed) > before + 5)
            controller.safety_mode = 3
            assert "the controller has stopped the arm" in program.end(1)
        assert controller.heard_out().commands[-1] == SERVO_STOP and not controller.is_running
    finally:
        controller.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safety_mode": 5}, "the controller has stopped the arm"),
        ({"is_silent": True}, "the controller says nothing new"),
    ],
)
def test_a_ur5_that_stands_or_is_silent_is_servoed_no_further(tmp_path, changes, message):
    pytest.importorskip("rtde_control", reason="ur-rtde has no wheel for this Python")
    controller = Controller("127.0.0.32")
    try:
        with serving("pi0_ur5", np.full(7, 0.004), rate_hz=20) as (_, port):
            words = ["--host", HERE, "--port", port, "--robot_host", controller.host, "--prompt", "go", "--blend_s", 0]
            program = Program(tmp_path, "ur5/main.py", *words)
            program.wait_until(lambda: len(controller.servoed) > 5)
            vars(controller).update(changes)
            program.wait_until(lambda: not controller.is_running)
            controller.is_silent = False  # for the library waits for it when it disconnects, and may crash then
            assert message in program.end()
    finally:
        controller.close()


@pytest.mark.parametrize(
    ("answer", "message"), [(b"", "does not answer to GET STA"), (b"STA ?\n", "answered 'STA \\?'")]
)
def test_a_gripper_that_is_not_there_is_said(answer, message, monkeypatch):
    monkeypatch.setattr(robotiq, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answered() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(64)
                peer.sendall(answer)
                peer.recv(64)

        thread = threading.Thread(target=answered)
        thread.start()
        with pytest.raises(ConnectionError, match=message):
            robotiq.RobotiqGripper("127.0.0.1", server.getsockname()[1])
        thread.join()


def test_no_program_is_left_on_a_ur_when_a_camera_is_silent(tmp_path):
    pytest.importorskip("rtde_control", reason="ur-rtde has no wheel for this Python")
    controller = Controller("127.0.0.33")
    try:
        with serving("pi0_ur5", np.full(7, 0.004), rate_hz=20) as (_, port):
            words = ["--host", HERE, "--port", port, "--robot_host", controller.host, "--prompt", "go"]
            program = Program(tmp_path, "ur5/main.py", *words, "--wrist_camera", "opencv:8")
            assert "nothing came from 'wrist_rgb'" in program.end(1)
            assert not controller.heard_out().is_running
    finally:
        controller.close()


def test_a_trossen_kit_is_moved_within_the_limits_of_its_driver(tmp_path):
    move = np.zeros(14)
    move[[1, 8]] = -0.05  # below what the joints can
    with serving("pi0_trossen_transfer_block", move, rate_hz=30) as (policy, port):
        words = ["--policy_host", HERE, "--policy_port", port, "--blend_s", 0.2, "--rate_of_inference", 10]
        program = Program(
            tmp_path, "trossen_ai/main.py", *words, "--max_steps", 60, "--temporal_ensemble_coefficient", 0.01
        )
        program.end(0)
        stretch = ["--mode", "test", "--image_resize", "stretch", "--max_steps", 6]
        (tmp_path / "test").mkdir()
        test = Program(tmp_path / "test", "trossen_ai/main.py", *words, *stretch)
        assert "would command left_waist" in test.end(0)
    left = [entry for entry in program.told("positions") if entry["arm"] == "192.168.1.5"]
    positions = np.array([entry["positions"] for entry in left])
    np.testing.assert_allclose(positions[0], [0, 1, 1, 0, 0, 0, 0.02], atol=0.05)
    assert positions[:, 1].min() == 0.0 and np.abs(np.diff(positions[:, 1])).max() <= 3.0 / 30 + 1e-6
    assert {entry["goal_time"] for entry in left} == {4.0 / 30}
    assert len(program.told("cleanup")) == 2 and summaries(tmp_path)[0]["strategy"] == "TemporalEnsembling"
    assert {entry["kind"] for entry in test.told()} == {"camera stopped", "cleanup"}
    padded, stretched = policy.asked[0]["images"]["cam_high"], policy.asked[-1]["images"]["cam_high"]
    assert padded.shape == stretched.shape == (3, 224, 224)
    assert padded[0, 112, 112] == 100 and padded[0, 0].max() == 0 and stretched[0, 0].min() == 100
    assert policy.asked[0]["prompt"] == "move the arm to the left"


def test_an_arm_whose_line_is_cut_does_not_leave_the_other_one_servoing(tmp_path):
    with serving("pi0_trossen_transfer_block", np.zeros(14), rate_hz=30) as (_, port):
        words = ["--policy_host", HERE, "--policy_port", port, "--blend_s", 0]
        program = Program(tmp_path, "trossen_ai/main.py", *words, faults="192.168.1.5 goes")
        assert "Failed to send to the arm controller at 192.168.1.5" in program.end(1)
    assert {entry["arm"] for entry in program.told("cleanup")} == {"192.168.1.5", "192.168.1.4"}
    assert len(program.told("camera stopped")) == 4


def test_a_trossen_kit_has_one_strategy(monkeypatch):
    program = loaded("trossen_ai/main.py", monkeypatch)
    args = program["Args"](temporal_ensemble_coefficient=0.01, strategy="synchronous")
    with pytest.raises(ValueError, match="leave out --strategy synchronous"):
        program["main"](args)


def test_the_simulated_driver_has_the_calls_of_trossen_s(monkeypatch):
    real = pytest.importorskip("trossen_arm")
    monkeypatch.syspath_prepend(str(COUNTERPARTS))
    fake = runpy.run_path(str(COUNTERPARTS / "trossen_arm.py"))
    for name, call in inspect.getmembers(fake["TrossenArmDriver"], inspect.isfunction):
        signature = getattr(real.TrossenArmDriver, name).__doc__.partition(" -> ")[0]
        assert re.findall(r"(\w+): ", signature) == list(inspect.signature(call).parameters), name
    assert [mode.name for mode in fake["Mode"]] == list(real.Mode.__members__)
    assert set(fake["JointLimit"]._fields) <= set(dir(real.JointLimit))
    assert hasattr(real.StandardEndEffector, "wxai_v0_follower") and hasattr(real.Model, "wxai_v0")


def test_a_simulated_aloha_is_played_and_filmed(tmp_path):
    with serving("pi0_aloha_sim", np.full(14, 0.002), rate_hz=50) as (policy, port):
        program = Program(tmp_path, "aloha_sim/main.py", "--args.host", HERE, "--args.port", port)
        assert "largest reward: 4" in program.end(0)
    (reset,) = program.told("reset")
    assert reset["seed"] == int(np.random.default_rng(0).integers(2**32 - 1))
    assert len(program.told("step")) == 25 and len(policy.asked) == 3  # every 10 rows
    picture = policy.asked[0]["images"]["cam_high"]
    assert picture.shape == (3, 224, 224) and picture[0, 112, 112] == 200 and "prompt" not in policy.asked[0]
    assert (tmp_path / "data/aloha_sim/videos/out_0.mp4").stat().st_size > 0


def test_libero_is_played_from_its_initial_states(tmp_path):
    with serving("pi05_libero", np.array([0.1] * 6 + [1.0]), rate_hz=10, is_relative=True) as (policy, port):
        words = ["--args.num-trials-per-task", 2, "--args.num-tasks", 1]
        program = Program(tmp_path, "libero/main.py", "--args.host", HERE, "--args.port", port, *words)
        assert "success: 1.0000 (2 of 2)" in program.end(0)
    assert [entry["state"] for entry in program.told("initial")] == [[0.0, 1.0], [2.0, 3.0]]
    steps = [entry["action"] for entry in program.told("step")]
    assert steps[:10] == [[0.0] * 6 + [-1.0]] * 10 and steps[10] == pytest.approx([0.1] * 6 + [1.0])
    first = policy.asked[0]
    assert first["observation/image"][0, -1].tolist() == [255, 0, 0]  # turned by 180 degrees
    assert first["observation/state"] == pytest.approx([0.1, 0.2, 0.3, 0, 0, 0.4, 0.04, -0.04])
    assert first["prompt"] == "do task 0" and len(policy.asked) == 2 * 3
    names = {path.name for path in (tmp_path / "data/libero/videos").iterdir()}
    assert names == {"rollout_do_task_0_00_000_success.mp4", "rollout_do_task_0_00_001_success.mp4"}


def test_a_server_that_fails_is_no_failure_of_a_task(tmp_path):
    with serving("pi05_libero", np.zeros(7), rate_hz=10, is_relative=True) as (policy, port):
        policy._drop = 1.0
        words = ["--args.host", HERE, "--args.port", port, "--args.num-tasks", 1]
        output = Program(tmp_path, "libero/main.py", *words).end(1)
    assert "so the episode does not count" in output and "dropped" in output


def test_a_server_that_goes_ends_a_benchmark_at_once_and_what_was_played_is_told(tmp_path):
    with serving("pi05_libero", np.array([0.1] * 6 + [1.0]), rate_hz=10, is_relative=True) as (policy, port):
        answer, asked = policy.infer, policy.asked

        def go(obs):
            policy._drop = 1.0 if len(asked) >= 4 else 0.0
            return answer(obs)

        policy.infer = go
        words = ["--args.host", HERE, "--args.port", port, "--args.num-tasks", 1]
        output = Program(tmp_path, "libero/main.py", *words).end(1)
    assert "so the episode does not count" in output and "success: 1.0000 (1 of 1)" in output
    assert len(asked) == 5  # of which the last was an error: nothing is asked, or waited for, any more


def test_calvin_s_subtasks_are_played_one_after_the_other(tmp_path):
    with serving("pi0_calvin", np.array([0.1] * 6 + [0.3] + [9.0] * 8), rate_hz=30, is_relative=True) as (policy, port):
        words = ["--args.num-sequences", 2, "--args.max-subtask-steps", 20, "--args.num-save-videos", 1]
        program = Program(tmp_path, "calvin/main.py", "--args.host", HERE, "--args.port", port, *words)
        assert "average: 2.000 of 5, in 2 sequences" in program.end(0)
    assert program.told("step")[0]["action"] == pytest.approx([0.1] * 6 + [1.0])
    assert [entry["robot_obs"][0] for entry in program.told("reset")] == [0.0, 1.0]
    assert policy.asked[0]["prompt"] == "pull the handle to open the drawer"
    assert policy.asked[0]["observation/rgb_gripper"].shape == (84, 84, 3)
    assert [path.name for path in (tmp_path / "data/calvin/videos").iterdir()] == ["sequence_0000_2_of_5.mp4"]


# What programs are made of


def test_robots_name_their_dimensions_as_the_recipes_do():
    pairs = [
        *((aloha.AlohaRobot, aloha_policy.ALOHA_SPEC), (trossen.TrossenRobot, aloha_policy.ALOHA_SPEC)),
        *((droid.DroidRobot, droid_policy.DROID_SPEC), (ur5.UR5Robot, ur5_policy.UR5_SPEC)),
        *((libero.LiberoWorld, libero_policy.LIBERO_SPEC), (calvin.CalvinWorld, calvin_policy.CALVIN_SPEC)),
    ]
    for robot, spec in pairs:
        assert tuple(robot.action_names) == spec.actions.names, robot
        assert {key: tuple(names) for key, names in robot.state_names.items()}.items() <= {
            vector.key: vector.names for vector in spec.state
        }.items(), robot


class Ready(realtime.Robot):
    """Sends what it is told to."""

    action_names = ur5.UR5Robot.action_names

    def __init__(self, **changes: object) -> None:
        picture = np.zeros((8, 8, 3), np.uint8)
        sent = {
            "joints": np.zeros(6),
            "gripper": np.zeros(1),
            "base_rgb": picture,
            "wrist_rgb": picture,
            "prompt": "go",
        }
        self.sent = {key: value for key, value in {**sent, **changes}.items() if value is not None}
        self.commands: list[np.ndarray] = []
        self.held = 0

    def observe(self) -> dict:
        return self.sent

    def apply(self, action: np.ndarray) -> None:
        self.commands.append(action)

    def hold(self) -> None:
        self.held += 1


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"joints": None}, 50, "it needs 'joints' \\(6 values: base, shoulder"),
        ({"joints": np.zeros(7)}, 50, "'joints' has 6 values .* sends 7"),
        ({"wrist_rgb": None}, 50, "it needs the camera 'wrist_rgb'; the robot sends 'base_rgb'"),
        ({"prompt": ""}, 50, "no 'prompt'"),
        ({}, 51, "chunks have 50 rows; 51 are to be played"),
    ],
)
def test_what_does_not_fit_is_found_before_anything_moves(changes, rows, message):
    metadata = {"contract": contract_of("pi0_ur5").as_metadata()}
    check_fit(Ready(), metadata, rows=50)
    with pytest.raises(ValueError, match=message):
        check_fit(Ready(**changes), metadata, rows=rows)


def test_a_camera_that_the_policy_does_not_look_at_is_told_and_no_reason_not_to_move(caplog):
    check_fit(Ready(top=np.zeros((8, 8, 3), np.uint8)), {"contract": contract_of("pi0_ur5").as_metadata()}, rows=50)
    assert "does not look at the camera 'top'; it takes 'base_rgb', 'wrist_rgb'" in caplog.text


def test_velocities_at_another_rate_are_refused_and_the_robot_s_rate_is_used():
    told = {"contract": {"actions": {"names": list(droid.NAMES), "kind": "joint velocities"}, "control_hz": 10.0}}
    policy = realtime.SimulatedLatency(None, realtime.VirtualClock(), [0.0], told)
    robot = Ready()
    robot.action_names, robot.rate_hz, robot.holds = droid.NAMES, 15.0, ["zero"] * 7 + ["stay"]
    with pytest.raises(ValueError, match="rate_hz is 15, but the policy was trained at 10 Hz"):
        realtime.ControlLoop(robot, policy)
    robot.rate_hz = None
    assert realtime.ControlLoop(robot, policy).spec.stays.tolist() == [False] * 7 + [True]


def test_limits_of_the_hardware_hold_beside_those_of_the_contract():
    both = realtime.Limits(low=[-1, -1], high=[2, 1]).narrowed(realtime.Limits(low=-0.5, max_speed=[5, np.inf]))
    assert np.array_equal(both.low, [-0.5, -0.5]) and np.array_equal(both.high, [2, 1]) and both.max_step is None
    spec = realtime.ActionSpec(("a", "b"), np.array([True, True]))
    allowed, problem = Limiter(both, spec, rate_hz=50).within(np.array([2.0, -3.0]), np.zeros(2), is_seam=False)
    assert allowed.tolist() == [0.1, -0.5] and "'b' of -3 is outside its range" in problem
    with pytest.raises(ValueError, match="above"):
        realtime.Limits(low=0.0).narrowed(realtime.Limits(high=-1.0))


def test_an_episode_ends_with_the_robot_s_own_hold():
    class Dies(Ready):
        def apply(self, action: np.ndarray) -> None:
            raise RuntimeError("the bus is gone")

    told = {"contract": contract_of("pi0_ur5").as_metadata()}
    for robot in (Ready(), Dies()):
        clock = realtime.VirtualClock()
        policy = realtime.SimulatedLatency(Still(), clock, [0.0], told)
        loop = realtime.ControlLoop(robot, policy, rate_hz=20, clock=clock, safety=realtime.Safety(blend_s=0))
        if isinstance(robot, Dies):
            with pytest.raises(RuntimeError, match="bus"):
                loop.run(max_s=0.2)
        else:
            loop.run(max_s=0.2)
        assert robot.held == 1


class Still:
    def infer(self, obs: dict) -> dict:
        return {"actions": np.zeros((50, 7), np.float32)}


def test_a_camera_thread_that_ends_is_noticed(caplog):
    frames = iter([np.zeros((2, 2, 3), np.uint8)])
    camera = Camera("scene", lambda: next(frames), max_age_s=0.05)
    assert camera.wait().shape == (2, 2, 3)
    deadline_s = time.monotonic() + 10
    while camera.picture() is not None and time.monotonic() < deadline_s:
        pass
    assert camera.picture() is None and "the camera 'scene' has failed: StopIteration" in caplog.text
    assert caplog.text.count("is not asked until it is back") == 1
    camera.close()
    silent = threading.Event()
    with pytest.raises(TimeoutError, match="nothing came from 'wrist'"):
        Camera("wrist", lambda: silent.wait() and None).wait(0.01)
    silent.set()


@pytest.mark.parametrize("names", [("secs", "nsecs"), ("sec", "nanosec")])
def test_a_driver_that_repeats_its_last_message_is_silent_and_one_without_stamps_is_not(names, monkeypatch):
    class Topics:
        def __init__(self) -> None:
            self.callbacks = {}

        def subscribe(self, topic, kinds, callback):
            self.callbacks[topic] = callback
            publish(topic, callback, 1)

        def publisher(self, topic, kind):
            return lambda **fields: None

    def publish(topic, callback, stamp):
        header = SimpleNamespace(stamp=SimpleNamespace(**dict(zip(names, (0, stamp), strict=True))))
        joints = {"name": [*aloha.JOINTS, "left_finger"], "position": [0.0] * 7}
        picture = {"encoding": "rgb8", "height": 1, "width": 1, "step": 3, "data": bytes(3)}
        callback(SimpleNamespace(header=header, **(joints if "joint" in topic else picture)))

    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(cameras, "time", SimpleNamespace(monotonic=lambda: now.s, time=lambda: now.s))
    topics = Topics()
    robot = aloha.AlohaRobot(topics, camera_topics={"cam_high": "/cam_high"})
    for picture, joints, is_there in ((2, 2, 1), (2, 3, 0), (3, 3, 0), (4, 4, 1), (0, 0, 1), (0, 0, 1)):
        now.s += 0.6
        for topic, callback in topics.callbacks.items():
            publish(topic, callback, joints if "joint" in topic else picture)
        seen = robot.observe()
        assert (seen["images"]["cam_high"] is not None and seen["state"] is not None) == is_there


@pytest.mark.parametrize(
    ("lags_s", "is_told"),
    [([3.0] * 9, True), ([0.1] * 9, False), ([3.0, 0.1] * 9, False), ([1.7e9] * 9, False), ([-3.0] * 9, False)],
    ids=["late", "in time", "hiccups", "another clock", "in the future"],
)
def test_pictures_that_come_seconds_after_their_stamps_are_told_once(lags_s, is_told, caplog):
    latest = cameras.Latest("/cam_high")
    for number, lag_s in enumerate(lags_s):
        latest.put(number, time.time() - lag_s)
        assert latest.get() == number
    told = [record.getMessage() for record in caplog.records]
    assert [text[:67] for text in told] == [
        "what comes from '/cam_high' is stamped 3.0 s before this machine's "
    ] * is_told


def test_a_camera_that_loses_a_frame_comes_back(caplog):
    read = iter([1, 0, 0, *[1] * 1000])

    def frame() -> np.ndarray:
        if not next(read):
            raise RuntimeError("Frame didn't arrive within 500")
        time.sleep(0.01)
        return np.zeros((2, 2, 3), np.uint8)

    camera = Camera("scene", frame, max_age_s=0.05)
    camera.wait()
    deadline_s = time.monotonic() + 10
    for is_there in (False, True):
        while (camera.picture() is not None) is not is_there:
            assert time.monotonic() < deadline_s
    camera.close()
    assert caplog.text.count("has failed") == 1 and "'scene' is back" in caplog.text


def test_a_camera_that_has_no_such_size_is_said(monkeypatch, caplog):
    monkeypatch.syspath_prepend(COUNTERPARTS)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    for size in ((640, 480), (600, 400)):
        open_camera("scene", "opencv:0", width=size[0], height=size[1]).close()
    assert [record.getMessage().split("; a policy")[0] for record in caplog.records] == [
        "the camera 'scene' gives pictures of 640x480, not of 600x400"
    ]
    monkeypatch.delitem(sys.modules, "cv2")


@pytest.mark.parametrize("place", ["realsense", "usb:3", "opencv:"])
def test_addresses_of_cameras_that_are_none_are_refused(place):
    with pytest.raises(ValueError, match="expected realsense:SERIAL, opencv:INDEX or opencv:PATH"):
        open_camera("scene", place)


def test_a_way_is_followed_within_its_speed_and_an_interruption_holds():
    clock, robot = realtime.VirtualClock(), Ready()
    follow(robot, np.zeros(2), [(np.array([1.0, 0.1]), 0.1)], rate_hz=50, max_speed=np.array([1.0, 1.0]), clock=clock)
    path = np.array(robot.commands)
    assert path[-1] == pytest.approx([1, 0.1]) and np.abs(np.diff(path, axis=0)).max() <= 1 / 50 + 1e-9
    assert clock.now_s() > 1.4

    with pytest.raises(ValueError, match="expected finite numbers"):
        follow(robot, np.array([0, np.nan]), [(np.ones(2), 1.0)], rate_hz=50, clock=clock)
    assert len(robot.commands) == len(path)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clock = realtime.VirtualClock(on_advance=interrupted)
        follow(robot, np.zeros(2), [(np.ones(2), 1.0)], rate_hz=50, clock=clock)
    assert robot.held == 1

    def suspended(seconds: float) -> None:
        if 0.5 < clock.now_s() < 5:
            clock.advance(10.0)

    clock = realtime.VirtualClock(on_advance=suspended)
    with pytest.raises(RuntimeError, match=r"stood still for 10\.0\d s while the robot moved; start anew"):
        follow(robot, np.zeros(2), [(np.ones(2), 1.0)], rate_hz=50, clock=clock)
    assert robot.held == 2 and robot.commands[-1][0] < 0.6


@pytest.mark.parametrize("pose", [None, "home", [0.0] * 5, [0, 0, 0, 0, 0, np.nan], [0, 2.0, 0, 0, 0, 0]])
def test_a_reset_pose_that_no_arm_can_have_is_refused(pose):
    assert aloha.checked_pose([0, -1.5, 1.5, 0, 0, 0]).shape == (6,)
    with pytest.raises(ValueError, match="reset_pose"):
        aloha.checked_pose(pose)


def test_a_dry_run_says_what_another_robot_would_do():
    lines: list[str] = []
    robot = Ready()
    dry = DryRun(robot, lines.append)
    dry.apply(np.arange(7.0))
    dry.hold()
    dry.reset()
    assert lines[0].startswith("would command base 0.0000, shoulder 1.0000") and len(lines) == 3
    assert robot.commands == [] and robot.held == 0 and dry.observe() is robot.sent


def test_rotations_are_vectors_as_in_libero_s_data():
    assert libero.axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    assert libero.axis_angle(np.array([0, 0, 0, 1.0000001])).tolist() == [0, 0, 0]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(libero.axis_angle(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
    np.testing.assert_allclose(libero.axis_angle(np.array([half, 0, 0, -half])), [3 * np.pi / 2, 0, 0])


def test_a_library_that_is_missing_is_said_with_what_installs_it():
    with pytest.raises(ImportError, match=r"'no_such_robot' .*To get it: pip install no-such-robot"):
        need("no_such_robot", "pip install no-such-robot")


def test_pictures_of_unknown_encodings_are_refused():
    class Image:
        encoding, height, width, step, data = "mono16", 1, 1, 2, b"  "

    with pytest.raises(ValueError, match="'mono16'; expected rgb8, bgr8"):
        pictures.of_ros(Image())


@pytest.mark.parametrize("name", sorted({Path(file).parent.name for file in PROGRAMS}))
def test_every_program_has_its_environment_and_says_what_was_run(name):
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "examples" / name
    compose = yaml.safe_load((folder / "compose.yml").read_text())
    assert compose["services"].keys() == {"runtime", "openpi_server"}
    for service in compose["services"].values():
        assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["environment"]["OPENPI_API_KEY"] is None  # the shell's, on both sides, or none
    # Those are no part of the image.
    mounted = {volume.rpartition(":")[2] for volume in compose["services"]["openpi_server"]["volumes"]}
    assert mounted >= {"/openpi/checkpoints", "/openpi/policy_records"}
    assert (folder / "requirements.txt").is_file()
    text = (folder / "README.md").read_text()
    assert "## What was run" in text and "not run" in text
    assert f"examples/{name}" in (ROOT / "docs/how-to/robots.md").read_text()
