"""The published `openpi-client` against our server. Needs a package index, so it runs only when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream
"""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.libero_policy import make_libero_example
from openpi.shared.tree import flatten
from serving_live import METADATA, PATIENCE_S, TestPolicy, server_thread

ROBOTS = {"aloha": make_aloha_example, "droid": make_droid_example, "libero": make_libero_example}
PROGRAM = Path(__file__).parent / "compat" / "upstream_client.py"
# typing_extensions: this release imports it without declaring it.
PACKAGES = ["openpi-client==0.1.2", "typing_extensions"]

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index"),
]


@pytest.fixture(scope="module", params=["websockets==11.0.3", "websockets>=15"])
def python(request, tmp_path_factory) -> Path:
    """Interpreter of an environment with the published client, with old and with new websockets."""
    environment = tmp_path_factory.mktemp("upstream")
    subprocess.run(["uv", "venv", "--quiet", "--clear", str(environment)], check=True)
    interpreter = environment / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--python", str(interpreter)]
    # Elsewhere than in this project, whose own constraints uv would apply.
    subprocess.run([*install, *PACKAGES, request.param], check=True, cwd=environment)
    return interpreter


def run(python: Path, port: int) -> dict:
    result = subprocess.run([python, PROGRAM, str(port)], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


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
