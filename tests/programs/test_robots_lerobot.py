"""Robots of LeRobot in our control loop, by their features; LeRobot itself runs in `test_lerobot_robots.py`."""

import copy
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openpi_client import realtime
from openpi_client.base_policy import BasePolicy
from openpi_client.robots import lerobot
from openpi_client.robots.lerobot import LeRobotRobot
from openpi_client.robots.lerobot_features import Choices, FeatureMap

RATE_HZ, HORIZON = 20.0, 10
JOINTS = ("shoulder.pos", "elbow.pos", "gripper.pos")
UNITS = ("rad", "rad", "0..100")
CAMERA = "observation.images.front"


def metadata(**actions: Any) -> dict[str, Any]:
    """A server's: radians, and another order than the robot's."""
    told = {"key": "actions", "names": [*JOINTS], "units": [*UNITS], "horizon": HORIZON, "hold": ["stay"] * 3}
    camera = {"key": CAMERA, "shape": None, "layout": "any", "dtype": "uint8", "required": True}
    contract = {
        "robot": "arm",
        "cameras": [camera],
        "state": [{"key": "observation.state", "names": [*JOINTS], "units": [*UNITS], "width": 3}],
        "actions": {**told, "kind": "absolute joint positions", **actions},
        "control_hz": RATE_HZ,
    }
    return {"contract": contract}


class NormMode(Enum):
    """As LeRobot spells it."""

    DEGREES = "degrees"
    RANGE_0_100 = "range_0_100"


class Arm:
    """The surface of a LeRobot robot: degrees, at once where it is sent."""

    def __init__(self, units: bool = True) -> None:
        self.positions = {"gripper.pos": 40.0, "elbow.pos": -90.0, "shoulder.pos": 45.0}
        self.action_features: dict[str, Any] = dict.fromkeys(self.positions, float)
        self.observation_features: dict[str, Any] = {**self.action_features, "front": (4, 6, 3), "task": str}
        self.sent: list[dict[str, float]] = []
        self.cameras: dict[str, Any] = {}
        if units:
            modes = {"gripper": NormMode.RANGE_0_100, "elbow": NormMode.DEGREES, "shoulder": NormMode.DEGREES}
            self.bus = SimpleNamespace(motors={name: SimpleNamespace(norm_mode=mode) for name, mode in modes.items()})
        self.picture = np.zeros((4, 6, 3), np.uint8)
        self.picture[..., 0] = 200

    def connect(self) -> None: ...

    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        self.picture = self.picture + np.uint8([0, 1, 0])
        return {**self.positions, "front": self.picture}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.sent.append(action)
        self.positions = dict(action)
        return action


