"""The published clients, `openpi-client` and `positronic`, against our server. They need a package index, and
`positronic` brings 2 GB of packages, so this runs only when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream
"""

import ctypes.util
import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import exported_models
import paths
from openpi.cli.serving import serve_policy
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.libero_policy import make_libero_example
from openpi.serving.catalog import CheckpointCatalog
from openpi.shared.tree import flatten
from openpi_client.base_policy import BasePolicy
from openpi_positronic.codecs.catalog import get_codec
from serving_live import METADATA, PATIENCE_S, TestPolicy, server_thread
from tiny_recipe import TOKENIZER

ROBOTS = {"aloha": make_aloha_example, "droid": make_droid_example, "libero": make_libero_example}
PROGRAMS = paths.SUPPORT / "compat"
# typing_extensions: this release imports it without declaring it.
PACKAGES = ["openpi-client==0.1.2", "typing_extensions"]
# mujoco: what that release's simulator can use, of the versions that it allows.
POSITRONIC = {
    "0.2.1": ["positronic==0.2.1", "mujoco<3.4"],
    "0.3.0": ["positronic==0.3.0"],
    "0.4.1": ["positronic==0.4.1"],
}
# What `positronic-inference` calls things: the server's port, an episode's length, the rate of the cameras.
FLAGS = {"0.2.1": ("--policy.port", "--driver.simulation_time", "--camera_fps")}
NEWER_FLAGS = ("--policy.address.port", "--eval.timeout", "--eval.camera_fps")

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index"),
]


def interpreter_with(packages: list[str], environment: Path) -> Path:
    """Of an environment of its own; `OPENPI_UPSTREAM_<PACKAGE>_<VERSION>` may name one that is there."""
    variable = f"OPENPI_UPSTREAM_{re.sub('[^A-Z0-9]+', '_', packages[0].upper())}"
    if variable in os.environ:
        return Path(os.environ[variable]) / "bin" / "python"
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.11", str(environment)], check=True)
    interpreter = environment / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--python", str(interpreter)]
    # Elsewhere than in this project, whose own constraints uv would apply.
    subprocess.run([*install, *packages], check=True, cwd=environment)
    return interpreter


@pytest.fixture(scope="module", params=["websockets==11.0.3", "websockets>=15"])
def python(request, tmp_path_factory) -> Path:
    """Interpreter of an environment with the published client, with old and with new websockets."""
    return interpreter_with([*PACKAGES, request.param], tmp_path_factory.mktemp("upstream"))


