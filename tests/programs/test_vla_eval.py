"""vla-eval 0.8.0: its model server for pi0 runs on this package unchanged. In its own environment, when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream tests/programs/test_vla_eval.py

OPENPI_VLA_EVAL_PYTHON names the interpreter of an environment that has `vla-eval==0.8.0` and this package already.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import arm_files
from openpi.policies.policy_config import create_trained_policy
from openpi.training.config import get_config
from paths import ROOT, SUPPORT

RECIPE = f"{SUPPORT / 'tiny_arm.py'}:recipe"
PATIENCE_S = 600

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Interpreter of an environment with vla-eval, and this package in the place of the published one."""
    if given := os.environ.get("OPENPI_VLA_EVAL_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("vla_eval")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["uv", "venv", "--quiet", "--python", version, folder / "env"], check=True)
    interpreter = folder / "env" / "bin" / "python"
    packages = ["vla-eval==0.8.0", f"{ROOT}[jax]", ROOT / "packages" / "openpi-client"]
    # Elsewhere than in this project, whose own constraints uv would apply.
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", interpreter, *packages], check=True, cwd=folder)
    return interpreter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return arm_files.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "1")


@contextlib.contextmanager
def model_server(python: Path, checkpoint: Path, log: Path) -> Iterator[int]:
    """The harness's own program, as `vla-eval serve` starts it; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ["--args.config_name", RECIPE, "--args.checkpoint", str(checkpoint)]
    command = [python, "-m", "vla_eval.model_servers.pi0", "--address", f"127.0.0.1:{port}", *names]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        wait_until_ready(process, port, log)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(process: subprocess.Popen, port: int, log: Path) -> None:
    """It has no other sign than `GET /health`."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
            continue
        with answer:
            assert json.load(answer) == {"status": "ok"}
            return
    raise AssertionError(f"no server after {PATIENCE_S} s: {log.read_text()}")


def test_its_model_server_plays_our_checkpoint_to_its_own_client(python: Path, checkpoint: Path, tmp_path: Path):
    asked = arm_files.arm_observation()
    arrays = {key.rpartition("/")[2]: value for key, value in asked.items()}
    np.savez(tmp_path / "asked.npz", **arrays)
    with model_server(python, checkpoint, tmp_path / "server.log") as port:
        program = SUPPORT / "compat" / "upstream_vla_eval.py"
        command = [python, program, f"ws://127.0.0.1:{port}", tmp_path / "asked.npz", tmp_path / "out.npz"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()
    theirs = np.load(tmp_path / "out.npz")
    assert str(theirs["server"]) == "Pi0ModelServer"
    assert theirs["wants"].tolist() == ["send_state", "send_wrist_image"]
    policy = create_trained_policy(get_config(RECIPE), checkpoint)
    # A chunk is played to its end; then the model is asked again, and draws other noise, as here.
    ours = np.concatenate([policy.infer(asked)["actions"] for _ in range(2)])
    np.testing.assert_allclose(theirs["actions"], ours[: len(theirs["actions"])], atol=1e-4)
