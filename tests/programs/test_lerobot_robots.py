"""LeRobot 0.6.1 itself with a robot plug-in: its robot in our loop, and its rollout on our server. Runs when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream tests/programs/test_lerobot_robots.py

OPENPI_LEROBOT_PYTHON names the interpreter of an environment that has `lerobot[pi,dataset]==0.6.1` already; nothing is
installed into it.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lerobot_upstream import lerobot_python  # noqa: F401
from test_robots_lerobot import CAMERA, HORIZON, JOINTS, RATE_HZ, UNITS, Walk, metadata

import tiny_recipe
from openpi.models.model_config import IMAGE_KEYS
from openpi.policies.contract import Contract
from openpi.policies.policy import Policy
from openpi.policies.policy_config import create_trained_policy
from openpi.policies.robot_inputs import RobotInputs, RobotOutputs
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.shared import normalize
from openpi.shared.normalize import NormStats
from openpi.shared.tree import flatten, unflatten
from openpi.training.config import AssetsConfig, SimpleDataConfig
from openpi.training.data_config import with_delta_actions
from openpi.transforms import Group
from openpi.weights import orbax_io
from openpi_client.base_policy import BasePolicy
from paths import ROOT, SUPPORT
from serving_live import server_thread

PATIENCE_S = 900  # its imports take a minute on a busy machine

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index"),
]

Run = Callable[..., str]


@pytest.fixture(scope="session")
def lerobot(lerobot_python: Path, tmp_path_factory) -> Run:  # noqa: F811
    """Runs a module in LeRobot's environment, beside which our plug-ins are installed; returns its output."""
    beside = tmp_path_factory.mktemp("plugins") / "site"
    ours = [ROOT / "packages" / name for name in ("openpi-client", "lerobot_policy_openpi")]
    packages = [*ours, SUPPORT / "compat" / "lerobot_robot_tiny_arm", "msgpack", "websockets"]
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", lerobot_python, "--target", beside]
    subprocess.run([*install, *packages], check=True, cwd=beside.parent)

    def run(module: str, *arguments: object, returncode: int = 0) -> str:
        done = subprocess.run(
            [str(lerobot_python), "-m", module, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(beside), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


class Server(BasePolicy):
    """Serves a policy under a contract; remembers what it was asked, and what it answered."""

    def __init__(self, policy: BasePolicy, told: dict[str, Any]) -> None:
        self.policy, self.metadata = policy, told
        self.asked: list[dict] = []
        self.answers: list[np.ndarray] = []

    def infer(self, obs: dict) -> dict:
        self.asked.append(obs)
        result = self.policy.infer({key: value for key, value in obs.items() if key not in RTC_KEYS})
        self.answers.append(result["actions"])
        return result


RTC_KEYS = ("prev_action_chunk", "inference_delay", "execution_horizon")


@contextlib.contextmanager
def served(policy: BasePolicy, told: dict[str, Any]) -> Iterator[tuple[Server, int]]:
    server = Server(policy, told)
    with server_thread(lambda: server) as (_, port):
        yield server, port


def read(log: Path, kind: str) -> list[dict[str, float]]:
    """What the robot's log has of one kind, in the policy's order and units."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def in_contract(row: dict[str, float]) -> np.ndarray:
    """Degrees to radians, but for the gripper."""
    return np.array(
        [np.radians(row[name]) if unit == "rad" else row[name] for name, unit in zip(JOINTS, UNITS, strict=True)]
    )


def check_sent(server: Server, log: Path) -> None:
    """What the robot measured reached the server, and the rows of the answers reached the robot, in their order."""
    measured = [in_contract(row) for row in read(log, "observation")]
    for asked in server.asked:
        state = asked["observation.state"]
        assert min(np.abs(state - row).max() for row in measured) < 1e-4
        picture = asked[CAMERA]
        assert picture.dtype == np.uint8 and picture[112, 20, 0] == 200 and picture[112, 20, 2] == 0  # RGB
        assert asked["prompt"] == "go"
    commands = np.stack([in_contract(row) for row in read(log, "action")])
    for row in server.answers[0][:3]:
        assert np.abs(commands - row).max(axis=1).min() < 1e-4


def test_a_robot_of_a_plugin_runs_in_our_loop(lerobot: Run, tmp_path: Path):
    log = tmp_path / "robot.log"
    with served(Walk(), metadata()) as (server, port):
        arguments = ("--port", port, "--robot.type=tiny_arm", f"--robot.log={log}", "--prompt", "go")
        text = lerobot("openpi_client.robots.lerobot", *arguments, "--dry-run")
        assert "nothing was commanded" in text and read(log, "action") == []
        folder = tmp_path / "runs"
        lerobot("openpi_client.robots.lerobot", *arguments, "--max-s", 7, "--log-folder", folder)
    check_sent(server, log)
    summary = json.loads((folder / "episode_0000" / "summary.json").read_text())
    assert summary["end"] == "time is over" and summary["rows_played"] > 10
    assert read(log, "disconnected")


def test_a_robot_that_does_not_fit_is_refused_by_both(lerobot: Run, tmp_path: Path):
    told = metadata(names=["shoulder.pos", "wrist.pos", "gripper.pos"])
    with served(Walk(), told) as (_, port):
        arguments = ("--port", port, "--robot.type=tiny_arm")
        text = lerobot("openpi_client.robots.lerobot", *arguments, returncode=2)
        assert "--name wrist.pos=FEATURE" in text
        text = lerobot("lerobot_policy_openpi", *arguments, "--output", tmp_path / "policy", returncode=2)
        assert "--name wrist.pos=FEATURE" in text and not (tmp_path / "policy").exists()


def rollout(lerobot: Run, folder: Path, log: Path, *more: str, max_age_s: float = 60) -> str:
    """An age that no busy machine exceeds."""
    robot = ("--robot.type=tiny_arm", f"--robot.log={log}", f"--policy.max_age_s={max_age_s}")
    options = ("--fps=20", "--duration=2", "--task=go", "--play_sounds=false", "--strategy.type=base")
    return lerobot("lerobot.scripts.lerobot_rollout", f"--policy.path={folder}", *robot, *options, *more)


def write_folder(lerobot: Run, port: int, folder: Path) -> None:
    text = lerobot("lerobot_policy_openpi", "--port", port, "--robot.type=tiny_arm", "--output", folder)
    assert f"--fps={RATE_HZ:g}" in text


def test_lerobot_rollout_plays_our_chunks(lerobot: Run, tmp_path: Path):
    log = tmp_path / "robot.log"
    with served(Walk(), metadata()) as (server, port):
        write_folder(lerobot, port, tmp_path / "policy")
        rollout(lerobot, tmp_path / "policy", log)
    check_sent(server, log)
    # Row by row, and the server is asked again when the chunk is played.
    played = [row for row in read(log, "action") if row["count"] > 1][: HORIZON + 1]
    assert len(server.asked) >= 2
    np.testing.assert_allclose([in_contract(row) for row in played[:HORIZON]], server.answers[0], atol=1e-4)
    np.testing.assert_allclose(in_contract(played[HORIZON]), server.answers[1][0], atol=1e-4)


def test_an_answer_that_comes_too_late_is_not_played(lerobot: Run, tmp_path: Path):
    log = tmp_path / "robot.log"
    with served(Walk(), metadata()) as (server, port):
        write_folder(lerobot, port, tmp_path / "policy")
        text = rollout(lerobot, tmp_path / "policy", log, max_age_s=1e-6)
    assert "the robot holds" in text and len(server.asked) > 2
    start = in_contract(read(log, "observation")[0])
    np.testing.assert_allclose([in_contract(row) for row in read(log, "action")], [start] * len(read(log, "action")))


def test_lerobot_s_real_time_chunking_goes_on_from_the_rows_that_it_still_plays(lerobot: Run, tmp_path: Path):
    log = tmp_path / "robot.log"
    told = {**metadata(), "rtc": {"modes": ["guided"], "max_delay": HORIZON - 1}}
    with served(Walk(), told) as (server, port):
        write_folder(lerobot, port, tmp_path / "policy")
        flags = ("--inference.type=rtc", "--inference.rtc.execution_horizon=4", "--inference.queue_threshold=5")
        rollout(lerobot, tmp_path / "policy", log, *flags)
    continued = [asked for asked in server.asked if "prev_action_chunk" in asked]
    assert continued
    rows = np.concatenate(server.answers)
    for asked in continued:
        left = asked["prev_action_chunk"]
        assert left.shape[1] == 3 and 0 <= asked["inference_delay"] <= len(left) <= HORIZON
        for row in left:  # as the server answered them: through LeRobot's order and units, and back
            assert np.abs(rows - row).max(axis=1).min() < 1e-4


def test_relative_actions_of_a_trained_policy_reach_lerobot_s_robot_as_positions(lerobot: Run, tmp_path: Path):
    policy = trained(tmp_path / "checkpoint")
    told = {"contract": policy.contract.as_metadata()}
    assert told["contract"]["actions"]["names"] == [*JOINTS]
    log = tmp_path / "robot.log"
    with served(policy, told) as (server, port):
        write_folder(lerobot, port, tmp_path / "policy")
        rollout(lerobot, tmp_path / "policy", log)
    check_sent(server, log)
    # Changes around the state, not around zero: the gripper is at 40.
    assert np.abs(server.answers[0][:, 2] - 40).max() < 20


def trained(folder: Path) -> Policy:
    """A tiny model of this arm with random weights, whose actions are relative to the state."""
    spec = RobotSpec(
        robot="tiny_arm",
        cameras=(CameraSpec(CAMERA, slot="base_0_rgb"),),
        state=(VectorSpec("observation.state", JOINTS, UNITS),),
        actions=VectorSpec("actions", JOINTS, UNITS),
        action_kind="absolute joint positions",
    )

    def robot_transforms(model_config: Any) -> Group:
        inputs = RobotInputs(spec, model_config.model_type)
        return with_delta_actions(Group(inputs=(inputs,), outputs=(RobotOutputs(spec),)), (True, True, True))

    data = SimpleDataConfig(assets=AssetsConfig(asset_id="arm"), data_transforms=robot_transforms)
    model = dataclasses.replace(tiny_recipe.MODEL, image_keys=IMAGE_KEYS)
    recipe = dataclasses.replace(tiny_recipe.tiny, name="tiny_arm_of_lerobot", model=model, data=data)
    rng = np.random.default_rng(3)
    flat = flatten(recipe.model.abstract_params())
    params = {path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    orbax_io.write_params(folder / "params", unflatten(params))
    around = {"state": np.array([0.0, 0.0, 40.0]), "actions": np.zeros(3)}
    stats = {key: NormStats(mean, np.array([0.5, 0.5, 5.0])) for key, mean in around.items()}
    normalize.save(folder / "assets" / "arm", stats)
    data_config = recipe.data.create(recipe.assets_dirs, recipe.model)
    Contract.build(data_config, recipe.model, control_hz=RATE_HZ).save(folder)
    policy = create_trained_policy(recipe, folder)
    picture = np.zeros((224, 224, 3), np.uint8)
    policy.infer({CAMERA: picture, "observation.state": np.zeros(3, np.float32), "prompt": "go"})  # compiles
    return policy