class Walk(BasePolicy):
    """From the observed state on, by 0.01 in each row; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def infer(self, obs: dict) -> dict:
        self.asked.append(obs)
        rows = obs["observation.state"] + 0.01 * np.arange(HORIZON)[:, None]
        return {"actions": rows.astype(np.float32)}


def run(arm: Arm, told: dict[str, Any], ticks: int = 8, choices: Choices | None = None) -> Walk:
    """An episode under a virtual clock."""
    policy, clock = Walk(), realtime.VirtualClock()
    robot = LeRobotRobot(arm, told, prompt="go", choices=choices)
    requester = realtime.SimulatedLatency(policy, clock, [0.0], told)
    safety = realtime.Safety(blend_s=0)
    loop = realtime.ControlLoop(robot, requester, safety=safety, clock=clock, hold=robot.features.hold)
    assert loop.run(max_s=ticks / RATE_HZ)["end"] == "time is over"
    return policy


def test_joints_in_another_order_and_another_unit_are_matched_by_their_names():
    arm = Arm()
    policy = run(arm, metadata())
    asked = policy.asked[0]
    np.testing.assert_allclose(asked["observation.state"], [np.pi / 4, -np.pi / 2, 40.0], rtol=1e-6)
    assert asked["observation.state"].dtype == np.float32 and asked["prompt"] == "go"
    assert asked[CAMERA].dtype == np.uint8 and asked[CAMERA][0, 0].tolist()[::2] == [200, 0]
    assert list(arm.sent[0]) == [*JOINTS]
    last = arm.sent[3]  # the rows walk 0.01 rad, and 0.01 of the gripper's range
    assert last["shoulder.pos"] == pytest.approx(45 + np.degrees(0.03), abs=1e-4)
    assert last["elbow.pos"] == pytest.approx(-90 + np.degrees(0.03), abs=1e-4)
    assert last["gripper.pos"] == pytest.approx(40.03, abs=1e-4)


def test_the_blended_start_begins_where_the_robot_is():
    told = metadata()
    pose = LeRobotRobot(Arm(), told).pose()
    np.testing.assert_allclose(pose, [np.pi / 4, -np.pi / 2, 40.0])


def without_names(told: dict[str, Any]) -> dict[str, Any]:
    """A contract that numbers its dimensions and tells no unit, as that of a dataset without names."""
    told = copy.deepcopy(told)
    told["contract"]["state"][0] |= {"names": ["state_0", "state_1", "state_2"], "units": ["unknown"] * 3}
    told["contract"]["actions"] |= {"names": ["actions_0", "actions_1", "actions_2"], "units": ["unknown"] * 3}
    return told


def test_dimensions_without_names_are_said_one_by_one():
    names = {f"{key}_{i}": name for key in ("state", "actions") for i, name in enumerate(JOINTS)}
    arm = Arm()
    policy = run(arm, without_names(metadata()), choices=Choices(names=names))
    np.testing.assert_allclose(policy.asked[0]["observation.state"], [45, -90, 40])


def test_values_are_converted_as_they_were_said_to_be_and_back():
    told = metadata(units=["rad", "rad", "0 open .. 1 closed"])
    told["contract"]["state"][0]["units"] = ["rad", "rad", "0 open .. 1 closed"]
    features = FeatureMap(
        Arm().observation_features,
        Arm().action_features,
        told,
        Choices(convert={"gripper.pos": (-0.01, 1.0)}, units={"elbow.pos": "degrees", "shoulder.pos": "rad"}),
    )
    raw = {"gripper.pos": 40.0, "elbow.pos": 180.0, "shoulder.pos": 0.5, "front": np.zeros((4, 6, 3), np.uint8)}
    state = features.observation(raw)["observation.state"]
    np.testing.assert_allclose(state, [0.5, np.pi, 0.6], rtol=1e-6)
    back = features.action(np.array([0.5, np.pi, 0.6]))
    assert back == pytest.approx({"shoulder.pos": 0.5, "elbow.pos": 180.0, "gripper.pos": 40.0})


def test_what_the_policy_does_not_command_is_sent_as_it_was_fixed():
    arm = Arm()
    arm.action_features["base.vel"] = float
    run(arm, metadata(), choices=Choices(fixed={"base.vel": 0.0}))
    assert {action["base.vel"] for action in arm.sent} == {0.0}


def test_how_it_holds_is_in_the_robot_s_names_where_the_contract_does_not_tell():
    told = metadata(kind="as recorded")
    del told["contract"]["actions"]["hold"]
    assert LeRobotRobot(Arm(), told).features.hold == ["stay"] * 3
    run(Arm(), told)


def test_pictures_of_a_camera_that_gives_bgr_are_turned():
    arm = Arm()
    arm.cameras = {"front": SimpleNamespace(color_mode=NormMode.DEGREES)}
    assert run(arm, metadata()).asked[0][CAMERA][0, 0, 0] == 200
    arm.cameras = {"front": SimpleNamespace(color_mode="bgr")}
    assert run(arm, metadata()).asked[0][CAMERA][0, 0, 2] == 200


def test_aloha_s_pictures_are_nested_and_have_their_channels_first():
    told = metadata()
    told["contract"]["cameras"][0] |= {"key": "images/front", "layout": "chw"}
    observation = LeRobotRobot(Arm(), told).observe()
    assert observation["images"]["front"].shape == (3, 4, 6)


def changed(**changes: Any) -> dict[str, Any]:
    told = metadata()
    for path, value in changes.items():
        part, _, field = path.partition("__")
        target = told["contract"][part]
        (target[0] if isinstance(target, list) else target)[field] = value
    return told


POSITIONS_FOR_VELOCITIES = {"kind": "joint velocities", "hold": ["zero", "zero", "stay"]}
SPOILT = {
    "no contract": ({}, None, "tells no contract"),
    "a joint that the robot lacks": (
        changed(actions__names=["shoulder.pos", "elbow.pos", "wrist.pos"]),
        None,
        r"wrist.pos; the robot is commanded by .*--name wrist.pos=FEATURE",
    ),
    "a misspelt joint": (
        changed(state__names=["sholder.pos", "elbow.pos", "gripper.pos"]),
        None,
        r"sholder.pos.*perhaps 'shoulder.pos'",
    ),
    "one joint twice": (metadata(), Choices(names={"elbow.pos": "shoulder.pos"}), "shoulder.pos of the robot twice"),
    "a choice of nothing": (metadata(), Choices(names={"elbo": "elbow.pos"}), "names has 'elbo', which is not there"),
    "a choice of no feature": (metadata(), Choices(units={"elbow": "deg"}), "perhaps 'elbow.pos'"),
    "no such camera": (
        changed(cameras__key="observation/wrist_image"),
        None,
        "needs the camera 'observation/wrist_image'; the robot has front",
    ),
    "a unit that cannot become the other": (
        changed(state__units=["m", "rad", "0..100"]),
        None,
        r"'shoulder.pos' of the robot is in 'deg'; the policy reads 'm'",
    ),
    "steps for a robot of positions": (metadata(**POSITIONS_FOR_VELOCITIES), None, "takes positions.*another robot"),
    "a conversion without a way back": (metadata(), Choices(convert={"elbow.pos": (0.0, 1.0)}), "scale not 0"),
    "a fixed joint that the policy moves": (
        metadata(),
        Choices(fixed={"elbow.pos": 1.0}),
        "is an action of the policy",
    ),
}


@pytest.mark.parametrize(("told", "choices", "message"), SPOILT.values(), ids=SPOILT)
def test_a_robot_that_does_not_fit_is_refused_before_anything_moves(told, choices, message):
    arm = Arm()
    with pytest.raises(ValueError, match=message):
        LeRobotRobot(arm, told, choices=choices)
    assert arm.sent == []


def test_a_robot_that_tells_no_unit_is_asked_for_it():
    with pytest.raises(ValueError, match=r"'shoulder.pos' of the robot has no unit.*--unit shoulder.pos=UNIT"):
        LeRobotRobot(Arm(units=False), metadata())


def test_joints_that_the_policy_does_not_have_are_never_left_to_chance():
    arm = Arm()
    arm.action_features["base.vel"] = float
    with pytest.raises(ValueError, match=r"also commanded by base.vel.*--fixed base.vel=VALUE"):
        LeRobotRobot(arm, metadata())


def test_a_command_that_the_robot_clips_is_told_once(caplog):
    arm = Arm()
    arm.send_action = lambda action: {**action, "elbow.pos": 0.0}  # type: ignore[method-assign]
    run(arm, metadata())
    assert caplog.text.count("to 'elbow.pos'") == 1


def test_an_arm_whose_camera_is_not_there_is_not_left_with_torque():
    class HalfThere(Arm):
        has_torque = False

        def connect(self) -> None:
            self.has_torque = True
            raise ConnectionError("no camera 'front'")

        def disconnect(self) -> None:
            self.has_torque = False
            raise ConnectionError("the camera 'front' is not connected")

    arm = HalfThere()
    with pytest.raises(ConnectionError, match="no camera 'front'"), lerobot.connected(arm):
        raise AssertionError("it is not there")
    assert not arm.has_torque


def test_the_program_says_what_it_takes_and_what_is_missing(capsys):
    with pytest.raises(SystemExit) as end:
        lerobot.main(["--help"])
    assert end.value.code == 0 and "--robot.type" in capsys.readouterr().out
    assert lerobot.main(["--robot.type=so101_follower", "--name", "a=b", "--name", "a=c"]) == 2
    assert "lerobot" in capsys.readouterr().err


def test_choices_on_the_command_line_are_read_as_they_are_written():
    words = ["--name", "state_0=a.pos", "--camera", "observation/image=front", "--unit", "a.pos=0 open .. 1 closed"]
    args = lerobot.parser().parse_args([*words, "--convert", "a.pos=-0.01,1", "--fixed", "b.vel=0"])
    assert lerobot.choices_of(args) == Choices(
        {"state_0": "a.pos"},
        {"observation/image": "front"},
        {"a.pos": "0 open .. 1 closed"},
        {"a.pos": (-0.01, 1.0)},
        {"b.vel": 0.0},
    )
    for flag, value, message in (
        ("--name", "a=b", "twice"),
        ("--fixed", "a=nan", "no finite number"),
        ("--convert", "a=1", "SCALE,OFFSET"),
    ):
        twice = [flag, value] * (1 + (flag == "--name"))
        with pytest.raises(ValueError, match=message):
            lerobot.choices_of(lerobot.parser().parse_args(twice))
