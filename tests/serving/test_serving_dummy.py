"""`openpi serve --dummy`: the robot's side before there is a checkpoint."""

import contextlib
import dataclasses

import numpy as np
import pytest

from openpi.cli.evaluation import client_check
from openpi.cli.serving import serve, serve_dummy
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.policies.dummy_policy import standing_still
from openpi.policies.guards import ObservationError
from openpi_client import realtime
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import server_thread


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two episodes in which two joints go from 0 to 1."""
    place = tmp_path_factory.mktemp("dummy") / "dataset"
    vector = {"dtype": "float32", "shape": [2], "names": ["left", "right"]}
    walk = np.linspace(0, 1, 60, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    with LeRobotWriter(place, fps=50, features={"observation.state": vector, "action": vector}) as writer:
        for _ in range(2):
            writer.add_episode({"observation.state": walk, "action": walk + 0.01}, "walk")
        writer.finish()
    return place


def test_a_recipe_s_robot_stands_still_and_bad_observations_are_refused():
    policy = serve_dummy.make(serve_dummy.Args("pi0_ur5", hold=True))
    assert policy.contract.robot == "ur5" and policy.contract.as_metadata()["actions"]["hold"] == ["stay"] * 7
    obs = {"joints": np.arange(6.0), "gripper": np.array([0.5]), "prompt": "go"}
    obs |= {key: np.zeros((224, 224, 3), np.uint8) for key in ("base_rgb", "wrist_rgb")}
    chunk = policy.infer(obs)["actions"]
    assert chunk.shape == (policy.contract.action_horizon, 7) and np.allclose(chunk, [0, 1, 2, 3, 4, 5, 0.5])
    with pytest.raises(ObservationError, match="joints"):
        policy.infer({**obs, "joints": np.zeros(5)})


def test_standing_still_goes_by_the_names_of_the_joints_not_by_their_places():
    contract = serve_dummy.make(serve_dummy.Args("pi0_ur5", hold=True)).contract
    joints, gripper = contract.state
    turned = dataclasses.replace(contract, state=(gripper, joints))
    assert standing_still(turned)(np.array([0.5, *range(6)]))[0].tolist() == [0, 1, 2, 3, 4, 5, 0.5]
    for other in (
        dataclasses.replace(joints, names=tuple(f"joint_{i}" for i in range(6))),
        dataclasses.replace(joints, units=("deg",) * 6),
    ):
        with pytest.raises(ValueError, match="the same names and units in both"):
            standing_still(dataclasses.replace(contract, state=(other, gripper)))


def test_an_episode_is_played_through_by_a_loop(dataset):
    policy = serve_dummy.make(serve_dummy.Args(str(dataset), episode=1, horizon=20))
    metadata = {"contract": policy.contract.as_metadata()}
    assert metadata["contract"]["control_hz"] == 50 and metadata["contract"]["actions"]["names"] == ["left", "right"]

    class Arm(realtime.Robot):
        position = np.zeros(2)

        def observe(self):
            return {"observation.state": self.position, "prompt": "walk"}

        def apply(self, action):
            self.position = action

    clock, arm = realtime.VirtualClock(), Arm()
    requester = realtime.SimulatedLatency(policy, clock, [0.1], metadata)
    loop = realtime.ControlLoop(arm, requester, hold="stay", safety=realtime.Safety(blend_s=0), clock=clock)
    summary = loop.run(max_s=5, until=lambda: arm.position[0] > 0.99)
    assert summary["end"] == "complete" and summary["ticks_without_row_after_start"] == 0
    assert np.diff(loop.last_log.commands[5:, 0]).max() < 0.035  # two frames: no jumps


def test_robots_on_one_server_play_the_episode_each_from_its_own_place(dataset):
    policy = serve_dummy.make(serve_dummy.Args(str(dataset), horizon=20))
    walk = np.linspace(0, 1, 60, dtype=np.float32)

    def ask(client, frame):
        return client.infer({"observation.state": np.full(2, walk[frame]), "prompt": "walk"})["actions"][0, 0]

    with server_thread(lambda: policy) as (_, port):
        ahead, behind = (WebsocketClientPolicy("127.0.0.1", port) for _ in range(2))
        with contextlib.closing(ahead), contextlib.closing(behind):
            for frame in range(0, 50, 10):
                assert ask(ahead, frame) == pytest.approx(walk[frame] + 0.01)
            assert ask(behind, 0) == pytest.approx(walk[0] + 0.01)
            assert ask(ahead, 50) == pytest.approx(walk[50] + 0.01)


def test_the_path_to_a_server_is_measured(dataset, capsys, monkeypatch):
    policy = serve_dummy.make(serve_dummy.Args(str(dataset), horizon=5000))
    with server_thread(lambda: policy, api_key="sesame") as (_, port):
        url = ["--host", f"ws://127.0.0.1:{port}", "--seconds", "0.2"]
        assert client_check.main(url) == 1 and "--api-key KEY or OPENPI_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("OPENPI_API_KEY", "")
        assert client_check.main(url) == 1 and "the API key is empty" in capsys.readouterr().err
        monkeypatch.setenv("OPENPI_API_KEY", "sesame")
        assert client_check.main(url) == 0
    short = serve_dummy.make(serve_dummy.Args(str(dataset), horizon=1))
    with server_thread(lambda: short) as (_, port):
        assert client_check.main(["--port", str(port), "--seconds", "0"]) == 1
    fits, short = capsys.readouterr().out.split("too few")
    assert "round_trip" in fits and "at 50 Hz" in fits and "never holds" in fits and "rows would do" in short


@pytest.mark.parametrize("rows", [np.full((50, 2), np.nan), np.zeros((50, 3)), None], ids=["nan", "width", "none"])
def test_answers_that_no_loop_would_play_do_not_pass_a_check_of_the_path(dataset, capsys, rows):
    policy = serve_dummy.make(serve_dummy.Args(str(dataset), horizon=50))
    policy.infer = lambda obs: {"actions": rows}
    with server_thread(lambda: policy) as (_, port):
        assert client_check.main(["--port", str(port), "--seconds", "0.2"]) == 1
    assert "the answer" in capsys.readouterr().err


@pytest.mark.parametrize(("part", "told"), [("cameras", [{"key": "c"}]), ("state", [{"key": "s"}]), ("actions", {})])
def test_contracts_of_other_programs_are_gone_by_as_far_as_they_go(part, told):
    contract = {"cameras": [], "state": [], "actions": {"names": ["a"]}, part: told}
    if part == "state":
        with pytest.raises(ValueError, match=r"is none of openpi's .KeyError..width"):
            client_check.example({"contract": contract})
    else:
        assert set(client_check.example({"contract": contract})) == {"prompt", *(entry["key"] for entry in told)}


def test_a_robot_s_side_is_built_over_tls_too(tmp_path, capsys):
    words = ["--dummy", "pi0_ur5", "--hold", "--tls-cert", str(tmp_path / "cert.pem")]
    assert serve.main(words) == 1 and "--tls-cert and --tls-key go together" in capsys.readouterr().err


def test_answers_may_be_lost():
    policy = serve_dummy.make(serve_dummy.Args("pi0_libero", hold=True, drop=1.0))
    obs = {"observation/state": np.zeros(8), "prompt": "go"}
    obs |= {f"observation/{key}": np.zeros((224, 224, 3), np.uint8) for key in ("image", "wrist_image")}
    with pytest.raises(RuntimeError, match="dropped"):
        policy.infer(obs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pi05_droid", "--hold"], "robot 'droid' does not say how it stands still"),
        (["no_such_recipe"], "no_such_recipe"),
        (["."], "is no contract"),
        (["pi0_libero", "--jitter-ms", "5"], "--jitter-ms is 5.0; expected 0 to 0.0"),
        (["pi0_libero", "--drop", "2"], "--drop is 2.0"),
    ],
)
def test_what_cannot_be_served_is_said(words, message, capsys):
    assert serve.main(["--dummy", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_dataset_of_another_robot_is_refused(dataset):
    with pytest.raises(ValueError, match="have 2 dimensions; robot 'libero' of the recipe has 7"):
        serve_dummy.make(serve_dummy.Args("pi0_libero", dataset=dataset))