def run(python: Path, port: int, program: str = "upstream_client.py", *arguments: str) -> dict:
    command = [python, PROGRAMS / program, str(port), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_is_served(report: dict) -> None:
    assert report["metadata"] == METADATA
    assert report["first"] == [[6.0, 6.0]] * 4 and report["dtype"] == "<f4" and report["name"] == "first"
    assert report["timing"] == ["infer_ms", "prev_total_ms"]
    assert report["sum"] == report["sent_sum"]
    assert report["rows"] == [0.0, 0.0, 0.0, 0.0, 4.0]
    assert report["failure"].startswith("Error in inference server:\nTraceback (most recent call last):\n")
    assert report["failure"].strip().endswith("ValueError: deliberate failure")


def test_the_published_client_is_served(python):
    policy = TestPolicy()
    with server_thread(lambda: policy) as (_, port):
        assert_is_served(run(python, port))
    sent = {obs["name"]: flatten(obs) for obs in policy.seen if obs.get("name") in ROBOTS}
    for robot, example in ROBOTS.items():
        wanted = flatten(example())
        arrays = {key for key, value in wanted.items() if isinstance(value, np.ndarray)}
        assert arrays <= sent[robot].keys(), robot
        assert all(sent[robot][key].dtype.kind == wanted[key].dtype.kind for key in arrays)


def test_the_published_client_waits_while_the_policy_is_loaded(python):
    loading = threading.Event()

    def load():
        assert loading.wait(PATIENCE_S)
        return TestPolicy()

    with server_thread(load) as (_, port), ThreadPoolExecutor(1) as pool:
        report = pool.submit(run, python, port)
        # Longer than the 10 s after which its handshake would give up.
        assert not loading.wait(12.0) and not report.done()
        loading.set()
        assert_is_served(report.result(PATIENCE_S))


def test_the_published_client_gets_the_actions_of_an_exported_model(python, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "big_vision").mkdir(parents=True)
    shutil.copyfile(TOKENIZER, tmp_path / "cache" / "big_vision" / "paligemma_tokenizer.model")
    model = exported_models.write(tmp_path / "pi0_aloha", ("trossen_biarm_single_base_cam_24dim",))
    words = ["--env", "ALOHA", "policy:exported", f"--policy.dir={model}"]
    load = serve_policy.loader(serve_policy.parse(words))
    with server_thread(load) as (_, port):
        actions = np.array(run(python, port, "upstream_exported.py")["actions"])
    expected = load().infer({**make_aloha_example(), "prompt": "fold the towel"})["actions"]
    np.testing.assert_allclose(actions, expected, atol=1e-6)


# Positronic


@dataclasses.dataclass
class StayPolicy(BasePolicy):
    """Holds the pose that it sees; the gripper tells the checkpoint."""

    place: str
    seen: list[dict]

    def infer(self, obs: dict) -> dict:
        self.seen.append(obs)
        row = [*obs["observation/state"][:7], int(Path(self.place).name) / 1e5]
        return {"actions": np.tile(np.array(row, np.float32), (50, 1))}


@pytest.fixture
def seen() -> list[dict]:
    return []


@pytest.fixture
def port(seen):
    """Of a server with two checkpoints."""
    places = {"5000": "exp/5000", "10000": "exp/10000"}
    described = {"config_name": "c", "checkpoint_path": "exp", "experiment_name": "exp"}
    catalog = CheckpointCatalog(lambda place: StayPolicy(place, seen), lambda: places, description=described)
    with server_thread(catalog, codec=get_codec("ee"), max_models=2) as (_, port):
        yield port


@pytest.fixture(scope="module", params=POSITRONIC)
def positronic_python(request, tmp_path_factory) -> Path:
    return interpreter_with(POSITRONIC[request.param], tmp_path_factory.mktemp("positronic"))


def test_the_published_positronic_client_is_served(positronic_python, port, seen):
    report = run(positronic_python, port, "upstream_positronic.py", "5000")
    meta = report["meta"]
    stack = meta.pop("local_stack", None) or meta.pop("local_stack.seq")
    stack = stack["seq"] if isinstance(stack, dict) else stack
    assert [part["name"] for part in stack] == ["chunked_schedule", "restrict_image_size"]
    steps = {"protocol_version=2": 15, "protocol_version=3": 15, "codec.horizon_sec=0.2": 3}
    assert report.get("newer", steps) == steps
    assert meta == {
        "type": "openpi",
        "host": "127.0.0.1",
        "port": port,
        "config_name": "c",
        "checkpoint_path": "exp",
        "experiment_name": "exp",
        "checkpoint_id": "5000",
        "action_fps": 15.0,
        "action_horizon_sec": 1.0,
        "image_sizes": [224, 224],
    }
    half_turn = [1, 0, 0, 0, -1, 0, 0, 0, -1]
    np.testing.assert_allclose(report["pose"], [0.4, 0.1, 0.3, *half_turn], atol=1e-6)
    np.testing.assert_allclose(report["grips"], [0.05] * 15)
    np.testing.assert_allclose(report["timestamps"], np.arange(15) / 15)
    assert report["again"] == 15
    assert "'grip'" in report["lacking"]
    assert report["unknown"] == "Server error: Checkpoint not found or invalid ID: 777."
    assert seen[0]["observation/image"].shape == (224, 224, 3) and seen[0]["prompt"] == "stack the cubes"


@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="its simulator draws with EGL")
@pytest.mark.parametrize("version", POSITRONIC)
@pytest.mark.parametrize("protocol", [1, 2])
def test_the_published_simulator_is_moved(tmp_path_factory, tmp_path, port, seen, version, protocol):
    """An episode of its own `positronic-inference`."""
    if version in FLAGS and protocol > 1:
        pytest.skip("knows the first protocol only")
    python = interpreter_with(POSITRONIC[version], tmp_path_factory.mktemp("simulator"))
    port_flag, time_flag, rate_flag = FLAGS.get(version, NEWER_FLAGS)
    command = [python.with_name("positronic-inference"), "sim", "--policy=.remote"]
    command += [f"{port_flag}={port}", f"{time_flag}=2", f"{rate_flag}=5", f"--output_dir={tmp_path}"]
    command += [f"--policy.address.query=protocol_version={protocol}"] if protocol > 1 else []
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(seen) >= 2  # a chunk lasts a second
    assert seen[0]["observation/wrist_image"].std() > 1 and seen[0]["prompt"].startswith("Pick up the green cube")
    first, last = (obs["observation/state"] for obs in (seen[0], seen[-1]))
    np.testing.assert_allclose(last[:3], first[:3], atol=0.06)  # told to stay, it sinks a little with each chunk
    assert abs(last[7] - first[7]) > 0.02  # the gripper moves
